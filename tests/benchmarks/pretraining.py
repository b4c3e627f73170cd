"""What the training loop costs beside a bare forward, backward, step on the same batches; and what the loader costs.

python tests/benchmarks/pretraining.py --widths 128 --steps 30

The two loops take turns, a step each; the table shows the median ratio of their times. The bare loop neither clips nor
schedules nor checks nor loads: its batches lie in memory.
"""

import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from llama2lib.model import LLAMA2, Llama, swiglu_width
from llama2lib.pretrain import PRETRAIN, pretrain
from llama2lib.recipes import write_atomic
from llama2lib.shards import Packed, Shards, write_shards
from llama2lib.tokenizer import train_tokenizer


def measure(width: int, steps: int, shards: Shards) -> dict:
    heads = width // 32
    shape = dict(dim=width, n_heads=heads, n_kv_heads=heads // 2, hidden_dim=swiglu_width(width, 8), vocab_size=2048)
    config = replace(PRETRAIN["book-1M"], batch_tokens=4096, tokens=4096 * (steps + 3), warmup_steps=2)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Llama(replace(LLAMA2["book-1M"], **shape)))
    ours, bare = models
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-4)
    packed = Packed(shards, config.max_seq_len, config.seed)
    batches = [packed.rows(i * config.batch_rows, config.batch_rows) for i in range(config.steps)]
    loop, ratios, took, loading = pretrain(ours, shards, config), [], [], []
    for i, batch in enumerate(batches):
        start = time.perf_counter()
        next(loop)
        middle = time.perf_counter()
        F.cross_entropy(bare(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        packed.rows(i * config.batch_rows, config.batch_rows)
        loaded = time.perf_counter() - end
        if i > 2:
            ratios.append((end - middle) / (middle - start))
            took.append(middle - start)
            loading.append(loaded)
    median = statistics.median
    return {"width": width, "ratio": median(ratios), "tokens/s": config.batch_tokens / median(took),
            "loader": median(loading) / median(took)}  # fmt: skip


def main(widths: tuple[int, ...] = (128, 256), steps: int = 30, threads: int = 1):
    """Time the loop, and store the table beside this file.

    Args:
        widths: model widths.
        steps: pairs of steps after a warm-up of three.
        threads: threads PyTorch may use.
    """
    torch.set_num_threads(threads)
    random = np.random.default_rng(0)
    words = ["".join(chr(97 + c) for c in random.integers(0, 26, 5)) for _ in range(3000)]
    texts = [" ".join(random.choice(words, 300)) for _ in range(400)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(texts, 2048, Path(folder) / "tokenizer.model")
        shards = write_shards(Path(folder) / "shards", tokenizer, texts)
        results = [measure(width, steps, shards) for width in widths]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread, PyTorch {torch.__version__}"
    print(f"\n{machine}; ratio: time of the bare loop over ours\n\nwidth  ratio   tokens/s  loader's share")
    for row in results:
        print(f"{row['width']:5}  {row['ratio']:.3f}  {row['tokens/s']:9,.0f}  {row['loader']:.2%}")
    table = {"machine": machine, "results": results}
    write_atomic(Path(__file__).with_suffix(".json"), json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
