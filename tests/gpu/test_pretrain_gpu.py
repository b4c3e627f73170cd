"Pretraining where it belongs. Every test skips, with its reason, without a GPU (or two)."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from llama2lib.checkpoint import load_checkpoint
from llama2lib.pretrain import PretrainConfig, run
from llama2lib.shards import write_shards
from llama2lib.tokenizer import train_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROOT = Path(__file__).resolve().parents[2]
RECIPE = dict(lr=3e-3, warmup_steps=4, batch_tokens=8 * 128, tokens=20 * 8 * 128, max_seq_len=128, micro_batch=4)
OPTIONS = [word for name, value in RECIPE.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    texts = list(topics.values())[:30]
    write_shards(folder, train_tokenizer(texts, 512, folder / "tokenizer.model"), texts)
    return folder


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_gpu_trains_in_bfloat16_over_float32_weights(shards, tmp_path):
    run(PretrainConfig("debug", data=shards, out=tmp_path, save_every=10, **RECIPE))
    lines = log(tmp_path)
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5 and lines[-1]["peak_memory_GiB"] > 0
    assert load_checkpoint(tmp_path / "model").tok_embeddings.weight.dtype == torch.bfloat16


def test_a_run_goes_on_from_a_checkpoint_written_in_the_background(shards, tmp_path):
    whole = PretrainConfig("debug", data=shards, out=tmp_path / "whole", save_every=10, **RECIPE)
    run(whole)
    run(replace(whole, out=tmp_path / "parts"))
    (tmp_path / "parts" / "latest").write_text("step-00000010\n")
    run(replace(whole, out=tmp_path / "parts"))
    expected = [line["loss"] for line in log(tmp_path / "whole")]
    assert [line["loss"] for line in log(tmp_path / "parts")] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("options", [[], ["--tp", "2"], ["--ac", "selective", "--compile"], ["--ac", "full"]])
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_learn_what_one_learns(shards, tmp_path, options):
    run(PretrainConfig("debug", data=shards, out=tmp_path / "one", **RECIPE))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "llama2lib.pretrain", "book-1M", "--model", "debug", "--data", str(shards)]
    command += ["--out", str(tmp_path / "two"), *OPTIONS, *options]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=os.environ)
    assert ran.returncode == 0, ran.stderr[-4000:]
    one, two = ([line["loss"] for line in log(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-2)  # bfloat16
