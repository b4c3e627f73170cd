"""The mini world's comparisons and reward models, at the smoke scale: made of what they say they are."""

import json
import os
import subprocess
import sys

import pytest

from llama2lib.judge import RATINGS
from llama2lib.preferences import SAFETY, check_preference

CODE = """
import hashlib, json
from dataclasses import replace
import torch
from llama2lib import mini, mini_rewards
from llama2lib.mini_rewards import AUXILIARY, comparisons, contrasts, mixture, reward_model, trained
from llama2lib.reward import REWARD, RewardModel, encode_pair, train_reward

def digest(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]

names = [(value, split) for value in mini_rewards.ASKED for split in ("train", "test")]
rows = {" ".join(name): comparisons(0, *name)[0] for name in names}
unused = {value: sum(comparisons(0, value)[1].values()) for value in mini_rewards.ASKED}
some = rows["helpfulness train"][:20]
models = {"helpfulness": reward_model(0), "safety": reward_model(0, "safety"),
          "plain": trained(0, mixture(0, "safety")), "alone": trained(0, some, first=False),
          "some": trained(0, some), "other seed": trained(1, some), "fewer": trained(0, some[:19]),
          "margin": trained(0, some, replace(REWARD["mini"], margin="large")), "small": trained(0, some, size="0.4M")}
both_losses = replace(REWARD["mini"], auxiliary=AUXILIARY)
same = [digest(model) for model in (
    trained(0, mixture(0, "helpfulness")), trained(0, mixture(0, "safety"), both_losses, first=False))]
by_hand = RewardModel.of(mini.chat(1))
recipe = replace(REWARD["mini"], seed=1)
for part in (contrasts(1), some):
    list(train_reward(by_hand, [encode_pair(mini.tokenizer(), row, recipe.margin) for row in part], recipe))
print(json.dumps({"rows": rows, "unused": unused, "batch": mini_rewards.BATCH, "batches": mini_rewards.BATCHES["train"],
                  "mixtures": {value: mixture(0, value) for value in mini_rewards.ASKED},
                  "models": {name: digest(model) for name, model in models.items()}, "by hand": digest(by_hand),
                  "same": same, "small": models["small"].config.dim, "public": contrasts(0)}))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "The same lines in two processes, which share a cache."
    environment = os.environ | {"LLAMA2_SCALE": "smoke", "LLAMA2_CACHE": str(tmp_path_factory.mktemp("cache"))}
    environment["OMP_NUM_THREADS"] = "1"
    told = []
    for _ in range(2):
        ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=300)
        assert ran.returncode == 0, ran.stderr
        told.append((ran.stdout, ran.stderr))
    (first, worked), (again, rested) = told
    assert first == again and "reward model" in worked and "pairs, train" in worked
    assert "reward model" not in rested and "pairs, train" not in rested
    return json.loads(first)


def test_comparisons_are_rows_of_their_value_and_pairs_are_not_lost(made):
    for name, rows in made["rows"].items():
        for row in rows:
            check_preference(row)
            assert row["rating"] in RATINGS and (row["safety"] in SAFETY) == name.startswith("safety")
    for value, batches in made["batches"].items():
        rows = made["rows"][f"{value} train"]
        assert len(rows) + made["unused"][value] == batches * made["batch"]
        assert {row["source"] for row in rows} == {f"batch {n + 1}" for n in range(batches)}


def test_tests_ask_what_training_does_not(made):
    asked = {name: [row["messages"][-1]["content"] for row in rows] for name, rows in made["rows"].items()}
    for value in made["batches"]:
        assert not set(asked[f"{value} train"]) & set(asked[f"{value} test"])
    prompts = asked["helpfulness train"] + asked["safety train"]
    assert len(set(prompts)) > 0.8 * len(prompts)  # every batch draws anew


def test_mixtures_are_the_papers(made):
    helpful, safe = (made["rows"][f"{value} train"] for value in ("helpfulness", "safety"))
    own, pool = helpful[:40], made["public"] + safe
    assert made["mixtures"]["helpfulness"][: len(own)] == own
    others = made["mixtures"]["helpfulness"][len(own) :]
    assert len(others) == min(len(own), len(pool)) and all(row in pool for row in others)
    assert {row["source"] == "public" for row in others} == {True, False}
    assert made["mixtures"]["safety"][: len(safe)] == safe
    others = made["mixtures"]["safety"][len(safe) :]
    assert len(others) == round(len(safe) / 9) and all(row in helpful for row in others)


def test_seed_rows_recipe_and_size_make_the_model(made):
    models = made["models"]
    assert len(set(models.values())) == len(models)
    assert made["by hand"] == models["other seed"] and made["small"] == 64
    assert made["same"] == [models["helpfulness"], models["safety"]]
