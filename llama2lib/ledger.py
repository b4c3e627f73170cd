"""Generated from chapters/10_toolbox.py by chapters/export.py; edit the chapter."""

__all__ = [
    "STATUSES",
    "FIELDS",
    "Row",
    "compare_to_bound",
    "agree",
    "NUMBER",
    "GRAMMAR",
    "status_of",
    "missing_evidence",
    "plain",
    "judged",
    "rows_folder",
    "row_file",
    "record",
    "as_json",
    "read_rows",
    "in_order",
    "load",
    "merge",
    "cli",
    "cell",
    "table",
    "summary",
    "with_block",
    "gallery",
]


# ---------- chapters/10_toolbox.py · The ledger

import hashlib
import json
import math
import os
import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tyro

from llama2lib.inventory import ITEMS
from llama2lib.recipes import ROOT, cache_folder, scale, write_atomic

STATUSES = (
    "exact", "slip", "preset", "holds", "fails", "unclear", "runs at scale", "illustrated", "not reproducible",
)
FIELDS = ("item", "claim", "criterion", "status", "paper", "ours", "interval", "seeds", "evidence", "measured")
Row = dict[str, Any]


# ---------- chapters/10_toolbox.py · From a measurement to a verdict

def compare_to_bound(relation: str, bound: float, interval: list[float], seeds: dict[str, float]) -> str:
    "'holds', 'fails' or 'unclear': is the effect `relation` ('>' or '<') the bound, by its interval and every seed?"
    def beyond(x: float) -> bool:
        return x > bound if relation == ">" else x < bound

    if len(seeds) < 3:
        return "unclear"
    if all(map(beyond, interval)) and all(map(beyond, seeds.values())):
        return "holds"
    return "unclear" if any(map(beyond, interval)) else "fails"

def agree(paper: Any, ours: Any, tolerance: float) -> bool:
    "Whether two plain values have the same shape and differ by at most `tolerance`, and float rounding, per number."
    if isinstance(paper, dict) and isinstance(ours, dict):
        return paper.keys() == ours.keys() and all(agree(paper[key], ours[key], tolerance) for key in paper)
    if isinstance(paper, list) and isinstance(ours, list):
        return len(paper) == len(ours) and all(agree(p, o, tolerance) for p, o in zip(paper, ours, strict=True))
    if {type(paper), type(ours)} <= {int, float}:
        return abs(paper - ours) <= tolerance + 1e-12 * max(abs(paper), abs(ours))
    return type(paper) is type(ours) and paper == ours

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?"
GRAMMAR = (
    "= paper", "= paper ± 0.01", "preset", "> 0", "< 0.05", "runs at scale", "illustrated", "not reproducible: why",
)


def status_of(row: Row) -> str:
    "The verdict a row's criterion and measurement imply; ValueError when the row lacks what its criterion needs."
    criterion, paper, ours, evidence = row["criterion"], row["paper"], row["ours"], row["evidence"]

    def need(met: bool, what: str) -> None:
        if not met:
            raise ValueError(f"{row['item']}, {row['claim']!r}: the criterion {criterion!r} needs {what}")

    need(evidence is not None or criterion.startswith("not reproducible"), "evidence: 'path' or 'path::name'")
    if match := re.fullmatch(rf"= paper(?: ± ({NUMBER}))?", criterion):
        need(paper is not None and ours is not None, "paper and ours")
        return "exact" if agree(paper, ours, float(match[1] or 0)) else "slip"
    if match := re.fullmatch(rf"([<>]) (-?{NUMBER})", criterion):
        need(type(ours) in (int, float), f"ours to be one number, not {ours!r}")
        need(bool(row["interval"] and row["seeds"]), "an interval, and seeds as {seed: its effect}")
        low, high = row["interval"]
        need(low - 1e-9 <= ours <= high + 1e-9, f"ours inside its interval, not {ours!r} and {row['interval']}")
        effects = row["seeds"].values()
        need(min(effects) - 1e-9 <= ours <= max(effects) + 1e-9, f"ours among its seeds, not {ours!r}, {row['seeds']}")
        return compare_to_bound(match[1], float(match[2]), row["interval"], row["seeds"])
    if criterion == "preset":
        need(paper is not None and agree(paper, ours, 0), f"ours equal to paper, not {ours!r} and {paper!r}")
        need("::" in evidence, f"evidence that names the line, as in 'llama2lib/optim.py::eps', not {evidence!r}")
        return "preset"
    if criterion == "runs at scale":
        need(bool(re.fullmatch(r"tests/(\w+/)*test_\w+\.py::test_\w+", evidence)),
             f"evidence like 'tests/test_x.py::test_y', not {evidence!r}")
        return "runs at scale"
    if criterion == "illustrated":
        need(bool(re.fullmatch(r"figures/[\w.-]+", evidence)),
             f"evidence like 'figures/figure_09.png', not {evidence!r}")
        return "illustrated"
    if re.fullmatch(r"not reproducible: \S.*", criterion):
        return "not reproducible"
    raise ValueError(f"{row['item']}, {row['claim']!r}: unknown criterion {criterion!r}; expected one like {GRAMMAR}")


