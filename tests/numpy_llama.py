"""Llama 2 in NumPy, written from the released description and sharing no code with llama2lib: complex-number RoPE on
neighbouring pairs, explicit masks, one token sequence at a time. Slow, and meant to be read."""

import numpy as np


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def rotate(x: np.ndarray, theta: float) -> np.ndarray:
    "x (T, heads, width): neighbours are the real and imaginary part of one number, turned by position times frequency."
    length, _, width = x.shape
    frequencies = theta ** (-np.arange(0, width, 2) / width)
    turns = np.exp(1j * np.outer(np.arange(length), frequencies))[:, None, :]
    numbers = (x[..., 0::2] + 1j * x[..., 1::2]) * turns
    out = np.empty_like(x)
    out[..., 0::2], out[..., 1::2] = numbers.real, numbers.imag
    return out


def attention(x: np.ndarray, w: dict, prefix: str, heads: int, kv_heads: int, theta: float) -> np.ndarray:
    length, dim = x.shape
    width = dim // heads
    q = rotate((x @ w[prefix + "wq.weight"].T).reshape(length, heads, width), theta)
    k = rotate((x @ w[prefix + "wk.weight"].T).reshape(length, kv_heads, width), theta)
    v = (x @ w[prefix + "wv.weight"].T).reshape(length, kv_heads, width)
    out = np.empty((length, heads, width))
    for head in range(heads):
        shared = head // (heads // kv_heads)
        scores = q[:, head] @ k[:, shared].T / np.sqrt(width)
        scores[np.triu_indices(length, 1)] = -np.inf
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out[:, head] = weights / weights.sum(axis=-1, keepdims=True) @ v[:, shared]
    return out.reshape(length, dim) @ w[prefix + "wo.weight"].T


def logits(w: dict, params: dict, tokens: list[int]) -> np.ndarray:
    "Logits (T, V). `w`: merged weights (float64) under Meta's names; `params`: Meta's params.json."
    heads, eps, theta = params["n_heads"], params["norm_eps"], params.get("rope_theta", 10_000.0)
    kv_heads = params.get("n_kv_heads", heads)
    x = w["tok_embeddings.weight"][tokens]
    for i in range(params["n_layers"]):
        layer = f"layers.{i}."
        normed = rms_norm(x, w[layer + "attention_norm.weight"], eps)
        x = x + attention(normed, w, layer + "attention.", heads, kv_heads, theta)
        normed = rms_norm(x, w[layer + "ffn_norm.weight"], eps)
        gate = normed @ w[layer + "feed_forward.w1.weight"].T
        up = normed @ w[layer + "feed_forward.w3.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "feed_forward.w2.weight"].T
    return rms_norm(x, w["norm.weight"], eps) @ w["output.weight"].T


def greedy(w: dict, params: dict, prompt: list[int], new_tokens: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(new_tokens):
        tokens.append(int(logits(w, params, tokens)[-1].argmax()))
    return tokens[len(prompt) :]
