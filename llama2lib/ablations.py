"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "SHAPES",
    "RECIPES",
    "cli",
    "ATTRIBUTES",
    "VALUES",
    "FACT_TOKENS",
    "with_facts",
    "fact_stream",
    "questions",
    "answered",
]


# ---------- chapters/01_architecture.py · Fewer key/value heads (Table 18)

from dataclasses import replace

from llama2lib import pretrain
from llama2lib.model import LLAMA2, Llama, ModelConfig, swiglu_width
from llama2lib.pretrain import PRETRAIN

SHAPES = {
    "30B-MHA": ModelConfig(6656, 60, 64, 64, swiglu_width(6656)),
    "30B-GQA": ModelConfig(6656, 60, 64, 8, swiglu_width(6656, multiplier=1.3)),
    "30B-MQA": ModelConfig(6656, 60, 64, 1, swiglu_width(6656, multiplier=1.33)),
}
RECIPES = {name: replace(PRETRAIN["34B"], model=name, tokens=150_000_000_000, max_seq_len=2048) for name in SHAPES}


def cli(prog: str = "python -m llama2lib.ablations"):
    "python -m llama2lib.ablations 30B-GQA [options]: `llama2lib.pretrain` with the shapes of Table 18; torchrun too."
    LLAMA2.update(SHAPES)
    PRETRAIN.update(RECIPES)
    pretrain.cli(prog)


# ---------- chapters/01_architecture.py · Facts and questions

import numpy as np
import torch
from jaxtyping import Bool, Int

ATTRIBUTES, VALUES = 4, 8
FACT_TOKENS = ATTRIBUTES * (1 + VALUES)  # extra ids behind the vocabulary


def with_facts(row: Int[np.ndarray, "T"], mentions: int, vocab_size: int, random: np.random.Generator) -> np.ndarray:
    """A row of text with facts written over it: each attribute `mentions` times, at random places, with one value.

    A mention is two tokens, at an even place: the attribute, vocab_size + a, then its value. ValueError without room.
    """
    if 2 * ATTRIBUTES * mentions > len(row):
        raise ValueError(f"{mentions} mentions of {ATTRIBUTES} attributes do not fit into {len(row)} tokens")
    places = 2 * random.permutation(len(row) // 2)[: ATTRIBUTES * mentions]
    attributes = np.arange(ATTRIBUTES).repeat(mentions)
    values = attributes * VALUES + random.integers(VALUES, size=ATTRIBUTES)[attributes]
    row = row.copy()
    row[places], row[places + 1] = vocab_size + attributes, vocab_size + ATTRIBUTES + values
    return row


def fact_stream(
    text: Int[np.ndarray, "N"], block: int, vocab_size: int, random: np.random.Generator, share: float = 0.5
) -> Int[np.ndarray, "N"]:
    "A stream in which a `share` of the blocks has facts, with mentions that fill up to three quarters of a block."
    most, rows = 3 * block // 8 // ATTRIBUTES, text.copy()
    for start in range(0, len(text) - block + 1, block):
        if random.random() < share:
            mentions = int(random.integers(2, most + 1))
            rows[start : start + block] = with_facts(text[start : start + block], mentions, vocab_size, random)
    return rows


def questions(rows: Int[np.ndarray, "B T"], vocab_size: int) -> Int[np.ndarray, "Q 3"]:
    "The second mention of every attribute: row, place of the attribute, and distance to the first mention in tokens."
    found = []
    for number, row in enumerate(rows):
        for attribute in range(ATTRIBUTES):
            first, second = np.flatnonzero(row == vocab_size + attribute)[:2]
            found.append((number, second, second - first))
    return np.array(found)


def answered(
    model: Llama, rows: Int[np.ndarray, "B T"], asked: Int[np.ndarray, "Q 3"], window: int | None = None
) -> Bool[np.ndarray, "Q"]:
    "Which questions get the right value as likeliest next token, when the last `window` tokens are read (None: all)."
    device, right = model.tok_embeddings.weight.device, []
    with torch.no_grad():
        for row, place, _ in asked.tolist():
            seen = rows[row, max(0, place + 1 - window) if window else 0 : place + 1]
            logits = model(torch.from_numpy(seen.astype(np.int64))[None].to(device))[0, -1]
            right.append(logits.argmax().item() == rows[row, place + 1])
    return np.array(right)


if __name__ == "__main__":
    cli()
