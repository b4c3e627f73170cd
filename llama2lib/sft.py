"""Generated from chapters/03_sft.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Example",
    "closest_sum",
    "fill_rows",
    "Rows",
    "check_example",
    "check_examples",
    "pack",
    "SFTConfig",
    "SFT",
    "Batches",
    "rank_parts",
    "sft",
    "read_examples",
    "run",
    "cli",
]


# ---------- chapters/03_sft.py · Rows

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from llama2lib.dialog import encode_dialog, read_dialogs
from llama2lib.distributed import Parallel, check_row, data_ranks, processes
from llama2lib.model import Llama
from llama2lib.optim import adamw, cosine_lr, set_lr
from llama2lib.pretrain import IGNORE, Step, command, naming_batch, next_token_loss, train, train_step
from llama2lib.shards import shuffled
from llama2lib.tokenizer import Tokenizer

Example = tuple[Sequence[int], Sequence[int]]  # tokens, and a mask that is 1 on those to learn, as of `encode_dialog`


def closest_sum(sizes: Iterable[int], total: int) -> list[int]:
    "Some of the sizes, whose sum comes closest to `total` from below or is `total`."
    taken: list[int] = []
    sums = [1]  # bit n of item k: the first k sizes taken can give n
    for size in sizes:
        new = (sums[-1] | sums[-1] << size) & ((1 << total + 1) - 1)
        if new != sums[-1]:
            taken.append(size)
            sums.append(new)
        if new >> total:
            break
    rest, chosen = sums[-1].bit_length() - 1, []
    for size, before in zip(reversed(taken), reversed(sums[:-1]), strict=True):
        if not before >> rest & 1:
            chosen.append(size)
            rest -= size
    return chosen


def fill_rows(sizes: Sequence[int], length: int) -> list[list[int]]:
    "Rows of `length` that hold things of these sizes, as lists of their numbers; how many depends on the sizes alone."
    waiting: dict[int, list[int]] = {}  # numbers by size, the longest first
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        waiting.setdefault(sizes[number], []).append(number)
    rows = []
    while waiting:
        longest = next(iter(waiting))
        rest = length - longest
        others = ((size, len(numbers) - (size == longest)) for size, numbers in waiting.items() if size <= rest)
        fitting = (size for size, count in others for _ in range(min(count, rest // size)))
        rows.append([])
        for size in [longest, *closest_sum(fitting, rest)]:
            rows[-1].append(waiting[size].pop())
            if not waiting[size]:
                del waiting[size]
    return rows

class Rows(NamedTuple):
    "Rows to train on, each (R T) int64: tokens; targets or IGNORE; and, for block-diagonal attention, documents or -1."

    tokens: Tensor
    targets: Tensor
    documents: Tensor | None


def check_example(tokens: Sequence[int], mask: Sequence[int], length: int | None):
    "ValueError when there is nothing to learn, or, with a `length`, when a row of it cannot hold the example whole."
    if len(tokens) != len(mask):
        raise ValueError(f"{len(tokens)} tokens, and a mask of {len(mask)}: expected as many")
    if not any(mask):
        raise ValueError(f"none of its {len(tokens)} tokens are an answer's: nothing to learn")
    if mask[0]:
        raise ValueError("its first token counts, but nothing stands in front of it to predict it from")
    if length is not None and len(tokens) > length + 1:
        raise ValueError(f"{len(tokens)} tokens do not fit into a row of {length}: shorten it, or concatenate instead")


def check_examples(examples: Sequence[Example], length: int | None = None):
    "`check_example` for all of them; ValueError names the first that fails by number, from 0, or that there is none."
    if not examples:
        raise ValueError("no examples to train on")
    for number, (tokens, mask) in enumerate(examples):
        try:
            check_example(tokens, mask, length)
        except ValueError as error:
            raise ValueError(f"example {number}: {error}") from None


def pack(examples: Sequence[Example], length: int, block_diagonal: bool = False) -> Rows:
    """Rows of `length` tokens with all of the examples, and targets where their masks are 1 (section 3.1).

    By concatenation, in their order and over the rows' borders; or, `block_diagonal`, whole ones where they fit best.
    ValueError as in `check_examples`; one that is longer than a row is an error only if it has to stay whole.
    """
    check_examples(examples, length if block_diagonal else None)
    if block_diagonal:
        return _pack_whole(examples, length)
    stream = np.fromiter(chain.from_iterable(tokens for tokens, _ in examples), np.int64)
    counts = np.fromiter(chain.from_iterable(mask for _, mask in examples), bool)
    shape = math.ceil((len(stream) - 1) / length), length
    tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE)
    tokens.ravel()[: len(stream) - 1] = stream[:-1]
    targets.ravel()[: len(stream) - 1] = np.where(counts[1:], stream[1:], IGNORE)
    return Rows(torch.from_numpy(tokens), torch.from_numpy(targets), None)


def _pack_whole(examples: Sequence[Example], length: int) -> Rows:
    groups = fill_rows([len(tokens) - 1 for tokens, _ in examples], length)
    tokens, targets, documents = (np.full((len(groups), length), fill) for fill in (0, IGNORE, -1))
    for row, group in enumerate(groups):
        begin = 0
        for document, number in enumerate(group):
            ids, mask = (np.asarray(part) for part in examples[number])
            place = slice(begin, begin := begin + len(ids) - 1)
            tokens[row, place], documents[row, place] = ids[:-1], document
            targets[row, place] = np.where(mask[1:], ids[1:], IGNORE)
    return Rows(*map(torch.from_numpy, (tokens, targets, documents)))


# ---------- chapters/03_sft.py · The recipe

@dataclass(frozen=True)
class SFTConfig:
    """A supervised fine-tuning run; the recipe's defaults are the paper's (section 3.1).

    ValueError, naming the numbers, for a recipe that cannot work.
    """

    model: str = "runs/pretrain/model"  # the checkpoint folder to begin with, Hugging Face's layout or Meta's
    lr: float = 2e-5  # at the end of the warm-up
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-5  # of AdamW
    weight_decay: float = 0.1  # of matrices; the norms' weights are exempt
    grad_clip: float = 1.0  # largest norm of the gradient
    warmup: float = 0.03  # share of the steps in which the learning rate rises to its peak
    final_lr: float = 0.1  # share of the peak that the cosine ends at
    batch_rows: int = 64  # rows of one optimiser step, over all GPUs; an epoch's last step may have fewer
    max_seq_len: int = 4096  # tokens of a row
    epochs: int = 2  # how often all examples are seen
    block_diagonal: bool = False  # whole conversations that do not see each other, not the paper's concatenation
    seed: int = 0  # of the order of the examples

    data: Path = Path("sft.jsonl")  # conversations, an object with `messages` a line
    tokenizer: Path | None = None  # SentencePiece file; none: the one in the model's folder
    out: Path = Path("runs/sft")  # log, checkpoints, and the trained model as a Hugging Face folder
    micro_batch: int = 8  # rows in one forward pass of one GPU; the rest of the batch is accumulated
    parallel: Parallel = field(default_factory=Parallel)
    save_every: int = 200  # steps between checkpoints, from which the same command resumes
    keep: int = 2  # checkpoints that are kept
    tensorboard: bool = False  # beside out/log.jsonl

    def __post_init__(self):
        for name in ("batch_rows", "max_seq_len", "epochs", "micro_batch", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup {self.warmup}: expected a share of the steps, from 0 to below 1")
        check_row(self.max_seq_len, self.parallel.tp)


SFT = {
    "paper": SFTConfig(micro_batch=2, parallel=Parallel(ac="selective", compile=True, reduce="micro_batch")),
    "mini": SFTConfig(lr=3e-4, batch_rows=4, max_seq_len=512, block_diagonal=True),
}


# ---------- chapters/03_sft.py · Steps

class Batches:
    "The rows of every step of a run. ValueError, naming the example, for examples that cannot be packed (see `pack`)."

    def __init__(self, examples: Sequence[Example], config: SFTConfig):
        self.examples, self.config = examples, config
        check_examples(examples, config.max_seq_len if config.block_diagonal else None)
        self.epoch, self.packed = 0, self._pack(0)
        self.rows_per_epoch = len(self.packed.tokens)
        self.steps_per_epoch = math.ceil(self.rows_per_epoch / config.batch_rows)

    def __len__(self) -> int:
        "Steps of all epochs."
        return self.config.epochs * self.steps_per_epoch

    def _pack(self, epoch: int) -> Rows:
        size, key = len(self.examples), (self.config.seed, epoch)
        order = shuffled(np.arange(size), size, key)
        packed = pack([self.examples[i] for i in order], self.config.max_seq_len, self.config.block_diagonal)
        if not self.config.block_diagonal:
            return packed
        order = shuffled(np.arange(len(packed.tokens)), len(packed.tokens), (*key, 1))
        return Rows(*(part[order] for part in packed))

    def rows_before(self, step: int) -> int:
        "How many rows the steps in front of this one have."
        epoch, place = divmod(step, self.steps_per_epoch)
        return epoch * self.rows_per_epoch + place * self.config.batch_rows

    def rows(self, step: int) -> Rows:
        "The rows of a step: `batch_rows`, or what is left of the epoch."
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:
            self.epoch, self.packed = epoch, self._pack(epoch)
        these = slice(place * self.config.batch_rows, (place + 1) * self.config.batch_rows)
        return Rows(*(part if part is None else part[these] for part in self.packed))

    def summary(self) -> str:
        "A line of numbers: examples, targets and rows of an epoch, how full these are, how many examples are cut."
        sizes = np.array([len(tokens) for tokens, _ in self.examples])
        targets = sum(sum(mask) for _, mask in self.examples)
        filled = (sizes - 1).sum() if self.config.block_diagonal else sizes.sum() - 1
        line = f"{len(sizes):,} examples with {targets:,} tokens to learn, in {self.rows_per_epoch:,} rows of "
        line += f"{self.config.max_seq_len:,}, {filled / self.packed.tokens.numel():.1%} full; "
        if self.config.block_diagonal:
            return line + "all of them whole"
        ends = np.cumsum(sizes[shuffled(np.arange(len(sizes)), len(sizes), (self.config.seed, 0))])
        cut = ((ends - 2) // self.config.max_seq_len > (ends - sizes) // self.config.max_seq_len).sum()
        return line + f"{cut:,} go on in the next row"

def rank_parts(rows: Rows, share: int, rank: int, micro_batch: int, device=None) -> list[tuple[Tensor, ...]]:
    "Micro-batches of a rank's `share` of the rows; what the rows do not fill is filled up with rows without targets."
    mine = []
    for part, filling in zip(rows, (0, IGNORE, -1), strict=True):
        if part is not None:
            part = part[rank * share : (rank + 1) * share]
            mine.append(F.pad(part, (0, 0, 0, share - len(part)), value=filling).to(device).split(micro_batch))
    return list(zip(*mine, strict=True))


def sft(
    model: Llama,
    examples: Sequence[Example],
    config: SFTConfig,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
) -> Iterator[Step]:
    """Fine-tune `model` on examples from `encode_dialog`, yielding a `Step` after each (section 3.1).

    `loss` is the mean over the step's answer tokens; `tokens` counts positions, filling included. With the `optimizer`
    of an earlier part of the run, `start` at a later step. Leaves the model in training mode. ValueError, naming the
    example, as in `pack`; FloatingPointError, before the weights change, when loss or gradient are not finite.
    """
    batches = Batches(examples, config)
    device, steps = model.tok_embeddings.weight.device, len(batches)
    optimizer = optimizer or adamw(model, config.lr, config.betas, config.eps, config.weight_decay)
    rank, ranks, group = data_ranks(model)
    whole_loss = config.parallel.compile and group is None
    loss_of = torch.compile(next_token_loss, dynamic=False) if whole_loss else next_token_loss
    share = math.ceil(config.batch_rows / ranks)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    for step in range(start, steps):
        lr = cosine_lr(step, config.lr, round(config.warmup * steps), steps, config.final_lr)
        set_lr(optimizer, lr)
        rows = batches.rows(step)
        targets = int((rows.targets != IGNORE).sum())  # on all ranks
        parts = rank_parts(rows, share, rank, config.micro_batch, device)
        end = batches.rows_before(step + 1)
        with naming_batch(step, f"rows {end - len(rows.tokens)} to {end - 1}, of {batches.rows_per_epoch} in an epoch"):
            loss, norm = train_step(
                model, optimizer, parts, max(1, targets), config.grad_clip, config.parallel.reduce, loss_of
            )
        yield Step(step, loss, lr, norm, end * config.max_seq_len)


# ---------- chapters/03_sft.py · The run

def read_examples(path: Path, tokenizer: Tokenizer, length: int | None = None) -> list[Example]:
    """The examples of a JSONL file of conversations, each of which has to end with an answer.

    ValueError with file and line as in `read_dialogs`, and for one that a row of `length`, if given, cannot hold whole.
    """
    examples = []
    for number, messages in enumerate(read_dialogs(path), 1):
        try:
            if messages[-1]["role"] != "assistant":
                raise ValueError(f"message {len(messages) - 1}: a user's comes last; expected an answer to it")
            examples.append(encode_dialog(tokenizer, messages))
            check_example(*examples[-1], length)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return examples


def run(config: SFTConfig) -> Path:
    """Fine-tune, or go on fine-tuning, as `config` says; returns the folder of the trained model.

    Writes out/log.jsonl, out/step-…, and out/model, a Hugging Face folder, at the end. Errors as in `pretrain.run`.
    """
    with processes() as device:
        tokenizer = Tokenizer(config.tokenizer or config.model)
        examples = read_examples(config.data, tokenizer, config.max_seq_len if config.block_diagonal else None)
        batches = Batches(examples, config)
        if os.environ.get("RANK", "0") == "0":
            print(batches.summary())
        digest = hashlib.sha256(config.data.read_bytes() + tokenizer.digest.encode()).hexdigest()

        def loop(model, optimizer, start):
            return sft(model, examples, config, optimizer, start)

        return train(config, device, tokenizer, tokenizer.vocab_size, digest, len(batches), loop, "fine-tuning")


@record
def cli(prog: str = "python -m llama2lib.sft"):
    "python -m llama2lib.sft RECIPE [options]: fine-tune on conversations (section 3.1); under torchrun, on all ranks."
    about = {name: f"{c.epochs} epochs, rows of {c.max_seq_len:,}, peak lr {c.lr:g}" for name, c in SFT.items()}
    command(run, {name: (about[name], config) for name, config in SFT.items()}, prog)


if __name__ == "__main__":
    cli()
