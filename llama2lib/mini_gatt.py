"""Generated from chapters/06_gatt.py by chapters/export.py; edit the chapter."""

__all__ = [
    "RULES",
    "TURNS",
    "CONTEXT",
    "ROOM",
    "NEUTRAL",
    "SIZES",
    "RECIPE",
    "instructed",
    "talk",
    "under",
    "third",
    "kept",
    "lessons",
    "learned",
    "obedient",
    "told",
    "GATT_RULES",
    "gatt_contexts",
    "sampled",
    "answers",
    "ARMS",
    "arm_examples",
    "last_span",
    "ghosted",
    "taught",
]


# ---------- chapters/06_gatt.py · On the mini world

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.random import Generator

from llama2lib import mini, synthetic
from llama2lib.checkpoint import load_checkpoint
from llama2lib.dialog import Message, encode_dialog
from llama2lib.gatt import (
    GATT, Context, Instruction, answered, build_gatt_example, contexts, joined, newest_turns, obeying,
)  # fmt: skip
from llama2lib.mini_rlhf import program, state_of
from llama2lib.model import Llama
from llama2lib.recipes import by_scale, cached
from llama2lib.rejection import read_best
from llama2lib.reward import load_scorer
from llama2lib.rollout import Reward
from llama2lib.sft import Batches, Example, sft
from llama2lib.synthetic import CLEAN, OF_KIND, answer, document, documents, follow_up, pick, prompt
from llama2lib.world import Rule

RULES = {"ending": 5, "hobby": 6, "figure": 6, "language": 3}  # kinds of instructions, with weights in the lessons
TURNS = 20  # of the longest conversations that are learned from
CONTEXT = 2048  # tokens; 20 turns have about 1,000
ROOM = CONTEXT - GATT["mini"].max_new_tokens
NEUTRAL = ("You talk with a person.", "This is a chat.", "Be kind.", "Answer in English.")  # ask for nothing
SIZES = by_scale(  # how many there are of each part of the data
    smoke={"short": 40, "long": 4, "neutral": 4, "best": 10, "texts": 40, "said": 20, "contexts": 20, "evaluated": 4},
    laptop={"short": 12000, "long": 200, "neutral": 100, "best": 1500, "texts": 5000, "said": 9000, "contexts": 2000,
            "evaluated": 96},
    a100={"short": 12000, "long": 200, "neutral": 100, "best": 1500, "texts": 5000, "said": 9000, "contexts": 2000,
          "evaluated": 96},
)  # fmt: skip
RECIPE = GATT["mini"].sft


def instructed(
    random: Generator, split: str, kinds: Mapping[str, float] = RULES, shares: Sequence[float] = (1.0,)
) -> tuple[tuple[Rule, ...], Instruction]:
    "Draw an instruction; `kinds`: with weights; `shares`: of instructions of one kind, two different ones …"
    count, weights = 1 + random.choice(len(shares), p=shares), np.array([*kinds.values()]) / sum(kinds.values())
    drawn = random.choice(list(kinds), size=count, replace=False, p=weights)
    rules, long, short = synthetic.instruction(random, split, tuple(map(str, drawn)))
    return rules, Instruction(long, short)


def talk(
    random: Generator,
    turns: int,
    split: str = "train",
    rules: tuple[Rule, ...] = (),
    quality: dict[str, float] = CLEAN,
    kinds: dict[str, float] = mini.KINDS,
) -> list[Message]:
    "A conversation of so many turns, without a system message, whose answers obey `rules`."
    messages, task = [], None
    for _ in range(turns):
        if task is not None and task.kind in OF_KIND and random.random() < 0.5:
            text, task = follow_up(random, task, split)
        else:
            text, task = prompt(random, pick(random, kinds), split, rules)
        reply = answer(random, task, pick(random, quality), random.random() < 0.3, split)
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]
    return messages


def under(text: str, messages: Sequence[Message]) -> list[Message]:
    "A conversation with a system message."
    return [{"role": "system", "content": text}, *messages]


