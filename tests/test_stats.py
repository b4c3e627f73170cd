"Intervals against SciPy and simulation; agreement against irrCAC and published values."

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, ttest_1samp, ttest_ind

from llama2lib.stats import WEIGHTS, gwet_ac1, gwet_ac2, paired_interval, unpaired_interval, win_rate_interval

IRRCAC = json.loads((Path(__file__).parent / "fixtures" / "gwet_irrcac.json").read_text("utf-8"))
CASES = [(name, weights) for name, case in IRRCAC.items() if name != "source" for weights in case["gwet"]]


# ---------- win rates


@given(st.integers(0, 3000), st.integers(0, 3000), st.sampled_from([0.8, 0.95, 0.99]))
def test_win_rate_is_wilsons(wins, losses, confidence):
    if wins + losses == 0:
        return
    expected = binomtest(wins, wins + losses).proportion_ci(confidence, method="wilson")
    result = win_rate_interval(wins, losses, confidence=confidence)
    assert result.value == wins / (wins + losses)
    assert np.allclose(result[1:], expected)


def test_a_tie_is_half_a_win_to_each_side():
    a, b = win_rate_interval(30, 10, ties=21), win_rate_interval(10, 30, ties=21)
    assert np.allclose([a.value, a.low, a.high], [1 - b.value, 1 - b.high, 1 - b.low])
    assert win_rate_interval(30, 10, ties=20)[:] == win_rate_interval(40, 20)[:]


@pytest.mark.parametrize("counts", [(0, 0, 0), (-1, 2, 0), (1, 1, -1)])
def test_impossible_counts(counts):
    with pytest.raises(ValueError, match="counts"):
        win_rate_interval(*counts)


# ---------- paired differences


def test_paired_interval_is_paired_and_signed():
    random = np.random.default_rng(0)
    hard = random.normal(0, 10, 300)  # prompts differ far more than models do
    a, b = hard + 0.2 + random.normal(0, 0.1, (3, 300)), hard + random.normal(0, 0.1, (3, 300))
    forward, backward = paired_interval(a, b), paired_interval(b, a)
    assert 0.15 < forward.low < forward.value < forward.high < 0.25
    assert np.allclose(forward, [-backward.value, -backward.high, -backward.low])


@pytest.mark.parametrize("shape", [(400,), (1, 400), (6, 1)])
def test_one_seed_or_one_prompt_gives_students_interval(shape):
    d = np.random.default_rng(1).normal(0.3, 1, shape)
    expected = ttest_1samp(d.ravel(), 0).confidence_interval(0.95)
    assert np.allclose(paired_interval(d, 0 * d), [d.mean(), *expected])


