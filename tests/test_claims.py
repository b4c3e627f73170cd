"""A claim about models of several seeds: the difference, its interval and effects, and the verdict."""

import numpy as np
import pytest

from llama2lib.claims import compare, illustrated, recomputed
from llama2lib.stats import paired_interval, unpaired_interval

EVIDENCE = "llama2lib/claims.py::def compare"
RANDOM = np.random.default_rng(0)
LESS = RANDOM.random((3, 60))
MORE = LESS + 0.2 + 0.1 * RANDOM.random((3, 60))


@pytest.fixture(autouse=True)
def rows_of_their_own(monkeypatch, tmp_path):
    monkeypatch.setenv("LLAMA2_SCALE", "laptop")
    monkeypatch.setenv("LLAMA2_CACHE", str(tmp_path))


def test_a_row_holds_the_difference_its_interval_and_an_effect_for_each_seed(capsys):
    row = compare("Table 7", "more is more", "> 0.1", MORE, LESS, 0.3, seeds=(4, 0, 2), evidence=EVIDENCE)
    gap = paired_interval(MORE, LESS)
    assert row["ours"] == gap.value and tuple(row["interval"]) == (gap.low, gap.high) and row["status"] == "holds"
    effects = {int(seed): effect for seed, effect in row["seeds"].items()}
    assert effects == pytest.approx(dict(zip((4, 0, 2), (MORE - LESS).mean(1), strict=True)))
    assert "more is more: +0.25" in (told := capsys.readouterr().out) and told.strip().endswith("> 0.1: holds")
    row = compare("Table 7", "more is less", "< 0.1", MORE, LESS, 0.3, seeds=(4, 0, 2), evidence=EVIDENCE)
    assert row["status"] == "fails" and row["paper"] == 0.3


@pytest.mark.parametrize("scale", ["smoke", "laptop"])
def test_scores_without_a_partner_are_no_pairs(monkeypatch, scale):
    monkeypatch.setenv("LLAMA2_SCALE", scale)
    with pytest.raises(ValueError, match="one more, seed 2: expected pairs of scores, found 60 and 59"):
        compare("Table 7", "one more", "> 0", MORE[:2], [LESS[0], LESS[1, :59]], seeds=(4, 2), evidence=EVIDENCE)


def test_two_groups_of_prompts_are_compared_by_their_means():
    more, less = [MORE[0, :20], MORE[1, :25], MORE[2, :30]], [LESS[0, 20:], LESS[1, 25:], LESS[2, 30:]]
    row = compare("Table 7", "groups", "> 0", more, less, seeds=(4, 0, 2), evidence=EVIDENCE, paired=False)
    assert (row["ours"], *row["interval"]) == unpaired_interval(more, less)
    effects = [one.mean() - other.mean() for one, other in zip(more, less, strict=True)]
    assert row["seeds"] == dict(zip("402", effects, strict=True)) and row["ours"] == pytest.approx(np.mean(effects))


def test_pairs_of_seeds_with_prompts_of_their_own_all_count():
    more, less = [MORE[0], MORE[1, :40], MORE[2]], [LESS[0], LESS[1, :40], LESS[2]]
    row = compare("Table 7", "own prompts", "> 0", more, less, seeds=(0, 1, 2), evidence=EVIDENCE)
    gaps = [one - other for one, other in zip(more, less, strict=True)]
    assert (row["ours"], *row["interval"]) == unpaired_interval(gaps, [np.zeros(len(part)) for part in gaps])
    assert row["ours"] == pytest.approx(np.mean([part.mean() for part in gaps]))


def test_hits_may_be_true_or_false():
    row = compare("Table 7", "hits", "> 0", MORE > 0.5, LESS > 0.5, seeds=(0, 1, 2), evidence=EVIDENCE)
    assert row["ours"] == pytest.approx((MORE > 0.5).mean() - (LESS > 0.5).mean())


def test_as_many_seeds_as_lists():
    with pytest.raises(ValueError, match="zip"):
        compare("Table 7", "a seed is missing", "> 0", MORE, LESS, seeds=(0, 1), evidence=EVIDENCE)


def test_a_single_score_is_told_and_not_judged(capsys, tmp_path):
    assert compare("Table 7", "one", "> 0", [[0.5]], [[0.2]], seeds=(0,), evidence=EVIDENCE) is None
    assert "one score has no interval" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))
    assert compare("Table 7", "two", "> 0", [[0.5], [0.6]], [[0.2], [0.1]], seeds=(0, 1), evidence=EVIDENCE)


def test_nothing_is_judged_at_the_smoke_scale(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LLAMA2_SCALE", "smoke")
    assert compare("Table 7", "more", "> 0", MORE, LESS, seeds=(4, 0, 2), evidence=EVIDENCE) is None
    illustrated("Table 12", "there is no such file", "no.png")
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_what_follows_from_the_papers_numbers_is_exact_or_a_slip(capsys):
    rows = [recomputed("Table 7", f"a sum that is {ours}", 3, ours, evidence=EVIDENCE) for ours in (3, 4)]
    assert [(row["paper"], row["ours"], row["status"]) for row in rows] == [(3, 3, "exact"), (3, 4, "slip")]
    told = capsys.readouterr().out.splitlines()
    assert [line.rpartition(" ")[2] for line in told] == ["exact", "slip"]
    with pytest.raises(ValueError, match=r"no\.png"):
        illustrated("Table 12", "there is no such file", "no.png")
    row = illustrated("Table 12", "two answers", "table_12.png", paper="theirs", ours="ours")
    assert (row["status"], row["paper"], row["ours"]) == ("illustrated", "theirs", "ours")