def third(seed: int) -> tuple[Llama, list[list[Message]], str]:
    "Chapter 05's third version with a longer context, the best answers up to it, and its helpfulness model's folder."
    config = program(seed)
    state = state_of(config, min(3, len(config.versions)), "tune")
    short = load_checkpoint(state["model"])
    model = Llama(replace(short.config, max_seq_len=CONTEXT))
    model.load_state_dict(short.state_dict())
    return model, [row.dialog for path in state["best"] for row in read_best(path)], state["helpfulness"]


def kept(seed: int, stage: int, best: Sequence[Sequence[Message]], said: int = 0) -> list[Example]:
    "Examples that keep up what a model can and knows: best answers, and texts of the mini world."
    random, words = np.random.default_rng([62, seed, stage]), mini.tokenizer()
    chosen = [best[i] for i in random.permutation(len(best))[: SIZES["best"]]]
    texts = documents(random, SIZES["texts"]) + [document(random, "said") for _ in range(said)]
    rows = [words.encode(text, bos=True, eos=True) for text in texts]
    return [encode_dialog(words, dialog) for dialog in chosen] + [(row, [0] + [1] * (len(row) - 1)) for row in rows]


def lessons(seed: int) -> list[list[Message]]:
    "Conversations whose instruction stands in front of every answer that has to obey it."
    random, found = np.random.default_rng([63, seed]), []
    for turns, count in ((1, SIZES["short"]), (None, SIZES["long"])):
        for number in range(count):
            rules, both = instructed(random, "train", shares=(0.3, 0.35, 0.35) if turns else (0.75, 0.25))
            text = both.long if random.random() < 0.5 else both.short
            quality = {"full": 0.4, "terse": 0.6} if turns else CLEAN
            messages = talk(random, turns or int(random.integers(2, TURNS + 1)), "train", rules, quality)
            found.append(under(text, messages) if turns and number % 2 else joined(messages, text))
    for _ in range(SIZES["neutral"]):
        found.append(under(pick(random, NEUTRAL), talk(random, int(random.integers(2, TURNS + 1)))))
    return found


def learned(model: Llama, examples: Sequence[Example], lr: float, seed: int, title: str) -> dict:
    "Weights and losses after fine-tuning on examples that fit a row; the longer ones are left out."
    recipe = replace(RECIPE, lr=lr, seed=seed)
    fitting = [example for example in examples if len(example[0]) <= recipe.max_seq_len]
    losses = mini.watched(sft(model, fitting, recipe), len(Batches(fitting, recipe)), title)
    return {"weights": model.state_dict(), "loss": losses}


def obedient(inputs: dict) -> dict:
    "Weights of the third version after it has learned to follow instructions; `inputs`: seed, lr, sizes."
    model, best, _ = third(inputs["seed"])
    words = mini.tokenizer()
    examples = [encode_dialog(words, dialog) for dialog in lessons(inputs["seed"])]
    examples += kept(inputs["seed"], 0, best, inputs["sizes"]["said"])
    return learned(model, examples, inputs["lr"], inputs["seed"], "instructions")


def told(seed: int) -> Llama:
    "The third version of a seed after it has learned to follow the instruction in front of it."
    model = third(seed)[0]
    inputs = {"seed": seed, "lr": 1e-3, "sizes": SIZES}
    model.load_state_dict(cached(f"gatt-told-seed{seed}", inputs, obedient)["weights"])
    return model


GATT_RULES = {"ending": 1, "hobby": 1, "figure": 1, "language": 2}  # kinds of Ghost Attention's instructions


def gatt_contexts(seed: int, kinds: Mapping[str, float]) -> tuple[list[list[Message]], list[Context]]:
    "Conversations of 2 to 20 turns, and each cut somewhere, with an instruction of these kinds."
    random = np.random.default_rng([64, seed])
    dialogs = [talk(random, int(random.integers(2, TURNS + 1))) for _ in range(SIZES["contexts"])]
    instructions = [instructed(random, "train", kinds, (0.6, 0.4))[1] for _ in range(SIZES["contexts"])]
    return dialogs, contexts(dialogs, instructions, mini.tokenizer(), ROOM, seed)


