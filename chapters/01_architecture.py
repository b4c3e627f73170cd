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
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
from einops import rearrange, repeat
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from llama2lib import ledger, paper, plots

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
    "debug": ModelConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, hidden_dim=176, vocab_size=512, max_seq_len=128),
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

    def select(self, rows: Tensor):
        "Keep only some rows (a mask or indices)."
        self.keys, self.values = [k[rows] for k in self.keys], [v[rows] for v in self.values]
        self.lengths = self.lengths[rows]
        self.used = int(self.lengths.max())

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

# %% [markdown]
# ## Counting: parameters, operations, cache
#
# On the `meta` device a model has shapes and no memory, so even 70B parameters can be counted on a laptop.

# %% tags=["nbval-check-output"]
counts = {}
for name in ("7B", "13B", "34B", "70B"):
    with torch.device("meta"):
        counts[name] = sum(p.numel() for p in Llama(LLAMA2[name]).parameters())
    assert counts[name] == LLAMA2[name].num_params
    print(f"{name:>4} {counts[name]:>15,} parameters")

# %% [markdown]
# 7B, 13B and 70B are those of the released weights to the last parameter. The names are round: '70B' is 69.0 billion.

# %%
RELEASED = {"7B": 6_738_415_616, "13B": 13_015_864_320, "70B": 68_976_648_192}
for name, released in RELEASED.items():
    ledger.record(
        "Table 1", f"{name}: parameters of the released weights", "= paper", released, counts[name],
        evidence="chapters/01_architecture.py::counts[name]",
    )  # fmt: skip
for name, count in counts.items():
    ledger.record(
        "Table 1", f"{name}: the name is the count in billions, within 5 %", f"= paper ± {0.05 * int(name[:-1]):.2f}",
        int(name[:-1]), count / 1e9, evidence="chapters/01_architecture.py::counts[name]",
    )  # fmt: skip

# %% [markdown]
# A token passes every matrix once forward, and twice as much work goes backward. With two operations for each
# multiply-add that is nearly $6N$ operations a token in training, plus attention, which grows with the context.
# PyTorch's own counter agrees on the `debug` model, once attention runs as plain matrix products, all of the context
# unmasked.

# %% tags=["nbval-check-output"]
with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
    model(torch.zeros(1, 64, dtype=torch.int64))
assert counter.get_total_flops() == 64 * config.forward_flops_per_token(context=64)

A100_FLOPS = 312e12  # dense bfloat16, NVIDIA's data sheet
print("size   operations a token   share of the A100s' peak that Table 2's hours imply for 2T tokens")
for name in ("7B", "13B", "34B", "70B"):
    hours = paper.PAPER["Table 2"][name]["gpu_hours"]
    operations = 3 * LLAMA2[name].forward_flops_per_token(context=(4096 + 1) / 2)
    print(f"{name:>4} {operations:20.3e} {2e12 * operations / (3600 * hours * A100_FLOPS):12.0%}")

# %% [markdown]
# The paper does not print that share. It falls where the hours grow faster than the model.
#
# While generating, the KV cache is what fills the memory. In 16 bits, for a sequence of 4,096 tokens:


# %% tags=["nbval-check-output"]
def with_kv_heads(name: str, kv_heads: int) -> ModelConfig:
    return replace(LLAMA2[name], n_kv_heads=kv_heads)


