"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "pretended_ranks",
    "flash_attention",
    "divide",
    "KINDS",
    "DEPTHS",
    "PASSES",
    "EMPTY",
    "moved_bytes",
    "Meter",
    "spelt",
    "trace",
    "two_traces",
    "per_block",
    "extrapolated",
    "places",
    "peak",
    "PlanConfig",
    "plan",
    "predicted",
    "described",
    "CHOICES",
    "settings",
    "no_leaner",
    "search",
    "table",
    "cli",
]


# ---------- chapters/02_pretraining.py · A 70B step on a laptop

import logging
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
import tyro
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker, _FSDPRefType
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from llama2lib.distributed import check_tp, make_mesh, parallelize, training_tensors
from llama2lib.launch import one_line_errors
from llama2lib.model import LLAMA2, Llama
from llama2lib.optim import adamw
from llama2lib.pretrain import PRETRAIN, PretrainConfig, micro_batches, next_token_loss, train_step
from llama2lib.roofline import A100, Hardware, step_seconds

@contextmanager
def pretended_ranks(gpus: int) -> Iterator[None]:
    "Be rank 0 of so many processes that do not exist (PyTorch's fake process group)."
    if dist.is_initialized():
        raise RuntimeError("a process group exists already: plan in a process of its own, without torchrun")
    chatty = logging.getLogger("torch.distributed.tensor._redistribute")
    quiet = mock.patch.object(chatty, "disabled", True)  # it warns of two all-reduces of one number each
    with quiet, mock.patch.object(sys, "excepthook", sys.excepthook):  # a group makes errors name the rank, for good
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
        try:
            yield
        finally:
            dist.destroy_process_group()


def flash_attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False) -> Tensor:
    "What `F.scaled_dot_product_attention` calls on an A100, where key/value heads are shared inside the kernel."
    return torch.ops.aten._scaled_dot_product_flash_attention.default(q, k, v, 0.0, is_causal)[0]


def divide(config: PretrainConfig, gpus: int) -> tuple[int, int, int]:
    "Data-parallel ranks, rows of the fullest rank in a step, its passes; ValueError with the numbers if it cannot be."
    if config.model not in LLAMA2:
        raise ValueError(f"model {config.model!r}: expected one of {', '.join(LLAMA2)}")
    tp = config.parallel.tp
    if gpus < tp or gpus % tp:
        raise ValueError(f"tp {tp} does not divide {gpus} GPUs")
    check_tp(replace(LLAMA2[config.model], max_seq_len=config.max_seq_len), tp)
    ranks, rows = gpus // tp, config.batch_rows
    if rows < ranks:
        raise ValueError(
            f"a step has {rows} rows of {config.max_seq_len} tokens, fewer than the {ranks} ranks that {gpus} GPUs "
            f"make with tp {tp}: take fewer GPUs, a larger tp or more batch_tokens"
        )
    mine = math.ceil(rows / ranks)
    return ranks, mine, math.ceil(mine / config.micro_batch)


# ---------- chapters/02_pretraining.py · What is alive at once

KINDS = {  # of memory, and what PyTorch's tracker calls them
    "parameters": ("SHARDED_PARAM",),
    "gradients": ("SHARDED_GRAD", "UNSHARDED_GRAD"),
    "optimizer": ("OPT",),
    "activations": ("ACT",),
    "communication": ("UNSHARDED_PARAM", "ALL_GATHER", "REDUCE_SCATTER"),  # gathered weights, and FSDP's buffers
    "temporaries": ("TEMP",),
    "inputs": ("INP", "BUFFER"),
}
DEPTHS = (3, 4)  # blocks of the traces that are extrapolated: the second has neighbours, and so has the last but one
PASSES = 2  # of a step that are traced: the third does what the second did
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


def moved_bytes(*values) -> int:
    "Bytes of all tensors in some arguments and results, an expanded one counted as it is stored."
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in tensors)


