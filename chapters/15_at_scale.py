# %% [markdown]
# # At the paper's scale
#
# Chapter by chapter this book trained models of a million parameters. This chapter lists what the same commands need on
# A100s: for each stage the command, public data in the place of Meta's, the memory of a GPU, and the hours.
#
# The paper gives the hours of pretraining (Table 2) and one more time, 330 seconds for an iteration of PPO at 70B.
# Everything else here is predicted.
#
# > Ours: nothing on this page was run on a GPU. Memory is traced operation by operation (chapter 02's `plan`); speed is
# > a roofline with measured shares of an A100's peaks, which came within 13 % of published speeds of four sizes
# > (chapter 02). The tool chain around it, file systems, failures and waiting, is not in it.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from llama2lib import ledger, plots
from llama2lib.launch import launch
from llama2lib.model import LLAMA2
from llama2lib.paper import PAPER, TEXT
from llama2lib.plan import PlanConfig, plan
from llama2lib.recipes import by_scale, cached, scale
from llama2lib.roofline import A100, collective_seconds
from llama2lib.serving import token_seconds

plt.rcParams.update(plots.STYLE)
SIZES = by_scale(smoke=("7B",), laptop=("7B", "13B", "34B", "70B"), a100=("7B", "13B", "34B", "70B"))
hours: dict[str, dict[str, float]] = {size: {} for size in SIZES}  # GPU-hours by stage


def planned(size: str, gpus: int, **choices) -> dict:
    "What `plan` finds for a size on so many GPUs, from traces of three and of four blocks."
    return cached("plan", PlanConfig(size, gpus, every_block=False, **choices), plan)


def gib(found: dict) -> str:
    "The memory of a GPU, and whether it fits."
    return f"{found['total'] / 2**30:5.1f} GiB{'' if found['fits'] else ', too much'}"


# %% [markdown]
# ## Weights and data
#
# Meta's weights come from its form, or from `meta-llama/Llama-2-7b` and its sisters on the Hugging Face hub after
# accepting the licence; every command below takes either layout. The data were not published. In their place:
#
# - Pretraining: `togethercomputer/RedPajama-Data-1T`, 1.2 trillion tokens in the parts of Llama 1 (CommonCrawl, C4,
#   GitHub, books, arXiv, Wikipedia, StackExchange), or `togethercomputer/RedPajama-Data-V2`, 84 snapshots of
#   CommonCrawl with signals of quality.
# - Fine-tuning: `OpenAssistant/oasst1`, 161,443 messages in trees (Apache-2.0); take the best-ranked reply to each.
# - Comparisons: the public sets of Table 6, which chapter 04 reads from the hub by name.
# - Safety comparisons: `PKU-Alignment/PKU-SafeRLHF` (CC BY-NC 4.0) says which answer is better, and which are safe.
# - Prompts for RLHF: those of the same comparisons, `is_safety` true for the harmless sets.
# - Evaluation: benchmarks from the hub through the lm-evaluation-harness (chapter 09); TruthfulQA, ToxiGen and BOLD
#   from their repositories (chapter 07).
#
# > Ours: these sets are named, not shipped, and no model of the paper's size was trained on them here.

# %%
from llama2lib.preferences import READERS

for name, (_, place, options) in READERS.items():
    print(f"read_public({name!r})".ljust(32), place or "a local file", *options.values())

# %% [markdown]
# ## Pretraining
#
# Text becomes shards once, on CPUs: `python -m llama2lib.shards /shared/shards --sources /shared/redpajama --tokenizer
# /shared/Llama-2-7b --clean`. Then there is one command a size, started on every node. 70B fits on 24 GPUs and more
# (chapter 02); two trillion tokens want some hundred.

# %%
for size, nodes in (("7B", 8), ("70B", 32)):
    launch("llama2lib.pretrain", size, "--data", "/shared/shards", "--out", f"/shared/runs/{size}", nproc=8,
           nnodes=nodes, gpus=True, max_restarts=3)  # fmt: skip

