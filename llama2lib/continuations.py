"""Generated from chapters/09_evaluation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Likelihood",
    "loglikelihoods",
    "cut",
    "tokens_until",
    "written_until",
    "over_ranks",
]


# ---------- chapters/09_evaluation.py · How likely is an answer?

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from llama2lib.generation import decode
from llama2lib.model import KVCache, Llama
from llama2lib.tokenizer import Tokenizer


class Likelihood(NamedTuple):
    "Log-probability of a continuation (natural logarithm), and whether each of its tokens is the likeliest one."

    logprob: float
    greedy: bool


class _Row(NamedTuple):
    "Tokens to read, what is asked of them as (place, token, number of the pair), and what already stands in front."

    tokens: Sequence[int]
    asked: list[tuple[int, int, int]]
    then: Sequence[tuple[int, Sequence[int]]] = ()  # of a shared context: pairs, and their continuations
    context: int = 0  # of a continuation: the row of its context
    behind: int = 0  # and how many tokens that has


def _bar(total: int, title: str, unit: str) -> tqdm:
    "A progress bar, on the first process."
    others = {"disable": True} if dist.is_initialized() and dist.get_rank() else {}
    return tqdm(total=total, desc=title, unit=unit, leave=False, **others)


def _batches(rows: list[_Row], room: int, limit: int) -> Iterator[list[_Row]]:
    "Rows of like length together, of at most `room` tokens with their padding, which may not reach over the `limit`."
    batch, width, behind = [], 0, 0
    for row in sorted(rows, key=lambda row: (len(row.tokens), row.behind), reverse=True):
        width, behind = width or len(row.tokens), max(behind, row.behind)
        if batch and ((len(batch) + 1) * (width + behind) > room or width + behind > limit):
            yield batch
            batch, width, behind = [], len(row.tokens), row.behind
        batch.append(row)
    if batch:
        yield batch


def _padded(batch: list[_Row], device) -> Int[Tensor, "B T"]:
    tokens = np.zeros((len(batch), len(batch[0].tokens)), np.int64)  # the longest comes first
    for line, row in zip(tokens, batch, strict=True):
        line[: len(row.tokens)] = row.tokens
    return torch.from_numpy(tokens).to(device)


def _look_up(model: Llama, states: Float[Tensor, "B T D"], batch: list[_Row], sums: Tensor, greedy: Tensor):
    "Add the log-probabilities that are asked for to the sums of their pairs; logits of 1,024 places at a time."
    places: dict[tuple[int, int], int] = {}
    asked = [
        (places.setdefault((number, place), len(places)), token, pair)
        for number, row in enumerate(batch) for place, token, pair in row.asked
    ]  # fmt: skip
    states = states[tuple(torch.tensor(list(places), device=states.device).T)]
    place, token, pair = torch.tensor(asked).T
    for first, part in zip(range(0, len(states), 1024), states.split(1024), strict=True):
        here = (place >= first) & (place < first + 1024)
        at, wanted = ((place[here] - first).to(part.device), token[here].to(part.device))
        logits = model.output(part).float()
        found = logits[at, wanted] - logits.logsumexp(-1)[at]
        sums.index_add_(0, pair[here], found.double().cpu())
        greedy[pair[here][(logits.argmax(-1)[at] != wanted).cpu()]] = False


@torch.inference_mode()
def loglikelihoods(
    model: Llama, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = 8192
) -> list[Likelihood]:
    """Log-probability of continuations given contexts, (context, continuation) in token ids, in order.

    A context that several pairs share is read once. One that does not fit with its continuation loses its beginning.
    `batch_tokens`: the most that are read together, with padding.
    ValueError for a context or continuation without tokens, a continuation longer than the model's context, or a token
    outside the vocabulary; FloatingPointError when the logits are not finite.
    """
    config, device, alike = model.config, model.tok_embeddings.weight.device, defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= config.max_seq_len:
            found = f"{len(context)} and {len(continuation)} tokens"
            raise ValueError(f"pair {number}: {found}; expected both, and at most {config.max_seq_len} to score")
        if not 0 <= min(*context, *continuation) <= max(*context, *continuation) < config.vocab_size:
            raise ValueError(f"pair {number}: expected ids from 0 to {config.vocab_size - 1}")
        alike[tuple(context[-(config.max_seq_len + 1 - len(continuation)) :])].append(number)
    rows = []
    for context, numbers in alike.items():
        scored = [(number, list(pairs[number][1])) for number in numbers]
        alone = min(len(tokens) for _, tokens in scored)
        begun = next((n for n in range(alone - 1) if len({tokens[n] for _, tokens in scored}) > 1), alone - 1)
        asked = [
            (len(context) - 1 + place, token, number)
            for number, tokens in scored for place, token in enumerate(tokens[: begun + 1])
        ]  # fmt: skip
        then = [(number, tokens[begun:]) for number, tokens in scored if len(tokens) > begun + 1]
        rows.append(_Row([*context, *scored[0][1][:begun]], asked, then))
    sums, greedy = torch.zeros(len(pairs), dtype=torch.float64), torch.ones(len(pairs), dtype=torch.bool)
    bar = _bar(len(pairs), "likelihoods", "pair")
    for batch in _batches(rows, batch_tokens, config.max_seq_len):
        tokens = _padded(batch, device)
        read = KVCache(model, *tokens.shape) if any(row.then for row in batch) else None
        _look_up(model, model.hidden(tokens, read), batch, sums, greedy)
        second = [
            _Row(tokens[:-1], [(n, token, pair) for n, token in enumerate(tokens[1:])], (), number, len(row.tokens))
            for number, row in enumerate(batch) for pair, tokens in row.then
        ]  # fmt: skip
        for part in _batches(second, batch_tokens, config.max_seq_len):
            tokens, longest = _padded(part, device), max(row.behind for row in part)
            cache = KVCache(model, len(part), longest + tokens.shape[1])
            cache.copy_rows(list(range(len(part))), read, [row.context for row in part], longest)
            cache.set_lengths(torch.tensor([row.behind for row in part], device=device))
            _look_up(model, model.hidden(tokens, cache), part, sums, greedy)
        bar.update(len({pair for row in batch for _, _, pair in row.asked}))
    bar.close()
    if not sums.isfinite().all():
        raise FloatingPointError(f"pair {int((~sums.isfinite()).nonzero()[0])}: the logits are not finite")
    return [Likelihood(*both) for both in zip(sums.tolist(), greedy.tolist(), strict=True)]


# ---------- chapters/09_evaluation.py · Writing up to a stop

def cut(text: str, until: Sequence[str]) -> str:
    "A text up to the first place of each stop in turn."
    for stop in until:
        text = text.split(stop, 1)[0]
    return text


@torch.inference_mode()
def tokens_until(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    until: Sequence[str] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    batch: int = 64,
) -> list[list[int]]:
    """Tokens that continue prompts, up to EOS, `max_new_tokens`, a full context, or the token that completes a stop.

    seeds: one for each prompt, on which its row depends and on nothing else; none: 0 for all. `batch`: the most rows
    that are decoded together; longer prompts come first. ValueError for an empty stop; others as in `generate`.
    """
    if not all(until):
        raise ValueError("a stop is empty; expected text")
    made, eos_id = [[] for _ in prompts], tokenizer.eos_id
    reach = max((len(stop.encode()) for stop in until), default=0) + 4  # a token is a byte or more
    bar = _bar(len(prompts), "writing", "text")

    def over(row: int, token: int) -> bool:
        full = len(made[row]) == min(max_new_tokens, model.config.max_seq_len - len(prompts[row]))
        stopped = bool(until) and any(map(tokenizer.decode(made[row][-reach:]).__contains__, until))
        ended = token == eos_id or full or stopped
        bar.update(ended)
        return ended

    seeds = [0] * len(prompts) if seeds is None else seeds
    for step in decode(model, prompts, max_new_tokens, temperature, top_p, seeds, eos_id, 1, batch, False, over):
        for row, token, _ in step:
            made[row].append(token)
    bar.close()
    return made


def written_until(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], until: Sequence[str] = (), **settings
) -> list[str]:
    "What a model writes behind prompts up to the first stop, which is left out; settings and errors: `tokens_until`."
    made = tokens_until(model, tokenizer, prompts, until, **settings)
    return [cut(tokenizer.continuation(*both), until) for both in zip(prompts, made, strict=True)]


def over_ranks(items: Sequence, work: Callable[[Sequence], list]) -> list:
    """`work(items)`, a result for each, divided among the processes of torchrun; every one of them gets all results.

    Neighbours stay together, so that contexts are still shared.
    """
    if not dist.is_initialized():
        return work(items)
    ranks, parts = dist.get_world_size(), [None] * dist.get_world_size()
    ends = [len(items) * rank // ranks for rank in range(ranks + 1)]
    dist.all_gather_object(parts, work(items[ends[dist.get_rank()] : ends[dist.get_rank() + 1]]))
    return [result for part in parts for result in part]