class Meter(FSDPMemTracker):
    """Watches one rank's `train_step`, on fake or real tensors: peak memory at every moment, and the work of phases.

    A moment is a phase ('first forward', … 'last backward', 'update') and a block, None outside blocks. `memory`:
    {moment: {kind: bytes}} at its peak. `work`: {phase: counts}, of FLOPs ('matmul', 'attention'), of bytes moved by
    other kernels ('elementwise'; 'copies', which a compiler leaves) and by the products' operands, and of collectives:
    bytes of the whole tensors ('dp all_gather', …) and 'calls'.
    """

    def __init__(self, model: Llama, optimizer: torch.optim.Optimizer, passes: int):
        super().__init__(model, optimizer)
        self.names = [*["first"] * (passes - 1), "last"]
        self.at, self.after_backward, self.paused = -1, False, False
        self.memory: dict[tuple[str, int | None], dict[str, int]] = {}
        self.work: dict[str, Counter] = defaultdict(Counter)
        mesh = model.tok_embeddings.weight.device_mesh
        self.groups = {mesh.get_group(name).group_name: name for name in mesh.mesh_dim_names}
        self.device = model.tok_embeddings.weight.device

    def loss(self, model: Llama, tokens: Tensor, targets: Tensor) -> Tensor:
        "`next_token_loss`, and the beginning of a pass."
        self.at, self.after_backward = self.at + 1, False
        self.reset_mod_stats()
        return next_token_loss(model, tokens, targets)

    def phase(self) -> str:
        "What the step is at."
        self.after_backward |= self._mod_tracker.is_bw
        if self.after_backward and not self._mod_tracker.is_bw and self.at == len(self.names) - 1:
            return "update"
        return f"{self.names[self.at]} {'backward' if self.after_backward else 'forward'}"

    def block(self) -> int | None:
        "The block that runs now, or whose gradients are computed."
        names = (name.split(".") for name in self._mod_tracker.parents)
        return next((int(parts[2]) for parts in names if len(parts) == 3 and parts[1] == "layers"), None)

    def _update_peak_stats(self, peak_state):  # of the tracker, which calls it after every operation
        now = self._curr_mem_snap.get(self.device, {"Total": 0})
        moment = self.phase(), self.block()
        if now["Total"] > self.memory.get(moment, {"total": -1})["total"]:
            kinds = {kind: sum(now[_FSDPRefType[name]] for name in names) for kind, names in KINDS.items()}
            self.memory[moment] = kinds | {"total": now["Total"]}

    def _fsdp_param_group_post_backward(self, module, post_backward):  # gradients kept whole are gradients too
        watched = super()._fsdp_param_group_post_backward(module, post_backward)

        def inner(*args, **kwargs):
            watched(*args, **kwargs)
            for parameter in module._get_fsdp_state()._fsdp_param_group.fsdp_params:
                if (kept := parameter.unsharded_accumulated_grad) is not None:
                    self._update_and_maybe_create_winfos(kept, _FSDPRefType.UNSHARDED_GRAD)

        return inner

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.paused:
            return func(*args, **kwargs or {})
        if func is torch.ops.aten._local_scalar_dense.default:  # a number is read: a fake tensor has none
            return 1.0
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is not NotImplemented:
            self.count(func, args, kwargs or {}, out)
        return out

    def count(self, func, args: tuple, kwargs: dict, out) -> None:
        "Add an operation to the work of its phase."
        work, packet = self.work[self.phase()], func._overloadpacket
        if func in collective_ops:
            if func not in sync_ops:
                kind = next(k for k in ("all_gather", "reduce_scatter", "all_reduce") if k in spelt(packet))
                group = self.groups[CollectiveOp.get_process_group(func, args).group_name]
                work[f"{group} {kind}"] += CollectiveOp.get_comm_tensor_size(func, out, args, kwargs)
                work[f"{group} {kind} calls"] += 1
        elif packet in flop_registry:
            kind = "attention" if "scaled_dot_product" in packet.__name__ else "matmul"
            work[kind] += flop_registry[packet](*args, **kwargs, out_val=out)
            work["operands"] += moved_bytes(args, kwargs, out)
        elif not func.is_view and packet.__name__ not in EMPTY:
            work["copies" if func.namespace == "fsdp" else "elementwise"] += moved_bytes(args, kwargs, out)

    @contextmanager
    def unwatched_shapes(self) -> Iterator[None]:
        "DTensor asks for the shapes of whole tensors by running operations that no rank runs: look away meanwhile."
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def inner(*args):
            before, self.paused = self.paused, True
            try:
                return propagate(*args)
            finally:
                self.paused = before

        with mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", inner):
            yield


def spelt(packet) -> str:
    "Name of a collective as PyTorch's functional ones spell it."
    return packet.__name__.replace("allgather", "all_gather").replace("allreduce", "all_reduce")

