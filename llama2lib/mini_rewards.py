"""Generated from chapters/04_reward_model.py by chapters/export.py; edit the chapter."""

__all__ = [
    "ASKED",
    "BRIEF",
    "TEMPERATURES",
    "TURNS",
    "TRAIN",
    "TEST",
    "written",
    "variants",
    "collected",
    "comparisons",
    "fitted",
    "fit",
    "loaded",
    "mixture",
]


# ---------- chapters/04_reward_model.py · Comparisons and reward models of the mini world

from collections.abc import Sequence

from dataclasses import replace

import numpy as np
from tqdm import tqdm

from llama2lib import mini
from llama2lib.chat import Reply
from llama2lib.dialog import Message
from llama2lib.judge import read_task
from llama2lib.preferences import Answerer, Preference, collect, helpfulness_mix, safety_mix, sampler
from llama2lib.recipes import by_scale, cached
from llama2lib.reward import REWARD, RewardConfig, RewardModel, encode_pair, score_pairs, train_reward
from llama2lib.synthetic import HELPFUL, MIXED, answer, dialogues, pick

ASKED = {"helpfulness": HELPFUL, "safety": {"adversarial": 1.0}}  # what annotators of either kind ask
BRIEF = {"full": 0.3, "terse": 0.35, "repetitive": 0.35}  # answers that the second variant learned from
TEMPERATURES = (0.6, 0.8, 1.0)
TURNS = (0.85, 0.1, 0.05)  # shares of conversations with one, two and three questions
TRAIN = by_scale(
    smoke={"helpfulness": 32, "safety": 16}, laptop={"helpfulness": 20_000, "safety": 8_000},
    a100={"helpfulness": 20_000, "safety": 8_000},
)  # fmt: skip
TEST = by_scale(smoke=32, laptop=3000, a100=3000)  # pairs of either kind


def written(quality: dict[str, float]) -> Answerer:
    "Answers by the world's own writer, of mixed quality."

    def answers(dialogs: Sequence[list[Message]], seed: int) -> list[Reply]:
        random, tasks = np.random.default_rng([10, seed]), map(read_task, dialogs)
        return [Reply(answer(random, task, pick(random, quality), random.random() < 0.3), True) for task in tasks]

    return answers


def variants(seed: int, size: str = "1.3M") -> list[list[Answerer]]:
    "The chat model of a seed and its brief sibling; at the smoke scale, where they know nothing, the world's writer."
    siblings = dialogues(np.random.default_rng([4, seed]), mini.DIALOGUES, kinds=mini.KINDS, quality=BRIEF)
    models = [mini.chat(seed, size), mini.tuned(seed, siblings, size=size)]
    sampled = [[sampler(model, mini.tokenizer(), t) for t in TEMPERATURES] for model in models]
    return by_scale(smoke=[[written(MIXED)], [written(BRIEF)]], laptop=sampled, a100=sampled)


def collected(inputs: dict) -> dict:
    "Comparisons, and why how many were not used; `inputs`: seed, value, split, pairs."
    seed, value, split, pairs = (inputs[name] for name in ("seed", "value", "split", "pairs"))
    random = np.random.default_rng([6, seed, split == "test"])
    drawn = dialogues(random, pairs + pairs // 10 + 8, split, ASKED[value], turns=TURNS)
    asked = [messages[:-1] for messages in drawn]
    rows, unused = collect(variants(seed), asked, value, 2 * seed + (split == "test"), f"{value}, seed {seed}")
    return {"rows": rows[:pairs], "unused": dict(unused)}


def comparisons(seed: int, value: str, split: str = "train") -> list[Preference]:
    "Comparisons of a seed's models, by raters of 'helpfulness' or 'safety', on prompts of a split."
    pairs = TRAIN[value] if split == "train" else TEST
    inputs = {"seed": seed, "value": value, "split": split, "pairs": pairs}
    return cached(f"mini-{value}-{split}-seed{seed}", inputs, collected)["rows"]


def fitted(inputs: dict) -> dict:
    "Weights, accuracy in training, and scores of test pairs; `inputs`: seed, size, recipe, rows, tests."
    seed, size, recipe, words = inputs["seed"], inputs["size"], inputs["recipe"], mini.tokenizer()
    pairs = [encode_pair(words, row, recipe.margin, recipe.max_seq_len) for row in inputs["rows"]]
    model, right = RewardModel.of(mini.chat(seed, size)), []
    steps = train_reward(model, pairs, recipe)
    for step in tqdm(steps, total=recipe.steps(len(pairs)), desc="reward model", unit="step", leave=False):
        right.append(step.accuracy)
    scores = {value: score_pairs(model, words, rows) for value, rows in inputs["tests"].items()}
    return {"weights": model.state_dict(), "accuracy": right, "scores": scores}


def fit(seed: int, rows: Sequence[Preference], recipe: RewardConfig = REWARD["mini"], size: str = "1.3M") -> dict:
    "A reward model that begins with a seed's chat model: weights, accuracy by step, scores [2, N] of both test sets."
    inputs = {"seed": seed, "size": size, "recipe": replace(recipe, seed=seed), "rows": list(rows)}
    inputs["tests"] = {value: comparisons(seed, value, "test") for value in ASKED}
    return cached(f"mini-reward-{size}-seed{seed}", inputs, fitted)


def loaded(weights: dict, size: str = "1.3M") -> RewardModel:
    "A reward model of the mini world with these weights."
    model = RewardModel(mini.SIZES[size])
    model.load_state_dict(weights)
    return model


def mixture(seed: int, value: str) -> list[Preference]:
    "What the reward model of 'helpfulness' or 'safety' learns from: its own comparisons and some of the other's."
    helpful, safe = comparisons(seed, "helpfulness"), comparisons(seed, "safety")
    return helpfulness_mix(helpful, safe, seed) if value == "helpfulness" else safety_mix(safe, helpful, seed)
