"""Timings beside transformers, as ratios: the median of interleaved pairs in one run, same weights, same dtype.

make bench                 all sizes, twenty minutes; the ratios go to results.json
python tests/benchmarks/run.py --widths 128 --pairs 3 --no-save
"""

import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers import __version__ as transformers_version
from transformers.utils import logging

from llama2lib.checkpoint import save_checkpoint
from llama2lib.generation import generate
from llama2lib.model import LLAMA2, Llama, swiglu_width
from llama2lib.pretrain import next_token_loss
from llama2lib.recipes import write_atomic

TRAINING_ROWS, TRAINING_TOKENS = 16, 256
PROMPT, NEW_TOKENS = 16, 128  # of generation with equal lengths
PROMPTS, SAMPLES, LIMIT, MEAN = 64, 8, 256, 64  # of the workload of RLHF: lengths fall with this mean
VOCABULARY, EOS = 2048, 2
MALLOC = {  # glibc keeps large blocks instead of returning them to the system; for both sides, since both gain
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "67108864",
}


def pair(width: int, answers: int | None = None):
    """Our model and transformers', with the same random weights.

    `answers`: their mean length. One coordinate is then the same in every embedding, and the output matrix reads EOS
    from it.
    """
    heads = width // 32
    shape = dict(dim=width, n_heads=heads, n_kv_heads=heads // 2, hidden_dim=swiglu_width(width, 8))
    torch.manual_seed(0)
    ours = Llama(replace(LLAMA2["book-1M"], vocab_size=VOCABULARY, **shape))
    if answers:
        with torch.no_grad():
            embedding, output = ours.tok_embeddings.weight, ours.output.weight
            embedding[:, 0], output[:, 0] = 0.2, 0
            constant = ours.hidden(torch.randint(3, VOCABULARY, (8, LIMIT)))[..., 0].mean().item()
            output[EOS, 0] = math.log(VOCABULARY / answers) / constant
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(ours, Path(folder) / "model")
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder) / "model", attn_implementation="sdpa")
    return ours, theirs


def seconds(task: Callable) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def compare(tasks: dict[str, Callable], pairs: int) -> dict[str, list[float]]:
    "Seconds of every task, taking turns, after one to warm up."
    for task in tasks.values():
        task()
    times = {name: [] for name in tasks}
    for _ in tqdm(range(pairs), leave=False):
        for name, task in tasks.items():
            times[name].append(seconds(task))
    return times


def row(task: str, width: int, ours: list[float], theirs: list[float], tokens: int, **more) -> dict:
    "Median ratio of their time to ours with the smallest and the largest, and our speed."
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    spread = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
    return {"task": task, "width": width, **spread, "tokens/s": tokens / statistics.median(ours), **more}


