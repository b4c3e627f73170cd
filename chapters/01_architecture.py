# %% [markdown]
# # Architecture
#
# > One file holds the whole model: about 200 lines that load Meta's weights, train, and generate. Paper section 2.2
# > and appendix A.2.1.
#
# Llama 2 is the standard decoder-only transformer with four changes that Llama 1 already had, and two of its own:
#
# | part | what the paper takes | from |
# |---|---|---|
# | normalisation | RMSNorm before each sub-layer | Zhang and Sennrich 2019 |
# | activation | SwiGLU | Shazeer 2020 |
# | positions | rotary embeddings (RoPE) | Su et al. 2022 |
# | tokenizer | SentencePiece BPE, 32,000 pieces, digits split, byte fallback | Llama 1 |
# | context | 4,096 tokens instead of 2,048 | new |
# | attention | grouped queries (GQA) in the 34B and 70B models | new |
#
# We build them in this order, check each against an independent implementation, then load and save real checkpoints,
# generate text, and train a tokenizer.
#
# > Ours: paragraphs that begin with 'Ours' say where we choose what the paper leaves open, or differ from it.

# %%
#| default_exp model

# %%
import matplotlib.pyplot as plt
from einops import rearrange, repeat

from llama2lib import plots

# %%
#| export
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

# Letters in the shapes: B batch, T tokens, S cached tokens, D model width, N query heads, K key/value heads,
# H head width, V vocabulary

# %% [markdown]
# ## Model sizes
#
# A model is nine numbers. Three of them follow from each other in a way that the paper does not print: the width of the
# feed-forward layer. The released code starts from the usual $4d$, takes two thirds of it, because SwiGLU has three
# matrices where a plain layer has two, optionally multiplies, and rounds up to a multiple.

# %%
#| export
def swiglu_width(dim: int, multiple_of: int = 256, multiplier: float = 1.0) -> int:
    "Width of the SwiGLU layer: 2/3 of 4·dim, times `multiplier`, rounded up to `multiple_of` (released code)."
    width = int(multiplier * int(2 * 4 * dim / 3))
    return multiple_of * math.ceil(width / multiple_of)


# %% [markdown]
# 70B needs the multiplier 1.3 and multiples of 4,096: its key and value projections are smaller (GQA), and a wider
# feed-forward layer makes up for it.

# %%
assert swiglu_width(4096) == 11_008 and swiglu_width(5120) == 13_824
assert swiglu_width(8192, multiple_of=4096, multiplier=1.3) == 28_672


# %%
#| export
@dataclass(frozen=True)
class ModelConfig:
    "The shape of a Llama 2 model (Table 1; widths from the released weights). The defaults are 7B."

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
            if not value > 0:
                raise ValueError(f"ModelConfig.{name} = {value!r}: expected a positive number")
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


# %% [markdown]
# The paper names four sizes. It does not give widths and depths; these are the released weights'. The 34B model was
# never released.
#
# > Ours: 34B takes the shape of CodeLlama-34B, which Meta built from it; the parameter count printed for it below is
# > therefore ours, not Meta's. `debug` and the `book-` sizes are for laptops.

# %%
#| export
LLAMA2 = {
    "7B": ModelConfig(),
    "13B": ModelConfig(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13_824),
    "34B": ModelConfig(dim=8192, n_layers=48, n_heads=64, n_kv_heads=8, hidden_dim=22_016),
    "70B": ModelConfig(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28_672),
    "debug": ModelConfig(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=176, vocab_size=512, max_seq_len=128
    ),
    "book-1M": ModelConfig(
        dim=128, n_layers=4, n_heads=4, n_kv_heads=2, hidden_dim=344, vocab_size=1024, max_seq_len=512
    ),
    "book-2M": ModelConfig(
        dim=192, n_layers=4, n_heads=6, n_kv_heads=2, hidden_dim=512, vocab_size=1024, max_seq_len=512
    ),
}

# %% [markdown]
# ## RMSNorm
#
# Each sub-layer reads a normalised copy of the residual stream: $x / \sqrt{\text{mean}(x^2) + \epsilon}$ times a
# learned weight. There is no mean subtraction and no bias. Two details matter once the model runs in 16 bits: the mean
# of squares is taken in float32, and the weight multiplies *after* the cast back.


