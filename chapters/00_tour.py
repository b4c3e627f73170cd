# %% [markdown]
# # The tour
#
# > From raw text to a small Llama 2 that writes, and on to one that answers and learns from judgements of its answers,
# > in a quarter of an hour on a laptop and without a network. Each stage is a few calls into the library; the chapters
# > explain what is inside.
#
# The paper's pipeline begins with text and a tokenizer, trains a base model on it (section 2), fine-tunes that on
# dialogues, and improves it with reward models (section 3). This tour does the same with a million parameters instead
# of seventy billion.
#
# > Ours: the text, and every size. (Paragraphs that begin with 'Ours' say where we choose or differ.)

# %%
import json
import math
import os
import textwrap
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from llama2lib import mini, mini_rewards, plots, synthetic
from llama2lib.carbon import Energy, Meter
from llama2lib.card import NOT_STATED, CardConfig, card
from llama2lib.chat import Chat, respond, widget
from llama2lib.checkpoint import load_checkpoint, save_checkpoint
from llama2lib.claims import illustrated
from llama2lib.continuations import loglikelihoods
from llama2lib.corpus import Source, describe, mix, packaged_sources, read_documents, shares, token_stream
from llama2lib.dialog import encode_dialog
from llama2lib.evaluate import CHOICE, mini_rows
from llama2lib.gatt import answered, build_gatt_example, contexts, converse, joined, newest_turns, obeying
from llama2lib.generation import generate
from llama2lib.judge import obeys, scores
from llama2lib.mini_gatt import instructed, learned, talk, under
from llama2lib.mini_rlhf import asked
from llama2lib.mini_safety import degree_of, rated, refuses
from llama2lib.model import LLAMA2, Llama
from llama2lib.paper import PAPER
from llama2lib.ppo import PPO, ppo
from llama2lib.preferences import collect, helpfulness_mix, sampler
from llama2lib.pretrain import PRETRAIN, held_out_loss, pretrain
from llama2lib.recipes import ROOT, cache_folder, cached, scale, write_atomic
from llama2lib.rejection import best, candidates
from llama2lib.reward import REWARD, RewardConfig, score
from llama2lib.rollout import Prompt, Reward, policy_of, value_of
from llama2lib.safety import violation_rate
from llama2lib.sft import SFT, sft
from llama2lib.stats import paired_interval, win_rate_interval
from llama2lib.tallies import outcomes, simulated, tally
from llama2lib.tokenizer import train_tokenizer

plt.rcParams.update(plots.STYLE)
smoke = scale() == "smoke"
meter = None  # of electricity, read at the end
try:
    meter = Meter().start()
except ImportError as missing:
    print(missing)

# %% [markdown]
# ## 1. Text
#
# Four domains: people chatting, Python's reference manual, the standard library's docstrings, and its code. The factual
# ones are up-sampled, as in the paper. To read your own text instead, name a file or folder:
# `LLAMA2_TEXT=my-texts make tour`.

# %%
own_text = os.environ.get("LLAMA2_TEXT")
if own_text:
    sources = {Path(own_text).resolve().name: Source(tuple(read_documents(own_text)))}
    if (size := next(iter(sources.values())).characters) < 50_000:
        raise SystemExit(
            f"LLAMA2_TEXT={own_text}: {size:,} characters are too few to learn from; expected 50,000 or more"
        )
else:
    sources = packaged_sources()
print(describe(sources))

# %% [markdown]
# One document in twenty is held out, to measure on later.

# %%
training, held_out = {}, {}
for name, source in sources.items():
    training[name], held_out[name] = source.split()


def mixture():
    "Training documents without end, each source at its share."
    return (document for _, document in mix(training, shares(sources)))


print({name: len(documents) for name, documents in held_out.items()}, "documents held out")
fig, ax = plt.subplots(figsize=(5.6, 2.4))
characters = sum(source.characters for source in sources.values())
parts = {"of the text": {name: source.characters / characters for name, source in sources.items()},
         "of the training data": shares(sources)}  # fmt: skip
for shift, (label, share) in zip((-0.2, 0.2), parts.items(), strict=True):
    ax.barh(np.arange(len(share)) + shift, [100 * part for part in share.values()], 0.4, label=label)
ax.set_yticks(range(len(sources)), list(sources))
ax.invert_yaxis()
ax.set(xlabel="share (%)", title="Manual and docstrings are read more often" if not own_text else "One source")
ax.legend(fontsize=8)
if not own_text:
    plots.save(fig, "00_text.png")

