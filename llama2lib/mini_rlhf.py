"""Generated from chapters/05_rlhf.py by chapters/export.py; edit the chapter."""

__all__ = [
    "TAGGED",
    "ROUND",
    "LOOK",
    "TEMPERATURE",
    "asked",
    "reward",
    "gold",
    "sampled",
    "chosen",
    "went_on",
    "tuned_on",
    "pushed",
    "ppo_tuned",
]


# ---------- chapters/05_rlhf.py · On the mini world

from dataclasses import replace

import numpy as np
from tqdm import tqdm

from llama2lib import mini, mini_rewards
from llama2lib.chat import respond
from llama2lib.dialog import Message, encode_dialog
from llama2lib.judge import scores
from llama2lib.model import Llama
from llama2lib.ppo import PPO, PPOConfig, ppo
from llama2lib.recipes import by_scale, cached
from llama2lib.rejection import Best, best, candidates
from llama2lib.rollout import Prompt, Reward, policy_of, scorer_of, value_of
from llama2lib.sft import SFT, Batches, SFTConfig, sft
from llama2lib.synthetic import prompts

TAGGED = 0.2  # share of adversarial prompts
ROUND = by_scale(smoke=(24, 2), laptop=(1000, 8), a100=(1000, 8))  # prompts and samples of a round
LOOK = by_scale(smoke=20, laptop=250, a100=250)  # prompts of a look at a policy while PPO goes on
TEMPERATURE = 1.0


def asked(seed: int, number: int, count: int, split: str = "train", tagged: float = TAGGED) -> list[Prompt]:
    "Prompts of a seed, the `number`-th draw; a share of them adversarial, and tagged."
    random, harmful = np.random.default_rng([30, seed, number]), round(tagged * count)
    plain = [Prompt(messages, False) for messages in prompts(random, count - harmful, split)]
    drawn = plain + [Prompt(messages, True) for messages in prompts(random, harmful, split, "adversarial")]
    return [drawn[i] for i in random.permutation(count)]


def reward(seed: int, safety: bool = True, value: str = "helpfulness") -> Reward:
    "The reward models of a seed; without `safety`, that of helpfulness alone."
    scorers = [scorer_of(mini_rewards.reward_model(seed, name), mini.tokenizer(), 64) for name in ("helpfulness", "safety")]
    return Reward(*scorers[: 1 + safety])


def gold(model: Llama, these: list[Prompt], temperature: float = TEMPERATURE, seed: int = 0) -> np.ndarray:
    "Gold helpfulness and safety (N 2) of a model's answers to prompts."
    dialogs = [prompt.messages for prompt in these]
    replies = respond(model, mini.tokenizer(), dialogs, 64, temperature, seed=seed)
    return scores(dialogs, [tuple(reply) for reply in replies])


def sampled(inputs: dict) -> dict:
    """The best answers of a policy to prompts; `inputs`: seed, policy (weights), number (of the draw of prompts), count,
    samples, temperature, safety.
    """
    seed, policy = inputs["seed"], mini.loaded(mini.SIZE, inputs["policy"])
    these, rows = asked(seed, inputs["number"], inputs["count"]), []
    model, judge = policy, reward(seed, inputs["safety"])
    parts = [these[i : i + 100] for i in range(0, len(these), 100)]
    for number, part in enumerate(tqdm(parts, desc="rejection sampling", unit="part", leave=False)):
        found = candidates(
            model, mini.tokenizer(), part, judge, inputs["samples"], inputs["temperature"], seed=1000 * inputs["number"] + number
        )
        rows += best(part, found)
    return {"rows": [[row.prompt.messages, row.prompt.is_safety, row.answer, row.reward] for row in rows]}


def chosen(
    seed: int, policy: Llama, number: int = 0, samples: int = ROUND[1], temperature: float = TEMPERATURE, safety: bool = True
) -> list[Best]:
    "A round of rejection sampling with a policy: its best answers."
    inputs = {"seed": seed, "policy": policy.state_dict(), "number": number, "count": ROUND[0], "samples": samples}
    inputs |= {"temperature": temperature, "safety": safety}
    rows = cached(f"mini-best-seed{seed}", inputs, sampled)["rows"]
    return [Best(Prompt(messages, tag), answer, reward) for messages, tag, answer, reward in rows]


def went_on(inputs: dict) -> dict:
    "Weights after fine-tuning on dialogs; `inputs`: policy (weights to begin with), recipe, dialogs."
    model, recipe = mini.loaded(mini.SIZE, inputs["policy"]), inputs["recipe"]
    examples = [encode_dialog(mini.tokenizer(), messages) for messages in inputs["dialogs"]]
    mini.watched(sft(model, examples, recipe), len(Batches(examples, recipe)), "fine-tuning")
    return {"weights": model.state_dict()}


def tuned_on(seed: int, start: Llama, dialogs: list[list[Message]], recipe: SFTConfig = SFT["mini"]) -> Llama:
    "A model after fine-tuning on dialogs, beginning with `start`."
    inputs = {"policy": start.state_dict(), "recipe": replace(recipe, seed=seed), "dialogs": dialogs}
    return mini.loaded(mini.SIZE, cached(f"mini-rs-seed{seed}", inputs, went_on)["weights"])


def pushed(inputs: dict) -> dict:
    """Weights and log of PPO, with looks at gold scores of test prompts; `inputs`: seed, policy (weights), recipe,
    safety, count (of prompts).
    """
    seed, recipe, policy = inputs["seed"], inputs["recipe"], policy_of(mini.loaded(mini.SIZE, inputs["policy"]))
    reference, value = policy_of(policy), value_of(mini_rewards.reward_model(seed))
    judge, these = reward(seed, inputs["safety"]), asked(seed, 100, inputs["count"])
    test = asked(seed, 101, LOOK, "test", 0.0), asked(seed, 102, LOOK // 2, "test", 1.0)
    loop = ppo(policy, reference, value, mini.tokenizer(), these, judge, recipe)
    log, looks = [], []
    for step in tqdm(loop, total=recipe.iterations, desc="PPO", unit="iteration", leave=False):
        log.append({name: float(x) for name, x in step._asdict().items()})
        if (step.step + 1) % recipe.every == 0:
            helpful, safe = (gold(policy, part) for part in test)
            looks.append([step.step + 1, helpful[:, 0].mean(), safe[:, 1].mean()])
    return {"weights": policy.state_dict(), "log": log, "looks": looks}


def ppo_tuned(seed: int, start: Llama, recipe: PPOConfig = PPO["mini"], safety: bool = True, count: int = 4 * ROUND[0]):
    "A model after PPO that begins with `start`, the log, and looks: iteration, gold helpfulness, gold safety."
    inputs = {"seed": seed, "policy": start.state_dict(), "recipe": replace(recipe, seed=seed), "safety": safety}
    found = cached(f"mini-ppo-seed{seed}", inputs | {"count": count}, pushed)
    return mini.loaded(mini.SIZE, found["weights"]), found["log"], found["looks"]
