"""Generated from chapters/05_rlhf.py by chapters/export.py; edit the chapter."""

__all__ = [
    "VALUES",
    "RLHFConfig",
    "flags",
    "call",
    "draw",
    "judged",
    "annotated",
    "collect_stage",
    "reward_stage",
    "judges",
    "reject_stage",
    "bag_stage",
    "tune_stage",
    "ppo_stage",
    "STAGES",
    "RLHF",
    "answers_of",
    "measure",
    "record_program",
    "run",
    "cli",
]


# ---------- chapters/05_rlhf.py · The program

import difflib
import hashlib
import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Literal

import numpy as np
import torch
import tyro

from llama2lib import pairs, ppo, rejection, reward, sft
from llama2lib.annotate import export
from llama2lib.chat import Reply, respond
from llama2lib.checkpoint import load_checkpoint
from llama2lib.desk import Desk, Study, read_items
from llama2lib.judge import scores
from llama2lib.launch import one_line_errors
from llama2lib.pairs import PAIRS, PairsConfig
from llama2lib.ppo import PPO, PPOConfig
from llama2lib.preferences import Preference, collect, helpfulness_mix, read_preferences, safety_mix, write_preferences
from llama2lib.pretrain import check_same
from llama2lib.recipes import write_atomic
from llama2lib.rejection import REJECTION, RejectionConfig
from llama2lib.reward import REWARD, RewardConfig, load_scorer
from llama2lib.rollout import Prompt, drawn, read_prompts, untagged, write_prompts
from llama2lib.sft import SFT, SFTConfig
from llama2lib.tokenizer import Tokenizer

VALUES = ("helpfulness", "safety")


@dataclass(frozen=True)
class RLHFConfig:
    """The iterated program: versions of a chat model, each tuned with renewed reward models (section 3.2).

    The parts named pairs, reward, rejection, sft and ppo are the recipes of these stages; folders, files and seeds in
    them are the program's. ValueError for numbers out of range and for unknown stages.
    """

    model: str = "runs/sft/model"  # the chat model's folder to begin with, V0
    base: str | None = None  # the folder that every fine-tuning begins with; none: the version before
    prompts: Path = Path("prompts.jsonl")  # conversations that end with the user, and is_safety
    held_out: Path = Path("held-out.jsonl")  # prompts on which every version is measured, and PPO stopped
    out: Path = Path("runs/rlhf")  # V1, V2 …, each with a folder for every stage, and what was measured
    versions: tuple[str, ...] = (  # the stages of each version
        "collect collect collect collect reward reject tune",
        "collect reward reject tune",
        "collect reward reject tune",
        "collect reward bag tune",
        "collect reward bag tune ppo",
    )
    batch: int = 2000  # prompts of a batch of comparisons
    best: int = 2000  # prompts of a round of rejection sampling
    annotator: Literal["people", "judge"] = "people"  # the judge of chapter 12 knows the mini world alone
    comparisons: Path | None = None  # folder of comparisons that are there (helpfulness.jsonl, safety.jsonl): batch 1
    public: Path | None = None  # public comparisons: helpfulness models learn from them first, and keep them in the mix
    mixed: bool = True  # helpfulness models learn from the comparisons of safety too, as the paper's do
    renew: float = 0.0  # share of their learning rate at which reward models go on learning; 0: they begin anew
    auxiliary: float = 1.0  # weight of the safety loss in the safety model
    temperature: float = 1.0  # of the answers that are measured
    seed: int = 0  # of everything that is drawn
    launcher: str = ""  # in front of "-m llama2lib.sft …", as "torchrun --nproc-per-node 8"; none: in this process

    pairs: PairsConfig = field(default_factory=lambda: PAIRS["paper"])
    reward: RewardConfig = field(default_factory=lambda: REWARD["paper"])
    rejection: RejectionConfig = field(
        default_factory=lambda: replace(REJECTION["paper"], temperatures=(0.7, 0.9, 1.1, 1.3))
    )
    sft: SFTConfig = field(default_factory=lambda: SFT["paper"])
    ppo: PPOConfig = field(default_factory=lambda: PPO["paper"])

    def __post_init__(self):
        if min(self.batch, self.best) < 1 or min(self.temperature, self.renew) < 0:
            found = f"batch {self.batch}, best {self.best}, temperature {self.temperature}, renew {self.renew}"
            raise ValueError(f"{found}: expected at least 1, 1, 0, 0")
        for number, names in enumerate(self.versions, 1):
            for name in names.split():
                if name not in STAGES:
                    close = difflib.get_close_matches(name, STAGES, n=1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise ValueError(f"V{number}: {name!r} is no stage of {', '.join(STAGES)}{hint}")


# ---------- chapters/05_rlhf.py · Stages

def flags(config) -> list[str]:
    "The options of a command line that give a recipe the values of this one."
    words = []
    for part in fields(config):
        name, value = part.name.replace("_", "-"), getattr(config, part.name)
        if is_dataclass(value):
            words += flags(value)
        elif isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else [value])]
    return words