# %%
#| export
class RMSNorm(nn.Module):
    "Root-mean-square normalisation over the last dimension (section 2.2). (… D) → (… D)"

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


# %%
torch.manual_seed(0)
x = torch.randn(2, 3, 64)
assert torch.allclose(RMSNorm(64, 1e-5)(x), x * (x.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt(), atol=1e-6)
assert torch.allclose(RMSNorm(64, 1e-5)(x), RMSNorm(64, 1e-5)(100 * x), atol=1e-5)  # the scale of x does not matter
assert RMSNorm(64, 1e-5).bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# %% [markdown]
# ## Rotary embeddings
#
# RoPE rotates each pair of numbers of a query or key by an angle proportional to its position; the scalar product of
# two of them then depends only on their distance. Pair $i$ of $H/2$ turns by $\theta^{-2i/H}$ per token, with
# $\theta = 10^4$: the first pair turns by one radian per token, the last by about a ten-thousandth.
#
# Which numbers form a pair is a convention. Meta's weights pair neighbours (0, 1), (2, 3), …; Hugging Face's pair $i$
# with $i + H/2$. A model that takes the wrong one runs, and writes nonsense. We keep Meta's, and the conversion comes
# with the checkpoints.


# %%
#| export
def rope_table(config: ModelConfig, device=None) -> Float[Tensor, "T H//2 2"]:
    "Cosine and sine of the angle of every position and pair, always in float32 (section 2.2; Su et al. 2022)."
    pairs = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-pairs / config.head_dim)
    angles = torch.outer(torch.arange(config.max_seq_len, device=device, dtype=torch.float32), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def apply_rope(x: Float[Tensor, "B T N H"], rope: Float[Tensor, "#B T H//2 2"]) -> Float[Tensor, "B T N H"]:
    "Rotate neighbouring pairs of each head by the angles of their positions, in float32."
    cos, sin = rope.unsqueeze(-3).unbind(-1)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).type_as(x)


# %% [markdown]
# The released code says the same with complex numbers: the pair is one complex number, the rotation one product. That
# makes a short independent check.

# %%
config = LLAMA2["debug"]
rope = rope_table(config)
q, k = torch.randn(2, 16, 4, 16), torch.randn(2, 16, 4, 16)
as_complex = torch.view_as_complex(q.unflatten(-1, (-1, 2))) * torch.view_as_complex(rope[:16])[None, :, None]
assert torch.allclose(apply_rope(q, rope[:16]), torch.view_as_real(as_complex).flatten(-2), atol=1e-6)

# %% [markdown]
# The property that makes it useful: shifting query and key together changes nothing.

# %%
scores = [
    torch.einsum("btnh,bsnh->bnts", apply_rope(q, rope[s : s + 16]), apply_rope(k, rope[s : s + 16])) for s in (0, 100)
]
assert torch.allclose(*scores, atol=1e-4)

# %% [markdown]
# Each row below is one pair of a head; the fast ones tell neighbours apart, the slow ones say roughly where in the
# context a token stands.

# %%
fig, ax = plt.subplots(figsize=(6.4, 2.6), layout="constrained")
image = ax.imshow(rope_table(LLAMA2["7B"])[:512, :, 0].T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1)
ax.set(xlabel="position (tokens)", ylabel="pair of the head", title="RoPE: the first pairs spin, the last hardly move")
fig.colorbar(image, label="cosine of the angle")
plots.save(fig, "01_rope.png")

# %% [markdown]
# ## The KV cache
#
# While generating, keys and values of earlier tokens never change, so they are kept. The cache is allocated once, at
# its full length; `lengths` says how many tokens each row holds, so that rows of different length share a batch.