# %%
tokens, counts = TEXT["Section 2.2"]["tokens"], {"7B": 64, "13B": 64, "34B": 128, "70B": 256}
print(f"size  GPUs   memory of one      MFU   days   GPU-hours of {tokens / 1e12:g}T tokens   Table 2")
for size in SIZES:
    found = planned(size, counts[size])
    hours[size]["pretraining"] = found["gpu_hours"]
    days, printed = found["gpu_hours"] / counts[size] / 24, PAPER["Table 2"][size]["gpu_hours"]
    print(f"{size:>4} {counts[size]:5}   {gib(found):<14} {found['mfu']:6.0%} {days:6.0f} {found['gpu_hours']:19,.0f}"
          f"{printed:18,}")  # fmt: skip

# %% [markdown]
# The hours are lower than Table 2's for every size: the prediction is a roofline for one uninterrupted run of compiled
# code, and the table counts what was really used, in the first half of 2023.
#
# ## Fine-tuning
#
# 27,540 conversations, twice, in rows of 4,096 tokens (section 3.1). How long they are the paper does not say; we take
# the mean of Meta's comparisons, 798.5 tokens (Table 6).

# %%
table, sft = PAPER["Table 6"], TEXT["Section 3.1"]
GPUS = {"7B": 8, "13B": 8, "34B": 32, "70B": 64}
LEAN = {"7B": ("selective", 2), "13B": ("selective", 2), "34B": ("full", 1), "70B": ("full", 1)}  # ac, rows a pass


def step_of(size: str, gpus: int, rows: int, seq_len: int = 4096, compiled: bool = False) -> dict:
    "The plan of a training step after pretraining: FSDP alone, gradients reduced in every pass."
    ac, micro_batch = LEAN[size]
    return planned(size, gpus, tp=1, ac=ac, micro_batch=micro_batch, reduce="micro_batch", compile=compiled,
                   batch_tokens=rows * seq_len, seq_len=seq_len)  # fmt: skip


launch("llama2lib.sft", "paper", "--model", "Llama-2-7b", "--data", "sft.jsonl", "--out", "runs/7B-sft", nproc=8,
       gpus=True)  # fmt: skip
launch("llama2lib.sft", "paper", "--model", "/shared/Llama-2-70b", "--data", "/shared/sft.jsonl", "--out",
       "/shared/runs/70B-sft", "--ac", "full", "--micro-batch", 1, nproc=8, nnodes=8, gpus=True)  # fmt: skip
learned = sft["annotations"] * sft["epochs"] * table["Meta"]["tokens_example"]
print(f"\n{learned / 1e6:.0f}M tokens\nsize  GPUs   memory of one    GPU-hours")
for size in SIZES:
    found = step_of(size, GPUS[size], sft["batch_size"], compiled=True)
    hours[size]["fine-tuning"] = learned / found["tokens_per_second"] / 3600
    print(f"{size:>4} {GPUS[size]:5}   {gib(found):<14} {hours[size]['fine-tuning']:10,.0f}")

# %% [markdown]
# ## Reward models
#
# Two of them, each again for every version, from the newest chat model (section 3.2.2): 512 pairs a step, once over the
# data. By the last version there were 2,919,326 comparisons (Table 6); a pair is two examples of 595.7 tokens. We count
# every comparison once, for one of the two models. On public data, `preferences.jsonl` comes from `read_public`.

# %%
launch("llama2lib.reward", "paper", "--model", "runs/7B-sft/model", "--data", "helpfulness.jsonl", "--out",
       "runs/7B-helpfulness", nproc=8, gpus=True)  # fmt: skip
launch("llama2lib.reward", "paper-70B", "--model", "/shared/runs/70B-sft/model", "--data", "/shared/safety.jsonl",
       "--auxiliary", 1, "--out", "/shared/runs/70B-safety", nproc=8, nnodes=8, gpus=True)  # fmt: skip
read = 2 * table["Total"]["comparisons"] * table["Total"]["tokens_example"]
rows = TEXT["Section 3.2.2"]["batch_rows"]
print(f"\n{read / 1e9:.1f}B tokens\nsize  GPUs   memory of one    GPU-hours")
for size in SIZES:
    found = step_of(size, GPUS[size], rows)
    hours[size]["reward models"] = read / found["tokens_per_second"] / 3600
    print(f"{size:>4} {GPUS[size]:5}   {gib(found):<14} {hours[size]['reward models']:10,.0f}")

