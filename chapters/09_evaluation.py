# %% [markdown]
# # Evaluation
#
# > What the paper's benchmarks say of its models, and of its own tables; a harness that runs them on any model folder;
# > and how much of them was in the training data. Paper sections 2.3, A.2.2 and A.6.

# %%
import json
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import chain

import matplotlib.pyplot as plt
import numpy as np
import torch

from llama2lib import claims, ledger, mini, plots
from llama2lib.model import LLAMA2
from llama2lib.paper import PAPER, SIZES, TEXT
from llama2lib.recipes import by_scale, cache_folder, cached, data_file, scale, seeds, source_digest

plt.rcParams.update(plots.STYLE)
FILE = "chapters/09_evaluation.py"
runs = seeds(by_scale(smoke=(0,), laptop=(0, 1, 2), a100=(0, 1, 2)))
recomputed = partial(claims.recomputed, evidence=FILE)

# %% [markdown]
# ## The paper's tables, added up
#
# Table 3 groups the benchmarks of Tables 19 to 25, and section 2.3 says how: means over tasks, each with its number of
# examples in the prompt. So every cell can be recomputed.

# %%
GROUPS = {  # the tasks behind a column of Table 3 (section 2.3)
    "Code": {"Table 21": ("HumanEval@1", "MBPP@1")},
    "Commonsense": {"Table 20": ("PIQA", "SIQA", "HellaSwag", "WinoGrande", "ARC-e", "ARC-c", "OBQA", "CSQA")},
    "World": {"Table 22": ("NQ-5", "TQA-5")},
    "Reading": {"Table 23": ("SQuAD-0", "QuAC-0"), "Table 20": ("BoolQ",)},
    "Math": {"Table 25": ("GSM8K", "MATH")},
    "MMLU": {"Table 19": ("Avg",)},
    "AGI": {"Table 24": ("Avg",)},
}
table = PAPER["Table 3"]


def grouped(model: str, group: str) -> float:
    "A cell of Table 3 (%) from the tasks behind it."
    return float(np.mean([PAPER[name][model][task] for name, tasks in GROUPS[group].items() for task in tasks]))


off = {}
for group in GROUPS:
    gaps = {model: round(grouped(model, group) - row[group], 3) for model, row in table.items()}
    off[group] = {model: gap for model, gap in gaps.items() if abs(gap) > 0.0501}
    fits = max((abs(gap) for model, gap in gaps.items() if model not in off[group]), default=0.0)
    recomputed("Table 3", f"{group}: largest difference to the mean of its tasks"
               + (", without two cells" if off[group] else ""), 0, fits, "= paper ± 0.0501")  # fmt: skip
    print(f"   cells that are no such mean: {off[group] or 'none'}")

# %% [markdown]
# Half a unit of the last digit is what rounding explains, and 82 of 84 cells are that near. Two are not:

# %%
for model in off["Math"]:
    printed, tasks = table[model]["Math"], PAPER["Table 25"][model]
    print(f"{model}: printed {printed}, GSM8K {tasks['GSM8K']}, MATH {tasks['MATH']}")
    recomputed("Table 3", f"{model}, Math: mean of GSM8K and MATH", printed, round(grouped(model, "Math"), 2),
               "= paper ± 0.0501")  # fmt: skip

# %% [markdown]
# Both print the score of GSM8K alone. With the mean, Llama 2 13B has 16.3 in the place of 28.7, and no longer more than
# 34B.
#
# The means of MMLU and AGI Eval are not means of the four or eight columns. They weight each by its questions.
#
# > Ours: the sizes are those of the published tests, MMLU's 14,042 questions (Table 51 has the same sum) and the
# > English parts of AGI Eval. A mean may be off by 0.1: half a unit of the last digit for the columns' rounding, and
# > half for its own.

# %%
MMLU = {"Humanities": 4705, "STEM": 3153, "Social": 3077, "Other": 3107}
AGI = {"AQuA": 254, "LogiQA": 651, "LSAT-AR": 230, "LSAT-LR": 510, "LSAT-RC": 269, "SAT-en": 206,
       "SAT-en-no-passage": 206, "SAT-math": 220}  # fmt: skip
for name, file in (("LogiQA", "logiqa-en"), ("SAT-math", "sat-math")):
    if (path := data_file(f"agieval/{file}.jsonl")) is not None:
        assert AGI[name] == len(path.read_text("utf-8").splitlines())
counted = PAPER["Table 51"]
assert sum(MMLU.values()) == sum(counted[f"MMLU-Overall, 70B, {part}"]["n"] for part in ("clean", "not clean"))
assert MMLU["Humanities"] == sum(counted[f"MMLU-Humanities, 70B, {part}"]["n"] for part in ("clean", "not clean"))


def weighted(row: dict, weights: dict[str, int]) -> float:
    "Mean of a row's columns (%), weighted."
    return sum(row[column] * weight for column, weight in weights.items()) / sum(weights.values())


for name, weights in (("Table 19", MMLU), ("Table 24", AGI)):
    gaps = {model: round(weighted(row, weights) - row["Avg"], 3) for model, row in PAPER[name].items()}
    plain_ = max(abs(np.mean([row[c] for c in weights]) - row["Avg"]) for row in PAPER[name].values())
    print(f"{name}: the plain mean misses by up to {plain_:.1f}")
    for model, gap in gaps.items():
        recomputed(name, f"{model}: mean weighted by questions", PAPER[name][model]["Avg"],
                   round(PAPER[name][model]["Avg"] + gap, 2), "= paper ± 0.1")  # fmt: skip

# %% [markdown]
# In Table 19 the models of Llama 2, MPT and Falcon come out to the last digit. Of Llama 1, three do not: 13B, 33B and
# 65B are printed up to 0.2 above the mean of their columns. Which of the two is off cannot be told from here.
#
# In Table 24 Falcon 40B is off by more than a point. Its score on SAT questions in English is the same without the
# passage as with it:

# %%
same = [model for model, row in PAPER["Table 24"].items() if row["SAT-en"] == row["SAT-en-no-passage"]]
row = PAPER["Table 24"]["Falcon 40B"]
others = sum(row[task] * count for task, count in AGI.items() if task != "SAT-en-no-passage")
fits = (row["Avg"] * sum(AGI.values()) - others) / AGI["SAT-en-no-passage"]
print(f"the same with and without the passage: {', '.join(same)}; a score of {fits:.1f} would give the printed mean")

# %% [markdown]
# One number seems to have been copied into the next column.
#
# ### What section 2.3 says of them
#
# The text makes claims about these tables, and they can be checked. Its 'about 5 and 8 points' are whole numbers, right
# to half a point.

# %%
def behind(model: str, other: str) -> list[str]:
    "Groups of Table 3 in which a model is not ahead of the other."
    return [group for group, value in table[model].items() if value <= table[other][group]]


for group, points in (("MMLU", 5), ("BBH", 8)):
    gap = round(table["Llama 2 70B"][group] - table["Llama 1 65B"][group], 1)
    recomputed("Section 2.3", f"{group}: points of Llama 2 70B above Llama 1 65B", points, gap, "= paper ± 0.5")
statements = (
    ("Llama 2 7B", "MPT 7B", ["Code"]), ("Llama 2 34B", "MPT 30B", ["Code"]), ("Llama 2 7B", "Falcon 7B", []),
    ("Llama 2 34B", "Falcon 40B", []), ("Llama 2 7B", "Llama 1 7B", []), ("Llama 2 13B", "Llama 1 13B", []),
    ("Llama 2 34B", "Llama 1 33B", []), ("Llama 2 70B", "Llama 1 65B", []),
)  # fmt: skip
for model, other, said in statements:
    recomputed("Section 2.3", f"groups in which {model} is not ahead of {other}", said, behind(model, other))
open_ = [name for name in table if not name.startswith("Llama 2")]
_ = recomputed(
    "Section 2.3", "open models that are ahead of Llama 2 70B in some group", [],
    [name for name in open_ if any(table[name][group] > value for group, value in table["Llama 2 70B"].items())],
)  # fmt: skip

# %% [markdown]
# All but one hold. 'Llama 2 models outperform Llama 1 models' has an exception: in commonsense reasoning 34B is a tenth
# of a point behind Llama 1's 33B. 'Besides code' is right as it stands, MPT 7B and 30B are ahead there.
#
# Table 4 repeats scores of 70B, at other numbers of examples than Table 3:

# %%
SAME = {"MMLU 5-shot": ("Table 19", "Avg"), "TriviaQA 1-shot": ("Table 22", "TQA-1"), "NQ 1-shot": ("Table 22", "NQ-1"),
        "GSM8K 8-shot": ("Table 25", "GSM8K"), "HumanEval 0-shot": ("Table 21", "HumanEval@1"),
        "BBH 3-shot": ("Table 3", "BBH")}  # fmt: skip
closed = PAPER["Table 4"]
for task, (name, column) in SAME.items():
    recomputed("Table 4", f"{task}: Llama 2 70B as in {name}", closed[task]["Llama-2-70B"],
               PAPER[name]["Llama 2 70B"][column])  # fmt: skip
fig, ax = plt.subplots(figsize=(6.4, 3.2))
for place, model in enumerate(("GPT-3.5", "PaLM", "PaLM-2-L", "GPT-4")):
    gaps = [np.nan if row[model] is None else row["Llama-2-70B"] - row[model] for row in closed.values()]
    ax.plot(gaps, range(len(closed)), "o", color=f"C{place}", label=model)
ax.axvline(0, color="0.4", linewidth=0.8)
ax.set_yticks(range(len(closed)), list(closed))
ax.set(xlabel="Llama 2 70B minus the closed model (points)", title="70B is level with PaLM, and far behind GPT-4")
ax.legend(fontsize=7)
plots.save(fig, "table_04.png")
level = {task: round(row["Llama-2-70B"] - row["PaLM"], 1) for task, row in closed.items()}
print("minus PaLM:", level)
_ = recomputed("Section 2.3", "benchmarks of Table 4 on which Llama 2 70B is more than two points behind PaLM", [],
               [task for task, gap in level.items() if gap < -2])  # fmt: skip

# %% [markdown]
# ## Benchmarks
#
# Section 2.3 compares base models on public benchmarks, in six groups, the last of which is three collections of tests.
# Table 3 has a number for each, eight in all. Tables 19 to 25 have the benchmarks one by one, with the number of solved
# examples ('shots') that stand in front of a question.
# The authors used a library of their own, which they did not publish, and name no prompts.
#
# > Ours: EleutherAI's lm-evaluation-harness asks the questions and counts the answers; this section makes our models
# > answer it, faster than its own adapter does. Its prompts are not the authors', so its scores differ from the tables
# > by some points, as everybody's do. The harness takes questions from the Hugging Face hub; here they come from files
# > too, without a network. Programs are checked by a runner of our own, and the mini world gets a task as well.

# %%
groups = {
    "Code": ("HumanEval, MBPP", "pass@1", "0, 3"),
    "Commonsense": ("PIQA, SIQA, HellaSwag, WinoGrande, ARC, OpenBookQA, CommonsenseQA", "choice", "0; 7"),
    "World": ("NaturalQuestions, TriviaQA", "exact match", "5"),
    "Reading": ("SQuAD, QuAC, BoolQ", "exact match, F1, choice", "0"),
    "Math": ("GSM8K, MATH", "exact match", "8, 4"),
    "MMLU": ("57 subjects", "choice", "5"),
    "BBH": ("23 tasks", "exact match", "3"),
    "AGI": ("8 exams in English", "choice", "3 to 5"),
}
print(f"{'group':<12}{'7B':>6}{'70B':>6}  {'scored by':<25}{'shots':<8}benchmarks")
for name, (benchmarks, measure, shots) in groups.items():
    low, high = (PAPER["Table 3"][f"Llama 2 {size}"][name] for size in ("7B", "70B"))
    print(f"{name:<12}{low:>6}{high:>6}  {measure:<25}{shots:<8}{benchmarks}")

# %% [markdown]
# ### How likely is an answer?
#
# A benchmark with choices is not asked by letting the model write. Each choice is put behind the question, and the one
# that the model holds most likely is its answer. So all of it comes down to one number: the log-probability of a
# *continuation* given a *context*, the sum over the continuation's tokens.
#
# A question with four choices would be read four times. `loglikelihoods` reads it once, with the words that all
# choices begin with, and keeps its keys and values: contexts in one pass, then the rest of the choices in a second,
# each behind a copy of its context. If choices differ in their last token alone, as the letters of MMLU do, there is no
# second pass. Where the two together are longer than the model's context, the beginning goes. Logits, which cost much
# where the vocabulary is large, are only made for the tokens that are asked for.

# %%
#| default_exp continuations

# %%
#| export
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from llama2lib.generation import decode
from llama2lib.model import KVCache, Llama
from llama2lib.tokenizer import Tokenizer


class Likelihood(NamedTuple):
    "Log-probability of a continuation (natural logarithm), and whether each of its tokens is the likeliest one."

    logprob: float
    greedy: bool


class _Row(NamedTuple):
    "Tokens to read, what is asked of them as (place, token, number of the pair), and what already stands in front."

    tokens: Sequence[int]
    asked: list[tuple[int, int, int]]
    then: Sequence[tuple[int, Sequence[int]]] = ()  # of a shared context: pairs, and their continuations
    context: int = 0  # of a continuation: the row of its context
    behind: int = 0  # and how many tokens that has


def _bar(total: int, title: str, unit: str) -> tqdm:
    "A progress bar, on the first process."
    others = {"disable": True} if dist.is_initialized() and dist.get_rank() else {}
    return tqdm(total=total, desc=title, unit=unit, leave=False, **others)


def _batches(rows: list[_Row], room: int, limit: int) -> Iterator[list[_Row]]:
    "Rows of like length together, of at most `room` tokens with their padding, which may not reach over the `limit`."
    batch, width, behind = [], 0, 0
    for row in sorted(rows, key=lambda row: (len(row.tokens), row.behind), reverse=True):
        width, behind = width or len(row.tokens), max(behind, row.behind)
        if batch and ((len(batch) + 1) * (width + behind) > room or width + behind > limit):
            yield batch
            batch, width, behind = [], len(row.tokens), row.behind
        batch.append(row)
    if batch:
        yield batch


def _padded(batch: list[_Row], device) -> Int[Tensor, "B T"]:
    tokens = np.zeros((len(batch), len(batch[0].tokens)), np.int64)  # the longest comes first
    for line, row in zip(tokens, batch, strict=True):
        line[: len(row.tokens)] = row.tokens
    return torch.from_numpy(tokens).to(device)


def _look_up(model: Llama, states: Float[Tensor, "B T D"], batch: list[_Row], sums: Tensor, greedy: Tensor):
    "Add the log-probabilities that are asked for to the sums of their pairs; logits of 1,024 places at a time."
    places: dict[tuple[int, int], int] = {}
    asked = [
        (places.setdefault((number, place), len(places)), token, pair)
        for number, row in enumerate(batch) for place, token, pair in row.asked
    ]  # fmt: skip
    states = states[tuple(torch.tensor(list(places), device=states.device).T)]
    place, token, pair = torch.tensor(asked).T
    for first, part in zip(range(0, len(states), 1024), states.split(1024), strict=True):
        here = (place >= first) & (place < first + 1024)
        at, wanted = ((place[here] - first).to(part.device), token[here].to(part.device))
        logits = model.output(part).float()
        found = logits[at, wanted] - logits.logsumexp(-1)[at]
        sums.index_add_(0, pair[here], found.double().cpu())
        greedy[pair[here][(logits.argmax(-1)[at] != wanted).cpu()]] = False


@torch.inference_mode()
def loglikelihoods(
    model: Llama, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_tokens: int = 8192
) -> list[Likelihood]:
    """Log-probability of continuations given contexts, (context, continuation) in token ids, in order.

    A context that several pairs share is read once. One that does not fit with its continuation loses its beginning.
    `batch_tokens`: the most that are read together, with padding.
    ValueError for a context or continuation without tokens, a continuation longer than the model's context, or a token
    outside the vocabulary; FloatingPointError when the logits are not finite.
    """
    config, device, alike = model.config, model.tok_embeddings.weight.device, defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= config.max_seq_len:
            found = f"{len(context)} and {len(continuation)} tokens"
            raise ValueError(f"pair {number}: {found}; expected both, and at most {config.max_seq_len} to score")
        if not 0 <= min(*context, *continuation) <= max(*context, *continuation) < config.vocab_size:
            raise ValueError(f"pair {number}: expected ids from 0 to {config.vocab_size - 1}")
        alike[tuple(context[-(config.max_seq_len + 1 - len(continuation)) :])].append(number)
    rows = []
    for context, numbers in alike.items():
        scored = [(number, list(pairs[number][1])) for number in numbers]
        alone = min(len(tokens) for _, tokens in scored)
        begun = next((n for n in range(alone - 1) if len({tokens[n] for _, tokens in scored}) > 1), alone - 1)
        asked = [
            (len(context) - 1 + place, token, number)
            for number, tokens in scored for place, token in enumerate(tokens[: begun + 1])
        ]  # fmt: skip
        then = [(number, tokens[begun:]) for number, tokens in scored if len(tokens) > begun + 1]
        rows.append(_Row([*context, *scored[0][1][:begun]], asked, then))
    sums, greedy = torch.zeros(len(pairs), dtype=torch.float64), torch.ones(len(pairs), dtype=torch.bool)
    bar = _bar(len(pairs), "likelihoods", "pair")
    for batch in _batches(rows, batch_tokens, config.max_seq_len):
        tokens = _padded(batch, device)
        read = KVCache(model, *tokens.shape) if any(row.then for row in batch) else None
        _look_up(model, model.hidden(tokens, read), batch, sums, greedy)
        second = [
            _Row(tokens[:-1], [(n, token, pair) for n, token in enumerate(tokens[1:])], (), number, len(row.tokens))
            for number, row in enumerate(batch) for pair, tokens in row.then
        ]  # fmt: skip
        for part in _batches(second, batch_tokens, config.max_seq_len):
            tokens, longest = _padded(part, device), max(row.behind for row in part)
            cache = KVCache(model, len(part), longest + tokens.shape[1])
            cache.copy_rows(list(range(len(part))), read, [row.context for row in part], longest)
            cache.set_lengths(torch.tensor([row.behind for row in part], device=device))
            _look_up(model, model.hidden(tokens, cache), part, sums, greedy)
        bar.update(len({pair for row in batch for _, _, pair in row.asked}))
    bar.close()
    if not sums.isfinite().all():
        raise FloatingPointError(f"pair {int((~sums.isfinite()).nonzero()[0])}: the logits are not finite")
    return [Likelihood(*both) for both in zip(sums.tolist(), greedy.tolist(), strict=True)]

