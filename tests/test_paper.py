"The transcription: complete, and consistent with itself wherever the paper is."

import pytest

from llama2lib.grids import column, parse
from llama2lib.inventory import ITEMS
from llama2lib.paper import PAPER, SIZES, TEXT


def test_inventory_is_complete():
    assert list(ITEMS) == (
        [f"Table {n}" for n in range(1, 53)]
        + [f"Figure {n}" for n in range(1, 34)]
        + [f"Equation {n}" for n in range(1, 5)]
    )
    assert {item.source for item in ITEMS.values()} == {"printed", "chart", "none"}
    assert len({item.title for item in ITEMS.values()}) == len(ITEMS)


def test_grids_and_inventory_name_the_same_items():
    "Every item with numbers has a grid, and no grid belongs to an item said to have none."
    held = {" ".join(key.split()[:2]).rstrip("ab") for key in PAPER}
    assert held == {name for name, item in ITEMS.items() if item.source != "none"}


def test_no_grid_is_empty():
    for key, grid in PAPER.items():
        assert grid, key
        assert any(value is not None for cells in grid.values() for value in cells.values()), key


@pytest.mark.parametrize(("key", "rows", "columns"), [
    ("Table 1", 8, 4), ("Table 3", 12, 8), ("Table 10", 1, 28), ("Table 19", 12, 5), ("Table 20", 12, 10),
    ("Table 24", 12, 9), ("Table 26", 15, 5), ("Table 44", 19, 3), ("Table 45", 19, 13), ("Table 46", 19, 4),
    ("Table 47", 19, 2), ("Table 48", 19, 5), ("Table 49", 19, 12), ("Table 50", 19, 18), ("Table 51", 20, 6),
    ("Figure 6", 6, 14), ("Figure 8", 18, 8), ("Figure 17", 10, 4), ("Figure 21", 8, 11), ("Figure 25", 4, 14),
])
def test_shapes(key, rows, columns):
    assert len(PAPER[key]) == rows
    assert {len(cells) for cells in PAPER[key].values()} == {columns}


def test_table_1():
    "Section 2.2's settings by size come from Table 1."
    assert {m: tuple(c.values()) for m, c in PAPER["Table 1"].items()} == {
        "Llama 1 7B": (2, 0, 1.0, 3e-4), "Llama 1 13B": (2, 0, 1.0, 3e-4),
        "Llama 1 33B": (2, 0, 1.4, 1.5e-4), "Llama 1 65B": (2, 0, 1.4, 1.5e-4),
        "Llama 2 7B": (4, 0, 2.0, 3e-4), "Llama 2 13B": (4, 0, 2.0, 3e-4),
        "Llama 2 34B": (4, 1, 2.0, 1.5e-4), "Llama 2 70B": (4, 1, 2.0, 1.5e-4),
    }
    assert TEXT["Section 2.2"]["gqa"] == {"7B": False, "13B": False, "34B": True, "70B": True}
    assert TEXT["Section 2.2"]["lr"] == {"7B": 3e-4, "13B": 3e-4, "34B": 1.5e-4, "70B": 1.5e-4}


def test_table_2_follows_from_hours_and_watts():
    for size in SIZES:
        row = PAPER["Table 2"][size]
        assert row["gpu_hours"] * row["watts"] * 1.1 * 0.385e-6 == pytest.approx(row["tco2eq"], abs=0.01)


def test_sums():
    "Table 26 adds up; Table 6 misses its total by 1,577 comparisons, Table 2 by 0.02 t (printed hours do add up)."
    def miss(key, name):
        *parts, total = column(PAPER[key], name).values()
        return round(sum(parts) - total, 2)

    assert miss("Table 26", "comparisons") == 0
    assert miss("Table 6", "comparisons") == 1577
    assert miss("Table 2", "tco2eq") == -0.02
    assert miss("Table 2", "gpu_hours") == 0


def test_scores_lie_on_their_scale():
    "A shifted decimal point shows: percentages within 0-100, sentiment within -1..1, reward scores within 0..1."
    percent = [f"Table {n}" for n in (3, 7, 8, 19, 20, 21, 22, 23, 24, 25, 28, 29, 44, 45)]
    for key in (*percent, "Figure 17", "Figure 21", "Figure 25"):
        assert all(v is None or 0 <= v <= 100 for cells in PAPER[key].values() for v in cells.values()), key
    unit = [f"Table {n}" for n in range(46, 51)]
    for key in (*unit, "Figure 6", "Figure 7", "Figure 8", "Figure 29"):
        assert all(v is None or -1 <= v <= 1 for cells in PAPER[key].values() for v in cells.values()), key


def test_win_tie_loss_sum_to_100():
    for key in ("Figure 1", "Figure 12 single", "Figure 12 multi", "Figure 30"):
        for row, cells in PAPER[key].items():
            assert sum(cells.values()) == pytest.approx(100, abs=0.7), (key, row)


