"PPO where it belongs. Every test skips, with its reason, without a GPU (or two)."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llama2lib.checkpoint import load_checkpoint, save_checkpoint
from llama2lib.model import LLAMA2, Llama
from llama2lib.ppo import PPO, PPOConfig, run
from llama2lib.reward import RewardModel
from llama2lib.rollout import Prompt, write_prompts
from llama2lib.tokenizer import train_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> PPOConfig:
    "A chat model and two reward models without training, and prompts."
    folder = tmp_path_factory.mktemp("ppo")
    prompts = [Prompt([{"role": "user", "content": f"What is {a} plus {a}?"}], a % 2 == 0) for a in range(40)]
    write_prompts(folder / "prompts.jsonl", prompts)
    texts = [f"[INST] {prompt.messages[0]['content']} [/INST]" for prompt in prompts]
    tokenizer = train_tokenizer(texts, 290, folder / "tokenizer.model")
    for seed, name in enumerate(("chat", "helpful", "safe")):
        torch.manual_seed(seed)
        model = Llama(replace(LLAMA2["debug"], vocab_size=290))
        if seed:
            model = RewardModel.of(model)
            torch.nn.init.normal_(model.score.weight)
        save_checkpoint(model, folder / name, tokenizer)
    return replace(
        PPO["mini"], model=str(folder / "chat"), helpfulness=str(folder / "helpful"), safety=str(folder / "safe"),
        prompts=folder / "prompts.jsonl", batch=16, minibatch=8, iterations=3, max_new_tokens=16, recompute=True,
    )  # fmt: skip


def log(folder: Path, name: str) -> list[float]:
    return [json.loads(line)[name] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_one_gpu_begins_where_the_samples_come_from(recipe, tmp_path):
    "Generation in bfloat16, log-probabilities recomputed: the first ratio is 1, and the policy moves."
    folder = run(replace(recipe, out=tmp_path))
    assert max(log(tmp_path, "ratio")) < 1e-2 and log(tmp_path, "kl")[0] == pytest.approx(0, abs=1e-2)
    before, after = (load_checkpoint(path).state_dict() for path in (recipe.model, folder))
    assert any(not torch.equal(weight, after[name].to(weight)) for name, weight in before.items())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
def test_two_gpus_share_the_prompts(recipe, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "llama2lib.ppo", "mini", "--out", str(tmp_path), "--recompute"]
    for name in ("model", "helpfulness", "safety", "prompts", "batch", "minibatch", "iterations", "max_new_tokens"):
        command += [f"--{name.replace('_', '-')}", str(getattr(recipe, name))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT, env=os.environ)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert len(log(tmp_path, "loss")) == 3 and max(log(tmp_path, "ratio")) < 1e-2
