"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Interval",
    "win_rate_interval",
    "paired_interval",
    "unpaired_interval",
    "WEIGHTS",
    "gwet_ac2",
    "gwet_ac1",
]


# ---------- chapters/10_toolbox.py · How often does one model win?

from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    "An estimate and the ends of its confidence interval, in the estimate's unit."

    value: float
    low: float
    high: float


def win_rate_interval(wins: float, losses: float, ties: float = 0, confidence: float = 0.95) -> Interval:
    """Win rate (wins + ties / 2) / (wins + losses + ties) with Wilson's score interval; all in 0..1.

    Counts may be fractional: a printed share of so many prompts, or a half for each side. Leave `ties` out for the
    paper's win / (win + loss), Figures 2 and 11. ValueError: a negative count, or all are 0.
    """
    n = wins + losses + ties
    if min(wins, losses, ties) < 0 or n == 0:
        raise ValueError(f"win rate of {wins} wins, {losses} losses, {ties} ties: counts must be >= 0 and not all 0")
    rate, z = (wins + ties / 2) / n, stats.norm.ppf((1 + confidence) / 2)
    centre = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return Interval(rate, float(max(centre - half, 0)), float(min(centre + half, 1)))


# ---------- chapters/10_toolbox.py · Is a better than b?

def _t_interval(mean: float, variance: float, uncertainty: float, confidence: float) -> Interval:
    "Student's interval of a mean; Satterthwaite's degrees of freedom are variance² / uncertainty."
    half = stats.t.ppf((1 + confidence) / 2, variance**2 / uncertainty) * variance**0.5 if uncertainty else 0.0
    return Interval(mean, float(mean - half), float(mean + half))


def paired_interval(a, b, confidence: float = 0.95) -> Interval:
    """Mean of a - b with its interval over seeds and prompts: two-way random effects, Satterthwaite's t.

    a, b: scores [seeds, prompts] of the same prompts, or [prompts] for one seed (the interval then says nothing about
    seeds). ValueError: unequal shapes, fewer than two scores, one that is not finite.
    """
    a, b = (np.atleast_2d(np.asarray(x, dtype=np.float64)) for x in (a, b))
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"paired scores are [seeds, prompts] and of one shape, not {a.shape} and {b.shape}")
    if a.size < 2 or not np.isfinite(a - b).all():
        raise ValueError("paired scores must be finite and at least two; drop a prompt from both tables, on purpose")
    difference, (seeds, prompts) = a - b, a.shape
    mean = difference.mean()
    by_seed = difference.mean(1, keepdims=True) - mean
    by_prompt = difference.mean(0, keepdims=True) - mean
    cells = difference - mean - by_seed - by_prompt
    # variance of the mean from each part, and its degrees of freedom
    parts = [(by_seed, seeds * (seeds - 1), seeds - 1), (by_prompt, prompts * (prompts - 1), prompts - 1)]
    parts += [(cells, difference.size * (seeds - 1) * (prompts - 1), (seeds - 1) * (prompts - 1))]
    (s, s_df), (p, p_df), (c, c_df) = (((x**2).sum() / max(n, 1), max(df, 1)) for x, n, df in parts)
    variance = max(s + p - c, s, p)
    uncertainty = s**2 / s_df + p**2 / p_df + (c**2 / c_df if variance == s + p - c else 0)
    return _t_interval(float(mean), variance, uncertainty, confidence)

def unpaired_interval(a, b, confidence: float = 0.95) -> Interval:
    """Mean over seeds of mean(a) - mean(b) with its interval; for one seed this is Welch's.

    a, b: for each seed a list of scores, of any length, of prompts that no other seed has; a score in `a` has none in
    `b` that belongs to it. ValueError: other numbers of seeds, a list of fewer than two scores, one that is not finite.
    """
    seeds = [tuple(np.asarray(part, dtype=np.float64) for part in pair) for pair in zip(a, b, strict=True)]
    parts = [part for pair in seeds for part in pair]
    if not parts or min(map(len, parts)) < 2 or not all(np.isfinite(part).all() for part in parts):
        raise ValueError("unpaired scores must be finite, and at least two of each seed in both groups")
    effects = np.array([one.mean() - other.mean() for one, other in seeds])
    s, s_df = effects.var(ddof=1) / len(seeds) if len(seeds) > 1 else 0.0, max(len(seeds) - 1, 1)
    within = np.array([part.var(ddof=1) / len(part) for part in parts]) / len(seeds) ** 2
    uncertainty = s**2 / s_df + (within**2 / [len(part) - 1 for part in parts]).sum()
    return _t_interval(float(effects.mean()), max(s, within.sum()), uncertainty, confidence)


