"""Shared pieces: small random models of every attention kind, the real tokenizer, a cache that is thrown away."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2lib.checkpoint import save_checkpoint
from llama2lib.dialog import encode_dialog
from llama2lib.model import LLAMA2, Llama
from llama2lib.recipes import data_file
from llama2lib.reward import RewardModel
from llama2lib.rollout import Prompt, write_prompts
from llama2lib.sft import SFTConfig, sft
from llama2lib.tokenizer import train_tokenizer

SHAPES = {
    "MHA": dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=176, vocab_size=128),
    "GQA": dict(dim=64, n_layers=3, n_heads=8, n_kv_heads=2, hidden_dim=100, vocab_size=97),
    "MQA": dict(dim=48, n_layers=2, n_heads=6, n_kv_heads=1, hidden_dim=52, vocab_size=131),
}


@pytest.fixture(autouse=True, scope="session")
def throwaway_cache(tmp_path_factory):
    os.environ["LLAMA2_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def one_thread():
    "Tiny matrices are faster without threads, and sums are in one order on every machine."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_model(shape: str = "GQA", seed: int = 0, **changes) -> Llama:
    "A model whose weights are large enough that every one of them shows in the logits."
    torch.manual_seed(seed)
    model = Llama(replace(LLAMA2["debug"], **{**SHAPES[shape], "max_seq_len": 128, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0, 0.3) if name.endswith("norm.weight") else parameter.normal_(0, 0.12)
    return model


def dies_after(loop, steps: int):
    "A training loop that raises RuntimeError, 'told to die', behind so many steps."

    def dying(*args):
        for step in loop(*args):
            yield step
            if step.step + 1 == steps:
                raise RuntimeError("told to die")

    return dying


@torch.no_grad()
def greedy(model, prompt: list[int], new_tokens: int = 64) -> list[int]:
    "The likeliest continuation, computed without a cache."
    tokens = torch.tensor([prompt])
    for _ in range(new_tokens):
        tokens = torch.cat((tokens, model(tokens)[:, -1:].argmax(-1)), 1)
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(params=SHAPES)
def model(request) -> Llama:
    return random_model(request.param)


@pytest.fixture
def real_tokenizer_file():
    file = data_file("llama2-tokenizer/tokenizer.model")
    if file is None:
        pytest.skip("needs llama2-tokenizer/tokenizer.model under LLAMA2_DATA")
    return file


def torchrun(*arguments, timeout: int = 300, **environment: str) -> str:
    "What processes under torchrun print; where one of them fails, the end of what they and torchrun complained."
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    ran = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=os.environ | environment)
    assert ran.returncode == 0, ran.stderr[-8000:]  # torchrun's own report takes up to half of it
    return ran.stdout


NUMBERS = "one two three four five six seven eight nine ten".split()
NUMBER_PROMPTS = [Prompt([{"role": "user", "content": " ".join(NUMBERS[n : n + 2])}], n % 3 == 0) for n in range(9)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    "Of words for numbers, and the tags of the chat format."
    texts = [*NUMBERS, "[INST] [/INST] [INST]\n"] * 50
    return train_tokenizer(texts, 320, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def chat(tokenizer):
    "A model that answers with some of NUMBERS at random."
    random = np.random.default_rng(0)
    model = random_model("GQA", vocab_size=tokenizer.vocab_size)
    said = [" ".join(random.choice(NUMBERS, random.integers(1, 5))) for _ in range(300)]
    dialogs = [[*NUMBER_PROMPTS[n % 9].messages, {"role": "assistant", "content": text}] for n, text in enumerate(said)]
    recipe = SFTConfig(lr=1e-2, batch_rows=16, max_seq_len=64, epochs=2, block_diagonal=True)
    for _ in sft(model, [encode_dialog(tokenizer, messages) for messages in dialogs], recipe):
        pass
    return model


@pytest.fixture
def folders(chat, tokenizer, tmp_path):
    "The chat model, two reward models and the prompts on disk: chat, helpful, safe, prompts.jsonl."
    save_checkpoint(chat, tmp_path / "chat", tokenizer)
    for name, seed in ("helpful", 1), ("safe", 2):
        scoring = RewardModel.of(random_model("MHA", seed=seed, vocab_size=tokenizer.vocab_size))
        torch.nn.init.normal_(scoring.score.weight, generator=torch.Generator().manual_seed(seed))
        save_checkpoint(scoring, tmp_path / name, tokenizer)
    write_prompts(tmp_path / "prompts.jsonl", NUMBER_PROMPTS)
    return tmp_path