def call(config: RLHFConfig, module: ModuleType, recipe) -> Path:
    "Run a stage's recipe, in this process or by the launcher, and give what it made. RuntimeError if the latter fails."
    if not config.launcher:
        return module.run(recipe)
    command = [*shlex.split(config.launcher), "-m", module.__name__, "paper", *flags(recipe)]
    print("$", shlex.join(command), flush=True)
    if code := subprocess.run(command).returncode:
        raise RuntimeError(f"{module.__name__} failed, with code {code}")
    return Path(recipe.out) / {pairs: "items.jsonl", rejection: "best.jsonl"}.get(module, "model")


def draw(config: RLHFConfig, count: int, step: int, folder: Path, kind: int) -> Path:
    "Write prompts of a step, other ones than of the steps before as long as there are any; `kind` of the draw."
    prompts = read_prompts(config.prompts)
    numbers = drawn(len(prompts), count, step, 10 * config.seed + kind)
    write_prompts(folder / "prompts.jsonl", [prompts[i] for i in numbers])
    return folder / "prompts.jsonl"


def judged(items: Sequence[dict], value: str, seed: int, source: str) -> list[Preference]:
    "Comparisons of items by simulated annotators. ValueError for items that are not of the mini world."
    places = {id(item["messages"]): number for number, item in enumerate(items)}

    def side(which):
        return lambda dialogs, _: [Reply(items[places[id(m)]]["answers"][which], True) for m in dialogs]

    return collect([[side(0)], [side(1)]], [item["messages"] for item in items], value, seed, source)[0]


def annotated(items: dict[str, Sequence[dict]], folder: Path, source: str) -> dict[str, list[Preference]]:
    "Comparisons of items by people, for each value. SystemExit, naming the files, while there are items to annotate."
    rows, waiting = {}, []
    for value, these in items.items():
        desk = Desk(folder / f"{value}.sqlite", Study(source, safety=value == "safety"))
        desk.add(these)
        rows[value], left_out = export(desk, with_unreviewed=True)
        if count := left_out["too few annotations"]:
            waiting.append(f"{count} pairs in {folder / value}.sqlite")
    if waiting:
        how = "see annotate.widget of chapter 13"
        raise SystemExit(f"To be annotated ({how}): {', '.join(waiting)}. Then start the same command again.")
    return rows


def collect_stage(config: RLHFConfig, folder: Path, state: dict) -> dict:
    "A batch of comparisons of the answers of the newest two models (section 3.2.1)."
    number = len(state["batches"])
    prompts = draw(config, config.batch, number, folder, 0)
    known = dict.fromkeys([state["model"], *reversed([config.model, *state["versions"]])])  # the newest first
    variants, out = tuple(known)[:2], folder / "answers"
    recipe = replace(config.pairs, models=variants, prompts=prompts, out=out, seed=config.seed + number)
    items = read_items(call(config, pairs, recipe))
    by_value = {value: [item for item in items if item["is_safety"] == (value == "safety")] for value in VALUES}
    for value, these in by_value.items():
        if not these:
            raise ValueError(f"{prompts}: no two answers to compare for {value}")
    source = f"batch {number + 1}"
    if config.annotator == "judge":
        seed = 1000 * config.seed + number
        rows = {value: judged(these, value, seed, source) for value, these in by_value.items()}
    else:
        rows = annotated(by_value, folder, source)
    for value, comparisons in rows.items():
        write_preferences(folder / f"{value}.jsonl", comparisons)
    return state | {"batches": [*state["batches"], str(folder)]}