# %% [markdown]
# ## Answering
#
# Rejection sampling and PPO answer prompts. Here a token's time is that of chapter 01's Figure 24: weights are read
# once for all rows of a batch, and each row reads its own cache. A copy of the weights is on one GPU, or, if it does
# not fit there, divided over the eight of a node; the batch is the largest power of two that fits beside it.
#
# > Ours: `generate` has whole copies. To divide one while it generates is not built here: lines with eight GPUs a copy,
# > in this section and the next ones, say what it would take.

# %%
from llama2lib.serving import last_batch, memory

context = round(table["Meta"]["tokens_example"] - table["Meta"]["tokens_response"])
answer = round(table["Meta"]["tokens_response"])
room = A100.memory - A100.reserve


def answering(size: str, held: float = 0.0) -> tuple[int, int, float]:
    "GPUs that share a copy, rows that it answers together beside `held` bytes on each GPU, GPU-seconds of a token."
    shape = LLAMA2[size]

    def needed(rows: int, gpus: int) -> float:
        return sum(memory(shape, rows, context, answer, gpus, fused=True).values())

    for gpus in (1, A100.gpus_per_node):
        if rows := last_batch(partial(needed, gpus=gpus), room - held):
            parts = token_seconds(shape, rows, context, answer, gpus, fused=True)
            return gpus, rows, gpus * sum(parts.values()) / rows
    raise ValueError(f"{size} does not fit on a node")


print(f"after {context} tokens of conversation, {answer} of answer\nsize   GPUs a copy   rows   tokens/s of a GPU")
for size in SIZES:
    shared, together, each = answering(size)
    print(f"{size:>4} {shared:10} {together:10} {1 / each:12,.0f}")

# %% [markdown]
# ## Rejection sampling
#
# K answers to every prompt, each scored by both reward models; the best become conversations to fine-tune on. The paper
# gives neither K nor how many prompts; these are 100,000 prompts with our recipe's K. To score is a forward pass, a
# third of what the plan's training step does with a token.

# %%
from llama2lib.rejection import REJECTION

chosen = ("--helpfulness", "runs/7B-helpfulness/model", "--safety", "runs/7B-safety/model", "--prompts",
          "prompts.jsonl")  # fmt: skip
launch("llama2lib.rejection", "paper", "--model", "runs/7B-sft/model", *chosen, "--out", "runs/7B-best", nproc=8,
       gpus=True)  # fmt: skip
launch("llama2lib.sft", "paper", "--model", "runs/7B-sft/model", "--data", "runs/7B-best/best.jsonl", "--out",
       "runs/7B-v1", nproc=8, gpus=True)  # fmt: skip
asked = 100_000 * REJECTION["paper"].samples
print(f"\n{asked:,} answers\nsize    GPU-hours to answer   to score")
for size in SIZES:
    writing = asked * answer * answering(size)[2] / 3600
    speed = 3 * step_of(size, GPUS[size], rows)["tokens_per_second"]
    scoring = 2 * asked * table["Meta"]["tokens_example"] / speed / 3600
    hours[size]["rejection sampling"] = writing + scoring
    print(f"{size:>4} {writing:17,.0f} {scoring:15,.0f}")

# %% [markdown]
# ## PPO: five models in memory
#
# The policy and the value model learn, with float32 weights, gradients and two moments; the reference and the two
# reward models only score. All five are divided over the GPUs. A minibatch of 64 answers divides over 64 GPUs at most,
# one row each. What a pass needs beside the states is what the plan finds for a step with rows of 4,096 tokens. While
# answers are made, a copy of the policy in bfloat16 takes the place of the pass: a whole one for 7B and 13B. For 34B
# and 70B there is no room for that on 64 GPUs, and more are of no use to so small a minibatch.

# %%
STATES = {"policy": 16, "value model": 16, "reference": 4, "helpfulness model": 4, "safety model": 4}  # bytes a weight
PPO_GPUS = {"7B": 8, "13B": 32, "34B": 64, "70B": 64}


