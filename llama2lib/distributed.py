"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "processes",
    "compute_dtype",
    "Parallel",
    "make_mesh",
    "check_row",
    "check_tp",
    "tensor_parallel",
    "KEPT",
    "recompute",
    "parallelize",
    "data_ranks",
    "init_weights",
    "training_tensors",
    "StateFolder",
]


# ---------- chapters/02_pretraining.py · Many GPUs

import json
import os
import pickle
import re
import shutil
import time
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from llama2lib.checkpoint import local_block
from llama2lib.model import Llama, ModelConfig
from llama2lib.recipes import write_atomic


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that torchrun started (gloo on CPUs, NCCL on GPUs), if it did; yields this process's device.

    Where one of several processes fails, the group is left to the process's end: NCCL takes it down only together with
    the other ranks, which still wait for this one, and torchrun would never hear of the failure.
    """
    cuda, launched = torch.cuda.is_available(), "RANK" in os.environ
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if cuda or launched:  # a single GPU is a group of one: FSDP then keeps float32 weights beside bfloat16 passes
        store, rank, ranks = next(rendezvous("env://")) if launched else (dist.HashStore(), 0, 1)
        if os.environ.get("GROUP_WORLD_SIZE") == "1":
            # torchrun keeps one store over its restarts, with the addresses of the processes that died. On one node the
            # attempt's number keeps them apart; several nodes need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (see `launch`)
            store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
        backend, bound = ("cpu:gloo,cuda:nccl", device) if cuda else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, device_id=bound)
    failed = True
    try:
        yield device
        failed = False
    finally:
        several = dist.is_initialized() and dist.get_world_size() > 1
        if dist.is_initialized() and not (failed and several):
            dist.destroy_process_group()
            if several and not cuda:
                time.sleep(0.5)  # a thread of gloo that frees its last tensors after Python's end aborts the process


def compute_dtype(device: torch.device | str) -> torch.dtype:
    "What a model that only answers is loaded in, whatever its folder holds: bfloat16 on CUDA, float32 elsewhere."
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


@dataclass(frozen=True)
class Parallel:
    "How a training step is divided among ranks and its memory spent; changes speed and memory, not the result."

    tp: int = 1  # tensor parallelism: ranks that divide every matrix among them; at most the GPUs of one node
    ac: Literal["none", "selective", "full"] = "none"  # activations recomputed: none, all but matrix products, all
    compile: bool = False  # torch.compile every block of a divided model, the loss of one that is whole
    reduce: Literal["step", "micro_batch"] = "step"  # sum gradients over ranks once (fast), or each time (less memory)


def make_mesh(parallel: Parallel, device_type: str) -> DeviceMesh | None:
    "The ranks as a grid (dp, tp), neighbours in tp; None for one process on a CPU. ValueError if tp does not divide."
    if not dist.is_initialized():
        if parallel.tp > 1:
            raise ValueError(f"tp {parallel.tp} needs {parallel.tp} processes: start it with torchrun")
        return None
    ranks = dist.get_world_size()
    if ranks % parallel.tp:
        raise ValueError(f"tp {parallel.tp} does not divide {ranks} ranks")
    if parallel.tp == 1:
        return init_device_mesh(device_type, (ranks,), mesh_dim_names=("dp",))
    return init_device_mesh(device_type, (ranks // parallel.tp, parallel.tp), mesh_dim_names=("dp", "tp"))


# ---------- chapters/02_pretraining.py · Tensor parallelism

def check_row(max_seq_len: int, tp: int):
    "ValueError, with the numbers, when `tp` ranks cannot share out the tokens of a row."
    if tp < 1 or max_seq_len % tp:
        raise ValueError(f"max_seq_len {max_seq_len}: expected a multiple of tp {tp}")


def check_tp(config: ModelConfig, tp: int):
    "ValueError, with the numbers, when a model does not divide into `tp` equal parts."
    for name in ("n_heads", "n_kv_heads", "hidden_dim", "vocab_size", "max_seq_len"):
        if getattr(config, name) % tp:
            raise ValueError(f"tp {tp} does not divide {name} {getattr(config, name)}")


def tensor_parallel(model: Llama, mesh: DeviceMesh):
    "Divide every matrix among the ranks of a 1-D mesh, and the tokens of a row between them; in place."
    check_tp(model.config, mesh.size())
    one, rows = Replicate(), Shard(1)  # (B T D): all tokens on every rank, or a part of the tokens
    outer = {
        "tok_embeddings": RowwiseParallel(input_layouts=one, output_layouts=rows),
        "norm": SequenceParallel(),
        "output": ColwiseParallel(input_layouts=rows, output_layouts=Shard(-1), use_local_output=False),
        "score": SequenceParallel(),  # a reward model's (chapter 04)
    }
    block = {
        "attention_norm": SequenceParallel(),
        "attention": PrepareModuleInput(
            input_layouts=(rows, None, None, None), desired_input_layouts=(one, None, None, None)
        ),
        "ffn_norm": SequenceParallel(),
        "feed_forward": PrepareModuleInput(input_layouts=(rows,), desired_input_layouts=(one,)),
    }
    for name in ("attention.wq", "attention.wk", "attention.wv", "feed_forward.w1", "feed_forward.w3"):
        block[name] = ColwiseParallel()
    for name in ("attention.wo", "feed_forward.w2"):
        block[name] = RowwiseParallel(output_layouts=rows)
    parallelize_module(model, mesh, {name: style for name, style in outer.items() if hasattr(model, name)})
    for layer in model.layers:
        parallelize_module(layer, mesh, block)


# ---------- chapters/02_pretraining.py · Activations, compilation, FSDP

KEPT = {  # results that selective recomputation keeps
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
}


def _keep(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def recompute(model: Llama, ac: str):
    "Let every block recompute its activations in the backward pass: 'none', 'selective' or 'full'; in place."
    if ac == "none":
        return
    context = {"context_fn": partial(create_selective_checkpoint_contexts, _keep)} if ac == "selective" else {}
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False, **context)


def parallelize(model: Llama, mesh: DeviceMesh | None, parallel: Parallel, dtype: torch.dtype | None = None) -> Llama:
    """Divide a model, on any device or none ('meta'), over a mesh from `make_mesh`; in place.

    `dtype` of the passes, such as bfloat16; weights, the gradients' sums and the optimizer keep the model's. None: the
    model's throughout. Without a mesh only recomputation is applied, and `pretrain` compiles the loss as a whole.
    """
    if mesh is not None and parallel.tp > 1:
        tensor_parallel(model, mesh["tp"])
    recompute(model, parallel.ac)
    if mesh is not None:
        for layer in model.layers if parallel.compile else ():
            layer.compile()
        policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=dtype and torch.float32, cast_forward_inputs=False
        )
        for layer in model.layers:
            fully_shard(layer, mesh=mesh["dp"], mp_policy=policy)
        fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    return model


def data_ranks(model: Llama) -> tuple[int, int, dist.ProcessGroup | None]:
    "Which part of the rows this rank trains on, among how many, and their process group: read off the model's weights."
    weight = model.tok_embeddings.weight
    if not isinstance(weight, DTensor):
        return 0, 1, None
    mesh = weight.device_mesh["dp"]
    return mesh.get_local_rank(), mesh.size(), mesh.get_group()


# ---------- chapters/02_pretraining.py · Weights without a whole model

@torch.no_grad()
def init_weights(model: Llama, seed: int, rows: int = 256):
    "Draw the weights of a whole or sharded model: the same for any number of ranks, as `Llama.init_std` says."
    generator = torch.Generator()
    for name, parameter in model.named_parameters():
        local, block = local_block(parameter)
        std = model.init_std(name)
        if std is None:
            local.fill_(1.0)
            continue
        for row in range(block[0].start // rows * rows, block[0].stop, rows):
            generator.manual_seed(zlib.crc32(f"{seed} {name} {row}".encode()))
            drawn = torch.empty(min(rows, parameter.shape[0] - row), parameter.shape[1])
            drawn.normal_(0, std, generator=generator)
            low, high = max(row, block[0].start), min(row + rows, block[0].stop)
            local[low - block[0].start : high - block[0].start].copy_(drawn[low - row : high - row, block[1]])


# ---------- chapters/02_pretraining.py · Checkpoints of a run

_CONTENTS = {  # what a table of contents is made of
    "torch.distributed.checkpoint.metadata": (
        "Metadata MetadataIndex TensorStorageMetadata ChunkStorageMetadata TensorProperties BytesStorageMetadata "
        "StorageMeta _MEM_FORMAT_ENCODING"
    ),
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch": "Size float32 float64 bfloat16 float16 int64 uint8",
    "torch.serialization": "_get_layout",
    "pathlib": "PosixPath WindowsPath",
}


class _ContentsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if name not in _CONTENTS.get(module, "").split():
            raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint's table of contents")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    def read_metadata(self, *args, **kwargs):
        with open(Path(self.path) / ".metadata", "rb") as file:
            contents = _ContentsOnly(file).load()
        contents.storage_meta = contents.storage_meta or dcp.metadata.StorageMeta()
        contents.storage_meta.load_id = self.load_id
        return contents


def training_tensors(model: Llama, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    "Every tensor that a step changes, whole or sharded, by name; AdamW's averages are made if there are none yet."
    tensors = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        tensors[f"model.{name}"] = parameter.detach()
        tensors |= {f"optimizer.{name}.{key}": value for key, value in state.items()}
    return tensors


def _rng_tensors() -> dict[str, Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    states = {f"rng.cpu.{rank}": torch.get_rng_state()}
    return states | ({f"rng.cuda.{rank}": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


class StateFolder:
    """The checkpoints of a run: `folder`/step-00001000 …, the file `latest`, and at most `keep` of them.

    All ranks call the methods together. With `in_background`, `save` returns when the tensors are copied: `poll` now
    and then, since a save counts only when it is found to have ended, and `wait` before the run ends.
    """

    def __init__(self, folder: Path, keep: int = 2, in_background: bool = False):
        self.folder, self.keep, self.in_background = Path(folder), keep, in_background
        # two groups beside the training's own: one that writes and reads, maybe in the background, one that reports
        self.disk, self.group = (dist.new_group(backend="gloo") if dist.is_initialized() else None for _ in range(2))
        self.pending: tuple[Path, Future] | None = None

    def latest(self) -> Path | None:
        """The checkpoint that the file `latest` names, without that file the newest; None if there is none.

        ValueError if `latest` names one that is gone.
        """
        saved = self._saved()
        try:
            name = (self.folder / "latest").read_text("utf-8").strip()
        except FileNotFoundError:  # a kill just before the first was named, or a user who moved folders
            return saved[-1] if saved else None
        if self.folder / name not in saved:
            there = ", ".join(path.name for path in saved) or "nothing"
            raise ValueError(f"{self.folder / 'latest'} names {name!r}, not there ({there} is): write a name that is")
        return self.folder / name

    def _saved(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))

    def save(self, step: int, tensors: dict[str, Tensor], facts: dict):
        "Write tensors and facts (JSON), the state after `step` steps; OSError, naming the last good one, if it fails."
        self.wait()
        target = self.folder / f"step-{step:08d}"
        partial = self.folder / f".{target.name}.partial"
        tensors = tensors | _rng_tensors()
        with self._told(step):
            if self._first():
                for left in self.folder.glob(".step-*"):  # by a kill, in the midst of writing or removing
                    shutil.rmtree(left, ignore_errors=True)
                partial.mkdir(parents=True)
                write_atomic(partial / "run.json", json.dumps(facts | {"step": step}, indent=1) + "\n")
        with self._told(step), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is fine
            save = dcp.async_save if self.in_background else dcp.save
            written = save(tensors, checkpoint_id=partial, process_group=self.disk, no_dist=self.disk is None)
        self.pending = target, written
        if not self.in_background:
            self.wait()

    def wait(self):
        "Finish the save that is under way, if any: make it the newest checkpoint, and remove the oldest."
        if self.pending is None:
            return
        (target, written), self.pending = self.pending, None
        with self._told(int(target.name[5:])):
            if self.in_background:
                written.result()
        with self._told(int(target.name[5:])):
            if self._first():
                self._publish(target)

    def poll(self):
        "Make a background save that has ended the newest checkpoint, without waiting; rank 0 alone acts."
        if self.pending and self._first() and self.pending[1].done() and not self.pending[1].exception():
            with suppress(OSError):  # `wait` tries again, and tells
                self._publish(self.pending[0])

    def _publish(self, target: Path):
        partial = self.folder / f".{target.name}.partial"
        if partial.exists():
            if target.exists():
                self._remove(target)
            partial.rename(target)
        write_atomic(self.folder / "latest", target.name + "\n")
        saved = self._saved()
        newer = [path for path in saved if path.name > target.name]  # of a run that was set back
        for old in newer + saved[: len(saved) - len(newer)][: -self.keep]:
            self._remove(old)

    def _remove(self, folder: Path):
        "Under another name: what is called step-… is whole, whenever a kill comes."
        removed = self.folder / f".{folder.name}.removed"
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def load(self, tensors: dict[str, Tensor]) -> dict:
        """Read the newest checkpoint into `tensors`, in place, however they are divided; returns its facts.

        ValueError, naming the checkpoint, when it is damaged; the tensors are then undefined.
        """
        newest, facts = self.latest(), self.facts()
        with self._naming(newest):
            reader = _Reader(newest)
            stored = reader.read_metadata().state_dict_metadata
            rng = {name: state for name, state in _rng_tensors().items() if name in stored}
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                dcp.load(tensors | rng, storage_reader=reader, process_group=self.disk, no_dist=self.disk is None)
        for name, state in rng.items():
            (torch.cuda.set_rng_state if "cuda" in name else torch.set_rng_state)(state)
        return facts

    def facts(self) -> dict:
        "What the newest checkpoint was saved with, and its step. ValueError when that is damaged."
        with self._naming(newest := self.latest()):
            return json.loads((newest / "run.json").read_text("utf-8"))

    @contextmanager
    def _naming(self, checkpoint: Path):
        try:
            yield
        except (Exception, CheckpointException) as error:
            cause = _cause(error)
            reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
            other = f"to go on from another, write its name into {self.folder / 'latest'}"
            raise ValueError(f"{checkpoint} cannot be read ({reason}); {other}") from error

    def _first(self) -> bool:
        return self.group is None or dist.get_rank() == 0

    @contextmanager
    def _told(self, step: int):
        "If the block fails on one rank, every rank raises."
        error = None
        try:
            yield
        except (Exception, CheckpointException) as caught:  # DCP's is not an Exception
            error = caught
        failures = [error and (str(_cause(error)) or type(_cause(error)).__name__)]  # MemoryError has no words
        if self.group is not None:
            failures, mine = [None] * dist.get_world_size(), failures[0]
            dist.all_gather_object(failures, mine, group=self.group)
        if reasons := [reason for reason in failures if reason]:
            if self._first():
                shutil.rmtree(self.folder / f".step-{step:08d}.partial", ignore_errors=True)
            good = self.latest()
            raise OSError(
                f"the state after step {step} could not be saved: {reasons[0]}; "
                + (f"the last good checkpoint is {good}" if good else "there is no checkpoint yet")
            ) from error


def _cause(error: BaseException) -> BaseException:
    "The reason inside DCP's error, which wraps those of all ranks."
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error
