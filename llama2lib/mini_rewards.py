"""Generated from chapters/04_reward_model.py by chapters/export.py; edit the chapter."""

__all__ = [
    "ASKED",
    "BATCHES",
    "BATCH",
    "PAIRS",
    "TEMPERATURES",
    "OTHER",
    "AUXILIARY",
    "variants",
    "collected",
    "comparisons",
    "learned",
    "trained",
    "mixture",
    "reward_model",
]


# ---------- chapters/04_reward_model.py · On the mini world

from collections import Counter
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from llama2lib import mini
from llama2lib.preferences import Answerer, Preference, collect, helpfulness_mix, safety_mix, sampler
from llama2lib.recipes import by_scale, cached
from llama2lib.reward import REWARD, RewardConfig, RewardModel, encode_pair, train_reward
from llama2lib.synthetic import HELPFUL, dialogues

ASKED = {"helpfulness": HELPFUL, "safety": {"adversarial": 1.0}}  # kinds of prompts for each value
BATCHES = {  # of comparisons, by split
    "train": by_scale(smoke={"helpfulness": 2, "safety": 1}, laptop={"helpfulness": 22, "safety": 6},
                      a100={"helpfulness": 22, "safety": 6}),
    "test": by_scale(smoke={"helpfulness": 1, "safety": 1}, laptop={"helpfulness": 4, "safety": 2},
                     a100={"helpfulness": 4, "safety": 2}),
}  # fmt: skip
BATCH = by_scale(smoke=40, laptop=1000, a100=1000)  # prompts of a batch
PAIRS = by_scale(smoke=40, laptop=20_000, a100=20_000)  # that the final helpfulness model learns from
TEMPERATURES = (0.3, 0.6, 0.9)
OTHER = {"full": 0.3, "terse": 0.35, "repetitive": 0.35}  # qualities that the second variant learns from
AUXILIARY = 1.0  # weight of the safety loss


def variants(seed: int) -> list[list[Answerer]]:
    "The chat model of a seed and its second variant, each at all TEMPERATURES."
    dialogs = dialogues(np.random.default_rng([4, seed]), mini.DIALOGUES, kinds=mini.KINDS, quality=OTHER)
    models = mini.chat(seed), mini.tuned(seed, dialogs)
    return [[sampler(model, mini.tokenizer(), temperature) for temperature in TEMPERATURES] for model in models]


def collected(inputs: dict) -> dict:
    "Comparisons in batches, and why how many pairs were not used; `inputs`: seed, value, split, batches, prompts."
    seed, value, split = inputs["seed"], inputs["value"], inputs["split"]
    answerers, rows, unused = variants(seed), [], Counter()
    for number in tqdm(range(inputs["batches"]), desc=f"{value} pairs, {split}", unit="batch", leave=False):
        drawn = dialogues(np.random.default_rng([20, seed, number]), inputs["prompts"], split, kinds=ASKED[value])
        dialogs = [messages[:-1] for messages in drawn]
        found, left_out = collect(answerers, dialogs, value, 100 * seed + number, f"batch {number + 1}")
        rows, unused = rows + found, unused + left_out
    return {"rows": rows, "unused": dict(unused)}


def comparisons(seed: int, value: str, split: str = "train") -> tuple[list[Preference], dict[str, int]]:
    "Comparisons of answers of the chat model of a seed, of 'helpfulness' or 'safety', and the pairs not used."
    inputs = {"seed": seed, "value": value, "split": split, "batches": BATCHES[split][value], "prompts": BATCH}
    found = cached(f"mini-pairs-{value}-{split}-seed{seed}", inputs, collected)
    return found["rows"], found["unused"]


def learned(inputs: dict) -> dict:
    "Weights and losses of a reward model; `inputs`: seed and size of its chat model, recipe, rows."
    recipe, words = inputs["recipe"], mini.tokenizer()
    pairs = [encode_pair(words, row, recipe.margin, recipe.max_seq_len) for row in inputs["rows"]]
    model = RewardModel.of(mini.chat(inputs["seed"], inputs["size"]))
    losses = mini.watched(train_reward(model, pairs, recipe), recipe.steps(len(pairs)), "reward model")
    return {"weights": model.state_dict(), "loss": losses}


def trained(
    seed: int, rows: list[Preference], recipe: RewardConfig = REWARD["mini"], size: str = mini.SIZE
) -> RewardModel:
    "The chat model of a seed after learning to score from comparisons."
    inputs = {"seed": seed, "size": size, "recipe": replace(recipe, seed=seed), "rows": rows}
    model = RewardModel(mini.SIZES[size])
    model.load_state_dict(cached(f"mini-reward-{size}-seed{seed}", inputs, learned)["weights"])
    return model


def mixture(seed: int, value: str) -> list[Preference]:
    "The paper's mixture for the reward model of 'helpfulness' or 'safety' (section 3.2.2)."
    helpful, safe = (comparisons(seed, name)[0] for name in ASKED)
    return helpfulness_mix(helpful, safe, seed) if value == "helpfulness" else safety_mix(safe, helpful, seed)


def reward_model(seed: int, value: str = "helpfulness", size: str = mini.SIZE) -> RewardModel:
    "The final reward model of a seed: of 'helpfulness', by its own pairs; of 'safety', by the mixture and both losses."
    if value == "helpfulness":
        return trained(seed, comparisons(seed, value)[0][:PAIRS], size=size)
    return trained(seed, mixture(seed, value), replace(REWARD["mini"], auxiliary=AUXILIARY), size)
