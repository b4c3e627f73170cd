"""Generated from chapters/06_gatt.py by chapters/export.py; edit the chapter."""

__all__ = [
    "CONSTRAINTS",
    "Instruction",
    "combined",
    "read_instructions",
    "QUESTIONS",
    "listed",
    "ask_values",
    "joined",
    "build_gatt_example",
    "Context",
    "within",
    "contexts",
    "newest_turns",
    "answered",
    "converse",
    "obeying",
    "GAttConfig",
    "GATT",
    "write_rows",
    "read_gatt",
    "synthesise",
    "run",
    "stage",
    "cli",
    "attention_weights",
    "attention_map",
    "attention_mass",
]


# ---------- chapters/06_gatt.py · Instructions

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import tyro
from jaxtyping import Float
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record

from llama2lib.chat import fit, respond
from llama2lib.checkpoint import load_checkpoint
from llama2lib.corpus import records
from llama2lib.dialog import Message, check_dialog, encode_dialog, read_dialogs
from llama2lib.distributed import processes
from llama2lib.launch import one_line_errors
from llama2lib.model import Llama, apply_rope
from llama2lib.pretrain import train
from llama2lib.recipes import write_atomic
from llama2lib.rejection import best, candidates
from llama2lib.reward import Scorer, load_scorer
from llama2lib.rlhf import judges
from llama2lib.rollout import Prompt, Reward, in_chunks, record_settings, untagged
from llama2lib.sft import SFT, Batches, Example, SFTConfig, check_example, read_examples, sft
from llama2lib.tokenizer import Tokenizer

CONSTRAINTS = {  # kind: its long wording, and its short one (section 3.3)
    "hobby": ("You enjoy {}.", "Hobby: {}."),
    "language": ("Always speak in {}.", "Language: {}."),
    "figure": ("Always act as {} from now.", "Figure: {}."),
}


class Instruction(NamedTuple):
    "What has to be respected throughout a conversation, in two wordings."

    long: str
    short: str


def combined(values: dict[str, Sequence[str]], count: int, seed: int, most: int = 3) -> list[Instruction]:
    """Draw instructions of one to `most` constraints, of different kinds; `values`: of each kind of CONSTRAINTS.

    ValueError for a kind that is unknown, or without values.
    """
    for kind, names in values.items():
        if kind not in CONSTRAINTS or not names:
            raise ValueError(f"{kind!r} with {len(names)} values: expected some, of {', '.join(CONSTRAINTS)}")
    random, drawn = np.random.default_rng([60, seed]), []
    for _ in range(count):
        kinds = random.permutation(list(values))[: random.integers(1, min(most, len(values)) + 1)]
        chosen = [(kind, str(random.choice(values[kind]))) for kind in kinds]
        drawn.append(Instruction(*(
            " ".join(CONSTRAINTS[kind][form].format(value) for kind, value in chosen) for form in (0, 1)
        )))  # fmt: skip
    return drawn


def read_instructions(path: str | os.PathLike) -> list[Instruction]:
    "The instructions of a JSONL file. ValueError with file, line and field for a row that is none, or without any."
    found = []
    for number, row in records(path):
        texts = [row.get(name) for name in Instruction._fields] if isinstance(row, dict) else [None]
        if not all(isinstance(text, str) and text.strip() for text in texts):
            raise ValueError(f"{path}:{number}: expected an object with two texts, 'long' and 'short'")
        found.append(Instruction(*texts))
    if not found:
        raise ValueError(f"{path}: no instructions; expected a JSON object a line")
    return found


# ---------- chapters/06_gatt.py · Lists from the model itself

QUESTIONS = {
    "hobby": "Write a list of {} hobbies. One a line, nothing else.",
    "language": "Write a list of {} languages that you speak. One a line, nothing else.",
    "figure": "Write a list of {} famous public figures. One a line, nothing else.",
}


def listed(text: str) -> list[str]:
    "The items of a list in a text: lines with numbers or bullets, or plain ones, or one line with commas."
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    marked = [match[1] for line in lines if (match := re.match(r"(?:\d+[.):]|[-*•])\s+(.*)", line))]
    items = marked or (re.split(r",\s*(?:and\s+)?|\s+and\s+", lines[-1]) if len(lines) == 1 else lines)
    names = (re.split(r"\s*[:(–]|\s-\s", item)[0].strip(" .,;*\"'") for item in items)
    return [name for name in names if name and len(name.split()) <= 4]


