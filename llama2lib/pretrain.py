"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "PretrainConfig",
    "PRETRAIN",
    "IGNORE",
    "next_token_loss",
    "micro_batches",
    "train_step",
    "naming_batch",
    "Step",
    "pretrain",
    "held_out_loss",
    "MAY_CHANGE",
    "PEAK_FLOPS",
    "is_reward_folder",
    "fresh_or_loaded",
    "vocabulary_of",
    "settings",
    "check_same",
    "Log",
    "flops_per_token",
    "measured",
    "train",
    "run",
    "command",
    "cli",
]


# ---------- chapters/02_pretraining.py · The recipe

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor.parallel import loss_parallel

from llama2lib.checkpoint import copy_weights, read_tensors, save_checkpoint, whole
from llama2lib.distributed import (
    Parallel,
    StateFolder,
    check_row,
    data_ranks,
    init_weights,
    make_mesh,
    parallelize,
    processes,
    training_tensors,
)
from llama2lib.formats import without_memory
from llama2lib.launch import one_line_errors
from llama2lib.model import LLAMA2, Llama
from llama2lib.optim import adamw, cosine_lr, set_lr
from llama2lib.recipes import write_atomic
from llama2lib.shards import Packed, Shards
from llama2lib.tokenizer import Tokenizer


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run; the recipe's defaults are the paper's for 7B and 13B (section 2.2).

    ValueError, naming the numbers, for a recipe that cannot work.
    """

    model: str = "7B"  # a size of llama2lib.model.LLAMA2, or a checkpoint folder to go on from
    lr: float = 3e-4  # at the end of the warm-up
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-5  # of AdamW
    weight_decay: float = 0.1  # of matrices; the norms' weights are exempt
    grad_clip: float = 1.0  # largest norm of the gradient
    warmup_steps: int = 2000  # in which the learning rate rises to its peak
    final_lr: float = 0.1  # share of the peak that the cosine ends at
    batch_tokens: int = 4_000_000  # of one optimiser step, over all GPUs
    tokens: int = 2_000_000_000_000  # of the whole run
    max_seq_len: int = 4096  # tokens of a row
    seed: int = 0  # of the weights and of the order of the data

    data: Path = Path("shards")  # token shards, made by python -m llama2lib.shards
    out: Path = Path("runs/pretrain")  # log, checkpoints, and the trained model as a Hugging Face folder
    micro_batch: int = 16  # rows in one forward pass of one GPU; the rest of the batch is accumulated
    parallel: Parallel = field(default_factory=Parallel)
    save_every: int = 1000  # steps between checkpoints, from which the same command resumes
    keep: int = 2  # checkpoints that are kept
    tensorboard: bool = False  # beside out/log.jsonl

    def __post_init__(self):
        if not self.max_seq_len <= self.batch_tokens <= self.tokens:
            sizes = f"max_seq_len {self.max_seq_len}, batch_tokens {self.batch_tokens}, tokens {self.tokens}"
            raise ValueError(f"{sizes}: expected a row to fit into a batch, and a batch into all tokens")
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} of {self.steps} steps: expected fewer than all")
        for name in ("micro_batch", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        check_row(self.max_seq_len, self.parallel.tp)

    @property
    def batch_rows(self) -> int:
        "Rows of `max_seq_len` tokens in an optimiser step: `batch_tokens`, rounded to whole rows."
        return max(1, round(self.batch_tokens / self.max_seq_len))

    @property
    def steps(self) -> int:
        "Optimiser steps of the run."
        return max(1, round(self.tokens / self.batch_tokens))


PRETRAIN = {
    "7B": PretrainConfig(micro_batch=2, parallel=Parallel(ac="selective", compile=True)),
    "13B": PretrainConfig(
        "13B", micro_batch=2, parallel=Parallel(ac="selective", compile=True, reduce="micro_batch")
    ),
    "34B": PretrainConfig(
        "34B", lr=1.5e-4, micro_batch=1, parallel=Parallel(ac="selective", compile=True, reduce="micro_batch")
    ),
    "70B": PretrainConfig(
        "70B", lr=1.5e-4, micro_batch=2, parallel=Parallel(ac="full", compile=True, reduce="micro_batch")
    ),
    "book-1M": PretrainConfig(
        "book-1M", lr=3e-3, warmup_steps=40, batch_tokens=2048, tokens=1_500_000, max_seq_len=256, save_every=200
    ),
}


# ---------- chapters/02_pretraining.py · A step

IGNORE = -100  # a target that does not count


def next_token_loss(model: Llama, tokens: Tensor, targets: Tensor, documents: Tensor | None = None) -> Tensor:
    "Summed cross-entropy, in nats, of the targets (B T) that are not IGNORE, given tokens and `documents` (B T). → ()"
    logits = model(tokens, documents=documents).flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORE, reduction="sum")


def micro_batches(rows: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    "Rows (R T+1) as `count` pairs of tokens and targets (B T), of nearly equal B; without targets when rows run out."
    for part in rows.tensor_split(count):
        if len(part):
            yield part[:, :-1], part[:, 1:]
        else:
            yield rows.new_zeros(1, rows.shape[1] - 1), rows.new_full((1, rows.shape[1] - 1), IGNORE)


def train_step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    parts: Sequence[tuple],
    targets: int,
    grad_clip: float,
    reduce: str = "step",
    loss_of: Callable[..., Tensor] = next_token_loss,
) -> tuple[float, float]:
    """One optimiser step; returns the mean loss per target, and the gradient's norm before clipping.

    `parts`: this rank's micro-batches, as many as every other rank has; `loss_of(model, *part)` is the sum over the
    part's targets. `targets`: how many there are in all parts of all ranks. `reduce`: see `Parallel`.
    FloatingPointError, before the weights change, on every rank, when loss or gradient are not finite.
    """
    _, ranks, group = data_ranks(model)
    total = torch.zeros((), device=model.tok_embeddings.weight.device)
    for i, part in enumerate(parts):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(reduce == "micro_batch" or i == len(parts) - 1)
        with loss_parallel():  # under tensor parallelism each rank has the logits of a part of the vocabulary
            loss = loss_of(model, *part)
            (loss * (ranks / targets)).backward()  # FSDP takes the mean over ranks
        total += whole(loss.detach())
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip))
    if ranks > 1:
        dist.all_reduce(total, group=group)
    loss, norm = torch.stack([total / targets, norm]).tolist()
    if not math.isfinite(loss + norm):
        raise FloatingPointError(f"loss {loss}, gradient norm {norm}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


@contextmanager
def naming_batch(step: int, where: str):
    "Let a FloatingPointError from inside say at which step it was, and `where` in the data the step's batch lies."
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}; {where}") from None


# ---------- chapters/02_pretraining.py · The loop

class Step(NamedTuple):
    "What one optimiser step measured: loss in nats per token, gradient norm before clipping, tokens seen so far."

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int


def pretrain(
    model: Llama,
    data: np.ndarray | Shards,
    config: PretrainConfig,
    seed: int | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """Train `model` on a 1-D array of token ids or on shards, yielding a `Step` after each; goes round at their end.

    `seed` of the order of the rows: the configuration's if None. With the `optimizer` of an earlier part of the run,
    `start` at a later step. Leaves the model in training mode. ValueError when the data does not fill one row.
    Raises FloatingPointError, before the weights change, when the loss or the gradient is not finite.
    """
    device = model.tok_embeddings.weight.device
    packed = Packed(data, config.max_seq_len, config.seed if seed is None else seed)
    optimizer = optimizer or adamw(model, config.lr, config.betas, config.eps, config.weight_decay)
    rank, ranks, group = data_ranks(model)
    whole_loss = config.parallel.compile and group is None
    loss_of = torch.compile(next_token_loss, dynamic=False) if whole_loss else next_token_loss
    rows, targets = config.batch_rows, config.batch_rows * config.max_seq_len
    low, high = (rows * r // ranks for r in (rank, rank + 1))
    passes = math.ceil(math.ceil(rows / ranks) / config.micro_batch)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    for step in range(start, config.steps):
        lr = cosine_lr(step, config.lr, config.warmup_steps, config.steps, config.final_lr)
        set_lr(optimizer, lr)
        batch = packed.rows(step * rows + low, high - low).to(device)
        with naming_batch(step, f"rows {step * rows} to {(step + 1) * rows - 1} of the data"):
            parts = list(micro_batches(batch, passes))
            loss, norm = train_step(
                model, optimizer, parts, targets, config.grad_clip, config.parallel.reduce, loss_of
            )
        yield Step(step, loss, lr, norm, (step + 1) * targets)


@torch.no_grad()
def held_out_loss(model: Llama, stream: np.ndarray, length: int, max_rows: int = 64) -> float:
    "Mean loss in nats per token over the first `max_rows` rows of a stream."
    packed = Packed(stream, length, seed=None)
    data = packed.rows(0, min(max_rows, len(packed))).to(model.tok_embeddings.weight.device)
    losses = (next_token_loss(model, part[:, :-1], part[:, 1:]).item() for part in data.split(16))
    return sum(losses) / data[:, 1:].numel()


# ---------- chapters/02_pretraining.py · The run

import json
import os
import sys
import time

import tyro
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

# between parts of a run; the contents of data and tokenizer may not: their digest is compared
MAY_CHANGE = ("data", "tokenizer", "out", "micro_batch", "parallel", "save_every", "keep", "tensorboard")
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bfloat16, from NVIDIA's data sheets


def is_reward_folder(path: str | os.PathLike) -> bool:
    "Whether a folder holds a reward model, by the architectures in its config.json."
    try:
        fields = json.loads((Path(path).expanduser() / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return False  # `read_tensors` says what is wrong with it
    return isinstance(fields, dict) and "SequenceClassification" in str(fields.get("architectures"))


def fresh_or_loaded(
    config: PretrainConfig, vocab_size: int, device: torch.device, load: bool, kind: type[Llama] = Llama
) -> Llama:
    """The model of a run, divided over the ranks; its weights are undefined without `load`.

    A size of LLAMA2 gets the data's vocabulary and new weights; ValueError for a checkpoint that the run does not fit.
    A reward model, as `kind`, goes on from a reward model, or begins with a language model's weights and a new score.
    """
    fresh, holds = config.model in LLAMA2, Llama
    if fresh:
        shape = replace(LLAMA2[config.model], vocab_size=vocab_size, max_seq_len=config.max_seq_len)
    else:
        holds = kind if is_reward_folder(config.model) else Llama
        shape, _, pieces = read_tensors(config.model, holds)
        if shape.vocab_size != vocab_size or shape.max_seq_len < config.max_seq_len:
            found = f"vocab_size {shape.vocab_size}, max_seq_len {shape.max_seq_len}"
            raise ValueError(f"{config.model}: {found}; the run has {vocab_size} and {config.max_seq_len}")
    model = without_memory(shape, kind)
    compute = torch.bfloat16 if device.type == "cuda" else None
    parallelize(model, make_mesh(config.parallel, device.type), config.parallel, compute).to_empty(device=device)
    if load and (fresh or holds is not kind):
        init_weights(model, config.seed)
    if load and not fresh:
        names = dict(model.named_parameters())
        copy_weights(model, (piece for piece in pieces if piece[0] in names))
    return model


def vocabulary_of(config: PretrainConfig) -> Tokenizer | None:
    "The tokenizer of a run: that of the checkpoint it begins with, else the one that lies with the data; None without."
    folders = [Path(config.model)] * (config.model not in LLAMA2) + [config.data]
    return next((Tokenizer(folder) for folder in folders if (folder / "tokenizer.model").exists()), None)


def settings(config: PretrainConfig, digest: str) -> dict:
    "What must not change while a run goes on, the data's digest included, as JSON."
    fields = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    return json.loads(json.dumps(fields | {"data digest": digest}))


def check_same(found: dict, ours: dict, where: Path):
    "ValueError, naming what differs, when a checkpoint is of another configuration."
    names = [name for name in found.keys() | ours.keys() if found.get(name) != ours.get(name)]
    if names:
        lines = "; ".join(f"{name} {found.get(name)!r}, now {ours.get(name)!r}" for name in sorted(names))
        raise ValueError(f"{where} is of another configuration ({lines}): choose another --out, or the old settings")


class Log:
    "out/log.jsonl, a JSON object a step, and TensorBoard's files; a restart cuts it back to the first `steps` steps."

    def __init__(self, folder: Path, steps: int, tensorboard: bool):
        self.path = folder / "log.jsonl"
        lines = self.path.read_text("utf-8").splitlines(keepends=True) if self.path.exists() else []
        whole = (line for line in lines if line.endswith("}\n"))
        write_atomic(self.path, "".join(line for line in whole if json.loads(line)["step"] < steps))
        self.file, self.board = self.path.open("a", encoding="utf-8"), None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ImportError("tensorboard=True needs a package: pip install tensorboard") from None
            self.board = SummaryWriter(folder / "tensorboard", purge_step=steps)

    def write(self, line: dict):
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, value in line.items() if self.board else ():
            if name != "step" and value is not None:
                self.board.add_scalar(name, value, line["step"])

    def close(self):
        self.file.close()
        if self.board:
            self.board.close()


def flops_per_token(model: Llama, length: int) -> float:
    "Operations of a training step per token as PaLM counts them for MFU: 6N, and attention as if it were not causal."
    return 3 * model.config.forward_flops_per_token(length)


def measured(step: Step, model: Llama, length: int, seconds: float, tokens: int) -> dict:
    "A line of the log: the step, tokens per second over all ranks, model FLOPs utilisation, peak memory of this rank."
    device, ranks = model.tok_embeddings.weight.device, dist.get_world_size() if dist.is_initialized() else 1
    speed, peak, memory = tokens / seconds, None, None
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = next((flops for gpu, flops in PEAK_FLOPS.items() if gpu in name), None)
        memory = torch.cuda.max_memory_allocated(device) / 2**30
    mfu = peak and speed * flops_per_token(model, length) / (peak * ranks)
    return step._asdict() | {"tokens_per_second": speed, "mfu": mfu, "peak_memory_GiB": memory}


def train(
    config: PretrainConfig,
    device: torch.device,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    digest: str,
    steps: int,
    loop: Callable[[Llama, torch.optim.Optimizer, int], Iterator[Step]],
    title: str,
    kind: type[Llama] = Llama,
) -> Path:
    """What the runs of all training stages share: weights, log, bar, checkpoints, resuming; returns out/model.

    `config`: a stage's record, with the fields of PretrainConfig that are read here. `digest`: of the stage's data.
    `loop(model, optimizer, start)` yields the run's `steps` steps from `start` on, a `Step` or more. `kind`: the
    model's class. Errors are those of `run`.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    states = StateFolder(config.out, config.keep, in_background=device.type == "cuda")
    newest = states.latest()
    model = fresh_or_loaded(config, vocab_size, device, newest is None, kind)
    optimizer = adamw(model, config.lr, config.betas, config.eps, config.weight_decay)
    tensors, facts, start, tokens = training_tensors(model, optimizer), {"settings": settings(config, digest)}, 0, 0
    if newest:
        check_same(states.facts()["settings"], facts["settings"], newest)
        stored = states.load(tensors)
        start, tokens = stored["step"], stored["tokens"]
    log = Log(config.out, start, config.tensorboard) if first else None
    lines = "RANK" in os.environ and not sys.stderr.isatty()  # a batch job's log gets lines, people get a bar
    bar = tqdm(total=steps, initial=start, unit="step", desc=title, disable=not first or lines)
    clock = time.perf_counter()
    try:
        for step in loop(model, optimizer, start):
            states.poll()
            now = time.perf_counter()
            line = measured(step, model, config.max_seq_len, now - clock, step.tokens - tokens)
            tokens, clock = step.tokens, now
            if first:
                log.write(line)
                speed = f"{line['tokens_per_second']:,.0f} tokens/s"
                speed += f" | {line['mfu']:.0%} MFU" if line["mfu"] else ""
                shown = f"loss {step.loss:.4f} | lr {step.lr:.1e} | {speed}"
                bar.set_postfix_str(shown, refresh=False)
                bar.update()
                if lines and (step.step + 1) % max(1, steps // 20) == 0:
                    print(f"step {step.step + 1} of {steps} | {shown}", flush=True)
            if (step.step + 1) % config.save_every == 0 or step.step + 1 == steps:
                states.save(step.step + 1, tensors, facts | {"tokens": tokens})
                clock = time.perf_counter()
        states.wait()
    except FloatingPointError as error:
        states.wait()
        raise FloatingPointError(f"{error}; the last good checkpoint is {states.latest() or 'none'}") from None
    finally:
        bar.close()
        if log:
            log.close()
    save_checkpoint(model, config.out / "model", tokenizer, dtype=torch.bfloat16 if device.type == "cuda" else None)
    return config.out / "model"


def run(config: PretrainConfig) -> Path:
    """Pretrain, or go on pretraining, as `config` says; returns the folder of the trained model.

    Writes out/log.jsonl, out/step-…, and out/model, a Hugging Face folder, at the end. Stops with ValueError on data
    or checkpoints that do not fit, FloatingPointError on a loss that is not finite, OSError when a save fails; each
    names the place, and the last good checkpoint stays.
    """
    with processes() as device:
        tokenizer = vocabulary_of(config)
        data = Shards(config.data, tokenizer)

        def loop(model, optimizer, start):
            return pretrain(model, data, config, optimizer=optimizer, start=start)

        vocab_size = data.header["vocab_size"]
        return train(config, device, tokenizer, vocab_size, data.digest, config.steps, loop, "pretraining")


def command(run: Callable, recipes: dict[str, tuple[str, object]], prog: str):
    "A stage's command line: run a recipe, {name: (description, record)}, with options; errors become one line."
    config = tyro.extras.overridable_config_cli(recipes, prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    with one_line_errors():
        run(config)


@record
def cli(prog: str = "python -m llama2lib.pretrain"):
    "python -m llama2lib.pretrain RECIPE [options]: train a base model (section 2.2); under torchrun, on all its ranks."
    recipes = {name: (f"{config.tokens:,} tokens, peak lr {config.lr:g}", config) for name, config in PRETRAIN.items()}
    command(run, recipes, prog)


if __name__ == "__main__":
    cli()