def trace(config: PretrainConfig, gpus: int, n_layers: int | None = None) -> dict:
    """Run rank 0's training step with `n_layers` blocks (None: all) on fake tensors: `memory` and `work`, see `Meter`.

    At most PASSES passes of a step are run. Moments are strings: 'last backward, block 3', 'update'.
    """
    _, mine, passes = divide(config, gpus)
    shape = replace(LLAMA2[config.model], max_seq_len=config.max_seq_len)
    shape = replace(shape, n_layers=n_layers or shape.n_layers)
    parallel = replace(config.parallel, compile=False)
    with pretended_ranks(gpus):
        mesh = make_mesh(parallel, "cpu")
        with torch.device("meta"):
            model = Llama(shape)
        parallelize(model, mesh, parallel, torch.bfloat16)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            optimizer = adamw(model, config.lr, config.betas, config.eps, config.weight_decay)
            for group in optimizer.param_groups:
                group["foreach"] = True  # PyTorch's choice on a GPU
            training_tensors(model, optimizer)
            batch = torch.zeros(mine, config.max_seq_len + 1, dtype=torch.int64)
            parts = list(micro_batches(batch, passes))[:PASSES]
            meter = Meter(model, optimizer, len(parts))
            meter.track_inputs((batch,))
            with meter.unwatched_shapes(), mock.patch.object(F, "scaled_dot_product_attention", flash_attention), meter:
                targets = config.batch_rows * config.max_seq_len
                train_step(model, optimizer, parts, targets, config.grad_clip, parallel.reduce, meter.loss)
    memory = {
        phase if block is None else f"{phase}, block {block}": kinds for (phase, block), kinds in meter.memory.items()
    }
    return {"layers": shape.n_layers, "memory": memory, "work": {phase: dict(w) for phase, w in meter.work.items()}}


# ---------- chapters/02_pretraining.py · Four blocks tell of eighty

def two_traces(config: PretrainConfig, gpus: int) -> tuple[dict, dict]:
    "What `per_block` and `extrapolated` need."
    small, large = (trace(config, gpus, depth) for depth in DEPTHS)
    return small, large


def per_block(small: dict, large: dict) -> dict:
    "The work of each phase as {'rest': …, 'block': …}, from traces of k and k + 1 blocks: work is linear in depth."
    parts = {}
    for phase, work in large["work"].items():
        block = {name: count - small["work"][phase].get(name, 0) for name, count in work.items()}
        rest = {name: count - large["layers"] * block[name] for name, count in work.items()}
        parts[phase] = {"rest": rest, "block": block}
    return parts


def extrapolated(small: dict, large: dict, layers: int) -> dict:
    """The trace of `layers` blocks, from traces of three and of four.

    At a moment (in the first, second, last but one or last block, or outside) memory is linear in depth. What other
    blocks hold lies between what these do, so that the peak is at one of these moments.
    """
    low, high = places(small), places(large)
    memory = {}
    for place, (moment, kinds) in high.items():
        block = re.search(r"block (-?\d+)", place)
        if block:
            moment = f"{place.split(',')[0]}, block {int(block[1]) % layers}"
        extra = layers - large["layers"]
        memory[moment] = {kind: size + extra * (size - low[place][1][kind]) for kind, size in kinds.items()}
    work = {
        phase: {name: rest + layers * parts["block"][name] for name, rest in parts["rest"].items()}
        for phase, parts in per_block(small, large).items()
    }
    return {"layers": layers, "memory": memory, "work": work}


def places(trace: dict) -> dict[str, tuple[str, dict]]:
    "Moments whose block is counted from the beginning (0, 1) or the end (-1, -2)."
    found = {}
    for moment, kinds in trace["memory"].items():
        phase, _, block = moment.partition(", block ")
        for place in ("",) if not block else (0, 1, -1, -2):
            if place == "" or place % trace["layers"] == int(block):
                found[f"{phase}, block {place}" if block else phase] = moment, kinds
    return found


def peak(trace: dict) -> tuple[str, dict[str, int]]:
    "The moment with the most memory, and what it holds."
    return max(trace["memory"].items(), key=lambda item: item[1]["total"])


# ---------- chapters/02_pretraining.py · The plan

