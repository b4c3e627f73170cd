"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "swiglu_width",
    "ModelConfig",
    "LLAMA2",
    "rms_norm",
    "RMSNorm",
    "rope_table",
    "apply_rope",
    "KVCache",
    "Attention",
    "FeedForward",
    "Block",
    "separate",
    "Llama",
    "compensated",
]


# ---------- chapters/01_architecture.py · Architecture

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# Letters in the shapes: B batch, T tokens, S cached tokens, D model width, N query heads, K key/value heads,
# H head width, V vocabulary


# ---------- chapters/01_architecture.py · Model sizes

def swiglu_width(dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    "Width of the SwiGLU layer: 2/3 of 4·dim, times `multiplier`, rounded up to `multiple_of` (released code)."
    width = int(multiplier * int(2 * 4 * dim / 3))
    return multiple_of * math.ceil(width / multiple_of)

@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama 2 model (Table 1; widths from the released weights). The defaults are 7B.

    ValueError, naming the field, for a shape that cannot be built.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 32  # fewer than n_heads: grouped-query attention; 1: multi-query attention
    hidden_dim: int = 11_008  # SwiGLU width
    vocab_size: int = 32_000
    max_seq_len: int = 4096  # Llama 1 had 2,048
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0

    def __post_init__(self):
        for name, value in vars(self).items():
            kind = float if name in ("norm_eps", "rope_theta") else int
            if not isinstance(value, int | kind) or not value > 0:
                raise ValueError(f"ModelConfig.{name} = {value!r}: expected a positive {kind.__name__}")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} over n_heads {self.n_heads}: expected an even whole number per head")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def num_params(self) -> int:
        "Parameters: embedding, output, final norm, and per layer attention, feed-forward and two norms."
        attention = 2 * self.dim * (self.n_heads + self.n_kv_heads) * self.head_dim
        layer = attention + 3 * self.dim * self.hidden_dim + 2 * self.dim
        return self.n_layers * layer + 2 * self.vocab_size * self.dim + self.dim

    def kv_bytes_per_token(self, bytes_per_number: int = 2) -> int:
        "Bytes that the KV cache needs for one token: a key and a value in each layer and key/value head."
        return 2 * self.n_layers * self.n_kv_heads * self.head_dim * bytes_per_number

    def forward_flops_per_token(self, context: float) -> float:
        """Multiply-adds count as 2: every matrix once, and attention to `context` tokens (scores and values).

        A causal sequence of T tokens attends to (T + 1) / 2 on average. Training costs three times as much.
        """
        matrices = self.num_params - self.vocab_size * self.dim - (2 * self.n_layers + 1) * self.dim
        return 2 * matrices + 4 * self.n_layers * self.dim * context

LLAMA2 = {
    "7B": ModelConfig(),
    "13B": ModelConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13_824),
    "34B": ModelConfig(dim=8192, n_layers=48, n_heads=64, n_kv_heads=8, hidden_dim=22_016),
    "70B": ModelConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28_672),
    "debug": ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=176, vocab_size=512, max_seq_len=128),
    "book-1M": ModelConfig(
        dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=344, vocab_size=1024, max_seq_len=512
    ),
    "book-2M": ModelConfig(
        dim=192, n_layers=4, n_heads=6, n_kv_heads=2, hidden_dim=512, vocab_size=1024, max_seq_len=512
    ),
}


# ---------- chapters/01_architecture.py · RMSNorm

def rms_norm(x: Float[Tensor, "... D"], weight: Float[Tensor, "D"], eps: float) -> Float[Tensor, "... D"]:
    "Root-mean-square normalisation over the last dimension, in float32 (section 2.2; Zhang & Sennrich 2019)."
    return F.rms_norm(x.float(), x.shape[-1:], eps=eps).type_as(x) * weight


class RMSNorm(nn.Module):
    "`rms_norm` with a weight that is learned. (… D) → (… D)"

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return rms_norm(x, self.weight, self.eps)


# ---------- chapters/01_architecture.py · Rotary embeddings