def ask_values(
    model: Llama, tokenizer: Tokenizer, count: int, max_new_tokens: int = 512, seed: int = 0, tries: int = 8
) -> dict[str, list[str]]:
    """Up to `count` values of every kind of CONSTRAINTS, by what a chat model lists when asked `tries` times.

    Those named most often come first. ValueError, with an answer, for a model that lists fewer than two.
    """
    found = {}
    for kind, question in QUESTIONS.items():
        asked = [[{"role": "user", "content": question.format(count)}]]
        replies = respond(model, tokenizer, asked, max_new_tokens, 1.0, seed=seed, num_samples=tries)
        names: dict[str, list[str]] = {}
        for reply in replies:
            for name in dict.fromkeys(listed(reply.text)):
                names.setdefault(name.lower(), []).append(name)
        ranked = sorted(names.values(), key=len, reverse=True)
        if len(ranked) < 2:
            raise ValueError(
                f"asked for a list of values for {kind!r}, the model says {replies[0].text!r:.80}: expected a list; "
                "give a file of instructions instead"
            )
        found[kind] = [spellings[0] for spellings in ranked[:count]]
    return found


# ---------- chapters/06_gatt.py · The examples

def joined(messages: Sequence[Message], instruction: str) -> list[Message]:
    "A conversation with an instruction in front of every message of the user (section 3.3)."
    return [
        {**message, "content": f"{instruction} {message['content']}"} if message["role"] == "user" else dict(message)
        for message in messages
    ]


def build_gatt_example(tokenizer: Tokenizer, dialog: Sequence[Message], instruction: str) -> Example:
    """Tokens, and a mask that is 1 on the last answer alone, of a conversation with the instruction as system message.

    `dialog` ends with an answer, and has no system message of its own: ValueError otherwise, and as of `encode_dialog`.
    """
    if not dialog or dialog[-1]["role"] != "assistant" or dialog[0]["role"] != "user":
        roles = ", ".join(message["role"] for message in dialog[:2])
        raise ValueError(f"a conversation of {roles} …: expected the user first, and an answer at the end")
    messages = [{"role": "system", "content": instruction}, *dialog]
    tokens, _ = encode_dialog(tokenizer, messages)
    begin = len(encode_dialog(tokenizer, messages[:-1])[0])
    return tokens, [0] * begin + [1] * (len(tokens) - begin)

class Context(NamedTuple):
    "A conversation that ends with the user, the instruction that it is sampled with, and the system message to learn."

    messages: list[Message]
    instruction: str
    system: str


def within(messages: Sequence[Message], instruction: str, tokenizer: Tokenizer, room: int) -> list[Message]:
    "The newest turns that have room with the instruction joined to them. ValueError if the last message has none."
    for first in range(0, len(messages), 2):
        if len(encode_dialog(tokenizer, joined(messages[first:], instruction))[0]) <= room:
            return list(messages[first:])
    raise ValueError(f"the last message and the instruction exceed {room} tokens")


def contexts(
    dialogs: Sequence[Sequence[Message]],
    instructions: Sequence[Instruction],
    tokenizer: Tokenizer,
    room: int,
    seed: int = 0,
    short: float = 0.5,
) -> list[Context]:
    """Each conversation, cut at a turn drawn at random, with an instruction; `room`: tokens of the joined one, at most.

    short: share of system messages in the short wording. ValueError, naming the conversation by number from 0, for one
    with a system message, and where not even the last message has room.
    """
    random, found = np.random.default_rng([61, seed]), []
    for number, dialog in enumerate(dialogs):
        check_dialog(dialog)
        if dialog[0]["role"] == "system":
            raise ValueError(f"conversation {number} has a system message: the instruction belongs there")
        turns = sum(message["role"] == "user" for message in dialog)
        messages = [dict(message) for message in dialog[: 2 * int(random.integers(turns)) + 1]]
        instruction = instructions[random.integers(len(instructions))]
        try:
            messages = within(messages, instruction.long, tokenizer, room)
        except ValueError as error:
            raise ValueError(f"conversation {number}: {error}") from None
        system = instruction.short if random.random() < short else instruction.long
        found.append(Context(messages, instruction.long, system))
    return found


def newest_turns(scorer: Scorer, turns: int) -> Scorer:
    "A scorer that is shown the last `turns` messages of the user, and what follows; 0: the whole conversation."
    return lambda dialogs: scorer([dialog[-2 * turns :] for dialog in dialogs])


