"""The harness's requests answered by LlamaLM beside its own HFLM, as a ratio: same weights, rows and threads.

python tests/benchmarks/evaluate.py --pairs 7
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
from lm_eval import __version__ as harness_version
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from llama2lib.checkpoint import save_checkpoint
from llama2lib.evaluate import CHOICE, mini_rows
from llama2lib.harness import LlamaLM
from llama2lib.mini import SIZE, SIZES, VOCABULARY
from llama2lib.model import Llama
from llama2lib.synthetic import documents
from llama2lib.tokenizer import train_tokenizer

ROWS = 64  # decoded together, by either


def main(pairs: int = 7, threads: int = 1, save: bool = True):
    """Time questions of the mini world; store the ratios beside this file.

    Args:
        pairs: interleaved pairs of runs; the median ratio counts.
        threads: threads PyTorch may use.
        save: write evaluate.json.
    """
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        results = compare(Path(folder), pairs)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread, PyTorch {torch.__version__}"
    print(f"\n{machine}, lm-eval {harness_version}; above 1: ours is faster\n\nratio   (low-high)  requests/s")
    for r in results:
        print(f"{r['ratio']:5.2f} ({r['low']:.2f}-{r['high']:.2f}) {r['requests/s']:9,.0f}  {r['requests']}")
    if save:
        from llama2lib.recipes import write_atomic

        stored = {"machine": f"{machine}, lm-eval {harness_version}", "results": results}
        write_atomic(Path(__file__).with_name("evaluate.json"), json.dumps(stored, indent=1) + "\n")


def compare(folder: Path, pairs: int) -> list[dict]:
    "Times of both adapters in turn, for choices and for writing, with and without solved examples."
    words = train_tokenizer(documents(np.random.default_rng(0), 3000), VOCABULARY, folder / "tokenizer.model")
    torch.manual_seed(0)
    model = Llama(replace(SIZES[SIZE], vocab_size=VOCABULARY))  # greedy texts then run to the most tokens
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.output.weight.data[:259] = 0  # no single bytes, which the two decode differently
    save_checkpoint(model, folder / "model", words)
    adapters = LlamaLM(model, words, batch=ROWS), HFLM(str(folder / "model"), device="cpu", batch_size=ROWS)
    work = {}
    for shots, count in (0, 200), (5, 100):
        rows = mini_rows(CHOICE, count * (shots + 1), "train")
        lines = [f"{row['question']} {row['choices'][row['gold']]}\n\n" for row in rows]
        asked = [rows[n] for n in range(shots, len(rows), shots + 1)]
        fronts = ["".join(lines[n - shots : n]) + rows[n]["question"] for n in range(shots, len(rows), shots + 1)]
        choices = [(front, f" {choice}") for front, row in zip(fronts, asked, strict=True) for choice in row["choices"]]
        work[f"loglikelihood of four choices, {shots} shots"] = "loglikelihood", choices
        settings = {"until": ["\n"], "max_gen_toks": 32, "do_sample": False}
        work[f"generate_until 32 tokens, {shots} shots"] = "generate_until", [(front, settings) for front in fronts]
    results = []
    for name, (kind, arguments) in work.items():

        def answer(adapter, kind=kind, arguments=arguments):
            requests = [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]
            start = time.perf_counter()
            found = getattr(adapter, kind)(requests, disable_tqdm=True)
            return time.perf_counter() - start, found

        (_, ours), (_, theirs) = map(answer, adapters)
        if kind == "loglikelihood":
            assert np.abs(np.array(ours, float) - np.array(theirs, float)).max() < 1e-3
        else:
            assert ours == theirs
        times = [[answer(adapter)[0] for adapter in adapters] for _ in tqdm(range(pairs), desc=name, leave=False)]
        ratios = [b / a for a, b in times]
        spread = {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        speed = len(arguments) / statistics.median(a for a, _ in times)
        results.append({"requests": name} | spread | {"requests/s": speed})
    return results


if __name__ == "__main__":
    tyro.cli(main)