# ---------- chapters/10_toolbox.py · Evidence

def missing_evidence(row: Row) -> str | None:
    "What a row's evidence names and the repository lacks, as one line; None when all is there."
    if row["evidence"] is None:
        return None
    path, _, name = row["evidence"].partition("::")
    file = (ROOT / path).resolve()
    if not file.is_relative_to(ROOT.resolve()) or Path(path).is_absolute():
        return f"{path} lies outside the repository"
    if not file.is_file():
        return f"there is no file {path}"
    left, right = (r"(?<!\w)" if name[:1].isalnum() else ""), (r"(?!\w)" if name[-1:].isalnum() else "")
    if name and not re.search(left + re.escape(name) + right, file.read_text("utf-8")):
        return f"{path} does not mention {name!r}"
    return None


# ---------- chapters/10_toolbox.py · Recording

def plain(value: Any, what: str) -> Any:
    "`value` as JSON has it; 0-d arrays, tensors and tuples are welcome, other types, NaN and infinity a ValueError."
    value = value.item() if getattr(value, "ndim", None) == 0 else value
    if value is None or isinstance(value, bool | str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [plain(part, what) for part in value]
    if isinstance(value, dict) and all(hasattr(key, "__index__") or isinstance(key, str) for key in value):
        return {str(key): plain(part, what) for key, part in value.items()}
    raise ValueError(f"{what}: expected finite numbers, text, or lists and dictionaries of them, found {value!r}")


def judged(row: Row) -> Row:
    "`row` with its status computed; ValueError, saying what was expected, when a field is not of its kind."
    if list(row) != list(FIELDS):
        raise ValueError(f"expected a row with the fields {', '.join(FIELDS)}, found {', '.join(row)}")
    item, where = row["item"], f"{row['item']}, {row['claim']!r}"
    if item not in ITEMS and not re.fullmatch(r"Section ([1-7]|A)(\.\d+){0,2}", str(item)):
        raise ValueError(f"item: expected one like 'Table 9', 'Figure 13', 'Equation 2', 'Section 2.2', found {item!r}")
    for name in ("claim", "criterion", "evidence", "measured"):
        text = row[name]
        one_line = isinstance(text, str) and text.strip() and "\n" not in text
        if not one_line and not (name == "evidence" and text is None):
            raise ValueError(f"{where}: expected {name} to be one line of text, found {text!r}")
    interval, seeds = row["interval"], row["seeds"]
    if interval is not None and not (
        isinstance(interval, list) and [type(x) in (int, float) for x in interval] == [True, True]
        and interval[0] <= interval[1]
    ):
        raise ValueError(f"{where}: expected interval to be (low, high), found {interval!r}")
    if seeds is not None and not (isinstance(seeds, dict) and all(type(x) in (int, float) for x in seeds.values())):
        raise ValueError(f"{where}: expected seeds to be {{seed: its effect}}, found {seeds!r}")
    return row | {"status": status_of(row)}

def rows_folder() -> Path:
    "Where rows wait to be merged; runs with seeds of their own (`LLAMA2_SEEDS`) have a folder of their own."
    chosen = os.environ.get("LLAMA2_SEEDS", "")
    return cache_folder() / ("ledger" + "-".join(["", *re.findall(r"\d+", chosen)]))


def row_file(item: str, claim: str) -> Path:
    "The cache file of one row: readable item, hash of the key."
    digest = hashlib.sha256(f"{item}\n{claim}".encode()).hexdigest()[:12]
    return rows_folder() / f"{re.sub(r'[^a-z0-9]+', '-', item.lower())}-{digest}.json"


def record(item: str, claim: str, criterion: str, paper: Any, ours: Any, interval: tuple[float, float] | None = None,
           seeds: dict[int, float] | None = None, evidence: str | None = None) -> Row:
    """Judge one claim, store its row in the cache (except at the smoke scale), and return the row.

    `ours`, `interval` (95 %, of the paired difference) and `seeds` ({seed: effect}) are in the unit of the bound.
    ValueError when a field does not fit the criterion, or when the evidence is not there.
    """
    values = {"item": item, "claim": claim, "criterion": criterion, "status": None, "paper": paper, "ours": ours,
              "interval": interval, "seeds": seeds, "evidence": evidence,
              "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    row = judged({name: plain(value, f"{item}, {claim!r}: {name}") for name, value in values.items()})
    smoke = scale() == "smoke"
    gone = missing_evidence(row)
    if gone and not (smoke and row["evidence"].startswith("figures/")):     # smoke draws no figures
        raise ValueError(f"{item}, {claim!r}: {gone}")
    if not smoke:
        write_atomic(row_file(item, claim), as_json([row]))
    return row


def as_json(rows: list[Row]) -> str:
    "Rows as text: one field a line, so that a changed verdict is a changed line."
    return "[\n" + ",\n".join(
        "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in row.items()) + "\n}"
        for row in rows
    ) + "\n]\n"


# ---------- chapters/10_toolbox.py · Merging

def read_rows(path: Path) -> dict[tuple[str, str], Row]:
    "The rows of a file by (item, claim); ValueError naming the file when it is damaged or a status does not follow."
    try:
        rows = json.loads(path.read_text("utf-8"))
        for row in rows:
            if judged(row)["status"] != row["status"]:
                raise ValueError(f"{row['claim']!r} has the status {row['status']!r}, its measurement another")
        keyed = {(row["item"], row["claim"]): row for row in rows}
        if len(keyed) != len(rows):
            raise ValueError(f"a claim comes twice in {sorted(row['claim'] for row in rows)}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({error}); restore it, or delete it and record again") from error
    return keyed


def in_order(row: Row) -> tuple:
    "Sort key: tables, figures, equations, sections, each by number, then by claim, numbers in it by size."
    kind, number = row["item"].split(" ", 1)
    parts = [(part.isalpha(), part if part.isalpha() else int(part)) for part in number.split(".")]
    pieces = filter(None, re.split(r"(\d+)", row["claim"]))
    claim = [(piece.isdigit(), int(piece) if piece.isdigit() else piece) for piece in pieces]
    return ("Table", "Figure", "Equation", "Section").index(kind), parts, claim


def load() -> list[Row]:
    "All rows of figures/ledger.json, in order; empty before the first merge."
    path = ROOT / "figures" / "ledger.json"
    return sorted(read_rows(path).values(), key=in_order) if path.exists() else []

def merge(compare: bool = False, since: str | None = None) -> list[Row]:
    """Merge the recorded rows into figures/ledger.json and rewrite figures/README.md and the README's ledger block.

    Args:
        compare: only report the verdicts that would flip, and write nothing.
        since: all chapters ran since this UTC time (ISO 8601); rows that none of them recorded are dropped.
    """
    book, current = {(row["item"], row["claim"]): row for row in load()}, set()
    for path in sorted(rows_folder().glob("*-????????????.json")):
        for key, row in read_rows(path).items():
            old = book.get(key)
            current |= {key} if since is None or row["measured"] >= since else set()
            if old and (row["measured"] < old["measured"] or row | {"measured": old["measured"]} == old):
                continue
            if old and old["status"] != row["status"]:
                print(f"{row['item']}, {row['claim']!r}: {old['status']} -> {row['status']}")
            book[key] = row
    for key, row in list(book.items()):
        if gone := missing_evidence(row) or (since and key not in current and "no chapter records it any more"):
            print(f"left out {row['item']}, {row['claim']!r}: {gone}")
            del book[key]
    rows = sorted(book.values(), key=in_order)
    if compare or scale() == "smoke":
        print(f"{len(rows)} rows compared, nothing written")
        return rows
    readme = with_block(ROOT / "README.md", summary(rows))
    write_atomic(ROOT / "figures" / "ledger.json", as_json(rows))
    write_atomic(ROOT / "figures" / "README.md", gallery(rows))
    write_atomic(ROOT / "README.md", readme)
    print(f"{len(rows)} rows in figures/ledger.json")
    return rows


def cli() -> None:
    "python -m llama2lib.ledger [--compare] [--since TIME]"
    tyro.cli(merge)


# ---------- chapters/10_toolbox.py · Showing it

def cell(value: Any) -> str:
    "A value as the text of one Markdown table cell, at most about 80 characters."
    if isinstance(value, float | int) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    if isinstance(value, list):
        text = ", ".join(map(cell, value))
    elif isinstance(value, dict):
        text = ", ".join(f"{key}: {cell(part)}" for key, part in value.items())
    else:
        text = {None: "–", True: "yes", False: "no"}.get(value, str(value))
    text = re.sub(r"(?<!\\)\|", r"\\|", text)
    return text if len(text) <= 80 or isinstance(value, str) else text[:79] + "…"


def table(header: list[str], lines: list[list[Any]]) -> str:
    "A Markdown table."
    rows = [header, ["---"] * len(header), *([cell(value) for value in line] for line in lines)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

def summary(rows: list[Row]) -> str:
    "The README's block: how many rows have each status."
    counts = Counter(row["status"] for row in rows)
    covered = len({row["item"] for row in rows} & ITEMS.keys())
    return (
        f"[{len(rows)} claims](figures/README.md) on {covered} of the paper's {len(ITEMS)} tables, figures and "
        "equations, each with our measurement and its verdict:\n\n"
        + table([*filter(counts.get, STATUSES)], [[*filter(None, map(counts.get, STATUSES))]])
    )


def with_block(path: Path, block: str, name: str = "ledger") -> str:
    "The text of `path` with `block` between the two markers of this name; ValueError when it lacks them."
    text = path.read_text("utf-8") if path.exists() else ""
    before, start, rest = text.partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    if not (start and end):
        raise ValueError(f"{path.name}: expected the two lines <!-- {name} --> and <!-- /{name} -->")
    return before + start + block + end + after

def gallery(rows: list[Row]) -> str:
    "figures/README.md: every figure with the verdicts it bears on, then all rows, item by item."
    def title(item: str) -> str:
        return f"{item} · {ITEMS[item].title} ({ITEMS[item].section})" if item in ITEMS else item

    def shows(name: str) -> list[Row]:
        match = re.match(r"(table|figure|equation)_0*(\d+)(?!\d)", name)
        item = f"{match[1].title()} {match[2]}" if match else None
        return [row for row in rows if row["item"] == item or row["evidence"] == f"figures/{name}"]

    text = "# Figures and verdicts\n\nWritten by `make ledger`. Criteria precede the runs; verdicts are computed.\n"
    names = [path.name for path in (ROOT / "figures").glob("*") if path.suffix in (".png", ".svg")]
    for name in sorted(names):
        text += f"\n## {Path(name).stem.replace('_', ' ')}\n\n![{Path(name).stem}]({name})\n\n"
        for chapter in (ROOT / "chapters").glob(f"{name[:2]}_*.ipynb"):
            text += f"Drawn and explained in [{chapter.stem}](../chapters/{chapter.name}).\n\n"
        text += "".join(f"- {row['item']}: {cell(row['claim'])}: **{row['status']}**\n" for row in shows(name))
    text += "\n# All rows\n"
    for item in dict.fromkeys(row["item"] for row in rows):
        text += f"\n### {title(item)}\n\n" + table(
            ["claim", "criterion", "paper", "ours", "95 % interval", "seeds", "verdict", "evidence", "measured"],
            [[row["claim"], f"`{row['criterion']}`", row["paper"], row["ours"], row["interval"], row["seeds"],
              f"**{row['status']}**", row["evidence"] and f"[{row['evidence']}](../{row['evidence'].split('::')[0]})",
              row["measured"][:10]] for row in rows if row["item"] == item])
    return text


if __name__ == "__main__":
    cli()
