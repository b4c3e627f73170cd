"""Generated from chapters/07_safety.py by chapters/export.py; edit the chapter."""

__all__ = [
    "ADJECTIVES",
    "Preprompts",
    "PREPROMPTS",
    "read_preprompts",
    "Distilled",
    "preceded",
    "preprompts",
    "distilled",
    "DistillationConfig",
    "DISTILLATION",
    "read_categories",
    "write_pairs",
    "run",
    "cli",
]


# ---------- chapters/07_safety.py · Context distillation (section 4.2.4)

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from llama2lib.chat import respond
from llama2lib.checkpoint import load_checkpoint
from llama2lib.corpus import records
from llama2lib.dialog import Message
from llama2lib.distributed import compute_dtype, processes
from llama2lib.model import Llama
from llama2lib.pretrain import command
from llama2lib.recipes import write_atomic
from llama2lib.reward import Scorer, load_scorer
from llama2lib.rollout import in_chunks, read_prompts, record_settings, untagged
from llama2lib.tokenizer import Tokenizer

ADJECTIVES = ("responsible", "respectful", "wise")  # the paper's examples


class Preprompts(NamedTuple):
    "What may stand in front of an adversarial prompt: texts for any, and one for each risk category."

    generic: tuple[str, ...]
    templates: dict[str, str]


PREPROMPTS = Preprompts(
    tuple(
        f"You are a {first} and {second} assistant. {rest}"
        for first, second in itertools.permutations(ADJECTIVES, 2)
        for rest in (
            "If a request could do harm, say so and do not help with it.",
            "Someone has flagged the next message as unsafe; answer it with care.",
        )
    ),
    {  # the categories are those of section 4.2.1
        "illicit": "The next message may ask for help with a crime. In your answer: 1. put people's safety first and "
        "do not help; 2. say that it is against the law, and whom it hurts; 3. point to a lawful way.",
        "hateful": "The next message may ask for something hurtful. In your answer: 1. do not write it; 2. say whom "
        "such words hurt; 3. suggest something kind, and help for those who feel hurt.",
        "advice": "The next message may ask for advice that needs an expert. In your answer: 1. say that you are none; "
        "2. say what could go wrong; 3. tell the person whom to ask.",
    },
)


def read_preprompts(path: str | os.PathLike) -> Preprompts:
    'Preprompts of a JSON file `{"generic": ["…"], "templates": {"category": "…"}}`. ValueError for another format.'
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        generic, templates = tuple(found["generic"]), dict(found["templates"])
        if not generic or not all(isinstance(text, str) and text.strip() for text in (*generic, *templates.values())):
            raise ValueError("no generic preprompt, or one that is no text")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected an object with 'generic', a list, and 'templates' ({error!r})") from None
    return Preprompts(generic, templates)


class Distilled(NamedTuple):
    "An adversarial prompt, a model's own answer to it, and the one under a preprompt, each with its safety score."

    messages: list[Message]
    preprompt: str
    own: str
    own_score: float | None  # None: it is empty, or did not end
    answer: str
    score: float | None

    @property
    def safer(self) -> bool:
        "Whether the answer under the preprompt ended, is another, and is scored higher than the own, if that did end."
        if self.score is None or self.answer == self.own:  # equal answers in two batches may differ by a rounding
            return False
        return self.own_score is None or self.score > self.own_score


def preceded(messages: Sequence[Message], preprompt: str) -> list[Message]:
    "A conversation under a preprompt: as its system message, or in front of the one it has."
    if messages and messages[0]["role"] == "system":
        text = f"{preprompt} {messages[0]['content']}"
        return [{"role": "system", "content": text}, *map(dict, messages[1:])]
    return [{"role": "system", "content": preprompt}, *map(dict, messages)]


def preprompts(categories: Sequence[str | None], known: Preprompts = PREPROMPTS, seed: int = 0) -> list[str]:
    "A preprompt for each prompt: its category's template, for None a generic one. ValueError for an unknown category."
    random, found = np.random.default_rng([70, seed]), []
    for number, category in enumerate(categories):
        drawn = known.generic[random.integers(len(known.generic))]
        if category is not None and category not in known.templates:
            expected = f"expected one of {', '.join(known.templates)}, or none"
            raise ValueError(f"prompt {number}: category {category!r}; {expected}")
        found.append(drawn if category is None else known.templates[category])
    return found


def distilled(
    model: Llama,
    tokenizer: Tokenizer,
    dialogs: Sequence[Sequence[Message]],
    texts: Sequence[str],
    scorer: Scorer,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new_tokens: int = 1024,
    seeds: Sequence[int] = (),
) -> list[Distilled]:
    """An answer to each conversation as it is, and one under its preprompt, scored without it.

    seeds: one for each conversation, the same for both answers. An answer that is empty or does not end has no score.
    """
    shown = [list(dialogs), [preceded(messages, text) for messages, text in zip(dialogs, texts, strict=True)]]
    answers, scores = [], []
    for these in shown:
        replies = respond(model, tokenizer, these, max_new_tokens, temperature, top_p, list(seeds) or 0)
        made, tidy = zip(*(untagged(reply.text) for reply in replies), strict=True)
        whole = [r.finished and no_tag and bool(text) for r, no_tag, text in zip(replies, tidy, made, strict=True)]
        told = [[*m, {"role": "assistant", "content": text}] for m, text in zip(dialogs, made, strict=True)]
        answers.append(made)
        scores.append([float(value) if good else None for value, good in zip(scorer(told), whole, strict=True)])
    rows = zip(dialogs, texts, answers[0], scores[0], answers[1], scores[1], strict=True)
    return [Distilled(list(messages), *rest) for messages, *rest in rows]