# %% [markdown]
# The shortest check: every number as the model gives it for the whole text, without sharing anything. The weights are
# random and large, so that no token is like another.

# %%
from llama2lib.continuations import loglikelihoods
from llama2lib.model import LLAMA2, Llama

torch.manual_seed(0)
random, debug = np.random.default_rng(0), Llama(LLAMA2["debug"])
for parameter in debug.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
questions = [random.integers(0, 512, length).tolist() for length in (3, 20, 40, 130)]  # the last one is too long
pairs = [(question, random.integers(0, 512, length).tolist()) for question in questions for length in (1, 4, 9)]
with torch.no_grad():
    for (context, tokens), found in zip(pairs, loglikelihoods(debug, pairs), strict=True):
        text = (context + tokens)[-129:]  # the last token is only predicted
        logprobs = debug(torch.tensor([text[:-1]]))[0].log_softmax(-1)[-len(tokens) :]
        alone = logprobs.gather(1, torch.tensor(tokens)[:, None]).sum().item()
        assert abs(found.logprob - alone) < 1e-3, (found, alone)
print(f"{len(pairs)} continuations of {len(questions)} contexts, each as read alone")

# %% [markdown]
# ### Writing up to a stop
#
# Other benchmarks let the model write, up to a line break, or up to the next 'Question:'. A *stop* is text, and its
# tokens may fall anywhere: a line break can be one token or half of two. So it is looked for in decoded text, in as
# many of the last tokens as could hold it.
#
# One more detail decides whether programs run. SentencePiece gives every text a space in front and takes it away when
# it decodes. A continuation that is decoded alone loses its own first space that way, and the body of a function is
# then indented by three. `written_until` decodes prompt and continuation together (`Tokenizer.continuation`).
#
# > Ours: the loop of chapter 01's `generate`, with another end. A row leaves when its text holds a stop, and the next
# > prompt takes its place; in the harness's own adapter it is computed on until the whole batch has ended.

# %%
#| export
def cut(text: str, until: Sequence[str]) -> str:
    "A text up to the first place of each stop in turn."
    for stop in until:
        text = text.split(stop, 1)[0]
    return text


@torch.inference_mode()
def tokens_until(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    until: Sequence[str] = (),
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    batch: int = 64,
) -> list[list[int]]:
    """Tokens that continue prompts, up to EOS, `max_new_tokens`, a full context, or the token that completes a stop.

    seeds: one for each prompt, on which its row depends and on nothing else; none: 0 for all. `batch`: the most rows
    that are decoded together; longer prompts come first. ValueError for an empty stop; others as in `generate`.
    """
    if not all(until):
        raise ValueError("a stop is empty; expected text")
    made, eos_id = [[] for _ in prompts], tokenizer.eos_id
    reach = max((len(stop.encode()) for stop in until), default=0) + 4  # a token is a byte or more
    bar = _bar(len(prompts), "writing", "text")

    def over(row: int, token: int) -> bool:
        full = len(made[row]) == min(max_new_tokens, model.config.max_seq_len - len(prompts[row]))
        stopped = bool(until) and any(map(tokenizer.decode(made[row][-reach:]).__contains__, until))
        ended = token == eos_id or full or stopped
        bar.update(ended)
        return ended

    seeds = [0] * len(prompts) if seeds is None else seeds
    for step in decode(model, prompts, max_new_tokens, temperature, top_p, seeds, eos_id, 1, batch, False, over):
        for row, token, _ in step:
            made[row].append(token)
    bar.close()
    return made


def written_until(
    model: Llama, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], until: Sequence[str] = (), **settings
) -> list[str]:
    "What a model writes behind prompts up to the first stop, which is left out; settings and errors: `tokens_until`."
    made = tokens_until(model, tokenizer, prompts, until, **settings)
    return [cut(tokenizer.continuation(*both), until) for both in zip(prompts, made, strict=True)]


def over_ranks(items: Sequence, work: Callable[[Sequence], list]) -> list:
    """`work(items)`, a result for each, divided among the processes of torchrun; every one of them gets all results.

    Neighbours stay together, so that contexts are still shared.
    """
    if not dist.is_initialized():
        return work(items)
    ranks, parts = dist.get_world_size(), [None] * dist.get_world_size()
    ends = [len(items) * rank // ranks for rank in range(ranks + 1)]
    dist.all_gather_object(parts, work(items[ends[dist.get_rank()] : ends[dist.get_rank() + 1]]))
    return [result for part in parts for result in part]

# %%
from llama2lib.continuations import tokens_until, written_until

base, chat, words = mini.base(0), mini.chat(0), mini.tokenizer()
prompts = [words.encode(text, bos=True) for text in ("Where does Ben live?", "What does the cow eat?")]
for text in written_until(base, words, prompts, (".",), max_new_tokens=24):
    print(repr(text))
free = tokens_until(base, words, prompts, max_new_tokens=24)
stops = [words.decode(tokens)[3:8] for tokens in free]  # they begin and end in the middle of words
for prompt, tokens, stop in zip(prompts, free, stops, strict=True):
    stopped = tokens_until(base, words, [prompt], (stop,), max_new_tokens=24)[0]
    assert stopped == tokens[: len(stopped)] and stop in words.decode(stopped)

# %% [markdown]
# ### An adapter for the harness
#
# lm-evaluation-harness (`lm_eval`) knows thousands of tasks: their questions, prompts, shots, filters and metrics. It
# asks a model three things, in text: `loglikelihood` of a continuation, `loglikelihood_rolling` of a whole document,
# and `generate_until`. `LlamaLM` answers them for a model and a tokenizer of this library.
#
# What decides whether two adapters give equal numbers is how text becomes tokens. These are the rules of `HFLM`, the
# harness's own adapter for `transformers`, and ours are the same:
#
# - BOS stands in front of a context. An empty context is BOS alone.
# - White space at the end of a context goes over to the continuation: the space before a word is part of its token.
# - Context and continuation are encoded together, and as many tokens are cut off as the context has alone. So a token
#   that reaches over the border counts for the continuation, but its first half is read.
# - What is too long loses its beginning: for likelihoods what does not fit, for writing also the room to write.
# - Written text is decoded alone, without the space in front, and cut at the first stop.
#
# > Ours, in two places. A document of `loglikelihood_rolling` has one BOS: `HFLM` puts its prefix in front of tokens
# > that begin with BOS already, and counts how likely BOS is after BOS. With `add_bos_token=False` it agrees. And one
# > text may come twice, divided into context and continuation at different places: `HFLM` keeps the logits of the first
# > for the second, and takes the wrong ones. With `logits_cache=False` it agrees.
#
# Chat models answer messages, not texts. `apply_chat_template` writes Meta's format as text, with the ASCII signs for
# the beginning and end of a text where BOS and EOS belong, as the tokenizer makes no control tokens from words.

# %%
#| default_exp harness

# %%
#| export
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise ImportError("lm-eval is not installed: pip install -e '.[eval]'") from None

from llama2lib.continuations import cut, loglikelihoods, over_ranks, tokens_until
from llama2lib.dialog import Message, check_dialog
from llama2lib.model import Llama
from llama2lib.tokenizer import Tokenizer

BEGIN, END = "\x02", "\x03"  # of a conversation's pairs: BOS and EOS in text


class LlamaLM(TemplateLM):
    """A model for `lm_eval.simple_evaluate` and `evaluate`; under torchrun its processes divide the requests.

    `batch_tokens`: of `loglikelihoods`; `batch`: of `tokens_until`; `seed`: of sampled answers, which depend on it and
    on their prompt alone. ValueError for requests that do not fit the model, and for settings it does not know.
    """

    max_gen_toks = 256  # where a task does not say

    def __init__(self, model: Llama, tokenizer: Tokenizer, batch_tokens: int = 8192, batch: int = 64, seed: int = 0):
        super().__init__()
        if tokenizer.vocab_size > model.config.vocab_size:
            found = f"{tokenizer.vocab_size} pieces for a model of {model.config.vocab_size}"
            raise ValueError(f"{tokenizer.path}: {found}; expected the model's own tokenizer")
        self.model, self.words = model, tokenizer
        self.batch_tokens, self.batch, self.seed = batch_tokens, batch, seed
        self._device = model.tok_embeddings.weight.device
        self.shortened = 0  # requests whose context has lost its beginning

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.words.bos_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return f"llama2lib-{self.words.digest[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        "Tokens of a text, behind BOS unless `add_special_tokens` is False; of a conversation as in `encode_dialog`."
        if not string.startswith(BEGIN):
            return self.words.encode(string, bos=add_special_tokens is not False)
        signs, tokens = {BEGIN: [self.words.bos_id], END: [self.words.eos_id]}, []
        for part in re.split(f"([{BEGIN}{END}])", string):
            tokens += signs.get(part) or self.words.encode(part)
        return tokens

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self.words.decode(tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        "Log-probabilities of continuations, and whether they are greedy; each different text is encoded once."
        texts = []
        for context, continuation in (request.args for request in requests):
            front = context.rstrip()
            texts.append((front, context[len(front) :] + continuation))
        plain = list(dict.fromkeys(part for front, rest in texts for part in (front, front + rest)))
        chats = [text for text in plain if text.startswith(BEGIN)]
        plain = [text for text in plain if not text.startswith(BEGIN)]
        tokens = dict(zip(plain, self.words.encode_batch(plain, bos=True), strict=True))
        tokens |= {text: self.tok_encode(text) for text in chats}
        fronts = [tokens[front] for front, _ in texts]
        rest = [tokens[front + rest][len(tokens[front]) :] for front, rest in texts]
        if [] in rest:
            front, more = texts[rest.index([])]
            raise ValueError(f"{more!r:.60} adds no token to {front[-30:]!r}; expected a continuation that does")
        return self._loglikelihood_tokens([
            (request.args, *pair) for request, *pair in zip(requests, fronts, rest, strict=True)
        ])  # fmt: skip

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        self.shortened += sum(len(context) + len(rest) > self.max_length + 1 for context, rest in pairs)
        results = over_ranks(pairs, lambda some: loglikelihoods(self.model, some, self.batch_tokens))
        for (texts, *_), result in zip(requests, results, strict=True):
            if texts is not None:  # a window of a document is none of the harness's requests
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        "Log-probabilities of documents: each token once, behind as many as the context holds; the first behind BOS."
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            tokens = self.words.encode(text)
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            parts = [(None, *make_disjoint_window(part)) for part in parts]
            windows, counts = windows + parts, [*counts, len(parts)]
        found = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(found).logprob for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        "What the model writes behind contexts, up to the stops; greedy, or sampled where a task says so."
        asked, groups = Counter(), {}
        for number, (context, settings) in enumerate(request.args for request in requests):
            key = hashlib.sha256(f"{self.seed} {asked[context]} {context}".encode()).digest()
            asked[context] += 1  # the same question again gets another sample
            until, rest = self._settings(settings)
            room = self.max_length - rest["max_new_tokens"]
            if room < 1:
                found = f"{rest['max_new_tokens']} tokens to write leave no room in a context of {self.max_length}"
                raise ValueError(f"{found}: expected a smaller max_gen_toks")
            tokens = self.tok_encode(context.rstrip() if context.startswith(BEGIN) else context)
            self.shortened += len(tokens) > room
            row = tokens[-room:], int.from_bytes(key[:8], "big"), number
            groups.setdefault((until, *rest.items()), []).append(row)
        texts: dict[int, str] = {}
        for (until, *rest), rows in groups.items():
            found = over_ranks(rows, partial(self._written, until, dict(rest)))
            texts |= zip((number for *_, number in rows), found, strict=True)
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _written(self, until: tuple[str, ...], settings: dict, rows: Sequence[tuple[list[int], int, int]]) -> list[str]:
        prompts, seeds = [row[0] for row in rows], [row[1] for row in rows]
        made = tokens_until(self.model, self.words, prompts, until, seeds=seeds, batch=self.batch, **settings)
        return [cut(self.words.decode(tokens), until) for tokens in made]

    def _settings(self, given: dict) -> tuple[tuple[str, ...], dict]:
        "Stops, and the settings of `tokens_until`, of the harness's `generation_kwargs`."
        left = dict(given)
        until, samples = left.pop("until", None) or (), left.pop("do_sample", None)
        lengths = [left.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        temperature, top_p = left.pop("temperature", None), float(left.pop("top_p", 1.0))
        if left:
            raise ValueError(f"generation_kwargs: {', '.join(left)}; expected until, max_gen_toks, do_sample, "
                             "temperature and top_p only")  # fmt: skip
        if temperature is None or samples is False:
            temperature = 1.0 if samples else 0.0
        longest = next((length for length in lengths if length is not None), self.max_gen_toks)
        until = (until,) if isinstance(until, str) else until
        numbers = {"max_new_tokens": int(longest), "temperature": float(temperature), "top_p": top_p}
        return tuple(stop for stop in until if stop), numbers

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "Meta's Llama 2" if chat_template else ""

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as text for `tok_encode`; its last message is the user's, or the beginning of an answer.

        ValueError for one that Meta's format cannot express, or that holds the signs of BOS and EOS.
        """
        check_dialog(chat_history)
        texts = [message["content"] for message in chat_history]
        if held := [text for text in texts if BEGIN in text or END in text]:
            raise ValueError(f"a message holds one of the signs U+0002 and U+0003: {held[0][:60]!r}")
        if chat_history[0]["role"] == "system":
            texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
        pairs = ((user.strip(), *answer) for user, *answer in (texts[n : n + 2] for n in range(0, len(texts), 2)))
        return f" {END}".join(f"{BEGIN}[INST] {user} [/INST] {''.join(answer).strip()}" for user, *answer in pairs)

# %% [markdown]
# Side by side with `HFLM`, which opens the same weights through `transformers`: on a model with random weights, and on
# the base model of the mini world. The contexts end in the middle of a sentence, in white space and in a word, are
# empty, or are longer than the model's context. Random weights write random bytes, half characters among them, which
# the two libraries show differently; so that model only scores.

# %%
import contextlib
import io
import logging
import tempfile
from dataclasses import replace
from pathlib import Path

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from llama2lib.checkpoint import save_checkpoint
from llama2lib.harness import LlamaLM
from llama2lib.synthetic import documents

for name in ("lm_eval", "transformers"):
    logging.getLogger(name).setLevel(logging.ERROR)


def theirs(model: Llama, **options) -> HFLM:
    "The harness's own adapter, with a model's weights."
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(model, Path(folder) / "model", words)
        return HFLM(str(Path(folder) / "model"), device="cpu", batch_size=16, **options)


def answers(lm, kind: str, requests: list[tuple]) -> list:
    "What an adapter returns for requests of a kind."
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        return getattr(lm, kind)([Instance(kind, {}, request, n) for n, request in enumerate(requests)])


texts = documents(np.random.default_rng(5), 40)
parts = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
parts += [("", texts[0]), ("Ben is a ", "baker."), ("Ben is a\n", "baker."), (" ".join(texts * 2), " Ben is a baker.")]
parts += [(text, f" {job}") for text in ("Who is Ben? Ben is a", "Ann is a") for job in ("baker", "cook", "nurse")]
torch.manual_seed(0)
strange = Llama(replace(mini.SIZES[mini.SIZE], n_layers=2))
for parameter in strange.parameters():
    torch.nn.init.normal_(parameter, std=0.1)
for name, model in (("random weights", strange), ("base model", base)):
    found, other = (np.array(answers(lm, "loglikelihood", parts)) for lm in (LlamaLM(model, words), theirs(model)))
    gap = np.abs(found - other).max(0)  # of log-probabilities, and of the greedy flags
    assert gap[0] < 1e-3 and gap[1] == 0
    print(f"{name}: {len(parts)} continuations of {-found[:, 0].mean():.1f} nats, largest difference {gap[0]:.0e}")

# %%
ours, other, single = LlamaLM(base, words), theirs(base), theirs(base, add_bos_token=False)
whole = [(text,) for text in (*texts[:8], " ".join(texts * 2))]
found, twice, once = (np.array(answers(lm, "loglikelihood_rolling", whole)) for lm in (ours, other, single))
assert np.abs(found - once).max() < 1e-3
print(f"documents: {-found.mean():.1f} nats; with BOS counted twice {(found - twice).mean():.1f} more")
questions = [(text, {"until": [".", "\n"], "max_gen_toks": 24, "do_sample": False}) for text, _ in parts if text]
written, alike = (answers(lm, "generate_until", questions) for lm in (ours, other))
assert written == alike
print(f"{len(questions)} texts written alike, such as {written[-1]!r}")

# %% [markdown]
# ### Programs that run
#
# For HumanEval and MBPP the model writes a function, and tests decide. The measure is *pass@k*: the chance that at
# least one of k programs passes. Section A.2.2 samples with top-p 0.95: at a temperature of 0.1 for pass@1, and of 0.8
# for pass@100 (HumanEval) and pass@80 (MBPP), where the programs have to differ.
#
# To draw k programs, and see whether one passes, is noisy. Chen et al. (2021) draw n ≥ k programs, of which c pass, and
# take the share of all choices of k among the n that hold one that passes: 1 - C(n-c, k) / C(n, k). This is unbiased.
# With the share of passes for the chance, 1 - (1 - c/n)^k, the result would be too low.
#
# > Ours: whole numbers, of any size, until the last division. How many programs the authors drew they do not say.

# %%
#| default_exp programs

# %%
#| export
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from operator import index
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from llama2lib.continuations import over_ranks
from llama2lib.corpus import records


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that one of k programs passes, where c of n did: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    ValueError unless 0 <= c <= n and 1 <= k <= n; TypeError for what is no whole number.
    """
    n, c, k = index(n), index(c), index(k)
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"n = {n}, c = {c}, k = {k}: expected 0 <= c <= n programs that pass, and 1 <= k <= n")
    choices = math.comb(n, k)
    return (choices - math.comb(n - c, k)) / choices

# %%
from itertools import combinations

from llama2lib.programs import pass_at_k

for n, c, k in ((5, 2, 1), (5, 2, 3), (6, 1, 4), (6, 0, 2), (4, 4, 4)):
    draws = [min(draw) < c for draw in combinations(range(n), k)]  # the first c programs pass
    assert abs(pass_at_k(n, c, k) - np.mean(draws)) < 1e-15
n, chance = 200, 0.02
passed = np.random.default_rng(0).binomial(n, chance, 2000)
ks = np.array([1, 2, 5, 10, 20, 50, 100])
truth = 1 - (1 - chance) ** ks
unbiased = np.array([np.mean([pass_at_k(n, c, k) for c in passed]) for k in ks])
plain = np.array([np.mean(1 - (1 - passed / n) ** k) for k in ks])
print("unbiased", dict(zip(ks.tolist(), (unbiased - truth).round(3).tolist(), strict=True)))
print("plain   ", dict(zip(ks.tolist(), (plain - truth).round(3).tolist(), strict=True)))
assert np.abs(unbiased - truth).max() < 0.01 < np.abs(plain - truth).max()

# %% [markdown]
# A program from a model may loop, fill the memory, ask for input, print without end, or delete files. `run_program`
# gives it a process of its own, with little: a folder that is thrown away, no input, almost no environment, limits on
# time, memory, file size and open files; and when time is up, its children end with it. Two traps are worth a word. A
# program that calls `exit()` before its tests would count as passed, were its exit status 0 believed; here only the
# runner can give the status that counts, behind the last line. And output is read on to its end but not kept, as a
# program that waits for a reader would be taken for a slow one.
#
# > Ours: against mistakes, not against malice. The program may open the network and read what its user may read. For
# > programs of a model that one does not trust, start the whole evaluation in a container or virtual machine.

# %%
#| export
PASSED = 113  # exit status behind the last line of a program
_RUNNER = """
import os, resource, sys
memory, seconds, files = map(int, sys.argv[1:])
for limit, most in (
    (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, files),
    (resource.RLIMIT_NOFILE, 64), (resource.RLIMIT_CORE, 0),
):
    try:
        resource.setrlimit(limit, (most, most))
    except (ValueError, OSError):
        pass  # macOS has no limit of memory
with open("program.py", encoding="utf-8") as file:
    source = file.read()
sys.argv = ["program.py"]
exec(compile(source, "program.py", "exec"), {"__name__": "program"})
sys.stdout.flush(), sys.stderr.flush()
os._exit(PASSED)
"""


class Outcome(NamedTuple):
    "Whether a program ran to its end; why not, in a line; and the beginning of what it wrote."

    passed: bool
    reason: str
    output: str


def run_program(
    code: str, timeout: float = 3.0, memory: int = 2**30, output: int = 4096, file_size: int = 2**24
) -> Outcome:
    """Run Python code in a process of its own, and see whether it reaches its end (POSIX).

    timeout: seconds, after which it and its children are killed; memory: bytes of address space; output: characters
    kept of what it writes to stdout and stderr; file_size: bytes of a file that it writes.
    The program has no input, an empty folder, and an environment of four variables. This is no sandbox: it stops
    accidents, not a program that means harm, which may still use the network and read files.
    """
    with tempfile.TemporaryDirectory(prefix="program-", ignore_cleanup_errors=True) as folder:
        try:
            Path(folder, "program.py").write_text(code, "utf-8")
        except UnicodeEncodeError:
            return Outcome(False, "half a surrogate pair: not Unicode text", "")
        limits = [str(int(limit)) for limit in (memory, math.ceil(timeout) + 1, file_size)]
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _RUNNER.replace("PASSED", str(PASSED)), *limits],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=folder,
            env={"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8"}, start_new_session=True,
        )  # fmt: skip
        kept = bytearray()

        def read():
            with process.stdout as pipe:
                while chunk := pipe.read1(65536):
                    kept.extend(chunk[: 4 * output - len(kept)])

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass  # it has ended, and left no children
            process.wait()
        reader.join(1)
    text = bytes(kept).decode("utf-8", "replace")[:output]
    if status is None:
        return Outcome(False, f"did not end in {timeout:g} s", text)
    if status == PASSED:
        return Outcome(True, "passed", text)
    if status < 0:
        return Outcome(False, f"killed by {signal.Signals(-status).name}", text)
    last = text.strip().splitlines()[-1:] if status else ["ended before its last line"]
    return Outcome(False, (last or [f"exit status {status}"])[0][:200], text)

