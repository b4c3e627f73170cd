"""Comparisons and reward models of the mini world, at the smoke scale: the same each time, and of what they say."""

import os
import subprocess
import sys

CODE = """
from dataclasses import replace
import numpy as np
from llama2lib import mini
from llama2lib.mini_rewards import ASKED, TEST, TRAIN, comparisons, fit, loaded, mixture
from llama2lib.preferences import check_preference
from llama2lib.reward import REWARD, score_pairs

for value in ASKED:
    parts = {split: comparisons(0, value, split) for split in ("train", "test")}
    assert [len(parts[split]) for split in parts] == [TRAIN[value], TEST]
    for row in parts["train"] + parts["test"]:
        check_preference(row)
        assert (row["safety"] is not None) == (value == "safety")
    last = {split: {row["messages"][-1]["content"] for row in rows} for split, rows in parts.items()}
    assert not last["train"] & last["test"]
    assert comparisons(1, value) != parts["train"]
helpful, safe = (comparisons(0, value) for value in ASKED)
mixed = mixture(0, "helpfulness")
assert mixed[: len(helpful)] == helpful and len(mixed) == len(helpful) + len(safe)
assert len(mixture(0, "safety")) == len(safe) + round(len(safe) / 9)
one, other = fit(0, helpful), fit(0, helpful[:20])
model = loaded(one["weights"])
for value in ASKED:
    rows = comparisons(0, value, "test")
    assert np.allclose(score_pairs(model, mini.tokenizer(), rows), one["scores"][value], atol=1e-4)
    assert not np.allclose(one["scores"][value], other["scores"][value])
assert len(one["accuracy"]) == REWARD["mini"].steps(len(helpful)) == 1
small = fit(0, helpful, size="0.4M")
assert loaded(small["weights"], "0.4M").config == mini.SIZES["0.4M"]
print(float(np.sum(one["scores"]["safety"])), float(np.sum(small["scores"]["safety"])))
"""


def test_they_are_what_they_say_and_the_same_each_time(tmp_path):
    environment = os.environ | {"LLAMA2_SCALE": "smoke", "LLAMA2_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    runs = []
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=300)
        assert ran.returncode == 0, ran.stderr
        runs.append(ran)
    assert runs[0].stdout == runs[1].stdout
    assert "reward model" in runs[0].stderr and "reward model" not in runs[1].stderr