def answered(
    model: Llama, tokenizer: Tokenizer, cuts: Sequence[Context], reward: Reward, *settings
) -> list[tuple[Context, str, float]]:
    """Contexts with the best of their sampled answers and its reward, as in rejection sampling; without one, none.

    settings: samples, temperature, top_p, max_new_tokens and seed of `candidates`.
    """
    prompts = [Prompt(joined(cut.messages, cut.instruction), False) for cut in cuts]
    kept = {id(row.prompt): row for row in best(prompts, candidates(model, tokenizer, prompts, reward, *settings))}
    pairs = ((cut, kept.get(id(prompt))) for cut, prompt in zip(cuts, prompts, strict=True))
    return [(cut, row.answer, row.reward) for cut, row in pairs if row]


# ---------- chapters/06_gatt.py · Conversations that go on

def converse(
    model: Llama,
    tokenizer: Tokenizer,
    questions: Sequence[Sequence[str]],
    instructions: Sequence[str],
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    repeat: bool = False,
    seed: int = 0,
) -> list[list[Message]]:
    """Conversations: a model's answers to lists of questions under instructions.

    The instruction is the system message; with `repeat`, it is joined to every question instead. Turns that do not fit
    the context are returned, but the model has not seen the oldest of them. An answer ends in front of a tag of the
    chat format. ValueError for a question that does not fit alone, or that holds a tag.
    """
    room = model.config.max_seq_len - max_new_tokens
    dialogs: list[list[Message]] = [[] if repeat else [{"role": "system", "content": text}] for text in instructions]
    for turn in range(max(map(len, questions), default=0)):
        going, shown = [number for number, texts in enumerate(questions) if turn < len(texts)], []
        for number in going:
            dialog, question = dialogs[number], questions[number][turn]
            dialog.append({"role": "user", "content": f"{instructions[number]} {question}" if repeat else question})
            first = 0 if repeat else 1
            dropped = fit(tokenizer, dialog, room)[1]
            shown.append([*dialog[:first], *dialog[first + 2 * dropped :]])
        replies = respond(model, tokenizer, shown, max_new_tokens, temperature, seed=seed + turn)
        for number, reply in zip(going, replies, strict=True):
            dialogs[number].append({"role": "assistant", "content": untagged(reply.text)[0]})
    return dialogs


# ---------- chapters/06_gatt.py · Earlier answers that obey

def obeying(
    model: Llama,
    tokenizer: Tokenizer,
    cuts: Sequence[Context],
    share: float,
    room: int,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
) -> list[Context]:
    """Contexts, of which a share, drawn, has the model's answers in place of the earlier ones, given as in `joined`.

    room: as of `contexts`. Errors as of `converse`.
    """
    drawn = np.random.default_rng([59, seed]).random(len(cuts)) < share
    chosen = [number for number in np.flatnonzero(drawn) if len(cuts[number].messages) > 1]
    questions = [[message["content"] for message in cuts[number].messages[:-1:2]] for number in chosen]
    instructions = [cuts[number].instruction for number in chosen]
    found = list(cuts)
    made = converse(model, tokenizer, questions, instructions, max_new_tokens, temperature, repeat=True, seed=seed)
    for number, dialog in zip(chosen, made, strict=True):
        cut = cuts[number]
        messages = [dict(message) for message in cut.messages]
        for place in range(1, len(messages), 2):
            messages[place]["content"] = dialog[place]["content"]
        found[number] = cut._replace(messages=within(messages, cut.instruction, tokenizer, room))
    return found


# ---------- chapters/06_gatt.py · The command

@dataclass(frozen=True)
class GAttConfig:
    """Ghost Attention: data for it, sampled, and the fine-tuning on them (section 3.3).

    Model, data, folder and seed of `sft` are those here. ValueError for numbers out of range.
    """

    model: str = "runs/rlhf/V3/model"  # the newest chat model's folder, which samples and is fine-tuned
    helpfulness: str = "runs/reward-helpfulness/model"  # reward model's folder, which chooses among the samples
    dialogs: Path = Path("dialogs.jsonl")  # conversations of several turns
    instructions: Path | None = None  # JSONL with `long` and `short`; none: built of what the model lists when asked
    values: int = 50  # hobbies, languages and figures to ask for
    short: float = 0.5  # share of system messages in the short wording
    samples: int = 10  # of which the best is kept
    temperature: float = 1.0  # of the samples
    top_p: float = 1.0  # sample among the likeliest tokens that have this probability together
    max_new_tokens: int = 1024  # an answer that does not end within them is not used
    obeying: float = 0.0  # share of conversations whose earlier answers are the model's as well, under the instruction
    judged_turns: int = 0  # newest turns that the reward model is shown, if its context is shorter; 0: all
    rehearsal: Path | None = None  # conversations to learn from as well, all their answers
    seed: int = 0  # of everything that is drawn
    out: Path = Path("runs/gatt")  # gatt.jsonl, chunks of the work, and the fine-tuned model
    chunk: int = 64  # conversations between saves
    sft: SFTConfig = field(default_factory=lambda: SFT["paper"])

    def __post_init__(self):
        for name in ("values", "samples", "max_new_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        for name in ("short", "obeying"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected a share, 0 to 1")
        if self.temperature <= 0 or self.judged_turns < 0:
            found = f"temperature {self.temperature}, judged_turns {self.judged_turns}"
            raise ValueError(f"{found}: expected above 0, at least 0")


