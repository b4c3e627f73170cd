"""Generated from chapters/04_reward_model.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Preference",
    "SAFETY",
    "check_preference",
    "read_preferences",
    "write_preferences",
    "ROLES",
    "transcript",
    "comparison",
    "better",
    "from_hh",
    "from_summarize",
    "from_webgpt",
    "from_stackexchange",
    "from_shp",
    "from_gptj",
    "from_pandalm",
    "from_alpaca_eval",
    "READERS",
    "read_public",
    "rated_conversations",
    "Statistics",
    "statistics",
    "Answerer",
    "sampler",
    "written",
    "two_answers",
    "collect",
    "helpfulness_mix",
    "safety_mix",
]


# ---------- chapters/04_reward_model.py · A comparison

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


# ---------- chapters/04_reward_model.py · Public comparisons

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


# ---------- chapters/04_reward_model.py · Tables 6 and 26: how long are they?

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


# ---------- chapters/04_reward_model.py · Collecting comparisons

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