def reward_stage(config: RLHFConfig, folder: Path, state: dict) -> dict:
    """Both reward models, begun anew, on all comparisons so far (section 3.2.2).

    With `renew` those that there are go on learning, from the newest comparisons and as many of the older and the
    public ones. ValueError without comparisons, or without new ones.
    """
    known = state.get("learned", 0) if config.renew else 0
    if not state["batches"][known:]:
        raise ValueError("a stage 'reward' needs comparisons: put 'collect' in front of it")
    older, newest = (
        {value: [row for batch in part for row in read_preferences(Path(batch) / f"{value}.jsonl")] for value in VALUES}
        for part in (state["batches"][:known], state["batches"][known:])
    )
    public = read_preferences(config.public) if config.public else []
    others = [*public, *older["helpfulness"]]
    if config.mixed:
        others += older["safety"] + newest["safety"]
    mixtures = {
        "helpfulness": helpfulness_mix(newest["helpfulness"], others, config.seed),
        "safety": safety_mix(
            helpfulness_mix(newest["safety"], older["safety"], config.seed), newest["helpfulness"], config.seed
        ),
    }
    models = {}
    if public and "bootstrapped" not in state:
        recipe = replace(config.reward, model=config.model, data=config.public, out=folder / "public", seed=config.seed)
        models["bootstrapped"] = str(call(config, reward, recipe))
    begin, lr = {"helpfulness": (state | models).get("bootstrapped", state["model"]), "safety": state["model"]}, 1.0
    if known:
        begin, lr = judges(state), config.renew
    for value, mixture in mixtures.items():
        write_preferences(folder / f"{value}.jsonl", mixture)
        recipe = replace(config.reward, model=begin[value], data=folder / f"{value}.jsonl", out=folder / value)
        recipe = replace(recipe, lr=lr * recipe.lr, seed=config.seed)
        recipe = replace(recipe, auxiliary=config.auxiliary if value == "safety" else 0.0)
        models[value] = str(call(config, reward, recipe))
    return state | models | {"learned": len(state["batches"])}


def judges(state: dict) -> dict:
    "The newest reward models' folders, as stages take them. ValueError without any."
    if "helpfulness" not in state:
        raise ValueError("this stage needs reward models: put 'reward' in front of it")
    return {value: state[value] for value in VALUES}


def reject_stage(config: RLHFConfig, folder: Path, state: dict, earlier: Sequence[str] = ()) -> dict:
    "The newest version's best answers by the newest reward models (section 3.2.3)."
    prompts = draw(config, config.best, len(state["best"]), folder, 1)
    recipe = replace(
        config.rejection, model=state["model"], **judges(state), prompts=prompts, earlier=tuple(map(Path, earlier)),
        out=folder, seed=config.seed,
    )  # fmt: skip
    return state | {"best": [*state["best"], str(call(config, rejection, recipe))]}


def bag_stage(config: RLHFConfig, folder: Path, state: dict) -> dict:
    "The best answers of the newest version and of all before it."
    return reject_stage(config, folder, state, state["best"])


def tune_stage(config: RLHFConfig, folder: Path, state: dict) -> dict:
    "Fine-tuning on the newest best answers. ValueError without any."
    if not state["best"]:
        raise ValueError("a stage 'tune' needs best answers: put 'reject' in front of it")
    model, data = config.base or state["model"], Path(state["best"][-1])
    recipe = replace(config.sft, model=model, data=data, out=folder, seed=config.seed)
    return state | {"model": str(call(config, sft, recipe))}


def ppo_stage(config: RLHFConfig, folder: Path, state: dict) -> dict:
    "PPO, which begins with the newest model, and has it for π_0 (section 3.2.3)."
    recipe = replace(
        config.ppo, model=state["model"], **judges(state), prompts=config.prompts, held_out=config.held_out,
        out=folder, seed=config.seed,
    )  # fmt: skip
    return state | {"model": str(call(config, ppo, recipe))}


STAGES: dict[str, Callable[[RLHFConfig, Path, dict], dict]] = {
    "collect": collect_stage,
    "reward": reward_stage,
    "reject": reject_stage,
    "bag": bag_stage,
    "tune": tune_stage,
    "ppo": ppo_stage,
}


# ---------- chapters/05_rlhf.py · The loop

RLHF = {
    "paper": RLHFConfig(),
    "mini": RLHFConfig(
        versions=(
            "reward reject tune",
            "collect collect reward reject tune",
            "collect collect reward reject tune",
            "collect collect reward bag tune",
            "collect collect reward bag tune collect collect reward ppo collect collect reward ppo",
        ),
        batch=1000, best=1000, annotator="judge", mixed=False, renew=0.5,
        pairs=replace(PAIRS["mini"], temperatures=(0.5, 0.8, 1.1)), reward=replace(REWARD["mini"], lr=7e-4),
        rejection=replace(REJECTION["mini"], temperatures=(0.3, 0.4, 0.5)), sft=replace(SFT["mini"], lr=2e-4, epochs=1),
        ppo=replace(PPO["mini"], iterations=20, batch=256, minibatch=64, every=4),
    ),
}  # fmt: skip