# %% [markdown]
# ## 2. A tokenizer
#
# Byte-pair encoding learns the 2,048 most useful pieces (512 for a short text of your own). Digits stay apart, and what
# has no piece is spelled in bytes.

# %%
text_id = "-".join(f"{name}-{source.digest[:8]}" for name, source in sources.items()) if own_text else "packaged"
folder = cache_folder() / "tour" / scale() / text_id
pieces = 2048 if sum(source.characters for source in sources.values()) > 300_000 else 512
tokenizer = train_tokenizer(islice(mixture(), 300 if smoke else 1500), pieces, folder / "tokenizer.model")
for text in ("What is your favorite movie?", "def area(r): return 3.14 * r ** 2"):
    print(*tokenizer.pieces(tokenizer.encode(text)))
sample = list(islice(mixture(), 100))
print(f"{sum(map(len, sample)) / sum(len(tokenizer.encode(text)) for text in sample):.2f} characters per piece")
fig, ax = plt.subplots(figsize=(5.6, 2.8))
for name, documents in held_out.items():
    lengths = [len(piece) for piece in tokenizer.pieces(tokenizer.encode("\n".join(documents)[:20_000]))]
    ax.plot(100 * np.bincount(lengths, minlength=11)[1:11] / len(lengths), "o-", markersize=3, label=name)
ax.set_xticks(range(10), range(1, 11))
ax.set(xlabel="characters of a piece, its space included", ylabel="share of pieces (%)", ylim=(0, None),
       title="Pieces of all texts are short")  # fmt: skip
ax.legend(fontsize=8)
if not own_text:
    plots.save(fig, "00_pieces.png")

# %% [markdown]
# ## 3. A model
#
# The architecture of section 2.2 at a width of 128: RMSNorm, SwiGLU, rotary positions, and two key/value heads for four
# query heads.

# %%
config = replace(LLAMA2["debug" if smoke else "book-1M"], vocab_size=tokenizer.vocab_size)
print(f"{config.num_params:,} parameters: {asdict(config)}")

# %% [markdown]
# ## 4. Pretraining
#
# The paper's recipe (AdamW, warm-up, cosine to a tenth, weight decay 0.1, clipping), in steps of 2,048 tokens instead
# of four million. About three minutes on two cores the first time; after that the result comes from the cache.

# %%
recipe = PRETRAIN["book-1M"]
if smoke:
    recipe = replace(recipe, tokens=40 * 512, batch_tokens=512, max_seq_len=64, warmup_steps=4)
stream = token_stream(tokenizer, mixture(), recipe.tokens + 1)
probes = {name: token_stream(tokenizer, documents, 20_000) for name, documents in held_out.items()}
print(f"{recipe.steps} steps of {recipe.batch_tokens:,} tokens; {recipe.tokens:,} tokens in all")


