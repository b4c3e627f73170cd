"""PPO iterations beside TRL's PPOTrainer, as a ratio: same weights, prompts, answers' lengths, steps and threads.

python tests/benchmarks/ppo.py --pairs 7      needs pip install -e '.[bench]'
"""

import json
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from datasets import Dataset
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import __version__ as trl_version
from trl.experimental.ppo import PPOConfig as TheirConfig
from trl.experimental.ppo import PPOTrainer

from llama2lib.checkpoint import save_checkpoint
from llama2lib.dialog import encode_dialog
from llama2lib.model import LLAMA2, Llama, swiglu_width
from llama2lib.ppo import PPO, ppo
from llama2lib.recipes import write_atomic
from llama2lib.reward import RewardModel, score
from llama2lib.rollout import Prompt, Reward, policy_of, value_of
from llama2lib.sft import SFT, sft
from llama2lib.synthetic import dialogues, documents, prompts
from llama2lib.tokenizer import train_tokenizer

VOCABULARY, ITERATIONS = 1024, 4


def main(widths: tuple[int, ...] = (128, 256), pairs: int = 7, threads: int = 1, save: bool = True):
    """Time PPO on prompts of the mini world, with one reward model; store the ratios beside this file.

    Args:
        widths: model widths.
        pairs: interleaved pairs of runs; the median ratio counts.
        threads: threads PyTorch may use.
        save: write ppo.json.
    """
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(Path(folder), width, pairs) for width in widths]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread, PyTorch {torch.__version__}"
    print(f"\n{machine}, TRL {trl_version}; above 1: ours is faster\n\nwidth  ratio   (low-high)  s an iteration")
    for r in results:
        print(f"{r['width']:5} {r['ratio']:6.2f} ({r['low']:.2f}-{r['high']:.2f}) {r['seconds']:9.2f}")
    if save:
        stored = {"machine": f"{machine}, TRL {trl_version}", "results": results}
        write_atomic(Path(__file__).with_name("ppo.json"), json.dumps(stored, indent=1) + "\n")


def compare(folder: Path, width: int, pairs: int) -> dict:
    "Times of ITERATIONS iterations, TRL's and ours in turn, each from the same weights."
    random = np.random.default_rng(0)
    tokenizer = train_tokenizer(documents(random, 3000), VOCABULARY, folder / "tokenizer.model")
    recipe = replace(PPO["mini"], iterations=ITERATIONS, max_new_tokens=48, unfinished=0.0)
    heads = width // 32
    shape = dict(dim=width, n_heads=heads, n_kv_heads=heads // 2, hidden_dim=swiglu_width(width, 8))
    torch.manual_seed(0)
    chat = Llama(replace(LLAMA2["book-1M"], vocab_size=VOCABULARY, **shape))
    examples = [encode_dialog(tokenizer, messages) for messages in dialogues(random, 800)]
    for _ in sft(chat, examples, replace(SFT["mini"], lr=3e-3)):  # so that answers end, after some tokens
        pass
    scoring = RewardModel.of(chat)
    torch.nn.init.normal_(scoring.score.weight, std=0.1)
    save_checkpoint(chat, folder / "chat")
    save_checkpoint(scoring, folder / "reward")
    asked = [Prompt(messages, False) for messages in prompts(random, recipe.batch * ITERATIONS, "train")]

    def ours():
        policy, reference, value = policy_of(chat), policy_of(chat), value_of(scoring)
        reward = Reward(partial(score, scoring, tokenizer, batch=recipe.micro_batch))
        start = time.perf_counter()
        steps = list(ppo(policy, reference, value, tokenizer, asked, reward, recipe))
        return time.perf_counter() - start, steps[-1].tokens / (recipe.batch * ITERATIONS)

    word_level = FastTokenizer(WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, "<0>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<2>", pad_token="<0>", padding_side="left")
    rows = [encode_dialog(tokenizer, prompt.messages)[0] for prompt in asked]
    table = Dataset.from_dict({"input_ids": rows})
    parts = recipe.batch // recipe.micro_batch

    def theirs(most: int):
        networks = [AutoModelForCausalLM.from_pretrained(folder / "chat") for _ in "pr"]
        scorers = [AutoModelForSequenceClassification.from_pretrained(folder / "reward") for _ in "vr"]
        settings = TheirConfig(
            output_dir=str(folder / "trl"), per_device_train_batch_size=recipe.micro_batch,
            gradient_accumulation_steps=parts, num_mini_batches=recipe.batch // recipe.minibatch, num_ppo_epochs=1,
            total_episodes=recipe.batch * ITERATIONS, response_length=recipe.max_new_tokens, stop_token="eos",
            temperature=recipe.temperature, kl_coef=recipe.beta, learning_rate=recipe.lr, bf16=False,
            local_rollout_forward_batch_size=most, gradient_checkpointing=False, num_sample_generations=0,
            use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1000,
        )  # fmt: skip
        trainer = PPOTrainer(
            settings, fast, networks[0], networks[1], scorers[1], table, scorers[0],
            eval_dataset=table.select(range(8)),
        )  # fmt: skip
        start = time.perf_counter()
        trainer.train()
        return time.perf_counter() - start

    times, sizes = {"ours": [], "theirs": []}, (8, 64)  # of TRL's forward passes: the faster one counts
    ours()
    most = min(sizes, key=theirs)
    for _ in tqdm(range(pairs), leave=False):
        seconds, length = ours()
        times["ours"].append(seconds)
        times["theirs"].append(theirs(most))
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    spread = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {"width": width} | spread | {"seconds": statistics.median(times["ours"]) / ITERATIONS, "length": length}


if __name__ == "__main__":
    tyro.cli(main)