print("       heads   cache per token   per 4k sequence   sequences beside the weights (GPUs of 80 GB)")
for name, gpus in (("7B", 1), ("13B", 1), ("34B", 8), ("70B", 8)):
    for kind, kv_heads in (("MHA", LLAMA2[name].n_heads), ("GQA", 8), ("MQA", 1)):
        shape = with_kv_heads(name, kv_heads)
        copies = max(1, gpus // kv_heads)  # with fewer heads than GPUs, each GPU keeps a copy
        cache = copies * shape.kv_bytes_per_token()
        room = 80e9 * gpus - 2 * LLAMA2[name].num_params
        ours = " ← released" if shape == LLAMA2[name] else ""
        print(
            f"{name:>4} {kind} {kv_heads:>3} {cache / 2**10:13,.0f} KiB {cache * 4096 / 2**30:13.2f} GiB"
            f" {room // (cache * 4096):10,.0f} ({gpus}){ours}"
        )

# %% [markdown]
# For 70B on one node of eight GPUs, grouped queries make room for eight times as many conversations as MHA. MQA would
# save no more there: its single key/value head has to be on every GPU (appendix A.2.1). Room means memory for weights
# and cache only; a server needs some for activations too.

# %%
fig, ax = plt.subplots(layout="constrained")
batch = [2**i for i in range(10)]
for kind, kv_heads in (("MHA", 64), ("GQA", 8)):
    memory = [
        (2 * LLAMA2["70B"].num_params + b * 4096 * with_kv_heads("70B", kv_heads).kv_bytes_per_token()) / 1e9
        for b in batch
    ]
    ax.plot(batch, memory, marker="o", label=kind)
    ax.annotate(kind, (batch[-1], memory[-1]), xytext=(6, 0), textcoords="offset points", va="center")
ax.axhline(640, color="0.4", linestyle=":")
ax.text(1, 680, "8 GPUs of 80 GB")
ax.set(xscale="log", yscale="log", xlabel="sequences of 4,096 tokens", ylabel="weights and cache, 16 bits (GB)",
       title="70B: grouped queries hold eight times the batch")  # fmt: skip
plots.save(fig, "01_kv_cache.png")

# %% [markdown]
# ## Generation
#
# A model gives a distribution over the next token; generation draws from it again and again. The temperature divides
# the logits first (0 means: take the likeliest), top-p then keeps the smallest set of tokens whose probability reaches
# $p$.
#
# Each row draws from random numbers of its own, made from the seed, the prompt's place in the list and the sample's
# number. One uniform number a step is enough: it is looked up in the cumulative distribution. A row's text therefore
# does not depend on its neighbours, and is the same on every device.

# %%
#| export generation
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from llama2lib.model import KVCache, Llama


def sample(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, "B"], temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """Draw a token per row with one uniform number in [0, 1) each; returns tokens and their log-probabilities.

    The log-probability is after temperature and before top-p; at temperature 0 (greedy), of the untempered logits.
    """
    logprobs = (logits / temperature if temperature > 0 else logits).log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1, keepdim=True)
    else:
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        probs, order = logprobs.to(wide).exp(), None
        if top_p < 1:
            probs, order = probs.sort(-1, descending=True)
            probs = probs * (probs.cumsum(-1) - probs < top_p)
        cumulative = probs.cumsum(-1)
        target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
        tokens = tokens if order is None else order.gather(-1, tokens)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


# %% [markdown]
# With many draws the frequencies are the probabilities, and top-p 0.6 keeps just the first two of four tokens.

# %%
four = torch.tensor([0.1, 0.4, 0.2, 0.3]).log().expand(4000, 4)
uniform = (torch.arange(4000) + 0.5) / 4000
assert torch.bincount(sample(four, uniform)[0]).tolist() == [400, 1600, 800, 1200]
assert torch.bincount(sample(four, uniform, top_p=0.6)[0], minlength=4)[[0, 2]].sum() == 0
assert torch.allclose(sample(four, uniform, temperature=0)[1].exp(), torch.tensor(0.4))

# %% [markdown]
# A batch of prompts of different length is padded on the right for the first pass. Under a causal mask no real token
# sees the padding, so that pass needs no mask of its own; the padding's keys and values are overwritten as the rows
# grow. Samples of one prompt share its pass and copy the cache. Rows that have ended leave the batch when half of it is
# done.


# %%
#| export generation
@dataclass
class Completion:
    "What a model added to one prompt: `finished` tells that it ended with EOS, which is then the last token."

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def check_prompts(model: Llama, prompts: Sequence[Sequence[int]]):
    "Raise unless every prompt is a non-empty list of token ids that leaves room for an answer in the context."
    vocab_size, context = model.config.vocab_size, model.config.max_seq_len
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, int | str):
            raise TypeError(f"prompts[{i}] is {prompt!r}: expected a list of token ids for every prompt")
        if len(prompt) == 0:
            raise ValueError(f"prompts[{i}] is empty: expected at least one token, such as BOS")
        if len(prompt) >= context:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens: the context of {context} leaves no room to answer"
            )
        for place, token in enumerate(prompt):
            if not 0 <= token < vocab_size:
                raise ValueError(f"prompts[{i}][{place}] is {token}: the vocabulary has ids 0 to {vocab_size - 1}")


