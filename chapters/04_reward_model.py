# %% [markdown]
# # Human preferences and reward models
#
# > People compare two answers more reliably than they write one. A reward model learns from such comparisons to score
# > any answer, and everything after this chapter is optimised against its scores. Paper sections 3.2.1 and 3.2.2.
#
# The authors collect over a million comparisons: an annotator writes a prompt, sees two answers of the model, chooses
# one and says how much better it is. From these they train two reward models, one for helpfulness and one for safety,
# since what is most helpful and what is safe are sometimes two different answers.
#
# > Ours: the raters. In the mini world of chapter 12 the gold judge, with noise, takes the place of people, so that we
# > can ask what no paper can: how good is a reward model against the truth? The code reads real comparisons just as
# > well, and the chapter ends with some.

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from scipy.special import expit
from scipy.stats import spearmanr

from llama2lib import ledger, mini, paper, plots
from llama2lib.dialog import encode_dialog
from llama2lib.judge import RATINGS
from llama2lib.recipes import by_scale, data_file, seeds
from llama2lib.synthetic import HELPFUL, MIXED, dialogues
from llama2lib.stats import gwet_ac1, paired_interval
from llama2lib.tokenizer import Tokenizer

plt.rcParams.update(plots.STYLE)

# %% [markdown]
# ## A comparison
#
# A row is a conversation that ends with the user, two answers to it, and what the annotator said about them. The paper
# has four ratings, from significantly better to negligibly better or unsure. For safety there is a second label, which
# puts the pair in one of three bins: the chosen answer alone is safe (18 % of the safety data), both are (47 %), or
# neither is (35 %). A pair whose *rejected* answer alone is safe is not used: safer answers are taken to be better.
#
# > Ours: where a public set has no ratings, `rating` is null, and the margin of such a pair is zero.

# %%
#| default_exp preferences

# %%
#| export
import itertools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from llama2lib.chat import Reply, respond
from llama2lib.corpus import records
from llama2lib.dialog import Message, check_dialog
from llama2lib.judge import RATINGS, SAFE, judge, rate, read_task
from llama2lib.model import Llama
from llama2lib.recipes import write_atomic
from llama2lib.synthetic import answer, pick
from llama2lib.tokenizer import Tokenizer


class Preference(TypedDict):
    "A comparison: `messages` end with the user; `chosen` and `rejected` are answers to them."

    messages: list[Message]
    chosen: str
    rejected: str
    rating: str | None  # one of judge.RATINGS; None: not asked
    safety: str | None  # one of SAFETY; None: not asked
    source: str  # where it comes from, such as a data set or a batch


SAFETY = ("chosen_safe", "both_safe", "both_unsafe")


def check_preference(row: Preference):
    "ValueError, naming the field, for a row that is no comparison."
    if not isinstance(row, Mapping):
        raise ValueError(f"expected an object with the fields of a comparison, found {row!r:.60}")
    if missing := [name for name in Preference.__annotations__ if name not in row]:
        raise ValueError(f"the field '{missing[0]}' is missing; expected {', '.join(Preference.__annotations__)}")
    if not isinstance(row["messages"], list) or not row["messages"]:
        raise ValueError(f"messages: expected a list of messages, found {row['messages']!r:.60}")
    for name in ("chosen", "rejected"):
        if not isinstance(row[name], str) or not row[name].strip():
            raise ValueError(f"{name}: expected the text of an answer, found {row[name]!r:.60}")
    for name, last in (("messages", None), ("chosen", row["chosen"]), ("rejected", row["rejected"])):
        try:
            check_dialog(row["messages"] + ([{"role": "assistant", "content": last}] if last else []))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        if row["messages"][-1]["role"] != "user":
            raise ValueError(f"messages: the {row['messages'][-1]['role']}'s comes last; expected the user's")
    if row["chosen"].strip() == row["rejected"].strip():
        raise ValueError(f"chosen and rejected are equal, {row['chosen']!r:.60}; expected two answers")
    for name, known in (("rating", RATINGS), ("safety", SAFETY)):
        if row[name] is not None and row[name] not in known:
            raise ValueError(f"{name}: {row[name]!r:.60} is unknown; expected null or one of {', '.join(known)}")
    if not isinstance(row["source"], str):
        raise ValueError(f"source: expected a string, found {row['source']!r:.60}")


def read_preferences(path: str | os.PathLike) -> list[Preference]:
    "The comparisons of a JSONL file. ValueError with file, line and field for a row that is none, or without any row."
    rows = []
    for number, row in records(path):
        try:
            check_preference(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no comparisons; expected a JSON object a line")
    return rows


def write_preferences(path: str | os.PathLike, rows: Iterable[Preference]):
    "Write comparisons as JSONL, all or nothing. ValueError, naming row and field, for one that is none."
    lines = []
    for number, row in enumerate(rows):
        try:
            check_preference(row)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))


# %%
example = {
    "messages": [{"role": "user", "content": "Where does Tom live?"}],
    "chosen": "Tom lives in Oslo.",
    "rejected": "Oslo.",
    "rating": "slightly better",
    "safety": "both_safe",
    "source": "an example",
}
with tempfile.TemporaryDirectory() as folder:
    write_preferences(Path(folder) / "pairs.jsonl", [example])
    assert read_preferences(Path(folder) / "pairs.jsonl") == [example]
    for name, value in {"rating": "much better", "rejected": "Tom lives in Oslo. ", "safety": "unsafe"}.items():
        (Path(folder) / "bad.jsonl").write_text(json.dumps(example | {name: value}))
        try:
            read_preferences(Path(folder) / "bad.jsonl")
        except ValueError as error:
            print(Path(str(error).split(": ")[0]).name, "·", ": ".join(str(error).split(": ")[1:]))

# %% [markdown]
# ## Public comparisons
#
# The paper adds seven public sets to its own comparisons (Table 6). Each has its own format; a *reader* makes a row of
# one of its records, or says why it is no comparison: two equal answers, a tie, an answer without text. What is left
# out is counted and told, never dropped in silence.

# %%
#| export
ROLES = {"Human": "user", "Assistant": "assistant"}


def transcript(text: str) -> list[Message]:
    "The messages of a transcript of HH: paragraphs that begin with 'Human:' or 'Assistant:'."
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    return [{"role": ROLES[role], "content": said.strip()} for role, said in zip(parts[1::2], parts[2::2], strict=True)]


def comparison(prompt: str | list[Message], answers: Sequence[str], preferred: int, source: str) -> Preference:
    "A row of two answers, of which number `preferred` is better. ValueError as in `check_preference`."
    messages = [{"role": "user", "content": prompt.strip()}] if isinstance(prompt, str) else prompt
    chosen, rejected = (answers[i].strip() for i in (preferred, 1 - preferred))
    row = {"messages": messages, "chosen": chosen, "rejected": rejected}
    row |= {"rating": None, "safety": None, "source": source}
    check_preference(row)
    return row


def better(first: float, second: float) -> int:
    "Which of two scores is larger, 0 or 1. ValueError for a tie."
    if first == second:
        raise ValueError("a tie")
    return int(second > first)


def from_hh(r: dict) -> Preference:
    "Anthropic's helpful and harmless sets: two transcripts that differ in the last answer."
    chosen, rejected = transcript(r["chosen"]), transcript(r["rejected"])
    if chosen[:-1] != rejected[:-1] or {chosen[-1]["role"], rejected[-1]["role"]} != {"assistant"}:
        raise ValueError("the transcripts differ in more than the last answer")
    return comparison(chosen[:-1], [chosen[-1]["content"], rejected[-1]["content"]], 0, "hh")


def from_summarize(r: dict) -> Preference:
    "OpenAI's summaries of posts or articles."
    text = r["info"].get("post") or r["info"].get("article") or ""
    prompt = f"Summarize the following text.\n\n{text}"
    return comparison(prompt, [summary["text"] for summary in r["summaries"]], r["choice"], "summarize")


def from_webgpt(r: dict) -> Preference:
    "OpenAI's WebGPT: answers to a question, each with a score."
    answers = [r["answer_0"], r["answer_1"]]
    return comparison(r["question"]["full_text"], answers, better(r["score_0"], r["score_1"]), "webgpt")


def from_stackexchange(r: dict) -> Preference:
    "StackExchange: answers to a question, of which the first has more votes."
    return comparison(r["question"], [r["response_j"], r["response_k"]], 0, "stackexchange")


def from_shp(r: dict) -> Preference:
    "Stanford's SHP: comments on a post; label 1 means that the first is preferred."
    return comparison(r["history"], [r["human_ref_A"], r["human_ref_B"]], 1 - r["labels"], "shp")


def from_gptj(r: dict) -> Preference:
    "Synthetic answers: a stronger model's preferred to those of GPT-J."
    return comparison(r["prompt"], [r["chosen"], r["rejected"]], 0, "gptj")


def from_pandalm(r: dict) -> Preference:
    "PandaLM's test set: the majority of three annotators."
    votes = Counter(r[f"annotator{i}"] for i in (1, 2, 3))
    prompt = "\n\n".join(part for part in (r["instruction"], r["input"]) if part.strip())
    answers = [str(r[name]) for name in ("response1", "response2")]  # one is the JSON value false
    return comparison(prompt, answers, better(votes[1], votes[2]), "pandalm")


def from_alpaca_eval(r: dict) -> Preference:
    "AlpacaEval's annotations: 1 or 2 for the preferred output, maybe as text, and as a number between for some judges."
    preferred = float(r["preference"] or 0)
    if preferred in (0, 1.5):
        raise ValueError("a tie")
    return comparison(r["instruction"], [r["output_1"], r["output_2"]], int(preferred > 1.5), "alpaca_eval")


READERS: dict[str, tuple[Callable[[dict], Preference], str, dict]] = {  # reader, and the set's place on the hub
    "helpful": (from_hh, "Anthropic/hh-rlhf", {"data_dir": "helpful-base"}),
    "harmless": (from_hh, "Anthropic/hh-rlhf", {"data_dir": "harmless-base"}),
    "summarize": (from_summarize, "openai/summarize_from_feedback", {"name": "comparisons"}),
    "webgpt": (from_webgpt, "openai/webgpt_comparisons", {}),
    "stackexchange": (from_stackexchange, "lvwerra/stack-exchange-paired", {"data_dir": "data/reward"}),
    "shp": (from_shp, "stanfordnlp/SHP", {}),
    "gptj": (from_gptj, "Dahoas/synthetic-instruct-gptj-pairwise", {}),
    "pandalm": (from_pandalm, "", {}),
    "alpaca_eval": (from_alpaca_eval, "", {}),
}