def answers_of(folder: str, prompts: Sequence[Prompt], config: RLHFConfig) -> list[dict]:
    "A model's answers to prompts: rows with messages, is_safety, answer, finished."
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_checkpoint(folder, device), Tokenizer(folder)
    dialogs, limit = [prompt.messages for prompt in prompts], config.pairs.max_new_tokens
    replies = respond(model, tokenizer, dialogs, limit, config.temperature, seed=config.seed)
    rows = []
    for prompt, reply in zip(prompts, replies, strict=True):
        text, tidy = untagged(reply.text)
        rows.append(prompt._asdict() | {"answer": text, "finished": reply.finished and tidy})
    return rows


def measure(config: RLHFConfig, version: int, state: dict):
    """Write V…/answers.jsonl, of the newest version, and V…/metrics.json, of all so far.

    In this process and on one device, which holds whole models: the newest version, and then both reward models. 70B in
    bfloat16 does not fit on one GPU. Answers that fill the context are scored as far as they go.
    """
    prompts, found = read_prompts(config.held_out), {}
    for number, folder in enumerate([config.model, *state["versions"]]):
        path = config.out / f"V{number}" / "answers.jsonl"
        if not path.exists():
            rows = answers_of(folder, prompts, config)
            write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        found[f"V{number}"] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    scorers = {value: load_scorer(state[value], device, cut=True) for value in VALUES if value in state}
    metrics = {}
    for name, rows in found.items():
        tagged = np.array([row["is_safety"] for row in rows])
        dialogs = [[*row["messages"], {"role": "assistant", "content": row["answer"]}] for row in rows]
        measured = {value: scorer(dialogs) for value, scorer in scorers.items()}
        if config.annotator == "judge":
            gold = scores([row["messages"] for row in rows], [(row["answer"], row["finished"]) for row in rows])
            measured |= {"gold helpfulness": gold[:, 0], "gold safety": gold[:, 1]}
        metrics[name] = {"finished": float(np.mean([row["finished"] for row in rows]))}
        for value, numbers in measured.items():  # helpfulness where prompts are harmless, safety where they are not
            these = numbers[tagged == value.endswith("safety")]
            metrics[name][value] = float(these.mean()) if len(these) else None
    write_atomic(config.out / f"V{version}" / "metrics.json", json.dumps(metrics, indent=1) + "\n")


def record_program(config: RLHFConfig):
    "Write out/settings.json; ValueError, naming what differs, for a folder of another program. More versions may come."
    path = config.out / "settings.json"
    paths = {name: getattr(config, name) for name in ("prompts", "held_out", "public")}
    if config.comparisons:
        paths |= {f"{value} comparisons": config.comparisons / f"{value}.jsonl" for value in VALUES}
    files = {name: path and hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}
    ours = json.loads(json.dumps(asdict(config) | files | {"launcher": "", "out": "", "comparisons": ""}, default=str))
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        shorter, longer = sorted((found["versions"], ours["versions"]), key=len)
        if longer[: len(shorter)] == shorter:
            found["versions"] = ours["versions"] = longer
        check_same(found, ours, path)
    write_atomic(path, json.dumps(ours, indent=1) + "\n")


def run(config: RLHFConfig) -> Path:
    """Make the versions of `config`, or go on making them; returns the folder of the last one's model.

    A program that is done can be given further versions. ValueError for a folder of another program, for stages in an
    order that cannot work, and as of the stages; SystemExit while annotations are missing.
    """
    record_program(config)
    batches = [str(config.comparisons)] if config.comparisons else []
    state = {"model": config.model, "batches": batches, "best": [], "versions": []}
    for version, names in enumerate(config.versions, 1):
        for place, name in enumerate(names.split(), 1):
            folder = config.out / f"V{version}" / f"{place}-{name}"
            done = folder / "done.json"
            if not done.exists():
                print(f"V{version} {name}", flush=True)
                write_atomic(done, json.dumps(STAGES[name](config, folder, state), indent=1) + "\n")
            state = json.loads(done.read_text("utf-8"))
        state["versions"].append(state["model"])
        if not (config.out / f"V{version}" / "metrics.json").exists():
            measure(config, version, state)
    return Path(state["model"])


@one_line_errors(RuntimeError)
def cli(prog: str = "python -m llama2lib.rlhf"):
    "python -m llama2lib.rlhf RECIPE [options]: versions of a chat model, one after the other (section 3.2)."
    recipes = {
        name: (f"{len(c.versions)} versions, {c.batch} prompts a batch of comparisons", c) for name, c in RLHF.items()
    }
    run(tyro.extras.overridable_config_cli(recipes, prog=prog))


if __name__ == "__main__":
    cli()
