"""Generated from chapters/05_rlhf.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Candidates",
    "candidates",
    "Best",
    "best",
    "bag",
    "RejectionConfig",
    "REJECTION",
    "read_best",
    "write_best",
    "run",
    "record_settings",
    "cli",
]


# ---------- chapters/05_rlhf.py · Rejection sampling

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from llama2lib.chat import respond
from llama2lib.checkpoint import load_checkpoint
from llama2lib.dialog import Message
from llama2lib.distributed import processes
from llama2lib.model import Llama
from llama2lib.preferences import records
from llama2lib.pretrain import check_same, command
from llama2lib.recipes import write_atomic
from llama2lib.reward import load_scorer
from llama2lib.rollout import Prompt, Reward, read_prompts, untagged
from llama2lib.tokenizer import Tokenizer


class Candidates(NamedTuple):
    "K answers to each of P prompts, whether each may be chosen (ended, and not empty), and its reward, else NaN."

    answers: list[list[str]]
    rewards: Float[np.ndarray, "P K"]
    usable: Bool[np.ndarray, "P K"]


def candidates(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    reward: Reward,
    samples: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 64,
    seed: int | Sequence[int] = 0,
) -> Candidates:
    "Sample `samples` answers to every prompt and score them; errors as of `generate` and `Reward`."
    dialogs = [prompt.messages for prompt in prompts]
    replies = respond(model, tokenizer, dialogs, max_new_tokens, temperature, top_p, seed, samples)
    texts, whole = zip(*(untagged(reply.text) for reply in replies), strict=True)
    usable = np.array([
        reply.finished and tidy and bool(text) for reply, text, tidy in zip(replies, texts, whole, strict=True)
    ])  # fmt: skip
    scored, rewards = np.flatnonzero(usable), np.full(len(texts), np.nan, np.float32)
    if len(scored):
        rewards[scored] = reward([prompts[i // samples] for i in scored], [texts[i] for i in scored]).combined
    answers = [list(texts[i : i + samples]) for i in range(0, len(texts), samples)]
    return Candidates(answers, rewards.reshape(-1, samples), usable.reshape(-1, samples))


class Best(NamedTuple):
    "A prompt, the best of its answers, and that answer's reward."

    prompt: Prompt
    answer: str
    reward: float

    @property
    def dialog(self) -> list[Message]:
        "The prompt with the answer, to fine-tune on."
        return [*self.prompt.messages, {"role": "assistant", "content": self.answer}]


def best(prompts: Sequence[Prompt], found: Candidates) -> list[Best]:
    "The best usable answer to every prompt; prompts without one are left out."
    rewards = np.where(found.usable, found.rewards, -np.inf)
    places = rewards.argmax(1)
    return [
        Best(prompt, answers[place], float(row[place]))
        for prompt, answers, row, place in zip(prompts, found.answers, rewards, places, strict=True)
        if row[place] > -np.inf
    ]


# ---------- chapters/05_rlhf.py · The bag

def bag(iterations: Sequence[Sequence[Best]], reward: Reward) -> list[Best]:
    "The best answers of several iterations, scored anew; of those to one prompt the best, the first of equal ones."
    rows = [row for rows in iterations for row in rows]
    scores = reward([row.prompt for row in rows], [row.answer for row in rows]).combined if rows else []
    kept: dict[str, Best] = {}
    for row, score in zip(rows, scores, strict=True):
        key = json.dumps(row.prompt.messages)
        if key not in kept or score > kept[key].reward:
            kept[key] = row._replace(reward=float(score))
    return list(kept.values())


# ---------- chapters/05_rlhf.py · The command

@dataclass(frozen=True)
class RejectionConfig:
    "Rejection sampling: the best of K answers to every prompt (section 3.2.3). ValueError for numbers out of range."

    model: str = "runs/sft/model"  # the policy's folder, Hugging Face's layout or Meta's
    helpfulness: str = "runs/reward-helpfulness/model"  # reward model's folder, ours or a sequence classifier
    safety: str | None = "runs/reward-safety/model"  # none: the helpfulness model decides alone
    gate: float = 0.15  # probability of safe below which the safety model's score counts
    samples: int = 10  # K; the paper does not say
    temperature: float = 1.0  # Figure 8: to be tuned again for each version
    top_p: float = 1.0  # sample among the likeliest tokens that have this probability together
    max_new_tokens: int = 1024  # an answer that does not end within them is not used
    seed: int = 0  # of the samples

    prompts: Path = Path("prompts.jsonl")  # conversations that end with the user, and is_safety
    earlier: tuple[Path, ...] = ()  # best.jsonl of earlier iterations, to be scored anew and joined (from V4 on)
    out: Path = Path("runs/rejection")  # best.jsonl, to fine-tune on, and chunks of the work
    chunk: int = 64  # prompts between saves

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not 0 < self.gate < 1 or self.temperature <= 0:
            raise ValueError(f"gate {self.gate}, temperature {self.temperature}: expected 0 < gate < 1, and above 0")


REJECTION = {"paper": RejectionConfig(), "mini": RejectionConfig(samples=8, max_new_tokens=64, chunk=256)}


def read_best(path: str | os.PathLike) -> list[Best]:
    "The rows of a best.jsonl. ValueError with file and line for one that is none."
    rows = []
    for number, row in records(path):
        try:
            *messages, last = row["messages"]
            rows.append(Best(Prompt(messages, row["is_safety"]), last["content"], row["reward"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}:{number}: not a line of best.jsonl ({type(error).__name__}: {error})") from None
    return rows


def write_best(path: str | os.PathLike, rows: Sequence[Best]):
    "Write rows as JSONL, all or nothing: conversations that `read_dialogs` reads, with their rewards."
    lines = ({"messages": row.dialog, "is_safety": row.prompt.is_safety, "reward": row.reward} for row in rows)
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def run(config: RejectionConfig) -> Path:
    """Sample, score and choose as `config` says; returns the path of best.jsonl.

    ValueError with file and line for prompts that are none, and for a folder with chunks of another configuration.
    """
    with processes() as device:
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        prompts = read_prompts(config.prompts, tagged=config.safety is not None)
        if rank == 0:
            record_settings(config)
        if ranks > 1:
            dist.barrier()
        model, tokenizer = load_checkpoint(config.model, device), Tokenizer(config.model)
        reward = Reward(
            load_scorer(config.helpfulness, device), config.safety and load_scorer(config.safety, device), config.gate
        )
        count = math.ceil(len(prompts) / config.chunk)
        parts = [config.out / "chunks" / f"{number:06d}.jsonl" for number in range(count)]
        mine = [number for number in range(rank, count, ranks) if not parts[number].exists()]
        for number in tqdm(mine, desc="sampling", unit="chunk", disable=rank > 0):
            begin = number * config.chunk
            these = prompts[begin : begin + config.chunk]
            seeds = np.random.SeedSequence([config.seed, number]).generate_state(len(these)).tolist()
            found = candidates(
                model, tokenizer, these, reward, config.samples, config.temperature, config.top_p,
                config.max_new_tokens, seeds,
            )  # fmt: skip
            write_best(parts[number], best(these, found))
        if ranks > 1:
            dist.barrier()
        if rank == 0:
            rows = [row for part in parts for row in read_best(part)]
            if config.earlier:
                rows = bag([*(read_best(path) for path in config.earlier), rows], reward)
            write_best(config.out / "best.jsonl", rows)
            print(f"{len(rows):,} best answers, mean reward {np.mean([row.reward for row in rows]):.3f}")
        if ranks > 1:
            dist.barrier()
    return config.out / "best.jsonl"


def record_settings(config: RejectionConfig):
    "Write out/settings.json; ValueError when the folder holds chunks of another configuration."
    path = config.out / "settings.json"
    digest = hashlib.sha256(config.prompts.read_bytes()).hexdigest()
    ours = json.loads(json.dumps(asdict(config) | {"out": None, "prompts": digest}, default=str))
    if path.exists():
        check_same(json.loads(path.read_text("utf-8")), ours, config.out)
    write_atomic(path, json.dumps(ours, indent=1) + "\n")


@record
def cli(prog: str = "python -m llama2lib.rejection"):
    "python -m llama2lib.rejection RECIPE [options]: the best of K answers; under torchrun, on all its ranks."
    about = {name: f"{config.samples} samples of each prompt" for name, config in REJECTION.items()}
    command(run, {name: (about[name], config) for name, config in REJECTION.items()}, prog)


if __name__ == "__main__":
    cli()
