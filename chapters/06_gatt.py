# %% [markdown]
# # Ghost Attention
#
# > An instruction at the beginning of a conversation should hold to its end. Chat models forget it after a few turns;
# > Ghost Attention (GAtt) is fine-tuning on data that is altered so that they do not. Paper sections 3.3 and A.3.5.
#
# 'Act as Oscar Wilde', 'answer with emojis': the authors' chat models obeyed for a turn or two. Were the instruction
# repeated with every message, they would obey all the time. GAtt samples answers in just that way, and then takes the
# instruction out of all messages but the first: what remains is a conversation whose last answer obeys an instruction
# that stands far back. Fine-tuning on it teaches the model to look there. It is context distillation (Askell et al.
# 2021) in a chat's clothes.
#
# > Ours: the data, the training and the measurements, for any conversations and any model folder. On the mini world,
# > with controls that the paper does not have: the same number of steps with other data, with another loss, and with
# > the instruction left where it was.

# %%
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from llama2lib import ledger, mini, paper, plots
from llama2lib.launch import launch
from llama2lib.recipes import by_scale, cache_folder, scale

plt.rcParams.update(plots.STYLE)

# %% [markdown]
# ## Instructions
#
# The authors' instructions are built of constraints of three kinds: a hobby ('You enjoy e.g. Tennis'), a language
# ('Speak in e.g. French'), a public figure ('Act as e.g. Napoleon'). Constraints are combined at random. Half of the
# time the instruction is written less verbosely, as 'Figure: Napoleon.', when it becomes the system message.
#
# A row of a file of instructions holds both wordings. The long one is for sampling; which of them is the system message
# of an example is drawn.

# %%
#| default_exp gatt

# %%
#| export
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

# %%
values = {"hobby": ["tennis", "chess"], "language": ["French"], "figure": ["Napoleon", "Oscar Wilde"]}
for instruction in combined(values, 4, seed=0):
    print(instruction.long, "|", instruction.short)
assert all(1 <= len(i.short.split(". ")) <= 3 for i in combined(values, 50, seed=1))

# %% [markdown]
# ### Lists from the model itself
#
# Where do hobbies and figures come from? The authors asked their chat model for lists, so that it knows what it is told
# to be. `ask_values` asks any model folder: several times, at temperature 1, until there are enough; `listed` reads
# what models write, numbered, with bullets, a line each or in a row.

# %%
#| export
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

# %%
numbered = "Here are some hobbies:\n1. Chess - a game\n2. **Rock climbing**\n3. Tennis."
assert listed(numbered) == ["Chess", "Rock climbing", "Tennis"]
assert listed("- French\n- German") == ["French", "German"]
assert listed("Napoleon, Oscar Wilde, and Caesar.") == ["Napoleon", "Oscar Wilde", "Caesar"]

# %% [markdown]
# A model of a million parameters knows no lists, only the sentences of its world. On the mini world instructions are
# chapter 12's, with values for hobbies, languages and figures, and a fourth kind, the word that an answer has to end
# with.

# %%
chat, words = mini.chat(0), mini.tokenizer()
try:
    print(ask_values(chat, words, 10, max_new_tokens=64, tries=2))
except ValueError as error:
    print("ValueError:", error)

# %% [markdown]
# ## The examples
#
# A conversation with n turns, $[u_1,a_1,\dots,u_n,a_n]$, and an instruction *inst*. For sampling the instruction is
# joined to every message of the user, and the newest model answers the last one:
#
# $$[\mathit{inst}+u_1,\,a_1,\,\dots,\,\mathit{inst}+u_n]\rightarrow a_n'$$
#
# For training it is dropped from all of them but the first, where it becomes the system message. The answers in between
# were given without the instruction and do not obey it; to learn from them would teach the opposite. So the loss is 0
# on all tokens before the last answer: on those of the assistant too, which chapter 03 would count.
#
# $$[\mathit{inst},\,u_1,\,a_1,\,\dots,\,u_n]\rightarrow a_n'$$
#
# > Ours: every conversation is cut at a turn drawn at random, so that the instruction stands at all distances. One that
# > has no room in the context loses its oldest turns. That is harmless: the instruction is joined to every message, and
# > it is the system message of what remains.

# %%
#| export
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

# %%
dialog = [
    {"role": "user", "content": "Where does Ben live?"}, {"role": "assistant", "content": "Ben lives in Leeds."},
    {"role": "user", "content": "What pet does he have?"}, {"role": "assistant", "content": "I am Napoleon. A dog."},
]  # fmt: skip
for message in joined(dialog, "Always act as Napoleon from now."):
    print(f"{message['role']:>9}: {message['content']}")
tokens, mask = build_gatt_example(words, dialog, "Figure: Napoleon.")
print("\nlearned:", words.decode([token for token, learn in zip(tokens, mask, strict=True) if learn]))
assert np.abs(np.diff(mask)).sum() == 1 and mask[-1] == 1  # one span, at the end
assert words.decode(tokens).count("Napoleon.") == 2  # in the system message and in the answer

