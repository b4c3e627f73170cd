"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "sample",
    "Completion",
    "check_prompts",
    "row_streams",
    "decode",
    "generate",
    "stream",
]


# ---------- chapters/01_architecture.py · Generation

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

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
    prompts, context = check_prompts(model, prompts), model.config.max_seq_len
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("num_samples", num_samples, 1)):
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} {value!r}: expected a whole number of at least {least}")
    if eos_id is not None and not (isinstance(eos_id, Integral) and 0 <= eos_id < model.config.vocab_size):
        raise ValueError(f"eos_id {eos_id!r}: expected None, or an id from 0 to {model.config.vocab_size - 1}")
    real = isinstance(temperature, Real) and isinstance(top_p, Real)
    if not real or not (temperature == 0 or temperature >= 1e-4) or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature!r}, top_p {top_p!r}: expected 0 or at least 1e-4, and 0 < top_p <= 1"
        )
    streams = row_streams(seed, len(prompts), num_samples)
    if not prompts or max_new_tokens < 1:
        return
    device = model.tok_embeddings.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest, steps = int(lengths.max()), min(max_new_tokens, context - int(lengths.min()))
    uniform = torch.from_numpy(np.stack([stream.random(steps) for stream in streams]))
    uniform = uniform.to(device, torch.float32 if device.type == "mps" else torch.float64)

    padded = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        padded[row, : len(prompt)] = torch.as_tensor(prompt, device=device)
    cache = KVCache(model, len(prompts), min(longest + steps, context))
    states = model.hidden(padded, cache)
    cache.set_lengths(lengths)
    logits = model.output(states[torch.arange(len(prompts), device=device), lengths - 1]).float()
    cache.repeat(num_samples)
    logits = logits.repeat_interleave(num_samples, 0)

    rows = torch.arange(len(streams), device=device)  # which row of the result each row of the batch is
    is_open = torch.ones_like(rows, dtype=torch.bool)
    for step in range(steps):
        tokens, logprobs = sample(logits, uniform[rows, step], temperature, top_p)
        if not logprobs.isfinite().all():
            raise FloatingPointError(
                f"token {step} of row {int(rows[~logprobs.isfinite()][0])}: the logits are not finite"
            )
        yield list(zip(*(t[is_open].tolist() for t in (rows, tokens, logprobs)), strict=True))
        full = cache.lengths + 1 >= context
        is_open &= ~full if eos_id is None else ~full & (tokens != eos_id)
        count = int(is_open.sum())
        if count == 0 or step + 1 == steps:
            return
        if 2 * count <= len(rows) or full.any():
            cache.select(is_open)
            rows, tokens, is_open = rows[is_open], tokens[is_open], is_open[is_open]
        logits = model.output(model.hidden(tokens[:, None], cache)[:, -1]).float()

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
    Raises ValueError for an empty or too long prompt, an id outside the vocabulary, and settings out of range;
    TypeError for prompts that are not lists of ids; FloatingPointError when the logits are not finite.
    """
    results: dict[int, Completion] = {}
    for step in decode(model, prompts, max_new_tokens, temperature, top_p, seed, eos_id, num_samples):
        for row, token, logprob in step:
            completion = results.setdefault(row, Completion([], [], False))
            completion.tokens.append(token)
            completion.logprobs.append(logprob)
            completion.finished = token == eos_id
    return [results.get(row, Completion([], [], False)) for row in range(len(prompts) * num_samples)]


def stream(
    model: Llama,
    prompt: Sequence[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> Iterator[int]:
    "Yield the tokens that continue one prompt as they are drawn: the same tokens, and errors, as `generate` gives."
    for step in decode(model, [prompt], max_new_tokens, temperature, top_p, seed, eos_id, num_samples=1):
        yield step[0][1]
