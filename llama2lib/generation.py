"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "sample",
    "Completion",
    "check_prompts",
    "check_settings",
    "row_streams",
    "prefill",
    "plain_weights",
    "row_product",
    "row_attention",
    "next_logits",
    "COMPILED",
    "compiled_logits",
    "READ_TOGETHER",
    "Slots",
    "decode",
    "generate",
    "stream",
]


# ---------- chapters/01_architecture.py · Generation

import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from numbers import Integral, Real

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama2lib.model import KVCache, Llama, apply_rope, rms_norm


def sample(
    logits: Float[Tensor, "B V"], uniform: Float[Tensor, "B"] | None, temperature: float = 1.0, top_p: float = 1.0
) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
    """Draw a token per row with one uniform number in [0, 1) each; returns tokens and their log-probabilities.

    The log-probability is after temperature and before top-p; at temperature 0 (greedy), where no number is needed, of
    the untempered logits.
    """
    logprobs = (logits if temperature in (0, 1) else logits / temperature).log_softmax(-1)
    if temperature == 0:
        tokens = logits.max(-1, keepdim=True).indices
    else:
        probs, order = logprobs.exp(), None
        wide = torch.float32 if logits.device.type == "mps" else torch.float64
        if top_p < 1:
            probs, order = probs.sort(-1, descending=True)
            probs = probs * (probs.cumsum(-1, dtype=wide) - probs < top_p)
        cumulative = probs.cumsum(-1, dtype=wide)
        target = uniform.to(cumulative)[:, None] * cumulative[:, -1:]
        tokens = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[-1] - 1)
        tokens = tokens if order is None else order.gather(-1, tokens)
    return tokens.squeeze(-1), logprobs.gather(-1, tokens).squeeze(-1)

@dataclass
class Completion:
    """What a model added to one prompt: `finished` tells that it ended with EOS, which is then the last token.

    `logprobs`: natural logarithms, one for each token.
    """

    tokens: list[int]
    logprobs: list[float]
    finished: bool


def check_prompts(model: Llama, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    "Prompts as lists of ints; raises unless each is non-empty, in the vocabulary, and leaves room in the context."
    vocab_size, context, checked = model.config.vocab_size, model.config.max_seq_len, []
    for i, prompt in enumerate(prompts):
        try:
            ids = [operator.index(token) for token in prompt]
        except TypeError:
            raise TypeError(f"prompts[{i}] is {prompt!r}: expected a list of token ids for every prompt") from None
        if not ids:
            raise ValueError(f"prompts[{i}] is empty: expected at least one token, such as BOS")
        if len(ids) >= context:
            raise ValueError(f"prompts[{i}] has {len(ids)} tokens: the context of {context} leaves no room to answer")
        if wrong := [(place, token) for place, token in enumerate(ids) if not 0 <= token < vocab_size]:
            place, token = wrong[0]
            raise ValueError(f"prompts[{i}][{place}] is {token}: the vocabulary has ids 0 to {vocab_size - 1}")
        checked.append(ids)
    return checked


def check_settings(
    vocab_size: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    eos_id: int | None,
    num_samples: int,
    batch: int,
):
    "ValueError for settings of `generate` that are out of range."
    counts = ("max_new_tokens", max_new_tokens, 0), ("num_samples", num_samples, 1), ("batch", batch, 1)
    for name, value, least in counts:
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} {value!r}: expected a whole number of at least {least}")
    if eos_id is not None and not (isinstance(eos_id, Integral) and 0 <= eos_id < vocab_size):
        raise ValueError(f"eos_id {eos_id!r}: expected None, or an id from 0 to {vocab_size - 1}")
    real = isinstance(temperature, Real) and isinstance(top_p, Real)
    if not real or not (temperature == 0 or temperature >= 1e-4) or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature!r}, top_p {top_p!r}: expected 0 or at least 1e-4, and 0 < top_p <= 1"
        )


def row_streams(seed: int | Sequence[int], prompts: int, num_samples: int) -> list[np.random.Generator]:
    "A generator for every row, prompt-major, from one seed (and the prompt's place) or a seed for each prompt."
    if isinstance(seed, Integral):
        keys = [(int(seed), i) for i in range(prompts)]
    else:
        keys = [(one, 0) for one in seed] if isinstance(seed, Sequence | np.ndarray) else []
    if len(keys) != prompts or not all(isinstance(key, Integral) and key >= 0 for key, _ in keys):
        raise ValueError(f"seed {seed!r} for {prompts} prompts: expected one number >= 0, or one for each prompt")
    sequences = [np.random.SeedSequence(key, spawn_key=(i, n)) for key, i in keys for n in range(num_samples)]
    return [np.random.default_rng(sequence) for sequence in sequences]


