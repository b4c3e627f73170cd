"""Generated from chapters/14_human_evaluation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "pooled",
    "count_that_pools",
    "SAME",
    "POINTS",
    "verdicts",
    "outcomes",
    "Tally",
    "tally",
    "tally_votes",
    "simulated",
]


# ---------- chapters/14_human_evaluation.py · Do they fit together?

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.stats import bootstrap

from llama2lib.judge import RATINGS
from llama2lib.stats import Interval, paired_interval, win_rate_interval


def pooled(shares: Sequence[Sequence[float]], counts: Sequence[int]) -> Float[np.ndarray, "K"]:
    "Shares of K outcomes over all prompts, from the shares in groups of prompts and the size of each group."
    return np.average(np.asarray(shares, float), axis=0, weights=counts)


def count_that_pools(
    first: Sequence[float], second: Sequence[float], whole: Sequence[float], count: int, within: float
) -> tuple[int, int, int]:
    """How many prompts a second group has, if its shares and those of a first one, of `count`, pool to the `whole`.

    Returns the best count (least squares) and the range of counts that leave no share further off than `within`.
    ValueError where none does, or where the groups are too alike to tell.
    """
    first, second, whole = (np.asarray(part, float) for part in (first, second, whole))
    sizes = np.arange(1, 20 * count)
    off = (first * count + np.outer(sizes, second)) / (count + sizes)[:, None] - whole
    fits = sizes[abs(off).max(1) <= within]
    if not len(fits) or fits[-1] == sizes[-1]:
        what = "no count leaves" if not len(fits) else f"even {sizes[-1]:,} leaves"
        raise ValueError(f"{what} every share within {within} of {whole.tolist()}")
    return int(sizes[(off**2).sum(1).argmin()]), int(fits[0]), int(fits[-1])


# ---------- chapters/14_human_evaluation.py · Three raters, seven points

SAME, POINTS = 4, range(1, 8)  # 7: the first answer is much better; 1: the second is


def verdicts(ratings: Float[np.ndarray, "N R"]) -> Float[np.ndarray, "N R"]:
    "What each rating says: 1 a win of the first answer, 0 a tie, -1 a loss; NaN stays. ValueError for other ratings."
    ratings = np.asarray(ratings, float)
    if ratings.ndim != 2 or not (np.isin(ratings, POINTS) | np.isnan(ratings)).all():
        raise ValueError(f"ratings of shape {ratings.shape}: expected prompts by raters, whole numbers 1 to 7 or NaN")
    if len(silent := np.flatnonzero(np.isnan(ratings).all(1))):
        raise ValueError(f"prompt {silent[0]}: no rating; expected at least one")
    return np.sign(ratings - SAME)


def outcomes(ratings: Float[np.ndarray, "N R"]) -> Int[np.ndarray, "N"]:
    """Whether most raters prefer the first answer (1), the second (-1), or neither (0), for each prompt.

    ratings: whole numbers from 1 to 7, NaN where one is missing; 4 is 'the same'. ValueError for others, or for a
    prompt without any.
    """
    said = verdicts(ratings)
    voters = (~np.isnan(said)).sum(1)
    return (2 * (said == 1).sum(1) > voters).astype(int) - (2 * (said == -1).sum(1) > voters)


class Tally(NamedTuple):
    "Shares of prompts that are won, tied and lost, and wins minus losses, each with its 95 % interval."

    win: Interval
    tie: Interval
    loss: Interval
    net: Interval
    prompts: int

    def __str__(self) -> str:
        parts = (f"{name} {100 * part.value:.1f}" for name, part in zip(self._fields, self[:3], strict=False))
        ends = f"{100 * self.net.value:+.1f} [{100 * self.net.low:+.1f}, {100 * self.net.high:+.1f}]"
        return f"{', '.join(parts)}, wins − losses {ends} % of {self.prompts:,}"


def tally(results: Int[np.ndarray, "N"]) -> Tally:
    "Count `outcomes`; Wilson's intervals for the shares. ValueError for other numbers, or fewer than two."
    results = np.asarray(results)
    if results.ndim != 1 or len(results) < 2 or not np.isin(results, (-1, 0, 1)).all():
        raise ValueError(f"outcomes of shape {results.shape}: expected two or more of -1, 0, 1")
    counts = [int((results == side).sum()) for side in (1, 0, -1)]
    shares = (win_rate_interval(count, len(results) - count) for count in counts)
    net, low, high = paired_interval(results, np.zeros(len(results)))
    return Tally(*shares, Interval(net, max(low, -1.0), min(high, 1.0)), len(results))


def tally_votes(ratings: Float[np.ndarray, "N R"], seed: int = 0) -> Tally:
    """Shares of the raters' votes, a prompt's raters weighing one together; intervals by the bootstrap over prompts.

    The votes on a prompt are not independent, so that prompts are drawn and not votes. Arguments as of `outcomes`.
    """
    said = verdicts(ratings)
    voters = (~np.isnan(said)).sum(1)
    shares = [(said == side).sum(1) / voters for side in (1, 0, -1)]
    table = np.stack([*shares, shares[0] - shares[2]], 1)
    drawn = bootstrap((table,), np.mean, axis=0, n_resamples=2000, batch=100, method="percentile", rng=seed)
    parts = zip(table.mean(0), *drawn.confidence_interval, strict=True)
    return Tally(*(Interval(*map(float, part)) for part in parts), len(table))

def simulated(gaps: Float[np.ndarray, "N"], noise: float, raters: int = 3, seed: int = 0) -> Int[np.ndarray, "N R"]:
    "Ratings 1 … 7 of raters who see gaps between gold scores, first minus second, with normal noise of this deviation."
    random, column = np.random.default_rng([91, seed]), np.asarray(gaps, float)[:, None]
    seen = np.round(column + random.normal(0, noise, (len(column), raters)), 9)  # 0.85 - 0.75 is a 0.1
    cuts = sorted(cut for cut in RATINGS.values() if cut)
    return (SAME + np.sign(seen) * np.searchsorted(cuts, abs(seen), side="right")).astype(int)