# %%
#| export
class KVCache:
    "Keys and values of every layer, (B K S H) each, preallocated; `lengths` (B) counts the tokens held by each row."

    def __init__(self, model: "Llama", batch: int, length: int):
        config, weight = model.config, model.tok_embeddings.weight
        if length > config.max_seq_len:
            raise ValueError(f"a cache of {length} tokens is longer than the context of {config.max_seq_len}")
        shape = (batch, config.n_kv_heads, length, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, device=weight.device, dtype=weight.dtype) for _ in range(config.n_layers)]
            for _ in ("keys", "values")
        )
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=weight.device)
        self.used = 0  # tokens held by the longest row: what attention has to read

    def repeat(self, times: int):
        "Give every row `times` copies, next to each other: samples of one prompt share its prefill."
        self.keys = [k.repeat_interleave(times, 0) for k in self.keys]
        self.values = [v.repeat_interleave(times, 0) for v in self.values]
        self.lengths = self.lengths.repeat_interleave(times)


# %% [markdown]
# ## Grouped-query attention
#
# In multi-head attention (MHA) every query head has its own key and value head, in multi-query attention (MQA) all
# share one, and grouped-query attention lies between: in the 70B model 64 query heads share 8, and the cache shrinks
# eightfold.
#
# `scaled_dot_product_attention` picks the fastest kernel for the device and shares key/value heads by itself
# (`enable_gqa`), without making copies of them where the kernel allows. Without a cache the mask is plain causal. With
# one, new tokens go to their rows' positions, and a row attends to what it holds.


# %%
#| export
class Attention(nn.Module):
    "Causal self-attention; N / K query heads share a key/value head (section 2.2, A.2.1). (B T D) → (B T D)"

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = nn.Linear(config.dim, config.n_heads * config.head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wv = nn.Linear(config.dim, config.n_kv_heads * config.head_dim, bias=False)
        self.wo = nn.Linear(config.n_heads * config.head_dim, config.dim, bias=False)

    def forward(self, x: Float[Tensor, "B T D"], rope: Float[Tensor, "#B T H//2 2"], cache=None, mask=None):
        """`cache`: this layer's (keys, values, rows, positions), written in place. `mask` (B 1 T S): what tokens read.

        Without a mask a token reads itself and the tokens before it in `x`.
        """
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if cache is not None:
            keys, values, rows, positions = cache
            keys[rows, :, positions] = k.transpose(1, 2)
            values[rows, :, positions] = v.transpose(1, 2)
            if mask is not None:
                k, v = keys[:, :, : mask.shape[-1]], values[:, :, : mask.shape[-1]]
        shared = k.shape[1] < q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=shared)
        return self.wo(out.transpose(1, 2).flatten(-2))


# %% [markdown]
# The check writes the same attention in einsum, with the shared heads copied and the mask spelled out.

# %%
with torch.no_grad():
    attention, x = Attention(config), torch.randn(2, 16, config.dim)
    q, k, v = (rearrange(w(x), "b t (n h) -> b t n h", h=16) for w in (attention.wq, attention.wk, attention.wv))
    k, v = (repeat(t, "b t k h -> b t (k g) h", g=2) for t in (apply_rope(k, rope[:16]), v))
    scores = torch.einsum("btnh,bsnh->bnts", apply_rope(q, rope[:16]), k) / 4
    weights = scores.masked_fill(torch.ones(16, 16).triu(1).bool(), -torch.inf).softmax(-1)
    expected = attention.wo(rearrange(torch.einsum("bnts,bsnh->btnh", weights, v), "b t n h -> b t (n h)"))
    assert torch.allclose(attention(x, rope[:16]), expected, atol=1e-5)

# %% [markdown]
# A token reads itself and what came before it, never what comes after: the weights of one head, and the mask behind it.

# %%
fig, axes = plt.subplots(1, 2, figsize=(6.4, 3), layout="constrained", sharey=True)
for ax, picture, title in zip(axes, (weights[0, 0], weights[0, 0] > 0), ("weight", "read at all"), strict=True):
    ax.imshow(picture, cmap="Blues")
    ax.set(xlabel="token read", title=title)
axes[0].set_ylabel("token that reads")
fig.suptitle("Causal attention: nothing above the diagonal")
plots.save(fig, "01_causal_mask.png")

