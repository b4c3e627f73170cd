"""Generated from chapters/05_rlhf.py by chapters/export.py; edit the chapter."""

__all__ = [
    "TAGGED",
    "PROMPTS",
    "HELD_OUT",
    "PROGRAM",
    "asked",
    "program",
    "state_of",
]


# ---------- chapters/05_rlhf.py · On the mini world

import json
from dataclasses import replace

import numpy as np
from filelock import FileLock

from llama2lib import mini, mini_rewards
from llama2lib.checkpoint import save_checkpoint
from llama2lib.preferences import write_preferences
from llama2lib.recipes import by_scale, cache_folder, scale, source_digest
from llama2lib.rlhf import RLHF, RLHFConfig, run
from llama2lib.rollout import Prompt, write_prompts
from llama2lib.synthetic import HELPFUL, dialogues

TAGGED = 0.25  # share of adversarial prompts
PROMPTS = by_scale(smoke=64, laptop=20_000, a100=20_000)  # of the program
HELD_OUT = by_scale(smoke=16, laptop=400, a100=400)
PROGRAM = RLHF["mini"]
if scale() == "smoke":
    PROGRAM = replace(PROGRAM, batch=24, best=16)
    PROGRAM = replace(PROGRAM, versions=("collect reward reject tune", "collect reward bag tune ppo"))
    PROGRAM = replace(PROGRAM, ppo=replace(PROGRAM.ppo, iterations=2, batch=8, minibatch=4, every=1))


def asked(seed: int, number: int, count: int, split: str = "train", tagged: float = TAGGED) -> list[Prompt]:
    "Prompts of a seed, the `number`-th draw; a share of them adversarial, and tagged."
    random, harmful = np.random.default_rng([30, seed, number]), round(tagged * count)
    found = []
    for kinds, tag, size in ((HELPFUL, False, count - harmful), ({"adversarial": 1.0}, True, harmful)):
        drawn = dialogues(random, size, split, kinds, {"full": 1.0}, turns=(0.7, 0.2, 0.1), instructed=0.1)
        found += [Prompt(messages[:-1], tag) for messages in drawn]
    return [found[i] for i in random.permutation(count)]


def program(seed: int) -> RLHFConfig:
    "The program of a seed; makes what is not there yet, in the folder `out`, one process at a time."
    place = cache_folder() / "mini" / f"rlhf-{scale()}-seed{seed}-{source_digest('import llama2lib.mini_rlhf')[:12]}"
    config = replace(
        PROGRAM, model=str(place / "chat"), comparisons=place / "comparisons", public=place / "public.jsonl",
        prompts=place / "prompts.jsonl", held_out=place / "held-out.jsonl", out=place / "program", seed=seed,
    )  # fmt: skip
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / "lock"):  # two notebooks may want it at the same time
        if not (place / "held-out.jsonl").exists():
            save_checkpoint(mini.chat(seed), place / "chat", mini.tokenizer())
            write_preferences(place / "public.jsonl", mini_rewards.contrasts(seed))
            for value, most in (("helpfulness", mini_rewards.PAIRS), ("safety", None)):
                rows = mini_rewards.comparisons(seed, value)[0][:most]
                write_preferences(place / "comparisons" / f"{value}.jsonl", rows)
            write_prompts(place / "prompts.jsonl", asked(seed, 0, PROMPTS))
            write_prompts(place / "held-out.jsonl", asked(seed, 1, HELD_OUT, "test"))
        run(config)
    return config


def state_of(config: RLHFConfig, version: int, stage: str = "*") -> dict:
    "The state behind a version, or behind the last stage of a kind in it: model, reward models, files (see `rlhf`)."
    if not version:
        return {"model": config.model}
    done = config.out.joinpath(f"V{version}").glob(f"*-{stage}/done.json")
    return json.loads(max(done, key=lambda path: int(path.parent.name.split("-")[0])).read_text("utf-8"))