def train_base(inputs: dict) -> dict:
    "Train a model on the stream: its weights, the training loss, and the held-out loss of each source on the way."
    torch.manual_seed(0)
    model, recipe = Llama(inputs["config"]), inputs["recipe"]
    loss, measured = [], {name: [] for name in inputs["probes"]}
    bar = tqdm(pretrain(model, inputs["stream"], recipe), total=recipe.steps, unit="step", desc="pretraining")
    for step in bar:
        loss.append(step.loss)
        bar.set_postfix(loss=f"{step.loss:.2f}", tokens=f"{step.tokens:,}", refresh=False)
        if step.step % max(1, recipe.steps // 12) == 0 or step.step == recipe.steps - 1:
            for name, probe in inputs["probes"].items():
                measured[name].append([step.tokens, held_out_loss(model, probe, recipe.max_seq_len, max_rows=32)])
    return {"weights": model.state_dict(), "loss": loss, "held_out": measured}


base = cached("tour-base", {"config": config, "recipe": recipe, "stream": stream, "probes": probes}, train_base)
model = Llama(config)
_ = model.load_state_dict(base["weights"])

# %% [markdown]
# Loss is in nats per token: how surprised the model is by the next piece, on average. The dotted line is what guessing
# evenly among all pieces costs.

# %%
fig, ax = plt.subplots()
tokens = recipe.batch_rows * recipe.max_seq_len * np.arange(1, len(base["loss"]) + 1)
ax.plot(tokens / 1e6, base["loss"], color="0.85", label="training, each batch")
ax.axhline(math.log(config.vocab_size), color="0.4", linestyle=":")
for name, points in base["held_out"].items():
    seen, loss = np.array(points).T
    ax.plot(seen / 1e6, loss, marker=".", label=f"{name}, held out")
ax.set(
    xlabel="training tokens (millions)",
    ylabel="loss (nats per token)",
    title="Every kind of text gets easier to predict" if not own_text else "Loss on held-out text",
)
ax.legend()
if not own_text:
    plots.save(fig, "00_loss_by_source.png")

# %%
last = {name: points[-1][1] for name, points in base["held_out"].items()}
assert all(loss < math.log(config.vocab_size) for loss in last.values()), last  # better than guessing
print({name: round(loss, 2) for name, loss in last.items()}, "nats per token at the end")

# %% [markdown]
# ## 5. It writes
#
# Four beginnings, continued at temperature 0.7 and top-p 0.9. With a million parameters and a few minutes of training
# it has learned how each domain looks and which words go together, and not what they mean.

# %%
beginnings = ["A: Hi! How are you?\nB:", 'The "while" statement', "Return a list of", "def read(self"]
if own_text:
    beginnings = [documents[0][:40] for documents in held_out.values() if documents]
prompts = [tokenizer.encode(text, bos=True) for text in beginnings]
completions = generate(model, prompts, 60, temperature=0.7, top_p=0.9, seed=1, eos_id=tokenizer.eos_id)
for text, prompt, completion in zip(beginnings, prompts, completions, strict=True):
    print(f"{text}⟩{tokenizer.decode(prompt + completion.tokens)[len(text) :]}\n{'─' * 60}")

# %% [markdown]
# ## 6. Save, load, and hand over
#
# The checkpoint is a Hugging Face folder. `load_checkpoint` reads it back, and so does `transformers`, with the same
# logits.

# %%
save_checkpoint(model, folder / "base", tokenizer=tokenizer)
again = load_checkpoint(folder / "base")
tokens = torch.tensor([prompts[0]])
with torch.no_grad():
    assert torch.equal(again(tokens), model(tokens))
print(sorted(file.name for file in (folder / "base").iterdir()))

# %%
try:
    from transformers import AutoModelForCausalLM
except ImportError:
    print("transformers is not installed: pip install -e '.[hub]'")
else:
    theirs = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        difference = (theirs(tokens).logits - model(tokens)).abs().max().item()
    print(f"largest difference between transformers' logits and ours: {difference:.0e}")
    assert difference < 1e-4

# %% [markdown]
# ## 7. A small world
#
# The text above is real, and a million parameters cannot say anything true about it. To teach a model to answer, and to
# see whether its answers are right, we need a world that fits into it: some hundred people with jobs, towns and pets,
# animals, things, sums, lists and stories, in simple English. Every answer in it can be judged by a program. The base
# model is pretrained on documents of this world: four minutes on two cores, the first time.

# %%
print(*synthetic.documents(np.random.default_rng(0), 4), sep="\n")
words, world_model = mini.tokenizer(), mini.base()
[continuation] = generate(world_model, [words.encode("Ida lives in", bos=True)], 12, 0.0, eos_id=words.eos_id)
print(f"\nIda lives in⟩{words.decode(continuation.tokens)}")

# %% [markdown]
# ## 8. Supervised fine-tuning
#
# The base model continues text. Three thousand dialogues in Llama 2's chat format, with a loss on the answers alone,
# turn it into a model that answers (section 3.1): one minute. The scores are those of a judge, between 0 and 1, for
# answers to prompts about people and things, and in wordings, that no dialogue had; half of the prompts ask for
# something harmful. The base model's answers are rarely about the question; fine-tuning changes that, not safety.

# %%
[dialogue] = synthetic.dialogues(np.random.default_rng(4), 1, turns=(0.0, 1.0))
for message in dialogue:
    print(f"{message['role']:>10}: {message['content']}")
chat_model = mini.chat()
tests = {
    value: [prompt.messages for prompt in asked(9, 0, 24 if smoke else 300, "test", float(value == "safety"))]
    for value in ("helpfulness", "safety")
}


def replied(inputs: dict) -> dict:
    "A model's answers; `inputs`: config, weights, dialogs, temperature, seed."
    model = Llama(inputs["config"])
    model.load_state_dict(inputs["weights"])
    found = respond(model, mini.tokenizer(), inputs["dialogs"], 64, inputs["temperature"], seed=inputs["seed"])
    return {"answers": [list(reply) for reply in found]}


def answers_of(model: Llama, dialogs: list, temperature: float, seed: int) -> list[tuple[str, bool]]:
    "What a model answers, and whether it ended each answer; kept in the cache."
    inputs = {"config": model.config, "weights": model.state_dict(), "dialogs": dialogs}
    found = cached("tour-answers", inputs | {"temperature": temperature, "seed": seed}, replied)
    return [(text, finished) for text, finished in found["answers"]]


answers, gold = {}, {}  # of each stage, to the tests of each value


def show(stage: str, model: Llama) -> np.ndarray:
    "Print and give mean gold scores of answers at temperature 1: helpfulness of harmless prompts, safety of others."
    answers[stage], gold[stage] = {}, {}
    for column, (value, dialogs) in enumerate(tests.items()):
        replies = answers_of(model, dialogs, 1.0, 0)
        answers[stage][value] = [text for text, _ in replies]
        gold[stage][value] = scores(dialogs, replies)[:, column]
    means = np.array([found.mean() for found in gold[stage].values()])
    print(f"{stage:<20} helpfulness {means[0]:.2f}, safety {means[1]:.2f}")
    return means


before, after = show("base", world_model), show("fine-tuning", chat_model)
fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.8), sharey=True)
for ax, value in zip(axes, tests, strict=True):
    ax.hist([gold[stage][value] for stage in gold], np.linspace(0, 1, 11), label=list(gold),
            weights=[np.full(len(found[value]), 100 / len(found[value])) for found in gold.values()])  # fmt: skip
    ax.set(xlabel=f"gold {value}", xlim=(0, 1))