GATT = {
    "paper": GAttConfig(),
    "mini": GAttConfig(
        samples=4, temperature=0.5, max_new_tokens=64, obeying=0.5, judged_turns=1, chunk=256,
        sft=replace(SFT["mini"], lr=6e-4, batch_rows=1, micro_batch=1, max_seq_len=1280),
    ),
}  # fmt: skip


def write_rows(path: str | os.PathLike, rows: Iterable[tuple[Context, str, float]]):
    "Write rows as JSONL, all or nothing: conversations with their system message and sampled answer, and its reward."
    lines = []
    for cut, text, reward in rows:
        ends = {"role": "system", "content": cut.system}, {"role": "assistant", "content": text}
        line = {"messages": [ends[0], *cut.messages, ends[1]], "instruction": cut.instruction, "reward": reward}
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))


def read_gatt(path: str | os.PathLike, tokenizer: Tokenizer, length: int | None = None) -> list[Example]:
    """The examples of a gatt.jsonl: one learned span each. ValueError with file and line for a row that is none.

    length: tokens of a row that has to hold each of them whole.
    """
    examples = []
    for number, messages in enumerate(read_dialogs(path), 1):
        try:
            if messages[0]["role"] != "system":
                raise ValueError("the first message is no system message; expected the instruction")
            examples.append(build_gatt_example(tokenizer, messages[1:], messages[0]["content"]))
            check_example(*examples[-1], length)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return examples


def synthesise(config: GAttConfig, device: torch.device, tokenizer: Tokenizer) -> Path:
    "Make out/gatt.jsonl as `config` says, or go on making it; all ranks call it. Errors as of `run`."
    files = [config.dialogs] + [path for path in (config.instructions,) if path]
    length = SFTConfig(max_seq_len=config.sft.max_seq_len)  # all that matters of the training here
    record_settings(config.out, replace(config, sft=length, rehearsal=None), dialogs=files)
    first = not dist.is_initialized() or dist.get_rank() == 0
    model = load_checkpoint(config.model, device)
    built = config.out / "instructions.jsonl"
    if config.instructions is None and first and not built.exists():
        values = ask_values(model, tokenizer, config.values, config.max_new_tokens, config.seed)
        lines = (json.dumps(row._asdict(), ensure_ascii=False) for row in combined(values, 1000, config.seed))
        write_atomic(built, "\n".join(lines) + "\n")
    if dist.is_initialized():
        dist.barrier()
    instructions = read_instructions(config.instructions or built)
    room = min(model.config.max_seq_len, config.sft.max_seq_len) - config.max_new_tokens
    cuts = contexts(read_dialogs(config.dialogs), instructions, tokenizer, room, config.seed, config.short)
    reward = Reward(newest_turns(load_scorer(config.helpfulness, device), config.judged_turns))
    settings = config.samples, config.temperature, config.top_p, config.max_new_tokens

    def work(these, seeds, path):
        limits = room, config.max_new_tokens, config.temperature
        these = obeying(model, tokenizer, these, config.obeying, *limits, seeds[0])
        write_rows(path, answered(model, tokenizer, these, reward, *settings, seeds))

    parts = in_chunks(config.out / "chunks", cuts, config.chunk, config.seed, work)
    path = config.out / "gatt.jsonl"
    if first:
        lines = [line for part in parts for line in part.read_text("utf-8").splitlines()]
        if not lines:
            raise ValueError(f"{config.model}: no answer ended within {config.max_new_tokens} tokens")
        write_atomic(path, "\n".join(lines) + "\n")
        print(f"{len(lines):,} of {len(cuts):,} conversations with an answer, in {path}")
    if dist.is_initialized():
        dist.barrier()
    return path


