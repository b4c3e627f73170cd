"""Encoding and reading tokens: SentencePiece's own batch encoder beside ours, and rows from memory-mapped shards.

python tests/benchmarks/data.py --pairs 5
"""

import json
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece
import tyro
from tqdm import tqdm

from llama2lib.corpus import encoded, packaged_sources
from llama2lib.recipes import write_atomic
from llama2lib.shards import Packed, write_shards
from llama2lib.tokenizer import train_tokenizer

ROWS, LENGTH = 256, 4096


def seconds(task) -> float:
    start = time.perf_counter()
    task()
    return time.perf_counter() - start


def encoding(tokenizer, texts: list[str], pairs: int) -> list[dict]:
    "Ours against the bare processor, in interleaved pairs: the batch encoder, and the arrays that shards are made of."
    bare = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    tokens = sum(map(len, bare.encode(texts)))
    tasks = {
        "encode_batch": lambda: tokenizer.encode_batch(texts),
        "encoded (arrays, checked)": lambda: sum(1 for _ in encoded(tokenizer, texts)),
        "encode, text by text": lambda: [tokenizer.encode(text) for text in texts],
    }
    rows = []
    for name, task in tasks.items():
        times = [(seconds(task), seconds(lambda: bare.encode(texts))) for _ in tqdm(range(pairs), leave=False)]
        ratio = statistics.median(theirs / ours for ours, theirs in times)
        took = statistics.median(ours for ours, _ in times)
        rows.append({"task": name, "ratio": ratio, "tokens/s": tokens / took})
    return rows


def reading(data, name: str, pairs: int) -> dict:
    "Shuffled batches of rows; the ratio is to copying as many int64 numbers."
    packed, plain = Packed(data, LENGTH, seed=0), np.zeros((ROWS, LENGTH + 1), np.int64)
    packed.rows(0, ROWS)
    firsts = [i * ROWS for i in range(pairs)]
    times = [(seconds(partial(packed.rows, first, ROWS)), seconds(plain.copy)) for first in tqdm(firsts, leave=False)]
    took = statistics.median(ours for ours, _ in times)
    ratio = statistics.median(theirs / ours for ours, theirs in times)
    return {"task": name, "ratio": ratio, "tokens/s": ROWS * LENGTH / took}


def main(characters: int = 2_000_000, tokens: int = 50_000_000, pairs: int = 7, threads: int = 1):
    """Time encoding and reading, and store the table beside this file.

    Args:
        characters: text to encode.
        tokens: size of the data to read rows from.
        pairs: interleaved pairs; the table shows the median ratio.
        threads: cores the process may use.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    texts = [text for source in packaged_sources().values() for text in source.documents]
    texts = np.random.default_rng(0).permutation(np.array(texts, object)).tolist()
    sizes = np.cumsum([len(text) for text in texts])
    texts = texts[: int(np.searchsorted(sizes, characters)) + 1]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_tokenizer(texts, 8000, Path(folder) / "tokenizer.model")
        results = encoding(tokenizer, texts, pairs)

        ids = np.random.default_rng(0).integers(3, 8000, tokens).astype("<u2")
        ids.tofile(Path(folder) / "one.bin")
        results.append(reading(np.memmap(Path(folder) / "one.bin", "<u2", "r"), "rows from one mapped file", 5 * pairs))

        class Random:
            "Documents of random ids, so that many tokens need no time to encode."
            vocab_size, bos_id, eos_id, digest = 8000, 1, 2, "random"

            def encode_batch(self, numbers, bos, eos):
                return [[1, *ids[int(n) * 10_000 : int(n) * 10_000 + 10_000].tolist(), 2] for n in numbers]

        names = (str(number) for number in range(tokens // 10_000))
        shards = write_shards(Path(folder) / "shards", Random(), names, shard_tokens=tokens // 16)
        results.append(reading(shards, f"rows from {len(shards.header['shards'])} shards", 5 * pairs))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {threads} used, sentencepiece {sentencepiece.__version__}"
    print(f"\n{machine}\nratio to SentencePieceProcessor.encode(list), or to copying int64 numbers; above 1: faster\n")
    print(f"{'task':28} ratio      tokens/s")
    for row in results:
        print(f"{row['task']:28} {row['ratio']:5.2f}× {row['tokens/s']:13,.0f}")
    write_atomic(
        Path(__file__).with_name("data.json"), json.dumps({"machine": machine, "results": results}, indent=1) + "\n"
    )


if __name__ == "__main__":
    tyro.cli(main)
