"""Supervised fine-tuning beside TRL's SFTTrainer, as a ratio: same weights, conversations, packing, steps and threads.

python tests/benchmarks/sft.py --pairs 7      needs pip install -e '.[bench]'
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
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig as TheirConfig
from trl import SFTTrainer
from trl import __version__ as trl_version

from llama2lib.checkpoint import save_checkpoint
from llama2lib.dialog import encode_dialog
from llama2lib.distributed import Parallel
from llama2lib.model import LLAMA2, Llama, swiglu_width
from llama2lib.optim import adamw
from llama2lib.pretrain import IGNORE
from llama2lib.recipes import write_atomic
from llama2lib.sft import SFT, Batches, sft
from llama2lib.synthetic import dialogues, documents
from llama2lib.tokenizer import train_tokenizer

VOCABULARY, STEPS = 1024, 30


def main(widths: tuple[int, ...] = (128, 256), pairs: int = 7, threads: int = 1, save: bool = True):
    """Time fine-tuning on the mini world; store the ratios beside this file.

    Args:
        widths: model widths.
        pairs: interleaved pairs; the median ratio counts.
        threads: threads PyTorch may use.
        save: write sft.json.
    """
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(Path(folder), width, pairs) for width in widths]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread, PyTorch {torch.__version__}"
    print(f"\n{machine}, TRL {trl_version}; above 1: ours is faster\n\nwidth  ratio   (low-high)  answer tokens/s")
    for one in results:
        for name in ("eager", "compiled"):
            r = one[name]
            print(f"{one['width']:5} {r['ratio']:6.2f} ({r['low']:.2f}-{r['high']:.2f}) {r['tokens/s']:9,.0f}  {name}")
    if save:
        stored = {"machine": f"{machine}, TRL {trl_version}", "results": results}
        write_atomic(Path(__file__).with_name("sft.json"), json.dumps(stored, indent=1) + "\n")


def compare(folder: Path, width: int, pairs: int) -> dict:
    "Times of STEPS steps: TRL's, ours, ours compiled, in turn, each from the same weights."
    random = np.random.default_rng(0)
    tokenizer = train_tokenizer(documents(random, 3000), VOCABULARY, folder / "tokenizer.model")
    examples = [encode_dialog(tokenizer, messages) for messages in dialogues(random, 1200)]
    heads = width // 32
    shape = dict(dim=width, n_heads=heads, n_kv_heads=heads // 2, hidden_dim=swiglu_width(width, 8))
    torch.manual_seed(0)
    config = replace(LLAMA2["book-1M"], vocab_size=VOCABULARY, **shape)
    weights = Llama(config).state_dict()
    recipe = replace(SFT["mini"], epochs=1, warmup=0.0, block_diagonal=False)

    def ours(compile: bool):
        model = Llama(config)
        model.load_state_dict(weights)
        optimizer = adamw(model, recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay)
        steps = sft(model, examples, replace(recipe, parallel=Parallel(compile=compile)), optimizer)
        start, losses = time.perf_counter(), []
        for step in steps:
            losses.append(step.loss)
            if len(losses) == STEPS:
                return time.perf_counter() - start, losses

    model = Llama(config)
    model.load_state_dict(weights)
    save_checkpoint(model, folder / "model")
    word_level = FastTokenizer(WordLevel({f"<{i}>": i for i in range(VOCABULARY)}, "<0>"))
    fast = PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="<2>", pad_token="<0>")
    data = Dataset.from_dict({"input_ids": [t for t, _ in examples], "assistant_masks": [m for _, m in examples]})
    settings = TheirConfig(
        output_dir=str(folder / "trl"), packing=True, packing_strategy="wrapped", max_length=recipe.max_seq_len,
        per_device_train_batch_size=recipe.batch_rows, max_steps=STEPS, learning_rate=recipe.lr, weight_decay=0.1,
        adam_beta2=0.95, adam_epsilon=1e-5, max_grad_norm=1.0, lr_scheduler_type="cosine", warmup_steps=0,
        gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none", save_strategy="no",
        logging_strategy="no", disable_tqdm=True, loss_type="nll",
    )  # fmt: skip

    def theirs():
        network = AutoModelForCausalLM.from_pretrained(folder / "model", attn_implementation="sdpa")
        trainer = SFTTrainer(network, args=settings, train_dataset=data, processing_class=fast)
        start = time.perf_counter()
        result = trainer.train()
        return time.perf_counter() - start, result.training_loss

    batches = Batches(examples, recipe)
    answers = sum(int((batches.rows(step).targets != IGNORE).sum()) for step in range(STEPS))
    _, losses = ours(False)
    _, loss = theirs()
    assert abs(np.mean(losses) - loss) < 0.05 * loss, (np.mean(losses), loss)  # the same work, in another order
    times = {"eager": [], "compiled": [], "theirs": []}
    ours(True)
    for _ in tqdm(range(pairs), leave=False):
        times["eager"].append(ours(False)[0])
        times["theirs"].append(theirs()[0])
        times["compiled"].append(ours(True)[0])
    found = {"width": width}
    for name in ("eager", "compiled"):
        ratios = [b / a for a, b in zip(times[name], times["theirs"], strict=True)]
        spread = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        found[name] = spread | {"tokens/s": answers / statistics.median(times[name])}
    return found


if __name__ == "__main__":
    tyro.cli(main)
