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
    seeds: Sequence[int],
    item: str,
    claim: str,
    criterion: str,
    more: Sequence[Float[np.ndarray, "N"]],
    less: Sequence[Float[np.ndarray, "N"]],
    printed=None,
    *,
    evidence: str,
    paired: bool = True,
) -> dict | None:
    """Record the mean of `more` minus `less`, scores for each seed, as a row of the ledger, and print its verdict.

    item, claim, criterion, printed, evidence: as in `ledger.record`. paired: the scores at a place of the two lists of
    a seed are of the same prompt; else they are of two groups of prompts. Seeds have the same prompts where they have
    as many, and otherwise prompts of their own. None at the smoke scale, where nothing is learned, and for a single
    score, which has no interval. ValueError for paired lists of different lengths, and as of `stats`.
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
        item, claim, criterion, printed, gap.value, interval=gap[1:], seeds=effects, evidence=evidence
    )
    print(f"{claim}: {gap.value:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}], {criterion}: {row['status']}")
    return row


def recomputed(item: str, claim: str, printed, ours, criterion: str = "= paper", *, evidence: str):
    "Record what the paper's own numbers say of a claim, and print its verdict; arguments as in `ledger.record`."
    row = ledger.record(item, claim, criterion, printed, ours, evidence=evidence)
    print(f"{item}, {claim}: {ours} against {printed}: {row['status']}")


def illustrated(item: str, claim: str, figure: str, printed=None, ours=None):
    "Record that a file of ours under figures/ stands beside the paper's; not at the smoke scale, which draws none."
    if scale() != "smoke":
        ledger.record(item, claim, "illustrated", printed, ours, evidence=f"figures/{figure}")