# ---------- chapters/10_toolbox.py · Do the raters agree?

WEIGHTS = {  # agreement of two ratings x, y on a scale of width w; for 'ordinal', x and y are ranks and w = Q - 1
    "identity": lambda x, y, w: (x == y) * 1.0,
    "linear": lambda x, y, w: 1 - abs(x - y) / w,
    "quadratic": lambda x, y, w: 1 - ((x - y) / w) ** 2,
    "ordinal": lambda x, y, w: 1 - abs(x - y) * (abs(x - y) + 1) / (w * (w + 1)),
}


def _rating_counts(ratings, categories) -> tuple[np.ndarray, list]:
    "How many raters put each rated item in each category [items, categories], and the categories in order."
    rows = [list(row) for row in ratings]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) < 2:
        raise ValueError("ratings are a table [items, raters] of two raters or more; None or NaN where one is missing")
    rows = [[x for x in row if x is not None and x == x] for row in rows]
    used = {x for row in rows for x in row}
    categories = sorted(used) if categories is None else list(categories)
    if not used <= set(categories):
        raise ValueError(f"ratings {sorted(used - set(categories), key=repr)} are not in the categories {categories}")
    counts = np.array([[row.count(category) for category in categories] for row in rows if row], dtype=float)
    if (counts.sum(1) >= 2).sum() < 1 or len(counts) < 2:
        raise ValueError("agreement needs two rated items or more, and an item that two raters rated")
    return counts, categories


def gwet_ac2(ratings, weights: str = "quadratic", categories=None, confidence: float = 0.95) -> Interval:
    """Gwet's AC2 (2014), with the interval for these raters and other items; 1 is full agreement, 0 is chance.

    ratings: table [items, raters]; None or NaN is missing. Items that one rater rated count towards chance only, items
    without ratings not at all. `categories` lists the scale in order (default: the ratings that occur; pass the whole
    scale if some do not, as AC depends on their number). Numbers are spaced as their values, other categories evenly.
    `weights` is one of WEIGHTS. With one category there is no chance to correct for, and the result is (1, 1, 1).
    ValueError: fewer than two raters or rated items, no item rated twice, or a rating outside the categories.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} is not one of {', '.join(WEIGHTS)}")
    counts, categories = _rating_counts(ratings, categories)
    n, q = counts.shape
    if q == 1:
        return Interval(1.0, 1.0, 1.0)
    numbers = weights != "ordinal" and all(isinstance(c, int | float | np.number) for c in categories)
    x = np.array(categories if numbers else range(q), dtype=float)
    agreement = WEIGHTS[weights](x[:, None], x[None, :], np.ptp(x))
    raters, chance = counts.sum(1), agreement.sum() / (q * (q - 1))
    twice = raters >= 2
    observed_i = (counts * (counts @ agreement - 1)).sum(1) / np.where(twice, raters * (raters - 1), 1)
    observed = observed_i[twice].mean()
    share = (counts / raters[:, None]).mean(0)
    expected = chance * (share * (1 - share)).sum()
    value = (observed - expected) / (1 - expected)
    expected_i = chance * (counts @ (1 - share)) / raters
    value_i = n / twice.sum() * np.where(twice, observed_i - expected, 0) / (1 - expected)
    value_i -= 2 * (1 - value) * (expected_i - expected) / (1 - expected)
    half = stats.t.ppf((1 + confidence) / 2, n - 1) * np.sqrt(((value_i - value) ** 2).sum() / (n * (n - 1)))
    return Interval(float(value), float(value - half), float(min(value + half, 1)))


def gwet_ac1(ratings, categories=None, confidence: float = 0.95) -> Interval:
    "Gwet's AC1 (2008): AC2 where two ratings agree only if they are equal; categories need no order."
    return gwet_ac2(ratings, "identity", categories, confidence)
