"""All that the benchmarks measured, as one table, for the terminal and the README.

python tests/benchmarks/table.py      reads the files beside this one
"""

import json
from pathlib import Path

from llama2lib.ledger import with_block
from llama2lib.recipes import ROOT, write_atomic

HERE, WIDTHS = Path(__file__).parent, (128, 256, 512)


def stored(name: str) -> tuple[str, list[dict]]:
    "The machine and the rows of a benchmark."
    found = json.loads((HERE / f"{name}.json").read_text("utf-8"))
    return found["machine"], found["results"]


def spread(row: dict) -> str:
    "A ratio, and the lowest and highest of its interleaved runs."
    return f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})"


def lines() -> dict[tuple[str, str], dict[int | None, str]]:
    "{(task, beside what): {width, or None: ratio}}; above 1, this library is faster."
    found: dict[tuple[str, str], dict[int | None, str]] = {}

    def add(task: str, beside: str, width: int | None, text: str):
        found.setdefault((task, beside), {})[width] = text

    for row in stored("results")[1]:
        share = f", {row['share']:.0%}" if "share" in row else ""
        add(row["task"], "transformers", row["width"], spread(row) + share)
    for row in stored("pretraining")[1]:
        add("pretraining loop", "a bare loop of PyTorch", row["width"], f"{row['ratio']:.2f}")
    for row in stored("sft")[1]:
        add("fine-tuning", "TRL's SFTTrainer", row["width"], spread(row["eager"]))
        add("fine-tuning, compiled", "TRL's SFTTrainer", row["width"], spread(row["compiled"]))
    for row in stored("reward")[1]:
        add("reward model", "TRL's RewardTrainer", row["width"], spread(row))
    for row in stored("ppo")[1]:
        add("iteration of PPO", "TRL's PPOTrainer", row["width"], spread(row))
    for row in stored("consolidated")[1]:
        for how, words in (("once", "gathered once"), ("every", "gathered for every token")):
            low, high = (1 / bound for bound in reversed(row[f"{how}_range"]))
            text = spread({"ratio": 1 / row[how], "low": low, "high": high})
            add(f"generation of two processes, {words}", "whole weights on both", row["width"], text)
    for row in stored("evaluate")[1]:  # of a model of the mini world's size, which is 128 wide
        add(row["requests"], "lm-eval's HFLM", 128, spread(row))
    for row in stored("data")[1]:
        beside = "copying an array" if "rows" in row["task"] else "SentencePiece"
        add(row["task"], beside, None, f"{row['ratio']:.2f}")
    return found


def table() -> str:
    "Markdown: a line a task, a column a width."
    head = ["task", "beside", *(f"width {width}" for width in WIDTHS), "no model"]
    rows = [head, ["---"] * len(head)]
    for (task, beside), cells in lines().items():
        rows.append([task, beside, *(cells.get(width, "") for width in (*WIDTHS, None))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def contamination() -> str:
    "Markdown: what the search for contamination takes, by the size of the corpus (two bytes a token)."
    samples = json.loads((HERE / "contamination.json").read_text("utf-8"))["samples"]
    rows = [["corpus (MB)", "sorted in (s)", f"{samples:,} samples looked for in (s)", "peak memory (GB)"], ["---"] * 4]
    for row in stored("contamination")[1]:
        rows.append([f"{row['MB']:,}", *(f"{row[name]:.1f}" for name in ("index", "match", "peak"))])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


if __name__ == "__main__":
    text = f"{table()}\n{contamination()}"
    print(text)
    machine = stored("results")[0]
    write_atomic(ROOT / "README.md", with_block(ROOT / "README.md", f"\n{machine}.\n\n{text}\n", "bench"))
