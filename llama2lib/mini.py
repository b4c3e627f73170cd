"""Generated from chapters/03_sft.py by chapters/export.py; edit the chapter."""

__all__ = [
    "KINDS",
    "VOCABULARY",
    "SIZES",
    "SIZE",
    "DIALOGUES",
    "TEXTS",
    "BASE",
    "tokenizer",
    "watched",
    "pretrained",
    "fine_tuned",
    "loaded",
    "base",
    "tuned",
    "taught",
    "chat",
]


# ---------- chapters/03_sft.py · A chat model of the mini world

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from llama2lib.corpus import token_stream
from llama2lib.dialog import Message, encode_dialog
from llama2lib.model import LLAMA2, Llama
from llama2lib.pretrain import PRETRAIN, Step, pretrain
from llama2lib.recipes import by_scale, cache_folder, cached, source_digest
from llama2lib.sft import SFT, Batches, SFTConfig, sft
from llama2lib.synthetic import HELPFUL, dialogues, documents
from llama2lib.tokenizer import Tokenizer, train_tokenizer

KINDS = HELPFUL | {"adversarial": 3, "borderline": 1}  # what the dialogues for fine-tuning ask
VOCABULARY = 2048  # at 1,024 most names fall into several pieces (chapter 12)
SIZES = {  # parameters
    "0.4M": replace(LLAMA2["book-1M"], vocab_size=VOCABULARY, dim=64, n_layers=2, hidden_dim=176),
    "1.3M": replace(LLAMA2["book-1M"], vocab_size=VOCABULARY),
    "2.4M": replace(LLAMA2["book-2M"], vocab_size=VOCABULARY),
}
SIZE = "1.3M"  # of the models that later chapters begin with
DIALOGUES = by_scale(smoke=60, laptop=3000, a100=3000)
TEXTS = by_scale(smoke=2000, laptop=125_000, a100=125_000)  # documents to pretrain on
BASE = replace(PRETRAIN["book-1M"], lr=4e-3, max_seq_len=128, batch_tokens=1024, micro_batch=8)
BASE = replace(BASE, tokens=by_scale(smoke=60 * 1024, laptop=3_000_000, a100=3_000_000))


def tokenizer() -> Tokenizer:
    "The vocabulary of the mini world, of VOCABULARY pieces."
    made_of = source_digest("import llama2lib.synthetic, llama2lib.tokenizer")[:12]
    path = cache_folder() / "mini" / f"tokenizer-{made_of}.model"
    if path.exists():
        return Tokenizer(path)
    return train_tokenizer(documents(np.random.default_rng(0), 20_000), VOCABULARY, path)


def watched(steps: Iterator[Step], total: int, title: str) -> list[float]:
    "Run a training loop with a progress bar; its losses."
    bar, losses = tqdm(steps, total=total, desc=title, unit="step", leave=False), []
    for step in bar:
        losses.append(step.loss)
        bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
    return losses


def pretrained(inputs: dict) -> dict:
    "Weights and losses of a base model; `inputs`: seed, size, recipe, number of documents."
    seed, recipe = inputs["seed"], inputs["recipe"]
    stream = token_stream(tokenizer(), documents(np.random.default_rng([1, seed]), inputs["documents"]))
    torch.manual_seed(seed)
    model = Llama(SIZES[inputs["size"]])
    losses = watched(pretrain(model, stream, recipe, seed), recipe.steps, "pretraining")
    return {"weights": model.state_dict(), "loss": losses}


def fine_tuned(inputs: dict) -> dict:
    "Weights and losses after fine-tuning a base model; `inputs`: seed, size, recipe, dialogs."
    recipe, words = inputs["recipe"], tokenizer()
    examples = [encode_dialog(words, messages) for messages in inputs["dialogs"]]
    model, batches = base(inputs["seed"], inputs["size"]), Batches(examples, recipe)
    losses = watched(sft(model, examples, recipe), len(batches), "fine-tuning")
    return {"weights": model.state_dict(), "loss": losses}


def loaded(size: str, weights: dict) -> Llama:
    "A model of the mini world with these weights."
    model = Llama(SIZES[size])
    model.load_state_dict(weights)
    return model


def base(seed: int = 0, size: str = SIZE) -> Llama:
    "The pretrained model of a seed, of one of SIZES."
    inputs = {"seed": seed, "size": size, "recipe": BASE, "documents": TEXTS}
    return loaded(size, cached(f"mini-base-{size}-seed{seed}", inputs, pretrained)["weights"])


def tuned(seed: int, dialogs: list[list[Message]], recipe: SFTConfig = SFT["mini"], size: str = SIZE) -> Llama:
    "The base model of a seed after fine-tuning on dialogs."
    inputs = {"seed": seed, "size": size, "recipe": replace(recipe, seed=seed), "dialogs": dialogs}
    return loaded(size, cached(f"mini-tuned-{size}-seed{seed}", inputs, fine_tuned)["weights"])


def taught(seed: int = 0) -> list[list[Message]]:
    "The dialogues that the chat model of a seed learns from, of mixed quality."
    return dialogues(np.random.default_rng([2, seed]), DIALOGUES, kinds=KINDS)


def chat(seed: int = 0, size: str = SIZE) -> Llama:
    "The chat model of a seed: the base model after fine-tuning on the dialogues it is taught."
    return tuned(seed, taught(seed), size=size)