def training(width: int, pairs: int) -> list[dict]:
    "A step of AdamW, and how much of the machine's speed in products of the model's shape it reaches."
    ours, theirs = pair(width)
    batch = torch.randint(VOCABULARY, (TRAINING_ROWS, TRAINING_TOKENS + 1))
    rows, tokens = (batch[:, :-1], batch[:, 1:]), batch[:, 1:].numel()
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-5) for model in (ours, theirs)]

    def their_loss(model, tokens, targets):
        logits = model(tokens, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")

    def step(loss_of, model, optimizer):
        (loss_of(model, *rows) / tokens).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    assert torch.allclose(next_token_loss(ours, *rows), their_loss(theirs, *rows), rtol=1e-4)
    left, right = torch.randn(tokens, width), torch.randn(width, ours.config.hidden_dim)
    compiled, their_compiled = torch.compile(next_token_loss, dynamic=False), torch.compile(their_loss, dynamic=False)
    times = compare(
        {
            "ours": lambda: step(next_token_loss, ours, optimizers[0]),
            "theirs": lambda: step(their_loss, theirs, optimizers[1]),
            "ours, compiled": lambda: step(compiled, ours, optimizers[0]),
            "theirs, compiled": lambda: step(their_compiled, theirs, optimizers[1]),
            "product": lambda: [left @ right for _ in range(20)],
        },
        pairs,
    )
    work = 3 * ours.config.forward_flops_per_token((TRAINING_TOKENS + 1) / 2) * tokens
    rate = 20 * 2 * left.numel() * right.shape[1] / statistics.median(times["product"])

    def result(name: str, whose: str) -> dict:
        share = work / statistics.median(times[whose]) / rate
        return row(name, width, times[whose], times["theirs"], tokens, share=share, rate=rate)

    return [
        result("training step", "ours"),
        result("training step, compiled", "ours, compiled"),
        result("transformers' step", "theirs"),
        result("transformers' step, compiled", "theirs, compiled"),
    ]


def generation(width: int, rows: int, pairs: int) -> list[dict]:
    "Prompts and answers of equal length, greedy; all tokens are compared."
    ours, theirs = pair(width)
    prompts = torch.randint(3, VOCABULARY, (rows, PROMPT))

    def run_ours(compile: bool) -> list[list[int]]:
        answers = generate(ours, prompts.tolist(), NEW_TOKENS, temperature=0, batch=rows, compile=compile)
        return [answer.tokens for answer in answers]

    def run_theirs() -> list[list[int]]:
        found = theirs.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        return found[:, PROMPT:].tolist()

    expected = run_theirs()
    same = {how: sum(a == b for a, b in zip(run_ours(how), expected, strict=True)) / rows for how in (False, True)}
    tasks = {"eager": lambda: run_ours(False), "theirs": run_theirs, "compiled": lambda: run_ours(True)}
    times, name, tokens = compare(tasks, pairs), f"generation, batch {rows}", rows * NEW_TOKENS
    return [
        row(name, width, times["eager"], times["theirs"], tokens, same=same[False]),
        row(f"{name}, compiled", width, times["compiled"], times["theirs"], tokens, same=same[True]),
    ]


def workload(width: int, pairs: int) -> list[dict]:
    """Several samples of every prompt, prompts and answers of many lengths: tokens per second against theirs.

    transformers gets its prompts in groups of eight, 64 rows, which is faster for it than all at once.
    """
    ours, theirs = pair(width, answers=MEAN)
    random = np.random.default_rng(0)
    lengths = random.integers(8, 65, PROMPTS)
    prompts = [[1, *random.integers(3, VOCABULARY, length - 1).tolist()] for length in lengths]
    padded = torch.zeros(PROMPTS, max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(padded)
    for i, prompt in enumerate(prompts):
        padded[i, -len(prompt) :], mask[i, -len(prompt) :] = torch.tensor(prompt), 1
    made = {"ours": [], "theirs": []}

    def run_ours():
        answers = generate(ours, prompts, LIMIT, seed=0, eos_id=EOS, num_samples=SAMPLES)
        made["ours"].append(sum(len(answer.tokens) for answer in answers))

    def run_theirs():
        torch.manual_seed(0)
        count = 0
        for part, seen in zip(padded.split(8), mask.split(8), strict=True):
            found = theirs.generate(
                part,
                attention_mask=seen,
                max_new_tokens=LIMIT,
                do_sample=True,
                top_k=0,
                num_return_sequences=SAMPLES,
                eos_token_id=EOS,
                pad_token_id=0,
            )[:, padded.shape[1] :]
            ends = (found == EOS).int().argmax(1)
            count += torch.where((found == EOS).any(1), ends + 1, found.shape[1]).sum().item()
        made["theirs"].append(count)

    times = compare({"ours": run_ours, "theirs": run_theirs}, pairs)
    ours_each, theirs_each = (
        [took / tokens for took, tokens in zip(times[whose], made[whose][1:], strict=True)] for whose in made
    )
    return [row(f"{PROMPTS} prompts × {SAMPLES} samples", width, ours_each, theirs_each, 1)]


def processor() -> str:
    "The processor's name, where Linux says it."
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main(
    widths: tuple[int, ...] = (128, 256, 512),
    pairs: int = 7,
    workload_widths: tuple[int, ...] = (128, 256),
    workload_pairs: int = 3,
    threads: int = 1,
    save: bool = True,
):
    """Time training and generation against transformers; store the ratios beside this file.

    Args:
        widths: model widths.
        pairs: interleaved pairs; the table shows the median ratio.
        workload_widths: those that get the workload of RLHF, which takes transformers minutes.
        workload_pairs: its interleaved pairs.
        threads: threads PyTorch may use.
        save: write results.json.
    """
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    results = []
    for width in widths:
        results += training(width, pairs)
        for rows in (1, 16, 64):
            results += generation(width, rows, pairs)
        if width in workload_widths:
            results += workload(width, workload_pairs)
    machine = f"{processor()}, {os.cpu_count()} cores, {threads} thread, float32, PyTorch {torch.__version__}"
    machine += f", transformers {transformers_version}"
    print(f"\n{machine}; ratio above 1: ours is faster\n")
    print(f"{'task':30} width   ratio   (low-high)    tokens/s  share  same")
    for one in results:
        extra = f"{one['share']:6.0%}" if "share" in one else " " * 6
        extra += f"{one['same']:6.0%}" if "same" in one else ""
        spread = f"({one['low']:.2f}-{one['high']:.2f})"
        print(f"{one['task']:30} {one['width']:5} {one['ratio']:6.2f}× {spread:>13} {one['tokens/s']:11,.0f} {extra}")
    if save:
        stored = json.dumps({"machine": machine, "results": results}, indent=1) + "\n"
        write_atomic(Path(__file__).with_name("results.json"), stored)


if __name__ == "__main__":
    if platform.libc_ver()[0] == "glibc" and not MALLOC.items() <= os.environ.items():  # it reads them when it starts
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    tyro.cli(main)