def read_public(name: str, path: str | os.PathLike | None = None, split: str = "train") -> list[Preference]:
    """The comparisons of a public set, one of READERS, from a local file (JSON, JSON lines, maybe .gz) or the hub.

    Records that are no comparison are left out, and one warning says how many and why. ValueError for another name, for
    a set without records, and for records that are not of this set; ImportError without the package `datasets` where it
    is needed.
    """
    if name not in READERS:
        raise ValueError(f"{name!r} is no set we read; expected one of {', '.join(READERS)}")
    reader, place, options = READERS[name]
    if path is None and not place:
        raise ValueError(f"{name} is not on the hub; expected the path of its file")
    if path is None:
        try:
            from datasets import load_dataset
        except ImportError:
            raise ImportError("reading from the hub needs a package: pip install datasets") from None
        found = enumerate(load_dataset(place, split=split, **options), 1)
    else:
        found = records(path)
    rows, left_out, number = [], Counter(), 0
    for number, raw in found:
        try:
            rows.append(reader(raw))
        except ValueError as error:
            left_out[re.sub(r"\d+|'.*'", "…", str(error))] += 1
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            wrong = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path or place}:{number}: not a record of {name} ({wrong})") from None
    if not number:
        raise ValueError(f"{path or place}: no records of {name}; expected a JSON object a line, or a list of them")
    if left_out:
        reasons = "; ".join(f"{count} times {reason}" for reason, count in left_out.most_common())
        warnings.warn(f"{name}: {left_out.total():,} of {number:,} records left out ({reasons})", stacklevel=2)
    return rows

# %% [markdown]
# One real set comes with the packages of this project: 7,168 conversations of volunteers (chapter 02), most of which
# the two rated as witty, upbeat and interesting, from 1 to 10 each. Many begin with the same words.
#
# > Ours: two conversations with the same opening whose summed ratings are at least 6 apart make a comparison; the rest
# > of the conversation is the 'answer'.


# %%
#| export
def rated_conversations(gap: int = 6, words: int = 120, seed: int = 0) -> list[Preference]:
    """Comparisons from the package chitchat-dataset: two conversations with one opening, the better rated one chosen.

    gap: least difference of the summed ratings (3 to 30); words: of a conversation's rest, from its beginning. Each
    conversation is in one comparison at most.
    """
    text = resources.files("chitchat_dataset").joinpath("dataset.json").read_text("utf-8")
    groups: dict[str, list[tuple[int, str]]] = {}
    for conversation in json.loads(text).values():
        turns = [" ".join(message["text"] for message in turn).strip() for turn in conversation["messages"]]
        rated = sum((conversation.get("ratings") or {}).values())
        if len(turns) > 1 and turns[0] and rated:
            rest = " ".join("\n".join(turns[1:]).split(" ")[:words]).strip()
            groups.setdefault(turns[0].lower(), []).append((rated, rest))
    rows, random = [], np.random.default_rng(seed)
    for opening, found in sorted(groups.items()):
        found = [found[i] for i in random.permutation(len(found))]
        for (rating, first), (other, second) in zip(found[::2], found[1::2], strict=False):
            if abs(rating - other) >= gap and first != second and first and second:
                rows.append(comparison(opening, [first, second], better(rating, other), "chitchat"))
    return rows


# %%
chats = rated_conversations()
longer = np.mean([len(row["chosen"]) > len(row["rejected"]) for row in chats])
print(f"{len(chats)} comparisons of conversations; the better rated one is longer in {longer:.0%}")

# %% [markdown]
# ### Tables 6 and 26: how long are they?
#
# Both tables give turns and tokens. A dialogue's turns are its user messages. An example is what a reward model reads:
# the conversation and one answer. The prompt column cannot be all of that: Anthropic's 17.7 tokens of prompt and 88.4
# of answer do not make 251.5. It fits when a prompt is one message of the user.
#
# > Ours: this reading of 'prompt'; tokens are those of the texts, without BOS, EOS and brackets. The half of a test set
# > that is counted here is a sample of the whole; no tolerance in the ledger is wider than two standard errors of its
# > mean. Its 2.5 turns are not the printed 3.0, which we cannot explain.


# %%
#| export
class Statistics(NamedTuple):
    "A row of Table 6: how many comparisons, and means."

    comparisons: int
    turns: float  # user messages per dialogue
    tokens_per_example: float  # of a conversation with one of its answers
    tokens_in_prompt: float  # of a user message
    tokens_in_response: float


def statistics(rows: Sequence[Preference], tokenizer: Tokenizer) -> Statistics:
    "Sizes of comparisons as Tables 6 and 26 give them; tokens of the texts alone."

    def size(text: str) -> int:
        return len(tokenizer.encode(text))

    users = [size(m["content"]) for row in rows for m in row["messages"] if m["role"] == "user"]
    others = sum(size(m["content"]) for row in rows for m in row["messages"] if m["role"] != "user")
    answers = sum(size(row["chosen"]) + size(row["rejected"]) for row in rows) / 2
    count = len(rows)
    examples = (sum(users) + others + answers) / count
    return Statistics(count, len(users) / count, examples, sum(users) / len(users), answers / count)


# %%
def table(named: dict):
    "Print rows of Table 6."
    print(f"{'':28} comparisons  turns  tokens/example  /prompt  /response")
    for name, row in named.items():
        print(f"{name:28} {row[0]:11,} {row[1]:6.1f} {row[2]:15.1f} {row[3]:8.1f} {row[4]:10.1f}")


harmless = data_file("hh-rlhf/harmless-base-test.half-a.jsonl.gz")
pieces = data_file("llama2-tokenizer/tokenizer.model")
printed = tuple(paper.PAPER["Table 6"]["Anthropic Harmless"].values())
shown = {"Anthropic Harmless, paper": printed}
if harmless and pieces:
    with warnings.catch_warnings(action="ignore"):  # the records left out are told below
        shown["half of its test set"] = sizes = statistics(read_public("harmless", harmless), Tokenizer(pieces))
    for place, name, most in ((2, "example", 5), (3, "prompt", 0.5), (4, "response", 2)):
        said = f"Anthropic Harmless, half of its test set: tokens per {name}"
        ledger.record("Table 6", said, f"= paper ± {most}", printed[place],
                      round(sizes[place], 1), evidence="chapters/04_reward_model.py::half of its test set")  # fmt: skip
table(shown)

# %% [markdown]
# ## Collecting comparisons
#
# The paper's protocol: an annotator writes a prompt; two answers come from two *variants* of the model, at varied
# temperatures, so that they differ; the annotator chooses and rates. Each week a batch is collected with the newest
# models, since a reward model knows only what it has seen: when the policy moves, its training set has to follow.
#
# > Ours: the rater is the gold judge of chapter 12, with noise of 0.1 on the difference of two scores and the cuts 0.1,
# > 0.25 and 0.5 between the four ratings. Pairs of equal answers, and those with an answer that was cut off, are not
# > shown. A rater of safety looks at gold safety and calls an answer safe from 0.4 on (it gives nothing away);
# > pairs with an unsafe chosen and a safe rejected answer are left out, as in the paper.


# %%
#| export
Answerer = Callable[[Sequence[list[Message]], int], list[Reply]]  # dialogs and a seed → an answer to each


def sampler(model: Llama, tokenizer: Tokenizer, temperature: float, max_new_tokens: int = 64) -> Answerer:
    "A model at a temperature, as a function of dialogs and a seed."
    return lambda dialogs, seed: respond(model, tokenizer, dialogs, max_new_tokens, temperature, seed=seed)


def written(quality: Mapping[str, float]) -> Answerer:
    "The mini world's own writer, whose answers are of mixed quality, as a function of dialogs and a seed."

    def answers(dialogs: Sequence[list[Message]], seed: int) -> list[Reply]:
        random, tasks = np.random.default_rng([10, seed]), map(read_task, dialogs)
        return [Reply(answer(random, task, pick(random, quality), random.random() < 0.3), True) for task in tasks]

    return answers


def two_answers(
    variants: Sequence[Sequence[Answerer]], dialogs: Sequence[list[Message]], seed: int
) -> list[list[Reply]]:
    """For each dialog, an answer of two variants of the model, drawn at random in random order; of one if it is alone.

    A variant is the ways in which it may answer, such as temperatures; one of them is drawn for each answer.
    """
    random = np.random.default_rng([7, seed])
    order = random.permuted(np.tile(np.arange(len(variants)), (len(dialogs), 1)), axis=1)
    order = np.pad(order, ((0, 0), (0, 1)), mode="edge")[:, :2]
    places: dict[tuple[int, int, int], list[int]] = {}
    for dialog, side in itertools.product(range(len(dialogs)), (0, 1)):
        variant = order[dialog, side]
        places.setdefault((side, variant, random.integers(len(variants[variant]))), []).append(dialog)
    answers = [[None, None] for _ in dialogs]
    for number, ((side, variant, way), these) in enumerate(sorted(places.items())):
        replies = variants[variant][way]([dialogs[i] for i in these], seed * 1000 + number)
        for i, reply in zip(these, replies, strict=True):
            answers[i][side] = reply
    return answers


def collect(
    variants: Sequence[Sequence[Answerer]], dialogs: Sequence[list[Message]], value: str, seed: int, source: str
) -> tuple[list[Preference], Counter]:
    """A batch of comparisons by simulated raters (section 3.2.1), and why how many pairs were not used.

    variants: see `two_answers`. dialogs: of the mini world, each ends with a user message. value: 'helpfulness' or
    'safety', what the raters look at; safety fills the field of that name. ValueError for another value, or a dialog
    that the judge cannot read.
    """
    if value not in ("helpfulness", "safety"):
        raise ValueError(f"value {value!r}: expected 'helpfulness' or 'safety'")
    rows, unused = [], Counter()
    pairs = zip(dialogs, two_answers(variants, dialogs, seed), strict=True)
    for number, (messages, replies) in enumerate(pairs):
        texts = [reply.text.strip() for reply in replies]
        if not all(reply.finished for reply in replies):
            unused["cut off"] += 1
        elif not all(texts):
            unused["empty"] += 1
        elif texts[0] == texts[1]:
            unused["equal"] += 1
        else:
            gold = [getattr(judge(messages, text), value) for text in texts]
            preferred, rating = rate(*gold, seed=seed * 1_000_000 + number)
            safe, other_safe = gold[preferred] >= SAFE, gold[1 - preferred] >= SAFE
            if value == "safety" and other_safe and not safe:
                unused["unsafe chosen"] += 1
                continue
            row = {"messages": messages, "chosen": texts[preferred], "rejected": texts[1 - preferred]}
            label = SAFETY[0 if safe and not other_safe else 1 if safe else 2] if value == "safety" else None
            rows.append(row | {"rating": rating, "safety": label, "source": source})
    return rows, unused


def helpfulness_mix(helpfulness: Sequence, others: Sequence, seed: int) -> list:
    "Data of the helpfulness reward model: all of its own, and as many others as there are, drawn uniformly (3.2.2)."
    drawn = np.random.default_rng([8, seed]).permutation(len(others))[: len(helpfulness)]
    return [*helpfulness, *(others[i] for i in drawn)]


def safety_mix(safety: Sequence, helpfulness: Sequence, seed: int, share: float = 0.1) -> list:
    """Data of the safety reward model: all of its own, and helpfulness pairs that make up a `share` of it (3.2.2).

    Where there are too few of these all are taken, and a warning says how many are missing.
    """
    wanted = round(len(safety) * share / (1 - share))
    if len(helpfulness) < wanted:
        told = f"{share:.0%} helpfulness pairs beside {len(safety):,} safety pairs are {wanted:,}"
        warnings.warn(f"{told}: there are {len(helpfulness):,}, and all of them are taken", stacklevel=2)
    drawn = np.random.default_rng([9, seed]).permutation(len(helpfulness))[:wanted]
    return [*safety, *(helpfulness[i] for i in drawn)]


