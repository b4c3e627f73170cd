"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "family_member",
    "FAMILY",
    "non_embedding",
    "family_recipe",
    "probe_rows",
]


# ---------- chapters/02_pretraining.py · Figure 5: larger models, same tokens

from llama2lib.model import ModelConfig, swiglu_width
from llama2lib.pretrain import PretrainConfig


def family_member(dim: int, n_layers: int) -> ModelConfig:
    "A small Llama: heads 16 wide, SwiGLU by the released rule, 1,024 pieces, rows of 128 tokens."
    heads, width = dim // 16, swiglu_width(dim, multiple_of=16)
    return ModelConfig(dim, n_layers, heads, heads, hidden_dim=width, vocab_size=1024, max_seq_len=128)


FAMILY = {
    "27k": family_member(32, n_layers=2),
    "101k": family_member(64, n_layers=2),
    "332k": family_member(96, n_layers=3),
    "804k": family_member(128, n_layers=4),
}


def non_embedding(config: ModelConfig) -> int:
    "Parameters without the embedding and the output matrix."
    return config.num_params - 2 * config.vocab_size * config.dim


def family_recipe(config: ModelConfig, steps: int, batch_tokens: int = 2048, warmup_steps: int = 96) -> PretrainConfig:
    "Section 2.2's recipe, small: the learning rate is 0.003 at a width of 128 and goes with 1 / width."
    lr = 3e-3 * 128 / config.dim
    return PretrainConfig(
        lr=lr, warmup_steps=warmup_steps, batch_tokens=batch_tokens, tokens=steps * batch_tokens, max_seq_len=128
    )


# ---------- chapters/02_pretraining.py · One stream for all sizes

from collections.abc import Mapping, Sequence

import numpy as np

from llama2lib.corpus import token_stream
from llama2lib.tokenizer import Tokenizer


def probe_rows(
    tokenizer: Tokenizer,
    held_out: Mapping[str, Sequence[str]],
    shares: Mapping[str, float],
    rows: int = 128,
    length: int = 128,
) -> np.ndarray:
    """About `rows` rows of `length` + 1 tokens from held-out documents, each domain at its share, [rows, length + 1].

    The rows of a domain are spread evenly over its documents and share no targets; a small domain yields fewer.
    """
    parts = []
    for name, documents in held_out.items():
        stream = token_stream(tokenizer, documents)
        room = (len(stream) - 1) // length
        count = min(round(shares[name] * rows), room)
        starts = np.linspace(0, room - 1, count).astype(int) * length
        parts.append(stream[starts[:, None] + np.arange(length + 1)])
    return np.concatenate(parts)
