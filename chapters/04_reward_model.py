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

from llama2lib import ledger, mini, paper, plots
from llama2lib.dialog import encode_dialog
from llama2lib.judge import RATINGS, judge, scores
from llama2lib.recipes import by_scale, cached, data_file, scale, seeds
from llama2lib.stats import paired_interval

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
#| export
import gzip
import itertools
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from llama2lib.chat import respond
from llama2lib.dialog import Message, check_dialog
from llama2lib.judge import RATINGS, SAFE, judge, rate
from llama2lib.model import Llama
from llama2lib.recipes import write_atomic
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
    for name, answer in (("messages", None), ("chosen", row["chosen"]), ("rejected", row["rejected"])):
        try:
            check_dialog(row["messages"] + ([{"role": "assistant", "content": answer}] if answer else []))
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


def records(path: str | os.PathLike) -> Iterator[tuple[int, object]]:
    "The numbered records of a JSON list or of JSON lines, from 1, gzipped or not. ValueError with file and line."
    opened = gzip.open if str(path).endswith(".gz") else open
    with opened(path, "rb") as file:
        number = 0
        try:
            if re.search(r"\.json(\.gz)?$", str(path)):
                yield from enumerate(json.load(file), 1)
                return
            for number, line in enumerate(file, 1):
                yield number, json.loads(line.decode())
        except (json.JSONDecodeError, UnicodeDecodeError, EOFError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}:{number}: not JSON ({error})") from None


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
    for field, value in {"rating": "much better", "rejected": "Tom lives in Oslo. ", "safety": "unsafe"}.items():
        (Path(folder) / "bad.jsonl").write_text(json.dumps(example | {field: value}))
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

    Records that are no comparison are left out, and one warning says how many and why. ValueError for another name, or
    a file whose records are not of this set; ImportError without the package `datasets` where it is needed.
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
    for number, record in found:
        try:
            rows.append(reader(record))
        except ValueError as error:
            left_out[re.sub(r"\d+|'.*'", "…", str(error))] += 1
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            wrong = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path or place}:{number}: not a record of {name} ({wrong})") from None
    if left_out:
        reasons = "; ".join(f"{count} times {reason}" for reason, count in left_out.most_common())
        warnings.warn(f"{name}: {left_out.total():,} of {number:,} records left out ({reasons})", stacklevel=2)
    return rows

# %% [markdown]
# ### Tables 6 and 26: how long are they?
#
# Both tables give turns and tokens. A dialogue's turns are its user messages. An example is what a reward model reads:
# the conversation and one answer. The prompt column cannot be all of that: Anthropic's 17.7 tokens of prompt and 88.4
# of answer do not make 251.5. It fits when a prompt is one message of the user.
#
# > Ours: this reading of 'prompt'; tokens are those of the texts, without BOS, EOS and brackets.


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


printed = {f"{name}, paper": row for name, row in paper.TABLES[6].items()}
llama_words = data_file("llama2-tokenizer/tokenizer.model")

# %% [markdown]
# ## Collecting comparisons
#
# The paper's protocol: an annotator writes a prompt; two answers come from two *variants* of the model, at varied
# temperatures, so that they differ; the annotator chooses and rates. Each week a batch is collected with the newest
# models, since a reward model knows only what it has seen: when the policy moves, its training set has to follow.
#
# > Ours: the rater is the gold judge of chapter 12, with noise of 0.1 on the difference of two scores, and the cuts 0.1,
# > 0.25 and 0.5 between the four ratings. Pairs of equal answers, and those with an answer that was cut off, are not
# > shown to it. A rater of safety looks at gold safety, calls an answer safe from 0.4 on (it gives nothing away), and its
# > pairs with an unsafe chosen and a safe rejected answer are left out, as in the paper.


# %%
#| export
class Variant(NamedTuple):
    "A model that answers, and the temperatures it may do so at."

    model: Llama
    temperatures: Sequence[float] = (0.7, 1.0, 1.3)