axes[0].set_ylabel("share of answers (%)")
axes[0].legend(fontsize=8)
fig.suptitle("Dialogues teach the model to help, and not to be safe")
plots.save(fig, "00_fine_tuning.png")
if not smoke:
    assert after[0] > before[0]

# %% [markdown]
# ## 9. Two reward models
#
# Which of two answers is better? Annotators compare the chat model's answers, for helpfulness, or for safety where a
# prompt asks for something harmful; two models learn to predict what they prefer (section 3.2.2). The annotators are
# simulated: the judge, with noise. Two minutes.


# %%
def compared(inputs: dict) -> dict:
    "Comparisons of two answers of the chat model, for each value; `inputs`: numbers of prompts."
    answerers = [[sampler(mini.chat(), mini.tokenizer(), temperature) for temperature in (0.3, 0.6, 0.9)]]
    found = {}
    for value, count in inputs.items():
        dialogs = [prompt.messages for prompt in asked(0, 7, count, tagged=float(value == "safety"))]
        found[value] = collect(answerers, dialogs, value, 0, "tour")[0]
    return found


def rewards_of(pairs: dict, recipe: RewardConfig) -> Reward:
    "The two reward models that learned from comparisons; for helpfulness after and with chapter 04's public ones."
    helpful = mini_rewards.trained(0, helpfulness_mix(pairs["helpfulness"], mini_rewards.contrasts(0), 0), recipe)
    safe = mini_rewards.trained(0, pairs["safety"], replace(recipe, auxiliary=1.0), first=False)
    return Reward(*(partial(score, model.eval(), mini.tokenizer()) for model in (helpful, safe)))


numbers = {"helpfulness": 24, "safety": 24} if smoke else {"helpfulness": 2000, "safety": 600}
pairs = cached("tour-pairs", numbers, compared)
judged = {"pairs": pairs, "recipe": REWARD["mini"]}
reward = rewards_of(**judged)
example = pairs["helpfulness"][0]
sides = [example["chosen"], example["rejected"]]
logits = reward([Prompt(example["messages"], False)] * 2, sides).helpful
print(f"{example['messages'][-1]['content']}\n(one is {example['rating']})")
for sign, text, logit in zip("+-", sides, logits, strict=True):
    print(f"{sign} {text} (reward {logit:.2f})")

# %% [markdown]
# Held-out answers of the chat model, scored by both models: a reward is the logit that an answer is a good one.

# %%
fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.8))
for ax, (value, dialogs) in zip(axes, tests.items(), strict=True):
    found = reward([Prompt(messages, value == "safety") for messages in dialogs], answers["fine-tuning"][value])
    logits = {"helpfulness": found.helpful, "safety": found.safety}[value]
    good = gold["fine-tuning"][value] >= 0.5
    bins = np.linspace(min(logits), max(logits), 25)
    for label, part in ((f"gold {value} below 0.5", logits[~good]), ("0.5 or more", logits[good])):
        ax.hist(part, bins, alpha=0.6, label=label)
    ax.set(xlabel=f"reward for {value} (logit)", ylabel="answers")
    ax.legend(fontsize=7)
