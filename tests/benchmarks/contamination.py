"""Contamination: time and memory to sort a corpus and to look for samples in it, 100 MB and 1 GB of tokens.

python tests/benchmarks/contamination.py --megabytes 100
"""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import tyro
from tqdm import tqdm

from llama2lib.recipes import write_atomic


def main(megabytes: tuple[int, ...] = (100, 1000), samples: int = 5000):
    """Time corpora of several sizes, each in a process of its own, and store the table beside this file.

    Args:
        megabytes: of tokens, two bytes each.
        samples: of 200 tokens that are looked for.
    """
    rows = []
    for size in tqdm(megabytes, unit=" sizes"):
        task = f"cost({size} * 500_000, {samples})"
        code = f"import json; from llama2lib.contamination import cost; print(json.dumps({task}))"
        ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        rows.append({"MB": size} | json.loads(ran.stdout))
    print(f"{'MB':>6} {'sorting (s)':>12} {'matching (s)':>13} {'wall (s)':>9} {'peak (GB)':>10}")
    for row in rows:
        print(f"{row['MB']:6} {row['index']:12.1f} {row['match']:13.1f} {row['wall']:9.1f} {row['peak']:10.2f}")
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    text = json.dumps({"machine": machine, "samples": samples, "results": rows}, indent=1)
    write_atomic(Path(__file__).with_name("contamination.json"), text + "\n")


if __name__ == "__main__":
    tyro.cli(main)
