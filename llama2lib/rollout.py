"""Generated from chapters/05_rlhf.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Prompt",
    "read_prompts",
    "write_prompts",
    "drawn",
    "combined_reward",
    "whiten",
    "Scores",
    "Reward",
    "untagged",
    "consolidated",
    "record_settings",
    "in_chunks",
    "Policy",
    "Value",
    "policy_of",
    "value_of",
    "Rows",
    "in_passes",
]


# ---------- chapters/05_rlhf.py · Prompts

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from llama2lib.checkpoint import whole
from llama2lib.corpus import records
from llama2lib.dialog import TAGS, Message, check_dialog
from llama2lib.formats import without_memory
from llama2lib.model import Llama
from llama2lib.pretrain import IGNORE, check_same
from llama2lib.recipes import write_atomic
from llama2lib.reward import RewardModel, Scorer, divide_again, padded
from llama2lib.shards import shuffled
from llama2lib.tokenizer import Tokenizer


class Prompt(NamedTuple):
    "A conversation that ends with the user, and whether it might elicit an unsafe answer."

    messages: list[Message]
    is_safety: bool


def read_prompts(path: str | os.PathLike, tagged: bool = True) -> list[Prompt]:
    """The prompts of a JSONL file. ValueError with file, line and field for a row that is none, or without any row.

    tagged: every row needs `is_safety`; else it may be missing, and is false then.
    """
    prompts = []
    for number, row in records(path):
        try:
            if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
                raise ValueError("expected an object with a list in the field 'messages'")
            check_dialog(row["messages"])
            if row["messages"][-1]["role"] != "user":
                raise ValueError("messages: the assistant's comes last; expected the user's")
            tag = row.get("is_safety", None if tagged else False)
            if not isinstance(tag, bool):
                expected = "true where the prompt might elicit an unsafe answer, which the safety model then scores"
                raise ValueError(f"is_safety: found {tag!r:.60}; expected {expected}, else false")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        prompts.append(Prompt(row["messages"], tag))
    if not prompts:
        raise ValueError(f"{path}: no prompts; expected a JSON object a line")
    return prompts


def write_prompts(path: str | os.PathLike, prompts: Iterable[Prompt]):
    "Write prompts as JSONL, all or nothing."
    write_atomic(path, "".join(json.dumps(prompt._asdict(), ensure_ascii=False) + "\n" for prompt in prompts))


def drawn(count: int, batch: int, step: int, seed: int) -> np.ndarray:
    "Numbers of the prompts of a step, of `count`: all of them in random order, then all again in another."
    epochs, places = np.divmod(np.arange(step * batch, (step + 1) * batch), count)
    numbers = np.empty(batch, np.int64)
    for epoch in np.unique(epochs):
        numbers[epochs == epoch] = shuffled(places[epochs == epoch], count, (seed, int(epoch)))
    return numbers


# ---------- chapters/05_rlhf.py · The reward

def combined_reward(
    safety_logit: Float[Tensor, "N"],
    helpful_logit: Float[Tensor, "N"],
    is_safety: Bool[Tensor, "N"],
    gate: float = 0.15,
) -> Float[Tensor, "N"]:
    "R_c (section 3.2.3) as a logit: the safety model's where it matters, the helpfulness model's elsewhere."
    unsafe = safety_logit < math.log(gate / (1 - gate))
    return torch.where(is_safety | unsafe, safety_logit, helpful_logit)


def whiten(x: Float[Tensor, "N"], group: dist.ProcessGroup | None = None) -> Float[Tensor, "N"]:
    "x shifted and scaled to mean 0 and variance 1 over the batch, of all ranks of `group` together if there is one."
    sums = torch.stack([x.new_tensor(float(x.numel())), x.sum()])
    if group is not None:
        dist.all_reduce(sums, group=group)
    count = sums[0].clamp(min=1)
    centred = x - sums[1] / count
    square = centred.square().sum()
    if group is not None:
        dist.all_reduce(square, group=group)
    return centred * (square / count + 1e-8).rsqrt()

class Scores(NamedTuple):
    "Logits of answers, each (N): R_c, and what the two models say; `safety` is NaN without a safety model."

    combined: Float[np.ndarray, "N"]
    helpful: Float[np.ndarray, "N"]
    safety: Float[np.ndarray, "N"]


@dataclass(frozen=True)
class Reward:
    "R_c as a function of prompts and answers (section 3.2.3); without a safety model it is R_h."

    helpful: Scorer
    safety: Scorer | None = None
    gate: float = 0.15

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Scores:
        "FloatingPointError, naming the answer, for a score that is not finite."
        dialogs = [
            [*prompt.messages, {"role": "assistant", "content": answer}]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        helpful = np.asarray(self.helpful(dialogs), np.float32)
        safety = np.full(len(dialogs), np.nan, np.float32)
        combined = helpful
        if self.safety is not None:
            safety = np.asarray(self.safety(dialogs), np.float32)
            tags = torch.tensor([prompt.is_safety for prompt in prompts], dtype=torch.bool)
            combined = combined_reward(torch.tensor(safety), torch.tensor(helpful), tags, self.gate).numpy()
        if not np.isfinite(combined).all():
            first = int(np.flatnonzero(~np.isfinite(combined))[0])
            found = f"helpfulness {helpful[first]}, safety {safety[first]}"
            raise FloatingPointError(f"scores of answer {first}, {answers[first]!r:.80}: {found}; expected numbers")
        return Scores(combined, helpful, safety)

def untagged(text: str) -> tuple[str, bool]:
    "An answer up to the first tag of the chat format, and whether there was none."
    places = [text.index(tag) for tag in TAGS if tag in text]
    return (text[: min(places)].strip(), False) if places else (text, True)


# ---------- chapters/05_rlhf.py · Generation with sharded weights

@contextmanager
def consolidated(model: Llama, dtype: torch.dtype | None = None) -> Iterator[Llama]:
    """The model with whole weights on this device, for generation, in `dtype` if given; freed when the block ends.

    A model that is not divided is yielded itself. All ranks enter together.
    """
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        yield model
        return
    copy = without_memory(model.config, Llama).to_empty(device=model.tok_embeddings.weight.device)
    for target, source in zip(copy.parameters(), model.parameters(), strict=True):
        target.data = whole(source.detach().to(dtype or source.dtype))
    try:
        yield copy
    finally:
        for parameter in copy.parameters():
            parameter.data = parameter.data.new_empty(0)


# ---------- chapters/05_rlhf.py · Work in chunks

def record_settings(folder: Path, config, **files: Sequence[Path]):
    """Write settings.json, or ValueError when the folder holds chunks of another configuration; all ranks call it.

    files: those of a field of `config`, which count by their contents.
    """
    if not dist.is_initialized() or dist.get_rank() == 0:
        path = folder / "settings.json"
        digests = {
            name: [hashlib.sha256(file.read_bytes()).hexdigest() for file in these] for name, these in files.items()
        }
        ours = json.loads(json.dumps(asdict(config) | digests | {"out": None}, default=str))
        if path.exists():
            check_same(json.loads(path.read_text("utf-8")), ours, folder)
        write_atomic(path, json.dumps(ours, indent=1) + "\n")
    if dist.is_initialized():
        dist.barrier()


def in_chunks(
    folder: Path,
    prompts: Sequence[Prompt],
    size: int,
    seed: int,
    work: Callable[[Sequence[Prompt], list[int], Path], None],
) -> list[Path]:
    """Work through prompts, `size` at a time; the files of all chunks, when all ranks are through.

    `work(prompts, seeds, path)` writes the file of a chunk, all or nothing; a chunk whose file exists is done.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = [folder / f"{number:06d}.jsonl" for number in range(math.ceil(len(prompts) / size))]
    mine = [number for number in range(rank, len(parts), ranks) if not parts[number].exists()]
    for number in tqdm(mine, desc="sampling", unit="chunk", disable=rank > 0):
        these = prompts[number * size : (number + 1) * size]
        seeds = np.random.SeedSequence([seed, number]).generate_state(len(these)).tolist()
        work(these, seeds, parts[number])
    if dist.is_initialized():
        dist.barrier()
    return parts