# ---------- chapters/01_architecture.py · A step

def prefill(model: Llama, prompts: list[list[int]]) -> tuple[KVCache, Float[Tensor, "B V"]]:
    "The cache of some prompts, and the logits of the token that follows each."
    device = model.tok_embeddings.weight.device
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    padded = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.tensor(prompt)
    cache = KVCache(model, *padded.shape)
    states = model.hidden(padded.to(device), cache)
    return cache, model.output(states[torch.arange(len(prompts), device=device), last]).float()


def plain_weights(model: Llama, copy: bool) -> tuple[Tensor, list[tuple[Tensor, ...]], Tensor, Tensor]:
    """Embedding, layers, last norm, output: the weights as tensors, matrices as (in, out).

    `copy`: laid out in this order, which is faster for many rows on a CPU. ValueError for weights that are sharded.
    """
    if isinstance(model.tok_embeddings.weight, DTensor):
        raise ValueError("the weights are divided among ranks; expected whole ones, from load_checkpoint on every rank")

    def plain(weight: Tensor) -> Tensor:
        weight = weight.detach()
        return weight if weight.ndim == 1 else weight.T.contiguous() if copy else weight.T

    layers = []
    for layer in model.layers:
        a, f = layer.attention, layer.feed_forward
        weights = a.wq, a.wk, a.wv, a.wo, f.w1, f.w3, f.w2, layer.attention_norm, layer.ffn_norm
        layers.append(tuple(plain(part.weight) for part in weights))
    return model.tok_embeddings.weight.detach(), layers, plain(model.norm.weight), plain(model.output.weight)


def row_product(x: Float[Tensor, "1 I"], weight: Float[Tensor, "I O"]) -> Float[Tensor, "1 O"]:
    "x @ weight for the compiler, which makes one kernel of these sums and what is around them."
    return (weight.T * x).sum(-1)[None]


def row_attention(
    q: Float[Tensor, "1 K G H"], k: Float[Tensor, "1 K S H"], v: Float[Tensor, "1 K S H"], attn_mask: Tensor
) -> Float[Tensor, "1 K G H"]:
    "Attention of a single row, likewise."
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1) * q.shape[-1] ** -0.5
    return ((scores + attn_mask).softmax(-1)[..., None] * v[:, :, None]).sum(-2)


