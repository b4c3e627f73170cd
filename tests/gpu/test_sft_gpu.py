"Fine-tuning where it belongs. Every test skips, with its reason, without a GPU (or two)."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama2lib.checkpoint import save_checkpoint
from llama2lib.dialog import write_dialogs
from llama2lib.model import LLAMA2, Llama
from llama2lib.sft import SFT, SFTConfig, run
from llama2lib.tokenizer import train_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> SFTConfig:
    "A base model, and 400 sums to learn."
    folder = tmp_path_factory.mktemp("sft")
    sums = [(f"What is {a} plus {b}?", f"It is {a + b}.") for a in range(20) for b in range(20)]
    write_dialogs(
        folder / "sums.jsonl",
        [[{"role": "user", "content": asked}, {"role": "assistant", "content": told}] for asked, told in sums],
    )
    tokenizer = train_tokenizer([f"[INST] {a} [/INST] {b}" for a, b in sums], 290, folder / "tokenizer.model")
    torch.manual_seed(0)
    save_checkpoint(Llama(replace(LLAMA2["debug"], vocab_size=290)), folder / "base", tokenizer)
    return replace(SFT["mini"], model=str(folder / "base"), data=folder / "sums.jsonl", max_seq_len=128, epochs=4)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("block_diagonal", [False, True])
def test_one_gpu_learns_the_answers(recipe, tmp_path, block_diagonal):
    run(replace(recipe, out=tmp_path, block_diagonal=block_diagonal))
    assert losses(tmp_path)[-1] < losses(tmp_path)[0] - 1


@pytest.mark.parametrize("options", [[], ["--tp", "2"], ["--ac", "selective", "--compile"]])
@pytest.mark.parametrize("block_diagonal", [False, True])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_learn_what_one_learns(recipe, tmp_path, block_diagonal, options):
    run(replace(recipe, out=tmp_path / "one", block_diagonal=block_diagonal))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "llama2lib.sft", "mini", "--model", recipe.model, "--data", str(recipe.data)]
    command += ["--max-seq-len", "128", "--epochs", "4", "--out", str(tmp_path / "two"), *options]
    command += ["--block-diagonal"] if block_diagonal else []
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=os.environ)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-2)  # bfloat16
