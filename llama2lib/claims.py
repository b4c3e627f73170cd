"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "compare",
    "recomputed",
    "illustrated",
]


# ---------- chapters/10_toolbox.py · A claim

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from llama2lib import ledger
from llama2lib.recipes import scale
from llama2lib.stats import paired_interval, unpaired_interval


def compare(
    item: str,
    claim: str,
    criterion: str,
    more: Sequence[Float[np.ndarray, "N"]],
    less: Sequence[Float[np.ndarray, "N"]],
    paper=None,
    *,
    seeds: Sequence[int],
    evidence: str,
    paired: bool = True,
) -> dict | None:
    """Record the mean of `more` minus `less`, scores for each of the `seeds`, print its verdict, and return the row.

    item, claim, criterion, paper, evidence: as in `ledger.record`. paired: the scores at a place of the two lists of a
    seed are of the same prompt; else they are of two groups of prompts. Seeds have the same prompts where they have as
    many, and otherwise prompts of their own. None at the smoke scale, where nothing is learned, and for a single score,
    which has no interval. ValueError for paired lists of different lengths, and as of `stats` and `ledger.record`.
    """
    more, less = ([np.asarray(part, float) for part in parts] for parts in (more, less))
    for seed, one, other in zip(seeds, more, less, strict=True):
        if paired and len(one) != len(other):
            raise ValueError(f"{claim}, seed {seed}: expected pairs of scores, found {len(one)} and {len(other)}")
    if scale() == "smoke":
        return None
    if paired:
        more = [one - other for one, other in zip(more, less, strict=True)]
        less = [0 * part for part in more]
    effects = {seed: float(one.mean() - other.mean()) for seed, one, other in zip(seeds, more, less, strict=True)}
    if sum(map(len, more)) == 1:
        print(f"{claim}: {effects}, {criterion}: not judged, one score has no interval")
        return None
    same_prompts = paired and len({*map(len, more)}) == 1
    gap = (paired_interval if same_prompts else unpaired_interval)(more, less)
    row = ledger.record(
        item, claim, criterion, paper, gap.value, interval=gap[1:], seeds=effects, evidence=evidence
    )
    print(f"{claim}: {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {criterion}: {row['status']}")
    return row


def recomputed(item: str, claim: str, paper, ours, criterion: str = "= paper", *, evidence: str) -> dict:
    "Record what the paper's own numbers say of a claim, print its verdict, and return the row; as `ledger.record`."
    row = ledger.record(item, claim, criterion, paper, ours, evidence=evidence)
    print(f"{item}, {claim}: {ours} against {paper}: {row['status']}")
    return row


def illustrated(item: str, claim: str, figure: str, paper=None, ours=None) -> dict | None:
    "Record that figures/`figure` stands beside the paper's, and return the row; None at the smoke scale, without one."
    if scale() == "smoke":
        return None
    return ledger.record(item, claim, "illustrated", paper, ours, evidence=f"figures/{figure}")
