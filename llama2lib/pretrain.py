"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "PretrainConfig",
    "PRETRAIN",
    "Step",
    "rows",
    "pretrain",
    "next_token_loss",
    "held_out_loss",
]


# ---------- chapters/02_pretraining.py · The recipe

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from llama2lib.model import Llama
from llama2lib.optim import adamw, cosine_lr


@dataclass(frozen=True)
class PretrainConfig:
    "The pretraining recipe of section 2.2; the defaults are the paper's for 7B and 13B."

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    warmup_steps: int = 2000
    final_lr: float = 0.1  # share of the peak that the cosine ends at
    batch_tokens: int = 4_000_000
    tokens: int = 2_000_000_000_000
    max_seq_len: int = 4096
    micro_batch: int = 16  # rows in one forward pass; the rest of the batch is accumulated

    def __post_init__(self):
        if not self.max_seq_len <= self.batch_tokens <= self.tokens:
            sizes = f"max_seq_len {self.max_seq_len}, batch_tokens {self.batch_tokens}, tokens {self.tokens}"
            raise ValueError(f"{sizes}: expected a row to fit into a batch, and a batch into all tokens")
        if not 0 <= self.warmup_steps < self.steps or self.micro_batch < 1:
            raise ValueError(f"warmup_steps {self.warmup_steps} of {self.steps} steps: expected fewer than all")

    @property
    def batch_rows(self) -> int:
        "Rows of `max_seq_len` tokens in an optimiser step: `batch_tokens`, rounded to whole rows."
        return max(1, round(self.batch_tokens / self.max_seq_len))

    @property
    def steps(self) -> int:
        "Optimiser steps of the run."
        return max(1, round(self.tokens / self.batch_tokens))


PRETRAIN = {
    "7B": PretrainConfig(),
    "13B": PretrainConfig(),
    "34B": PretrainConfig(lr=1.5e-4),
    "70B": PretrainConfig(lr=1.5e-4),
    "book-1M": PretrainConfig(lr=3e-3, warmup_steps=40, batch_tokens=2048, tokens=1_500_000, max_seq_len=256),
}


# ---------- chapters/02_pretraining.py · The loop

class Step(NamedTuple):
    "What one optimiser step measured: loss in nats per token, gradient norm before clipping, tokens seen so far."

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int


def rows(stream: np.ndarray, length: int, seed: int | None = None) -> torch.Tensor:
    "Cut a 1-D stream into rows of `length` + 1 tokens, each sharing one with the next, in an order shuffled by `seed`."
    count = (len(stream) - 1) // length
    if count < 1:
        raise ValueError(f"{len(stream)} tokens do not fill one row of {length} and its target")
    starts = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    return torch.from_numpy(stream.astype(np.int64)[starts[:, None] * length + np.arange(length + 1)])


def pretrain(model: Llama, stream: np.ndarray, config: PretrainConfig, seed: int = 0) -> Iterator[Step]:
    """Train `model` on a 1-D array of token ids, yielding a `Step` after each step; goes round when the array ends.

    Leaves the model in training mode. ValueError when the array does not fill one row.
    Raises FloatingPointError, before the weights change, when the loss or the gradient is not finite.
    """
    device = model.tok_embeddings.weight.device
    data = rows(stream, config.max_seq_len, seed)
    optimizer = adamw(model, config.lr, config.betas, config.eps, config.weight_decay)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    for step in range(config.steps):
        picked = torch.arange(step * config.batch_rows, (step + 1) * config.batch_rows) % len(data)
        lr = cosine_lr(step, config.lr, config.warmup_steps, config.steps, config.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        targets, loss = config.batch_rows * config.max_seq_len, 0.0
        for part in picked.split(config.micro_batch):
            batch = data[part].to(device)
            part_loss = next_token_loss(model, batch) / targets
            part_loss.backward()
            loss += part_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm}; rows {picked.tolist()} of the stream"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Step(step, loss, lr, norm, (step + 1) * targets)


def next_token_loss(model: Llama, batch: torch.Tensor) -> torch.Tensor:
    "Summed cross-entropy (nats) of tokens 1…T of each row given those before. (B T+1) → ()"
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def held_out_loss(model: Llama, stream: np.ndarray, length: int, max_rows: int = 64) -> float:
    "Mean loss in nats per token over the first `max_rows` rows of a stream."
    data = rows(stream, length)[:max_rows].to(model.tok_embeddings.weight.device)
    return sum(next_token_loss(model, part).item() for part in data.split(16)) / data[:, 1:].numel()
