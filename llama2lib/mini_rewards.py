"""Generated from chapters/04_reward_model.py by chapters/export.py; edit the chapter."""

__all__ = [
    "ASKED",
    "BATCHES",
    "BATCH",
    "PAIRS",
    "CONTRASTS",
    "TEMPERATURES",
    "OTHER",
    "AUXILIARY",
    "variants",
    "collected",
    "comparisons",
    "astray",
    "contrasted",
    "contrasts",
    "learned",
    "trained",
    "bootstrapped",
    "mixture",
    "reward_model",
]


# ---------- chapters/04_reward_model.py · On the mini world

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from tqdm import tqdm

from llama2lib import mini
from llama2lib.chat import Reply
from llama2lib.dialog import Message
from llama2lib.judge import read_task
from llama2lib.preferences import Answerer, Preference, collect, helpfulness_mix, safety_mix, sampler, written
from llama2lib.recipes import by_scale, cached
from llama2lib.reward import REWARD, RewardConfig, RewardModel, encode_pair, train_reward
from llama2lib.synthetic import CLEAN, HELPFUL, answer, dialogues, pick, prompts
from llama2lib.world import Task

ASKED = {"helpfulness": HELPFUL, "safety": {"adversarial": 1.0}}  # kinds of prompts for each value
BATCHES = {  # of comparisons, by split
    "train": by_scale(smoke={"helpfulness": 2, "safety": 1}, laptop={"helpfulness": 22, "safety": 6},
                      a100={"helpfulness": 22, "safety": 6}),
    "test": by_scale(smoke={"helpfulness": 1, "safety": 1}, laptop={"helpfulness": 4, "safety": 2},
                     a100={"helpfulness": 4, "safety": 2}),
}  # fmt: skip
BATCH = by_scale(smoke=40, laptop=1000, a100=1000)  # prompts of a batch
PAIRS = by_scale(smoke=40, laptop=20_000, a100=20_000)  # of its own that the final helpfulness model learns from
CONTRASTS = {  # prompts of the public comparisons, by split
    "train": by_scale(smoke=40, laptop=12_000, a100=12_000),
    "test": by_scale(smoke=20, laptop=1000, a100=1000),
}
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


def astray(dialogs: Sequence[list[Message]], seed: int) -> list[Reply]:
    "Right answers to other questions of the same relation, as an `Answerer`."
    random, tasks = np.random.default_rng([21, seed]), [read_task(messages) for messages in dialogs]
    alike: dict[str, list[Task]] = {}
    for task in tasks:
        alike.setdefault(task.relation, []).append(task)
    others = [pick(random, alike[task.relation]) for task in tasks]
    return [Reply(answer(random, other, "full", random.random() < 0.3), True) for other in others]


def contrasted(inputs: dict) -> list[Preference]:
    "Comparisons of right answers with right answers to other questions; `inputs`: seed, split, prompts."
    asked = prompts(np.random.default_rng([22, inputs["seed"]]), inputs["prompts"], inputs["split"])
    return collect([[written(CLEAN)], [astray]], asked, "helpfulness", inputs["seed"], "public")[0]


def contrasts(seed: int, split: str = "train") -> list[Preference]:
    "The mini world's public comparisons: of a right answer with one that is right for another question of its kind."
    inputs = {"seed": seed, "split": split, "prompts": CONTRASTS[split]}
    return cached(f"mini-contrasts-{split}-seed{seed}", inputs, contrasted)


def learned(inputs: dict) -> dict:
    "Weights and losses of a reward model; `inputs`: seed and size of its chat model, bootstrapped, recipe, rows."
    recipe, words, seed, size = inputs["recipe"], mini.tokenizer(), inputs["seed"], inputs["size"]
    pairs = [encode_pair(words, row, recipe.margin, recipe.max_seq_len) for row in inputs["rows"]]
    model = bootstrapped(seed, size) if inputs["bootstrapped"] else RewardModel.of(mini.chat(seed, size))
    losses = mini.watched(train_reward(model, pairs, recipe), recipe.steps(len(pairs)), "reward model")
    return {"weights": model.state_dict(), "loss": losses}


def trained(
    seed: int, rows: list[Preference], recipe: RewardConfig = REWARD["mini"], size: str = mini.SIZE, first: bool = True
) -> RewardModel:
    "A reward model that learned from comparisons: from public ones `first`, or else these alone, from the chat model."
    inputs = {"seed": seed, "size": size, "bootstrapped": first, "recipe": replace(recipe, seed=seed), "rows": rows}
    model = RewardModel(mini.SIZES[size])
    model.load_state_dict(cached(f"mini-reward-{size}-seed{seed}", inputs, learned)["weights"])
    return model


def bootstrapped(seed: int, size: str = mini.SIZE) -> RewardModel:
    "The chat model of a seed after learning to score from public comparisons alone."
    return trained(seed, contrasts(seed), size=size, first=False)


def mixture(seed: int, value: str, count: int = PAIRS) -> list[Preference]:
    "The paper's mixture for the reward model of 'helpfulness', with `count` of its own pairs, or 'safety' (3.2.2)."
    helpful, safe = (comparisons(seed, name)[0] for name in ASKED)
    if value == "safety":
        return safety_mix(safe, helpful, seed)
    return helpfulness_mix(helpful[:count], [*contrasts(seed), *safe], seed)


def reward_model(seed: int, value: str = "helpfulness", size: str = mini.SIZE) -> RewardModel:
    "The final reward model of a seed: on the mixture; of 'helpfulness' bootstrapped, of 'safety' with both losses."
    if value == "helpfulness":
        return trained(seed, mixture(seed, value), size=size)
    return trained(seed, mixture(seed, value), replace(REWARD["mini"], auxiliary=AUXILIARY), size, first=False)
