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
    "chosen_temperature",
    "run",
    "cli",
]


# ---------- chapters/05_rlhf.py · Rejection sampling

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from jaxtyping import Bool, Float
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from llama2lib.chat import respond
from llama2lib.checkpoint import load_checkpoint
from llama2lib.corpus import records
from llama2lib.dialog import Message, check_dialog
from llama2lib.distributed import compute_dtype, processes
from llama2lib.model import Llama
from llama2lib.pretrain import command
from llama2lib.recipes import write_atomic
from llama2lib.reward import load_scorer
from llama2lib.rollout import Prompt, Reward, in_chunks, read_prompts, record_settings, untagged
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
    rows = list({(json.dumps(row.prompt.messages), row.answer): row for rows in iterations for row in rows}.values())
    scores = reward([row.prompt for row in rows], [row.answer for row in rows]).combined if rows else []
    kept: dict[str, Best] = {}
    for row, r in zip(rows, scores, strict=True):
        key = json.dumps(row.prompt.messages)
        if key not in kept or r > kept[key].reward:
            kept[key] = row._replace(reward=float(r))
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
    temperature: float = 1.0  # of the samples
    temperatures: tuple[float, ...] = ()  # to choose from in the place of `temperature`, anew for each version
    tune: int = 64  # prompts to choose a temperature on
    top_p: float = 1.0  # sample among the likeliest tokens that have this probability together
    max_new_tokens: int = 1024  # an answer that does not end within them is not used
    seed: int = 0  # of the samples

    prompts: Path = Path("prompts.jsonl")  # conversations that end with the user, and is_safety
    earlier: tuple[Path, ...] = ()  # best.jsonl of earlier iterations, to be scored anew and joined (from V4 on)
    out: Path = Path("runs/rejection")  # best.jsonl, to fine-tune on, and chunks of the work
    chunk: int = 64  # prompts between saves

    def __post_init__(self):
        for name in ("samples", "max_new_tokens", "chunk", "tune"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not 0 < self.gate < 1 or min((self.temperature, *self.temperatures)) <= 0:
            found = f"gate {self.gate}, temperature {self.temperature}, temperatures {self.temperatures}"
            raise ValueError(f"{found}: expected 0 < gate < 1, and above 0")


REJECTION = {"paper": RejectionConfig(), "mini": RejectionConfig(samples=8, max_new_tokens=64, chunk=256)}


def read_best(path: str | os.PathLike) -> list[Best]:
    """The rows of a best.jsonl, maybe none.

    ValueError with file, line and field for one that is no conversation with an answer at its end, a tag and a reward.
    """
    rows = []
    for number, row in records(path):
        try:
            if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
                raise ValueError("expected an object with a list in the field 'messages'")
            check_dialog(row["messages"])
            *messages, last = row["messages"]
            if last["role"] != "assistant":
                raise ValueError(f"messages: the {last['role']}'s comes last; expected the assistant's")
            tag, reward = row.get("is_safety"), row.get("reward")
            if not isinstance(tag, bool):
                raise ValueError(f"is_safety: found {tag!r:.60}; expected true or false")
            if type(reward) not in (int, float) or not math.isfinite(reward):
                raise ValueError(f"reward: found {reward!r:.60}; expected a finite number")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of best.jsonl ({error})") from None
        rows.append(Best(Prompt(messages, tag), last["content"], reward))
    return rows


def write_best(path: str | os.PathLike, rows: Sequence[Best]):
    "Write rows as JSONL, all or nothing: conversations that `read_dialogs` reads, with their rewards."
    lines = ({"messages": row.dialog, "is_safety": row.prompt.is_safety, "reward": row.reward} for row in rows)
    write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def chosen_temperature(config: RejectionConfig, prompts: Sequence[Prompt], sample: Callable) -> float:
    """The one of `temperatures` at which the best answers to the first `tune` prompts have the highest mean reward.

    The ranks share them out; what each one gave is kept in out/temperatures. ValueError when none gives an answer.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    parts = [config.out / "temperatures" / f"{temperature:g}.jsonl" for temperature in config.temperatures]
    mine = list(zip(config.temperatures, parts, strict=True))[rank::ranks]
    for temperature, part in tqdm(mine, desc="temperatures", unit="temperature", disable=rank > 0):
        if not part.exists():
            these = prompts[: config.tune]
            seeds = np.random.SeedSequence([config.seed]).generate_state(len(these)).tolist()
            write_best(part, best(these, sample(these, seeds, temperature)))
    if ranks > 1:
        dist.barrier()
    means = [np.mean([row.reward for row in rows] or [-np.inf]) for rows in map(read_best, parts)]
    if max(means) == -np.inf:
        raise ValueError(f"{config.model}: no answer ended within {config.max_new_tokens} tokens")
    return config.temperatures[int(np.argmax(means))]


def run(config: RejectionConfig) -> Path:
    """Sample, score and choose as `config` says; returns the path of best.jsonl.

    Each rank holds the policy and the reward models whole: they must fit on one GPU, which 70B in bfloat16 does not.
    ValueError with file and line for prompts that are none, for a folder with chunks of another configuration, and
    when no prompt got an answer that ended.
    """
    with processes() as device:
        prompts = read_prompts(config.prompts, tagged=config.safety is not None)
        record_settings(config.out, config, prompts=[config.prompts], earlier=config.earlier)
        model, tokenizer = load_checkpoint(config.model, device, compute_dtype(device)), Tokenizer(config.model)
        reward = Reward(
            load_scorer(config.helpfulness, device), config.safety and load_scorer(config.safety, device), config.gate
        )

        def sample(these, seeds, temperature):
            settings = config.samples, temperature, config.top_p, config.max_new_tokens, seeds
            return candidates(model, tokenizer, these, reward, *settings)

        at = chosen_temperature(config, prompts, sample) if config.temperatures else config.temperature
        parts = in_chunks(
            config.out / "chunks", prompts, config.chunk, config.seed,
            lambda these, seeds, path: write_best(path, best(these, sample(these, seeds, at))),
        )  # fmt: skip
        if not dist.is_initialized() or dist.get_rank() == 0:
            rows = [row for part in parts for row in read_best(part)]
            if not rows:
                raise ValueError(f"{config.model}: no answer ended within {config.max_new_tokens} tokens")
            if config.earlier:
                rows = bag([*(read_best(path) for path in config.earlier), rows], reward)
            write_best(config.out / "best.jsonl", rows)
            mean = np.mean([row.reward for row in rows])
            print(f"{len(rows):,} best answers at temperature {at:g}, mean reward {mean:.3f}")
        if dist.is_initialized():
            dist.barrier()
    return config.out / "best.jsonl"


@record
def cli(prog: str = "python -m llama2lib.rejection"):
    "python -m llama2lib.rejection RECIPE [options]: the best of K answers; under torchrun, on all its ranks."
    about = {name: f"{config.samples} samples of each prompt" for name, config in REJECTION.items()}
    command(run, {name: (about[name], config) for name, config in REJECTION.items()}, prog)


if __name__ == "__main__":
    cli()
