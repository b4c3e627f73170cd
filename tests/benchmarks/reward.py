"""Reward-model training beside TRL's RewardTrainer, as a ratio: same weights, ragged pairs, steps and threads.

python tests/benchmarks/reward.py --pairs 7      needs pip install -e '.[bench]'
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
from pathlib import Path

import numpy as np
import torch
import tyro
from datasets import Dataset
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import RewardConfig as TheirConfig
from trl import RewardTrainer
from trl import __version__ as trl_version

from llama2lib.checkpoint import save_checkpoint
from llama2lib.model import LLAMA2, Llama, swiglu_width
from llama2lib.preferences import collect, written
from llama2lib.recipes import write_atomic
from llama2lib.reward import REWARD, RewardModel, encode_pair, pair_rows, train_reward
from llama2lib.synthetic import MIXED, dialogues, documents
from llama2lib.tokenizer import train_tokenizer

VOCABULARY, STEPS = 1024, 10


def main(widths: tuple[int, ...] = (128, 256), pairs: int = 7, threads: int = 1, save: bool = True):
    """Time reward-model training on comparisons of the mini world; store the ratios beside this file.

    Args:
        widths: model widths.
        pairs: interleaved pairs of runs; the median ratio counts.
        threads: threads PyTorch may use.
        save: write reward.json.
    """
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(Path(folder), width, pairs) for width in widths]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread, PyTorch {torch.__version__}"
    print(f"\n{machine}, TRL {trl_version}; above 1: ours is faster\n\nwidth  ratio   (low-high)  our pairs/s")
    for r in results:
        print(f"{r['width']:5} {r['ratio']:6.2f} ({r['low']:.2f}-{r['high']:.2f}) {r['pairs/s']:9,.0f}")
    if save:
        stored = {"machine": f"{machine}, TRL {trl_version}", "results": results}
        write_atomic(Path(__file__).with_name("reward.json"), json.dumps(stored, indent=1) + "\n")


def compare(folder: Path, width: int, pairs: int) -> dict:
    "Times of STEPS steps, TRL's and ours in turn, each from the same weights."
    random = np.random.default_rng(0)
    tokenizer = train_tokenizer(documents(random, 3000), VOCABULARY, folder / "tokenizer.model")
    recipe = replace(REWARD["mini"], min_warmup=0, warmup=0.0)
    asked = [messages[:-1] for messages in dialogues(random, 1200, turns=(0.85, 0.1, 0.05))]
    brief = {"full": 0.3, "terse": 0.35, "repetitive": 0.35}
    rows, _ = collect([[written(MIXED)], [written(brief)]], asked, "helpfulness", 0, "benchmark")
    data = [encode_pair(tokenizer, row, "small") for row in rows[: STEPS * recipe.batch_pairs]]
    heads = width // 32
    shape = dict(dim=width, n_heads=heads, n_kv_heads=heads // 2, hidden_dim=swiglu_width(width, 8))
    torch.manual_seed(0)
    config = replace(LLAMA2["book-1M"], vocab_size=VOCABULARY, **shape)
    first = RewardModel.of(Llama(config))
    save_checkpoint(first, folder / "model")

    def ours():
        model = RewardModel(config)
        model.load_state_dict(first.state_dict())
        start = time.perf_counter()
        losses = [step.loss for step in train_reward(model, data, recipe)]
        return time.perf_counter() - start, np.mean(losses)

    word_level = FastTokenizer(WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, "<0>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<2>", pad_token="<0>")
    table = Dataset.from_dict({
        "chosen_ids": [pair.prompt + pair.chosen for pair in data],
        "rejected_ids": [pair.prompt + pair.rejected for pair in data],
        "margin": [pair.margin for pair in data],
    })  # fmt: skip
    passes = recipe.batch_pairs // recipe.micro_batch  # faster for TRL, here, than the batch in one pass
    settings = TheirConfig(
        output_dir=str(folder / "trl"), max_length=recipe.max_seq_len, per_device_train_batch_size=recipe.micro_batch,
        gradient_accumulation_steps=passes, max_steps=STEPS, learning_rate=recipe.lr, lr_scheduler_type="cosine",
        warmup_steps=0, weight_decay=0.1, adam_beta2=0.95, adam_epsilon=1e-5, max_grad_norm=1.0, bf16=False,
        gradient_checkpointing=False, use_cpu=True, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip

    def theirs():
        network = AutoModelForSequenceClassification.from_pretrained(folder / "model", attn_implementation="sdpa")
        trainer = RewardTrainer(network, args=settings, train_dataset=table, processing_class=fast)
        start = time.perf_counter()
        result = trainer.train()
        return time.perf_counter() - start, result.training_loss

    network = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    torch.nn.init.ones_(network.score.weight)
    scoring = RewardModel(config)
    scoring.load_state_dict(first.state_dict() | {"score.weight": torch.ones(1, width)})
    with torch.no_grad():
        alone = [network(torch.tensor([pair.prompt + pair.chosen])).logits.item() for pair in data[:32]]
        assert torch.allclose(scoring(*pair_rows(data[:32]))[:, 0], torch.tensor(alone), atol=1e-3)  # the same scores
    (_, loss), (_, other) = ours(), theirs()
    assert abs(loss - other) < 0.05 * other, (loss, other)  # the same work, in another order
    times = {"ours": [], "theirs": []}
    for _ in tqdm(range(pairs), leave=False):
        times["ours"].append(ours()[0])
        times["theirs"].append(theirs()[0])
    ratios = [b / a for a, b in zip(*times.values(), strict=True)]
    spread = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {"width": width} | spread | {"pairs/s": len(data) / statistics.median(times["ours"])}


if __name__ == "__main__":
    tyro.cli(main)