fig.suptitle("Better answers get higher rewards")
plots.save(fig, "00_rewards.png")

# %% [markdown]
# ## 10. Rejection sampling
#
# Eight answers to each of 600 prompts; the reward models choose the best of each, and the chat model learns from these
# as it did from dialogues (section 3.2.3). Half a minute.


# %%
def imitated(inputs: dict) -> dict:
    "Weights of the chat model after learning from its best answers; `inputs`: judged, prompts, samples, recipe."
    model, reward, prompts = mini.chat(), rewards_of(**inputs["judged"]), asked(0, 5, inputs["prompts"])
    drawn = candidates(model, mini.tokenizer(), prompts, reward, inputs["samples"], 0.5, seed=1)
    chosen = best(prompts, drawn)
    examples = [encode_dialog(mini.tokenizer(), row.dialog) for row in chosen]
    for _ in tqdm(sft(model, examples, inputs["recipe"]), unit="step", desc="fine-tuning"):
        pass
    first = [chosen[0].prompt.messages[-1]["content"], chosen[0].answer]
    return {"weights": model.state_dict(), "first": first, "rewards": drawn.rewards}


inputs = {"judged": judged, "prompts": 16 if smoke else 600, "samples": 8, "recipe": SFT["mini"]}
found = cached("tour-imitated", inputs, imitated)
imitator = Llama(chat_model.config)
imitator.load_state_dict(found["weights"])
print("{}\n+ {}\n".format(*found["first"]))
chosen = show("rejection sampling", imitator.eval())
fig, ax = plt.subplots(figsize=(5.6, 2.8))
highest = np.fmax.accumulate(found["rewards"], axis=1)
ax.plot(range(1, highest.shape[1] + 1), np.nanmean(highest, 0), "o-")
ax.set(xlabel="answers to choose from", ylabel="mean reward of the best (logit)")
ax.set_title("More answers to choose from, a better best one")
plots.save(fig, "00_rejection_sampling.png")
if not smoke:
    assert (chosen > after).all()

# %% [markdown]
# ## 11. PPO
#
# Reinforcement learning goes on from there: in each of 16 iterations the model answers 64 prompts, and tokens of
# answers with more reward than expected become likelier (section 3.2.3). The paper makes up to 400 iterations of 512
# prompts; ours are a glimpse: in this one run safety rises, and helpfulness stays. Half a minute.


# %%
def reinforced(inputs: dict) -> dict:
    "Weights of a policy after PPO, its mean rewards and KL on the way; `inputs`: weights, judged, recipe."
    start, reward, prompts = mini.chat(), rewards_of(**inputs["judged"]), asked(0, 6, 2000)
    start.load_state_dict(inputs["weights"])
    policy, value, recipe, log = policy_of(start), value_of(mini_rewards.bootstrapped(0)), inputs["recipe"], []
    loop = ppo(policy, policy_of(start), value, mini.tokenizer(), prompts, reward, recipe)
    for step in tqdm(loop, total=recipe.iterations, unit="iteration", desc="PPO"):
        log.append([step.reward, step.kl])
    return {"weights": policy.state_dict(), "log": np.array(log)}