# %%
#| export
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

# %% [markdown]
# ### Conversations that go on
#
# `converse` lets a model answer question after question, with the instruction as the system message, or joined to every
# message. Where a conversation outgrows the context its oldest turns are left out, as in chapter 03's chat; the system
# message never is.

# %%
#| export
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

# %% [markdown]
# ### Earlier answers that obey
#
# In the paper's data no earlier answer obeys. In use, once Ghost Attention works, all of them do: the model reads its
# own answers, and it has never learned from such a conversation. On the mini world this is where it fails, as the
# measurements below show: behind answers that do not obey the model finds its instruction, and in conversations of its
# own it slips.
#
# > Ours: in a share of the conversations the earlier answers are the newest model's own as well, sampled with the
# > instruction in every message. They too have loss 0. A share of 0 is the paper's data.

# %%
#| export
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

# %%
cut = Context(dialog[:3], "Always act as Napoleon from now.", "Figure: Napoleon.")
(own,) = obeying(chat, words, [cut], share=1.0, room=400, max_new_tokens=64, temperature=0.5)
for before, after in zip(cut.messages, own.messages, strict=True):
    print(f"{before['role']:>9}: {before['content']:<30} | {after['content']}")
assert own.messages[::2] == cut.messages[::2] and own[1:] == cut[1:]  # this model does not obey yet

# %% [markdown]
# ## The command
#
# `python -m llama2lib.gatt` reads conversations of several turns, asks the model for values, or reads instructions,
# samples on all processes, chunk by chunk, and trains. A run that was killed goes on where it stopped. `rehearsal`
# names conversations to learn from beside the examples, by chapter 03's rule, so that the model keeps what it could do.
#
# > Ours: the paper gives no numbers for this stage. Samples and training take those of rejection sampling.

# %%
#| export
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

# %%
from llama2lib.gatt import GATT

_ = ledger.record("Section 3.3", "share of system messages in the short wording", "preset",
                  paper.TEXT["Section 3.3"]["short_instructions"], GATT["paper"].short,
                  evidence="llama2lib/gatt.py::short: float")  # fmt: skip

# %% [markdown]
# ### Where a model looks (Figure 10)
#
# The authors show the maximum of the attention weights over the network, with neighbouring tokens binned together: a
# map with the attending token down and the attended one across, before and after. `attention_weights` gives each
# layer's weights; `attention_map` is the figure's map; `attention_mass` is a number for it, how much of the attention a
# token gives to the system message.

# %%
#| export
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

# %% [markdown]
# ## On the mini world
#
# Instructions of the mini world (chapter 12) are of four kinds: a word that every answer ends with, a hobby and a
# figure that it mentions, and a language for its yes and thanks. The judge reads whether an answer obeys.
#
# Chapter 05's third version, to which the authors applied Ghost Attention, does not follow them: a model of 1.3M
# parameters has to be taught to copy a word from its instruction. So there is a stage before, in which it learns to
# obey the instruction in front of it. Half of its short conversations have the instruction as a system message, half
# have it joined to the question; a few are long, with the instruction in every message, or with a system message
# that asks for nothing. Version 3's best answers and texts of the mini world keep up what it can and knows. No
# conversation of more than one turn has its instruction in the system message alone: how long that holds is what we
# measure. On two cores the samples for Ghost Attention take 105 seconds and its training 167; the stage before takes
# eleven minutes on one.

# %%
#| default_exp mini_gatt

# %%
#| export
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

# %%
import itertools

from llama2lib.chat import respond
from llama2lib.checkpoint import save_checkpoint
from llama2lib.claims import compare
from llama2lib.dialog import encode_dialog, write_dialogs
from llama2lib.gatt import attention_map, attention_mass, converse
from llama2lib.grammar import wordings, written
from llama2lib.judge import obeys, scores
from llama2lib.mini_gatt import (
    ARMS, RULES, SIZES, TURNS, gatt_contexts, instructed, lessons, talk, taught, third, told, under,
)  # fmt: skip
from llama2lib.mini_rlhf import asked
from llama2lib.recipes import cached, seeds, source_digest
from llama2lib.synthetic import HELPFUL, pick

examples = lessons(0)
for number in (0, 1, SIZES["short"]):
    print(*(f"{message['role']:>9}: {message['content']}" for message in examples[number][:5]), sep="\n", end="\n\n")