def run(config: GAttConfig) -> Path:
    """Make the data and fine-tune on them as `config` says, or go on; returns the folder of the trained model.

    While it samples, each rank holds the model and the reward model whole: they must fit on one GPU, which 70B in
    bfloat16 does not.
    ValueError with file and line for conversations and instructions that are none, for a model that lists no values,
    for a folder of another configuration, and when no answer ended; else as of `sft.run`.
    """
    with processes() as device:
        tokenizer = Tokenizer(config.model)
        path = synthesise(config, device, tokenizer)
        recipe = replace(config.sft, model=config.model, data=path, out=config.out, seed=config.seed)
        length = recipe.max_seq_len if recipe.block_diagonal else None
        examples, files = read_gatt(path, tokenizer, length), [path]
        if config.rehearsal:
            examples += read_examples(config.rehearsal, tokenizer, length)
            files.append(config.rehearsal)
        batches = Batches(examples, recipe)
        if os.environ.get("RANK", "0") == "0":
            print(batches.summary())
        contents = b"".join(file.read_bytes() for file in files)
        digest = hashlib.sha256(contents + tokenizer.digest.encode()).hexdigest()

        def loop(model, optimizer, start):
            return sft(model, examples, recipe, optimizer, start)

        return train(recipe, device, tokenizer, tokenizer.vocab_size, digest, len(batches), loop, "Ghost Attention")


def stage(recipe: GAttConfig) -> Callable[[object, Path, dict], dict]:
    "Ghost Attention as a stage of chapter 05's program: `rlhf.STAGES['gatt'] = stage(recipe)`, then 'gatt' after V3."

    def gatt_stage(config, folder: Path, state: dict) -> dict:
        found = replace(recipe, model=state["model"], helpfulness=judges(state)["helpfulness"])
        return state | {"model": str(run(replace(found, out=folder, seed=config.seed)))}

    return gatt_stage


@record
@one_line_errors()
def cli(prog: str = "python -m llama2lib.gatt"):
    "python -m llama2lib.gatt RECIPE [options]: make an instruction hold (section 3.3); under torchrun, on all ranks."
    about = {name: f"{config.samples} samples, peak lr {config.sft.lr:g}" for name, config in GATT.items()}
    run(tyro.extras.overridable_config_cli({name: (about[name], c) for name, c in GATT.items()}, prog=prog))


# ---------- chapters/06_gatt.py · Where a model looks (Figure 10)

@torch.no_grad()
def attention_weights(model: Llama, tokens: Sequence[int]) -> Iterator[Float[Tensor, "N T T"]]:
    "The attention weights of each layer, head by head: row i says how much token i reads of the tokens up to itself."
    seen, layers = [], [layer.attention for layer in model.layers]
    hooks = [layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[:2])) for layer in layers]
    try:
        model.hidden(torch.tensor([list(tokens)], device=model.tok_embeddings.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    for layer, (x, rope) in zip(layers, seen, strict=True):
        q, k = (w(x).unflatten(-1, (-1, layer.head_dim)) for w in (layer.wq, layer.wk))
        q, k = (apply_rope(part, rope)[0].transpose(0, 1) for part in (q, k))
        logits = q @ k.repeat_interleave(len(q) // len(k), 0).mT / layer.head_dim**0.5
        ahead = torch.ones(logits.shape[1:], dtype=torch.bool, device=logits.device).triu(1)
        yield logits.float().masked_fill(ahead, -torch.inf).softmax(-1)


def attention_map(model: Llama, tokens: Sequence[int], size: int = 1) -> Float[Tensor, "B B"]:
    "The largest weight over layers, heads, and bins of `size` neighbouring tokens (Figure 10)."
    whole = torch.stack([weights.amax(0) for weights in attention_weights(model, tokens)]).amax(0)
    bins = -(-len(tokens) // size)
    whole = torch.nn.functional.pad(whole, (0, bins * size - len(tokens)) * 2)
    return whole.view(bins, size, bins, size).amax((1, 3))


def attention_mass(model: Llama, tokens: Sequence[int], places: slice) -> Float[Tensor, "T"]:
    "How much of its attention each token gives to the tokens at `places`: the head's that gives most, of all layers."
    return torch.stack([weights[:, :, places].sum(-1).amax(0) for weights in attention_weights(model, tokens)]).amax(0)


if __name__ == "__main__":
    cli()