# ---------- chapters/05_rlhf.py · Policy and value model

class Policy(Llama):
    "Llama 2 with log-probabilities of given tokens in the place of logits."

    def forward(
        self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"], temperature: float = 1.0
    ) -> Float[Tensor, "B T"]:
        "Log-probability of each target, after the token in its place, at a temperature; 0 where it is IGNORE. float32"
        chosen = targets != IGNORE
        logits = self.output(self.hidden(tokens)[chosen]).float() / temperature
        logprobs = -F.cross_entropy(logits, targets[chosen], reduction="none")
        return torch.zeros(targets.shape, device=targets.device).masked_scatter(chosen, logprobs)


class Value(RewardModel):
    "A reward model's body with an expectation of the score, at every token."

    def forward(self, tokens: Int[Tensor, "B T"], targets: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        "What score is expected after each token. float32; `targets` are not read"
        return self.score(self.hidden(tokens)).float().sum(-1)  # of one number: FSDP wants a tensor that is no view


def policy_of(model: Llama) -> Policy:
    "A policy with a copy of a model's weights."
    weight = model.tok_embeddings.weight
    policy = Policy(model.config).to(weight.device, weight.dtype)
    policy.load_state_dict(model.state_dict())
    return policy


def value_of(model: RewardModel) -> Value:
    "A value model with a copy of a reward model's body, and a head of zeros."
    value = Value.of(model)
    nn.init.zeros_(value.score.weight)
    return value


# ---------- chapters/05_rlhf.py · An iteration

class Rows(NamedTuple):
    "Answers in their places: tokens, and which token follows where it is an answer's, else IGNORE; both (B T)."

    tokens: Int[Tensor, "B T"]
    targets: Int[Tensor, "B T"]

    @classmethod
    def of(cls, prompts: Sequence[list[int]], answers: Sequence[list[int]]) -> "Rows":
        "Prompts with answers, filled up at the end."
        tokens = padded([[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)])
        targets = torch.full((len(tokens), tokens.shape[1] - 1), IGNORE)
        for row, ids, prompt, answer in zip(targets, tokens, prompts, answers, strict=True):
            places = slice(len(prompt) - 1, len(prompt) + len(answer) - 1)
            row[places] = ids[1:][places]
        return cls(tokens[:, :-1], targets)


@torch.no_grad()
def in_passes(model: Policy | Value, rows: Rows, order: list[np.ndarray], lengths: np.ndarray, *args) -> Tensor:
    "`model(tokens, targets, *args)` of all rows, (B T), in passes."
    out = torch.zeros(rows.targets.shape, device=rows.targets.device)
    for these in order:
        longest = lengths[these].max()
        out[these, :longest] = model(*(x[these, :longest] for x in rows), *args)
    divide_again(model)
    return out