# %% [markdown]
# ### What we expect
#
# A model answers 24 questions, one after the other, under an instruction, and the judge says of every answer whether it
# obeys. Questions are of chapter 12's test split; the instructions' words are those of training. The ceiling is the
# model before Ghost Attention with the instruction in every message. What follows was written down before the runs:
#
# 1. The ceiling is above 0.7 for three kinds of instructions at least, the word at the end among them.
# 2. Over turns 6 to 20, Ghost Attention reaches 0.9 of the ceiling.
# 3. It is 0.4 above the control: as long on the same conversations, with a system message that asks for nothing.
# 4. Helpfulness without an instruction falls by less than 5 %.
#
# > Ours: sizes and learning rates were chosen in pilot runs, with other conversations than those that are judged
# > here; 'language' was the kind that Ghost Attention forgot most, and is drawn twice as often for it. What follows is
# > the third run. The first missed expectation 1 with two of three seeds: with 9,000 short conversations the model had
# > not learned to copy a figure (ceiling 0.18 and 0.12), and expectation 2 was missed with it. The stage before was
# > made longer. The second, with the paper's data alone, missed expectation 2: with seed 0, which was judged first,
# > Ghost Attention reached 0.74 where the ceiling was 0.96, and 0.26 for languages. Looking for the reason we found
# > what *Earlier answers that obey* describes.

# %%
FILE, SECTION = "chapters/06_gatt.py", "Section 3.3"
at_scale = scale() != "smoke"
runs = seeds(by_scale(smoke=(0,), laptop=(0, 1, 2), a100=(0, 1, 2)))
reach = by_scale(smoke=3, laptop=24, a100=24)  # turns; the last four are beyond what was trained
late = by_scale(smoke=slice(1, 3), laptop=slice(5, TURNS), a100=slice(5, TURNS))  # turns 6 to 20