def two_answers(
    variants: Sequence[Variant], tokenizer: Tokenizer, dialogs: Sequence[list[Message]], seed: int, max_new_tokens: int
) -> list[list]:
    "For each dialog, answers of two variants (of one variant, if there is one) at temperatures drawn at random."
    random = np.random.default_rng([7, seed])
    order = random.permuted(np.tile(np.arange(len(variants)), (len(dialogs), 1)), axis=1)
    order = np.pad(order, ((0, 0), (0, 1)), mode="edge")[:, :2]
    answers = [[None, None] for _ in dialogs]
    places: dict[tuple, list] = {}
    for dialog, side in itertools.product(range(len(dialogs)), (0, 1)):
        variant = order[dialog, side]
        temperature = variants[variant].temperatures[random.integers(len(variants[variant].temperatures))]
        places.setdefault((side, variant, temperature), []).append(dialog)
    for number, ((side, variant, temperature), these) in enumerate(sorted(places.items())):
        asked, sampled = [dialogs[i] for i in these], seed * 1000 + number
        replies = respond(variants[variant].model, tokenizer, asked, max_new_tokens, temperature, seed=sampled)
        for i, reply in zip(these, replies, strict=True):
            answers[i][side] = reply
    return answers


def collect(
    variants: Sequence[Variant],
    tokenizer: Tokenizer,
    dialogs: Sequence[list[Message]],
    value: str,
    seed: int,
    source: str,
    max_new_tokens: int = 64,
) -> tuple[list[Preference], Counter]:
    """A batch of comparisons by simulated raters (section 3.2.1), and why how many pairs were not used.

    dialogs: of the mini world, each ends with a user message. value: 'helpfulness' or 'safety', what the raters look
    at; safety fills the field of that name. ValueError for another value, or a dialog that the judge cannot read.
    """
    if value not in ("helpfulness", "safety"):
        raise ValueError(f"value {value!r}: expected 'helpfulness' or 'safety'")
    rows, unused = [], Counter()
    pairs = two_answers(variants, tokenizer, dialogs, seed, max_new_tokens)
    for number, (messages, replies) in enumerate(zip(dialogs, pairs, strict=True)):
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
            row = {"messages": messages, "chosen": texts[preferred], "rejected": texts[1 - preferred], "rating": rating}
            bin = SAFETY[0 if safe and not other_safe else 1 if safe else 2] if value == "safety" else None
            rows.append(row | {"safety": bin, "source": source})
    return rows, unused


def helpfulness_mix(helpfulness: Sequence, others: Sequence, seed: int) -> list:
    "Data of the helpfulness reward model: all of its own, and as many of the others, drawn uniformly (3.2.2)."
    drawn = np.random.default_rng([8, seed]).permutation(len(others))[: len(helpfulness)]
    return [*helpfulness, *(others[i] for i in drawn)]


def safety_mix(safety: Sequence, helpfulness: Sequence, seed: int, share: float = 0.1) -> list:
    "Data of the safety reward model: all of its own, and helpfulness pairs that make up a `share` of it (3.2.2)."
    drawn = np.random.default_rng([9, seed]).permutation(len(helpfulness))[: round(len(safety) * share / (1 - share))]
    return [*safety, *(helpfulness[i] for i in drawn)]


# %% [markdown]
# ## The reward model
#
# It is the chat model with another head: where the language model has a matrix that gives a logit for each piece of the
# vocabulary, the reward model has a single row, and the product with the last token's state is the score. It begins
# with the chat model's weights, so that it knows what the chat model knows: otherwise it could prefer made-up facts.
#
# The *last real token* is EOS, behind the answer. Tokens that fill up a row stand behind it, and since attention looks
# back only, they change nothing. A reward model that reads its score off such a filling token, or off the first EOS of
# a conversation, trains without complaint and is worthless.
#
# > Ours: the head is drawn from N(0, 1/(dim + 1)), as in the first work on reward models of this kind (Ziegler et al.
# > 2019, Stiennon et al. 2020), and has no bias: only differences of scores enter the loss.

# %%
#| default_exp reward
#| export
import hashlib
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
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

from llama2lib.checkpoint import whole
from llama2lib.dialog import Message, encode_dialog
from llama2lib.distributed import Parallel, data_ranks, processes
from llama2lib.judge import RATINGS
from llama2lib.model import Llama, ModelConfig
from llama2lib.optim import adamw, cosine_lr
from llama2lib.preferences import Preference, read_preferences
from llama2lib.pretrain import command, train, train_step
from llama2lib.shards import shuffled
from llama2lib.tokenizer import Tokenizer