def held_by_ppo(size: str, gpus: int) -> dict[str, float]:
    "Bytes on each GPU: states of the five models, a training pass, and a copy to answer with."
    weights = LLAMA2[size].num_params
    states, step = sum(STATES.values()) * weights / gpus, step_of(size, gpus, TEXT["Section 3.2.3"]["minibatch_size"])
    return {
        "states": states,
        "pass": step["total"] - STATES["policy"] * weights / gpus,
        "copy": 2 * weights / answering(size, states)[0],
    }


print("in GiB\nsize  GPUs   states   and a pass   and a copy   GPUs a copy   rows answered together")
for size in SIZES:
    held = held_by_ppo(size, PPO_GPUS[size])
    training, writing = (f"{(held['states'] + held[part]) / 2**30:12.1f}" for part in ("pass", "copy"))
    shared, together, _ = answering(size, held["states"])
    print(f"{size:>4} {PPO_GPUS[size]:5} {held['states'] / 2**30:8.1f} {training} {writing} {shared:11} {together:15}")

# %% [markdown]
# ## PPO: an iteration
#
# 512 answers are made; the policy, the reference, the value model and the two reward models read them; then the policy
# and the value model learn from each once, 64 at a time. To read is counted as a third of a step. Rows are short, a
# thousand tokens, and on 64 GPUs each has one of them: FSDP's collectives take longer than the arithmetic they should
# hide behind. The weights are gathered once before the answers.

# %%
ppo = TEXT["Section 3.2.3"]


def iteration(size: str, gpus: int) -> dict[str, float]:
    "Predicted seconds of an iteration of PPO, by part."
    step = step_of(size, gpus, ppo["minibatch_size"], seq_len=1024)
    steps, node = ppo["batch_size"] / ppo["minibatch_size"], min(gpus, A100.gpus_per_node)
    weights, layers = 2 * LLAMA2[size].num_params, LLAMA2[size].n_layers
    held = held_by_ppo(size, gpus)["states"]
    return {
        "gathering": collective_seconds(A100, "all_gather", weights, layers, gpus, node),
        "answering": ppo["batch_size"] * answer * answering(size, held)[2] / gpus,
        "reading": 5 / 3 * steps * step["seconds"]["step"],
        "learning": 2 * steps * step["seconds"]["step"],
    }


launch("llama2lib.ppo", "paper", "--model", "runs/7B-v1/model", *chosen, "--out", "runs/7B-ppo", nproc=8, gpus=True)
launch("llama2lib.ppo", "paper", "--model", "/shared/13B-v1", "--helpfulness", "/shared/13B-helpfulness", "--safety",
       "/shared/13B-safety", "--prompts", "/shared/prompts.jsonl", "--out", "/shared/runs/13B-ppo", nproc=8, nnodes=4,
       gpus=True)  # fmt: skip
print(f"\nsize  GPUs   seconds   of them {'   '.join(iteration(SIZES[0], 8))}    GPU-hours of {max(ppo['iterations'])}")
for size in SIZES:
    parts, gpus = iteration(size, PPO_GPUS[size]), PPO_GPUS[size]
    hours[size]["PPO"] = max(ppo["iterations"]) * sum(parts.values()) * gpus / 3600
    print(f"{size:>4} {gpus:5} {sum(parts.values()):9.0f} {parts['gathering']:17.0f} {parts['answering']:11.0f} "
          f"{parts['reading']:9.0f} {parts['learning']:10.0f} {hours[size]['PPO']:12,.0f}")  # fmt: skip

# %% [markdown]
# ## The rest of the program
#
# `llama2lib.rlhf` runs comparisons, reward models, rejection sampling, fine-tuning and PPO, version by version, and
# stops where people have to compare (chapter 05). Ghost Attention and safety context distillation sample as above, and
# fine-tune on little.

# %%
programs = ("--model", "runs/7B-sft/model", "--prompts", "prompts.jsonl", "--held-out", "held-out.jsonl", "--out",
            "runs/7B-rlhf", "--launcher", "torchrun --standalone --nproc-per-node 8")  # fmt: skip
print("$ python -m llama2lib.rlhf paper", *(f"'{word}'" if " " in word else word for word in programs))
launch("llama2lib.gatt", "paper", "--model", "runs/7B-v1/model", "--helpfulness", "runs/7B-helpfulness/model",
       "--dialogs", "dialogs.jsonl", "--rehearsal", "runs/7B-best/best.jsonl", "--out", "runs/7B-gatt", nproc=8,
       gpus=True)  # fmt: skip
