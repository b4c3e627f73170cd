"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "family_member",
    "FAMILY",
    "non_embedding",
    "family_recipe",
    "MixedText",
    "mixed_text",
    "probe_rows",
    "by_seed",
    "late_slopes",
    "ScalingLaw",
    "HOFFMANN",
    "STARTS",
    "fit_scaling_law",
    "bootstrap_laws",
]


# ---------- chapters/02_pretraining.py · Figure 5: larger models, same tokens

from llama2lib.model import ModelConfig, swiglu_width
from llama2lib.pretrain import PretrainConfig


def family_member(dim: int, n_layers: int) -> ModelConfig:
    "A small Llama: heads 16 wide, SwiGLU by the released rule, 1,024 pieces, rows of 128 tokens."
    heads, width = dim // 16, swiglu_width(dim, multiple_of=16)
    return ModelConfig(dim, n_layers, heads, heads, hidden_dim=width, vocab_size=1024, max_seq_len=128)


FAMILY = {
    "7k": family_member(16, n_layers=2),
    "27k": family_member(32, n_layers=2),
    "101k": family_member(64, n_layers=2),
    "804k": family_member(128, n_layers=4),
}


def non_embedding(config: ModelConfig) -> int:
    "Parameters without the embedding and the output matrix."
    return config.num_params - 2 * config.vocab_size * config.dim


def family_recipe(config: ModelConfig, steps: int, batch_tokens: int = 1024, warmup_steps: int = 96) -> PretrainConfig:
    "Section 2.2's recipe, small: the learning rate is 0.003 at a width of 128 and goes with 1 / width."
    lr = 3e-3 * 128 / config.dim
    return PretrainConfig(
        lr=lr, warmup_steps=warmup_steps, batch_tokens=batch_tokens, tokens=steps * batch_tokens, max_seq_len=128
    )


# ---------- chapters/02_pretraining.py · One stream for all sizes

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from llama2lib.corpus import mix, packaged_sources, shares, token_stream
from llama2lib.recipes import cache_folder
from llama2lib.tokenizer import Tokenizer, train_tokenizer


class MixedText(NamedTuple):
    "What the small experiments of chapters 01 and 02 read: the packaged domains, split, and a tokenizer for them."

    tokenizer: Tokenizer
    training: dict[str, list[str]]  # documents of each domain
    held_out: dict[str, list[str]]
    shares: dict[str, float]  # of the domains in the mix

    def stream(self, seed: int, tokens: int) -> np.ndarray:
        "Ids of training documents in the seed's order, each domain at its share; goes round where one ends. [tokens]"
        documents = (document for _, document in mix(self.training, self.shares, seed))
        return token_stream(self.tokenizer, documents, tokens)


def mixed_text() -> MixedText:
    "The packaged domains and, trained on 1,500 documents of their mix, a tokenizer of 1,024 pieces in the cache."
    sources, training, held_out = packaged_sources(), {}, {}
    for name, source in sources.items():
        training[name], held_out[name] = source.split()
    documents = (document for _, document in mix(training, shares(sources), seed=0))
    file = cache_folder() / "scaling" / "tokenizer.model"
    tokenizer = train_tokenizer(islice(documents, 1500), 1024, file)
    return MixedText(tokenizer, training, held_out, shares(sources))


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


def by_seed(seeds: Iterable[int], scores: np.ndarray) -> dict[int, float]:
    "The mean of the scores of each seed, as the ledger wants it. [seeds, …]"
    return dict(zip(seeds, scores.reshape(len(scores), -1).mean(1).tolist(), strict=True))


# ---------- chapters/02_pretraining.py · A sign of saturation?

def late_slopes(tokens: np.ndarray, losses: np.ndarray, last: float = 0.2) -> np.ndarray:
    """Least-squares slope of each row's loss over the `last` share of the tokens, in nats per million tokens.

    tokens [checkpoints], losses [checkpoints, rows] → [rows]. ValueError when fewer than two checkpoints are that late.
    """
    late = tokens >= (1 - last) * tokens[-1]
    if late.sum() < 2:
        raise ValueError(f"{late.sum()} of {len(tokens)} checkpoints lie in the last {last:.0%}: expected two or more")
    x = tokens[late] / 1e6 - tokens[late].mean() / 1e6
    return x @ losses[late] / (x @ x)


# ---------- chapters/02_pretraining.py · A law?

from itertools import product

from scipy.optimize import least_squares
from scipy.special import logsumexp, softmax


class ScalingLaw(NamedTuple):
    "L(N, D) = E + A / N^alpha + B / D^beta, in nats per token (Hoffmann et al. 2022, equation 2)."

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters, tokens) -> np.ndarray:
        "The loss it predicts; numbers or arrays that broadcast."
        return self.E + self.A / np.asarray(parameters) ** self.alpha + self.B / np.asarray(tokens) ** self.beta


HOFFMANN = ScalingLaw(E=1.69, A=406.4, alpha=0.34, B=410.7, beta=0.28)  # their fit (arXiv 2203.15556, approach 3)
STARTS = tuple(product((0.1, 0.5, 0.9), (0.1, 0.5), (0.1, 0.5)))  # E's share of the lowest loss, alpha, beta


def fit_scaling_law(parameters, tokens, loss, starts: Sequence[tuple[float, float, float]] = STARTS) -> ScalingLaw:
    """The law nearest to some losses: Huber loss (delta 0.001) on log-loss, the best of all starts.

    parameters, tokens, loss [points], loss in nats. Exponents stay in 0.01…3. ValueError for fewer than five points.
    """
    n, d, target = np.log(parameters), np.log(tokens), np.log(loss)
    if not n.shape == d.shape == target.shape or n.size < 5:
        raise ValueError(f"points of shapes {n.shape}, {d.shape}, {target.shape}: expected five or more of each")
    n_mid, d_mid, lowest = n.mean(), d.mean(), target.min()

    def terms(x):
        e, a, alpha, b, beta = x
        return np.stack([np.full_like(n, e), a - alpha * (n - n_mid), b - beta * (d - d_mid)])

    def misfit(x):
        return logsumexp(terms(x), axis=0) - target

    def slopes_of_misfit(x):
        of_e, of_a, of_b = softmax(terms(x), axis=0)
        return np.stack([of_e, of_a, -of_a * (n - n_mid), of_b, -of_b * (d - d_mid)], axis=1)

    best = None
    for share, alpha, beta in starts:
        rest = lowest + np.log((1 - share) / 2)
        start = [lowest + np.log(share), rest, alpha, rest, beta]
        bounds = [-10, -10, 0.01, -10, 0.01], [lowest, 5, 3, 5, 3]
        found = least_squares(misfit, start, slopes_of_misfit, bounds, loss="huber", f_scale=1e-3, max_nfev=200)
        best = found if best is None or found.cost < best.cost else best
    e, a, alpha, b, beta = best.x
    return ScalingLaw(*map(float, (np.exp(e), np.exp(a + alpha * n_mid), alpha, np.exp(b + beta * d_mid), beta)))


def bootstrap_laws(parameters, tokens, losses: np.ndarray, resamples: int, seed: int = 0) -> list[ScalingLaw]:
    "Laws of resampled data: seeds drawn with replacement and averaged, then points likewise. losses [seeds, points]"
    random, laws = np.random.default_rng(seed), []
    seeds, points = losses.shape
    while len(laws) < resamples:
        mean = losses[random.integers(seeds, size=seeds)].mean(0)
        drawn = random.integers(points, size=points)
        laws.append(fit_scaling_law(parameters[drawn], tokens[drawn], mean[drawn], STARTS[::4]))
    return laws
