"""Timings beside transformers, as ratios: the median of interleaved pairs in one run, same weights, same dtype.

make bench                 all sizes
python tests/benchmarks/run.py --widths 128 --pairs 5
"""

import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from llama2lib.checkpoint import save_checkpoint
from llama2lib.generation import generate
from llama2lib.model import LLAMA2, Llama, swiglu_width
from llama2lib.pretrain import next_token_loss
from llama2lib.recipes import write_atomic

TRAINING_ROWS, TRAINING_TOKENS, NEW_TOKENS = 16, 256, 64


def pair(width: int):
    "Our model and transformers', with the same random weights."
    heads = width // 32
    shape = replace(
        LLAMA2["book-1M"],
        dim=width,
        n_heads=heads,
        n_kv_heads=heads // 2,
        hidden_dim=swiglu_width(width, 8),
        vocab_size=2048,
    )
    torch.manual_seed(0)
    ours = Llama(shape)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(ours, Path(folder) / "model")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", attn_implementation="sdpa")
    return ours, theirs


def seconds(task) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def compare(ours, theirs, pairs: int) -> tuple[float, float]:
    "Median of their time over ours, and of our time, over interleaved runs after one warm-up each."
    ours(), theirs()
    times = [(seconds(ours), seconds(theirs)) for _ in tqdm(range(pairs), leave=False)]
    return statistics.median(b / a for a, b in times), statistics.median(a for a, _ in times)


def training(width: int, pairs: int) -> dict:
    ours, theirs = pair(width)
    batch = torch.randint(2048, (TRAINING_ROWS, TRAINING_TOKENS + 1))
    rows = batch[:, :-1], batch[:, 1:]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5) for model in (ours, theirs)]

    def step(loss_of, optimizer):
        (loss_of() / batch[:, 1:].numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def their_loss():
        logits = theirs(batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")

    assert torch.allclose(next_token_loss(ours, *rows), their_loss(), rtol=1e-4)
    ratio, took = compare(
        lambda: step(lambda: next_token_loss(ours, *rows), optimizers[0]),
        lambda: step(their_loss, optimizers[1]),
        pairs,
    )
    return {"task": "training step", "width": width, "ratio": ratio, "tokens/s": batch[:, 1:].numel() / took}


def generation(width: int, rows: int, pairs: int) -> dict:
    ours, theirs = pair(width)
    prompts = torch.randint(3, 2048, (rows, 16))

    def run_ours():
        return [c.tokens for c in generate(ours, prompts.tolist(), NEW_TOKENS, temperature=0)]

    def run_theirs():
        mask = torch.ones_like(prompts)
        out = theirs.generate(
            prompts, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        return out[:, 16:].tolist()

    same = sum(a == b for a, b in zip(run_ours(), run_theirs(), strict=True)) / rows
    ratio, took = compare(run_ours, run_theirs, pairs)
    tokens = rows * NEW_TOKENS
    return {
        "task": f"generation, batch {rows}",
        "width": width,
        "ratio": ratio,
        "tokens/s": tokens / took,
        "same": same,
    }


def main(widths: tuple[int, ...] = (128, 256, 512), pairs: int = 7, threads: int = 1):
    """Time training and generation against transformers, and store the table beside this file.

    Args:
        widths: model widths.
        pairs: interleaved pairs; the table shows the median ratio.
        threads: threads PyTorch may use.
    """
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    results = []
    for width in widths:
        results.append(training(width, pairs))
        results += [generation(width, rows, pairs) for rows in (1, 16, 64)]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread, PyTorch {torch.__version__}"
    print(f"\n{machine}; ratio above 1: ours is faster\n\n{'task':22} width   ratio    tokens/s")
    for row in results:
        print(f"{row['task']:22} {row['width']:5} {row['ratio']:6.2f}× {row['tokens/s']:11,.0f}")
    write_atomic(
        Path(__file__).with_name("results.json"), json.dumps({"machine": machine, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    tyro.cli(main)