def rope_table(config: ModelConfig, device=None) -> Float[Tensor, "T H//2 2"]:
    "Cosine and sine of the angle of every position and pair, always in float32 (section 2.2; Su et al. 2022)."
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    angles = torch.outer(torch.arange(config.max_seq_len, device=device, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: Float[Tensor, "B T N H"], rope: Float[Tensor, "#B T H//2 2"]) -> Float[Tensor, "B T N H"]:
    "Rotate neighbouring pairs of each head by the angles of their positions, in float32."
    pairs, angles = x.float().unflatten(-1, (-1, 2)), rope.unsqueeze(-3)
    if torch.compiler.is_compiling():
        (even, odd), (cos, sin) = pairs.unbind(-1), angles.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(angles))
    return turned.flatten(-2).type_as(x)


# ---------- chapters/01_architecture.py · The KV cache

class KVCache:
    """Keys and values of every layer, (B K S H) each, preallocated; `lengths` (B) counts the tokens held by each row.

    ValueError when `length` is over the model's context.
    """

    def __init__(self, model: "Llama", batch: int, length: int):
        config, weight = model.config, model.tok_embeddings.weight
        if length > config.max_seq_len:
            raise ValueError(f"a cache of {length} tokens is longer than the context of {config.max_seq_len}")
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in range(config.n_layers)]
            for _ in ("keys", "values")
        )
        self.heads = torch.arange(batch * config.n_kv_heads, device=weight.device).view(batch, -1, 1) * length
        self.set_lengths(torch.zeros(batch, dtype=torch.int64, device=weight.device))

    def set_lengths(self, lengths: Int[Tensor, "B"]):
        "Say how many tokens each row holds: fewer than were written where the last ones are padding or to be redone."
        self.lengths = lengths
        self.used = int(lengths.max())  # of the longest row: what attention has to read

    def places(self, positions: Int[Tensor, "B T"]) -> Int[Tensor, "B*K*T"]:
        "Where tokens at these positions go, in keys and values seen as (B·K·S H)."
        return (self.heads[: len(positions)] + positions[:, None]).flatten()

    def copy_rows(self, to: list[int], source: "KVCache", rows: list[int], length: int):
        "Fill rows with the first `length` tokens of rows of a cache: a prompt's for its samples, or a row that moves."
        for target, origin in zip(self.keys + self.values, source.keys + source.values, strict=True):
            target[to, :, :length] = origin[rows, :, :length]


# ---------- chapters/01_architecture.py · Grouped-query attention