class RewardModel(Llama):
    "Llama 2 with a score in the place of the next token's logits (section 3.2.2)."

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        del self.output
        self.score = nn.Linear(config.dim, 1, bias=False)
        nn.init.normal_(self.score.weight, std=self.init_std("score.weight"))

    def init_std(self, name: str) -> float | None:
        "As of Llama; the score's is 1/√(dim + 1)."
        return (self.config.dim + 1) ** -0.5 if name == "score.weight" else super().init_std(name)

    @classmethod
    def of(cls, model: Llama, seed: int = 0) -> "RewardModel":
        "A reward model that begins with a copy of a chat model's weights, and with a new head, drawn from `seed`."
        with torch.random.fork_rng(), torch.device(model.tok_embeddings.weight.device):
            torch.manual_seed(seed)
            reward_model = cls(model.config).to(model.tok_embeddings.weight.dtype)
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "output.weight"}
        reward_model.load_state_dict(weights, strict=False)
        return reward_model

    def values(self, tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        "The score that each token would give if the text ended there, float32."
        return whole(self.score(self.hidden(tokens))).squeeze(-1).float()

    def forward(self, tokens: Int[Tensor, "B T"], last: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        "Scores, read at the place `last` of each row: its last real token, which is EOS."
        return self.values(tokens).gather(1, last[:, None]).squeeze(1)


# %% [markdown]
# ## Two losses
#
# With $r$ the score of an answer $y$ to $x$, the loss of a pair is (Equation 1)
#
# $$-\log\sigma\big(r(x, y_c) - r(x, y_r)\big)$$
#
# that is, the probability of the annotator's choice in the Bradley-Terry model. It says nothing about how *much* better
# the chosen answer is. The paper subtracts a margin $m$ that grows with the rating (Equation 2, Table 27): answers that
# are significantly better have to win by more. The margin belongs to the loss alone; accuracy is $r(x, y_c) > r(x, y_r)$.

# %%
#| export
MARGINS = {  # of Equation 2 by rating, Table 27
    "none": dict.fromkeys(RATINGS, 0.0),
    "small": dict(zip(RATINGS, (1, 2 / 3, 1 / 3, 0), strict=True)),
    "large": dict(zip(RATINGS, (3.0, 2.0, 1.0, 0.0), strict=True)),
}


def ranking_loss(
    chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], margin: Float[Tensor, "N"] | float = 0.0
) -> Float[Tensor, ""]:
    "Mean over pairs of -log σ(chosen - rejected - margin): Equation 1, with a margin Equation 2. ValueError for shapes."
    shapes = {tuple(x.shape) for x in (chosen, rejected, margin) if isinstance(x, Tensor)}
    if len(shapes) > 1 or chosen.ndim != 1:
        raise ValueError(f"scores and margins of shapes {sorted(shapes)}: expected one number for each pair")
    return -F.logsigmoid(chosen - rejected - margin).mean()


def safety_loss(scores: Float[Tensor, "N"], safe: Float[Tensor, "N"]) -> Float[Tensor, ""]:
    "Mean cross-entropy of the scores as logits of 'safe' (1) or not (0); where `safe` is -1 it is unknown (A.3.4; ours)."
    known = safe >= 0
    losses = F.binary_cross_entropy_with_logits(scores, safe.clamp(min=0), reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


# %% [markdown]
# Table 29 says that the safety reward model has an auxiliary loss that teaches it to tell safe from unsafe answers. Its
# formula is not printed.
#
# > Ours: the score is also the logit of 'this answer is safe', with cross-entropy on the labels that the three bins
# > imply, added with weight 1. The paper measures the unsafe answers found at a score of 0.5, which is the same reading.

# %%
a, b = torch.randn(2, 5)
assert torch.allclose(ranking_loss(a, b), torch.log1p(torch.exp(b - a)).mean())
assert torch.isclose(ranking_loss(a, a), torch.tensor(2.0).log())  # no preference, no margin: ln 2
try:
    ranking_loss(a[:, None], b[:, None], torch.ones(5))  # would silently compare every pair with every margin
except ValueError as error:
    print(error)
