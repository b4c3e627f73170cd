"Reward models where they belong. Every test skips, with its reason, without a GPU (or two)."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from llama2lib.checkpoint import load_checkpoint, save_checkpoint
from llama2lib.model import LLAMA2, Llama
from llama2lib.preferences import write_preferences
from llama2lib.reward import REWARD, RewardConfig, RewardModel, accuracy, run, score_pairs
from llama2lib.tokenizer import Tokenizer, train_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROOT = Path(__file__).resolve().parents[2]


def sums() -> list[dict]:
    "Comparisons of a right and a wrong sum; the right one says so."
    rows = []
    for a in range(16):
        for b in range(16):
            row = {"messages": [{"role": "user", "content": f"What is {a} plus {b}?"}], "source": "sums"}
            row |= {"chosen": f"Sure, it is {a + b}.", "rejected": f"It is {a + b + 1}."}
            rows.append(row | {"rating": "better", "safety": "chosen_safe"})
    return rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> RewardConfig:
    "A chat model without training, and its comparisons."
    folder = tmp_path_factory.mktemp("reward")
    write_preferences(folder / "sums.jsonl", sums())
    texts = [f"[INST] {row['messages'][0]['content']} [/INST] {row['chosen']} {row['rejected']}" for row in sums()]
    tokenizer = train_tokenizer(texts, 290, folder / "tokenizer.model")
    torch.manual_seed(0)
    save_checkpoint(Llama(replace(LLAMA2["debug"], vocab_size=290)), folder / "chat", tokenizer)
    recipe = replace(REWARD["mini"], model=str(folder / "chat"), data=folder / "sums.jsonl", max_seq_len=128)
    return replace(recipe, auxiliary=0.5, min_warmup=0)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_gpu_learns_which_answer_is_better_and_scores_as_a_cpu_does(recipe, tmp_path):
    run(replace(recipe, out=tmp_path))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 0.3
    words, rows = Tokenizer(tmp_path / "model"), sums()[:32]
    on_cpu, on_gpu = (
        score_pairs(load_checkpoint(tmp_path / "model", device, torch.float32, RewardModel), words, rows)
        for device in ("cpu", "cuda")
    )
    assert accuracy(on_gpu, rows)["all"] > 0.9 and np.allclose(on_cpu, on_gpu, atol=1e-2)


@pytest.mark.parametrize("options", [[], ["--tp", "2"], ["--ac", "full"]])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_learn_what_one_learns(recipe, tmp_path, options):
    run(replace(recipe, out=tmp_path / "one"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "llama2lib.reward", "mini", "--model", recipe.model, "--data", str(recipe.data)]
    command += ["--max-seq-len", "128", "--auxiliary", "0.5", "--min-warmup", "0", "--out", str(tmp_path / "two")]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, cwd=ROOT, env=os.environ)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-2)  # bfloat16