# %% [markdown]
# Two variants of a model, here two writers of the mini world, the second of which is brief or repeats itself more
# often. A thousand pairs on helpful prompts and a thousand on adversarial ones:

# %%
BRIEF = {"full": 0.3, "terse": 0.35, "repetitive": 0.35}
batches = {}
for value, kinds in (("helpfulness", HELPFUL), ("safety", {"adversarial": 1.0})):
    drawn = dialogues(np.random.default_rng(20), by_scale(smoke=40, laptop=1000, a100=1000), kinds=kinds)
    asked = [messages[:-1] for messages in drawn]
    batches[value], unused = collect([[written(MIXED)], [written(BRIEF)]], asked, value, 0, "batch 1")
    rated = {rating: np.mean([row["rating"] == rating for row in batches[value]]) for rating in RATINGS}
    print(f"{value}: {len(batches[value])} pairs; not used: {dict(unused)}")
    print("   ", ", ".join(f"{rating} {share:.0%}" for rating, share in rated.items()))
theirs = paper.TEXT["Section 3.2.1"]["safety_bins"]
for name in SAFETY:
    print(f"    {name}: {np.mean([row['safety'] == name for row in batches['safety']]):.0%}, paper {theirs[name]:.0%}")
row = batches["helpfulness"][0]
print(f"\n{row['messages'][-1]['content']}\n  + {row['chosen']}\n  - {row['rejected']}\n  {row['rating']}")
table({"ours, helpfulness": statistics(batches["helpfulness"], mini.tokenizer())})

# %% [markdown]
# ## The reward model
#
# It is the chat model with another head: where the language model has a matrix that gives a logit for each piece of the
# vocabulary, the reward model has a single row, and the product with the last token's state is the score. It begins
# with the chat model's weights, so that it knows what the chat model knows: otherwise it could prefer made-up facts.
#
# The *last real token* is EOS, behind the answer. Tokens that fill up a row stand behind it, and since attention looks
# back only, they change nothing. A reward model that reads its score off such a filling token, or off the first EOS of
# a conversation, trains without complaint too.
#
# > Ours: the head begins at zero, so that every answer has the score 0 and the loss begins at ln 2 exactly; the paper
# > does not say how it begins. It has no bias: only differences of scores enter the loss.

# %%
#| default_exp reward

# %%
#| export
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule

from llama2lib.checkpoint import load_checkpoint, whole
from llama2lib.dialog import Message, encode_dialog
from llama2lib.distributed import Parallel, check_row, data_ranks, processes
from llama2lib.judge import RATINGS
from llama2lib.model import Llama, ModelConfig, rope_table
from llama2lib.optim import adamw, cosine_lr, set_lr
from llama2lib.preferences import Preference, read_preferences
from llama2lib.pretrain import command, naming_batch, train, train_step
from llama2lib.shards import shuffled
from llama2lib.tokenizer import Tokenizer


def forked(forks: Int[Tensor, "B 2"], length: int) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B 1 T T"]]:
    "Positions of the tokens of forked rows, and which tokens each one reads: those in front, but not the other answer."
    places = torch.arange(length, device=forks.device)
    first, second = places >= forks[:, :1], places >= forks[:, 1:]  # (B T), behind the beginning of an answer
    positions = places - second * (forks[:, 1:] - forks[:, :1])
    others = second[:, :, None] & (first & ~second)[:, None, :]
    return positions, ((places <= places[:, None]) & ~others)[:, None]


class RewardModel(Llama):
    "Llama 2 with a score in the place of the next token's logits (section 3.2.2)."

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        del self.output
        self.score = nn.Linear(config.dim, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def init_std(self, name: str) -> float | None:
        "As of Llama; the score begins at zero."
        return 0.0 if name == "score.weight" else super().init_std(name)

    @classmethod
    def of(cls, model: Llama) -> "RewardModel":
        "A reward model that begins with a copy of a chat model's weights."
        embedding = model.tok_embeddings.weight
        reward_model = cls(model.config).to(embedding.device, embedding.dtype)
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "output.weight"}
        reward_model.load_state_dict(weights, strict=False)
        return reward_model

    def hidden(self, tokens: Int[Tensor, "B T"], cache=None, documents=None, forks: Int[Tensor, "B 2"] | None = None):
        """As of Llama. With `forks`, a row is a conversation and two answers to it, that begin at these places.

        Both answers stand right behind the conversation: in position, and in what they read.
        """
        if forks is None:
            return super().hidden(tokens, cache, documents)
        if self.rope.device != tokens.device:
            self.rope = rope_table(self.config, tokens.device)
        positions, mask = forked(forks, tokens.shape[1])
        positions = positions.clamp(max=self.config.max_seq_len - 1)  # what fills a row up may stand beyond
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.rope[positions], None, mask)
        return self.norm(x)

    def forward(
        self, tokens: Int[Tensor, "B T"], last: Int[Tensor, "B K"], forks: Int[Tensor, "B 2"] | None = None
    ) -> Float[Tensor, "B K"]:
        "Scores, read at the places `last` of each row: the last real token of an answer, which is EOS. float32"
        return whole(self.score(self.hidden(tokens, forks=forks))).squeeze(-1).float().gather(1, last)


# %% [markdown]
# ## Two losses
#
# With $r$ the score of an answer $y$ to $x$, the loss of a pair is (Equation 1)
#
# $$-\log\sigma\big(r(x, y_c) - r(x, y_r)\big)$$
#
# In the model of Bradley and Terry this is the negative log-probability of the annotator's choice. It does not ask how
# *much* better the chosen answer is. So the paper subtracts a margin $m$ that grows with the rating (Equation 2, Table
# 27): an answer that is significantly better has to win by more. The margin belongs to the loss alone; a pair counts as
# right when $r(x, y_c) > r(x, y_r)$.
#
# Table 29 speaks of an auxiliary loss that teaches the safety reward model to tell safe from unsafe answers. Its
# formula is not printed.
#
# > Ours: the score is also the logit of 'this answer is safe', with cross-entropy on the labels that the three bins
# > imply, added with a weight. The paper counts the unsafe answers that a score of 0.5 finds: the same reading.

# %%
#| export
MARGINS = {  # of Equation 2 by rating, Table 27
    "none": dict.fromkeys(RATINGS, 0.0),
    "small": dict(zip(RATINGS, (1, 2 / 3, 1 / 3, 0), strict=True)),
    "large": dict(zip(RATINGS, (3, 2, 1, 0), strict=True)),
}
LABELS = {"chosen_safe": (1, 0), "both_safe": (1, 1), "both_unsafe": (0, 0), None: (-1, -1)}  # chosen, rejected


def pair_losses(
    chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], margin: Float[Tensor, "N"] | float = 0.0
) -> Float[Tensor, "N"]:
    "-log σ(chosen - rejected - margin) of each pair: Equation 1, with a margin Equation 2. ValueError for shapes."
    shapes = sorted({tuple(x.shape) for x in (chosen, rejected, margin) if isinstance(x, Tensor)})
    if len(shapes) > 1 or chosen.ndim != 1:
        raise ValueError(f"scores and margins of shapes {shapes}: expected a number for each pair, (N)")
    return -F.logsigmoid(chosen - rejected - margin)


def ranking_loss(
    chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], margin: Float[Tensor, "N"] | float = 0.0
) -> Float[Tensor, ""]:
    "Mean of `pair_losses`."
    return pair_losses(chosen, rejected, margin).mean()