# %%
from llama2lib.programs import run_program

programs = {
    "a right one": "def double(x):\n    return 2 * x\n\nassert double(4) == 8",
    "a wrong one": "def double(x):\n    return x + 2\n\nassert double(4) == 8",
    "no Python": "def double(x)",
    "leaves early": "exit(0)\nassert False",
    "loops": "while True:\n    pass",
    "a child that loops": "import os\nif not os.fork():\n    while True:\n        pass\nos.wait()",
    "much memory": "list(range(10**9))",
    "asks": "input()",
    "prints without end": "while True:\n    print('x' * 10**6)",
}
for name, code in programs.items():
    outcome = run_program(code, timeout=1.0)
    assert outcome.passed == (name == "a right one")
    print(f"{name:<20}{outcome.reason}")

# %% [markdown]
# HumanEval has 164 beginnings of functions with a text that says what they do. The model goes on until it begins
# something else at the margin. MBPP has a task in a sentence and three tests; the model sees three tasks that are
# solved, and ends its own with `[DONE]`. Both files are read as their authors published them.

# %%
#| export
class Problem(NamedTuple):
    "What a model continues, up to one of the stops; the program is `before`, that continuation, and `tests`."

    name: str
    prompt: str
    before: str
    tests: str
    until: tuple[str, ...]


def json_rows(path: str | os.PathLike, **fields: type) -> list[dict]:
    "The objects of a JSONL file that have these fields. ValueError with file, line and field."
    rows = []
    for number, row in records(path):
        for name, kind in fields.items():
            if not isinstance(row, dict) or not isinstance(row.get(name), kind):
                found = f"{row.get(name)!r:.60}" if isinstance(row, dict) else f"{row!r:.60}"
                raise ValueError(f"{path}:{number}: field {name!r} is {found}; expected a {kind.__name__}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: empty; expected a JSON object a line")
    return rows


def read_humaneval(path: str | os.PathLike) -> list[Problem]:
    "The problems of HumanEval.jsonl, or .jsonl.gz. ValueError with file and line for another format."
    rows = json_rows(path, task_id=str, prompt=str, entry_point=str, test=str)
    until = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")  # Chen et al., section 2.1
    tests = [f"\n{row['test']}\ncheck({row['entry_point']})\n" for row in rows]
    return [Problem(row["task_id"], *[row["prompt"]] * 2, test, until) for row, test in zip(rows, tests, strict=True)]


def read_mbpp(path: str | os.PathLike, shots: int = 3) -> list[Problem]:
    """The problems of mbpp.jsonl that are for testing, 11 to 510, behind the solved ones from number 2 on.

    ValueError with file and line for another format, and where these are not in the file.
    """
    rows = {row["task_id"]: row for row in json_rows(path, task_id=int, text=str, code=str, test_list=list)}
    examples, problems = [rows.get(n) for n in range(2, 2 + shots)], [rows[n] for n in sorted(rows) if 11 <= n <= 510]
    if None in examples or not problems:
        expected = f"those that are solved, 2 to {1 + shots}, " if shots else ""
        raise ValueError(f"{path}: task_id {min(rows)} to {max(rows)}; expected {expected}and some from 11 to 510")

    def asked(row: dict) -> str:
        tests = "\n".join(row["test_list"])
        return f"You are an expert Python programmer, and here is your task: {row['text'].strip()} " \
               f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"  # fmt: skip

    solved = [asked(row) + row["code"].replace("\r\n", "\n").strip() + "\n[DONE]\n\n" for row in examples]
    return [
        Problem(
            f"MBPP/{row['task_id']}", "".join(solved) + asked(row), "",
            "\n".join(["", row.get("test_setup_code") or "", *row["test_list"], ""]), ("[DONE]",),
        )
        for row in problems
    ]  # fmt: skip


def solve(
    problems: Sequence[Problem],
    generate: Callable[[Sequence[Problem], int], list[list[str]]],
    samples: int,
    timeout: float = 3.0,
    memory: int = 2**30,
    workers: int | None = None,
) -> list[int]:
    """How many of so many programs pass, for each problem.

    generate: (problems, samples) -> for each problem its continuations. A program that occurs twice runs once.
    timeout, memory: of `run_program`; workers: programs that run at a time, by default one for each core. Under
    torchrun its processes divide the programs. ValueError for another number of continuations.
    """
    texts = generate(problems, samples)
    if [len(some) for some in texts] != [samples] * len(problems):
        raise ValueError(f"generate gave {[len(some) for some in texts][:5]} texts; expected {samples} a problem")
    programs = [[p.before + text + p.tests for text in some] for p, some in zip(problems, texts, strict=True)]
    distinct = sorted({program for some in programs for program in some})
    with ThreadPoolExecutor(workers or max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))) as pool:
        def run(some: Sequence[str]) -> list[bool]:
            ran = pool.map(lambda program: run_program(program, timeout, memory).passed, some)
            return list(tqdm(ran, total=len(some), desc="running programs", unit="program", leave=False))

        passed = dict(zip(distinct, over_ranks(distinct, run), strict=True))
    return [sum(passed[program] for program in some) for some in programs]


def pass_rate(counts: Sequence[int], samples: int, k: int) -> tuple[float, float]:
    "Mean of pass@k over problems, and its standard error, from how many of the samples passed in each."
    rates = np.array([pass_at_k(samples, count, k) for count in counts])
    return float(rates.mean()), float(rates.std(ddof=1) / len(rates) ** 0.5) if len(rates) > 1 else 0.0

# %% [markdown]
# Without a model: a sampler that solves each problem with its own chance, which we plant. The problems are in
# HumanEval's format, and the programs really run. The chances are far apart, and that decides the curve: were every
# problem solved with the mean chance, a hundred programs would solve nearly all of them.

# %%
from llama2lib.programs import Problem, pass_rate, read_humaneval, solve
from llama2lib.recipes import write_atomic

problems = 40
chances = np.random.default_rng(1).beta(0.25, 1.5, problems)
rows = [
    {"task_id": f"Test/{n}", "entry_point": "add",
     "prompt": f'def add(x):\n    """Add {n}.\n    >>> add(1)\n    {1 + n}\n    """\n',
     "test": f"def check(candidate):\n    assert candidate(1) == {1 + n} and candidate(-5) == {n - 5}\n"}
    for n in range(1, problems + 1)
]  # fmt: skip


def sampler(problems: list[Problem], samples: int) -> list[list[str]]:
    "Right and wrong endings of each problem, by its planted chance."
    random, numbers = np.random.default_rng(0), [problem.name.split("/")[1] for problem in problems]
    right = [random.random(samples) < chance for chance in chances]
    return [[f"    return x {'-+'[int(good)]} {n}" for good in row] for n, row in zip(numbers, right, strict=True)]


with tempfile.TemporaryDirectory() as folder:
    write_atomic(Path(folder) / "problems.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    counts = solve(read_humaneval(Path(folder) / "problems.jsonl"), sampler, samples=200)
ks = np.arange(1, 101)
curve, error = 100 * np.array([pass_rate(counts, 200, k) for k in ks]).T
fig, ax = plt.subplots()
ax.plot(ks, 100 * (1 - (1 - chances.mean()) ** ks), ":", color="0.4", label="if all problems had the mean chance")
ax.plot(ks, 100 * (1 - (1 - chances) ** ks[:, None]).mean(1), "--", color="0.4", label="planted chances")
ax.plot(ks, curve, color=plots.COLORS["ours"], label=f"{problems} problems, 200 programs each")
ax.fill_between(ks, curve - error, curve + error, color=plots.COLORS["ours"], alpha=0.2, linewidth=0)
for size in ("7B", "70B"):
    printed = PAPER["Table 21"][f"Llama 2 {size}"]
    ax.plot([1, 100], [printed["HumanEval@1"], printed["HumanEval@100"]], linestyle="none", marker="o", markersize=7,
            markerfacecolor="none", color=plots.COLORS[size], label=f"HumanEval, Llama 2 {size}")  # fmt: skip
ax.set(xscale="log", xlabel="k, programs", ylabel="pass@k (%)", ylim=(0, 102),
       title="Problems are unequal: a hundred programs do not solve them all")  # fmt: skip
ax.set_xticks([1, 2, 5, 10, 20, 50, 100], [1, 2, 5, 10, 20, 50, 100])
ax.minorticks_off()
ax.legend(fontsize="small")
plots.save(fig, "09_pass_at_k.png")
share = PAPER["Table 21"]["Llama 2 7B"]["HumanEval@1"] / 100
print(f"were HumanEval's problems all alike for 7B, its pass@100 would be {1 - (1 - share) ** 100:.4%}")
assert np.abs(curve / 100 - (1 - (1 - chances) ** ks[:, None]).mean(1)).max() < 0.05

# %% [markdown]
# ### Tasks from files
#
# A task of the harness is a small file in YAML: where the questions are, how a prompt is made of one, and how an answer
# is scored. Ours includes that file and changes one thing, where the questions come from. So prompts, stops, filters
# and metrics are the harness's own, and the scores comparable with everybody's.
#
# | task | file, as its authors publish it | shots |
# |---|---|---|
# | `gsm8k` | `gsm8k/test*.jsonl`, `gsm8k/train*.jsonl` | 8 |
# | `nq_open` | `nq_open/NQ-open.dev*.jsonl`, `nq_open/NQ-open.train*.jsonl` | 5 |
# | `agieval_logiqa_en` and seven more | `agieval/logiqa-en.jsonl` | 5 |
# | `bbh_fewshot_word_sorting` and 26 more | `bbh/word_sorting.json` | 3 |
# | `truthfulqa_mc1`, `truthfulqa_mc2` | `truthfulqa/TruthfulQA.csv` | 6 in the prompt |
# | `humaneval`, `mbpp` | `humaneval/HumanEval*.jsonl`, `mbpp/mbpp*.jsonl` | 0, 3 |
# | `mini`: `mini_choice` and `mini_open` | none, the mini world's own | 0 |
#
# The numbers of shots are the paper's. The solved examples come from the training file, or where there is none from the
# other questions; BIG-Bench Hard and TruthfulQA bring their own. A task that is not in the table is the harness's, with
# its questions from the hub or the hub's cache. The groups of Table 3 are names as well, `commonsense` for instance.
#
# > Ours: what the harness lacks. It has no QuAC, so `reading` is without. For AGIEval it has no solved examples: from
# > the hub it is asked without shots, from files with five.

# %%
#| default_exp evaluate

# %%
#| export
import csv
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from llama2lib.checkpoint import load_checkpoint, read_tensors
from llama2lib.continuations import over_ranks, written_until
from llama2lib.distributed import compute_dtype, processes
from llama2lib.grammar import fill, wordings, written
from llama2lib.judge import read_answer, read_task
from llama2lib.launch import one_line_errors
from llama2lib.model import Llama
from llama2lib.programs import Problem, json_rows, pass_rate, read_humaneval, read_mbpp, solve
from llama2lib.recipes import write_atomic
from llama2lib.safety import read_truthfulqa
from llama2lib.synthetic import HELPFUL, pick, question
from llama2lib.tokenizer import Tokenizer
from llama2lib.world import VALUES, holds, truth


def gsm8k_rows(path: Path) -> list[dict]:
    "Questions of GSM8K. ValueError, here and below, with file and line for another format."
    return json_rows(path, question=str, answer=str)


def nq_rows(path: Path) -> list[dict]:
    "Questions of NaturalQuestions' open version, with their right answers."
    return json_rows(path, question=str, answer=list)


def agieval_rows(path: Path) -> list[dict]:
    "Questions of an exam of AGIEval in its zero-shot wording, `query`, with `choices` and the right ones, `gold`."
    found = []
    for number, row in enumerate(json_rows(path, question=str, options=list, label=str), 1):
        last, letters = "ABCDEFG"[len(row["options"]) - 1 : len(row["options"])], "ABCDEFG"[: len(row["options"])]
        if not last or row["label"] not in letters:
            raise ValueError(f"{path}:{number}: label {row['label']!r} of {len(row['options'])} options; expected one")
        asked = f"{row.get('passage') or ''}Q: {row['question']} Answer Choices: {' '.join(row['options'])}"
        query = f"{asked}\nA: Among A through {last}, the answer is"
        found.append({"query": query, "choices": row["options"], "gold": [letters.index(row["label"])]})
    return found


def bbh_rows(path: Path) -> list[dict]:
    "Questions of a task of BIG-Bench Hard."
    try:
        examples = json.loads(path.read_text("utf-8"))["examples"]
        rows = [{"input": row["input"], "target": row["target"]} for row in examples]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected JSON with a list `examples` of input and target ({error!r:.80})") from None
    if not rows:
        raise ValueError(f"{path}: no examples")
    return rows


def truthfulqa_rows(path: Path) -> list[dict]:
    "TruthfulQA's questions with choices: the best answer and the wrong ones (MC1), all right and wrong ones (MC2)."
    with open(path, encoding="utf-8-sig", newline="") as file:
        best = [row.get("Best Answer") for row in csv.DictReader(file)]
    found = []
    for number, (one, right) in enumerate(zip(read_truthfulqa(path), best, strict=True), 1):
        if not right:
            raise ValueError(f"{path}: row {number} lacks a best answer")
        sets = {"mc1": ([right], one.wrong), "mc2": (one.right, one.wrong)}
        found.append({"question": one.text} | {
            f"{name}_targets": {"choices": [*good, *bad], "labels": [1] * len(good) + [0] * len(bad)}
            for name, (good, bad) in sets.items()
        })  # fmt: skip
    return found

# %% [markdown]
# The mini world has two tasks, about people, animals and things that no dialogue was about, in wordings that no
# dialogue had. `mini_choice` gives four statements that differ in one value. `mini_open` lets the model write, and
# takes an answer for right if it says what was asked, and nothing about it that is wrong; the gold judge's reader of
# chapter 12 reads it.

# %%
#| export
CHOICE = {"person": 5, "animal": 2, "thing": 2, "opposite": 1, "category": 1}
OPEN = {kind: HELPFUL[kind] for kind in (*CHOICE, "list", "sum", "count", "copy", "howto")}


def mini_rows(kinds: dict[str, float], count: int, split: str) -> list[dict]:
    "Questions of the mini world; those of CHOICE with four statements, of which number `gold` is true."
    random, rows = np.random.default_rng([9, split == "test", count]), []
    while len(rows) < count:
        kind = pick(random, kinds)
        text, relation, subject, _ = question(random, kind, split)
        row = {"question": text, "kind": kind, "expected": truth(relation, subject) or ""}
        if kind in CHOICE:
            wrong = [value for value in VALUES[relation] if value != row["expected"]]
            values = random.permutation([row["expected"], *random.choice(wrong, 3, replace=False)]).tolist()
            wording = pick(random, wordings(f"say {relation}", split))
            row["choices"] = [written(fill(wording, relation, subject, v=value)) for value in values]
            row["gold"] = values.index(row["expected"])
        rows.append(row)
    return rows


def right(asked: str, answer: str) -> bool:
    "Whether an answer to a question of the mini world claims what was asked, and only what is true of it."
    task = read_task([{"role": "user", "content": asked}])
    claims = [claim for said in read_answer(task, answer) for claim in said.claims]
    claims = [claim for claim in claims if claim[:2] == (task.relation, task.subject)]
    return bool(claims) and all(map(holds, claims))


CODE = ("humaneval", "mbpp")
MINI = {
    "mini_choice": {
        "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_choice": "choices",
        "doc_to_target": "gold", "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "mini_open": {
        "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "expected",
        "process_results": lambda row, answers: {"acc": float(right(row["question"], answers[0]))},
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48, "do_sample": False},
    },
}  # fmt: skip