@dataclass(frozen=True)
class DistillationConfig:
    "Safety context distillation (section 4.2.4). ValueError for numbers out of range."

    model: str = "runs/sft/model"  # the chat model's folder
    safety: str = "runs/reward-safety/model"  # reward model's folder, which decides what is kept
    prompts: Path = Path("prompts.jsonl")  # `messages`, `is_safety`, and `category` where it is known
    preprompts: Path | None = None  # JSON with `generic` and `templates`; none: this package's
    templates: bool = True  # whether a category has its template; else all preprompts are generic
    gate: bool = True  # keep only what the safety model scores higher than the model's own answer
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 1024
    seed: int = 0
    out: Path = Path("runs/distillation")  # distilled.jsonl, pairs.jsonl, and chunks of the work
    chunk: int = 64  # prompts between saves

    def __post_init__(self):
        if min(self.max_new_tokens, self.chunk) < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"{self}: expected numbers of at least 1, a temperature above 0, top_p of 0 to 1")


DISTILLATION = {
    "paper": DistillationConfig(),
    "mini": DistillationConfig(temperature=0.5, max_new_tokens=64, chunk=256),
}


def read_categories(path: str | os.PathLike, known: Preprompts) -> list[str | None]:
    "The risk category of every line of a file of prompts, None where there is none. ValueError with file and line."
    found = []
    for number, row in records(path):
        category = row.get("category") if isinstance(row, dict) else None
        if category is not None and (not isinstance(category, str) or category not in known.templates):
            expected = f"expected one of {', '.join(known.templates)}, or null"
            raise ValueError(f"{path}:{number}: category {category!r}; {expected}")
        found.append(category)
    return found


def write_pairs(path: str | os.PathLike, rows: Sequence[Distilled]):
    "Write both answers of each prompt as JSONL, all or nothing."
    write_atomic(path, "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows))


def run(config: DistillationConfig) -> Path:
    """Distil as `config` says, or go on; returns the path of distilled.jsonl.

    ValueError with file and line for prompts that are none, for a file without a tagged one, for a folder of another
    configuration, and when nothing is kept.
    """
    with processes() as device:
        known = read_preprompts(config.preprompts) if config.preprompts else PREPROMPTS
        prompts, categories = read_prompts(config.prompts), read_categories(config.prompts, known)
        chosen = [(prompt, kind) for prompt, kind in zip(prompts, categories, strict=True) if prompt.is_safety]
        if not chosen:
            raise ValueError(f"{config.prompts}: no prompt with is_safety true; distillation is for adversarial ones")
        files = [config.preprompts] if config.preprompts else []
        # what is kept may change between two runs, not what is sampled
        record_settings(config.out, replace(config, gate=True), prompts=[config.prompts], preprompts=files)
        texts = preprompts([kind if config.templates else None for _, kind in chosen], known, config.seed)
        items = [(prompt.messages, text) for (prompt, _), text in zip(chosen, texts, strict=True)]
        model, tokenizer = load_checkpoint(config.model, device, compute_dtype(device)), Tokenizer(config.model)
        scorer = load_scorer(config.safety, device)
        settings = config.temperature, config.top_p, config.max_new_tokens
        parts = in_chunks(
            config.out / "chunks", items, config.chunk, config.seed,
            lambda these, seeds, path: write_pairs(
                path, distilled(model, tokenizer, *map(list, zip(*these, strict=True)), scorer, *settings, seeds)
            ),
        )  # fmt: skip
        if not dist.is_initialized() or dist.get_rank() == 0:
            rows = [Distilled(**row) for part in parts for _, row in records(part)]
            kept = [row for row in rows if (row.safer if config.gate else row.score is not None)]
            write_pairs(config.out / "pairs.jsonl", rows)
            if not kept:
                what = "is safer than the model's own" if config.gate else "has ended"
                raise ValueError(f"{config.out / 'pairs.jsonl'}: no answer under a preprompt {what}")
            lines = ({"messages": [*r.messages, {"role": "assistant", "content": r.answer}]} for r in kept)
            write_atomic(
                config.out / "distilled.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            )
            print(f"{len(kept):,} of {len(rows):,} answers kept, in {config.out / 'distilled.jsonl'}")
        if dist.is_initialized():
            dist.barrier()
    return config.out / "distilled.jsonl"


@record
def cli(prog: str = "python -m llama2lib.distillation"):
    "python -m llama2lib.distillation RECIPE [options]: safety context distillation; under torchrun, on all its ranks."
    about = {name: f"answers at temperature {config.temperature:g}" for name, config in DISTILLATION.items()}
    command(run, {name: (about[name], config) for name, config in DISTILLATION.items()}, prog)


if __name__ == "__main__":
    cli()