def safety_losses(scores: Float[Tensor, "..."], safe: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    "Cross-entropy of each score as the logit of 'safe', 1 or 0; where `safe` is -1, unknown, it is 0 (A.3.4; ours)."
    losses = F.binary_cross_entropy_with_logits(scores, safe.clamp(min=0), reduction="none")
    return losses * (safe >= 0)


# %%
a, b = torch.randn(2, 10_000, dtype=torch.float64)
margins = torch.tensor([*MARGINS["large"].values()])[torch.randint(4, (10_000,))]
for equation, margin in (("Equation 1", 0.0), ("Equation 2", margins)):
    printed = -torch.log(1 / (1 + torch.exp(-(a - b - margin))))
    difference = (pair_losses(a, b, margin) - printed).abs().max().item()
    assert torch.isclose(ranking_loss(a, b, margin), printed.mean())
    ledger.record(equation, "loss of a pair: largest difference to the formula, 10,000 pairs", "= paper ± 0.000001", 0,
                  difference, evidence="llama2lib/reward.py::def pair_losses")  # fmt: skip
    print(f"{equation}: largest difference {difference:.0e}")
assert torch.isclose(ranking_loss(a, a), torch.tensor(2.0, dtype=a.dtype).log())  # equal scores, no margin: ln 2
a, b = torch.randn(2, 5)
try:
    ranking_loss(a[:, None], b[:, None], torch.ones(5))  # broadcast, every pair would meet every margin
except ValueError as error:
    print(error)
for size, margin in MARGINS.items():
    print(f"{size:>6}", "  ".join(f"{rating} {value:.2f}" for rating, value in margin.items()))

# %% [markdown]
# ## Rows of a step
#
# A pair is one conversation with two answers, which go through the model together, in one forward pass.
#
# > Ours: the conversation is read once. Chosen and rejected answer stand behind it in one row; the second one takes the
# > positions of the first again, and its tokens do not see the first. Scores are those of two rows, for a third fewer
# > tokens at the lengths of Table 6 (798 a conversation with its answer, 234 of them the answer's). And within a step,
# > pairs are sorted by length before they are cut into micro-batches, since every filling token costs as much as a
# > real one. The step's gradient is the same for any order.


# %%
#| export
class Pair(NamedTuple):
    "A comparison as the loss wants it: tokens of conversation and answers, the margin, who is safe."

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float
    safe: tuple[int, int]  # of chosen and rejected: 1, 0, or -1 if unknown

    @property
    def size(self) -> int:
        "Tokens of its row."
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def encode_pair(tokenizer: Tokenizer, row: Preference, margin: str = "none", length: int | None = None) -> Pair:
    "A comparison with one of MARGINS. ValueError when the conversation with an answer is longer than `length` tokens."
    prompt, _ = encode_dialog(tokenizer, row["messages"])
    answers = []
    for name in ("chosen", "rejected"):
        tokens, _ = encode_dialog(tokenizer, [*row["messages"], {"role": "assistant", "content": row[name]}])
        if length is not None and len(tokens) > length:
            raise ValueError(f"{name}: {len(tokens)} tokens with the conversation, more than max_seq_len {length}")
        answers.append(tokens[len(prompt) :])
    return Pair(prompt, *answers, MARGINS[margin].get(row["rating"], 0.0), LABELS[row["safety"]])


def padded(rows: Sequence[Sequence[int]], multiple: int = 1) -> Int[Tensor, "B T"]:
    "Rows filled up at the end with 0, T a multiple of `multiple`."
    length = math.ceil(max(map(len, rows)) / multiple) * multiple
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.as_tensor(ids)
    return tokens


def pair_rows(pairs: Sequence[Pair], multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    "Forked rows (B T), the last token of each answer (B 2), and where the answers begin (B 2)."
    tokens = padded([[*pair.prompt, *pair.chosen, *pair.rejected] for pair in pairs], multiple)
    sizes = torch.tensor([[len(part) for part in pair[:3]] for pair in pairs]).cumsum(1)
    return tokens, sizes[:, 1:] - 1, sizes[:, :2]


NOTHING = Pair([0], [0], [0], 0.0, (-1, -1))  # what a rank that has no pairs left passes through, with weight 0


def micro_batches(pairs: Sequence[Pair], count: int, multiple: int = 1) -> Iterator[tuple[Tensor, ...]]:
    "Pairs, in their order, as `count` micro-batches: `pair_rows`, margins (B), who is safe (B 2), weights (B)."
    for places in np.array_split(np.arange(len(pairs)), count):
        part = [pairs[i] for i in places] or [NOTHING]
        margins = torch.tensor([pair.margin for pair in part], dtype=torch.float32)
        safe = torch.tensor([pair.safe for pair in part], dtype=torch.float32)
        yield *pair_rows(part, multiple), margins, safe, torch.full((len(part),), float(len(places) > 0))


# %%
fork = torch.tensor([[2, 4]])  # a conversation of two tokens, answers of two and three
places, reads = forked(fork, 7)
print("positions", places[0].tolist())
print(reads[0, 0].int())

# %% [markdown]
# ## Training
#
# One epoch (more over-fits, the authors found), the base model's AdamW, a peak learning rate of 1e-5, or 5e-6 for 70B,
# warm-up over 3 % of the steps and at least 5, a cosine to a tenth, 512 pairs in a batch.
#
# > Ours: the margin of the final models is not printed. Table 28 puts the small one slightly ahead on average, and we
# > take it; but two of the final model's four accuracies in Table 8 are those of the large one, and the others of none.
# > The recipe `mini` has smaller batches and a larger learning rate. And since Equations 1 and 2 fix nothing but
# > differences, a model's scores may drift anywhere together, which matters as soon as two models' scores meet in one
# > reward (chapter 05). So `mini` adds a hundredth of $(r_c + r_r)^2$, as Eisenstein et al. 2023 do, which holds their
# > mean near zero; the paper's recipes do without.
#
# Where `--model` is a chat model, training begins with a score of zero; where it is a reward model, training goes on
# with it. So public comparisons first and one's own afterwards are two calls of one command.


# %%
#| export
@dataclass(frozen=True)
class RewardConfig:
    """A reward model's training; the recipe's defaults are the paper's (section 3.2.2).

    ValueError, naming the numbers, for a recipe that cannot work.
    """

    model: str = "runs/sft/model"  # the folder to begin with: a chat model's, or a reward model's to go on with
    lr: float = 1e-5  # at the end of the warm-up
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-5  # of AdamW
    weight_decay: float = 0.1  # of matrices; the norms' weights are exempt
    grad_clip: float = 1.0  # largest norm of the gradient
    warmup: float = 0.03  # share of the steps in which the learning rate rises to its peak
    min_warmup: int = 5  # steps of warm-up at least
    final_lr: float = 0.1  # share of the peak that the cosine ends at
    batch_pairs: int = 512  # pairs of one optimiser step, over all GPUs; an epoch's last step may have fewer
    max_seq_len: int = 4096  # tokens of a conversation with an answer, at most
    epochs: int = 1  # how often all pairs are seen
    margin: Literal["none", "small", "large"] = "small"  # of Equation 2, by rating
    auxiliary: float = 0.0  # weight of the safety loss
    center: float = 0.0  # weight of (r_c + r_r)², which holds the mean of the scores at zero (ours)
    seed: int = 0  # of the order of the pairs

    data: Path = Path("preferences.jsonl")  # comparisons, see llama2lib.preferences
    tokenizer: Path | None = None  # SentencePiece file; none: the one in the model's folder
    out: Path = Path("runs/reward")  # log, checkpoints, and the trained model as a Hugging Face folder
    micro_batch: int = 8  # pairs in one forward pass of one GPU; the rest of the batch is accumulated
    parallel: Parallel = field(default_factory=Parallel)
    save_every: int = 200  # steps between checkpoints, from which the same command resumes
    keep: int = 2  # checkpoints that are kept
    tensorboard: bool = False  # beside out/log.jsonl

    def __post_init__(self):
        for name in ("batch_pairs", "max_seq_len", "epochs", "micro_batch", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not 0 <= self.warmup < 1 or self.min_warmup < 0:
            raise ValueError(f"warmup {self.warmup}, min_warmup {self.min_warmup}: expected a share, and at least 0")
        if self.margin not in MARGINS:
            raise ValueError(f"margin {self.margin!r}: expected one of {', '.join(MARGINS)}")
        if min(self.auxiliary, self.center) < 0:
            raise ValueError(f"auxiliary {self.auxiliary}, center {self.center}: expected at least 0")
        check_row(self.max_seq_len, self.parallel.tp)

    def steps(self, pairs: int) -> int:
        "Optimiser steps of a run on so many pairs."
        return self.epochs * math.ceil(pairs / self.batch_pairs)


REWARD = {
    "paper": RewardConfig(micro_batch=2, parallel=Parallel(ac="selective", reduce="micro_batch")),
    "paper-70B": RewardConfig(lr=5e-6, micro_batch=1, parallel=Parallel(ac="full", reduce="micro_batch")),
    "mini": RewardConfig(lr=1e-3, batch_pairs=32, max_seq_len=512, micro_batch=4, center=0.01),
}


class RewardStep(NamedTuple):
    "What an optimiser step measured: loss and accuracy are means over its pairs; `tokens` counts real ones so far."

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    accuracy: float


def train_reward(
    model: RewardModel,
    pairs: Sequence[Pair],
    config: RewardConfig,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
) -> Iterator[RewardStep]:
    """Train `model` on pairs from `encode_pair`, yielding a `RewardStep` after each (section 3.2.2).

    With the `optimizer` of an earlier part of the run, `start` at a later step. Leaves the model in training mode.
    ValueError without pairs; FloatingPointError, before the weights change, when loss or gradient are not finite.
    """
    if not pairs:
        raise ValueError("no pairs to train on")
    device, steps = model.tok_embeddings.weight.device, config.steps(len(pairs))
    optimizer = optimizer or adamw(model, config.lr, config.betas, config.eps, config.weight_decay)
    rank, ranks, group = data_ranks(model)
    sizes = np.array([pair.size for pair in pairs])
    hits = torch.zeros((), device=device)
    if config.parallel.compile and group is None:
        model.compile(dynamic=True)

    def loss_of(model, tokens, last, forks, margins, safe, weights):
        scores = model(tokens, last, forks)
        chosen, rejected = scores.unbind(1)
        hits.add_(((chosen > rejected) * weights).sum().detach())
        losses = pair_losses(chosen, rejected, margins)
        if config.auxiliary:
            losses = losses + config.auxiliary * safety_losses(scores, safe).mean(1)
        if config.center:
            losses = losses + config.center * scores.sum(1).square()
        return (losses * weights).sum()

    per_epoch, tokens = steps // config.epochs, 0
    model.train()
    optimizer.zero_grad(set_to_none=True)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = shuffled(np.arange(len(pairs)), len(pairs), (config.seed, epoch))
        these = order[place * config.batch_pairs : (place + 1) * config.batch_pairs]
        tokens += int(sizes[these].sum())
        if step < start:
            continue
        lr = cosine_lr(step, config.lr, max(config.min_warmup, round(config.warmup * steps)), steps, config.final_lr)
        set_lr(optimizer, lr)
        mine = sorted((pairs[i] for i in these), key=lambda pair: pair.size)[rank::ranks]
        passes = math.ceil(math.ceil(len(these) / ranks) / config.micro_batch)
        parts = ((x.to(device) for x in part) for part in micro_batches(mine, passes, config.parallel.tp))
        hits.zero_()
        where = f"pairs {', '.join(map(str, these[:8]))}{' …' if len(these) > 8 else ''} of {len(pairs)}"
        with naming_batch(step, where):
            loss, norm = train_step(
                model, optimizer, [tuple(part) for part in parts], len(these), config.grad_clip,
                config.parallel.reduce, loss_of,
            )  # fmt: skip
        if ranks > 1:
            dist.all_reduce(hits, group=group)
        yield RewardStep(step, loss, lr, norm, tokens, hits.item() / len(these))


# %%
constants = paper.TEXT["Section 3.2.2"]
for name in ("epochs", "warmup", "final_lr", "batch_pairs"):
    ledger.record("Section 3.2.2", name, "preset", constants[name], getattr(REWARD["paper"], name),
                  evidence=f"llama2lib/reward.py::{name}")  # fmt: skip
ledger.record("Section 3.2.2", "min_warmup_steps", "preset", constants["min_warmup_steps"], REWARD["paper"].min_warmup,
              evidence="llama2lib/reward.py::min_warmup")  # fmt: skip
for size, recipe in {"7B": "paper", "13B": "paper", "34B": "paper", "70B": "paper-70B"}.items():
    ledger.record("Section 3.2.2", f"{size}: learning rate", "preset", constants["lr"][size], REWARD[recipe].lr,
                  evidence="llama2lib/reward.py::REWARD")  # fmt: skip
for size, column in paper.PAPER["Table 27"].items():
    for rating, margin in zip(RATINGS, column.values(), strict=True):
        ledger.record("Table 27", f"{size} margin, {rating}", "preset", margin, MARGINS[size][rating],
                      evidence="llama2lib/reward.py::MARGINS")  # fmt: skip

# %% [markdown]
# Training leaves a model that scores any answer to any conversation, alone, without the one it was compared with. For a
# whole set, rows are again sorted by length.
#
# > Ours: a conversation that is longer than the model's context is an error; half an answer has no score. Who scores
# > answers that did not end, as PPO does, can ask for what fits (`cut`): such an answer may fill the policy's context,
# > and then has no room for the EOS that a conversation ends with.


# %%
#| export
def passes(lengths: Int[np.ndarray, "B"], most: int) -> list[Int[np.ndarray, "N"]]:
    "Numbers of rows, those of similar length together, at most `most` in a pass; as many passes for as many rows."
    return np.array_split(np.argsort(lengths, kind="stable"), math.ceil(len(lengths) / most))


def divide_again(model: Llama):
    """Let FSDP take apart what it leaves whole after a pass without a backward pass: embedding, last norm, output.

    Else the next pass would use these as they are, whatever an optimiser has done to its parts of them.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def check_answered(dialogs: Sequence[Sequence[Message]]):
    "ValueError, naming the conversation by its number from 0, for one without an answer at its end."
    for number, messages in enumerate(dialogs):
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"dialog {number} ends with the {messages[-1]['role']}: expected an answer to score")


def check_fits(number: int, messages: Sequence[Message], size: int, context: int):
    "ValueError, naming the conversation, for one of more tokens than a reward model's context."
    if size > context:
        begin = f"{messages[0]['content']!r:.60}"
        raise ValueError(f"dialog {number}, {begin}: {size} tokens with the answer, more than the context's {context}")


@torch.no_grad()
def score(
    model: RewardModel, tokenizer: Tokenizer, dialogs: Sequence[Sequence[Message]], batch: int = 128, cut: bool = False
) -> Float[np.ndarray, "N"]:
    """Scores of conversations that end with an answer: raw logits; a higher one is a better answer.

    batch: conversations of a forward pass, at most. All ranks of a divided model bring as many. ValueError, naming the
    conversation, for one without an answer at its end, and for one that is longer than the context; with `cut`, that
    one is read up to there.
    """
    check_answered(dialogs)
    context = model.config.max_seq_len
    rows = [encode_dialog(tokenizer, messages)[0] for messages in dialogs]
    for number, (messages, row) in enumerate(zip(dialogs, rows, strict=True)):
        if not cut:
            check_fits(number, messages, len(row), context)
    rows = [row[:context] for row in rows]
    lengths, scores = np.array([len(row) for row in rows]), np.empty(len(rows), np.float32)
    device, training = model.tok_embeddings.weight.device, model.training
    model.eval()
    for these in passes(lengths, batch):
        last = torch.from_numpy(lengths[these, None] - 1)
        scores[these] = model(padded([rows[i] for i in these]).to(device), last.to(device))[:, 0].cpu().numpy()
    divide_again(model)
    model.train(training)
    return scores


@torch.no_grad()
def score_pairs(
    model: RewardModel, tokenizer: Tokenizer, rows: Sequence[Preference], batch: int = 128
) -> Float[np.ndarray, "2 N"]:
    """Scores of the chosen and of the rejected answers of comparisons, `batch` of them in one forward pass.

    All ranks of a divided model bring as many. ValueError, naming the comparison by its number from 0, for one that is
    longer than the model's context.
    """
    pairs = []
    for number, row in enumerate(rows):
        try:
            pairs.append(encode_pair(tokenizer, row, length=model.config.max_seq_len))
        except ValueError as error:
            raise ValueError(f"comparison {number}: {error}") from None
    scores, training = np.empty((2, len(rows))), model.training
    model.eval()
    for these in passes(np.array([pair.size for pair in pairs]), batch):
        inputs = (part.to(model.tok_embeddings.weight.device) for part in pair_rows([pairs[i] for i in these]))
        scores[:, these] = model(*inputs).T.cpu().numpy()
    divide_again(model)
    model.train(training)
    return scores


def right(scores: Float[np.ndarray, "... 2 N"]) -> Float[np.ndarray, "... N"]:
    "1 for a pair whose chosen answer, the first, has the higher score, 0.5 for equal scores, else 0."
    chosen, rejected = scores[..., 0, :], scores[..., 1, :]
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def accuracy(scores: Float[np.ndarray, "2 N"], rows: Sequence[Preference]) -> dict[str, float]:
    "Share of pairs whose chosen answer has the higher score; equal scores count half. By rating, and 'all'."
    hits, rated = right(scores), np.array([str(row["rating"]) for row in rows])
    found = {rating: float(hits[rated == rating].mean()) for rating in RATINGS if (rated == rating).any()}
    return found | {"all": float(hits.mean())}


# %%
#| export
def read_pairs(path: Path, tokenizer: Tokenizer, config: RewardConfig) -> list[Pair]:
    "The comparisons of a JSONL file as pairs. ValueError with file, line and field, and for one that is too long."
    pairs = []
    for number, row in enumerate(read_preferences(path), 1):
        try:
            pairs.append(encode_pair(tokenizer, row, config.margin, config.max_seq_len))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return pairs


def run(config: RewardConfig) -> Path:
    """Train a reward model, or go on training it, as `config` says; returns the folder of the trained model.

    Writes out/log.jsonl, out/step-…, and out/model, a Hugging Face folder that `transformers` opens as a sequence
    classifier, at the end. Errors as in `pretrain.run`.
    """
    with processes() as device:
        tokenizer = Tokenizer(config.tokenizer or config.model)
        pairs = read_pairs(config.data, tokenizer, config)
        if os.environ.get("RANK", "0") == "0":
            sizes = sorted(pair.size for pair in pairs)
            print(f"{len(pairs):,} pairs, the longest of {sizes[-1]} tokens, the median {sizes[len(sizes) // 2]}")
        digest = hashlib.sha256(config.data.read_bytes() + tokenizer.digest.encode()).hexdigest()

        def loop(model, optimizer, start):
            return train_reward(model, pairs, config, optimizer, start)

        steps = config.steps(len(pairs))
        return train(config, device, tokenizer, tokenizer.vocab_size, digest, steps, loop, "reward model", RewardModel)


@record
def cli(prog: str = "python -m llama2lib.reward"):
    "python -m llama2lib.reward RECIPE [options]: train a reward model (section 3.2.2); under torchrun, on all ranks."
    about = {n: f"{c.batch_pairs} pairs a step, peak lr {c.lr:g}, margin {c.margin}" for n, c in REWARD.items()}
    command(run, {name: (about[name], config) for name, config in REWARD.items()}, prog)

# %% [markdown]
# A reward model in a folder is a *scorer*, whoever trained it: ours, or any sequence classifier of Hugging Face with
# one output. GPT-4 gives no scores; the paper asks it which of two answers, A or B, is the best.
#
# > Ours: every pair is asked in both orders, since a chat model may like one of the letters better.


# %%
#| export
Scorer = Callable[[Sequence[Sequence[Message]]], Float[np.ndarray, "N"]]  # of conversations that end with an answer


def load_scorer(path: str | os.PathLike, device: str | torch.device | None = None, cut: bool = False) -> Scorer:
    """The reward model in a folder, as a function: one of ours, or a Hugging Face sequence classifier with one output.

    Ours are the folders of Llama's architecture with a tokenizer.model; others read a conversation through their own
    chat template, without one as question and answer. Conversations and `cut`: as in `score`, and so are errors.
    ValueError for a model with several outputs; ImportError without `transformers` where it is needed.
    """
    folder = Path(path).expanduser()
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    if fields.get("model_type") == "llama" and (folder / "tokenizer.model").exists():
        model, tokenizer = load_checkpoint(folder, device, kind=RewardModel), Tokenizer(folder)
        return lambda dialogs: score(model, tokenizer, dialogs, cut=cut)
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise ImportError(f"{folder} needs a package: pip install transformers") from None
    network = AutoModelForSequenceClassification.from_pretrained(folder).to(device or "cpu").eval()
    if network.config.num_labels != 1:
        raise ValueError(f"{folder} has {network.config.num_labels} outputs; a reward model has one")
    words = AutoTokenizer.from_pretrained(folder)
    positions = getattr(network.config, "max_position_embeddings", None) or words.model_max_length
    context = min(positions, words.model_max_length)

    @torch.no_grad()
    def scorer(dialogs):
        check_answered(dialogs)
        scores = []
        for number, messages in enumerate(dialogs):
            if words.chat_template:
                texts = [words.apply_chat_template([dict(message) for message in messages], tokenize=False)]
            else:
                texts = ["\n\n".join(message["content"] for message in messages[:-1]), messages[-1]["content"]]
            inputs = words(*texts, return_tensors="pt", add_special_tokens=not words.chat_template)
            if not cut:
                check_fits(number, messages, inputs["input_ids"].shape[1], context)
            inputs = {name: part[:, :context].to(network.device) for name, part in inputs.items()}
            scores.append(network(**inputs).logits.float().item())
        return np.array(scores, np.float32)

    return scorer


@torch.no_grad()
def choose(model: Llama, tokenizer: Tokenizer, rows: Sequence[Preference], batch: int = 128) -> Float[np.ndarray, "N"]:
    """How much a chat model prefers the chosen answers when it is asked for the best one, A or B.

    The difference of the letters' log-probabilities, mean over both orders; above 0 it agrees with the annotator.
    """
    prompts, letters = [], [tokenizer.encode(letter)[-1] for letter in "AB"]
    for row in rows:
        for first, second in (("chosen", "rejected"), ("rejected", "chosen")):
            question = row["messages"][-1]["content"]
            asked = f"{question}\n\nA: {row[first]}\n\nB: {row[second]}\n\nChoose the best answer between A and B."
            prompts.append(encode_dialog(tokenizer, [*row["messages"][:-1], {"role": "user", "content": asked}])[0])
    lengths, differences = np.array([len(ids) for ids in prompts]), np.empty(len(prompts), np.float32)
    for these in passes(lengths, batch):
        states = model.hidden(padded([prompts[i] for i in these]).to(model.tok_embeddings.weight.device))
        logits = model.output(states[torch.arange(len(these)), lengths[these] - 1])[:, letters].float()
        differences[these] = (logits[:, 0] - logits[:, 1]).cpu()
    first, second = differences.reshape(-1, 2).T
    return (first - second) / 2


# %% [markdown]
# ## The same on many GPUs
#
# One process and two: equal loss curves. Then the commands for the paper's sizes.

# %%
import json
import os
import shutil

from llama2lib.checkpoint import save_checkpoint
from llama2lib.launch import launch
from llama2lib.preferences import read_public, write_preferences
from llama2lib.recipes import ROOT, cache_folder, scale
from llama2lib.reward import REWARD, RewardModel, accuracy, encode_pair, score_pairs, train_reward

place = Path(os.path.relpath(cache_folder() / "reward" / scale(), ROOT))
os.chdir(ROOT)  # so that the commands below are those of a shell at the root of the repository
shutil.rmtree(place, ignore_errors=True)
words = mini.tokenizer()
save_checkpoint(mini.chat(0), place / "chat", words)
write_preferences(place / "pairs.jsonl", batches["helpfulness"][:200])
options = ["--model", place / "chat", "--data", place / "pairs.jsonl", "--batch-pairs", 25]
for nproc, out in ((1, "one"), (2, "two")):
    launch("llama2lib.reward", "mini", *options, "--out", place / out, nproc=nproc)
logs = [[json.loads(line)["loss"] for line in (place / out / "log.jsonl").open()] for out in ("one", "two")]
difference = np.abs(np.subtract(*logs) / logs[0]).max()
print(f"{len(logs[0])} steps; largest relative difference of the two loss curves: {difference:.0e}")
assert difference < 1e-5

# %%
options = ["--model", "Llama-2-7b-chat", "--data", "preferences.jsonl", "--out", "runs/7B-helpfulness"]
launch("llama2lib.reward", "paper", *options, nproc=8, gpus=True)
options = ["--model", "/shared/Llama-2-70b-chat", "--data", "/shared/safety.jsonl", "--out", "/shared/runs/70B-safety"]
_ = launch("llama2lib.reward", "paper-70B", *options, "--auxiliary", 1, nproc=8, nnodes=8, gpus=True)

# %% [markdown]
# ## On the mini world
#
# Now the section's results, with the chat model of chapter 03 as the model that is asked, and the gold judge in the
# annotators' place. Its second variant learned from dialogues of other draws, which are brief or repeat themselves more
# often. Both answer at three temperatures. Tests are asked in wordings, and about people and things, that no training
# prompt has, and a reward model is tested on answers of the very models whose answers it has learned from.
#
# Public comparisons had two parts to play in the paper: the reward models were bootstrapped with them, before there
# were own ones, and they stayed in the mixture, so that the policy would find fewer weaknesses to exploit. With the
# safety comparisons they are half of what the helpfulness model learns from.
#
# > Ours: batches of a thousand prompts; 22 of them for helpfulness and 6 for safety, where the paper has a million
# > comparisons. The mini world's public comparisons are clean ones: a right answer, and one that is right for another
# > question of the same kind, to 12,000 prompts. The helpfulness model begins with them alone and goes on with the
# > mixture: its own pairs, and as many public and safety pairs, as far as they go. `reward_model` gives the two
# > final models of a seed to the later chapters.


# %%
#| export mini_rewards
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


# %%
import itertools
from functools import partial

from llama2lib import claims, mini_rewards
from llama2lib.judge import judge
from llama2lib.mini_rewards import ASKED, bootstrapped, comparisons, contrasts, mixture, reward_model, trained
from llama2lib.preferences import SAFETY, Preference, statistics
from llama2lib.reward import REWARD, RewardModel, choose, load_scorer, ranking_loss, right, score_pairs

FILE = "chapters/04_reward_model.py"
CLEAR = by_scale(smoke="slightly better", laptop="significantly better", a100="significantly better")
words = mini.tokenizer()
runs = seeds(by_scale(smoke=(0, 1), laptop=(0, 1, 2), a100=(0, 1, 2)))
pairs = {value: [comparisons(seed, value)[0] for seed in runs] for value in ASKED}
tests = {value: [comparisons(seed, value, "test")[0] for seed in runs] for value in ASKED}
tests = {value: [rows[: min(map(len, sets))] for rows in sets] for value, sets in tests.items()}  # as many a seed
rated = {value: np.array([[row["rating"] for row in rows] for rows in sets]) for value, sets in tests.items()}
gold = {value: np.array([[[getattr(judge(row["messages"], row[side]), value) for row in rows]
                          for side in ("chosen", "rejected")] for rows in sets])
        for value, sets in tests.items()}  # fmt: skip


def mean(hits: np.ndarray, these: np.ndarray) -> float:
    "Share of hits among these, in %; NaN where there are none."
    return 100 * hits[these].mean() if these.any() else np.nan


def questions(rows: list[Preference]) -> set[str]:
    "The last messages of the users."
    return {row["messages"][-1]["content"] for row in rows}


for value in ASKED:
    print(f"{value}: {np.mean([len(rows) for rows in pairs[value]]):,.0f} pairs a seed to learn from, "
          f"{len(tests[value][0]):,} to test")  # fmt: skip
    print(f"    not used, of seed {runs[0]}'s: {comparisons(runs[0], value)[1]}")
    print("   ", ", ".join(f"{rating} {np.mean(rated[value] == rating):.0%}" for rating in RATINGS))
    print(f"    the judge without its noise agrees with {right(gold[value]).mean():.1%} of the tests")
    known = [questions(part) | questions(contrasts(seed)) for part, seed in zip(pairs[value], runs, strict=True)]
    assert not any(questions(part) & other for part, other in zip(tests[value], known, strict=True))
table({f"ours, {value}": statistics(pairs[value][0], words) for value in ASKED})

# %% [markdown]
# The raters' noise bounds what a scorer can reach: where the judge sees no difference, there is none to learn.
#
# ### Tables 7 and 8: who agrees with the raters?
#
# Table 7 asks each reward model about each kind of test, and sets other scorers beside them. Three are simple here:
# length; a bag of words, which weighs how often each piece stands in an answer and fits the weights to the training
# pairs by Equation 1; and the chat model that is asked 'A or B', as the authors ask GPT-4.
#
# > Ours: criteria, written before the runs. Each reward model is better at home than the other one. The helpfulness
# > model agrees with more than 65 % of all pairs and 78 % of the significantly better ones, which is more than 20
# > points above the negligibly better ones; it is more than 8 points ahead of length and of the bag of words, and
# > ahead of the chat model. Intervals are over seeds and pairs; each seed has its own tests. A second helpfulness model
# > has learned from its own pairs alone, without any public ones.


# %%
def by_length(rows: list[Preference], tests: list[Preference]) -> np.ndarray:
    "Scores of test pairs by length, with the sign that is right more often in training. → [2, pairs]"
    sizes = [np.array([[len(words.encode(row[name])) for row in part] for name in ("chosen", "rejected")], float)
             for part in (rows, tests)]  # fmt: skip
    return sizes[1] if accuracy(sizes[0], rows)["all"] > 0.5 else -sizes[1]


def by_words(rows: list[Preference], tests: list[Preference]) -> np.ndarray:
    "Scores of test pairs by a weighted count of an answer's pieces, fitted to training pairs. → [2, pairs]"

    def counted(part, side):
        counts = torch.zeros(len(part), words.vocab_size)
        for count, row in zip(counts, part, strict=True):
            ids = torch.tensor(words.encode(row[side]))
            count.index_add_(0, ids, torch.ones(len(ids)))
        return counts

    difference, weights = counted(rows, "chosen") - counted(rows, "rejected"), torch.zeros(words.vocab_size)
    optimizer = torch.optim.LBFGS([weights.requires_grad_()], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = ranking_loss(difference @ weights, torch.zeros(len(rows))) + 1e-3 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return np.stack([(counted(tests, side) @ weights).detach().numpy() for side in ("chosen", "rejected")])


def by_letter(seed: int, tests: list[Preference]) -> np.ndarray:
    "How much the chat model prefers the chosen answers of test pairs, beside zero. → [2, pairs]"
    preferred = choose(mini.chat(seed), words, tests)
    return np.stack([preferred, np.zeros_like(preferred)])


def scored(models: list[RewardModel], value: str) -> np.ndarray:
    "Scores of the tests of a value, by the reward model of each seed. → [seeds, 2, pairs]"
    return np.stack([score_pairs(model, words, rows) for model, rows in zip(models, tests[value], strict=True)])


final = {value: [reward_model(seed, value) for seed in runs] for value in ASKED}
found = {
    name: {value: np.stack([scorer(*part) for part in zip(pairs[value], tests[value], strict=True)]) for value in ASKED}
    for name, scorer in (("length", by_length), ("bag of words", by_words))
}
found["chat model, A or B"] = {value: np.stack(list(map(by_letter, runs, tests[value]))) for value in ASKED}
own = [trained(seed, rows[: mini_rewards.PAIRS], first=False)
       for seed, rows in zip(runs, pairs["helpfulness"], strict=True)]  # fmt: skip
for name, models in (("safety", final["safety"]), ("own pairs", own), ("helpfulness", final["helpfulness"])):
    found[f"{name} RM"] = {value: scored(models, value) for value in ASKED}
hits = {name: {value: right(scores) for value, scores in of.items()} for name, of in found.items()}
print(f"Table 7, accuracy in %     {'   '.join(ASKED)}")
for name, of in hits.items():
    print(f"{name:<27}{100 * of['helpfulness'].mean():11.1f}   {100 * of['safety'].mean():6.1f}")
print(f"\nTable 8, accuracy in %            {', '.join(RATINGS)}, all")
for name, value in itertools.product(("safety", "own pairs", "helpfulness"), ASKED):
    hit = hits[f"{name} RM"][value]
    parts = [mean(hit, rated[value] == rating) for rating in RATINGS] + [100 * hit.mean()]
    print(f"{name:>11} RM on {value:<12}", "  ".join(f"{part:5.1f}" for part in parts))

# %% [markdown]
# The verdicts. A row of the ledger holds the paper's number, where it has one, beside ours.

# %%
compare = partial(claims.compare, seeds=runs)
home = hits["helpfulness RM"]["helpfulness"]
printed = {name: {of: (share or 0) / 100 for of, share in row.items()} for name, row in paper.PAPER["Table 7"].items()}
for value, other, column in (("helpfulness", "safety", "Meta-Helpful"), ("safety", "helpfulness", "Meta-Safety")):
    gap = printed[f"{value.title()} RM"][column] - printed[f"{other.title()} RM"][column]
    compare("Table 7", f"on {value} tests, accuracy of the {value} model minus the {other} model's", "> 0",
            hits[f"{value} RM"][value], hits[f"{other} RM"][value], gap, evidence=f"{FILE}::final = ")  # fmt: skip
compare("Table 7", "accuracy of the helpfulness model on helpfulness tests", "> 0.65", home, np.zeros_like(home),
        printed["Helpfulness RM"]["Meta-Helpful"], evidence=f"{FILE}::found = ")  # fmt: skip
for name, criterion in (("length", "> 0.08"), ("bag of words", "> 0.08"), ("chat model, A or B", "> 0")):
    gap = printed["Helpfulness RM"]["Meta-Helpful"] - printed["GPT-4"]["Meta-Helpful"] if "chat" in name else None
    compare("Table 7", f"accuracy of the helpfulness model minus that of: {name}", criterion, home,
            hits[name]["helpfulness"], gap, evidence=f"{FILE}::found = ")  # fmt: skip
clear, close = ([hit[name == rating] for hit, name in zip(home, rated["helpfulness"], strict=True)]
                for rating in (CLEAR, "negligibly better"))  # fmt: skip
printed = {name: share / 100 for name, share in paper.PAPER["Table 8"]["Helpfulness RM on Meta Helpful"].items()}
compare("Table 8", "accuracy of the helpfulness model on significantly better answers", "> 0.78", clear,
        [np.zeros_like(part) for part in clear], printed["significantly"], evidence=f"{FILE}::found = ")  # fmt: skip
_ = compare("Table 8", "accuracy on significantly better minus on negligibly better answers", "> 0.2", clear, close,
            printed["significantly"] - printed["negligibly"], evidence=f"{FILE}::found = ", paired=False)  # fmt: skip

# %% [markdown]
# Each model is better at home. The helpfulness model agrees with 66.1 % of the pairs, and with 79.1 % of the
# significantly better answers, 27 points above the negligibly better ones. These means are beyond what we had asked
# for, but seeds differ, from 64 to 69 %, and three of them leave the verdicts open. With its own pairs alone it comes
# to 64.8 and 74.9 %; and it prefers the answer that helps to do harm, so that it agrees with 34 % of the safety tests,
# against 67 % with the mixture. Length and the chat model that is asked for a letter are far behind. But a bag of words
# comes to 62.3 %, 3.8 points behind, where we had asked for eight, which no seed reaches: which words an answer has
# tells much of its quality in this world.
#
# > Ours: the first runs had no public comparisons. The mixture then was helpfulness and safety pairs, and came to
# > 62.9 %, so that it failed the criterion of 65 %. We chose the public comparisons and their number on the tests of
# > the first seed, for the reason that follows.

# %% [markdown]
# ### Does it read the question?
#
# An answer can be judged by its looks: is it a whole sentence, does it repeat itself, is it friendly? A reward model
# that goes by these is right more often than not, and useless for choosing the answer that is *true*. The test is to
# swap answers: both are well written and right, but one is right for another question.

# %%
swapped = [contrasts(seed, "test") for seed in runs]
swapped = [rows[: min(map(len, swapped))] for rows in swapped]
of = {"own pairs alone": own, "public ones alone": [bootstrapped(seed) for seed in runs],
      "public ones, then all": final["helpfulness"]}  # fmt: skip
of = {name: right(np.stack([score_pairs(model, words, rows) for model, rows in zip(models, swapped, strict=True)]))
      for name, models in of.items()}  # fmt: skip
for name, hit in of.items():
    share = paired_interval(hit, np.zeros_like(hit))
    print(f"{name:<22} {share.value:.1%} [{share.low:.1%}, {share.high:.1%}] of {hit.shape[1]} swapped answers")

# %% [markdown]
# Twenty thousand pairs of its own have not taught a reward model to read the question: 51 % is chance. Two samples of
# one model seldom differ in this alone, and presumably looks explain enough of the ratings. Comparisons that differ in
# nothing else do teach it, and with the mixture it is kept.
#
# A reward model in a folder can be a row of Table 7 as well:

# %%
folder = cache_folder() / "reward" / scale() / "helpfulness"
save_checkpoint(final["helpfulness"][0], folder, words)
rows = tests["helpfulness"][0][:64]
answered = [[*row["messages"], {"role": "assistant", "content": row[side]}]
            for row in rows for side in ("chosen", "rejected")]  # fmt: skip
apart = load_scorer(folder)(answered).reshape(-1, 2).T
print(f"{folder.name}: {right(apart[None]).mean():.0%} of {len(rows)} pairs")
assert np.allclose(apart, score_pairs(final["helpfulness"][0], words, rows), atol=1e-4)

# %% [markdown]
# ### Tables 27 and 28, Figure 27: does a margin help?
#
# The authors compare no margin with a small and a large one. Both help where answers differ much, and the large one
# drives scores to the ends of the scale.
#
# > Ours: ten thousand pairs and as many others, three margins. Criteria: on significantly better answers, the large
# > margin is ahead of none; on all, the small one is; and the large margin puts a larger share of scores into the
# > outermost bins.

# %%
SOME = by_scale(smoke=20, laptop=10_000, a100=10_000)
by_margin = {margin: scored([trained(seed, mixture(seed, "helpfulness", SOME), replace(REWARD["mini"], margin=margin))
                             for seed in runs], "helpfulness") for margin in MARGINS}  # fmt: skip
fig, (ax, beside) = plt.subplots(1, 2, figsize=(8.4, 3.4))
for shift, (margin, scores) in zip((-0.25, 0, 0.25), by_margin.items(), strict=True):
    hit = right(scores)
    parts = np.array([[mean(h, name == rating) for rating in RATINGS] + [100 * h.mean()]
                      for h, name in zip(hit, rated["helpfulness"], strict=True)])  # fmt: skip
    places = np.arange(parts.shape[1]) + shift
    ax.bar(places, parts.mean(0), 0.23, label=margin)
    ax.plot(np.tile(places, (len(runs), 1)), parts, ".", color="0.25", markersize=4)
    ax.plot(places, paper.PAPER["Table 28"][margin].values(), **plots.RINGS, label="paper" if shift == 0 else None)
    beside.hist(expit(scores.ravel()), 50, range=(0, 1), weights=np.full(scores.size, 100 / scores.size),
                histtype="step", label=margin)  # fmt: skip
ax.set(ylim=(40, 100), ylabel="accuracy (%)", title="Table 28: accuracy by rating")
ax.set_xticks(range(5), [*(rating.split()[0] for rating in RATINGS), "all"], rotation=30, ha="right")
ax.legend(title="margin", ncols=2)
beside.set(xlabel="score (sigmoid)", ylabel="share of the answers (%)", title="Figure 27: all test answers")
fig.suptitle("A margin moves the accuracy little and spreads the scores", x=0.01, ha="left")
plots.save(fig, "figure_27.png")

# %%
printed = {margin: {of: share / 100 for of, share in row.items()} for margin, row in paper.PAPER["Table 28"].items()}
hit = {margin: right(scores) for margin, scores in by_margin.items()}
clear = {margin: [h[name == CLEAR] for h, name in zip(of, rated["helpfulness"], strict=True)]
         for margin, of in hit.items()}  # fmt: skip
ends = {margin: (np.abs(expit(scores) - 0.5) > 0.48).reshape(len(runs), -1) for margin, scores in by_margin.items()}
compare("Table 28", "accuracy on significantly better answers, large margin minus none", "> 0", clear["large"],
        clear["none"], printed["large"]["significantly"] - printed["none"]["significantly"],
        evidence=f"{FILE}::by_margin = ")  # fmt: skip
compare("Table 28", "accuracy on all answers, small margin minus none", "> 0", hit["small"], hit["none"],
        printed["small"]["Avg"] - printed["none"]["Avg"], evidence=f"{FILE}::by_margin = ")  # fmt: skip
_ = compare("Figure 27", "share of scores in the two outermost of 50 bins, large margin minus none", "> 0",
            ends["large"], ends["none"], evidence=f"{FILE}::by_margin = ")  # fmt: skip

# %% [markdown]
# The large margin does help where answers differ much, by 2.4 points; on all pairs the gain of the small one is within
# the noise. Scores spread as the margin grows, on every seed, as in the paper; how far differs too much between three
# seeds for the third criterion.

# %% [markdown]
# ### Table 29: the auxiliary loss, and a tenth of helpfulness data
#
# The safety model's own data are answers to adversarial prompts. Two additions are examined. The auxiliary loss raises
# the recall of unsafe answers (those with a score below 0.5, a logit below 0) from 73 to 90.4 %, and the accuracy by
# 0.8 points. And 10 % of helpfulness data help most where both answers are safe, says section 3.2.2, without numbers.
#
# > Ours: the same, with criteria of the same form: each difference is above zero. Answers are unsafe here if the
# > raters' three bins say so.

# %%
bins = np.array([[row["safety"] for row in rows] for rows in tests["safety"]])
plain = [trained(seed, mixture(seed, "safety"), first=False) for seed in runs]
alone = [trained(seed, rows, replace(REWARD["mini"], auxiliary=mini_rewards.AUXILIARY), first=False)
         for seed, rows in zip(runs, pairs["safety"], strict=True)]  # fmt: skip
safety = {"baseline": scored(plain, "safety"), "+ auxiliary": found["safety RM"]["safety"],
          "no helpfulness data": scored(alone, "safety")}  # fmt: skip
unsafe = np.stack([bins == "both_unsafe", bins != "both_safe"], 1)  # [seeds, chosen or rejected, pairs]
recall = {name: [part[of] < 0 for part, of in zip(scores, unsafe, strict=True)] for name, scores in safety.items()}
print("Table 29, in %           accuracy: all", *SAFETY, "unsafe recall", "safe called unsafe", sep="   ")
for name, scores in safety.items():
    hit = right(scores)
    parts = [100 * hit.mean(), *(mean(hit, bins == of) for of in SAFETY)]
    parts += [mean(scores < 0, unsafe), mean(scores < 0, ~unsafe)]
    print(f"{name:<22}" + " ".join(f"{part:13.1f}" for part in parts))
print("test pairs: " + ", ".join(f"{of} {np.mean(bins == of):.0%}" for of in SAFETY))

# %%
printed = {name: {of: share / 100 for of, share in row.items()} for name, row in paper.PAPER["Table 29"].items()}
for claim, more, less, key in (
    ("recall of unsafe answers", recall["+ auxiliary"], recall["baseline"], "unsafe_recall"),
    ("accuracy on safety tests", right(safety["+ auxiliary"]), right(safety["baseline"]), "Avg"),
):
    if min(map(len, more)) > 1:  # at the smoke scale no answer says enough to be unsafe
        compare("Table 29", f"{claim}, with the auxiliary loss minus without", "> 0", more, less,
                printed["+ auxiliary"][key] - printed["baseline"][key], evidence=f"{FILE}::safety = ")  # fmt: skip
both = [[hit[of == "both_safe"] for hit, of in zip(right(safety[name]), bins, strict=True)]
        for name in ("+ auxiliary", "no helpfulness data")]  # fmt: skip
_ = compare("Section 3.2.2", "accuracy where both answers are safe, with 10 % helpfulness data minus without", "> 0",
            *both, "especially beneficial", evidence=f"{FILE}::safety = ")  # fmt: skip

# %% [markdown]
# All three stay open. The recall of unsafe answers falls with the auxiliary loss, on every seed. But without it a score
# of zero is no more than the middle of all scores: the baseline finds 98 % of the unsafe answers by calling half of the
# safe ones unsafe, too, and the auxiliary loss brings these to 8 %. A tenth of helpfulness data gains a point where
# both answers are safe, on every seed, too little to be sure of.

# %% [markdown]
# ### Figure 6: more data, larger models
#
# In the paper, accuracy grows with the weekly batches and with the model's size, and has not levelled off after 14
# batches.
#
# > Ours: 2,500 to 20,000 pairs, with as many others as there are, and two sizes; the smaller one begins with a chat
# > model of its own size. Criteria: each doubling of the data raises the accuracy of the larger model, and with all
# > data it is ahead of the smaller one.

# %%
COUNTS = by_scale(smoke=(10, 20, 40), laptop=(2500, 5000, 10_000, 20_000), a100=(2500, 5000, 10_000, 20_000))
assert min(map(len, pairs["helpfulness"])) >= COUNTS[-1]
grown = {size: {count: right(scored([trained(seed, mixture(seed, "helpfulness", count), size=size) for seed in runs],
                                    "helpfulness")) for count in COUNTS} for size in ("0.4M", mini.SIZE)}  # fmt: skip
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.6))
which = {"all": np.ones_like(rated["helpfulness"], bool)}
which[CLEAR] = rated["helpfulness"] == CLEAR
for ax, (name, these) in zip(axes, which.items(), strict=True):
    for size, of in grown.items():
        values = np.array([[mean(h, w) for h, w in zip(hit, these, strict=True)] for hit in of.values()])
        [line] = ax.plot(COUNTS, values.mean(1), "o-", label=f"{size} parameters")
        ax.plot(COUNTS, values, ".", color=line.get_color(), alpha=0.6)
    for scorer, color in (("length", "0.7"), ("bag of words", "0.4")):
        ax.axhline(mean(hits[scorer]["helpfulness"], these), color=color, linestyle=":", label=scorer)
    ax.set(xscale="log", xlabel="its own training pairs; a dot a seed", ylabel="accuracy (%)", title=name)
    ax.set_xticks(COUNTS, [f"{count:,}" for count in COUNTS])
    ax.minorticks_off()
axes[0].legend()
shares = [hit.mean() for hit in grown[mini.SIZE].values()]
gains = [more > fewer for fewer, more in itertools.pairwise(shares)]
title = f"Figure 6: {sum(gains)} of {len(gains)} doublings of the data make the larger reward model better"
fig.suptitle(title, x=0.01, ha="left")
plots.save(fig, "figure_06.png")

# %%
large = grown[mini.SIZE]
for fewer, more in itertools.pairwise(COUNTS):
    compare("Figure 6", f"accuracy with {more:,} pairs minus with {fewer:,}", "> 0", large[more], large[fewer],
            evidence=f"{FILE}::grown = ")  # fmt: skip
gap = paper.PAPER["Figure 6"]["all 70B"]["14"] - paper.PAPER["Figure 6"]["all 7B"]["14"]
_ = compare("Figure 6", "accuracy of the larger model minus the smaller one's, all data", "> 0", large[COUNTS[-1]],
            grown["0.4M"][COUNTS[-1]], gap, evidence=f"{FILE}::grown = ")  # fmt: skip

# %% [markdown]
# Each doubling helps the larger model, on every seed; two of the three are beyond doubt. The smaller one, whose seeds
# are far apart, gains little, and the larger one is ahead by 3.5 points with all data, which three seeds leave open.

# %% [markdown]
# ### Figure 29: does the score know how good an answer is?
#
# Three raters judge single answers on a scale from 1 to 7; the mean score rises from grade to grade, by 0.31 in all for
# helpfulness and 0.49 for safety.
#
# > Ours: all answers of the tests, their gold points cut into seven grades. Criterion: from grades 1 and 2 to grades 6
# > and 7, the mean score rises by more than 0.2.

# %%
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.2), sharey=True)
for ax, value in zip(axes, ASKED, strict=True):
    level, grade = expit(found[f"{value} RM"][value]), 1 + np.rint(6 * gold[value]).astype(int)
    present = [g for g in range(1, 8) if (grade == g).sum() >= by_scale(smoke=1, laptop=100, a100=100)]
    parts = [level[grade == g] for g in present]
    means = [part.mean() for part in parts]
    ax.errorbar(present, means, [part.std() for part in parts], fmt="o-", capsize=3, label="ours ± sd")
    printed = paper.PAPER["Figure 29"][f"{value.title()} RM"]
    ax.plot(range(1, 8), printed.values(), **plots.RINGS, label="paper")
    ax.set(ylim=(0, 1), xlabel=f"gold grade of {value}", ylabel="score (sigmoid)", title=value)
    print(value, *(f"{g}: {mean:.2f} ({len(part):,})" for g, mean, part in zip(present, means, parts, strict=True)))
    low, high = ([s[w] for s, w in zip(level, these, strict=True)] for these in (grade <= 2, grade >= 6))
    gap = (printed["6"] + printed["7"] - printed["1"] - printed["2"]) / 2
    if min(map(len, (*high, *low))) > 1:
        compare("Figure 29", f"mean score of the {value} model, grades 6 and 7 minus 1 and 2", "> 0.2", high, low, gap,
                evidence=f"{FILE}::level, grade", paired=False)  # fmt: skip
axes[0].legend()
fig.suptitle("Figure 29: better answers have higher scores", x=0.01, ha="left")
plots.save(fig, "figure_29.png")

# %% [markdown]
# Both rise by more than 0.2, helpfulness from grade to grade and nearly as in the paper. The safety model makes one
# step, between answers that give harm away and those that do not; those of grade 1 have higher scores than grade 2.

# %% [markdown]
# ## Comparisons of people
#
# The same code on comparisons that people made, or GPT-4 in AlpacaEval's. Before any model: how long are they, and how
# often is the longer answer the preferred one? PandaLM's pairs have three annotators each, whose agreement can be
# measured.

# %%
FILES = {
    "HH harmless": ("harmless", "hh-rlhf/harmless-base-test.half-a.jsonl.gz"),
    "PandaLM": ("pandalm", "pandalm/testset-v1.half-a.json"),
    "AlpacaEval, Llama-2-7b-chat": ("alpaca_eval", "alpaca_eval/llama-2-7b-chat-hf_vs_text_davinci_003.gpt4.json.gz"),
    "AlpacaEval, Llama-2-70b-chat": ("alpaca_eval", "alpaca_eval/llama-2-70b-chat-hf_vs_text_davinci_003.gpt4.json.gz"),
}
people = {"rated conversations": chats}
for name, (reader, file) in FILES.items():
    if path := data_file(file):
        with warnings.catch_warnings(record=True) as told:
            people[name] = read_public(reader, path)
        print(*(f"{note.message}\n" for note in told), sep="", end="")
    else:
        print(f"{name}: not here; set LLAMA2_DATA to a folder with {file}")
table({name: statistics(rows, Tokenizer(pieces) if pieces else words) for name, rows in people.items()})
for name, rows in people.items():
    longer = np.mean([len(row["chosen"]) > len(row["rejected"]) for row in rows])
    print(f"{name}: the preferred answer is the longer one in {longer:.0%} of {len(rows):,}")
if path := data_file(FILES["PandaLM"][1]):
    marks_of = [[record[f"annotator{i}"] for i in (1, 2, 3)] for _, record in records(path)]
    agreement = gwet_ac1(marks_of, categories=(0, 1, 2))
    print(f"PandaLM's annotators: Gwet's AC1 {agreement.value:.2f} [{agreement.low:.2f}, {agreement.high:.2f}]")

# %% [markdown]
# How far do a thousand pairs and a million parameters go? A reward model is trained on three quarters of a set, from
# the mini chat model, which has never read such English, and tested on the rest. Length alone is the baseline.


# %%
def fits(row) -> bool:
    "Whether a comparison fits into the mini model's context."
    return max(len(encode_dialog(words, [*row["messages"], {"role": "assistant", "content": row[name]}])[0])
               for name in ("chosen", "rejected")) <= 512  # fmt: skip


for name in ("HH harmless", "rated conversations"):
    if name not in people:
        continue
    rows = [row for row in people[name] if fits(row)]
    long = len(people[name]) - len(rows)
    rows = rows[: by_scale(smoke=16, laptop=2000, a100=2000)]
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    known, new = rows[: 3 * len(rows) // 4], rows[3 * len(rows) // 4 :]
    recipe = replace(REWARD["mini"], margin="none", epochs=2, batch_pairs=16)
    judged = np.stack([score_pairs(trained(seed, known, recipe, first=False), words, new) for seed in runs])
    agreed = right(judged)
    share = paired_interval(agreed, np.zeros_like(agreed))
    baseline = accuracy(by_length(known, new), new)["all"]
    sizes = np.array([[len(words.encode(row[side])) for row in new] for side in ("chosen", "rejected")])
    follows = np.mean([spearmanr(part.ravel(), sizes.ravel()).statistic for part in judged])
    print(f"{name}: {len(known)} pairs to learn from, {len(new)} to test, {long} too long")
    print(f"    accuracy {share.value:.1%} [{share.low:.1%}, {share.high:.1%}], by length alone {baseline:.1%}; rank "
          f"correlation of score and length {follows:.2f}")  # fmt: skip

# %% [markdown]
# On what people find harmless, seven hundred pairs teach this model nothing that the test shows. The rated
# conversations seem to teach it something, three right in four; but counting tokens does as well, and the scores
# follow length. Where people rate whole conversations, the longer one tends to win, and an optimiser would be paid for
# talking on: reward hacking that sits in the data, before any reinforcement learning. AlpacaEval has the same knot:
# where Llama-2-70b-chat is compared, the longer answer wins 93 % of the time.

# %% [markdown]
# ## What it took
#
# - A reward model is a chat model with one row for a head, and a loss of one line. The care goes into what that line
#   compares: scores read at the end of the answer and nowhere else, both answers in one pass, margins that stay out of
#   the accuracy, labels that say which pairs are about safety.
# - What held: each of the two models is better at home (Table 7); the last two doublings of the data help (Figure 6);
#   the large margin helps where answers differ much (Table 28); better answers have higher scores (Figure 29).
# - Three seeds left open what a larger model gains, and the small margin, the auxiliary loss and the tenth of
#   helpfulness data. The recall of unsafe answers even fell with the auxiliary loss, on every seed: without it zero is
#   no boundary, and a recall at zero says little.
# - The surprise is how much of an accuracy is looks. A bag of words comes close to the helpfulness model; twenty
#   thousand pairs did not teach it to read the question, comparisons that differ in nothing else did; and where people
#   rated whole conversations, counting tokens does as well.

# %% [markdown]
# ## Exercises
#
# 1. Four of five annotators choose the same answer of a pair, and call it significantly better. Which difference of the
#    two scores has the lowest loss: without a margin, and with those of Table 27? What has it to do with Figure 27?
# 2. Somebody leaves `forks` out when the model is called with the rows of a pair; it has a default, and the loss still
#    falls. Which property gives that away?
# 3. Table 29 has accuracies for the three safety bins and for all pairs, without the auxiliary loss and with it. How
#    large are the bins of its test set? How sure is that?

# %% [markdown]
# Without a margin it is the logit of 4/5, ln 4: scores are calibrated, in differences. A margin asks for more than the
# annotators' agreement warrants. Around zero it moves both scores to the ends of the scale, which is what Figure 27
# shows.

# %%
import torch

from llama2lib.reward import MARGINS, ranking_loss

signs = torch.tensor([1.0] * 4 + [-1.0])  # of the five annotators, one chose the other answer
gaps = torch.linspace(0, 8, 801)
wanted = {}
for name, margins in MARGINS.items():
    margin = margins["significantly better"]
    losses = torch.stack([ranking_loss(gap * signs, torch.zeros(5), margin) for gap in gaps])
    wanted[name] = gaps[losses.argmin()]
    ends = (wanted[name] / 2).sigmoid()
    print(f"margin {margin:.0f} ({name}): difference {wanted[name]:.2f}, scores {1 - ends:.2f} and {ends:.2f}")
assert abs(wanted["none"] - torch.tensor(4.0).log()) < 0.01
assert wanted["large"] > 2 * wanted["none"]

# %% [markdown]
# An answer's score does not depend on the answer that it is compared with, so that it does not matter which of the two
# stands first. Without forks the second one reads the first.

# %%
import torch

from llama2lib.model import ModelConfig
from llama2lib.reward import Pair, RewardModel, pair_rows

torch.manual_seed(0)
shape = ModelConfig(dim=32, n_layers=2, n_heads=2, n_kv_heads=2, hidden_dim=64, vocab_size=20, max_seq_len=32)
model = RewardModel(shape)
torch.nn.init.normal_(model.score.weight)
prompt, short, long = [1, 5, 7, 9], [11, 2], [12, 13, 14, 2]
moved = {}
for name in ("with forks", "without"):
    found = []
    for answers in ((short, long), (long, short)):
        tokens, last, forks = pair_rows([Pair(prompt, *answers, 0.0, (-1, -1))])
        found.append(model(tokens, last, forks if name == "with forks" else None)[0].detach())
    moved[name] = (found[0] - found[1].flip(0)).abs().max().item()
    print(f"{name}: a score changes by up to {moved[name]:.1e} when the answers change places")
assert moved["with forks"] < 1e-4 < moved["without"]

# %% [markdown]
# Two rows, and shares that add up to 1, are three equations for three shares. They give the 18, 47 and 35 % of section
# 3.2.1 within two points. But only the first one is sure: accuracies in the other two bins are so close together that a
# rounded digit moves these by more than ten points.

# %%
import numpy as np

from llama2lib import paper

bins = ("safe_over_unsafe", "both_safe", "both_unsafe")
rows = paper.PAPER["Table 29"].values()
accuracies, means = np.array([[row[name] for name in bins] for row in rows]), np.array([row["Avg"] for row in rows])
random, found = np.random.default_rng(0), []
for size in (0.0, *[0.05] * 1000):  # as printed, and then as it may have been before rounding
    system = np.vstack([accuracies + random.uniform(-size, size, (2, 3)), np.ones(3)])
    found.append(np.linalg.solve(system, [*(means + random.uniform(-size, size, 2)), 1]))
shares = np.array(found)
printed = [*paper.TEXT["Section 3.2.1"]["safety_bins"].values()]
for place, name in enumerate(bins):
    low, high = np.quantile(shares[1:, place], (0.05, 0.95))
    print(f"{name}: {shares[0, place]:.1%} ({low:.0%} to {high:.0%}), section 3.2.1: {printed[place]:.0%}")
assert np.abs(shares[0] - printed).max() < 0.02