class Attention(nn.Module):
    "Causal self-attention; N / K query heads share a key/value head (section 2.2, A.2.1). (B T D) → (B T D)"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rope: Float[Tensor, "#B T H//2 2"],
        cache: tuple[Tensor, Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "B 1 T S"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """What the heads read, projected back to the stream's width; `rope`: the rows of `rope_table` at x's positions.

        `cache`: this layer's keys and values (B K S H), written in place, and the `KVCache.places` (B·K·T) of the new.
        `mask`: which of the keys a token reads; without one it reads itself and the tokens before it in `x`.
        """
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            keys, values, places = cache
            for kept, new in (keys, k), (values, v):
                kept.view(-1, self.head_dim).index_copy_(0, places, new.reshape(-1, self.head_dim).to(kept.dtype))
            if mask is not None:
                k, v = keys[:, :, : mask.shape[-1]], values[:, :, : mask.shape[-1]]
        shared = k.shape[1] < q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
        return self.wo(out.transpose(1, 2).flatten(-2))


# ---------- chapters/01_architecture.py · SwiGLU

class FeedForward(nn.Module):
    "SwiGLU: w2(silu(w1 x) · w3 x) (section 2.2; Shazeer 2020). (… D) → (… D)"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = nn.Linear(config.hidden_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    "One layer: attention and feed-forward, each on a normalised input and added to the stream (pre-norm)."

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        rope: Float[Tensor, "#B T H//2 2"],
        cache: tuple[Tensor, Tensor, Tensor] | None = None,
        mask: Bool[Tensor, "B 1 T S"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        "The stream behind the layer; arguments as of `Attention.forward`."
        x = x + self.attention(self.attention_norm(x), rope, cache, mask)
        return x + self.feed_forward(self.ffn_norm(x))


# ---------- chapters/01_architecture.py · The model

def separate(documents: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B 1 T T"]]:
    "Position of each token in its document (a run of equal numbers), and which tokens of its row it reads."
    places = torch.arange(documents.shape[1], device=documents.device)
    begins = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0), value=True)
    first = torch.where(begins, places, 0).cummax(1).values
    return places - first, ((first[:, :, None] <= places) & (places <= places[:, None]))[:, None]

class Llama(nn.Module):
    "Llama 2 (section 2.2), with the parameter names of Meta's checkpoints."

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.init_weights()
        self.rope = rope_table(config, self.tok_embeddings.weight.device)

    def init_std(self, name: str) -> float | None:
        "Standard deviation that a parameter is drawn with; None for the norms, which begin at 1 (ours)."
        if name.endswith("norm.weight"):
            return None
        return 0.02 / (2 * self.config.n_layers) ** 0.5 if name.endswith(("wo.weight", "w2.weight")) else 0.02

    def init_weights(self):
        "Draw all weights anew from the global generator (ours: N(0, 0.02²), scaled by depth for wo and w2)."
        for name, parameter in self.named_parameters():
            std = self.init_std(name)
            nn.init.ones_(parameter) if std is None else nn.init.normal_(parameter, std=std)

    def hidden(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        documents: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """The normalised state of every token, before the output matrix.

        With a cache, `tokens` continue its rows: they are written behind what each row holds, and `lengths` grows by T.
        With `documents`, each run of equal numbers in a row is read as if it stood there alone.
        ValueError for tokens that are not rows (B T), for more than the context or the cache has room for, and for a
        cache together with documents.
        """
        if tokens.ndim != 2:
            raise ValueError(f"tokens of shape {tuple(tokens.shape)}: expected rows of tokens, (B T)")
        batch, length = tokens.shape
        if length > self.config.max_seq_len:
            raise ValueError(f"{length} tokens are more than the context of {self.config.max_seq_len}")
        if self.rope.device != tokens.device:
            with torch.inference_mode(False):  # built while generating, it must still serve training
                self.rope = rope_table(self.config, tokens.device)
        rope, mask, places = self.rope[:length], None, None
        if documents is not None:
            if cache is not None:
                raise ValueError("a cache goes on with one document a row: expected no documents")
            positions, mask = separate(documents)
            rope = self.rope[positions]
        if cache is not None:
            rows, _, room, _ = cache.keys[0].shape
            if rows != batch or cache.used + length > room:
                raise ValueError(
                    f"{batch} rows of {cache.used} + {length} tokens, for a cache of {rows} rows of {room}"
                )
            positions = cache.lengths[:, None] + torch.arange(length, device=tokens.device)
            places = cache.places(positions)
            if cache.used:
                rope = self.rope[positions]
                reach = torch.arange(cache.used + length, device=tokens.device)
                mask = (reach <= positions[:, :, None])[:, None]
            cache.lengths, cache.used = cache.lengths + length, cache.used + length
        x = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, cache and (cache.keys[i], cache.values[i], places), mask)
        return self.norm(x)

    def forward(
        self,
        tokens: Int[Tensor, "B T"],
        cache: KVCache | None = None,
        documents: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        "Logits of the token that follows each token, float32; arguments as of `hidden`."
        return self.output(self.hidden(tokens, cache, documents)).float()


# ---------- chapters/01_architecture.py · Fewer key/value heads (Table 18)

def compensated(config: ModelConfig, n_kv_heads: int) -> ModelConfig:
    """`config` with fewer key/value heads and a SwiGLU layer wider by as many parameters, to the nearest unit (A.2.1).

    ValueError when the query heads are not a multiple of `n_kv_heads`.
    """
    saved = 2 * config.dim * config.head_dim * (config.n_kv_heads - n_kv_heads)
    return replace(config, n_kv_heads=n_kv_heads, hidden_dim=config.hidden_dim + round(saved / (3 * config.dim)))
