# %% [markdown]
# # The tour
#
# > From raw text to a small Llama 2 that writes, and on to one that answers, in ten minutes on a laptop and without a
# > network. Each stage is one call into the library; the chapters explain what is inside.
#
# The paper's pipeline begins with text and a tokenizer, trains a base model on it (section 2), and fine-tunes that on
# dialogues (section 3). This tour does the same with a million parameters instead of seventy billion.
#
# > Ours: the text, and every size. (Paragraphs that begin with 'Ours' say where we choose or differ.) Later chapters
# > add the stages that make it a better chat model.

# %%
import math
import os
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

from llama2lib import mini, plots, synthetic
from llama2lib.chat import Chat, respond, widget
from llama2lib.checkpoint import load_checkpoint, save_checkpoint
from llama2lib.corpus import Source, describe, mix, packaged_sources, read_documents, shares, token_stream
from llama2lib.generation import generate
from llama2lib.judge import scores
from llama2lib.model import LLAMA2, Llama
from llama2lib.pretrain import PRETRAIN, held_out_loss, pretrain
from llama2lib.recipes import ROOT, cache_folder, cached, scale
from llama2lib.tokenizer import train_tokenizer

plt.rcParams.update(plots.STYLE)
smoke = scale() == "smoke"

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
# turn it into a model that answers (section 3.1): one minute. The prompts below are about people and things, and in
# wordings, that no dialogue had.

# %%
[dialogue] = synthetic.dialogues(np.random.default_rng(4), 1, turns=(0.0, 1.0))
for message in dialogue:
    print(f"{message['role']:>10}: {message['content']}")
chat_model = mini.chat()
asked = synthetic.prompts(np.random.default_rng(1), 24 if smoke else 200, "test")
for name, each in (("before", world_model), ("after", chat_model)):
    helpful = scores(asked, respond(each, words, asked, 64))[:, 0].mean()
    print(f"{name} fine-tuning: helpfulness {helpful:.2f} of 1")
if not smoke:
    assert helpful > 0.5

# %% [markdown]
# ## 9. Chat
#
# Ask it something. In Jupyter the box below takes your messages; in a terminal, `python -m llama2lib.chat` does.

# %%
chat = Chat(chat_model, words, max_new_tokens=64)
for text in ("Where does Ida live?", "What pet does she have?", "How can I open the gate?"):
    print(f"> {text}\n{''.join(chat.reply(text))}")
save_checkpoint(chat_model, folder / "chat", tokenizer=words)
print(f"\npython -m llama2lib.chat --model {os.path.relpath(folder / 'chat', ROOT)}")

# %%
widget(Chat(chat_model, words, max_new_tokens=64))

# %% [markdown]
# ## What comes next
#
# Chapter 01 builds this model from its parts, chapter 02 trains it, chapter 03 teaches it to answer, and all say where
# the paper is silent; chapter 12 is the small world. To load a real Llama 2, give `load_checkpoint` the folder that
# Meta or Hugging Face ships.