@dataclass(frozen=True)
class PlanConfig:
    "What to plan; what is not given (None) is as in the model's recipe in llama2lib.pretrain.PRETRAIN."

    model: str = "70B"  # a size of llama2lib.model.LLAMA2
    gpus: int = 64  # A100 80GB, eight in a node; with search: at most so many
    tp: int | None = None  # tensor parallelism
    ac: Literal["none", "selective", "full"] | None = None  # activations recomputed
    micro_batch: int | None = None  # rows in one forward pass of one GPU
    reduce: Literal["step", "micro_batch"] | None = None  # when gradients are summed over ranks
    compile: bool | None = None  # torch.compile every block; the plan's memory is that without
    batch_tokens: int = 4_000_000  # of one optimiser step, over all GPUs
    seq_len: int = 4096  # tokens of a row
    every_block: bool = True  # trace all blocks; otherwise three and four, and extrapolate
    search: bool = False  # find the fewest GPUs, and the fastest setting that fits them

    def recipe(self) -> PretrainConfig:
        "The run that is planned; ValueError for an unknown model."
        if self.model not in LLAMA2:
            raise ValueError(f"model {self.model!r}: expected one of {', '.join(LLAMA2)}")
        base = PRETRAIN.get(self.model, PRETRAIN["7B"])
        given = {name: getattr(self, name) for name in ("tp", "ac", "reduce", "compile")}
        parallel = replace(base.parallel, **{name: value for name, value in given.items() if value is not None})
        return replace(
            base,
            model=self.model,
            parallel=parallel,
            micro_batch=base.micro_batch if self.micro_batch is None else self.micro_batch,
            batch_tokens=self.batch_tokens,
            max_seq_len=self.seq_len,
            tokens=PRETRAIN["7B"].tokens,
            warmup_steps=0,
        )


def plan(config: PlanConfig, hardware: Hardware = A100) -> dict:
    """Peak memory of a GPU by kind, in bytes, whether it fits, and the predicted speed of a run.

    ValueError, with the numbers, when the model or the batch cannot be divided so.
    """
    recipe = config.recipe()
    ranks, _, passes = divide(recipe, config.gpus)
    small, large = two_traces(recipe, config.gpus)
    layers = LLAMA2[config.model].n_layers
    every = config.every_block or layers <= large["layers"]
    whole = trace(recipe, config.gpus) if every else extrapolated(small, large, layers)
    moment, held = peak(whole)
    facts = {"ranks": ranks, "passes": passes, "moment": moment, "memory": {kind: held[kind] for kind in KINDS}}
    facts |= {"total": held["total"], "fits": held["total"] + hardware.reserve <= hardware.memory}
    return facts | predicted(per_block(small, large), recipe, config.gpus, hardware)


def predicted(work: dict, recipe: PretrainConfig, gpus: int, hardware: Hardware = A100) -> dict:
    "Seconds of a step, tokens/s of a GPU, MFU as PaLM counts it, and GPU-hours for the recipe's tokens."
    shape, parallel = LLAMA2[recipe.model], recipe.parallel
    passes, tokens = divide(recipe, gpus)[2], recipe.batch_rows * recipe.max_seq_len
    seconds = step_seconds(hardware, work, shape.n_layers, passes, gpus, parallel.tp, parallel.compile)
    speed = tokens / seconds["step"] / gpus
    mfu = speed * 3 * shape.forward_flops_per_token(recipe.max_seq_len) / hardware.peak_flops
    hours = recipe.tokens / speed / 3600
    return {"seconds": seconds, "tokens_per_second": speed, "mfu": mfu, "gpu_hours": hours}


def described(config: PlanConfig, found: dict, hardware: Hardware = A100) -> str:
    "A plan in words and tables."
    recipe, seconds = config.recipe(), found["seconds"]
    parallel, rows = recipe.parallel, min(recipe.micro_batch, math.ceil(recipe.batch_rows / found["ranks"]))
    compiled = "compiled" if parallel.compile else "not compiled"
    lines = [
        f"{config.model} on {config.gpus} GPUs: tp {parallel.tp}, {found['ranks']} data-parallel ranks, "
        f"ac {parallel.ac}, {found['passes']} passes a step of {rows} rows, "
        f"gradients reduced every {parallel.reduce}, {compiled}",
        f"\nmemory of a GPU at its peak, in GiB ({found['moment']})",
    ]
    for kind, size in [*found["memory"].items(), ("in all", found["total"])]:
        lines.append(f"  {kind:14} {size / 2**30:6.2f}")
    room = f"{hardware.memory / 2**30:.0f} less {hardware.reserve / 2**30:.0f} in reserve"
    lines.append(f"  {'fits' if found['fits'] else 'does not fit'} into {room}")
    shown = {"compute": "compute", "tp": "exposed tp communication", "dp": "exposed dp communication"}
    parts = ", ".join(f"{name} {seconds[key] / seconds['step']:.0%}" for key, name in shown.items())
    lines.append(f"\npredicted: {seconds['step']:.2f} s a step ({parts})")
    lines.append(
        f"  {found['tokens_per_second']:,.0f} tokens/s per GPU, {found['mfu']:.1%} MFU, "
        f"{found['gpu_hours']:,.0f} GPU-hours for {recipe.tokens / 1e12:g}T tokens"
    )
    return "\n".join(lines)