def exam(random: np.random.Generator, count: int, turns: int, values: str) -> list[list]:
    "Conversations to be had: the kind of a rule, an instruction with values of a split, and questions with answers."
    rows = []
    for number in range(count):
        kind = list(RULES)[number % len(RULES)]
        both = instructed(random, values, {kind: 1})[1]
        rows.append([kind, both[number // len(RULES) % 2], talk(random, turns, "test", kinds=HELPFUL)])
    return rows


def model_of(seed: int, arm: str | None):
    "The model of a seed after one of ARMS; None: before Ghost Attention."
    return told(seed) if arm is None else taught(seed, arm)


def held(inputs: dict) -> dict:
    "Which answers obey (N T), and the conversations; `inputs`: seed, arm, exam, repeat."
    _, texts, talks = zip(*inputs["exam"], strict=True)
    questions = [[message["content"] for message in messages[::2]] for messages in talks]
    model = model_of(inputs["seed"], inputs["arm"])
    dialogs = converse(model, mini.tokenizer(), questions, texts, repeat=inputs["repeat"])
    places = [place for place, message in enumerate(dialogs[0]) if message["role"] == "assistant"]
    obeyed = [[all(obeys(dialog[:n], dialog[n]["content"]).values()) for n in places] for dialog in dialogs]
    return {"obeyed": np.array(obeyed, float), "dialogs": dialogs}


rows = exam(np.random.default_rng(65), SIZES["evaluated"], reach, "train")
kinds = np.array([row[0] for row in rows])
ways = {"before": (None, False), "ceiling": (None, True)} | {arm: (arm, False) for arm in ARMS}
found = {
    (seed, way): cached(f"gatt-held-seed{seed}", {"seed": seed, "arm": arm, "exam": rows, "repeat": repeat}, held)
    for seed in runs for way, (arm, repeat) in ways.items()
}  # fmt: skip


def rate(way: str, kind: str | None = None, turns: slice = late) -> list[np.ndarray]:
    "For each seed, the share of obeying answers in each conversation, of a kind or all; of turns 6 to 20, or others."
    these = slice(None) if kind is None else kinds == kind
    return [found[seed, way]["obeyed"][these][:, turns].mean(1) for seed in runs]


print(f"{'':<28}" + "".join(f"{kind:>10}" for kind in RULES) + f"{'all':>10}{'turns 21 to 24':>18}")
for way in ways:
    cells = [np.mean(rate(way, kind)) for kind in (*RULES, None)]
    beyond = np.mean(rate(way, turns=slice(TURNS, None))) if reach > TURNS else np.nan
    print(f"{way:<28}" + "".join(f"{cell:>10.2f}" for cell in cells) + f"{beyond:>18.2f}")

# %% [markdown]
# A model could hold out by repeating itself. So a second look, at single answers behind conversations that were
# written without the instruction, as in the paper's data: there only the system message says what to do.

# %%
def looked_up(inputs: dict) -> dict:
    "Which answers obey behind turns that do not (N T); `inputs`: seed, arm, exam, turns."
    contexts = [
        under(text, messages[: 2 * turn - 1]) for _, text, messages in inputs["exam"] for turn in inputs["turns"]
    ]
    replies = respond(model_of(inputs["seed"], inputs["arm"]), mini.tokenizer(), contexts, 64)
    right = [all(obeys(context, reply.text).values()) for context, reply in zip(contexts, replies, strict=True)]
    return {"right": np.array(right, float).reshape(-1, len(inputs["turns"]))}


at = by_scale(smoke=[1, 3], laptop=[1, 2, 4, 8, 12, 16, 20, 24], a100=[1, 2, 4, 8, 12, 16, 20, 24])
behind = {
    (seed, way): cached(
        f"gatt-behind-seed{seed}", {"seed": seed, "arm": ways[way][0], "exam": rows, "turns": at}, looked_up
    )["right"]
    for seed in runs for way in ("before", "Ghost Attention", "earlier answers as written", "plain")
}  # fmt: skip
print(f"{'turn':<28}" + "".join(f"{turn:>6}" for turn in at))
for way in ("before", "Ghost Attention", "earlier answers as written", "plain"):
    print(f"{way:<28}" + "".join(f"{x:>6.2f}" for x in np.mean([behind[seed, way].mean(0) for seed in runs], 0)))

# %%
shown = {"ceiling": "C7", "Ghost Attention": "C0", "plain": "C1", "before": "C3"}
fig, axes = plt.subplots(1, 4, figsize=(14, 3.4), sharey=True)
for ax, kind in zip(axes, RULES, strict=True):
    for way, colour in shown.items():
        of = np.array([found[seed, way]["obeyed"][kinds == kind].mean(0) for seed in runs])
        ax.plot(range(1, reach + 1), of.T, color=colour, alpha=0.3, linewidth=0.7)
        ax.plot(range(1, reach + 1), of.mean(0), color=colour, label=way)
    ax.axvline(TURNS + 0.5, color="0.6", linestyle=":")
    ax.set(xlabel="turn", title=kind, ylim=(-0.02, 1.02))
axes[0].set_ylabel("share of answers that obey")
axes[-1].legend(loc="center right", fontsize=7)
fig.suptitle("With Ghost Attention instructions hold; without, they are soon forgotten (dotted: longest in training)")
plots.save(fig, "gatt_turns.png")

# %%
def verdict(measured_by: str, *claim, **options):
    "Compare what a function of this chapter measures of all seeds: its name, and the arguments of `compare`."
    compare(*claim, seeds=runs, evidence=f"{FILE}::def {measured_by}", **options)


def share(part: float, of: list[np.ndarray]) -> list[np.ndarray]:
    "So much of the scores of every seed."
    return [part * scores for scores in of]


for kind in RULES:
    verdict("held", SECTION, f"the instruction in every message is followed, turns 6 to 20: {kind}", "> 0.7",
            rate("ceiling", kind), share(0, rate("ceiling", kind)))  # fmt: skip
for kind in (*RULES, None):
    verdict("held", SECTION, f"Ghost Attention minus 0.9 of the ceiling, turns 6 to 20: {kind or 'all kinds'}", "> 0",
            rate("Ghost Attention", kind), share(0.9, rate("ceiling", kind)))  # fmt: skip
verdict("held", SECTION, "Ghost Attention minus plain fine-tuning on as many conversations, turns 6 to 20", "> 0.4",
        rate("Ghost Attention"), rate("plain"))  # fmt: skip
from_8 = [8 <= turn <= TURNS for turn in at]
verdict("looked_up", SECTION,
        "behind answers that do not obey, turns 8 to 20: Ghost Attention minus plain fine-tuning", "> 0.4",
        *([behind[seed, way][:, from_8].mean(1) for seed in runs] for way in ("Ghost Attention", "plain")))  # fmt: skip


def helpful(inputs: dict) -> dict:
    "Gold helpfulness of answers at temperature 1 (N); `inputs`: seed, arm, dialogs."
    model, dialogs = model_of(inputs["seed"], inputs["arm"]), inputs["dialogs"]
    replies = respond(model, mini.tokenizer(), dialogs, 64, 1.0, seed=0)
    return {"gold": scores(dialogs, [tuple(reply) for reply in replies])[:, 0]}


prompts = [p.messages for p in asked(99, 0, by_scale(smoke=6, laptop=400, a100=400), "test", 0.0)]
gold = {
    (seed, arm): cached(f"gatt-gold-seed{seed}", {"seed": seed, "arm": arm, "dialogs": prompts}, helpful)["gold"]
    for seed in runs for arm in (None, "Ghost Attention")
}  # fmt: skip
before, after = ([gold[seed, arm] for seed in runs] for arm in (None, "Ghost Attention"))
print(f"gold helpfulness without an instruction: before {np.mean(before):.3f}, after {np.mean(after):.3f}")
verdict("helpful", SECTION, "gold helpfulness without an instruction: after Ghost Attention minus 0.95 before", "> 0",
        after, share(0.95, before))  # fmt: skip

# %% [markdown]
# ### What it is that helps
#
# As many conversations, with other data or another loss, which is 3 % fewer to 8 % more steps:
#
# - *earlier answers as written*: the paper's data. The same last answers, but no answer before them obeys.
# - *all answers*: without the mask of section 3.3. The answers in between, half of which do not obey, are learned too.
# - *instruction on every turn*: it is not dropped. What is learned is what the model could do before.
# - *plain* and *last answer*: the written conversations, with a system message that asks for nothing.
# - *without endings*: Ghost Attention on hobbies, figures and languages alone. Does a kind that it never saw hold too?

# %%
fig, ax = plt.subplots(figsize=(8, 3.8))
places = np.arange(len(ways))
for offset, kind in zip((-0.24, -0.08, 0.08, 0.24), RULES, strict=True):
    of = np.array([[np.mean(part) for part in rate(way, kind)] for way in ways])
    ax.barh(places + offset, of.mean(1), 0.15, label=kind)
    ax.plot(of, np.repeat((places + offset)[:, None], len(runs), 1), ".", color="0.2", markersize=3)
ax.set_yticks(places, list(ways))
ax.invert_yaxis()
ax.set(xlabel="share of answers that obey, turns 6 to 20 (dots: each seed)", xlim=(0, 1))
ax.legend(fontsize=7, loc="upper right", ncols=4)
ax.set_title("Only data whose instruction stands far back teach to look there")
plots.save(fig, "gatt_arms.png")
verdict("held", SECTION,
        "earlier answers as they were written, as in the paper, minus half of them obeying, turns 6 to 20", "< 0",
        rate("earlier answers as written"), rate("Ghost Attention"))  # fmt: skip
verdict("held", SECTION, "the loss on all answers instead of the last, turns 6 to 20", "< 0", rate("all answers"),
        rate("Ghost Attention"))  # fmt: skip
verdict("held", SECTION, "the instruction left on every turn instead of the first, turns 6 to 20", "< 0",
        rate("instruction on every turn"), rate("Ghost Attention"))  # fmt: skip
verdict("held", "Figure 28",
        "a kind of instruction that Ghost Attention never saw: minus plain fine-tuning, turns 6 to 20", "> 0",
        rate("without endings", "ending"), rate("plain", "ending"))  # fmt: skip

# %% [markdown]
# All four expectations hold, the second for all kinds together (for endings and figures alone it is unclear). Ghost
# Attention is as good as the instruction in every message: 0.97, 0.95 and 0.99 of the answers obey, with the three
# seeds, and the ceiling is 0.96, 0.94 and 0.99. Without examples whose instruction stands far back nothing holds that
# long. Helpfulness without an instruction does not fall but rises, from 0.32 to 0.39, perhaps because the samples are
# the best of four. Beyond the 20 turns of training fewer answers obey, most with seed 1.
#
# Earlier answers that obey make the difference where the paper's data fail. Those reach 0.70, 0.79 and 0.98: less with
# every seed, but so unevenly that the verdict is unclear; with seed 0 only 0.14 of the answers obey for a language. The
# table of single answers says why: behind answers that do not obey, which they learned from, such models are even a
# little better. It is their own answers they stumble over. (In a pilot run with seed 0 most failures for a language
# had its thanks at the end, and began with 'I am happy to help!' where its yes belongs.)
#
# The mask of section 3.3 helps every seed, by 0.07 to 0.20, and here too the verdict is unclear. It would help more
# on the paper's data, where all the earlier answers disobey: in the second run, of seed 0, a loss on all answers left
# 0.04.
#
# What a model learns of some kinds does not carry over to another: never shown an ending far back, no model keeps one.
# The authors report that Ghost Attention held for instructions it had not been trained on, such as to answer in haiku
# (Figure 28); they had a model that had seen the world's text, and we have one of 1.3M parameters.
#
# Values that no training had are another matter: our models copy words that they have copied before. Where the
# instruction stands in the message itself they already fail, so there is nothing for Ghost Attention to keep.

# %%
unseen = exam(np.random.default_rng(66), SIZES["evaluated"] // 2, by_scale(smoke=1, laptop=4, a100=4), "test")
new = {
    (seed, repeat): cached(
        f"gatt-held-seed{seed}", {"seed": seed, "arm": arm, "exam": unseen, "repeat": repeat}, held
    )["obeyed"]
    for seed in runs for arm, repeat in ((None, True), ("Ghost Attention", False))
}  # fmt: skip
for repeat, name in ((True, "in every message, before"), (False, "as system message, Ghost Attention")):
    print(f"new values, {name}: {np.mean([new[seed, repeat].mean() for seed in runs]):.2f} of the answers obey")

# %% [markdown]
# ### Recall (Table 30)
#
# The authors set an attribute in the first message, a hobby or a public figure, and asked for it at later turns. We ask
# in the place of the question of that turn, and go on without having asked.

# %%
def recalled(inputs: dict) -> dict:
    "Whether each answer names what the instruction says (N T); `inputs`: seed, arm, exam, dialogs, turns."
    random, contexts = np.random.default_rng(67), []
    for (kind, *_), dialog in zip(inputs["exam"], inputs["dialogs"], strict=True):
        for turn in inputs["turns"]:
            ask = written(pick(random, wordings("ask name" if kind == "figure" else "ask hobby", "train")))
            contexts.append([*dialog[: 2 * turn - 1], {"role": "user", "content": ask}])
    replies = respond(model_of(inputs["seed"], inputs["arm"]), mini.tokenizer(), contexts, 64)
    right = [all(obeys(context, reply.text).values()) for context, reply in zip(contexts, replies, strict=True)]
    return {"right": np.array(right, float).reshape(-1, len(inputs["turns"]))}


turns = list(range(2, 21, 2)) if at_scale else [2, 3]
these = [number for number, kind in enumerate(kinds) if kind in ("hobby", "figure")]
recall = {}
for seed, way in itertools.product(runs, ("before", "plain", "Ghost Attention")):
    dialogs = [found[seed, way]["dialogs"][number] for number in these]
    inputs = {"seed": seed, "arm": ways[way][0], "exam": [rows[number] for number in these], "dialogs": dialogs}
    recall[seed, way] = cached(f"gatt-recall-seed{seed}", inputs | {"turns": turns}, recalled)["right"]
fig, ax = plt.subplots(figsize=(5.6, 3.6))
for way in ("Ghost Attention", "plain", "before"):
    of = np.array([recall[seed, way].mean(0) for seed in runs])
    ax.plot(turns, of.T, color=shown[way], alpha=0.3, linewidth=0.7)
    ax.plot(turns, of.mean(0), "o-", markersize=3, color=shown[way], label=f"ours, {way}")
table = paper.PAPER["Table 30"]
for column, style in (("GAtt", "C0:"), ("baseline", "C3:")):
    printed = [row[column] / 100 for row in table.values()]
    ax.plot([int(turn) for turn in table], printed, style, label=f"paper, {column}")
ax.set(xlabel="turn at which the attribute is asked for", ylabel="share of right answers", ylim=(-0.02, 1.02))
ax.set_xticks(turns)
ax.set_title("An attribute is recalled up to turn 20 with Ghost Attention alone")
ax.legend(fontsize=7)
plots.save(fig, "table_30.png")
for place, turn in enumerate(turns):
    if str(turn) in map(str, table):
        print(f"turn {turn}: " + ", ".join(
            f"{way} {np.mean([recall[seed, way][:, place].mean() for seed in runs]):.0%}"
            for way in ("before", "plain", "Ghost Attention")
        ))  # fmt: skip
from_6 = [6 <= turn <= TURNS for turn in turns]
gaps = [(row["GAtt"] - row["baseline"]) / 100 for turn, row in table.items() if 6 <= int(turn) <= TURNS]
verdict("recalled", "Table 30", "recall of hobby or figure, turns 6 to 20: Ghost Attention minus before", "> 0",
        *([recall[seed, way][:, from_6].mean(1) for seed in runs] for way in ("Ghost Attention", "before")),
        np.mean(gaps))  # fmt: skip

# %% [markdown]
# ### Side by side (Figure 9)
#
# The paper's figure has dialogues with and without Ghost Attention. Ours is the first of the conversations under a
# public figure, as it came; the model's facts are often wrong, and that is not what is looked at here.

# %%
number = next(n for n, kind in enumerate(kinds) if kind == "figure")
lines = [("system message", rows[number][1])]
for turn in range(min(6, reach)):
    lines.append((f"{turn + 1}. user", rows[number][2][2 * turn]["content"]))
    lines += [(f"    {way}", found[runs[0], way]["dialogs"][number][2 * turn + 2]["content"])
              for way in ("before", "Ghost Attention")]  # fmt: skip
fig, ax = plt.subplots(figsize=(9, 0.5 + 0.21 * len(lines)))
ax.axis("off")
for place, (name, text) in enumerate(lines):
    ax.text(0, -place, name, va="top", fontsize=8, weight="bold")
    ax.text(0.17, -place, text, va="top", fontsize=8)
ax.set(xlim=(0, 1), ylim=(-len(lines), 0.3), title="Figure 9: the same questions, before Ghost Attention and after")
plots.save(fig, "figure_09.png")
if at_scale:
    ledger.record("Figure 9", "two dialogues with the same questions, before and after", "illustrated", None, None,
                  evidence="figures/figure_09.png")  # fmt: skip

# %% [markdown]
# ### Where it looks (Figure 10)
#
# The number for it is the attention that an answer's tokens give to the instruction, by the head that gives it most.
# The verdict is on the mean over an answer, as planned. The first look at seed 0 showed that only a token or two of an
# answer read the instruction, which a mean hides: so the figure also has the token that reads it most.

# %%
def system_place(tokenizer, dialog: list[dict]) -> slice:
    "Where the instruction stands among a conversation's tokens."
    begin = len(tokenizer.encode("[INST] <<SYS>>\n", bos=True))
    return slice(begin, begin + len(tokenizer.encode(dialog[0]["content"])))


def looked(inputs: dict) -> dict:
    "Attention of each answer to the instruction, its mean and its most (N T); `inputs`: seed, arm, dialogs."
    model, tokenizer, found = model_of(inputs["seed"], inputs["arm"]), mini.tokenizer(), []
    for dialog in inputs["dialogs"]:
        tokens, mask = encode_dialog(tokenizer, dialog)
        mass = attention_mass(model, tokens, system_place(tokenizer, dialog)).numpy()
        ends = np.flatnonzero(np.diff([*mask, 0]) == -1)
        begins = np.flatnonzero(np.diff([0, *mask]) == 1) - 1  # the token before an answer's first decides it
        parts = [mass[begin:end] for begin, end in zip(begins, ends, strict=True)]
        found.append([[part.mean() for part in parts], [part.max() for part in parts]])
    mean, most = np.array(found, float).transpose(1, 0, 2)
    return {"mean": mean, "most": most}


size, few = by_scale(smoke=4, laptop=6, a100=6), by_scale(smoke=2, laptop=24, a100=24)
dialog = found[runs[0], "Ghost Attention"]["dialogs"][number][: 2 * min(8, reach) + 1]
tokens = encode_dialog(words, dialog)[0]
end = system_place(words, dialog).stop / size
fig, axes = plt.subplots(1, 3, figsize=(13.5, 4), width_ratios=(1, 1, 1.1))
for ax, way in zip(axes[:2], ("before", "Ghost Attention"), strict=True):
    image = ax.imshow(attention_map(model_of(runs[0], ways[way][0]), tokens, size), cmap="viridis", vmin=0, vmax=1)
    ax.axvline(end, color="w", linewidth=0.8, linestyle=":")
    ax.grid(False)
    ax.set(xlabel=f"attended to (bins of {size} tokens)", ylabel="attends", title=way)
fig.colorbar(image, ax=axes[:2], shrink=0.8, label="largest weight")
mass = {
    (seed, way): cached(
        f"gatt-mass-seed{seed}",
        {"seed": seed, "arm": ways[way][0], "dialogs": found[seed, "Ghost Attention"]["dialogs"][:few]}, looked,
    )
    for seed in runs for way in ("before", "Ghost Attention")
}  # fmt: skip
for way, (kind, style) in itertools.product(("Ghost Attention", "before"), {"most": "-", "mean": "--"}.items()):
    of = np.array([mass[seed, way][kind].mean(0) for seed in runs])
    axes[2].plot(range(1, reach + 1), of.T, style, color=shown[way], alpha=0.3, linewidth=0.7)
    label = f"{way}, {'the token that reads it most' if kind == 'most' else 'mean of an answer'}"
    axes[2].plot(range(1, reach + 1), of.mean(0), style, color=shown[way], label=label)
axes[2].set(xlabel="turn", ylabel="attention to the instruction, of one head", ylim=(0, 1.02), title="by turn")
axes[2].legend(fontsize=7)
fig.suptitle("Left of the dotted line, the instruction: with Ghost Attention it is read to the end (Figure 10)")
plots.save(fig, "figure_10.png")
verdict("looked", "Figure 10",
        "attention of answers to the instruction, turns 6 to 20: Ghost Attention minus before", "> 0",
        [mass[seed, "Ghost Attention"]["mean"][:, late].mean(1) for seed in runs],
        [mass[seed, "before"]["mean"][:, late].mean(1) for seed in runs])  # fmt: skip

# %% [markdown]
# ## The command, here and on many GPUs
#
# Two processes share the sampling, chunk by chunk, and the rows of every training step.

# %%
folder = cache_folder() / "gatt" / f"{scale()}-{source_digest('import llama2lib.mini_gatt')[:12]}"
if not (folder / "told").exists():
    save_checkpoint(told(runs[0]), folder / "told", words)
few = by_scale(smoke=6, laptop=48, a100=48)
write_dialogs(folder / "dialogs.jsonl", gatt_contexts(runs[0], RULES)[0][:few])
instructions = [instructed(np.random.default_rng([68, n]), "train")[1]._asdict() for n in range(20)]
(folder / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in instructions), "utf-8")
options = ["--model", folder / "told", "--helpfulness", third(runs[0])[2], "--dialogs", folder / "dialogs.jsonl"]
options += ["--instructions", folder / "instructions.jsonl", "--out", folder / "out", "--chunk", 8]
_ = launch("llama2lib.gatt", "mini", *options, nproc=2)

# %%
options = ["--model", "runs/7B-rlhf/V3/5-tune/model", "--helpfulness", "runs/7B-rlhf/V3/3-reward/helpfulness/model"]
options += ["--dialogs", "dialogs.jsonl", "--rehearsal", "runs/7B-rlhf/V3/4-reject/best.jsonl", "--out", "runs/7B-gatt"]
_ = launch("llama2lib.gatt", "paper", *options, nproc=8, gpus=True)

# %% [markdown]
# As a stage of chapter 05's program, in a script: `rlhf.STAGES["gatt"] = gatt.stage(recipe)`, where
# `recipe` is a `GAttConfig` with the file of conversations; then a version `"collect reward reject tune gatt"`.

# %% [markdown]
# ## What it took
#
# - Ghost Attention has no code in the attention: it is data with the instruction once, in front, and a mask with one
#   span, at the end. The care goes into the distances at which the instruction stands, and into what the earlier
#   answers show.
# - What held: over all kinds of instructions it is as good as the instruction in every message, long after plain
#   fine-tuning has forgotten it; an attribute is recalled up to turn 20, though not every time (Table 30); more
#   attention goes to the instruction (Figure 10); and helpfulness without one does not suffer.
# - What did not: an instruction of a kind that Ghost Attention never saw (Figure 28). A model of this size copies what
#   it has copied before.
# - Every seed is worse without the mask, and every seed with the paper's data alone, whose earlier answers never obey;
#   but seeds differ so much that three leave both open.
# - The surprise is where the paper's data fail: not behind answers that disobey, which they are made of, but behind the
#   model's own, which obey.

# %% [markdown]
# ## Exercises
#
# 1. A model that attends to all tokens alike has never learned where to look. What does it give to an instruction of 20
#    tokens, as the conversation grows? What follows for reading Figure 10?
# 2. Conversations have 2 to 20 turns, all lengths equally often, and `contexts` cuts each at a turn drawn at random. In
#    how many examples stand ten turns or more between the instruction and the message to answer? In how many if all
#    were cut at their last turn, and what would be missing then?
# 3. Table 30 prints 100, 10 and 0 %, and not of how many conversations. With how few can it be true? How many right
#    answers of as many would show a recall above 95 %?

# %% [markdown]
# Its share falls as one over the length, without anything being forgotten. So a map that fades to the right proves
# nothing by itself; what counts is that it stays above this line, or the map of another model on the same tokens.

# %%
import torch

from llama2lib.gatt import attention_mass
from llama2lib.model import Llama, ModelConfig

torch.manual_seed(0)
shape = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, hidden_dim=64, vocab_size=50, max_seq_len=512)
model = Llama(shape)
for layer in model.layers:
    torch.nn.init.zeros_(layer.attention.wq.weight)
tokens, instruction = torch.randint(50, (512,)).tolist(), slice(5, 25)
mass = attention_mass(model, tokens, instruction)
for place in (24, 63, 127, 255, 511):
    print(f"token {place + 1}: {mass[place]:.3f} of its attention to the instruction")
uniform = 20 / torch.arange(1, 513)
assert torch.allclose(mass[24:], uniform[24:], atol=1e-5)

# %% [markdown]
# A conversation of n turns has each of its n cuts with the same probability, so near ones are the more frequent. Cut at
# the end there would be three times as many far ones, and none in which the instruction's own message is answered.

# %%
from types import SimpleNamespace

import numpy as np

from llama2lib.gatt import Instruction, contexts

letters = SimpleNamespace(encode=lambda text, bos=False, eos=False: [1] * bos + [*text.encode()] + [2] * eos)
turn = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "So."}]
lengths = np.repeat(np.arange(2, 21), 150)
napoleon = Instruction("Always act as Napoleon from now.", "Figure: Napoleon.")
cuts = contexts([turn * count for count in lengths], [napoleon], letters, room=10_000, seed=0)
between = np.array([len(cut.messages) // 2 for cut in cuts])
for name, least, most in (("none", 0, 1), ("1 to 9", 1, 10), ("10 to 19", 10, 20)):
    drawn, at_end = (np.mean((least <= x) & (x < most)) for x in (between, lengths - 1))
    derived = np.mean([(np.arange(least, most) < count).sum() / count for count in lengths])
    print(f"{name} turns between: {derived:.1%} derived, {drawn:.1%} drawn; {at_end:.1%} if cut at the end")
    assert abs(drawn - derived) < 0.03

# %% [markdown]
# Ten are enough, and ten right answers of ten are compatible with a recall of 75 %. It takes 59.

# %%
import itertools

from llama2lib import paper

table = paper.PAPER["Table 30"]
printed = {row[name] for row in table.values() for name in ("baseline", "GAtt")}
fewest = next(n for n in itertools.count(1) if printed <= {round(100 * right / n) for right in range(n + 1)})
print(f"{sorted(printed)} % can come of {fewest} conversations")
for n in (fewest, 59, 299):
    least = 0.05 ** (1 / n)  # a recall with which n right answers of n have a probability of 5 %
    print(f"{n} of {n} right: the recall is above {least:.1%}, with 95 % confidence")
assert fewest == 10 and 0.05 ** (1 / 58) < 0.95 < 0.05 ** (1 / 59)