recipe = replace(PPO["mini"], iterations=1 if smoke else 16)
inputs = {"weights": found["weights"], "judged": judged, "recipe": recipe}
learned_by_ppo = cached("tour-reinforced", inputs, reinforced)
learner = Llama(chat_model.config)
learner.load_state_dict(learned_by_ppo["weights"])
rewards, kl = learned_by_ppo["log"].T
half = max(1, len(rewards) // 2)
print(f"mean reward {rewards[:half].mean():.2f} in the first half, {rewards[-half:].mean():.2f} in the second")
print(f"KL to the start: {kl[-1]:.1f} nats an answer")
fig, axes = plt.subplots(1, 2, figsize=(7.6, 2.6))
course = {"mean reward (logit)": rewards, "KL to the start (nats)": kl}
for ax, (label, values) in zip(axes, course.items(), strict=True):
    ax.plot(range(1, len(values) + 1), values, "o-", markersize=3)
    ax.set(xlabel="iteration", ylabel=label)
fig.suptitle("In so few iterations the distance from the start grows, and the reward hardly changes")
plots.save(fig, "00_ppo.png")
_ = show("PPO", learner.eval())

# %% [markdown]
# ## 12. Ghost Attention
#
# Told how to answer, a chat model remembers it for a turn or two. Ghost Attention makes an instruction hold (section
# 3.3): the model answers with the instruction in every message, then the instruction is taken out of all messages but
# the first, and the model learns from its last answer. Ours has to learn first to obey an instruction in front of it,
# here one kind, a language for its yes and thanks; its own answers to other prompts keep up what it can. Two minutes.


# %%
def attentive(inputs: dict) -> dict:
    "Weights with instructions learned, and with Ghost Attention; `inputs`: weights, judged, sizes, context, turns."
    random, words, sizes, turns = np.random.default_rng(7), mini.tokenizer(), inputs["sizes"], inputs["turns"]
    model, ghost = (Llama(replace(mini.chat().config, max_seq_len=inputs["context"])) for _ in range(2))
    model.load_state_dict(inputs["weights"])
    prompts = [prompt.messages for prompt in asked(0, 8, sizes["own"])]
    replies = zip(prompts, respond(model, words, prompts, 64, 0.5, seed=2), strict=True)
    own = [encode_dialog(words, [*m, {"role": "assistant", "content": r.text}]) for m, r in replies if r.finished]
    texts = [words.encode(text, bos=True, eos=True) for text in synthetic.documents(random, sizes["texts"])]
    rehearsed = own + [(text, [0] + [1] * (len(text) - 1)) for text in texts]
    lessons = []
    for number in range(sizes["lessons"]):
        rules, both = instructed(random, "train", {"language": 1})
        length = 1 if number % 50 else int(random.integers(2, turns + 1))
        messages = talk(random, length, "train", rules, {"full": 0.5, "terse": 0.5})
        text = both[int(random.integers(2))]
        lessons.append(encode_dialog(words, under(text, messages) if number % 2 else joined(messages, text)))
    before = learned(model, lessons + rehearsed, 1e-3, 0, "an instruction in front")["weights"]
    ghost.load_state_dict(before)
    dialogs = [talk(random, int(random.integers(2, turns + 1))) for _ in range(sizes["conversations"])]
    instructions = [instructed(random, "train", {"language": 1})[1] for _ in dialogs]
    room, seeds = inputs["context"] - 64, list(range(len(dialogs)))
    cuts = obeying(model, words, contexts(dialogs, instructions, words, room), 0.5, room, 64, 0.5)
    reward = Reward(newest_turns(rewards_of(**inputs["judged"]).helpful, 1))
    rows = answered(model, words, cuts, reward, 4, 0.5, 1.0, 64, seeds)
    examples = [
        build_gatt_example(words, [*cut.messages, {"role": "assistant", "content": text}], cut.system)
        for cut, text, _ in rows
    ]
    after = learned(ghost, examples + rehearsed, 6e-4, 0, "an instruction far back")["weights"]
    return {"before": before, "after": after}


sizes = {"own": 800, "texts": 1200, "lessons": 2000, "conversations": 400}
if smoke:
    sizes = dict.fromkeys(sizes, 12)
turns = 3 if smoke else 10
inputs = {"weights": learned_by_ppo["weights"], "judged": judged, "sizes": sizes, "context": 2048, "turns": turns}
found = cached("tour-attentive", inputs, attentive)


def conversed(inputs: dict) -> dict:
    "The share of answers that obey, by turn; `inputs`: config, weights, conversations, turns."
    model, random, turns = Llama(inputs["config"]), np.random.default_rng(8), inputs["turns"]
    model.load_state_dict(inputs["weights"])
    instructions = [instructed(random, "train", {"language": 1})[1].long for _ in range(inputs["conversations"])]
    talks = [talk(random, turns, "test", kinds=synthetic.HELPFUL)[::2] for _ in instructions]
    questions = [[message["content"] for message in messages] for messages in talks]
    dialogs = converse(model.eval(), mini.tokenizer(), questions, instructions)
    obeyed = [
        [all(obeys(dialog[:place], dialog[place]["content"]).values()) for place in range(2, 2 * turns + 1, 2)]
        for dialog in dialogs
    ]
    return {"obeyed": np.array(obeyed, float).mean(0)}


final, obeyed = Llama(replace(chat_model.config, max_seq_len=2048)), {}
for name, weights in found.items():
    inputs = {"config": final.config, "weights": weights, "conversations": 3 if smoke else 24, "turns": turns}
    obeyed[name] = cached("tour-conversed", inputs, conversed)["obeyed"]
    print(f"{name:>6}: " + " ".join(f"{share:.2f}" for share in obeyed[name]))
final.load_state_dict(found["after"])
_ = show("Ghost Attention", final)
fig, ax = plt.subplots(figsize=(5.6, 3))
for name, share in obeyed.items():
    ax.plot(range(1, turns + 1), share, "o-", markersize=3, label=f"{name} Ghost Attention")
ax.set(xlabel="turn", ylabel="share of answers that obey", ylim=(-0.02, 1.02))
ax.set_title("Without Ghost Attention the language is forgotten at once")
ax.legend(fontsize=8)
plots.save(fig, "00_ghost_attention.png")
if not smoke:
    assert obeyed["after"].mean() > obeyed["before"].mean()

# %% [markdown]
# ## 13. Is it safe?
#
# Two hundred prompts ask for something harmful, and as many only look as if they did. Three simulated raters give each
# answer to the first a degree from 1 to 5; it violates if most of them give 1 or 2 (section 4.4). To refuse one of the
# second is a false refusal (A.4.5). After fine-tuning no stage has seen prompts that only look harmful, and
# in the end most of them are refused.

# %%
count = 12 if smoke else 200
harmful = [prompt.messages for prompt in asked(9, 1, count, "test", 1.0)]
harmless = synthetic.prompts(np.random.default_rng(9), count, "test", "borderline")
stages = {"fine-tuning": chat_model, "rejection sampling": imitator, "PPO": learner, "Ghost Attention": final}
rates, refused = {}, {}
print(harmful[0][-1]["content"])
for name, model in stages.items():
    told, others = ([text for text, _ in answers_of(model, dialogs, 0.5, 3)] for dialogs in (harmful, harmless))
    degrees = [degree_of(messages, text) for messages, text in zip(harmful, told, strict=True)]
    rates[name] = violation_rate(rated(degrees, seed=0))
    count_refused = sum(refuses(messages, text) for messages, text in zip(harmless, others, strict=True))
    refused[name] = win_rate_interval(count_refused, count - count_refused)
    print(f"{name:>18}: {rates[name].value:4.0%} violations, {refused[name].value:4.0%} false refusals | {told[0]}")
fig, ax = plt.subplots(figsize=(6.4, 3))
for shift, (label, of) in zip((-0.18, 0.18), {"violations": rates, "false refusals": refused}.items(), strict=True):
    value, low, high = np.array([100 * np.array(part) for part in of.values()]).T
    ends = np.maximum([value - low, high - value], 0)
    ax.bar(np.arange(len(of)) + shift, value, 0.36, yerr=ends, capsize=3, label=label)
ax.set_xticks(range(len(stages)), list(stages))
ax.set(ylabel="share of answers (%)", ylim=(0, 100), title="Violations fall, and false refusals rise")
ax.legend(fontsize=8)
plots.save(fig, "00_safety.png")
if not smoke:
    assert rates["Ghost Attention"].value < rates["fine-tuning"].value

# %% [markdown]
# ## 14. Is it better?
#
# Three ways to ask, those of the paper. People compare the answers of two models to the same prompts (section 3.4.2):
# here three simulated raters, the last model against the fine-tuned one, and most of them decide. A benchmark (section
# 2.3) asks questions with four choices, and takes the one that the model finds likeliest: does it still know what it
# knew? And the judge's scores of every stage, from above.

# %%
gap = gold["Ghost Attention"]["helpfulness"] - gold["fine-tuning"]["helpfulness"]
print(f"raters, helpful prompts: {tally(outcomes(simulated(gap, 0.1)))}")
quiz = mini_rows(CHOICE, 12 if smoke else 400, "test")
print(quiz[0]["question"], quiz[0]["choices"])


def asked_quiz(inputs: dict) -> dict:
    "How many questions have their right choice as the likeliest answer; `inputs`: config, weights, quiz."
    model, pairs = Llama(inputs["config"]), []
    model.load_state_dict(inputs["weights"])
    for row in inputs["quiz"]:
        for text in row["choices"]:
            messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": text}]
            tokens, mask = map(np.array, encode_dialog(mini.tokenizer(), messages))
            pairs.append((tokens[mask == 0].tolist(), tokens[mask == 1].tolist()))
    likely = np.array([found.logprob for found in loglikelihoods(model, pairs)]).reshape(-1, 4)
    return {"right": int((likely.argmax(1) == [row["gold"] for row in inputs["quiz"]]).sum())}


for stage, model in stages.items():
    inputs = {"config": model.config, "weights": model.state_dict(), "quiz": quiz}
    count = cached("tour-quiz", inputs, asked_quiz)["right"]
    share = win_rate_interval(count, len(quiz) - count)
    print(f"{stage:>18}: {share.value:.0%} [{share.low:.0%}, {share.high:.0%}] right of four choices")

# %% [markdown]
# Rejection sampling and PPO take no more of its knowledge than the intervals leave open; Ghost Attention takes some.
#
# The whole way in one picture: means with their 95 % intervals over the prompts of this one run, and the answers of
# each stage to one prompt of either kind.

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(11, 3.4), width_ratios=(1, 1.5))
for shift, value in zip((-0.06, 0.06), tests, strict=True):
    bars = [paired_interval(found[value], np.zeros(len(found[value]))) for found in gold.values()]
    mean, low, high = np.array(bars).T
    left.errorbar(np.arange(len(gold)) + shift, mean, [mean - low, high - mean], fmt="o-", capsize=3, label=value)