def test_more_confidence_is_wider():
    a = np.random.default_rng(2).normal(size=(3, 1000))
    narrow, wide = (paired_interval(a, 0 * a, confidence=c) for c in (0.8, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_spread_between_seeds_and_spread_between_prompts_both_count():
    "A difference that varies only between seeds, or only between prompts (the same for all seeds), shows its spread."
    zero, d = np.zeros((4, 400)), np.random.default_rng(3).normal(size=400)
    by_seed = np.array([-1.0, 0, 0.5, 1])
    expected = ttest_1samp(by_seed, 0).confidence_interval(0.95)
    assert np.allclose(paired_interval(zero + by_seed[:, None], zero)[1:], expected)
    assert np.allclose(paired_interval(zero + d, zero)[1:], ttest_1samp(d, 0).confidence_interval(0.95))


@pytest.mark.parametrize("seed_sd", [0.0, 0.1, 1.0])
def test_it_holds_the_truth_as_often_as_it_says_with_three_seeds(seed_sd):
    "A bootstrap over three seeds would cover 74 % in the last case."
    random, covered = np.random.default_rng(4), 0
    for _ in range(600):
        d = random.normal(0, seed_sd, (3, 1)) + random.normal(0, 0.5, 60) + random.normal(0, 0.5, (3, 60))
        result = paired_interval(d, 0 * d)
        covered += result.low <= 0 <= result.high
    assert 0.92 <= covered / 600 <= 0.99


@pytest.mark.parametrize(
    ("a", "b"),
    [(np.zeros((3, 4)), np.zeros((3, 5))), (np.zeros((0, 4)), np.zeros((0, 4))), ([], []), ([1.0, np.nan], [1.0, 2.0]),
     ([np.inf], [0.0]), (np.zeros((2, 2, 2)), np.zeros((2, 2, 2)))],
)  # fmt: skip
def test_unusable_scores(a, b):
    with pytest.raises(ValueError, match="paired scores"):
        paired_interval(a, b)


# ---------- differences of two groups


def test_one_seed_gives_welchs_interval():
    random = np.random.default_rng(5)
    a, b = random.normal(0.3, 2, 40), random.normal(0, 1, 7)
    expected = ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert np.allclose(unpaired_interval([a], [b], 0.9), [a.mean() - b.mean(), *expected])


def test_groups_that_differ_between_seeds_alone_give_students_interval():
    effects, b = np.array([-1.0, 0, 0.5, 1]), [np.zeros(4), np.zeros(2), np.zeros(9), np.zeros(3)]
    found = unpaired_interval([effect + np.zeros(n) for n, effect in enumerate(effects, 2)], b)
    assert np.allclose(found, [effects.mean(), *ttest_1samp(effects, 0).confidence_interval(0.95)])


def test_pairs_would_count_what_the_groups_do_not_share():
    "Scores that go up and down together are no help where nobody knows which belong together."
    hard = np.random.default_rng(6).normal(0, 10, (3, 300))
    (_, low, high), (_, from_, to) = paired_interval(hard + 1, hard), unpaired_interval(hard + 1, hard)
    assert high - low < 1e-9 and to - from_ > 1


@pytest.mark.parametrize("seed_sd", [0.0, 0.1, 1.0])
def test_groups_of_each_seeds_own_prompts_hold_the_truth_as_often_as_they_say(seed_sd):
    random, covered = np.random.default_rng(7), 0
    for _ in range(600):
        a = [random.normal(shift, 0.5, n) for shift, n in zip(random.normal(0, seed_sd, 3), (50, 60, 70), strict=True)]
        found = unpaired_interval(a, [random.normal(0, 0.5, n) for n in (90, 70, 80)])
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 600 <= 0.995


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [([], [], "at least two"), ([[1, 2]], [[1]], "at least two"), ([[1, np.nan]], [[1, 2]], "finite"),
     ([[1, 2], [1, 2]], [[1, 2]], "zip")],
)  # fmt: skip
def test_unusable_groups(a, b, message):
    with pytest.raises(ValueError, match=message):
        unpaired_interval(a, b)


# ---------- agreement


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_gwet_equals_irrcac(name, weights):
    case = IRRCAC[name]
    result = gwet_ac2(case["ratings"], weights, categories=case["categories"])
    assert np.allclose(result, case["gwet"][weights][:3], atol=1e-9)


def test_published_values():
    units = IRRCAC["raw_4raters"]["ratings"]
    assert round(gwet_ac1(units).value, 5) == 0.77544  # Gwet 2014, page 55; irrCAC's documentation
    assert np.allclose(gwet_ac1(units)[1:], [0.46081, 1], atol=5e-6)  # irrCAC's documentation
    table = IRRCAC["cont3x3abstractors"]["ratings"]
    assert round(gwet_ac1(table).value, 7) == 0.8493305  # vignette of the R package irrCAC


def test_names_of_categories_and_order_of_raters_do_not_matter():
    units = IRRCAC["raw_4raters"]["ratings"]
    named = [[None if x is None else "abcde"[int(x) - 1] for x in row[::-1]] for row in units]
    for weights in WEIGHTS:
        assert np.allclose(gwet_ac2(named, weights), gwet_ac2(units, weights))
    assert np.allclose(gwet_ac1(np.array(units, dtype=float)), gwet_ac1(units))  # NaN is missing, as None is


def test_extremes():
    assert gwet_ac1([[1, 1], [2, 2], [1, 1]]) == (1, 1, 1)
    assert gwet_ac2([[3, 3, 3]] * 4) == (1, 1, 1)  # a single category
    assert gwet_ac1([[1, 2], [2, 1]] * 10).value < 0
    random = np.random.default_rng(0).integers(0, 4, (4000, 2))
    assert abs(gwet_ac1(random).value) < 0.03


@pytest.mark.parametrize(
    ("ratings", "options"),
    [([[1], [2]], {}), ([[1, None], [None, 2]], {}), ([[1, 2]], {}), ([], {}), ([[1, 2], [1]], {}),
     ([[1, 9], [1, 1]], {"categories": [1, 2]}), ([[1, 2], [1, 1]], {"weights": "cubic"})],
)  # fmt: skip
def test_unusable_ratings(ratings, options):
    with pytest.raises(ValueError):
        gwet_ac2(ratings, **options)