launch("llama2lib.distillation", "paper", "--model", "runs/7B-ppo/model", "--safety", "runs/7B-safety/model",
       "--prompts", "prompts.jsonl", "--out", "runs/7B-distilled", nproc=8, gpus=True)  # fmt: skip
launch("llama2lib.evaluate", "--model", "runs/7B-ppo/model", "--tasks", "gsm8k,commonsense", "--out", "results.json",
       nproc=8, gpus=True)  # fmt: skip
launch("llama2lib.safety", "--model", "runs/7B-ppo/model", "--chat", "--truthfulqa", "TruthfulQA.csv", "--out",
       "runs/7B-safe", nproc=8, gpus=True)  # fmt: skip
print("$ python -m llama2lib.card --model runs/7B-ppo/model --developer … --intended-use … --results results.json")

# %% [markdown]
# ## Where the hours go
#
# Five versions, each with reward models and a round of rejection sampling, and PPO at the end (section 3.2.3). The
# reward models of earlier versions read fewer comparisons; five times the last one's hours is a bound.

# %%
TIMES = {"pretraining": 1, "fine-tuning": 1, "reward models": 5, "rejection sampling": 5, "PPO": 1}
fig, ax = plt.subplots(figsize=(6.4, 3.4))
places, height = np.arange(len(TIMES)), 0.8 / len(SIZES)
for number, size in enumerate(SIZES):
    bars = ax.barh(places + number * height, [TIMES[stage] * hours[size][stage] for stage in TIMES], height,
                   label=size, color=plots.COLORS[size])  # fmt: skip
    ax.bar_label(bars, fmt="{:,.0f}", fontsize=7, padding=2)
after = {size: sum(TIMES[s] * hours[size][s] for s in TIMES if s != "pretraining") for size in SIZES}
share = {size: after[size] / (after[size] + hours[size]["pretraining"]) for size in SIZES}
low, high = min(share.values()), max(share.values())
ax.set(xscale="log", xlabel="GPU-hours (A100 80GB, predicted)", xlim=(1, 2e7),
       title=f"Everything after pretraining takes {low:.1%} to {high:.1%} of the hours")  # fmt: skip
ax.set_yticks(places + 0.4 - height / 2, TIMES)
ax.invert_yaxis()
ax.legend(title="model", loc="lower right", fontsize=7, title_fontsize=7)
ax.grid(axis="y", visible=False)
plots.save(fig, "15_gpu_hours.png")

# %%
if scale() != "smoke":
    seconds = sum(iteration("70B", PPO_GPUS["70B"]).values())
    ledger.record("Section 3.2.3", "seconds of an iteration of PPO at 70B (predicted, 64 GPUs)", "illustrated",
                  ppo["seconds_per_iteration"]["70B"], round(seconds), evidence="figures/15_gpu_hours.png")  # fmt: skip
    print(f"70B, an iteration of PPO: {seconds:.0f} s; the paper: {ppo['seconds_per_iteration']['70B']} s")

# %% [markdown]
# ## What it took
#
# Nearly all of the hours are pretraining's. With the released weights and public data, everything after it is less than
# two weeks of one node for 7B. The predictions are lower than what the paper reports, pretraining's by a quarter to a
# half, PPO's by half: they are bounds for runs without a fault, and the authors do not say on how many GPUs theirs
# ran.
#
# What is missing here for 34B and 70B is generation with a copy that the GPUs of a node share.
#
# ## Exercises
#
# 1. How many tonnes of CO₂ equivalent does everything after pretraining emit for the largest size (400 W)?
# 2. How much longer does fine-tuning take if each conversation has a row of its own, filled up to 4,096 tokens?

# %%
from llama2lib.carbon import emissions

largest = SIZES[-1]
print(f"1. {emissions(after[largest], 400):.2f} t; Table 2 has {PAPER['Table 2'][largest]['tco2eq']} t for pretraining")
print(f"2. {4096 / table['Meta']['tokens_example']:.1f} times")