CHOICES = {  # that a search looks at, those that need least memory first
    "tp": (8, 4, 2, 1),
    "ac": ("full", "selective", "none"),
    "reduce": ("micro_batch", "step"),
    "micro_batch": (1, 2, 4),
}


def settings(config: PlanConfig, gpus: int) -> list[PlanConfig]:
    "All CHOICES of what `config` leaves open, that so many GPUs can be divided into; of each tp the leanest first."
    wanted = [(getattr(config, name),) if getattr(config, name) is not None else CHOICES[name] for name in CHOICES]
    found = []
    for values in product(*wanted):
        given = dict(zip(CHOICES, values, strict=True))
        setting = replace(config, gpus=gpus, every_block=False, search=False, **given)
        try:
            divide(setting.recipe(), gpus)
        except ValueError:
            continue
        found.append(setting)
    return found


def no_leaner(one: PlanConfig, other: PlanConfig) -> bool:
    "Whether `one` needs as much memory as `other` or more, since none of its choices needs less."
    pairs = [(choices, getattr(one, name), getattr(other, name)) for name, choices in CHOICES.items() if name != "tp"]
    return one.tp == other.tp and all(a == b or choices.index(a) > choices.index(b) for choices, a, b in pairs)


def search(config: PlanConfig, hardware: Hardware = A100) -> list[tuple[PlanConfig, dict]]:
    """The fewest GPUs, up to `config.gpus`, that a setting fits on, and the settings on so many: the fastest that fits
    first, those that do not fit last, without those that cannot fit because a leaner one does not.

    ValueError, with the least memory that was found, when none fits, or with the reason when none can be divided so.
    """
    numbers = [n for n in (1, 2, 4, *range(8, config.gpus, 8), config.gpus) if n <= config.gpus]
    counts = [n for n in numbers if settings(config, n)]
    if not counts:
        divide(config.recipe(), config.gpus)  # raises, and says why
    low, high, least = 0, len(counts), math.inf
    with tqdm(desc="GPUs", unit=" plans", disable=None) as bar:
        while low < high:  # the fewest lie in counts[low:high]
            middle = (low + high) // 2
            lean, totals = {}, []
            for setting in settings(config, counts[middle]):
                lean.setdefault(setting.tp, setting)
            for setting in lean.values():
                totals.append(plan(setting, hardware)["total"])
                bar.set_postfix_str(f"{setting.gpus} GPUs, tp {setting.tp}: {totals[-1] / 2**30:.0f} GiB")
                bar.update()
                if totals[-1] + hardware.reserve <= hardware.memory:
                    break
            least = min([least, *totals])
            if min(totals) + hardware.reserve <= hardware.memory:
                high = middle
            else:
                low = middle + 1
    if low == len(counts):
        needs = f"the leanest setting needs {least / 2**30:.1f} GiB each"
        raise ValueError(f"{config.model} fits on no number of GPUs up to {config.gpus}: {needs}")
    found, failed = [], []
    for setting in tqdm(settings(config, counts[low]), desc=f"settings of {counts[low]} GPUs", disable=None):
        if any(no_leaner(setting, other) for other in failed):
            continue
        found.append((setting, plan(setting, hardware)))
        failed += [setting] if not found[-1][1]["fits"] else []
    return sorted(found, key=lambda pair: (not pair[1]["fits"], -pair[1]["tokens_per_second"]))


def table(found: list[tuple[PlanConfig, dict]]) -> str:
    "The settings that a search looked at."
    lines = ["GPUs  tp  ac         micro-batch  reduce       GiB   fits  tokens/s per GPU    MFU"]
    for setting, facts in found:
        kind = f"{setting.gpus:4} {setting.tp:3}  {setting.ac:9} {setting.micro_batch:12}  {setting.reduce:11}"
        speed = f"{facts['tokens_per_second']:16,.0f} {facts['mfu']:7.1%}"
        lines.append(f"{kind} {facts['total'] / 2**30:5.1f}  {'yes' if facts['fits'] else 'no':>5} {speed}")
    return "\n".join(lines)


@one_line_errors()
def cli(prog: str = "python -m llama2lib.plan"):
    "python -m llama2lib.plan --model 70B --gpus 64: memory and speed of a pretraining run, before there are GPUs."
    config = tyro.cli(PlanConfig, prog=prog, description=cli.__doc__)
    torch.set_num_threads(1)
    if not config.search:
        return print(described(config, plan(config)))
    found = search(config)
    print(table(found), described(*found[0]), sep="\n\n")


if __name__ == "__main__":
    cli()
