"The ledger: verdicts follow from measurements, evidence exists, and a stored row is never half a row."

import ast
import json
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from llama2lib import ledger, recipes

README = "# Book\n\nbefore\n\n<!-- ledger -->\nold\n<!-- /ledger -->\n\nafter\n"
THREE = {0: 0.2, 1: 0.1, 2: 0.3}


@pytest.fixture
def repo(tmp_path, monkeypatch):
    "A small repository with one test file, one figure and a README; rows are cached beside it."
    for name, text in {
        "tests/test_x.py": "def test_yes():\n    eps = 1e-5\n", "figures/figure_09.png": "png", "README.md": README,
    }.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_text(text)
    monkeypatch.setattr(ledger, "ROOT", tmp_path / "repo")
    monkeypatch.setenv("LLAMA2_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("LLAMA2_SCALE", "laptop")
    return tmp_path / "repo"


def note(item="Table 6", claim="counts add up", criterion="= paper", paper=1, ours=1, **more):
    return ledger.record(item, claim, criterion, paper, ours, **{"evidence": "tests/test_x.py", **more})


def stored(repo):
    "Every file below the repository's parent, by name, with its bytes."
    return {str(path): path.read_bytes() for path in sorted(repo.parent.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("criterion", "paper", "ours", "status"), [
    ("= paper", 3, 3, "exact"),
    ("= paper", 3, 3.0, "exact"),
    ("= paper", 0.3, 0.1 + 0.2, "exact"),
    ("= paper", 3, 4, "slip"),
    ("= paper", True, True, "exact"),
    ("= paper", True, False, "slip"),
    ("= paper", "GQA", "MHA", "slip"),
    ("= paper", {"7B": [1, 2]}, {"7B": (1, 2)}, "exact"),
    ("= paper", {"7B": 1}, {"7B": 1, "13B": 2}, "slip"),
    ("= paper", [1, 2], [1], "slip"),
    ("= paper", {"7B": 1}, 1, "slip"),
    ("= paper ± 0.01", 31.22, 31.23, "exact"),
    ("= paper ± 0.01", 31.22, 31.2401, "slip"),
    ("= paper ± .5", [1, 2], [1.4, 2.5], "exact"),
    ("= paper ± 1e-3", {"a": 1}, {"a": 1.002}, "slip"),
])
def test_recomputed_values(repo, criterion, paper, ours, status):
    assert note(criterion=criterion, paper=paper, ours=ours)["status"] == status


@pytest.mark.parametrize(("criterion", "interval", "seeds", "status"), [
    ("> 0", (0.01, 0.4), THREE, "holds"),
    ("> 0", (0.01, 0.4), {0: 0.2, 1: 0.3}, "unclear"),              # two seeds are not enough
    ("> 0", (0.01, 0.4), {**THREE, 3: -0.1}, "unclear"),            # one seed points the other way
    ("> 0", (0.01, 0.4), {**THREE, 3: 0.0}, "unclear"),             # zero is not above zero
    ("> 0", (-0.01, 0.4), THREE, "unclear"),
    ("> 0", (0.0, 0.4), THREE, "unclear"),                          # the interval touches the bound
    ("> 0.5", (0.01, 0.4), THREE, "fails"),
    ("> 0.5", (0.01, 0.4), {0: 0.2}, "unclear"),                    # one seed cannot fail a claim either
    ("> 0.4", (0.01, 0.4), THREE, "fails"),
    ("< 0.5", (0.01, 0.4), THREE, "holds"),
    ("< 0.25", (0.01, 0.24), THREE, "unclear"),                     # seed 2 lies at 0.3
    ("< 0.05", (0.01, 0.4), THREE, "unclear"),
    ("< -1.5", (0.01, 0.4), THREE, "fails"),
    ("> -1e-3", (0.0, 0.4), THREE, "holds"),
])
def test_tested_claims(repo, criterion, interval, seeds, status):
    row = note(criterion=criterion, paper=None, ours=0.2, interval=interval, seeds=seeds)
    assert row["status"] == status


@pytest.mark.parametrize(("criterion", "evidence", "status"), [
    ("preset", "tests/test_x.py::eps = 1e-5", "preset"),
    ("runs at scale", "tests/test_x.py::test_yes", "runs at scale"),
    ("illustrated", "figures/figure_09.png", "illustrated"),
    ("not reproducible: the raters are gone", None, "not reproducible"),
])
def test_claims_without_a_measurement(repo, criterion, evidence, status):
    assert note(criterion=criterion, evidence=evidence)["status"] == status


@pytest.mark.parametrize("criterion", [
    "", "=paper", "= paper +- 0.01", "= paper ± -1", "> paper", ">0", ">= 0", "> 0 ", "> nan", "> 1_000", "equal",
    "Preset", "not reproducible", "not reproducible: ", "illustrated: yes", "= paper ± 0.01 t",
])
def test_unknown_criterion_is_refused(repo, criterion):
    with pytest.raises(ValueError, match="criterion"):
        note(criterion=criterion, ours=1.0, interval=(1, 1), seeds=THREE)
    assert ledger.load() == [] and not list(recipes.cache_folder().rglob("*.json"))


@pytest.mark.parametrize(("change", "message"), [
    ({"item": "Table 53"}, "item: expected one like 'Table 9'"),
    ({"item": "Table 9a"}, "item"),
    ({"item": "table 9"}, "item"),
    ({"item": "Section 8.1"}, "item"),
    ({"item": "Section 2.2.1.1"}, "item"),
    ({"item": 9}, "item"),
    ({"claim": " "}, "claim to be one line"),
    ({"claim": "two\nlines"}, "claim to be one line"),
    ({"ours": float("nan")}, "ours: expected finite"),
    ({"ours": np.float32("inf")}, "ours: expected finite"),
    ({"paper": {"7B": [1, float("nan")]}}, "paper: expected finite"),
    ({"ours": object()}, "ours: expected finite"),
    ({"ours": {1.5: 1}}, "ours: expected finite"),
    ({"ours": None}, "needs paper and ours"),
    ({"evidence": None}, "needs evidence"),
    ({"evidence": 3}, "evidence to be one line"),
    ({"criterion": "preset", "ours": 2, "evidence": "tests/test_x.py::eps"}, "ours equal to paper"),
    ({"criterion": "preset"}, "evidence that names the line"),
    ({"criterion": "runs at scale"}, "evidence like 'tests/"),
    ({"criterion": "illustrated"}, "evidence like 'figures/"),
    ({"criterion": "> 0"}, "needs an interval"),
    ({"criterion": "> 0", "interval": (0, 2)}, "needs an interval, and seeds"),
    ({"criterion": "> 0", "interval": (2, 0), "seeds": THREE}, "interval to be"),
    ({"criterion": "> 0", "interval": (0, 1, 2), "seeds": THREE}, "interval to be"),
    ({"criterion": "> 0", "interval": (0, "1"), "seeds": THREE}, "interval to be"),
    ({"criterion": "> 0", "interval": 2, "seeds": THREE}, "interval to be"),
    ({"criterion": "> 0", "interval": (0, 0.5), "seeds": THREE}, "inside its interval"),
    ({"criterion": "> 0", "interval": (0, 2), "seeds": [1, 2, 3]}, "seeds to be"),
    ({"criterion": "> 0", "interval": (0, 2), "seeds": {0: True}}, "seeds to be"),
    ({"criterion": "> 0", "interval": (0, 2), "seeds": {0: None}}, "seeds to be"),
    ({"criterion": "> 0", "interval": (0, 2), "seeds": THREE, "ours": True}, "one number"),
])
def test_bad_fields_are_refused_with_what_was_expected(repo, change, message):
    with pytest.raises(ValueError, match=message):
        note(**change)
    assert not list(recipes.cache_folder().rglob("*.json"))


def test_status_cannot_be_passed_in(repo):
    with pytest.raises(TypeError):
        note(status="holds")


@pytest.mark.parametrize(("evidence", "message"), [
    ("tests/test_x.py::test_y", "does not mention"),            # only test_yes is there: part of a word is no evidence
    ("tests/test_z.py", "no file"),
    ("tests", "no file"),
    ("../cache/secret.txt", "outside"),
    ("/etc/hostname", "outside"),
])
def test_evidence_must_exist_inside_the_repository(repo, evidence, message):
    with pytest.raises(ValueError, match=message):
        note(evidence=evidence)


def test_evidence_that_goes_away_is_reported_and_its_row_left_out(repo, capsys):
    row = note(evidence="tests/test_x.py::test_yes")
    note(claim="stays")
    assert ledger.missing_evidence(row) is None and len(ledger.merge()) == 2
    (repo / "tests/test_x.py").write_text("def test_renamed(): ...\n")
    assert "does not mention 'test_yes'" in ledger.missing_evidence(row)
    assert [row["claim"] for row in ledger.merge()] == ["stays"]
    assert "left out Table 6, 'counts add up'" in capsys.readouterr().out


def test_numpy_numbers_are_numbers(repo):
    row = note(criterion="> 0", paper=None, ours=np.float32(0.25), interval=tuple(np.array([0.1, 0.5])),
               seeds={np.int64(s): np.float64(e) for s, e in THREE.items()})
    assert note(claim="a flag", paper=True, ours=np.all([True]))["status"] == "exact"
    with pytest.raises(ValueError, match="ours: expected finite"):
        note(ours=np.array([1, 2]))
    assert row["status"] == "holds" and row["ours"] == 0.25 and list(row["seeds"]) == ["0", "1", "2"]
    assert json.loads(json.dumps(row)) == row


def test_smoke_judges_but_stores_nothing(repo, monkeypatch):
    monkeypatch.setenv("LLAMA2_SCALE", "smoke")
    before = stored(repo)
    assert note()["status"] == "exact"
    assert note(criterion="illustrated", evidence="figures/not_drawn_yet.png")["status"] == "illustrated"
    with pytest.raises(ValueError, match="no file"):
        note(evidence="tests/gone.py")
    ledger.merge()
    assert stored(repo) == before


def test_merge_writes_ledger_gallery_and_readme(repo):
    note(item="Figure 9", claim="shown | here", criterion="illustrated", evidence="figures/figure_09.png")
    for item in ("Section 2.2", "Equation 1", "Figure 2", "Table 10", "Table 9", "Section A.6", "Section 2.2.1"):
        note(item=item)
    note(item="Table 9", claim="a second claim", ours=2)
    rows = ledger.merge()
    assert [row["item"] for row in rows] == ["Table 9", "Table 9", "Table 10", "Figure 2", "Figure 9", "Equation 1",
                                             "Section 2.2", "Section 2.2.1", "Section A.6"]
    assert ledger.load() == rows
    assert {row["measured"][:2] for row in rows} == {"20"}
    readme = (repo / "README.md").read_text()
    assert readme.startswith("# Book\n\nbefore\n") and readme.endswith("<!-- /ledger -->\n\nafter\n")
    assert "old" not in readme
    assert "| exact | slip | illustrated |\n| --- | --- | --- |\n| 7 | 1 | 1 |" in readme
    gallery = (repo / "figures" / "README.md").read_text()
    assert "![figure_09](figure_09.png)\n\n- Figure 9: shown \\| here: **illustrated**" in gallery
    assert all(f"\n### {item}" in gallery for item in {row["item"] for row in rows})
    widths = {line.count(" | ") for line in gallery.splitlines() if line.startswith("| ")}
    assert widths == {8}, "a pipe in a claim must not open a column"


def test_merging_twice_changes_nothing(repo):
    note(), note(item="Figure 9", criterion="illustrated", evidence="figures/figure_09.png")
    ledger.merge()
    before = stored(repo)
    ledger.merge()
    assert stored(repo) == before


def at(monkeypatch, second):
    "Let rows be recorded at that second of a fixed day."
    class Clock(ledger.datetime):
        @classmethod
        def now(cls, tz):
            return cls(2026, 1, 1, 0, 0, second, tzinfo=tz)
    monkeypatch.setattr(ledger, "datetime", Clock)


def test_newer_replaces_older_and_a_repeated_result_keeps_its_date(repo, monkeypatch):
    at(monkeypatch, 10), note(ours=1), ledger.merge()
    at(monkeypatch, 20), note(ours=1), ledger.merge()
    (row,) = ledger.load()
    assert row["measured"] == "2026-01-01T00:00:10+00:00"
    at(monkeypatch, 30), note(ours=2), ledger.merge()
    (row,) = ledger.load()
    assert (row["ours"], row["status"], row["measured"][-8:-6]) == (2, "slip", "30")
    at(monkeypatch, 25), note(ours=3), ledger.merge()           # an old cache does not undo a newer ledger
    assert ledger.load() == [row]


def test_compare_reports_flips_and_writes_nothing(repo, monkeypatch, capsys):
    at(monkeypatch, 10), note(), note(claim="steady", ours=5), ledger.merge()
    at(monkeypatch, 20), note(ours=2), note(claim="steady", ours=6), note(claim="new")
    before = stored(repo)
    capsys.readouterr()
    ledger.merge(compare=True)
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "Table 6, 'counts add up': exact -> slip" and out.count("->") == 1
    assert stored(repo) == before


def test_a_full_run_drops_claims_that_no_chapter_records_any_more(repo, capsys):
    note(claim="old wording", ours=1)
    note(claim="untouched", ours=1)
    ledger.merge()
    ledger.row_file("Table 6", "old wording").unlink()
    assert len(ledger.merge()) == 2  # a run of one chapter keeps the others' rows
    rows = ledger.merge(since="2000-01-01")
    assert [row["claim"] for row in rows] == ["untouched"] and "old wording" in capsys.readouterr().out
    assert ledger.merge(since="2999-01-01") == []


def unwritten(rows, chapters):
    """Claims that no chapter's code has, whole or as an f-string with a quarter of their text, or ten letters, in it.

    rows: of the ledger. chapters: source texts.
    """
    patterns = set()
    for node in (node for text in chapters for node in ast.walk(ast.parse(text))):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        if isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str):
            words = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            pattern = "".join(".*" if word is None else re.escape(word) for word in words)
            patterns.add((re.compile(pattern), sum(map(len, filter(None, words)))))
    claims = {row["claim"] for row in rows}
    return {c for c in claims if not any(size >= min(10, len(c) / 4) and p.fullmatch(c) for p, size in patterns)}


def test_a_claim_that_no_chapter_writes_is_found():
    chapters = ['record("Table 2", f"{size}: tonnes of {gas}")', 'for claim in ("counts add up", f"{a}: {b}"): 1']
    claims = ["7B: tonnes of CO2", "counts add up", "7B: tons of CO2", "counts", "counts add up: 7B"]
    assert unwritten([{"claim": claim} for claim in claims], chapters) == set(claims[2:])


def test_every_row_of_the_ledger_is_a_claim_of_a_chapter():
    "A row outlives its cell when chapters are run one by one; `make ledger`, which runs all of them, drops it."
    chapters = [path.read_text("utf-8") for path in sorted((ledger.ROOT / "chapters").glob("[0-9]*.py"))]
    rows = ledger.load()
    assert len(rows) > 400 and unwritten(rows, chapters) == set()


def test_seeds_of_their_own_have_rows_of_their_own(repo, monkeypatch):
    note(ours=1)
    monkeypatch.setenv("LLAMA2_SEEDS", "3,4,5")
    assert ledger.merge(compare=True) == []
    monkeypatch.delenv("LLAMA2_SEEDS")
    assert len(ledger.merge()) == 1


def test_an_effect_outside_its_seeds_is_refused(repo):
    with pytest.raises(ValueError, match="ours among its seeds"):
        note(criterion="> 0", ours=0.2, interval=(0.1, 0.3), seeds={0: 5.0, 1: 5.0, 2: 5.0})


def test_command_line(repo):
    "`--compare` reaches merge; an unknown option stops."
    def run(*options):
        command = [sys.executable, "-m", "llama2lib.ledger", *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert run("--compare").stdout.endswith("nothing written\n")
    assert run("--compere").returncode == 2


@pytest.mark.parametrize("damage", [
    "", "[", "{}x", "3", "[3]", '[{"item": "Table 6"}]', "null",
])
@pytest.mark.parametrize("where", ["ledger", "cache"])
def test_a_damaged_file_is_named(repo, damage, where):
    note(), ledger.merge()
    (cached,) = recipes.cache_folder().rglob("*.json")
    path = cached if where == "cache" else repo / "figures" / "ledger.json"
    path.write_text(damage)
    with pytest.raises(ValueError, match=path.name):
        ledger.merge()


def test_a_status_edited_by_hand_is_an_error(repo):
    note(ours=2), ledger.merge()
    path = repo / "figures" / "ledger.json"
    path.write_text(path.read_text().replace('"slip"', '"exact"'))
    with pytest.raises(ValueError, match=r"ledger\.json.*exact"):
        ledger.load()


def test_a_claim_that_comes_twice_is_an_error(repo):
    row = note()
    (repo / "figures" / "ledger.json").write_text(json.dumps([row, row]))
    with pytest.raises(ValueError, match=r"ledger\.json.*twice"):
        ledger.load()


@pytest.mark.parametrize("readme", [None, "# no markers\n", "<!-- ledger -->\n", "<!-- /ledger -->\n<!-- ledger -->\n"])
def test_without_markers_nothing_is_written(repo, readme):
    note()
    (repo / "README.md").unlink() if readme is None else (repo / "README.md").write_text(readme)
    before = stored(repo)
    with pytest.raises(ValueError, match=r"README\.md.*<!-- ledger -->"):
        ledger.merge()
    assert stored(repo) == before


def test_a_process_killed_while_writing_leaves_the_old_rows(repo):
    "The process dies at the moment of renaming: the row and the ledger from before are intact, and merging goes on."
    def now():
        return {name: content for name, content in stored(repo).items() if name.endswith((".json", ".md"))}

    script = f"""
        import os, pathlib
        from llama2lib import ledger
        ledger.ROOT = pathlib.Path({str(repo)!r})
        os.replace = os.rename = lambda *a, **k: os._exit(9)
    """
    again = 'ledger.record("Table 6", "counts add up", "= paper", 1, 3, evidence="tests/test_x.py")'
    note(), ledger.merge(), note(ours=2)                # the ledger holds one result, the cache a newer one
    before = now()
    for action in (again, "ledger.merge()"):
        killed = subprocess.run([sys.executable, "-c", f"{textwrap.dedent(script)}\n{action}"], check=False)
        assert killed.returncode == 9 and now() == before
    assert [row["ours"] for row in ledger.merge()] == [2]