def next_logits(
    weights: tuple,
    cache: KVCache,
    table: Float[Tensor, "T H//2 2"],
    inputs: Int[Tensor, "2 B"],
    used: int,
    ragged: bool,
    eps: float,
) -> Float[Tensor, "B V"]:
    """`Llama.forward` for one more token in every row: `inputs` are the tokens and their positions.

    `weights`: of `plain_weights`; `cache`: of B rows or more, written at the positions, its `lengths` not read;
    `table`: of `rope_table`. Attention reads `used` tokens; if the rows are `ragged`, each only its own. `eps`: of the
    norms.
    """
    (embedding, layers, norm, output), (tokens, positions) = weights, inputs
    rows, (_, kv_heads, _, width) = len(tokens), cache.keys[0].shape
    compiled = torch.compiler.is_compiling()
    times, attention = torch.mm, F.scaled_dot_product_attention
    if compiled and rows == 1:
        times, attention = row_product, row_attention
    rope, places, mask = table[positions][:, None], cache.places(positions[:, None]), None
    if not compiled:
        rope = torch.view_as_complex(rope)
    if ragged:
        reach = torch.arange(used, device=tokens.device)
        mask = torch.where(reach <= positions[:, None], 0.0, -torch.inf).to(embedding.dtype)[:, None, None]

    def rotated(x: Tensor) -> Tensor:
        if compiled:
            return apply_rope(x.view(rows, 1, -1, width), rope)
        pairs = torch.view_as_complex(x.float().view(rows, -1, width // 2, 2))
        return torch.view_as_real(pairs * rope).type_as(x)

    x = F.embedding(tokens, embedding)
    for (wq, wk, wv, wo, w1, w3, w2, attention_norm, ffn_norm), k, v in zip(
        layers, cache.keys, cache.values, strict=True
    ):
        h = rms_norm(x, attention_norm, eps)
        q = rotated(times(h, wq)).view(rows, kv_heads, -1, width)
        for kept, new in (k, rotated(times(h, wk))), (v, times(h, wv)):
            kept.view(-1, width).index_copy_(0, places, new.view(-1, width).to(kept.dtype))
        out = attention(q, k[:rows, :, :used], v[:rows, :, :used], attn_mask=mask)
        x = x + times(out.reshape(rows, -1), wo)
        h = rms_norm(x, ffn_norm, eps)
        x = x + times(F.silu(times(h, w1)) * times(h, w3), w2)
    return times(rms_norm(x, norm, eps), output).float()


COMPILED: dict[tuple, Callable] = {}  # by the shapes of model and cache, dtype and device


def compiled_logits(weights: tuple, cache: KVCache, *others) -> Callable[..., Tensor]:
    "`next_logits`, compiled for arguments of these shapes, unless it is already."
    embedding, layers, *_ = weights
    shapes = (tensor.shape for tensor in (embedding, *layers[0], cache.keys[0], others[0]))
    key = len(layers), *shapes, others[-1], embedding.dtype, embedding.device
    if key not in COMPILED:
        options = {"cpp_wrapper": True, "size_asserts": False, "alignment_asserts": False, "scalar_asserts": False}
        function = torch.compile(next_logits, fullgraph=True, dynamic=False, options=options)
        COMPILED[key] = function.aot_compile(((weights, cache, *others), {}))
        COMPILED[key].disable_guard_check()
    return COMPILED[key]


# ---------- chapters/01_architecture.py · Rows come and go

READ_TOGETHER = 2048  # tokens of prompts in one pass


class Slots:
    """The rows that grow together, in the first `count` places, with their keys and values in `cache`.

    On the device: `inputs` (3 B), the last token, the tokens in the cache, and the random numbers that were used;
    `uniform` (B draws), those numbers. On the host: `fixed` (4 B), the row's place in the result, the tokens of its
    prompt, the most it may have, and its length less `clock`, which counts the steps.
    """

    def __init__(self, model: Llama, size: int, limit: int, draws: int):
        device = model.tok_embeddings.weight.device
        self.cache, self.count, self.clock = KVCache(model, size, limit), 0, 0
        self.inputs = torch.zeros(3, size, dtype=torch.int64, device=device)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.uniform = torch.zeros(size, draws, dtype=wide, device=device)
        self.fixed = np.zeros((4, size), np.int64)

    def add(self, rows: list[int], uniform: np.ndarray, prompt: int, limit: int, read: KVCache, place: int):
        "Samples of one prompt, which is in row `place` of the cache `read`."
        new = slice(self.count, self.count + len(rows))
        self.inputs[1, new], self.inputs[2, new] = prompt, 0
        self.uniform[new] = torch.from_numpy(uniform).to(self.uniform)
        self.fixed[:, new] = rows, [prompt] * len(rows), [limit] * len(rows), [prompt - self.clock] * len(rows)
        self.cache.copy_rows(list(range(new.start, new.stop)), read, [place] * len(rows), prompt)
        self.count = new.stop
        self.look()

    def grow(self):
        "Count one more token in every row."
        self.inputs[1:, : self.count].add_(1)
        self.clock += 1

    def remove(self, ended: np.ndarray):
        "Drop rows (a mask); rows from the end move into their places."
        left = np.flatnonzero(~ended)
        self.count = len(left)
        holes, last = np.flatnonzero(ended[: self.count]).tolist(), left[left >= self.count].tolist()
        if holes:
            self.cache.copy_rows(holes, self.cache, last, self.longest + self.clock)
            for numbers in (self.inputs, self.fixed):
                numbers[:, holes] = numbers[:, last]
            self.uniform[holes] = self.uniform[last]
        self.look()

    def look(self):
        "What stays as it is until rows come or go: the longest row, whether rows differ, when the first is full."
        if self.count:
            _, _, limit, length = self.fixed[:, : self.count]
            self.longest, self.ragged = int(length.max()), bool(length.max() > length.min())
            self.full = int((limit - length).min()) - 1


def decode(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int | Sequence[int],
    eos_id: int | None,
    num_samples: int,
    batch: int,
    compile: bool,
    over: Callable[[int, int], bool] | None = None,
) -> Iterator[list[tuple[int, int, float]]]:
    """Yield (row, token, log-probability) of some rows at a time; longer prompts come first. Runs in inference mode.

    `over`: whether a row ends with this token, asked when the token has been yielded; None: at `eos_id`. Other
    arguments and errors as in `generate`.
    """
    prompts, context = check_prompts(model, prompts), model.config.max_seq_len
    check_settings(model.config.vocab_size, max_new_tokens, temperature, top_p, eos_id, num_samples, batch)
    streams = row_streams(seed, len(prompts), num_samples)
    if not prompts or max_new_tokens < 1:
        return
    device, batch = model.tok_embeddings.weight.device, min(batch, len(streams))
    limits = [min(len(prompt) + max_new_tokens, context) for prompt in prompts]
    draws, room = max(limit - len(prompt) for limit, prompt in zip(limits, prompts, strict=True)), max(limits)
    if compile:
        room = min(context, 2 ** (room - 1).bit_length())  # so that few shapes are compiled
    slots, weights = Slots(model, batch, room, draws), plain_weights(model, device.type == "cpu" and batch >= 16)
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    waiting, step = 0, None  # how many rows have come in
    read = {}  # the prompts of the last pass: their cache, their row there, their logits
    while slots.count or waiting < len(streams):
        first, free = slots.count, batch - slots.count
        if waiting < len(streams) and 8 * free >= batch:
            new = range(waiting, min(waiting + free, len(streams)))
            waiting = new.stop
            logits = []
            for turn, samples in groupby(new, lambda number: number // num_samples):
                i = order[turn]
                if i not in read:
                    few = max(1, READ_TOGETHER // len(prompts[i]))
                    together = order[turn : min(turn + few, new[-1] // num_samples + 1)]
                    source, found = prefill(model, [prompts[j] for j in together])
                    read = {j: (source, place, found[place]) for place, j in enumerate(together)}
                rows = [i * num_samples + number % num_samples for number in samples]
                uniform = np.stack([streams[row].random(draws) for row in rows])
                slots.add(rows, uniform, len(prompts[i]), limits[i], *read[i][:2])
                logits += [read[i][2]] * len(rows)
            logits = torch.stack(logits)
        else:
            shown, used, ragged = slots.count, slots.longest + slots.clock + 1, slots.ragged
            if compile:  # everything has its full size, and rows that are not there are computed for nothing
                shown, used, ragged = batch, room, True
            arguments = weights, slots.cache, model.rope, slots.inputs[:2, :shown], used, ragged, model.config.norm_eps
            step = step or (compiled_logits(*arguments) if compile else next_logits)
            first, logits = 0, step(*arguments)[: slots.count]
            slots.grow()
        fresh, uniform = slice(first, slots.count), None
        if temperature > 0:
            uniform = slots.uniform[fresh].gather(1, slots.inputs[2, fresh, None])[:, 0]
        drawn, logprobs = sample(logits, uniform, temperature, top_p)
        slots.inputs[0, fresh] = drawn
        tokens, logprobs, rows = drawn.tolist(), logprobs.tolist(), slots.fixed[0, fresh].tolist()
        if not all(map(math.isfinite, logprobs)):
            bad = next(i for i, logprob in enumerate(logprobs) if not math.isfinite(logprob))
            place = slots.inputs[2, first + bad].item()
            raise FloatingPointError(f"token {place} of row {rows[bad]}: the logits are not finite")
        yield list(zip(rows, tokens, logprobs, strict=True))
        ends = [token == eos_id for token in tokens] if over is None else [*map(over, rows, tokens)]
        if slots.clock >= slots.full or any(ends):
            _, _, limit, length = slots.fixed[:, : slots.count]
            ended = length + slots.clock + 1 >= limit
            ended[:first] = False
            ended[first:] |= ends
            slots.remove(ended)

@torch.inference_mode()
def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    eos_id: int | None = None,
    num_samples: int = 1,
    batch: int = 64,
    compile: bool = False,
) -> list[Completion]:
    """Continue every prompt (a list of token ids) `num_samples` times; a flat list, prompt by prompt.

    A completion ends with `eos_id`, after `max_new_tokens`, or when the context is full. `logprobs` are of the sampled
    distribution: after temperature, before top-p; at temperature 0, of the untempered one. A row's result depends only
    on its own prompt, its place in the list and the seed; with one seed for each prompt, not even on the place.
    `batch`: the most rows that are decoded together; others wait. On a CPU, 16 or more work on a copy of the weights.
    `compile`: torch.compile the step, for every new shape of model and cache, which takes some ten seconds; it pays off
    for a single row.
    Raises ValueError for an empty or too long prompt, an id outside the vocabulary, and settings out of range;
    TypeError for prompts that are not lists of ids; FloatingPointError when the logits are not finite.
    """
    results: defaultdict[int, Completion] = defaultdict(lambda: Completion([], [], False))
    for step in decode(
        model, prompts, max_new_tokens, temperature, top_p, seed, eos_id, num_samples, batch, compile
    ):
        for row, token, logprob in step:
            completion = results[row]
            completion.tokens.append(token)
            completion.logprobs.append(logprob)
            completion.finished = token == eos_id
    return [results[row] for row in range(len(prompts) * num_samples)]


def stream(
    model: Llama,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
    compile: bool = False,
) -> Iterator[int]:
    "Yield the tokens that continue one prompt as they are drawn: the same tokens, and errors, as `generate` gives."
    steps = torch.inference_mode()(decode)  # on while a token is made, off while the caller has it
    for step in steps(model, [prompt], max_new_tokens, temperature, top_p, seed, eos_id, 1, 1, compile):
        yield step[0][1]
