"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "NEW_TOKENS",
    "queries_per_second",
    "attention_kinds",
    "with_copies",
    "memory",
    "last_batch",
    "TRAFFIC",
    "pass_seconds",
    "token_seconds",
    "batches_within",
    "measure",
]


# ---------- chapters/01_architecture.py · Serving: throughput against latency (Figure 24)

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm import tqdm

from llama2lib.generation import generate
from llama2lib.model import Llama, ModelConfig, compensated
from llama2lib.roofline import A100, Hardware, collective_seconds, compute_seconds

NEW_TOKENS = 128  # of every answer in Figure 24


def queries_per_second(batch: int, seconds_per_token: float, new_tokens: int = NEW_TOKENS) -> float:
    "Throughput of a batch of answers of `new_tokens` each; the latency is an answer's whole time over its tokens."
    return batch / (new_tokens * seconds_per_token)


# ---------- chapters/01_architecture.py · Three kinds of attention, one size

def attention_kinds(config: ModelConfig, kv_heads: int = 8) -> dict[str, ModelConfig]:
    """MHA, GQA with `kv_heads` and MQA of the same size (A.2.1): what the projections save widens the SwiGLU.

    Equal to the parameters of `config` up to the rounding of the width. ValueError when the heads cannot be shared so.
    """
    return {kind: compensated(config, k) for kind, k in (("MHA", config.n_heads), ("GQA", kv_heads), ("MQA", 1))}


def with_copies(config: ModelConfig, gpus: int) -> ModelConfig:
    """The shape of which each GPU holds an equal part: with fewer key/value heads than GPUs, each keeps a copy (A.2.1).

    ValueError when heads and GPUs cannot be divided among each other.
    """
    k = config.n_kv_heads
    if gpus < 1 or config.n_heads % gpus or max(k, gpus) % min(k, gpus):
        raise ValueError(f"{config.n_heads} heads and {k} key/value heads cannot be shared out over {gpus} GPUs")
    return replace(config, n_kv_heads=max(k, gpus))


# ---------- chapters/01_architecture.py · What fills the memory

def memory(
    config: ModelConfig,
    batch: int,
    context: int,
    new_tokens: int = NEW_TOKENS,
    gpus: int = 1,
    number: int = 2,
    logit_bytes: int = 6,
    fused: bool = False,
) -> dict[str, float]:
    """Bytes on each GPU: 'weights', 'cache', and 'activations', the most that a prefill of the released code holds.

    Prompts of `context` tokens and their answers; a number of weights and cache has `number` bytes. `fused`: attention
    that never writes its scores down. Norm weights count as shared out, though each GPU has them all.
    ValueError: no batch or context, or heads that the GPUs cannot share.
    """
    if batch < 1 or context < 1 or new_tokens < 0:
        raise ValueError(f"batch {batch}, context {context}, {new_tokens} new tokens: expected 1 or more, 1, and 0")
    part, tokens = with_copies(config, gpus), batch * context
    norm, softmax = 12 * config.dim, 4 * config.dim + 10 * config.n_heads / gpus * context * (not fused)
    logits = 2 * config.dim + logit_bytes * config.vocab_size
    return {
        "weights": number * part.num_params / gpus,
        "cache": batch * (context + new_tokens) * part.kv_bytes_per_token(number) / gpus,
        "activations": tokens * max(norm, softmax, logits),
    }


def last_batch(bytes_of: Callable[[int], float], limit: float) -> int:
    "The last of the batches 1, 2, 4 … that needs no more than `limit`; `bytes_of` grows with the batch. 0: none."
    batch = 1
    while bytes_of(batch) <= limit:
        batch *= 2
    return batch // 2


# ---------- chapters/01_architecture.py · What takes the time

TRAFFIC = {"norm": 36, "residual": 6, "rotation": 20, "swiglu": 10, "scores": 32}  # bytes per number, unfused kernels


def pass_seconds(
    config: ModelConfig,
    batch: int,
    tokens: int,
    context: int,
    gpus: int = 1,
    hardware: Hardware = A100,
    fused: bool = False,
) -> dict[str, float]:
    """Seconds of a forward pass in 16 bits, by part: `tokens` new tokens in every row, attending to `context` tokens.

    Kernels run one after the other. `fused`: attention that never writes its scores down (FlashAttention) and skips
    what the causal mask hides. ValueError: no rows, more tokens than context, or heads that the GPUs cannot share.
    """
    if batch < 1 or not 1 <= tokens <= context:
        raise ValueError(f"batch {batch}, {tokens} tokens, context {context}: expected 1 or more, and 1 to the context")
    part, rows, layers = with_copies(config, gpus), batch * tokens, config.n_layers

    def seconds(**work: float) -> float:
        return compute_seconds(hardware, {kind: amount / gpus for kind, amount in work.items()}, fused=False)

    read = 2 * (part.num_params - part.vocab_size * part.dim)  # all weights but the embedding
    attention = 4 * layers * config.dim * context * rows  # scores and values, all of them
    causal = attention * (2 - (tokens - 1) / context)  # without what the mask hides; compute_seconds takes half of it
    cache = batch * context * part.kv_bytes_per_token()
    scores = TRAFFIC["scores"] * layers * config.n_heads * rows * context
    shared = TRAFFIC["rotation"] * (config.dim + part.n_kv_heads * part.head_dim) + TRAFFIC["swiglu"] * part.hidden_dim
    whole = 2 * (TRAFFIC["norm"] + TRAFFIC["residual"]) * config.dim  # not divided among the GPUs
    reduces, ring = 2 * layers, (gpus, min(gpus, hardware.gpus_per_node))
    return {
        "products": max(seconds(matmul=rows * part.forward_flops_per_token(0)), seconds(copies=read)),
        "attention": seconds(attention=causal, copies=cache)
        if fused
        else seconds(matmul=attention, copies=cache + scores),
        "other kernels": seconds(copies=rows * layers * (shared + gpus * whole)),
        "all-reduces": collective_seconds(hardware, "all_reduce", 2 * config.dim * rows * reduces, reduces, *ring),
    }