def mini_task(name: str, count: int = 400):
    "A task of MINI for the harness. ValueError for another name."
    if name not in MINI:
        raise ValueError(f"task {name!r}: expected one of {', '.join(MINI)}")
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask

    kinds = {"mini_choice": CHOICE, "mini_open": OPEN}[name]

    def rows(**_):
        return {split: Dataset.from_list(mini_rows(kinds, count, split)) for split in ("train", "test")}

    source = {"custom_dataset": rows, "test_split": "test", "fewshot_split": "train", "fewshot_delimiter": " "}
    return ConfigurableTask(config={"task": name, "num_fewshot": 0, "metadata": {"version": 1}} | source | MINI[name])


class Source(NamedTuple):
    "A task of the harness: its file below the package's tasks, the files of its questions by split, and their reader."

    definition: str
    files: dict[str, str]
    reader: str  # a function of this module
    fields: dict | None = None  # of the definition, to be replaced as well


LOCAL = {  # name of a task -> where it comes from; {0} is what the group in the name holds, {1} that with - for _
    "gsm8k": Source("gsm8k/gsm8k.yaml", {"test": "gsm8k/test*.jsonl", "train": "gsm8k/train*.jsonl"}, "gsm8k_rows"),
    "nq_open": Source(
        "nq_open/nq_open.yaml",
        {"test": "nq_open/NQ-open.dev*.jsonl", "train": "nq_open/NQ-open.train*.jsonl"}, "nq_rows",
    ),
    "agieval_(.+)": Source(
        "agieval/{1}.yaml", {"test": "agieval/{1}.jsonl"}, "agieval_rows",
        {"fewshot_config": {"doc_to_target": "{{choices[gold[0]]}}"}},  # the harness has no solved examples of it
    ),
    "bbh_fewshot_(.+)": Source(
        "bbh/fewshot/{0}.yaml", {"test": "bbh/{0}.json"}, "bbh_rows", {"fewshot_split": None}
    ),
    "(truthfulqa_mc[12])": Source(
        "truthfulqa/{0}.yaml", {"test": "truthfulqa/TruthfulQA.csv"}, "truthfulqa_rows", {"fewshot_split": None}
    ),
}  # fmt: skip
TASKS = {  # of the groups of Table 3
    "code": CODE,
    "commonsense": (
        "piqa", "social_iqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa", "commonsense_qa"
    ),
    "world": ("nq_open", "triviaqa"), "reading": ("squadv2", "boolq"), "math": ("gsm8k", "minerva_math"),
    "mmlu": ("mmlu",), "bbh": ("bbh_fewshot",), "agi": ("agieval_en",), "mini": tuple(MINI),
}  # fmt: skip
SHOTS = {  # section 2.3 and Tables 19 to 25, by the beginning of a task's name; others: the harness's own number
    "gsm8k": 8, "nq_open": 5, "triviaqa": 5, "agieval": 5, "bbh_fewshot": 3, "mmlu": 5, "commonsense_qa": 7,
    "minerva_math": 4, "mbpp": 3,
}  # fmt: skip


def one_file(folder: Path, pattern: str) -> Path | None:
    "The file of a folder that a pattern fits, or none. ValueError where several do."
    found = sorted(folder.glob(pattern))
    if len(found) > 1:
        raise ValueError(f"{folder}: {', '.join(file.name for file in found)} all fit {pattern}; expected one of them")
    return found[0] if found else None


def from_files(reader: str, files: dict[str, str], **_) -> dict:
    "The questions of a task by split; the harness calls it, by the name in the definition that `local_task` writes."
    from datasets import Dataset

    return {split: Dataset.from_list(globals()[reader](Path(file))) for split, file in files.items()}


def local_task(name: str, folder: Path):
    "The harness's task of a name with its questions from a folder of files; None where there is no file for it."
    found = ((re.fullmatch(pattern, name), source) for pattern, source in LOCAL.items())
    match, source = next((pair for pair in found if pair[0]), (None, None))
    if match is None:
        return None
    import lm_eval
    from lm_eval.tasks import TaskManager

    part = (match[1], match[1].replace("_", "-")) if match.groups() else ()
    files = {split: one_file(folder, pattern.format(*part)) for split, pattern in source.files.items()}
    definition = Path(lm_eval.__file__).parent / "tasks" / source.definition.format(*part)
    if files["test"] is None or not definition.exists():
        return None
    given = {split: str(file.resolve()) for split, file in files.items() if file}
    fields = {
        "include": str(definition), "task": name, "training_split": None, "validation_split": None,
        "test_split": "test", "fewshot_split": "train" if "train" in given else "test",
        "dataset_kwargs": {"reader": source.reader, "files": given},
    } | (source.fields or {})  # fmt: skip
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]  # JSON is YAML
    lines.append("custom_dataset: !function llama2lib.evaluate.from_files")
    with tempfile.TemporaryDirectory() as place:
        write_atomic(Path(place) / "task.yaml", "\n".join(lines))
        return TaskManager(include_path=place, include_defaults=False).load([name])["tasks"][name]


def tasks_of(names: Sequence[str], folder: Path | None, shots: int | None = None) -> dict[str, dict]:
    """What the harness has to do for each name, as its `evaluate` takes it: own tasks, tasks from files, its own.

    ValueError for a name that nobody knows, or whose questions cannot be had.
    """
    found, manager = {}, None
    for name in names:
        task = mini_task(name) if name in MINI else local_task(name, folder) if folder else None
        if task is not None:
            found[name] = {"tasks": {name: task}}
        else:
            from lm_eval.tasks import TaskManager

            manager = manager or TaskManager()
            if name not in manager.all_tasks:
                close = get_close_matches(name, [*TASKS, *MINI, *CODE, *manager.all_tasks], n=3)
                raise ValueError(f"task {name!r}: expected {', '.join(TASKS)}, {', '.join(CODE)} or a task of the "
                                 f"harness; near it are {', '.join(close) or 'none'}")  # fmt: skip
            try:
                found[name] = manager.load([name])
            except Exception as error:  # of the hub, the network, or a package that the task needs
                files = [re.sub("{.}", "*", one.files["test"]) for key, one in LOCAL.items() if re.fullmatch(key, name)]
                place = f"no file {files[0]} in {folder}, and " if files else ""
                reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
                raise ValueError(f"task {name}: {place}the harness cannot load it ({reason})") from None
        for one, task in found[name]["tasks"].items():
            paper = next((number for start, number in SHOTS.items() if one.startswith(start)), None)
            number, examples = paper if shots is None else shots, getattr(task, "fewshot_cfg", None)
            solved = task.has_training_docs() or (examples and (examples.split or examples.samples))
            if shots and not solved:
                raise ValueError(f"task {one}: {shots} shots, but it has no solved examples; expected 0")
            if number is not None and (solved or not number):
                task.set_config(key="num_fewshot", value=number)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)  # as the harness does
    return found


def ask(lm, unit: dict, limit: int | None = None, chat: bool = False) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """Scores of the tasks of `tasks_of` for a `LlamaLM`, and what was asked and answered, both by task.

    A score is {'n': questions, 'shots': …, 'metrics': {name: {'value': …, 'stderr': …}}}; groups of tasks have one as
    well. `limit`: the first so many questions; `chat`: prompts as messages of a user.
    """
    from lm_eval.evaluator import evaluate

    try:
        found = evaluate(
            lm, unit, limit=limit, bootstrap_iters=1000, apply_chat_template=chat, fewshot_as_multiturn=chat
        )
    except AssertionError as error:  # such as more shots than a task has
        reason = str(error).split("\n")[0][:200] or "it does not say why"
        raise ValueError(f"task {', '.join(unit['tasks'])[:80]}: the harness refuses ({reason})") from None
    scores = {}
    for name, row in {**found["results"], **found.get("groups", {})}.items():
        pairs = [key.split(",") for key in row if "," in key and "_stderr," not in key]
        metrics = {}
        for metric, kind in pairs:
            error = row.get(f"{metric}_stderr,{kind}")
            known = isinstance(error, float) and np.isfinite(error)  # the harness writes 'N/A'
            label = metric if kind == "none" else f"{metric}, {kind}"
            metrics[label] = {"value": float(row[f"{metric},{kind}"]), "stderr": float(error) if known else None}
        number = found["n-samples"].get(name, {}).get("effective", row.get("sample_len"))
        scores[name] = {"n": number, "shots": found["n-shot"].get(name), "metrics": metrics}
    return scores, found["samples"]

# %% [markdown]
# The mini world's models on the mini world's tasks. The chat model is asked in the chat format, the base model goes on
# from the bare question. What a model cannot write it may still recognise: three facts about each of a hundred people
# are too many for it to learn by heart, but among four statements it finds the true one more often than by chance.

# %%
from llama2lib.evaluate import ask, tasks_of
from llama2lib.stats import win_rate_interval

count = by_scale(smoke=40, laptop=400, a100=400)
asked = {}
for name, model in (("base", base), ("chat", chat)):
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        for task, unit in tasks_of(["mini_choice", "mini_open"], None).items():
            scores, asked[name, task] = ask(LlamaLM(model, words), unit, count, name == "chat")
            score = scores[task]["metrics"]["acc"]
            print(f"{name} {task:<12} {score['value']:.3f} ± {score['stderr']:.3f} of {scores[task]['n']} questions")

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 3.4), width_ratios=(1, 2), sharey=True)
for ax, (task, title) in zip(axes, (("mini_choice", "one of four"), ("mini_open", "written")), strict=True):
    for shift, name in ((-0.15, "base"), (0.15, "chat")):
        rows = asked[name, task][task]
        kinds = sorted({row["doc"]["kind"] for row in rows})
        counted = [[row["acc"] for row in rows if row["doc"]["kind"] == kind] for kind in kinds]
        found = 100 * np.array([win_rate_interval(int(sum(one)), len(one) - int(sum(one))) for one in counted])
        error = np.abs(found[:, 1:] - found[:, :1]).T
        ax.errorbar(np.arange(len(kinds)) + shift, found[:, 0], error, fmt="o", markersize=4, label=name)
    ax.set_xticks(range(len(kinds)), kinds, rotation=45, ha="right")
    ax.set(title=title, xlabel="what is asked")
axes[0].axhline(25, color="0.4", linestyle=":")
axes[0].set(ylabel="right answers (%)", ylim=(-3, 103))
axes[1].legend(loc="lower left")
fig.suptitle("What is known of people is recognised more often than written", x=0.01, ha="left", fontsize="medium")
plots.save(fig, "09_mini_tasks.png")

# %% [markdown]
# HumanEval and MBPP do not go through the harness, whose versions need the network and decode the continuation alone.

# %%
#| export
TOP_P, FEW, MANY = 0.95, 0.1, 0.8  # section A.2.2: of programs; temperatures for pass@1, and for pass@100 or pass@80