# %% [markdown]
# ## SwiGLU
#
# The feed-forward layer multiplies two projections, one passed through SiLU ($x\,\sigma(x)$), and projects back:
# $W_2(\mathrm{SiLU}(W_1 x) \odot W_3 x)$.


# %%
#| export
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

    def forward(self, x, rope, cache=None, mask=None):
        x = x + self.attention(self.attention_norm(x), rope, cache, mask)
        return x + self.feed_forward(self.ffn_norm(x))


# %%
with torch.no_grad():
    ffn = FeedForward(config)
    a, b = x @ ffn.w1.weight.T, x @ ffn.w3.weight.T
    assert torch.allclose(ffn(x), (a / (1 + torch.exp(-a)) * b) @ ffn.w2.weight.T, atol=1e-5)

# %% [markdown]
# ## The model
#
# Embedding, layers, a last norm, and an output matrix of its own (Llama 2 does not tie it to the embedding). `hidden`
# is everything before the output matrix; reward models will put another head there. Logits are float32 whatever the
# weights are.
#
# > Ours: the paper does not say how weights start. We draw every matrix from a normal distribution with standard
# > deviation 0.02, and divide by $\sqrt{2 \cdot \text{layers}}$ for the two that write to the residual stream (`wo`,
# > `w2`), as GPT-2 did, so that the stream's variance does not grow with depth.
#
# The rotation table is recomputed whenever the model moves or changes its type. A table that is cast to bfloat16 with
# the weights mixes up positions beyond a few hundred, and nothing complains.


# %%
#| export
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

    def init_weights(self):
        "Draw all weights anew from the global generator (ours: N(0, 0.02²), scaled by depth for wo and w2)."
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            else:
                writes = name.endswith(("wo.weight", "w2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.n_layers) ** 0.5 if writes else 0.02)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)  # to(), cuda(), bfloat16(), to_empty() all pass here
        self.rope = rope_table(self.config, self.tok_embeddings.weight.device)
        return self

    def hidden(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T D"]:
        """The normalised state of every token, before the output matrix.

        With a cache, `tokens` continue its rows: they are written behind what each row holds, and `lengths` grows by T.
        """
        batch, length = tokens.shape
        if length > self.config.max_seq_len:
            raise ValueError(f"{length} tokens are more than the context of {self.config.max_seq_len}")
        rope, mask, where = self.rope[:length], None, None
        if cache is not None:
            if cache.used + length > cache.keys[0].shape[2]:
                raise ValueError(f"{cache.used} + {length} tokens are more than the cache's {cache.keys[0].shape[2]}")
            positions = cache.lengths[:, None] + torch.arange(length, device=tokens.device)
            where = torch.arange(batch, device=tokens.device)[:, None], positions
            if cache.used:
                rope = self.rope[positions]
                reach = torch.arange(cache.used + length, device=tokens.device)
                mask = (reach <= positions[:, :, None])[:, None]
            cache.lengths, cache.used = cache.lengths + length, cache.used + length
        x = self.tok_embeddings(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, rope, cache and (cache.keys[i], cache.values[i], *where), mask)
        return self.norm(x)

    def forward(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T V"]:
        "Logits of the token that follows each token, float32."
        return self.output(self.hidden(tokens, cache)).float()


# %% [markdown]
# From here on the chapter uses the library's names: a class defined in a notebook and its exported twin are two
# different classes.

# %%
from llama2lib.model import LLAMA2, KVCache, Llama

torch.manual_seed(0)
model = Llama(config)
tokens = torch.randint(config.vocab_size, (2, 24))
with torch.no_grad():
    logits = model(tokens)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % config.vocab_size
    differs = (model(changed) - logits).abs().amax((0, 2)) > 0
assert not differs[:12].any() and differs[12:].all()  # a token changes itself and the future, never the past

# %% [markdown]
# Feeding the tokens piece by piece through a cache gives the same logits as all at once.

# %%
with torch.no_grad():
    cache = KVCache(model, batch=2, length=24)
    pieces = [model(piece, cache) for piece in tokens.split([10, 1, 1, 12], dim=1)]
assert torch.allclose(torch.cat(pieces, 1), logits, atol=1e-5)