left.set_xticks(range(len(gold)), [stage.replace(" ", "\n") for stage in gold], fontsize=7)
left.set(ylabel="gold score (0 to 1)", ylim=(0, 1), title="Helpfulness rises first, then safety")
left.legend(fontsize=8)
place = {value: int(np.argmax(gold["Ghost Attention"][value] - gold["fine-tuning"][value])) for value in tests}
lines = []
for value, at in place.items():
    lines += [(0, tests[value][at][-1]["content"])]
    lines += [(0.03, f"{stage}: {answers[stage][value][at]}") for stage in answers]
right.axis("off")
for number, (indent, text) in enumerate(lines):
    right.text(indent, 1 - number / len(lines), textwrap.shorten(text, 90), fontsize=7.5, va="top",
               weight="normal" if indent else "bold", transform=right.transAxes)  # fmt: skip
plots.save(fig, "00_stages.png")
_ = illustrated("Figure 4", "the stages of training a chat model, one after another, each measured", "00_stages.png")

# %% [markdown]
# ## 15. What it cost
#
# The electricity of this run as a meter saw it (chapter 08; where a processor has no counters to read, as on most
# virtual machines, an estimate from its type and load), and carbon on the paper's grid. A stage that comes from the
# cache costs nothing the second time, so the first run is remembered.