def programmer(
    model: Llama, tokenizer: Tokenizer, temperature: float, seed: int = 0, max_new_tokens: int = 512, batch: int = 64
) -> Callable[[Sequence[Problem], int], list[list[str]]]:
    """What `solve` generates with: a model's programs at a temperature, top-p 0.95 (section A.2.2).

    `max_new_tokens`: at most half of the model's context; a longer prompt than what is left loses its beginning.
    """
    longest = min(max_new_tokens, model.config.max_seq_len // 2)
    settings = {"max_new_tokens": longest, "temperature": temperature, "top_p": TOP_P, "batch": batch}

    def written_rows(rows):
        prompts, seeds, until = zip(*rows, strict=True) if rows else ((), (), ((),))
        return written_until(model, tokenizer, prompts, until[0], seeds=seeds, **settings)

    def generate(problems: Sequence[Problem], samples: int) -> list[list[str]]:
        rows = []
        for number, problem in enumerate(problems):
            tokens = tokenizer.encode(problem.prompt, bos=True)[longest - model.config.max_seq_len :]
            seeds = np.random.SeedSequence([seed, number]).generate_state(samples).tolist()
            rows += [(tokens, one, problem.until) for one in seeds]
        texts = over_ranks(rows, written_rows)
        return [texts[n : n + samples] for n in range(0, len(texts), samples)]

    return generate


def read_problems(name: str, folder: Path | None, shots: int | None = None) -> list[Problem]:
    "The problems of a task of CODE from a folder of files. ValueError without them, and for another name."
    if name not in CODE:
        raise ValueError(f"task {name!r}: expected one of {', '.join(CODE)}")
    pattern = {"humaneval": "humaneval/HumanEval*.jsonl*", "mbpp": "mbpp/mbpp*.jsonl"}[name]
    file = one_file(folder, pattern) if folder else None
    if file is None:
        where = f"no {pattern} in {folder}" if folder else "no folder of files"
        raise ValueError(f"task {name}: {where}; expected its authors' file there, see --data")
    if name == "humaneval" and shots:
        raise ValueError(f"task humaneval: {shots} shots; expected none, it has no solved examples")
    return read_humaneval(file) if name == "humaneval" else read_mbpp(file, 3 if shots is None else shots)

# %% [markdown]
# ### The command
#
# `python -m llama2lib.evaluate` runs tasks on a checkpoint, prints a table with standard errors, and writes JSON. The
# file is written after every task, and the same command goes on with those that it lacks.

# %%
#| export
@dataclass(frozen=True)
class EvaluateConfig:
    "Benchmarks for a model (section 2.3)."

    model: Path  # checkpoint folder with its tokenizer, Hugging Face's layout or Meta's
    tasks: str  # names with commas: mini, gsm8k, humaneval, a group of Table 3 such as commonsense, or the harness's
    out: Path  # JSON file for the scores; tasks that it already holds are not run again
    data: Path | None = None  # folder of the questions, in the layout of chapter 09; none: that of LLAMA2_DATA
    shots: int | None = None  # solved examples in front of a question; none: as many as in the paper
    limit: int | None = None  # the first so many questions of each task
    chat: bool = False  # give prompts as messages of a user, in the chat format
    samples: int = 1  # programs for a problem, at temperature 0.1; from 100 on (mbpp: 80) as many more at 0.8, pass@100
    log: bool = False  # write all questions and answers too, to OUT's name with the task's, .jsonl
    batch_tokens: int = 8192  # read together
    batch: int = 64  # texts written together
    seed: int = 0  # of sampled answers and programs


def programs_scored(config: EvaluateConfig, name: str, model: Llama, tokenizer: Tokenizer, problems: Sequence[Problem]):
    "The score of a task of CODE, as `ask` has it, and each problem with how many of its programs pass."
    many, samples = {"humaneval": 100, "mbpp": 80}[name], config.samples
    metrics, log = {}, [{"doc_id": problem.name} for problem in problems]
    for k, temperature in (1, FEW), (many, MANY):
        if k <= samples:
            generate = programmer(model, tokenizer, temperature, config.seed, batch=config.batch)
            counts = solve(problems, generate, samples)
            metrics[f"pass@{k}"] = dict(zip(("value", "stderr"), pass_rate(counts, samples, k), strict=True))
            for row, count in zip(log, counts, strict=True):
                row[f"passed of {samples} at temperature {temperature}"] = count
    shots = {"humaneval": 0, "mbpp": 3 if config.shots is None else config.shots}[name]
    return {name: {"n": len(problems), "shots": shots, "metrics": metrics}}, {name: log}


def lines_of(scores: dict[str, dict]) -> list[str]:
    "Rows of the table of scores."
    rows = []
    for name, score in scores.items():
        for metric, found in score["metrics"].items():
            error = "" if found["stderr"] is None else f"± {found['stderr']:.4f}"
            counted = f"{score['n'] or ''!s:>7}{'' if score['shots'] is None else score['shots']!s:>7}"
            rows.append(f"{name:<36}{metric:<32}{found['value']:>9.4f} {error:<9}{counted}")
    return rows


def earlier(config: EvaluateConfig) -> dict:
    "What the file of scores holds; ValueError where it was made with other settings, or is none."
    kept = ("model", "shots", "limit", "chat", "samples", "seed")
    settings = {name: value for name, value in asdict(config).items() if name in kept}
    settings = json.loads(json.dumps(settings, default=str))
    if not config.out.exists():
        return {"settings": settings, "tasks": {}}
    try:
        state = json.loads(config.out.read_text("utf-8"))
        before = state["settings"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{config.out}: no scores of this command; expected another --out") from None
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        other = (f"{name} {before.get(name)}, now {settings[name]}" for name in changed)
        raise ValueError(f"{config.out} was made with {'; '.join(other)}: expected the same, or another --out")
    return state


def run(config: EvaluateConfig) -> dict[str, dict]:
    """Run tasks as `config` says; the scores by name, on every process.

    ValueError, before the weights are loaded, for a task, a file or a setting that is wrong.
    """
    given = [name.strip() for name in config.tasks.split(",") if name.strip()]
    names = list(dict.fromkeys(one for name in given for one in TASKS.get(name, [name])))
    if not names or (config.shots or 0) < 0 or (config.limit is not None and config.limit < 1) or config.samples < 1:
        found = f"tasks {config.tasks!r}, shots {config.shots}, limit {config.limit}, samples {config.samples}"
        raise ValueError(f"{found}: expected names, and positive numbers")
    if config.chat and (code := [name for name in names if name in CODE]):
        raise ValueError(f"task {code[0]}: a model continues its programs, which messages are not; expected no --chat")
    folder = config.data or (Path(os.environ["LLAMA2_DATA"]) if os.environ.get("LLAMA2_DATA") else None)
    if folder is not None and not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one with questions")
    state = earlier(config)
    missing = [name for name in names if name not in state["tasks"]]
    problems = {name: read_problems(name, folder, config.shots)[: config.limit] for name in missing if name in CODE}
    read_tensors(config.model)  # an error now and not after the harness is read
    with processes() as device:
        from llama2lib.harness import LlamaLM

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        units = tasks_of([name for name in missing if name not in CODE], folder, config.shots)
        model, tokenizer = load_checkpoint(config.model, device, compute_dtype(device)), Tokenizer(config.model)
        lm = LlamaLM(model, tokenizer, config.batch_tokens, config.batch, config.seed)
        first = not dist.is_initialized() or dist.get_rank() == 0
        if first:
            print(f"{'task':<36}{'metric':<32}{'value':>9}   stderr   {'n':>6}{'shots':>7}")
        for name in names:
            if name in missing:
                before = lm.shortened
                if name in CODE:
                    scores, log = programs_scored(config, name, model, tokenizer, problems[name])
                else:
                    scores, log = ask(lm, units[name], config.limit, config.chat)
                state["tasks"][name] = {"shortened": lm.shortened - before, "scores": scores}
            if not first:
                continue
            print("\n".join(lines_of(state["tasks"][name]["scores"])), flush=True)
            if short := state["tasks"][name]["shortened"]:
                print(f"    {short} prompts were longer than the context of {lm.max_length}, and lost their beginning")
            if name in missing:
                for task, rows in log.items() if config.log else ():
                    text = "".join(json.dumps(row, default=str, ensure_ascii=False) + "\n" for row in rows)
                    write_atomic(config.out.with_name(f"{config.out.stem}.{task}.jsonl"), text)
                write_atomic(config.out, json.dumps(state, indent=1, ensure_ascii=False) + "\n")
        if dist.is_initialized():
            dist.barrier()
    return {name: state["tasks"][name]["scores"] for name in names}


@record
@one_line_errors()
def cli(prog: str = "python -m llama2lib.evaluate"):
    "python -m llama2lib.evaluate --model FOLDER --tasks NAMES --out FILE: benchmarks; under torchrun, on all ranks."
    import tyro

    run(tyro.cli(EvaluateConfig, prog=prog))

# %% [markdown]
# Two processes divide the requests. The scores are those of one.

# %%
from llama2lib.launch import launch

place = cache_folder() / "evaluate" / f"{scale()}-{source_digest('import llama2lib.evaluate, llama2lib.mini')[:12]}"
save_checkpoint(base, place / "base", words)
sets = {
    "gsm8k": "gsm8k/test_first500.jsonl", "nq_open": "nq_open/NQ-open.dev.jsonl",
    "truthfulqa_mc1": "truthfulqa/TruthfulQA.csv", "agieval_sat_math": "agieval/sat-math.jsonl",
    "bbh_fewshot_boolean_expressions": "bbh/boolean_expressions.json",
}  # fmt: skip
there = [name for name, file in sets.items() if data_file(file)]
print("real questions from files:", ", ".join(there) or "none, as LLAMA2_DATA names no folder with them")
options = ["--model", place / "base", "--tasks", ",".join(["mini", *there]), "--shots", 0, "--limit", 20]
_ = launch("llama2lib.evaluate", *options, "--out", place / "scores.json", nproc=2, env={"TQDM_DISABLE": 1})

# %% [markdown]
# A model of the mini world knows nothing of ours, so choices are at chance and the rest is at zero. Meta's weights, on
# eight GPUs with a copy of the model each:

# %%
launch("llama2lib.evaluate", "--model", "Llama-2-7b", "--tasks", "commonsense,world,reading,math,mmlu,bbh,agi",
       "--out", "runs/7B-scores.json", nproc=8, gpus=True)  # fmt: skip
_ = launch("llama2lib.evaluate", "--model", "Llama-2-7b", "--tasks", "code", "--samples", 200, "--data", "benchmarks",
           "--out", "runs/7B-code.json", nproc=8, gpus=True)  # fmt: skip

# %% [markdown]
# A copy of the model has to fit one GPU. 7B and 13B do; 34B, with 67 GB in bfloat16, leaves an 80 GB card little room
# for keys and values, and 70B does not fit. The folder that `save_checkpoint` writes opens in the harness's own adapter
# too, which spreads a model over GPUs: `lm_eval --model hf --model_args pretrained=FOLDER,parallelize=True`.

# %%
from llama2lib.evaluate import FEW, MANY, SHOTS, TOP_P

A22 = TEXT["Section A.2.2"]
temperatures = {"pass@1": FEW, "pass@100": MANY}
ledger.record("Section A.2.2", "top-p of programs", "preset", A22["top_p"], TOP_P,
              evidence="llama2lib/evaluate.py::TOP_P")  # fmt: skip
ledger.record("Section A.2.2", "temperatures of programs", "preset", A22["temperature"], temperatures,
              evidence="llama2lib/evaluate.py::FEW")  # fmt: skip
HARNESS = "tests/test_evaluate.py::test_the_command_scores_writes_and_goes_on"
PROGRAMS = "tests/test_evaluate.py::test_programs_of_a_model_are_run_and_counted"
for item in ("Table 3", "Table 4", "Table 19", "Table 20", "Table 21", "Table 22", "Table 23", "Table 24", "Table 25"):
    ledger.record(item, "scores of the released models", "runs at scale", None, None,
                  evidence=PROGRAMS if item == "Table 21" else HARNESS)  # fmt: skip

# %% [markdown]
# ## Contamination
#
# A model may have read the questions of a benchmark before it is asked them. Appendix A.6 looks for that in two steps.
# First it finds which tokens of each sample stand in the training data. Then it asks whether the samples that stand
# there are answered better than the others.
#
# > Ours: the method as it is described, on a suffix array of one's own token shards; leaks planted in known places, to
# > see what it finds; Table 51 recomputed; a mini model that has seen its benchmark; time and memory.

# %%
A6 = TEXT["Section A.6"]

# %% [markdown]
# ### What matches
#
# Earlier work compares text, and calls a sample contaminated or not. The paper compares tokens, of the sample in full,
# as the model is given it: question, choices, answer. It marks single tokens. A token is contaminated if it lies in a
# span of more than L = 10 tokens that the sample shares with the training data. Prompts are not formatted everywhere
# alike, so a span may differ in up to four places, the *skip budget*, but not in its first ten tokens, and not at its
# end.
#
# This leaves some things to say exactly.
#
# - Place by place: a span pairs token t of one side with token t of the other. A token that one side has more is not a
#   difference but the end of a span, and a new one may begin behind it.
# - A span begins anywhere. Every place of the corpus where its first ten tokens stand counts. From there it goes on to
#   the last token that agrees before a fifth difference. What is marked is the union of all these spans.
# - The places that differ inside a span are marked with it.
# - A span stays within one document.
# - For a larger L a span has to be longer than L. The tokens that may not differ remain ten.
#
# That is a definition, and a program that is too slow.

# %%
def by_the_letter(sample: list, documents: list[list], min_len: int = 10, skip_budget: int = 4, exact: int = 10):
    "Which tokens of a sample are contaminated: every place of it beside every place of every document."
    marked = [False] * len(sample)
    for document in documents:
        for i in range(len(sample)):
            for j in range(len(document)):
                differ, length = 0, 0
                for t, (ours, theirs) in enumerate(zip(sample[i:], document[j:], strict=False)):
                    if ours == theirs:
                        length = t + 1
                    elif t < exact or (differ := differ + 1) > skip_budget:
                        break
                if length > min_len:
                    marked[i : i + length] = [True] * length
    return marked


corpus = "we saw that the old king lived by the sea with his cat and his dog until the end".split()
for text in ("the old king lived by the sea with his cat",
             "the old king lived by the sea with his cat and",
             "then the old king lived by the sea with his cat and one cow until he died",
             "then the new king lived by the sea with his cat and his dog"):  # fmt: skip
    marked = by_the_letter(text.split(), [corpus])
    print(" ".join(word.upper() if mark else word for word, mark in zip(text.split(), marked, strict=True)))

# %% [markdown]
# Ten words that agree are too few, eleven are enough. In the third line two words differ, and the span goes on behind
# them to its last word that agrees. In the last line `new` comes too early to be forgiven, and behind it are eleven
# words.
#
# ### A sorted corpus
#
# To find the first ten tokens of a span, the corpus is sorted once: the places of all its tokens, in the order of what
# follows there. Such a *suffix array* is as long as the corpus, and any run of tokens then stands in one stretch of it,
# which two binary searches find. The paper uses the program of Lee et al. (2022), changed to run on a cluster of
# PySpark.
#
# > Ours: `pydivsufsort`, which wraps Yuta Mori's libdivsufsort, sorts bytes. It is given the two bytes of each token,
# > and of the sorted places those are left out that are not the first byte of one. The order is then not that of the
# > numbers. But any order will do, if the search keeps to the same. BOS and EOS become a border that matches nothing.
# > The corpus is sorted in parts of bounded size, each written whole or not at all, so a run that was stopped goes on
# > behind its last part. The tokens remain in one file, and a span may cross from part to part.

# %%
from pydivsufsort import divsufsort

numbers = np.array([3, 1, 2, 1, 2, 9])
for place in divsufsort(numbers.astype(np.uint16)):
    print(place, numbers[place:])

# %%
#| default_exp suffix_index

# %%
#| export
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from llama2lib.recipes import write_atomic
from llama2lib.shards import Shards

INDEX, TOKENS = "index.json", "tokens.bin"
LONGEST = 64  # tokens of the longest run that an index can look up


def _type(vocab_size: int) -> np.dtype:
    "Of stored ids; the largest number is free, for borders."
    return np.dtype("<u2" if vocab_size < 2**16 else "<u4")


def stored_ids(tokens, vocab_size: int, what: str) -> np.ndarray:
    "Tokens as an array of stored ids. ValueError, beginning with `what`, for one that is not in the vocabulary."
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise ValueError(f"{what}: expected a list of token ids, found {ids.dtype} of shape {ids.shape}")
    if len(wrong := np.flatnonzero((ids < 0) | (ids >= vocab_size))):
        raise ValueError(f"{what}: id {ids[wrong[0]]} at place {wrong[0]}, expected ids from 0 to {vocab_size - 1}")
    return ids.astype(_type(vocab_size))


def _pieces(corpus: Shards | Sequence, vocab_size: int) -> Iterator[np.ndarray]:
    "The ids of a corpus, with a border behind each document."
    border = np.iinfo(_type(vocab_size)).max
    if not isinstance(corpus, Shards):
        for number, document in enumerate(corpus):
            yield np.append(stored_ids(document, vocab_size, f"document {number}"), _type(vocab_size).type(border))
        return
    for start in range(0, len(corpus), 2**22):
        ids = corpus.read(start, min(start + 2**22, len(corpus)))
        stored = ids.astype(_type(vocab_size))
        stored[np.isin(ids, (corpus.header["bos_id"], corpus.header["eos_id"]))] = border
        yield stored

# %%
#| export
def build_index(
    corpus: Shards | Sequence[Sequence[int]],
    folder: str | Path | None = None,
    vocab_size: int = 2**16 - 1,
    part_tokens: int = 2**25,
) -> "CorpusIndex":
    """Index a corpus, token shards or documents as lists of ids, in a folder (None: one that goes with the index).

    Memory: about ten bytes for each byte of a part's ids. Stopped at any moment, the same call goes on behind the last
    sorted part; a finished index is opened. `vocab_size` is for lists; shards have their own. ValueError: ids outside
    the vocabulary, no tokens, a part that is too large, or a folder that holds something else, or another corpus.
    ImportError, in one line, without pydivsufsort.
    """
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise ImportError("pydivsufsort is not installed: pip install -e '.[contamination]'") from None
    scratch = tempfile.TemporaryDirectory() if folder is None else None
    folder = Path(folder or scratch.name)
    header = _begun(corpus, folder, vocab_size, part_tokens)
    parts = range(len(header["parts"]), -(-header["tokens"] // header["part_tokens"]))
    for number in tqdm(parts, unit=" parts", desc="sorting suffixes") if len(parts) > 1 else parts:
        header["parts"].append(_sort_part(folder, header, number, divsufsort))
        write_atomic(folder / INDEX, json.dumps(header, indent=1) + "\n")
    return CorpusIndex(folder, scratch)


def _begun(corpus: Shards | Sequence, folder: Path, vocab_size: int, part_tokens: int) -> dict:
    "The header of the index that this corpus has in the folder; begins one, its tokens written, if there is none."
    borders, digest = [], hashlib.sha256()
    if isinstance(corpus, Shards):
        vocab_size, borders = corpus.header["vocab_size"], [corpus.header["bos_id"], corpus.header["eos_id"]]
        digest.update(corpus.digest.encode())
    else:
        for piece in _pieces(corpus, vocab_size):
            digest.update(piece)
    fixed = {"format": 1, "vocab_size": vocab_size, "borders": borders, "corpus": digest.hexdigest()}
    if (folder / INDEX).exists():
        header = read_index(folder)
        for name, value in fixed.items():
            if header[name] != value:
                raise ValueError(f"{folder / INDEX}: begun with {name} {header[name]!r}, not {value!r}: another corpus")
        return header
    if not 0 < part_tokens * _type(vocab_size).itemsize < 2**31 - 1024:
        raise ValueError(f"part_tokens {part_tokens:,}: expected a part of at least one token and less than 2 GiB")
    left_over = TOKENS, f".{TOKENS}.", f".{INDEX}"  # of a run that was stopped before it had a header
    if folder.exists() and not all(item.name.startswith(left_over) for item in folder.iterdir()):
        raise ValueError(f"{folder}: expected an index, or a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    tokens, content = _write(folder / TOKENS, _bordered(corpus, vocab_size))
    header = fixed | {"part_tokens": part_tokens, "tokens": tokens - LONGEST, "sha256": content, "parts": []}
    if not header["tokens"]:
        raise ValueError(f"{folder}: a corpus without tokens")
    write_atomic(folder / INDEX, json.dumps(header, indent=1) + "\n")
    return header


def _bordered(corpus: Shards | Sequence, vocab_size: int) -> Iterator[np.ndarray]:
    "A corpus's ids, and borders behind its end, so that any look-up from any place finds enough."
    yield from _pieces(corpus, vocab_size)
    yield np.full(LONGEST, np.iinfo(_type(vocab_size)).max, _type(vocab_size))


def _write(file: Path, arrays: Iterator[np.ndarray]) -> tuple[int, str]:
    "Write arrays one behind the other, whole or not at all; how many numbers, and the sha256 of their bytes."
    temporary, count, digest = file.with_name(f".{file.name}.tmp"), 0, hashlib.sha256()
    with temporary.open("wb") as out:
        for array in arrays:
            out.write(array)
            digest.update(array)
            count += len(array)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)
    return count, digest.hexdigest()


def _sort_part(folder: Path, header: dict, number: int, divsufsort) -> dict:
    "Sort the places of a part's tokens by what follows there, and write them; the part's entry for the header."
    start, dtype = number * header["part_tokens"], _type(header["vocab_size"])
    size = min(header["part_tokens"], header["tokens"] - start)
    text = np.fromfile(folder / TOKENS, np.uint8, (size + LONGEST) * dtype.itemsize, offset=start * dtype.itemsize)
    places = divsufsort(text)  # of bytes: at most two in four begin a token

    def of_tokens() -> Iterator[np.ndarray]:
        for first in range(0, len(places), 2**22):
            some = places[first : first + 2**22]
            some = some[some % dtype.itemsize == 0] // dtype.itemsize
            yield some[some < size].astype("<u4")

    file = folder / f"suffixes-{number:05}.bin"
    return {"file": file.name, "sha256": _write(file, of_tokens())[1]}


def read_index(folder: str | Path) -> dict:
    "The header of an index. FileNotFoundError, or ValueError if it cannot be read."
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the header of an index of a corpus")
    try:
        header = json.loads(path.read_bytes())
        known = header["format"] == 1
        _ = header["tokens"] + header["part_tokens"] + header["vocab_size"], header["borders"]
        _ = header["corpus"], header["sha256"], [(part["file"], part["sha256"]) for part in header["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the header of an index ({type(error).__name__}: {error})") from None
    if not known:
        raise ValueError(f"{path}: format {header['format']!r}, expected 1")
    return header

# %% [markdown]
# Opened, an index answers where a run of tokens stands. Many runs are looked up at once: every so many suffixes a post
# tells in which stretch to search, and numpy halves all stretches together.

# %%
#| export
class CorpusIndex:
    """A corpus whose suffixes are sorted: where any run of up to 64 tokens stands in it. Memory-mapped.

    `header` is the folder's, `len()` counts tokens with the borders of documents. FileNotFoundError without a header;
    ValueError when it is not finished, or when a file is missing or has not all its bytes.
    """

    def __init__(self, folder: str | Path, scratch: tempfile.TemporaryDirectory | None = None):
        self.folder, self.header, self._scratch = Path(folder), read_index(folder), scratch
        self.dtype = _type(self.header["vocab_size"])
        self.border = np.iinfo(self.dtype).max
        missing = -(-len(self) // self.header["part_tokens"]) - len(self.header["parts"])
        if missing:
            raise ValueError(f"{self.folder}: not finished, {missing} parts are missing; build it again to go on")
        self.text = self._mapped(TOKENS, self.dtype, len(self) + LONGEST)
        self._first = np.arange(len(self.header["parts"])) * self.header["part_tokens"]
        sizes = np.diff([*self._first, len(self)])
        self._suffixes = [
            self._mapped(part["file"], "<u4", size) for part, size in zip(self.header["parts"], sizes, strict=True)
        ]

    def __len__(self) -> int:
        return self.header["tokens"]

    def _mapped(self, name: str, dtype, count: int) -> np.ndarray:
        file, expected = self.folder / name, int(count) * np.dtype(dtype).itemsize
        found = f"{file.stat().st_size:,}" if file.is_file() else "no file"
        if found != f"{expected:,}":
            raise ValueError(f"{file}: expected {expected:,} bytes, found {found}")
        return np.asarray(np.memmap(file, dtype, "r"))

    def verify(self) -> None:
        "Read every file; ValueError naming the first whose bytes are not those written."
        files = [(TOKENS, self.header["sha256"]), *((part["file"], part["sha256"]) for part in self.header["parts"])]
        for name, digest in tqdm(files, unit=" files", desc="verifying"):
            with (self.folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise ValueError(f"{self.folder / name}: its sha256 differs from the header's")

    def places(self, part: int, ranks: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        "Where in `text` the suffixes with these ranks in a part's order begin."
        return self._first[part] + self._suffixes[part][ranks].astype(np.int64)

    def ranges(
        self, part: int, runs: UInt[np.ndarray, "Q n"]
    ) -> tuple[Int[np.ndarray, "Q"], Int[np.ndarray, "Q"]]:
        "First rank in a part's order, and the one behind the last, of the suffixes that begin with each run."
        wanted, size = as_keys(runs), len(self._suffixes[part])
        rows = sliding_window_view(self.text, runs.shape[1])
        step = max(256, size // max(len(wanted), 1))
        posts = as_keys(rows[self.places(part, np.arange(0, size, step))])  # every so many suffixes

        def bisect(side: str, wanted: np.ndarray) -> np.ndarray:
            behind = np.searchsorted(posts, wanted, side) * step  # the answer lies in the stretch before this post
            low, high = np.maximum(behind - step, 0), np.minimum(behind, size)
            while (open_ := low < high).any():
                middle = np.minimum((low + high) // 2, size - 1)
                keys = as_keys(rows[self.places(part, middle)])
                right = open_ & ((keys < wanted) if side == "left" else (keys <= wanted))
                low, high = np.where(right, middle + 1, low), np.where(open_ & ~right, middle, high)
            return low

        low = bisect("left", wanted)
        high = low.copy()
        there = as_keys(rows[self.places(part, np.minimum(low, size - 1))]) == wanted
        found = np.flatnonzero(there)
        high[found] = bisect("right", wanted[found])
        return low, high

    def counts(self, sample: Sequence[int], n: int) -> Int[np.ndarray, "T-n+1"]:
        "How often each run of n tokens of a sample stands in the corpus. ValueError unless n is 1 to 64."
        if not 1 <= n <= LONGEST:
            raise ValueError(f"runs of {n} tokens: expected 1 to {LONGEST}")
        ids = stored_ids(sample, self.header["vocab_size"], "sample")
        if len(ids) < n:
            return np.zeros(0, np.int64)
        ranges = (self.ranges(part, sliding_window_view(ids, n)) for part in range(len(self._suffixes)))
        return sum(high - low for low, high in ranges)


def as_keys(rows: np.ndarray) -> np.ndarray:
    "Rows of ids as one string of bytes each, in the order of which the suffixes are sorted. (N n) → (N)"
    rows = np.ascontiguousarray(rows)
    return rows.view(f"S{rows.shape[1] * rows.itemsize}")[:, 0]

# %%
words = mini.tokenizer()
texts = ["The cat of Ann sleeps in the house.", "The dog of Ben sleeps in the kennel.", "Ann likes the cat of Ben."]
index = build_index([words.encode(text) for text in texts], vocab_size=words.vocab_size)
for text in ("sleeps in the", "the cat of", "The cat of Ben sleeps"):
    ids = words.encode(text)
    print(f"{text!r}: {index.counts(ids, len(ids))[0]} times")

# %% [markdown]
# ### Spans
#
# From each place where ten tokens of a sample stand, a span goes on token by token, for all places at once. Two remarks
# save work and change nothing.
#
# A place where the token before agrees as well needs no look: the span from there is contained in the one that begins a
# token earlier. So a long copy costs one span, not one for each of its tokens.
#
# A line that stands in the corpus a million times, a licence or the frame of a prompt, has a million places, and
# thousands of samples may begin with it. To go on from all places for each sample would take hours. But a place that
# reaches T tokens further with four differences must agree in one of any five of these tokens. So only those places
# are looked at that agree in one of the five rarest.

# %%
#| default_exp contamination

# %%
#| export
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from llama2lib.corpus import records
from llama2lib.launch import one_line_errors
from llama2lib.recipes import write_atomic
from llama2lib.shards import Shards
from llama2lib.suffix_index import CorpusIndex, as_keys, build_index, stored_ids
from llama2lib.tokenizer import Tokenizer

EXACT = 10  # tokens at the beginning of a span that may not differ
FREQUENT, BEGINS = 1024, 32  # from more places and begins of one run on, only the places that can matter are looked at


def spans(
    samples: Sequence[Sequence[int]], index: CorpusIndex, skip_budget: int = 4
) -> list[Int[np.ndarray, "T"]]:
    """For each token of each sample the length of the longest matched span that begins there; 0 where none does.

    A span may be left out where a longer one contains it. ValueError: ids that are not in the index's vocabulary, or a
    negative budget.
    """
    if skip_budget < 0:
        raise ValueError(f"skip_budget {skip_budget}: expected 0 or more")
    vocab_size = index.header["vocab_size"]
    ids = [stored_ids(sample, vocab_size, f"sample {number}") for number, sample in enumerate(samples)]
    batches, found = _chunks(np.array([len(sample) for sample in ids], int), np.ones(len(ids), bool), 2**18), []
    for batch in tqdm(batches, desc="matching", unit=" batches") if len(batches) > 1 else batches:
        found += _spans([ids[number] for number in batch], index, skip_budget)
    return found


def _chunks(counts: np.ndarray, chosen: np.ndarray, size: int) -> list[np.ndarray]:
    "The chosen numbers, in lists whose counts add up to about `size`."
    numbers = np.flatnonzero(chosen)
    cuts = np.flatnonzero(np.diff(np.cumsum(counts[numbers]) // size)) + 1
    return [part for part in np.split(numbers, cuts) if len(part)]


def _spans(samples: list[np.ndarray], index: CorpusIndex, budget: int) -> list[np.ndarray]:
    "`spans` of some samples that are looked up together."
    ids, ends = np.concatenate(samples), np.cumsum([len(sample) for sample in samples])
    lengths, last = np.zeros(len(ids), np.int64), np.repeat(ends, np.diff(ends, prepend=0))
    begins = np.flatnonzero(np.arange(len(ids)) + EXACT <= last)
    if not len(begins):
        return np.split(lengths, ends[:-1])
    inner = np.ones(len(ids) + 1, bool)
    inner[[0, *ends]] = False
    before = np.where(inner[begins], ids[begins - 1].astype(np.int64), -1)  # what stands before a run in its sample
    runs = sliding_window_view(ids, EXACT)[begins]
    _, firsts, which = np.unique(as_keys(runs), return_index=True, return_inverse=True)
    for part in range(len(index.header["parts"])):
        low, high = (bound[which] for bound in index.ranges(part, runs[firsts]))
        counts = high - low
        many = counts > FREQUENT
        for chosen in _chunks(counts, ~many & (counts > 0), 2**20):
            run = np.repeat(chosen, counts[chosen])
            within = np.arange(len(run)) - np.repeat(np.cumsum(counts[chosen]), counts[chosen])
            places = index.places(part, high[run] + within)
            new = index.text[places - 1] != before[run]  # else the span one token to the left is longer
            places, begin = places[new], begins[run[new]]
            reach = _reach(index, places + EXACT, ids, begin + EXACT, last[begin], budget)
            np.maximum.at(lengths, begin, EXACT + reach)
        for run in np.unique(which[many]):
            same = np.flatnonzero(many & (which == run))
            begin, end = begins[same], high[same[0]]
            for start in range(low[same[0]], end, 2**18):
                places = index.places(part, np.arange(start, min(start + 2**18, end)))
                found = _frequent(index, places, before[same], ids, begin, last[begin], budget)
                lengths[begin] = np.maximum(lengths[begin], found)
    return np.split(lengths, ends[:-1])


def _reach(index, places, ids, begin, last, budget) -> np.ndarray:
    """How many tokens each pair of places goes on for, up to the last that agrees before more than `budget` differ.

    places: in the corpus, up to a border; begin: in the samples' ids, up to `last`.
    """
    reach, differ = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
    going, depth = np.flatnonzero(begin < last), 0
    while len(going):
        theirs, ours = index.text[places[going] + depth], ids[begin[going] + depth]
        depth += 1
        reach[going[theirs == ours]] = depth
        differ[going] += theirs != ours
        going = going[(differ[going] <= budget) & (theirs != index.border) & (begin[going] + depth < last[going])]
    return reach


def _frequent(index, places, before, ids, begin, last, budget) -> np.ndarray:
    "Length of the longest span from each of several begins of one run, to any of the run's places."
    lengths, left, hard = np.zeros(len(begin), np.int64), index.text[places - 1], []
    values, of = np.unique(before, return_inverse=True)
    for number, value in enumerate(values):
        rows, new = np.flatnonzero(of == number), places[left != value]
        if len(new) > FREQUENT and len(begin) > BEGINS:
            hard.append(rows)
        elif len(new):
            lengths[rows] = [EXACT + _furthest(index, new, ids, begin[row], last[row], budget) for row in rows]
    if hard:
        rows = np.concatenate(hard)
        lengths[rows] = EXACT + _by_rarest(index, places, ids, begin[rows], last[rows], budget)
    return lengths


def _furthest(index, places, ids, begin, last, budget) -> int:
    "The longest `_reach` behind the run at one begin, over many places."
    best = 0
    for some in np.split(places, range(2**14, len(places), 2**14)):
        one = np.full(len(some), begin + EXACT), np.full(len(some), last)
        best = max(best, int(_reach(index, some + EXACT, ids, *one, budget).max(initial=0)))
        if best == last - begin - EXACT:
            break
    return best


def _by_rarest(index, places, ids, begin, last, budget) -> np.ndarray:
    """`_furthest` of several begins, without going on from every place for each.

    Of any `budget` + 1 tokens among the first T behind the run, a place that reaches T agrees in one at least. So for
    each T, from large to small, only places that agree in one of the rarest of these tokens are looked at, until one
    of them does reach T. A reach of at most `budget` + 1 may differ everywhere but in its last token.
    """
    steps = [step for step in (64, 32, 16, 8) if step > budget + 2] + [budget + 2]
    orders, low, high = [], [], []
    agree, inside = np.zeros(len(begin), np.int64), np.ones(len(places), bool)
    for offset in range(EXACT, EXACT + steps[0]):
        tokens = index.text[np.minimum(places + offset, len(index.text) - 1)]
        ours = ids[np.minimum(begin + offset, last - 1)]
        orders.append(np.argsort(tokens, kind="stable").astype(np.uint32))
        low.append(np.searchsorted(tokens, ours, "left", orders[-1]))
        high.append(np.searchsorted(tokens, ours, "right", orders[-1]))
        if offset <= EXACT + budget:
            agree[np.isin(ours, tokens[inside]) & (begin + offset < last)] = offset + 1 - EXACT
            inside &= tokens != index.border
    low, high, best = np.array(low), np.array(high), np.zeros(len(begin), np.int64)
    for row in range(len(begin)):
        for step in steps:
            if best[row] < step <= last[row] - begin[row] - EXACT:
                rarest = np.argsort((high - low)[:step, row])[: budget + 1]
                near = [orders[offset][low[offset, row] : high[offset, row]] for offset in rarest]
                near = np.unique(np.concatenate(near))
                best[row] = max(best[row], _furthest(index, places[near], ids, begin[row], last[row], budget))
    return np.maximum(best, agree)

# %% [markdown]
# The spans are what takes time. Which tokens they cover, for any L, follows at once.

# %%
#| export
def covered(lengths: Int[np.ndarray, "T"], min_len: int = 10) -> Bool[np.ndarray, "T"]:
    "Whether each token of a sample lies in a span of more than `min_len` tokens; `lengths` as of `spans`."
    begins = np.flatnonzero(lengths > min_len)
    opened = np.bincount(begins, minlength=len(lengths) + 1)
    closed = np.bincount(begins + lengths[begins], minlength=len(lengths) + 1)
    return np.cumsum(opened - closed)[:-1] > 0


def contaminated_tokens(
    sample: Sequence[int], corpus_index: CorpusIndex, min_len: int = 10, skip_budget: int = 4
) -> Bool[np.ndarray, "T"]:
    """Whether each token of a sample is contaminated: lies in a span that the corpus has too (A.6).

    A span has more than `min_len` tokens, pairs them place by place, stays in one document, differs in at most
    `skip_budget` places, in none of its first ten, and not at its end. ValueError: an id that is not in the index's
    vocabulary, or a negative number.
    """
    if min_len < 0:
        raise ValueError(f"min_len {min_len}: expected 0 or more")
    mask = covered(spans([sample], corpus_index, skip_budget)[0], min_len)
    if min_len + 1 < EXACT:  # spans of fewer than ten tokens, all equal
        found = corpus_index.counts(sample, min_len + 1) > 0
        mask |= covered(np.pad(found * (min_len + 1), (0, len(mask) - len(found))), min_len)
    return mask

# %% [markdown]
# Letter and program agree on a few hundred small cases, of copies with changes.

# %%
random = np.random.default_rng(0)
for _ in range(by_scale(smoke=30, laptop=300, a100=300)):
    sample = random.integers(0, random.choice([2, 4, 50]), random.integers(1, 60))
    copy = np.where(random.random(len(sample)) < random.choice([0, 0.05, 0.15]), random.integers(0, 50), sample)
    documents = [[1, 2, *copy[random.integers(len(copy)) :], 3], [*copy[: random.integers(1, 40)], 0, 1], [2, 3]]
    budget, min_len = int(random.choice([0, 1, 4])), int(random.choice([5, 10, 20]))
    found = contaminated_tokens(sample, build_index(documents, vocab_size=50), min_len, budget)
    assert found.tolist() == by_the_letter(sample.tolist(), documents, min_len, budget)

# %% [markdown]
# ### Planted leaks
#
# Now the corpus is a mini world, documents of a few sentences. As samples we take texts that it cannot have by chance:
# sixty tokens of a document's words in random order. A copy of each is planted, with zero to six tokens changed, in
# places that we know.
#
# > Ours: beside the method, what the earlier ones say. GPT-3's (Brown et al. 2020) calls a sample contaminated if one
# > run of 13 words collides, PaLM's (Chowdhery et al. 2022) if 70 % of its runs of 8 do. Both compare words of cleaned
# > text; here they are given tokens, as ours is.

# %%
#| export
def collides(sample: Sequence[int], index: CorpusIndex, n: int = 13) -> bool:
    "Whether the corpus has any run of n tokens of a sample (GPT-3's rule, there of words)."
    return bool((index.counts(sample, n) > 0).any())


def mostly_known(sample: Sequence[int], index: CorpusIndex, n: int = 8, share: float = 0.7) -> bool:
    "Whether the corpus has so large a share of a sample's runs of n tokens (PaLM's rule, there of words)."
    found = index.counts(sample, n) > 0
    return bool(len(found) and found.mean() >= share)

# %%
from llama2lib.synthetic import documents

random = np.random.default_rng(1)
world = [words.encode(text) for text in documents(random, by_scale(smoke=500, laptop=20_000, a100=20_000))]
changes = [number % 7 for number in range(by_scale(smoke=70, laptop=700, a100=700))]
pool = np.concatenate(world)
samples = [random.permutation(random.choice(pool, 60)) for _ in changes]
copies = []
for sample, number in zip(samples, changes, strict=True):
    copy = sample.copy()
    places = random.choice(60, number, replace=False)
    copy[places] = (copy[places] + random.integers(1, words.vocab_size, number)) % words.vocab_size
    copies.append(copy)
places = random.integers(0, len(world), len(copies))
leaky = [[*document] for document in world]
for copy, place in zip(copies, places, strict=True):
    leaky[place] = [*leaky[place], *copy]
clean, leaked = (build_index(corpus, vocab_size=words.vocab_size) for corpus in (world, leaky))
assert not any(covered(lengths).any() for lengths in spans(samples, clean))
masks = [covered(lengths) for lengths in spans(samples, leaked)]
for sample, copy, mask in zip(samples, copies, masks, strict=True):
    assert mask.tolist() == by_the_letter(sample.tolist(), [copy.tolist()])
print(f"{len(samples)} leaks among {len(leaked):,} tokens: every token found that should be, and no other")

# %% [markdown]
# What the definition asks for is found, token by token. What that is, depends on where the changes are: copies with
# many have stretches of fewer than eleven tokens without one.

# %%
rules = {"contaminated tokens (A.6)": [mask.mean() for mask in masks],
         "samples, 13 tokens collide (GPT-3)": [collides(sample, leaked) for sample in samples],
         "samples, 70 % of 8-grams (PaLM)": [mostly_known(sample, leaked) for sample in samples]}  # fmt: skip
by_changes = {rule: [100 * float(np.mean(found[number::7])) for number in range(7)] for rule, found in rules.items()}
fig, ax = plt.subplots()
for (rule, values), style in zip(by_changes.items(), ("C3o-", "C0s--", "C2^:"), strict=True):
    ax.plot(range(7), values, style, label=rule)
ax.set(xlabel="tokens of 60 that the planted copy has changed", ylabel="found (%)", ylim=(0, 105),
       title="Four changes leave most tokens found, and PaLM's rule blind")  # fmt: skip
ax.legend()
plots.save(fig, "09_contamination_changes.png")
for rule, values in by_changes.items():
    print(f"{rule:36}", " ".join(f"{value:5.1f}" for value in values))

# %% [markdown]
# ### Does it help the score?
#
# That a sample stands in the training data does not say that the model profits. The *clean* samples, under 20 %
# contaminated, may be harder than others for any other reason. So the paper asks for two things at once: the cleanest
# samples score worse than the rest, and the dirtiest better. Four subsets that overlap: clean (under 20 %), *not
# clean*, *not dirty* (under 80 %), and *dirty*. For each, of size n and with the mean X̄,
#
# $$Z_n = \frac{\bar{X} - \mu_n}{\sigma_n}.$$
#
# μ and σ belong to the means of samples of size n. A data set is affected if |Z| > 2 in all four subsets.
#
# > Ours: how μ and σ were found is not said. We take the mean over all samples, and the deviation of a single score
# > over √n. For scores of 0 and 1 with mean p this is √(p (1 − p) / n). And the signs have to be right: a data set
# > whose clean samples are better is not affected.

# %%
#| export
CLEAN, DIRTY = 0.2, 0.8  # share of a sample's tokens: below and from this on
LENGTHS = (10, 20, 30, 40, 50)  # minimum lengths L to try
SIGNIFICANT = 2  # |Z|
BETTER = {"clean": False, "not clean": True, "not dirty": False, "dirty": True}  # if contamination helps


class Subset(NamedTuple):
    "A row of Table 51."

    contaminated: float  # mean share of contaminated tokens, 0..1
    n: int
    score: float
    mu: float
    z: float


def z_score(score: float, mu: float, deviation: float, n: int) -> float:
    "How many standard errors the mean of n scores lies above mu; `deviation` is that of one score. 0 without any."
    return (score - mu) / (deviation / n**0.5) if deviation and n else 0.0


def subsets(shares: Float[np.ndarray, "N"], scores: Float[np.ndarray, "N"]) -> dict[str, Subset]:
    """The four subsets of A.6 by each sample's share of contaminated tokens, 0..1; scores in any unit.

    An empty subset has a score of NaN and Z = 0. ValueError: unequal lengths, no samples, or numbers that are not
    finite.
    """
    shares, scores = np.asarray(shares, float), np.asarray(scores, float)
    if shares.shape != scores.shape or shares.ndim != 1 or not len(shares):
        raise ValueError(f"shares {shares.shape} and scores {scores.shape}: expected two lists, one number per sample")
    if not (np.isfinite(scores).all() and ((shares >= 0) & (shares <= 1)).all()):
        raise ValueError("expected shares from 0 to 1, and scores that are finite")
    members = {"clean": shares < CLEAN, "not clean": shares >= CLEAN,
               "not dirty": shares < DIRTY, "dirty": shares >= DIRTY}  # fmt: skip
    mu, deviation, table = float(scores.mean()), float(scores.std()), {}
    for name, chosen in members.items():
        n = int(chosen.sum())
        share, score = (float(x[chosen].mean()) if n else float("nan") for x in (shares, scores))
        table[name] = Subset(share, n, score, mu, z_score(score, mu, deviation, n))
    return table


def affected(z: Mapping[str, float]) -> bool:
    "Whether the Z of all four subsets are beyond 2, the clean ones below and the dirty ones above."
    return all((z[name] if better else -z[name]) > SIGNIFICANT for name, better in BETTER.items())

# %% [markdown]
# Five samples by hand. Of the deviation there is one way to say it: the scores' own.

# %%
table = subsets(np.array([0, 0.1, 0.2, 0.5, 0.8]), np.array([0, 0, 1, 1, 1]))
for name, row in table.items():
    print(f"{name:9} n {row.n}, mean {row.score:.2f} of {row.mu:.2f}, Z {row.z:+.2f}")
assert [row.n for row in table.values()] == [2, 3, 4, 1]
assert np.isclose(table["clean"].z, (0 - 0.6) / (0.6 * 0.4 / 2) ** 0.5)

# %% [markdown]
# ### Table 51
#
# The table prints the three data sets that the authors found affected, with L, size, mean and Z of each subset. From
# score, μ and n every Z should come back, up to the rounding of the scores.

# %%
printed = PAPER["Table 51"]
names = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in printed))
tables = {name: {subset: printed[f"{name}, {subset}"] for subset in BETTER} for name in names}
for name, rows in tables.items():
    ours = {}
    for subset, row in rows.items():
        p = row["mu"] / 100
        ours[subset] = round(z_score(row["score"], row["mu"], 100 * (p * (1 - p)) ** 0.5, row["n"]), 2)
    verdict = ledger.record("Table 51", f"{name}: Z of the four subsets", "= paper ± 0.15",
                            {subset: row["z"] for subset, row in rows.items()}, ours, evidence=FILE)  # fmt: skip
    print(f"{name:20}", " ".join(f"{z:6.2f} ({rows[subset]['z']:5.2f})" for subset, z in ours.items()),
          verdict["status"])  # fmt: skip

# %% [markdown]
# They do. So σ was that of drawing with replacement. Without, the two halves of a data set would say one thing twice:
# where the clean half is worse by so much, the other half must be better by as much times the ratio of their sizes, and
# the two Z would be equal but for the sign. Printed are −5.73 and 9.56. The four conditions are thus two, and each is
# asked twice, with an error that is too large for the larger half.

# %%
for name, rows in tables.items():
    whole = rows["clean"]["n"] + rows["not clean"]["n"]
    exact = {subset: row["z"] * ((whole - 1) / (whole - row["n"])) ** 0.5 for subset, row in rows.items()}
    print(f"{name:20}", " ".join(f"{subset} {z:6.1f}" for subset, z in exact.items()))

# %% [markdown]
# The rest of the table holds together as well. Both ways to divide a data set give its size, its mean score, and its
# mean contamination.

# %%
def both_ways(rows: dict, column: str) -> list[float]:
    "The mean of a column over the whole data set, from clean and not clean, and from not dirty and dirty."
    halves = (rows["clean"], rows["not clean"]), (rows["not dirty"], rows["dirty"])
    return [round(sum(row["n"] * row[column] for row in pair) / sum(row["n"] for row in pair), 2) for pair in halves]


sizes = {name: [rows["clean"]["n"] + rows["not clean"]["n"], rows["not dirty"]["n"] + rows["dirty"]["n"]]
         for name, rows in tables.items()}  # fmt: skip
pooled = {name: both_ways(rows, "score") for name, rows in tables.items()}
shares = {name: both_ways(rows, "contaminated") for name, rows in tables.items()}
means = {name: [rows["clean"]["mu"], rows["dirty"]["mu"]] for name, rows in tables.items()}
for claim, criterion, paper, ours in (
    ("not dirty and dirty are as many samples as clean and not clean", "= paper",
     {name: one for name, (one, _) in sizes.items()}, {name: other for name, (_, other) in sizes.items()}),
    ("mean of both halves, weighted, is μ", "= paper ± 0.1", means, pooled),
    ("mean contamination, from either pair of halves (%)", "= paper ± 0.05",
     {name: one for name, (one, _) in shares.items()}, {name: other for name, (_, other) in shares.items()}),
):  # fmt: skip
    row = ledger.record("Table 51", claim, criterion, paper, ours, evidence=FILE)
    print(f"{claim}: {row['status']}\n   ", ours)

# %% [markdown]
# Who is affected, by the rule of four? All pass but one. MMLU-Overall of the 70B model has Z = −2.00 for its clean
# samples, which is not beyond 2. The text says so much: the effect is there, but small, 0.9 points.

# %%
for name, rows in tables.items():
    z = {subset: row["z"] for subset, row in rows.items()}
    found = "yes" if affected(z) else "no"
    row = ledger.record("Table 51", f"{name}: beyond 2 in all four subsets", "= paper", "yes", found, evidence=FILE)
    print(f"{name}: {found}, {row['status']}")
rows = tables["MMLU-Overall, 70B"]
_ = ledger.record("Table 51", "MMLU-Overall, 70B: clean samples minus mean (points)", "= paper", A6["overall_delta"],
                  round(rows["clean"]["score"] - rows["clean"]["mu"], 1), evidence=FILE)  # fmt: skip

# %% [markdown]
# The 70B model is said to gain more than the 7B. On MMLU-Humanities it does. On HellaSwag its Z are larger, but its
# gain is smaller: a Z also grows when scores vary less, as those near 100 % do. Seen from the errors that remain, the
# 70B model gains more again.

# %%
gains, fewer = {}, {}
for dataset in ("HellaSwag", "MMLU-Humanities"):
    for size in ("7B", "70B"):
        row = tables[f"{dataset}, {size}"]["dirty"]
        gains[dataset, size] = round(row["score"] - row["mu"], 1)
        fewer[dataset, size] = round(100 * gains[dataset, size] / (100 - row["mu"]))
    print(f"{dataset}: dirty minus mean, 7B {gains[dataset, '7B']:+.1f}, 70B {gains[dataset, '70B']:+.1f} points; "
          f"{fewer[dataset, '7B']} and {fewer[dataset, '70B']} % of the errors")  # fmt: skip
    more = "yes" if gains[dataset, "70B"] > gains[dataset, "7B"] else "no"
    ledger.record("Table 51", f"{dataset}: 70B gains more than 7B on dirty samples, in points", "= paper", "yes", more,
                  evidence=FILE)  # fmt: skip

# %% [markdown]
# ### Fragments
#
# A long sample can be covered by many short spans from many documents, none of which the model could have learnt it
# from. So the paper repeats all for L = 10, 20, 30, 40 and 50, and reports the largest L at which a data set is still
# affected: 40 for HellaSwag, 50 for MMLU.

# %%
#| export
def sweep(
    lengths: Sequence[Int[np.ndarray, "T"]], scores: Float[np.ndarray, "N"], min_lens: Sequence[int] = LENGTHS
) -> dict[int, dict[str, Subset]]:
    "The four subsets for each minimum length; `lengths` of each sample as of `spans`. ValueError as of `subsets`."
    return {min_len: subsets([covered(one, min_len).mean() for one in lengths], scores) for min_len in min_lens}


def largest_affected(tables: Mapping[int, Mapping[str, Subset]]) -> int | None:
    "The largest minimum length of a `sweep` at which the data set is affected; None where it is at none."
    hit = [min_len for min_len, rows in tables.items() if affected({name: row.z for name, row in rows.items()})]
    return max(hit, default=None)

# %% [markdown]
# The mini world shows why. Its documents are made of a few hundred sentences. Texts of four new documents, drawn by
# another seed, are for L = 10 mostly contaminated, and for L = 50 hardly at all.

# %%
from llama2lib.contamination import covered, largest_affected, spans, subsets, sweep
from llama2lib.suffix_index import build_index

fresh = documents(np.random.default_rng(2), by_scale(smoke=80, laptop=2000, a100=2000))
fresh = [words.encode(" ".join(fresh[first : first + 4])) for first in range(0, len(fresh), 4)]
found = spans(fresh, clean)
for min_len in A6["lengths"]:
    shares = np.array([covered(one, min_len).mean() for one in found])
    print(f"L = {min_len}: {shares.mean():4.0%} of the tokens; clean {(shares < 0.2).mean():4.0%}, "
          f"dirty {(shares >= 0.8).mean():4.0%} of the samples")  # fmt: skip

# %% [markdown]
# ### A model that has seen its benchmark
#
# Does Z find what it is meant to find? A mini model can be shown its benchmark, and another not.
#
# The benchmark is made like HellaSwag: a context of three documents, and four documents of which one came next. Which,
# nobody can know who has not read it. The model chooses the one whose tokens are likeliest in the mean. Of the samples,
# a quarter is leaked as they are, a sixth with three tokens changed, a sixth without their ending, and the rest not.
# The leaks go among as many tokens of new documents, and the base model of chapter 03 goes on to train on both, six
# times over. The control is the base model itself. The corpus is all that the trained model has read, pretraining
# included.
#
# The criterion, before the run: on the samples that are dirty at L = 50 the trained model is better than the control,
# with an interval above 0, and with every seed. Whether each is affected by the rule of four is shown beside it. Rate,
# batch, passes and number of samples were set on seed 0, after a first try, with a third of the rate, twice the batch,
# five passes and 240 samples, had left no trace of the leaks in the scores: to have been read is not to be remembered.

# %%
import torch
from torch.nn.functional import cross_entropy


def hellaswag(seed: int, size: int) -> tuple[list, list]:
    "Samples of the mini world: contexts as tokens, and four endings each, the right one first."
    texts = documents(np.random.default_rng([9, seed]), 7 * size)
    ids = [mini.tokenizer().encode(text) for text in texts]
    groups = [ids[first : first + 7] for first in range(0, 7 * size, 7)]
    return [list(chain(*group[:3])) for group in groups], [group[3:] for group in groups]


def leaks(random: np.random.Generator, contexts: list, endings: list) -> list:
    "What of the samples goes into the training data: of 24 in turn 6 whole, 4 changed, 4 without their ending."
    found = []
    for number, (context, (right, *_)) in enumerate(zip(contexts, endings, strict=True)):
        kind = number % 24
        if kind < 6:
            found.append(context + right)
        elif kind < 10:
            copy = np.array(context + right)
            copy[random.choice(len(copy), 3, replace=False)] = random.integers(4, mini.VOCABULARY, 3)
            found.append(copy.tolist())
        elif kind < 14:
            found.append(context)
    return found


def chosen_right(model, contexts: list, endings: list) -> np.ndarray:
    "1 where the right ending has the highest mean log-probability of the four, else 0."
    model.eval()
    scores = []
    for context, options in zip(contexts, endings, strict=True):
        rows = [[mini.tokenizer().bos_id, *context, *option] for option in options]
        width = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        with torch.no_grad():
            loss = cross_entropy(model(tokens[:, :-1]).transpose(1, 2), tokens[:, 1:], reduction="none")
        means = [loss[row, len(context) : len(context) + len(option)].mean() for row, option in enumerate(options)]
        scores.append(float(np.argmin(means) == 0))
    return np.array(scores)


def seen(inputs: dict) -> dict:
    "Scores of a model that saw the leaks and of one that did not, and each sample's shares by L; `inputs`: seed, …"
    from llama2lib.pretrain import pretrain

    seed, words, random = inputs["seed"], mini.tokenizer(), np.random.default_rng([10, inputs["seed"]])
    contexts, endings = hellaswag(seed, inputs["samples"])
    leaked = leaks(random, contexts, endings)
    other = [words.encode(text) for text in documents(random, round(sum(map(len, leaked)) / 25))]
    read = [[*document] for document in [*leaked, *other]]
    random.shuffle(read)
    stream = np.concatenate([[words.bos_id, *document, words.eos_id] for document in read]).astype(np.uint16)
    recipe = replace(mini.BASE, lr=inputs["lr"], batch_tokens=inputs["batch"], warmup_steps=10)
    recipe = replace(recipe, tokens=inputs["passes"] * len(stream))
    control, trained = mini.base(seed), mini.base(seed)
    mini.watched(pretrain(trained, stream, recipe, seed), recipe.steps, "reading the benchmark")
    pretraining = documents(np.random.default_rng([1, seed]), inputs["documents"])  # what the base model read
    corpus = [words.encode(text) for text in pretraining] + read
    samples = [context + options[0] for context, options in zip(contexts, endings, strict=True)]
    lengths = spans(samples, build_index(corpus, vocab_size=words.vocab_size))
    return {
        "trained": chosen_right(trained, contexts, endings), "control": chosen_right(control, contexts, endings),
        "shares": {str(n): np.array([covered(one, n).mean() for one in lengths]) for n in inputs["lengths"]},
    }  # fmt: skip


inputs = {"samples": by_scale(smoke=24, laptop=192, a100=192), "passes": 6, "lr": 3e-3, "batch": 512,
          "documents": mini.TEXTS, "lengths": list(A6["lengths"])}  # fmt: skip
outcomes = {seed: cached(f"contamination-seen-seed{seed}", inputs | {"seed": seed}, seen) for seed in runs}

# %%
verdicts = {}
for seed, outcome in outcomes.items():
    for name in ("trained", "control"):
        tables = {int(n): subsets(shares, outcome[name]) for n, shares in outcome["shares"].items()}
        verdicts[name, seed] = tables
        rows = tables[50]
        print(f"seed {seed}, {name}: mean {rows['clean'].mu:.2f}; at L = 50 "
              + ", ".join(f"{subset} {row.score:.2f} (n {row.n}, Z {row.z:+.1f})" for subset, row in rows.items())
              + f"; affected up to L = {largest_affected(tables)}")  # fmt: skip

# %%
styles = {"clean": "C0o-", "not dirty": "C0o--", "not clean": "C1s--", "dirty": "C1s-"}
fig, axes = plt.subplots(1, 2, figsize=(8.4, 3.4), sharey=True)
for ax, name, title in zip(axes, ("trained", "control"), ("the model has seen leaks", "it has not"), strict=True):
    for subset, style in styles.items():
        z = [np.mean([verdicts[name, seed][n][subset].z for seed in runs]) for n in A6["lengths"]]
        ax.plot(A6["lengths"], z, style, label=subset)
    ax.axhspan(-2, 2, color="0.9", zorder=0)
    ax.set(xlabel="minimum length L (tokens)", xticks=A6["lengths"], title=title)
axes[0].set(ylabel="Z, mean of the seeds")
axes[0].legend(ncols=2)
fig.suptitle("From L = 30 on all four Z find the leaks, and none where there are none")
plots.save(fig, "09_contamination_z.png")

# %% [markdown]
# A model that has seen its benchmark is found out, up to L = 50, and one that has not is left in peace at every L. At
# L = 10 nearly every sample is made of fragments that stand somewhere, none is clean, and nothing can be said. Only
# spans longer than a few sentences tell a leak from the language: that is what the larger L are for.

# %%
if scale() != "smoke":
    dirty = {seed: outcome["shares"]["50"] >= 0.8 for seed, outcome in outcomes.items()}
    hellaswag_70b = PAPER["Table 51"]["HellaSwag, 70B, dirty"]
    claims.compare("Table 51", "score on dirty samples, of a model that saw them minus one that did not", "> 0",
                   [100 * outcomes[seed]["trained"][dirty[seed]] for seed in runs],
                   [100 * outcomes[seed]["control"][dirty[seed]] for seed in runs],
                   round(hellaswag_70b["score"] - hellaswag_70b["mu"], 1), seeds=runs,
                   evidence="figures/09_contamination_z.png")  # fmt: skip
    found = {f"{name} {seed}": largest_affected(tables) for (name, seed), tables in verdicts.items()}
    ledger.record("Table 51", "largest L at which a mini model is affected that saw its benchmark, or did not",
                  "illustrated", {"HellaSwag": 40, "MMLU": 50}, found,
                  evidence="figures/09_contamination_z.png")  # fmt: skip

# %% [markdown]
# ### Time and memory
#
# The paper needed about seven hours on some 1,500 cores for the whole corpus, the time to tokenise included. What one
# core needs for a corpus of tokens, sorted and searched for 5,000 samples of 200 tokens, `cost` measures.
#
# > Ours: the corpus is made up, tokens drawn by Zipf's law, every tenth document a copy of another. Half of the samples
# > are pieces of it with three tokens changed. A process of its own runs each size, so that its peak of memory is seen;
# > what it has mapped of its files counts there too. Seconds are of the processor, since other programs may run beside.

# %%
#| export
def peak_memory() -> int:
    "Bytes of memory that this process had at the most, on Unix; what its parent had does not count."
    try:  # of Linux, where `getrusage` begins with the peak of the process that started this one
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))[1]) * 1024
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def cost(tokens: int, samples: int = 5000) -> dict[str, float]:
    """Seconds and memory (GB) of a made-up corpus of so many tokens, and of samples of 200; on Unix.

    The keys are 'index' and 'match', in seconds of the processor, 'wall', in seconds, and 'peak', of this process.
    ValueError where the copies are not found, or other samples are.
    """
    import time

    random, size = np.random.default_rng(0), 500
    often = np.cumsum(1 / np.arange(1, 32_000 - 2))
    corpus: list[np.ndarray] = []
    for _ in range(0, tokens // size, 4000):
        drawn = np.searchsorted(often, random.random((min(4000, tokens // size - len(corpus)), size)) * often[-1])
        corpus += [*(drawn + 3).astype(np.uint16)]
    for place in range(9, len(corpus), 10):
        corpus[place] = corpus[random.integers(len(corpus))]
    asked = []
    for number in range(samples):
        sample = corpus[random.integers(len(corpus))][100:300].copy() if number % 2 else random.integers(3, 32_000, 200)
        sample[random.integers(0, 200, 3)] = 3
        asked.append(sample)
    with tempfile.TemporaryDirectory() as folder:
        start, began = time.perf_counter(), time.process_time()
        index = build_index(corpus, Path(folder) / "index", 32_000)
        built = time.process_time()
        found = spans(asked, index)
        ended, wall = time.process_time(), time.perf_counter() - start
    shares = np.array([covered(lengths).mean() for lengths in found])
    if shares[1::2].mean() < 0.9 or shares[::2].mean() > 0.1:
        raise ValueError(f"{shares[1::2].mean():.0%} of the copies found, and {shares[::2].mean():.0%} of the others")
    return {"index": built - began, "match": ended - built, "wall": wall, "peak": peak_memory() / 1e9}

# %%
from llama2lib.contamination import cost


def measured(inputs: dict) -> dict:
    "`cost` in a process of its own; `inputs`: tokens, samples."
    task = f"cost({inputs['tokens']}, {inputs['samples']})"
    code = f"import json; from {cost.__module__} import cost; print(json.dumps({task}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(ran.stderr.strip().splitlines()[-1])
    return json.loads(ran.stdout)


megabytes = by_scale(smoke=[0.25, 0.5, 1], laptop=[25, 50, 100], a100=[25, 50, 100])
asked = by_scale(smoke=100, laptop=5000, a100=5000)
costs = [cached(f"contamination-cost-{size}MB", {"tokens": int(size * 5e5), "samples": asked}, measured)
         for size in megabytes]  # fmt: skip
slope, constant = np.polyfit(megabytes, [row["index"] for row in costs], 1)
for size, row in zip(megabytes, costs, strict=True):
    print(f"{size:6} MB: sorted in {row['index']:5.1f} s, searched in {row['match']:4.1f} s of the processor, "
          f"{row['wall']:.0f} s by the clock beside other programs, {row['peak']:.2f} GB")  # fmt: skip

fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2))
left.plot(megabytes, [row["index"] for row in costs], "o", color=plots.COLORS["ours"], label="sort the corpus")
left.plot(megabytes, [constant + slope * size for size in megabytes], color=plots.COLORS["ours"], linewidth=1)
left.plot(megabytes, [row["match"] for row in costs], "s--", color="C0", label=f"search it for {asked:,} samples")
right.plot(megabytes, [row["peak"] for row in costs], "o-", color=plots.COLORS["ours"])
left.set(xlabel="tokens of the corpus (MB)", ylabel="processor time (s)", ylim=(0, None),
         title="Sorting takes linear time")  # fmt: skip
right.set(xlabel="tokens of the corpus (MB)", ylabel="peak of memory (GB)", ylim=(0, 1.2 * costs[-1]["peak"]),
          title="Memory grows more slowly than the corpus")  # fmt: skip
left.legend()
plots.save(fig, "09_contamination_cost.png")

# %% [markdown]
# What would the whole corpus take at this rate? Two trillion tokens of two bytes are four terabytes.

# %%
hours = 4e6 * slope / 3600
print(f"{hours:,.0f} hours of one core to sort it; the paper's {A6['hours']} hours of {A6['cores']:,} cores "
      f"are {A6['hours'] * A6['cores']:,}, with tokenising and searching")  # fmt: skip
if scale() != "smoke":
    ledger.record("Section A.6", "core hours for two trillion tokens (ours: to sort them, from a linear fit)",
                  "illustrated", A6["hours"] * A6["cores"], round(hours), evidence="figures/09_contamination_cost.png")
ledger.record("Section A.6", "contamination of the whole corpus", "runs at scale", None, None,
              evidence="tests/test_contamination.py::test_the_command_writes_shares_and_goes_on_after_a_kill")

# %% [markdown]
# ### From the command line
#
# `python -m llama2lib.contamination --data SHARDS --samples FILE` looks for the samples of a file in a folder of token
# shards, made as in chapter 02. A sample is a line of JSON: `text`, written out as the model is given it, or `tokens`,
# and `score` if the model was scored on it. The shares of each sample are written beside the file; the subsets are
# printed. The index is kept for other samples.

# %%
#| export
@dataclass(frozen=True)
class ContaminationConfig:
    "Which tokens of samples stand in a training corpus, and whether that helps the scores (A.6)."

    data: Path  # token shards of the corpus, made by python -m llama2lib.shards
    samples: Path  # JSON lines with `text` or `tokens`, and `score` in all or in none
    index: Path | None = None  # folder of the sorted corpus, made if it is not there; none: `index` in the data's
    tokenizer: Path | None = None  # for `text`; none: the one that the shards were made with, beside them
    out: Path | None = None  # shares of each sample by minimum length, JSON lines; none: beside the samples
    min_lens: tuple[int, ...] = LENGTHS  # a span has more tokens than that
    skip_budget: int = 4  # places in which a span may differ
    part_tokens: int = 2**25  # of the corpus that are sorted at once, in about ten bytes of memory each byte

    def __post_init__(self):
        if not self.min_lens or min(self.min_lens) < EXACT - 1:
            raise ValueError(f"min_lens {self.min_lens}: expected lengths of {EXACT - 1} or more")


def read_samples(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[list, np.ndarray | None]:
    "The tokens of each sample of a file, and their scores, if it has them. ValueError with file and line."
    samples, scores = [], []
    for number, row in records(path):
        where = f"{path}:{number}"
        if not isinstance(row, dict) or ("text" in row) == ("tokens" in row):
            raise ValueError(f"{where}: expected an object with either 'text' or 'tokens'")
        if "text" in row and tokenizer is None:
            raise ValueError(f"{where}: 'text' needs a tokenizer; name one with --tokenizer")
        if not isinstance(row.get("text", ""), str):
            raise ValueError(f"{where}: expected 'text' to be a string, found {row['text']!r}")
        samples.append(stored_ids(tokenizer.encode(row["text"]) if "text" in row else row["tokens"], vocab_size, where))
        if not len(samples[-1]):
            raise ValueError(f"{where}: a sample without tokens")
        score = row.get("score")
        if score is not None and (type(score) not in (int, float) or not np.isfinite(score)):
            raise ValueError(f"{where}: expected 'score' to be a number, found {score!r}")
        if scores and (score is None) != (scores[-1] is None):
            raise ValueError(f"{where}: expected a 'score' in every line or in none")
        scores.append(score)
    if not samples:
        raise ValueError(f"{path}: no samples")
    return samples, None if scores[0] is None else np.array(scores, float)


def run(config: ContaminationConfig) -> dict[int, dict[str, Subset]]:
    "Do as `config` says; the subsets by minimum length, with scores of 0 where the file has none."
    shards = Shards(config.data)
    model = config.tokenizer or config.data / "tokenizer.model"
    tokenizer = Tokenizer(model) if config.tokenizer or model.exists() else None
    if tokenizer is not None:
        Shards(config.data, tokenizer)  # ValueError for another one than made them
    samples, scores = read_samples(config.samples, tokenizer, shards.header["vocab_size"])
    index = build_index(shards, config.index or config.data / "index", part_tokens=config.part_tokens)
    lengths = spans(samples, index, config.skip_budget)
    out, lines = config.out or config.samples.with_suffix(".contamination.jsonl"), []
    for number, one in enumerate(lengths):
        row = {"tokens": len(one)} | ({} if scores is None else {"score": scores[number]})
        row["contaminated"] = {min_len: float(covered(one, min_len).mean()) for min_len in config.min_lens}
        lines.append(json.dumps(row) + "\n")
    write_atomic(out, "".join(lines))
    tables = sweep(lengths, np.zeros(len(lengths)) if scores is None else scores, config.min_lens)
    print(f"{len(samples):,} samples in {len(index):,} tokens; the share of each in {out}\n")
    print("   L  subset     contaminated  samples" + ("" if scores is None else "     mean     of all       Z"))
    for min_len, rows in tables.items():
        for name, row in rows.items():
            share = f"{row.contaminated:11.1%}" if row.n else f"{'–':>11}"
            scored = "" if scores is None else f" {row.score:9.4g}  {row.mu:9.4g}  {row.z:+6.2f}" if row.n else ""
            print(f"{min_len:4}  {name:10}{share}  {row.n:9,}{scored}")
    if scores is not None:
        largest = largest_affected(tables)
        print("\nnot affected" if largest is None else f"\naffected, up to L = {largest}")
    return tables


@one_line_errors()
def cli(prog: str = "python -m llama2lib.contamination"):
    "python -m llama2lib.contamination --data SHARDS --samples FILE: contaminated samples, and whether it helps them."
    import tyro

    run(tyro.cli(ContaminationConfig, prog=prog))

# %%
from contextlib import chdir

from llama2lib.contamination import ContaminationConfig, run
from llama2lib.shards import write_shards

with tempfile.TemporaryDirectory() as folder, chdir(folder):
    texts = documents(np.random.default_rng(3), 300)
    write_shards(Path("shards"), words, texts)
    asked = [{"text": text, "score": 1} for text in texts[:30]]
    asked += [{"text": " ".join(reversed(text.split())), "score": 0} for text in texts[:90]]
    Path("samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked), "utf-8")
    config = ContaminationConfig(Path("shards"), Path("samples.jsonl"), tokenizer=words.path, min_lens=(10, 20))
    tables = run(replace(config, out=Path("shares.jsonl")))
assert tables[10]["dirty"].score == 1 and largest_affected(tables) is not None

# %% [markdown]
# The constants of A.6 are the defaults.

# %%
for name, ours, line in (
    ("min_len", 10, "min_len: int = 10"), ("skip_budget", 4, "skip_budget: int = 4"),
    ("exact_prefix", EXACT, "EXACT = 10"),
    ("clean_below", CLEAN, "CLEAN, DIRTY = 0.2, 0.8"), ("dirty_from", DIRTY, "CLEAN, DIRTY = 0.2, 0.8"),
    ("lengths", LENGTHS, "LENGTHS = (10, 20, 30, 40, 50)"), ("z", SIGNIFICANT, "SIGNIFICANT = 2"),
):  # fmt: skip
    ledger.record("Section A.6", f"contamination: {name}", "preset", A6[name], ours,
                  evidence=f"llama2lib/contamination.py::{line}")  # fmt: skip

# %% [markdown]
# ## Slips of other chapters' tables
#
# Six more places where the paper does not agree with itself, each recomputed from its own numbers. The ledger has those
# of other chapters: 01 (A.2.1), 03 (3.1), 05 (Table 26), 07 (4.1, Tables 36, 45, 46, Figure 33), 08 (Table 2, 2.2.1),
# 10 (Table 6) and 14 (3.4.2, Figure 12, Table 32).
#
# Table 7's averages are not the means of its six columns, by up to 1.3. Some weights may give all four.

# %%
from scipy.optimize import nnls

scored = {name: row for name, row in PAPER["Table 7"].items() if row["Avg"] is not None}
columns = [column for column in next(iter(scored.values())) if column != "Avg"]
for name, row in scored.items():
    recomputed("Table 7", f"{name}: mean of the six columns", row["Avg"],
               round(float(np.mean([row[column] for column in columns])), 2), "= paper ± 0.1")  # fmt: skip
values = np.array([[row[column] for column in columns] for row in scored.values()])
means = np.array([row["Avg"] for row in scored.values()])
weights, miss = nnls(np.vstack([values, 1e4 * np.ones(len(columns))]), np.append(means, 1e4))
print(f"weights that add up to 1, and miss by {miss:.2f}:",
      dict(zip(columns, weights.round(2).tolist(), strict=True)))  # fmt: skip

# %% [markdown]
# Six weights are two more than four averages can tell apart, so these are one set of many; the paper names none.
#
# Which margin the final reward models were trained with the paper does not say. The Helpfulness model of Table 8 has
# two of the five accuracies of Table 28's large margin, and is 0.3 or 0.4 better in the other three; of the small
# margin's it has none.

# %%
final, ablation = PAPER["Table 8"]["Helpfulness RM on Meta Helpful"], PAPER["Table 28"]
for margin, row in ablation.items():
    print(f"{margin:>6}: " + ", ".join(f"{rating} {final[rating] - value:+.1f}" for rating, value in row.items()))
_ = recomputed("Table 8", "accuracies by rating of the final model, as in Table 28 with the large margin",
               list(final.values()), list(ablation["large"].values()))  # fmt: skip

# %% [markdown]
# Figure 5 is called training loss, its axis is labelled 'Train PPL'. A scaling law of another family of models, trained
# on other text with other tokens, gives a scale for what can be:
#
# > Ours: the law of Hoffmann et al. 2022 (arXiv 2203.15556), with its constants.

# %%
from llama2lib.scaling import HOFFMANN

ends = PAPER["Figure 5"]["nats per token, end"]
losses = {size: float(HOFFMANN.loss(LLAMA2[size].num_params, TEXT["Section 2.2"]["tokens"])) for size in SIZES}
for size, loss in losses.items():
    print(f"{size:>4}: the curve ends at {ends[size]}; the law's loss {loss:.2f}, its perplexity {np.exp(loss):.1f}")
_ = recomputed("Figure 5", "end of 70B's curve, were it a perplexity, against a scaling law's", ends["70B"],
               round(float(np.exp(losses["70B"])), 2), "= paper ± 1")  # fmt: skip

# %% [markdown]
# So the values are losses in nats per token. Three captions or texts do not fit what is drawn:

# %%
drawn = [float(temperature) for temperature in next(iter(PAPER["Figure 21"].values()))]
recomputed("Figure 7", "largest number of samples (caption: up to 100)", 100, max(map(int, PAPER["Figure 7"]["max"])))
recomputed("Figure 21", "lowest and highest temperature (caption: 0.1 to 1.5)", [0.1, 1.5], [min(drawn), max(drawn)])
_ = recomputed("Figure 26", "batches of annotation (Table 26 has 14)", len(PAPER["Table 26"]) - 1,
               max(map(int, PAPER["Figure 26"]["max"])))  # fmt: skip

# %% [markdown]
# ## What it took
#
# - *Recomputed.* Nearly all of Table 3, and nearly every average of Tables 19 and 24, follows from the scores behind
#   it. The exceptions are two cells of Math that are GSM8K alone, a score of Falcon 40B that seems copied, and three
#   averages of Llama 1. Table 7's averages are not the means of its columns. Of section 2.3's claims one fails, by a
#   tenth of a point.
# - *The harness.* On the same weights two adapters agree, once they turn text into tokens by the same rules. Most of
#   the care goes into borders: the space in front of a word, one BOS or two, a stop in the middle of a token. The
#   released models were not scored here.
# - *Contamination.* The definition and the fast program mark the same tokens. Table 51's Z come back, with the
#   deviation of drawing with replacement; so the four conditions are two, each asked twice. MMLU-Overall does not pass
#   the authors' own rule. A mini model that has seen its benchmark is found out, and one that has not is left alone.
# - *Surprises.* What was read is not yet remembered: a first try had left no trace in the scores. In a small world a
#   small L finds fragments everywhere, and only long spans tell a leak from the language. And 70B, said to gain more
#   from leaks than 7B, gains fewer points on HellaSwag.
# - *Unclear.* The paper's prompts, the number of programs behind pass@k, the weights of Table 7, and the margin of the
#   final reward models are not in it.

# %% [markdown]
# ## Exercises
#
# 1. Llama 2 7B has a pass@1 of 12.8 on HumanEval, and a pass@100 of 45.6. How unequal must the problems be for that?
# 2. A span pairs tokens place by place. What is left of a copy of twenty tokens if one in the middle is changed, and if
#    one is inserted there?
# 3. The authors found HellaSwag and MMLU-Humanities affected, and most other sets not. How many samples does the rule
#    of four need, to see an effect as large as these?

# %% [markdown]
# Let the chances of the problems have a Beta distribution: it has two numbers, and two scores fix them. Then 7B solves
# more than half of the problems with less than one program of a hundred, and larger models have fewer such problems.
# (The two scores belong to two temperatures, so this is a picture and no measurement.)

# %%
import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, betaln

from llama2lib.paper import PAPER, SIZES


def pass_at(k: int, mean: float, total: float) -> float:
    "Expected pass@k where the problems' chances are Beta(mean * total, (1 - mean) * total)."
    return 1 - np.exp(betaln(mean * total, (1 - mean) * total + k) - betaln(mean * total, (1 - mean) * total))


hard = []
for size in SIZES:
    once, hundred = (PAPER["Table 21"][f"Llama 2 {size}"][f"HumanEval@{k}"] / 100 for k in (1, 100))
    total = brentq(lambda total, once=once, hundred=hundred: pass_at(100, once, total) - hundred, 0.01, 50)
    hard.append(betainc(once * total, (1 - once) * total, 0.01))
    print(f"{size:>4}: mean chance {once:.1%}, below 1 % in {hard[-1]:.0%} of the problems")
    assert abs(pass_at(1, once, total) - once) < 1e-9 and abs(pass_at(100, once, total) - hundred) < 1e-9
assert hard == sorted(hard, reverse=True) and hard[0] > 0.5

# %% [markdown]
# The changed token uses up one of four skips, and is marked with the rest. The inserted one shifts all that follows:
# two spans of ten tokens are left, and ten are too few. One more comma makes a copy invisible.

# %%
import numpy as np

from llama2lib.contamination import contaminated_tokens
from llama2lib.suffix_index import build_index

document = np.random.default_rng(0).integers(0, 1000, 200)
index = build_index([document.tolist()], vocab_size=1001)
copied = document[50:70].tolist()  # twenty tokens
changed, inserted = list(copied), list(copied)
changed[10] = 1000
inserted.insert(10, 1000)
marked = {}
for name, sample in (("an exact copy", copied), ("one token changed", changed), ("one token inserted", inserted)):
    marked[name] = int(contaminated_tokens(sample, index).sum())
    print(f"{name}: {marked[name]} of {len(sample)} tokens are contaminated")
assert list(marked.values()) == [20, 20, 0]

# %% [markdown]
# Z grows with the root of the number of samples, and the smallest of the four decides. HellaSwag's effect on 7B would
# have been missed with a sixteenth fewer samples, and none of the four would have been seen in a set as small as GSM8K,
# with its 1,319 questions. That the affected sets are large ones may say as much of the rule as of the sets.

# %%
import math

from llama2lib.contamination import SIGNIFICANT, affected
from llama2lib.paper import PAPER

needed = {}
for name in ("HellaSwag, 70B", "HellaSwag, 7B", "MMLU-Humanities, 70B", "MMLU-Humanities, 7B"):
    rows = {subset: PAPER["Table 51"][f"{name}, {subset}"] for subset in ("clean", "not clean", "not dirty", "dirty")}
    samples = rows["clean"]["n"] + rows["not clean"]["n"]
    least = min(abs(row["z"]) for row in rows.values())
    needed[name] = math.floor(samples * (SIGNIFICANT / least) ** 2) + 1
    print(f"{name}: {samples:,} samples, smallest |Z| {least}; found from {needed[name]:,} samples on")
    for count in (needed[name] - 1, needed[name]):
        z = {subset: row["z"] * (count / samples) ** 0.5 for subset, row in rows.items()}
        assert affected(z) == (count == needed[name])
assert min(needed.values()) > 1319  # as many questions as GSM8K has for testing
