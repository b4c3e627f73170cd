"""Generated from chapters/03_sft.py by chapters/export.py; edit the chapter."""

__all__ = [
    "compare",
]


# ---------- chapters/03_sft.py · Claims

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from llama2lib import ledger
from llama2lib.stats import paired_interval


def compare(
    seeds: Sequence[int],
    item: str,
    claim: str,
    criterion: str,
    printed,
    more: Sequence[Float[np.ndarray, "N"]],
    less: Sequence[Float[np.ndarray, "N"]],
    evidence: str,
) -> dict:
    """Record the mean of `more` minus `less`, scores for each seed, as a row of the ledger, and print its verdict.

    item, claim, criterion, printed, evidence: as in `ledger.record`. Where lists differ in length, each is cut to the
    shortest.
    """
    size = min(map(len, (*more, *less)))
    more, less = (np.stack([np.asarray(part, float)[:size] for part in parts]) for parts in (more, less))
    gap = paired_interval(more, less)
    effects = dict(zip(seeds, (more - less).mean(1).tolist(), strict=True))
    row = ledger.record(
        item, claim, criterion, printed, gap.value, interval=gap[1:], seeds=effects, evidence=evidence
    )
    print(f"{claim}: {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {criterion}: {row['status']}")
    return row