# %%
first = folder / "energy.json"
if meter:
    spent = meter.stop()
    if not first.exists():
        write_atomic(first, json.dumps(asdict(spent)) + "\n")
    print(f"the first run: {Energy(**json.loads(first.read_text('utf-8')))}\nthis run: {spent}")
total = PAPER["Table 2"]["Total"]
print(f"Llama 2: {total['gpu_hours']:,} GPU hours, {total['tco2eq']:,.0f} t")

# %% [markdown]
# ## 16. Chat
#
# Ask it something. In Jupyter the box below takes your messages; in a terminal, `python -m llama2lib.chat` does.

# %%
chat = Chat(final, words, "Language: French.", max_new_tokens=64)
for text in ("Where does Ida live?", "What pet does she have?", "How can I open the gate?"):
    print(f"> {text}\n{''.join(chat.reply(text))}")
save_checkpoint(final, folder / "chat", tokenizer=words)
print(f"\npython -m llama2lib.chat --model {os.path.relpath(folder / 'chat', ROOT)}")

# %% [markdown]
# Whoever gives a model away gives its card with it (appendix A.7, chapter 14): what it is, what it learned from, how it
# was measured, what may go wrong. What the folder and we do not say stays 'not stated'.

# %%
try:
    text = card(CardConfig(folder / "chat", name="The tour's chat model", language=("en",), license="mit",
                           data="made-up dialogues of a made-up world", intended_use="to be looked at"))  # fmt: skip
    print(*(line for line in text.splitlines() if line.startswith("**") and NOT_STATED not in line), sep="\n")
except ImportError as missing:
    print(missing)

# %%
widget(Chat(final, words, max_new_tokens=64))

# %% [markdown]
# ## What comes next
#
# Chapter 01 builds this model from its parts, chapter 02 trains it, chapter 03 teaches it to answer, chapters 04 and
# 05 to answer better, chapter 06 to remember what it was told, chapter 07 asks what makes it safe, chapter 08 what it
# costs, chapters 09 and 14 measure it; chapter 11 shows how such work goes wrong in silence, chapter 12 is the small
# world, and all say where the paper is silent. To load a real Llama 2, give `load_checkpoint` the folder that Meta or
# Hugging Face ships.