def token_seconds(
    config: ModelConfig,
    batch: int,
    context: int,
    new_tokens: int = NEW_TOKENS,
    gpus: int = 1,
    hardware: Hardware = A100,
    fused: bool = False,
) -> dict[str, float]:
    """Latency of Figure 24 by part, 'prefill …' and 'decode …': an answer's seconds over its `new_tokens` tokens.

    The prefill gives the first token, and every later one takes a pass over a token and the cache, on average half
    full of the answer.
    """
    prefill = pass_seconds(config, batch, context, context, gpus, hardware, fused)
    decode = pass_seconds(config, batch, 1, context + new_tokens / 2, gpus, hardware, fused)
    return {f"prefill {name}": seconds / new_tokens for name, seconds in prefill.items()} | {
        f"decode {name}": seconds * (new_tokens - 1) / new_tokens for name, seconds in decode.items()
    }


# ---------- chapters/01_architecture.py · The same curves on this machine

def batches_within(
    budget: float, config: ModelConfig, context: int, new_tokens: int = NEW_TOKENS, number: int = 4
) -> list[int]:
    "The batches 1, 2, 4 … whose weights and cache need no more than `budget` bytes. ValueError when there is none."

    def needed(batch: int) -> float:
        parts = memory(config, batch, context, new_tokens, number=number)
        return parts["weights"] + parts["cache"]

    last = last_batch(needed, budget)
    if not last:
        raise ValueError(f"a budget of {budget:,} bytes: expected {needed(1):,.0f} or more, what one sequence needs")
    return [2**i for i in range(last.bit_length())]


def measure(config: dict) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Seconds that `generate` takes to answer a batch, {context: {kind: {batch: [of every repeat]}}}, keys as text.

    config: 'model' (ModelConfig), 'kv_heads' of its GQA, 'contexts' and 'new_tokens' of the requests, 'budget' (bytes
    for weights and cache), 'repeats', 'device', 'dtype' (its name). Weights and prompts are random, decoding is greedy.
    The kinds take turns at every batch, each repeat beginning with another one. ValueError: no repeats, a budget that
    is too small, or requests that are longer than the model's context.
    """
    shapes, contexts = attention_kinds(config["model"], config["kv_heads"]), config["contexts"]
    dtype, new_tokens = getattr(torch, config["dtype"]), config["new_tokens"]
    if config["repeats"] < 1 or max(contexts) + new_tokens > config["model"].max_seq_len:
        raise ValueError(
            f"{config['repeats']} repeats of contexts {contexts} and {new_tokens} new tokens: expected 1 or more, and "
            f"no more tokens than the {config['model'].max_seq_len} of the model"
        )
    batches = {
        (context, kind): batches_within(config["budget"], shape, context, new_tokens, dtype.itemsize)
        for context in contexts
        for kind, shape in shapes.items()
    }
    generator = torch.Generator().manual_seed(0)
    with torch.device(config["device"]):
        models = {kind: Llama(shape).to(dtype) for kind, shape in shapes.items()}

    def answer(kind: str, batch: int, context: int) -> float:
        prompts = torch.randint(shapes[kind].vocab_size, (batch, context), generator=generator).tolist()
        start = time.perf_counter()
        generate(models[kind], prompts, new_tokens, temperature=0, batch=batch)
        return time.perf_counter() - start

    for kind in shapes:
        answer(kind, 1, contexts[0])  # so that nobody pays for what happens once
    largest = max(map(max, batches.values()))
    kinds, runs = list(shapes), []
    for first in range(config["repeats"]):
        turn = kinds[first % 3 :] + kinds[: first % 3]
        runs += [
            (context, batch, kind)
            for context in contexts
            for batch in (2**i for i in range(largest.bit_length()))
            for kind in turn
            if batch in batches[context, kind]
        ]
    found = {str(c): {kind: {str(b): [] for b in batches[c, kind]} for kind in kinds} for c in contexts}
    for context, batch, kind in tqdm(runs, desc="serving", disable=None):
        found[str(context)][kind][str(batch)].append(answer(kind, batch, context))
    return found