@torch.inference_mode()
def decode(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | Sequence[int],
    eos_id: int | None,
    num_samples: int,
) -> Iterator[list[tuple[int, int, float]]]:
    "Yield, step by step, (row, token, log-probability) of every row that is still open. Arguments as in `generate`."
    check_prompts(model, prompts)
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_p {top_p}: expected temperature >= 0 and 0 < top_p <= 1")
    if not isinstance(seed, int) and len(seed) != len(prompts):
        raise ValueError(f"{len(seed)} seeds for {len(prompts)} prompts: expected one number, or one for each prompt")
    if not prompts or max_new_tokens < 1:
        return
    config, device = model.config, model.tok_embeddings.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    entropy = [(seed, i) if isinstance(seed, int) else (seed[i], 0) for i in range(len(prompts))]
    streams = [np.random.default_rng((*pair, n)) for pair in entropy for n in range(num_samples)]
    uniform = torch.from_numpy(np.stack([stream.random(max_new_tokens) for stream in streams]))
    uniform = uniform.to(device, torch.float32 if device.type == "mps" else torch.float64)

    padded = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.as_tensor(prompt, device=device)
    cache = KVCache(model, len(prompts), min(longest + max_new_tokens, config.max_seq_len))
    states = model.hidden(padded, cache)
    cache.lengths = lengths
    logits = model.output(states[torch.arange(len(prompts), device=device), lengths - 1]).float()
    cache.repeat(num_samples)
    logits = logits.repeat_interleave(num_samples, 0)

    rows = torch.arange(len(streams), device=device)  # which row of the result each row of the batch is
    is_open = torch.ones_like(rows, dtype=torch.bool)
    for step in range(max_new_tokens):
        tokens, logprobs = sample(logits, uniform[rows, step], temperature, top_p)
        yield list(zip(*(t[is_open].tolist() for t in (rows, tokens, logprobs)), strict=True))
        full = cache.lengths + 1 >= config.max_seq_len
        is_open &= ~full if eos_id is None else ~full & (tokens != eos_id)
        count = int(is_open.sum())
        if count == 0 or step + 1 == max_new_tokens:
            return
        if 2 * count <= len(rows) or full.any():
            cache.select(is_open)
            rows, tokens, is_open = rows[is_open], tokens[is_open], is_open[is_open]
        logits = model.output(model.hidden(tokens[:, None], cache)[:, -1]).float()


# %% [markdown]
# Two functions use it: one returns whole completions, the other hands out the tokens of one prompt as they come.


# %%
#| export generation
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    eos_id: int | None = None,
    num_samples: int = 1,
) -> list[Completion]:
    """Continue every prompt (a list of token ids) `num_samples` times; a flat list, prompt by prompt.

    A completion ends with `eos_id`, after `max_new_tokens`, or when the context is full. `logprobs` are of the sampled
    distribution: after temperature, before top-p; at temperature 0, of the untempered one. A row's result depends only
    on its own prompt, its place in the list and the seed; with one seed for each prompt, not even on the place.
    Raises ValueError for an empty or too long prompt, an id outside the vocabulary, and settings out of range.
    """
    results = [Completion([], [], False) for _ in range(len(prompts) * num_samples)]
    for step in decode(model, prompts, max_new_tokens, temperature, top_p, seed, eos_id, num_samples):
        for row, token, logprob in step:
            if logprob != logprob:
                raise FloatingPointError(f"row {row}, token {len(results[row].tokens)}: the logits are not finite")
            results[row].tokens.append(token)
            results[row].logprobs.append(logprob)
            results[row].finished = token == eos_id
    return results


