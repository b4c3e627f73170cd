"""A claim about models of several seeds: the difference, its interval and effects, and the verdict."""

import numpy as np
import pytest

from llama2lib.claims import compare
from llama2lib.stats import paired_interval

EVIDENCE = "llama2lib/claims.py::def compare"
RANDOM = np.random.default_rng(0)
LESS = RANDOM.random((3, 60))
MORE = LESS + 0.2 + 0.1 * RANDOM.random((3, 60))


@pytest.fixture(autouse=True)
def unrecorded(monkeypatch):
    monkeypatch.setenv("LLAMA2_SCALE", "smoke")


def test_a_row_holds_the_difference_its_interval_and_an_effect_for_each_seed(capsys):
    row = compare((4, 0, 2), "Table 7", "more is more", "> 0.1", 0.3, MORE, LESS, EVIDENCE)
    gap = paired_interval(MORE, LESS)
    assert row["ours"] == gap.value and tuple(row["interval"]) == (gap.low, gap.high) and row["status"] == "holds"
    effects = {int(seed): effect for seed, effect in row["seeds"].items()}
    assert effects == pytest.approx(dict(zip((4, 0, 2), (MORE - LESS).mean(1), strict=True)))
    assert "more is more: +0.25" in (told := capsys.readouterr().out) and told.strip().endswith("> 0.1: holds")
    assert compare((4, 0, 2), "Table 7", "more is less", "< 0.1", 0.3, MORE, LESS, EVIDENCE)["status"] == "fails"


def test_lists_of_different_lengths_are_cut_to_the_shortest():
    more, less = [MORE[0], MORE[1, :40], MORE[2]], [LESS[0, :50], LESS[1], LESS[2]]
    row = compare((0, 1, 2), "Table 7", "cut", "> 0", None, more, less, EVIDENCE)
    assert row["ours"] == paired_interval(MORE[:, :40], LESS[:, :40]).value


def test_hits_may_be_true_or_false():
    row = compare((0, 1, 2), "Table 7", "hits", "> 0", None, MORE > 0.5, LESS > 0.5, EVIDENCE)
    assert row["ours"] == pytest.approx((MORE > 0.5).mean() - (LESS > 0.5).mean())


def test_as_many_seeds_as_lists():
    with pytest.raises(ValueError, match="zip"):
        compare((0, 1), "Table 7", "a seed is missing", "> 0", None, MORE, LESS, EVIDENCE)
