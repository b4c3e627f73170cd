"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "compensated",
    "SHAPES",
    "RECIPES",
    "cli",
]


# ---------- chapters/01_architecture.py · Fewer key/value heads (Table 18)

from dataclasses import replace

from llama2lib.model import LLAMA2, Llama, ModelConfig, swiglu_width


def compensated(config: ModelConfig, n_kv_heads: int) -> ModelConfig:
    """`config` with fewer key/value heads and a SwiGLU layer wider by as many parameters, to the nearest unit (A.2.1).

    ValueError when the query heads are not a multiple of `n_kv_heads`.
    """
    saved = 2 * config.dim * config.head_dim * (config.n_kv_heads - n_kv_heads)
    return replace(config, n_kv_heads=n_kv_heads, hidden_dim=config.hidden_dim + round(saved / (3 * config.dim)))

from llama2lib import pretrain
from llama2lib.pretrain import PRETRAIN, PretrainConfig

SHAPES = {
    "30B-MHA": ModelConfig(6656, 60, 64, 64, swiglu_width(6656)),
    "30B-GQA": ModelConfig(6656, 60, 64, 8, swiglu_width(6656, multiplier=1.3)),
    "30B-MQA": ModelConfig(6656, 60, 64, 1, swiglu_width(6656, multiplier=1.33)),
}
RECIPES = {name: replace(PRETRAIN["34B"], model=name, tokens=150_000_000_000, max_seq_len=2048) for name in SHAPES}


def cli():
    "python -m llama2lib.ablations 30B-GQA [options]: `llama2lib.pretrain` with the shapes of Table 18; torchrun too."
    LLAMA2.update(SHAPES)
    PRETRAIN.update(RECIPES)
    pretrain.cli()


if __name__ == "__main__":
    cli()