def stream(
    model: Llama,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    "Yield the tokens that continue one prompt as they are drawn: the same tokens as `generate` returns."
    for step in decode(model, [prompt], max_new_tokens, temperature, top_p, seed, eos_id, num_samples=1):
        yield step[0][1]


# %% [markdown]
# Greedy decoding with the cache gives what growing the text by hand gives, in a batch of ragged prompts.

# %%
from llama2lib.generation import generate, stream

prompts = [[1, 5, 9], [1, 7, 7, 7, 200, 31, 8], [1]]
completions = generate(model, prompts, max_new_tokens=20, temperature=0)
for prompt, completion in zip(prompts, completions, strict=True):
    text = list(prompt)
    for _ in range(20):
        text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    assert completion.tokens == text[len(prompt) :]

# %% [markdown]
# The log-probabilities are the model's own: a forward pass over prompt and completion reproduces them. Later chapters
# rely on this: PPO compares them with the trainer's.

# %%
hot = generate(model, prompts, max_new_tokens=20, temperature=1.3, top_p=0.9, seed=7, num_samples=2)
with torch.no_grad():
    for i, completion in enumerate(hot):
        text = torch.tensor([prompts[i // 2] + completion.tokens])
        logprobs = (model(text)[0, :-1] / 1.3).log_softmax(-1).gather(-1, text[0, 1:, None])[-20:, 0]
        assert torch.allclose(logprobs, torch.tensor(completion.logprobs), atol=1e-4)
alone = generate(model, prompts[1:2], max_new_tokens=20, temperature=1.3, top_p=0.9, seed=[3])
assert generate(model, prompts, 20, 1.3, 0.9, seed=[4, 3, 5])[1].tokens == alone[0].tokens  # neighbours do not matter
assert list(stream(model, prompts[0], 20, 1.3, 0.9, seed=7)) == hot[0].tokens

# %% [markdown]
# ## Tokenizer
#
# Byte-pair encoding over Unicode characters, by SentencePiece. Numbers are split into digits, so that arithmetic sees
# the same pieces in every number; characters without a piece of their own become their UTF-8 bytes, so that nothing is
# unknown. The vocabulary has 32,000 pieces: three control tokens (unknown, BOS, EOS), 256 bytes, and 31,741 learned
# ones. There is no padding token, and EOS must not stand in for one: a model that is trained to ignore padding would
# learn to ignore its own full stop.
#
# Control tokens are numbers that a caller adds. The text `</s>` is spelled like any other text and never becomes EOS,
# whoever typed it.
#
# > Ours: SentencePiece writes spaces as `▁` (U+2581), so a real `▁` in a text would come back as a space. We spell that
# > one character in bytes; every text then survives the round trip. Leading spaces and line breaks do anyway.

# %%
#| export tokenizer
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from llama2lib.recipes import write_atomic

_SPACE = "\u2581"  # SentencePiece's sign for a space


class Tokenizer:
    """A SentencePiece model, Meta's or ours (section 2.2). `path`: the file, or a folder that holds `tokenizer.model`.

    `bos_id`, `eos_id`, `pad_id` (-1: none) and `vocab_size` are the file's. Raises FileNotFoundError or ValueError.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: expected a SentencePiece model file")
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self.path.read_bytes())
        except RuntimeError as error:
            raise ValueError(f"{self.path}: not a SentencePiece model ({error})") from None
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = self._model.bos_id(), self._model.eos_id(), self._model.pad_id()
        self._line_start = self._model.encode("\n")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        "Token ids of a text, with BOS before and EOS behind when asked for. Text never becomes a control token."
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"position {error.start} of the text is half a surrogate pair: not Unicode text") from None
        first, *rest = text.split(_SPACE)
        ids = self._model.encode(first)
        for part in rest:
            ids += [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
            ids += self._model.encode("\n" + part)[len(self._line_start) :]  # no space
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control tokens vanish, bytes that are not UTF-8 become U+FFFD, one leading space goes.

        The space is the one that `encode` puts in front; to continue a text, decode both parts together.
        """
        for place, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids[{place}] is {token}: the vocabulary has ids 0 to {self.vocab_size - 1}")
        return self._model.decode(list(ids))


# %%
#| export tokenizer
def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> Tokenizer:
    """Train a BPE vocabulary on texts, write it to `path`, and load it. The settings are those of Meta's own file.

    Digits are split and bytes stand in for rare characters (section 2.2). Raises ValueError when there is no text, or
    when it does not yield `vocab_size` pieces.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("no text to train a tokenizer on: every text is empty or white space")
    if vocab_size < 260:
        raise ValueError(f"vocab_size {vocab_size}: expected at least 260 (3 control tokens, 256 bytes, one piece)")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            split_digits=True,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=2**30,  # the default drops lines over 4 kB without a word
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size {vocab_size} does not suit this text: {error}") from None
    write_atomic(Path(path), model.getvalue())
    return Tokenizer(path)


# %% [markdown]
# A small vocabulary learned from Python's own documentation, to see the rules at work.

# %%
from pydoc_data.topics import topics

from llama2lib.tokenizer import Tokenizer, train_tokenizer

folder = tempfile.TemporaryDirectory()
tokenizer = train_tokenizer(topics.values(), 1024, Path(folder.name) / "tokenizer.model")
for text in ("The yield statement returns 1024.", "naïve 🦙", "</s>"):
    pieces = [tokenizer._model.id_to_piece(i) for i in tokenizer.encode(text, bos=True)]
    print(f"{text!r:36} {' '.join(pieces)}")

# %%
for text in (
    "The year 2023",
    " leading space",
    "a\tb\r\n\n",
    "\u2581 is no space",
    "🦙 \0 \U0010ffff",
    "",
    "<s></s><unk><0x41>",
):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and not {0, 1, 2} & set(ids)
digits = [tokenizer._model.id_to_piece(i) for i in tokenizer.encode("31415")]
assert "".join(digits).lstrip("\u2581") == "31415" and all(len(piece.lstrip("\u2581")) <= 1 for piece in digits)
assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 2, -1, 1024)