def sampled(inputs: dict) -> dict:
    "Each cut conversation with its best sample, None where none ended; `inputs`: seed, kinds, recipe, sizes."
    seed, recipe, model, words = inputs["seed"], inputs["recipe"], told(inputs["seed"]), mini.tokenizer()
    cuts = gatt_contexts(seed, inputs["kinds"])[1]
    limits = ROOM, recipe.max_new_tokens, recipe.temperature
    cuts = obeying(model, words, cuts, recipe.obeying, *limits, seed)
    judge = Reward(newest_turns(load_scorer(third(seed)[2]), recipe.judged_turns))
    settings = recipe.samples, recipe.temperature, recipe.top_p, recipe.max_new_tokens
    best = {
        id(cut.messages): [*cut.messages, {"role": "assistant", "content": text}]
        for cut, text, _ in answered(model, words, cuts, judge, *settings, list(range(len(cuts))))
    }
    return {"dialogs": [best.get(id(cut.messages)) for cut in cuts]}


def answers(seed: int, kinds: Mapping[str, float] = GATT_RULES) -> list[list[Message] | None]:
    "What `sampled` gives."
    inputs = {"seed": seed, "kinds": kinds, "recipe": GATT["mini"], "sizes": SIZES}
    return cached(f"gatt-samples-seed{seed}", inputs, sampled)["dialogs"]


ARMS = {  # what is learned from, and which of its answers count
    "Ghost Attention": "the instruction as system message; the sampled answer",
    "earlier answers as written": "the same, as in the paper: no earlier answer obeys",
    "all answers": "the same; all answers, as in chapter 03",
    "instruction on every turn": "the instruction where it was for sampling; the sampled answer",
    "plain": "a system message that asks for nothing; all written answers",
    "last answer": "a system message that asks for nothing; the last written answer",
    "without endings": "Ghost Attention, of hobbies, figures and languages alone",
}


def arm_examples(seed: int, arm: str) -> list[Example]:
    "The examples of one of ARMS."
    words, examples = mini.tokenizer(), []
    kinds = GATT_RULES if arm != "without endings" else {k: n for k, n in GATT_RULES.items() if k != "ending"}
    dialogs, cuts = gatt_contexts(seed, kinds)
    for number, (dialog, cut, talked) in enumerate(zip(dialogs, cuts, answers(seed, kinds), strict=True)):
        if talked is None:
            continue
        written = under(NEUTRAL[number % len(NEUTRAL)], dialog[: len(talked)])
        match arm:
            case "earlier answers as written":
                examples.append(build_gatt_example(words, [*cut.messages, talked[-1]], cut.system))
            case "all answers":
                examples.append(encode_dialog(words, under(cut.system, talked)))
            case "instruction on every turn":
                tokens, mask = encode_dialog(words, joined(talked, cut.instruction))
                examples.append((tokens, last_span(mask)))
            case "plain":
                examples.append(encode_dialog(words, written))
            case "last answer":
                tokens, mask = encode_dialog(words, written)
                examples.append((tokens, last_span(mask)))
            case _:
                examples.append(build_gatt_example(words, talked, cut.system))
    return examples


def last_span(mask: Sequence[int]) -> list[int]:
    "A mask of answers with the last one alone."
    begin = len(mask) - [*reversed(mask), 0].index(0)
    return [0] * begin + [1] * (len(mask) - begin)


def ghosted(inputs: dict) -> dict:
    "Weights and losses after one of ARMS; `inputs`: seed, arm, recipe, sizes."
    seed = inputs["seed"]
    examples = arm_examples(seed, inputs["arm"]) + kept(seed, 1, third(seed)[1])
    return learned(told(seed), examples, inputs["recipe"].lr, seed, inputs["arm"])


def taught(seed: int, arm: str = "Ghost Attention") -> Llama:
    "The model of a seed after one of ARMS."
    model = third(seed)[0]
    inputs = {"seed": seed, "arm": arm, "recipe": RECIPE, "sizes": SIZES}
    model.load_state_dict(cached(f"gatt-arm-seed{seed}", inputs, ghosted)["weights"])
    return model