@pytest.mark.parametrize("key", ["Figure 7", "Figure 8"])
def test_the_best_of_more_samples_is_no_worse(key):
    for row, cells in PAPER[key].items():
        values = [value for value in cells.values() if value is not None]
        assert values == sorted(values), row


def test_toxigen_is_the_mean_of_its_groups():
    "All 19 x 13 cells of Table 45 against the totals of Tables 11 and 14; their TruthfulQA is Table 44's."
    for model, cells in (PAPER["Table 11"] | PAPER["Table 14"]).items():
        assert sum(PAPER["Table 45"][model].values()) / 13 == pytest.approx(cells["ToxiGen"], abs=0.0051), model
        assert cells["TruthfulQA"] == PAPER["Table 44"][model]["both"]


def test_truthfulqa_counts_questions():
    "Every cell of Table 44 is a whole number of 817 questions, and 'both' lies between its bounds."
    for model, cells in PAPER["Table 44"].items():
        true, informative, both = (round(cells[name] * 8.17) for name in ("true", "informative", "both"))
        assert all(score * 8.17 == pytest.approx(round(score * 8.17), abs=0.06) for score in cells.values()), model
        assert true + informative - 817 <= both <= min(true, informative), model


@pytest.mark.parametrize(("half", "other"), [("clean", "not clean"), ("not dirty", "dirty")])
def test_contamination_subsets_pool_to_the_whole(half, other):
    "Table 51: n adds up to the benchmark, the scores pool to its mean, each z follows from score, mean and n."
    sizes = {"HellaSwag": 10_042, "MMLU-Humanities": 4705, "MMLU-Overall": 14_042}
    for dataset in {name.rsplit(", ", 1)[0] for name in PAPER["Table 51"]}:
        parts = [PAPER["Table 51"][f"{dataset}, {subset}"] for subset in (half, other)]
        n = sum(part["n"] for part in parts)
        assert n == sizes[dataset.split(",")[0]]
        assert sum(part["n"] * part["score"] for part in parts) / n == pytest.approx(parts[0]["mu"], abs=0.06)
        for part in parts:
            error = 100 * (part["mu"] / 100 * (1 - part["mu"] / 100) / part["n"]) ** 0.5
            assert (part["score"] - part["mu"]) / error == pytest.approx(part["z"], abs=0.15)


def test_table_3_averages_the_appendix():
    "Every group of Table 3 is the mean of its benchmarks, except two Math cells that are GSM8K alone."
    def mean(model, *parts):
        return sum(PAPER[f"Table {n}"][model][name] for n, name in parts) / len(parts)

    commonsense = [(20, name) for name in PAPER["Table 20"]["MPT 7B"] if name not in ("BoolQ", "MMLU")]
    for model, cells in PAPER["Table 3"].items():
        ours = {
            "Code": mean(model, (21, "HumanEval@1"), (21, "MBPP@1")), "Commonsense": mean(model, *commonsense),
            "World": mean(model, (22, "NQ-5"), (22, "TQA-5")), "MMLU": mean(model, (19, "Avg")),
            "Reading": mean(model, (23, "SQuAD-0"), (23, "QuAC-0"), (20, "BoolQ")), "AGI": mean(model, (24, "Avg")),
            "Math": mean(model, (25, "GSM8K"), (25, "MATH")),
        }
        if model in ("Llama 2 7B", "Llama 2 13B"):
            assert cells["Math"] == PAPER["Table 25"][model]["GSM8K"] != ours.pop("Math")
        assert {group: cells[group] for group in ours} == pytest.approx(ours, abs=0.0501), model


def test_single_turn_examples_are_prompt_and_response():
    for row in PAPER["Table 6"].values():
        if row["turns"] == 1:
            assert row["tokens_prompt"] + row["tokens_response"] == pytest.approx(row["tokens_example"], abs=0.11)


@pytest.mark.parametrize(("text", "message"), [
    ("Table 1 | a b\nx | 1", "as many cells"),
    ("Table 1 | a b\nx | 1 2 3", "as many cells"),
    ("Table 1, Table 2 | a | b\nx | 1", "as many cells"),
    ("Table 1, Table 2 | a\nx | 1", "as many cells"),
    ("Table 1 | a\nx | 1\nx | 2", "comes twice"),
    ("x | 1", "as many cells"),
    ("Table 1 | a\nx | O.5", "could not convert"),
])
def test_parse_refuses_what_does_not_fit(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_parse_reads_blanks_fractions_and_continued_headers():
    assert parse("Table 1, Table 2 | a | b\n | c | \n# remark\n\nx | - 2/4 | -.5") == {
        "Table 1": {"x": {"a": None, "c": 0.5}}, "Table 2": {"x": {"b": -0.5}}}
