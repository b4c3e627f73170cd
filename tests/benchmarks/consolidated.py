"""Generation by two processes of which each holds half of the weights: gathered once, for every token, and whole ones.

python tests/benchmarks/consolidated.py --pairs 5
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

from llama2lib.distributed import Parallel, make_mesh, parallelize, processes
from llama2lib.generation import generate
from llama2lib.launch import torchrun_arguments
from llama2lib.model import LLAMA2, KVCache, Llama, swiglu_width
from llama2lib.recipes import write_atomic
from llama2lib.rollout import consolidated

PROMPTS, LENGTH, NEW = 32, 32, 64  # prompts of a process, their tokens, new ones


def main(widths: tuple[int, ...] = (256, 512), pairs: int = 5, save: bool = True, worker: Path | None = None):
    """Time the three ways in turn; store how many times as long as with whole weights the other two take.

    Args:
        widths: model widths.
        pairs: interleaved rounds; the median ratio counts.
        save: write consolidated.json.
        worker: of a process that torchrun started, the file of its results.
    """
    if worker:
        with processes():
            results = [compare(width, pairs) for width in widths]
            if dist.get_rank() == 0:
                worker.write_text(json.dumps(results))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        words = torchrun_arguments(__file__, "--widths", *widths, "--pairs", pairs, "--worker", path, nproc=2)
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
        results = json.loads(path.read_text())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, 2 processes (gloo), PyTorch {torch.__version__}"
    print(f"\n{machine}; times as long as with whole weights")
    print("\nwidth  gathered once  for every token   ms a token, whole")
    for r in results:
        print(f"{r['width']:5} {r['once']:14.2f} {r['every']:16.2f} {r['milliseconds']:19.2f}")
    if save:
        stored = {"machine": machine, "results": results}
        write_atomic(Path(__file__).with_name("consolidated.json"), json.dumps(stored, indent=1) + "\n")


@torch.no_grad()
def token_by_token(model: Llama, prompts: list[list[int]], new: int) -> list[list[int]]:
    "Greedy answers by the model's own passes, in which FSDP gathers every layer's weights anew."
    tokens, said = torch.tensor(prompts), []
    cache = KVCache(model, len(prompts), len(prompts[0]) + new)
    for _ in range(new):
        tokens = model(tokens, cache)[:, -1:].argmax(-1)
        said.append(tokens)
    return torch.cat(said, 1).tolist()


def compare(width: int, pairs: int) -> dict:
    "Ratios of the times of one width."
    heads = width // 32
    shape = dict(dim=width, n_heads=heads, n_kv_heads=heads // 2, hidden_dim=swiglu_width(width, 8))
    config = replace(LLAMA2["book-1M"], n_layers=8, vocab_size=2048, **shape)
    torch.manual_seed(0)
    whole = Llama(config)
    divided = Llama(config)
    divided.load_state_dict(whole.state_dict())
    parallel = Parallel()
    parallelize(divided, make_mesh(parallel, "cpu"), parallel)
    generator = torch.Generator().manual_seed(dist.get_rank())
    prompts = torch.randint(3, 2048, (PROMPTS, LENGTH), generator=generator).tolist()

    def once():
        with consolidated(divided) as model:
            return [c.tokens for c in generate(model, prompts, NEW, 0.0)]

    ways = {
        "whole": lambda: [c.tokens for c in generate(whole, prompts, NEW, 0.0)],
        "once": once,
        "every": lambda: token_by_token(divided, prompts, NEW),
    }
    answers, times = {name: way() for name, way in ways.items()}, {name: [] for name in ways}
    assert answers["whole"] == answers["once"] == answers["every"]
    for _ in tqdm(range(pairs), leave=False, disable=dist.get_rank() > 0):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            way()
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    ratios = {
        name: [one / other for one, other in zip(times[name], times["whole"], strict=True)]
        for name in ("once", "every")
    }
    found = {name: statistics.median(of) for name, of in ratios.items()}
    spread = {f"{name}_range": [min(of), max(of)] for name, of in ratios.items()}
    milliseconds = 1000 * statistics.median(times["whole"]) / NEW
    return {"width": width, "milliseconds": milliseconds} | found | spread


if __name__ == "__main__":
    tyro.cli(main)
