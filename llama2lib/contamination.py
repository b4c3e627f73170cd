"""Generated from chapters/09_evaluation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "EXACT",
    "FREQUENT",
    "BEGINS",
    "spans",
    "covered",
    "contaminated_tokens",
    "collides",
    "mostly_known",
    "CLEAN",
    "DIRTY",
    "LENGTHS",
    "SIGNIFICANT",
    "BETTER",
    "Subset",
    "z_score",
    "subsets",
    "affected",
    "sweep",
    "largest_affected",
    "peak_memory",
    "cost",
    "ContaminationConfig",
    "read_samples",
    "run",
    "cli",
]


# ---------- chapters/09_evaluation.py · Spans

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from llama2lib.corpus import records
from llama2lib.launch import one_line_errors
from llama2lib.recipes import write_atomic
from llama2lib.shards import Shards
from llama2lib.suffix_index import CorpusIndex, as_keys, build_index, stored_ids
from llama2lib.tokenizer import Tokenizer

EXACT = 10  # tokens at the beginning of a span that may not differ
FREQUENT, BEGINS = 1024, 32  # from more places and begins of one run on, only the places that can matter are looked at


def spans(
    samples: Sequence[Sequence[int]], index: CorpusIndex, skip_budget: int = 4
) -> list[Int[np.ndarray, "T"]]:
    """For each token of each sample the length of the longest matched span that begins there; 0 where none does.

    A span may be left out where a longer one contains it. ValueError: ids that are not in the index's vocabulary, or a
    negative budget.
    """
    if skip_budget < 0:
        raise ValueError(f"skip_budget {skip_budget}: expected 0 or more")
    vocab_size = index.header["vocab_size"]
    ids = [stored_ids(sample, vocab_size, f"sample {number}") for number, sample in enumerate(samples)]
    batches, found = _chunks(np.array([len(sample) for sample in ids], int), np.ones(len(ids), bool), 2**18), []
    for batch in tqdm(batches, desc="matching", unit=" batches") if len(batches) > 1 else batches:
        found += _spans([ids[number] for number in batch], index, skip_budget)
    return found


def _chunks(counts: np.ndarray, chosen: np.ndarray, size: int) -> list[np.ndarray]:
    "The chosen numbers, in lists whose counts add up to about `size`."
    numbers = np.flatnonzero(chosen)
    cuts = np.flatnonzero(np.diff(np.cumsum(counts[numbers]) // size)) + 1
    return [part for part in np.split(numbers, cuts) if len(part)]


def _spans(samples: list[np.ndarray], index: CorpusIndex, budget: int) -> list[np.ndarray]:
    "`spans` of some samples that are looked up together."
    ids, ends = np.concatenate(samples), np.cumsum([len(sample) for sample in samples])
    lengths, last = np.zeros(len(ids), np.int64), np.repeat(ends, np.diff(ends, prepend=0))
    begins = np.flatnonzero(np.arange(len(ids)) + EXACT <= last)
    if not len(begins):
        return np.split(lengths, ends[:-1])
    inner = np.ones(len(ids) + 1, bool)
    inner[[0, *ends]] = False
    before = np.where(inner[begins], ids[begins - 1].astype(np.int64), -1)  # what stands before a run in its sample
    runs = sliding_window_view(ids, EXACT)[begins]
    _, firsts, which = np.unique(as_keys(runs), return_index=True, return_inverse=True)
    for part in range(len(index.header["parts"])):
        low, high = (bound[which] for bound in index.ranges(part, runs[firsts]))
        counts = high - low
        many = counts > FREQUENT
        for chosen in _chunks(counts, ~many & (counts > 0), 2**20):
            run = np.repeat(chosen, counts[chosen])
            within = np.arange(len(run)) - np.repeat(np.cumsum(counts[chosen]), counts[chosen])
            places = index.places(part, high[run] + within)
            new = index.text[places - 1] != before[run]  # else the span one token to the left is longer
            places, begin = places[new], begins[run[new]]
            reach = _reach(index, places + EXACT, ids, begin + EXACT, last[begin], budget)
            np.maximum.at(lengths, begin, EXACT + reach)
        for run in np.unique(which[many]):
            same = np.flatnonzero(many & (which == run))
            begin, end = begins[same], high[same[0]]
            for start in range(low[same[0]], end, 2**18):
                places = index.places(part, np.arange(start, min(start + 2**18, end)))
                found = _frequent(index, places, before[same], ids, begin, last[begin], budget)
                lengths[begin] = np.maximum(lengths[begin], found)
    return np.split(lengths, ends[:-1])


def _reach(index, places, ids, begin, last, budget) -> np.ndarray:
    """How many tokens each pair of places goes on for, up to the last that agrees before more than `budget` differ.

    places: in the corpus, up to a border; begin: in the samples' ids, up to `last`.
    """
    reach, differ = np.zeros(len(places), np.int64), np.zeros(len(places), np.int64)
    going, depth = np.flatnonzero(begin < last), 0
    while len(going):
        theirs, ours = index.text[places[going] + depth], ids[begin[going] + depth]
        depth += 1
        reach[going[theirs == ours]] = depth
        differ[going] += theirs != ours
        going = going[(differ[going] <= budget) & (theirs != index.border) & (begin[going] + depth < last[going])]
    return reach


def _frequent(index, places, before, ids, begin, last, budget) -> np.ndarray:
    "Length of the longest span from each of several begins of one run, to any of the run's places."
    lengths, left, hard = np.zeros(len(begin), np.int64), index.text[places - 1], []
    values, of = np.unique(before, return_inverse=True)
    for number, value in enumerate(values):
        rows, new = np.flatnonzero(of == number), places[left != value]
        if len(new) > FREQUENT and len(begin) > BEGINS:
            hard.append(rows)
        elif len(new):
            lengths[rows] = [EXACT + _furthest(index, new, ids, begin[row], last[row], budget) for row in rows]
    if hard:
        rows = np.concatenate(hard)
        lengths[rows] = EXACT + _by_rarest(index, places, ids, begin[rows], last[rows], budget)
    return lengths


def _furthest(index, places, ids, begin, last, budget) -> int:
    "The longest `_reach` behind the run at one begin, over many places."
    best = 0
    for some in np.split(places, range(2**14, len(places), 2**14)):
        one = np.full(len(some), begin + EXACT), np.full(len(some), last)
        best = max(best, int(_reach(index, some + EXACT, ids, *one, budget).max(initial=0)))
        if best == last - begin - EXACT:
            break
    return best


def _by_rarest(index, places, ids, begin, last, budget) -> np.ndarray:
    """`_furthest` of several begins, without going on from every place for each.

    Of any `budget` + 1 tokens among the first T behind the run, a place that reaches T agrees in one at least. So for
    each T, from large to small, only places that agree in one of the rarest of these tokens are looked at, until one
    of them does reach T. A reach of at most `budget` + 1 may differ everywhere but in its last token.
    """
    steps = [step for step in (64, 32, 16, 8) if step > budget + 2] + [budget + 2]
    orders, low, high = [], [], []
    agree, inside = np.zeros(len(begin), np.int64), np.ones(len(places), bool)
    for offset in range(EXACT, EXACT + steps[0]):
        tokens = index.text[np.minimum(places + offset, len(index.text) - 1)]
        ours = ids[np.minimum(begin + offset, last - 1)]
        orders.append(np.argsort(tokens, kind="stable").astype(np.uint32))
        low.append(np.searchsorted(tokens, ours, "left", orders[-1]))
        high.append(np.searchsorted(tokens, ours, "right", orders[-1]))
        if offset <= EXACT + budget:
            agree[np.isin(ours, tokens[inside]) & (begin + offset < last)] = offset + 1 - EXACT
            inside &= tokens != index.border
    low, high, best = np.array(low), np.array(high), np.zeros(len(begin), np.int64)
    for row in range(len(begin)):
        for step in steps:
            if best[row] < step <= last[row] - begin[row] - EXACT:
                rarest = np.argsort((high - low)[:step, row])[: budget + 1]
                near = [orders[offset][low[offset, row] : high[offset, row]] for offset in rarest]
                near = np.unique(np.concatenate(near))
                best[row] = max(best[row], _furthest(index, places[near], ids, begin[row], last[row], budget))
    return np.maximum(best, agree)

def covered(lengths: Int[np.ndarray, "T"], min_len: int = 10) -> Bool[np.ndarray, "T"]:
    "Whether each token of a sample lies in a span of more than `min_len` tokens; `lengths` as of `spans`."
    begins = np.flatnonzero(lengths > min_len)
    opened = np.bincount(begins, minlength=len(lengths) + 1)
    closed = np.bincount(begins + lengths[begins], minlength=len(lengths) + 1)
    return np.cumsum(opened - closed)[:-1] > 0


def contaminated_tokens(
    sample: Sequence[int], corpus_index: CorpusIndex, min_len: int = 10, skip_budget: int = 4
) -> Bool[np.ndarray, "T"]:
    """Whether each token of a sample is contaminated: lies in a span that the corpus has too (A.6).

    A span has more than `min_len` tokens, pairs them place by place, stays in one document, differs in at most
    `skip_budget` places, in none of its first ten, and not at its end. ValueError: an id that is not in the index's
    vocabulary, or a negative number.
    """
    if min_len < 0:
        raise ValueError(f"min_len {min_len}: expected 0 or more")
    mask = covered(spans([sample], corpus_index, skip_budget)[0], min_len)
    if min_len + 1 < EXACT:  # spans of fewer than ten tokens, all equal
        found = corpus_index.counts(sample, min_len + 1) > 0
        mask |= covered(np.pad(found * (min_len + 1), (0, len(mask) - len(found))), min_len)
    return mask


# ---------- chapters/09_evaluation.py · Planted leaks

def collides(sample: Sequence[int], index: CorpusIndex, n: int = 13) -> bool:
    "Whether the corpus has any run of n tokens of a sample (GPT-3's rule, there of words)."
    return bool((index.counts(sample, n) > 0).any())


def mostly_known(sample: Sequence[int], index: CorpusIndex, n: int = 8, share: float = 0.7) -> bool:
    "Whether the corpus has so large a share of a sample's runs of n tokens (PaLM's rule, there of words)."
    found = index.counts(sample, n) > 0
    return bool(len(found) and found.mean() >= share)


# ---------- chapters/09_evaluation.py · Does it help the score?

CLEAN, DIRTY = 0.2, 0.8  # share of a sample's tokens: below and from this on
LENGTHS = (10, 20, 30, 40, 50)  # minimum lengths L to try
SIGNIFICANT = 2  # |Z|
BETTER = {"clean": False, "not clean": True, "not dirty": False, "dirty": True}  # if contamination helps


class Subset(NamedTuple):
    "A row of Table 51."

    contaminated: float  # mean share of contaminated tokens, 0..1
    n: int
    score: float
    mu: float
    z: float


def z_score(score: float, mu: float, deviation: float, n: int) -> float:
    "How many standard errors the mean of n scores lies above mu; `deviation` is that of one score. 0 without any."
    return (score - mu) / (deviation / n**0.5) if deviation and n else 0.0


def subsets(shares: Float[np.ndarray, "N"], scores: Float[np.ndarray, "N"]) -> dict[str, Subset]:
    """The four subsets of A.6 by each sample's share of contaminated tokens, 0..1; scores in any unit.

    An empty subset has a score of NaN and Z = 0. ValueError: unequal lengths, no samples, or numbers that are not
    finite.
    """
    shares, scores = np.asarray(shares, float), np.asarray(scores, float)
    if shares.shape != scores.shape or shares.ndim != 1 or not len(shares):
        raise ValueError(f"shares {shares.shape} and scores {scores.shape}: expected two lists, one number per sample")
    if not (np.isfinite(scores).all() and ((shares >= 0) & (shares <= 1)).all()):
        raise ValueError("expected shares from 0 to 1, and scores that are finite")
    members = {"clean": shares < CLEAN, "not clean": shares >= CLEAN,
               "not dirty": shares < DIRTY, "dirty": shares >= DIRTY}  # fmt: skip
    mu, deviation, table = float(scores.mean()), float(scores.std()), {}
    for name, chosen in members.items():
        n = int(chosen.sum())
        share, score = (float(x[chosen].mean()) if n else float("nan") for x in (shares, scores))
        table[name] = Subset(share, n, score, mu, z_score(score, mu, deviation, n))
    return table


def affected(z: Mapping[str, float]) -> bool:
    "Whether the Z of all four subsets are beyond 2, the clean ones below and the dirty ones above."
    return all((z[name] if better else -z[name]) > SIGNIFICANT for name, better in BETTER.items())


# ---------- chapters/09_evaluation.py · Fragments

def sweep(
    lengths: Sequence[Int[np.ndarray, "T"]], scores: Float[np.ndarray, "N"], min_lens: Sequence[int] = LENGTHS
) -> dict[int, dict[str, Subset]]:
    "The four subsets for each minimum length; `lengths` of each sample as of `spans`. ValueError as of `subsets`."
    return {min_len: subsets([covered(one, min_len).mean() for one in lengths], scores) for min_len in min_lens}


def largest_affected(tables: Mapping[int, Mapping[str, Subset]]) -> int | None:
    "The largest minimum length of a `sweep` at which the data set is affected; None where it is at none."
    hit = [min_len for min_len, rows in tables.items() if affected({name: row.z for name, row in rows.items()})]
    return max(hit, default=None)


# ---------- chapters/09_evaluation.py · Time and memory

def peak_memory() -> int:
    "Bytes of memory that this process had at the most, on Unix; what its parent had does not count."
    try:  # of Linux, where `getrusage` begins with the peak of the process that started this one
        return int(re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text("utf-8"))[1]) * 1024
    except FileNotFoundError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts in bytes


def cost(tokens: int, samples: int = 5000) -> dict[str, float]:
    """Seconds and memory (GB) of a made-up corpus of so many tokens, and of samples of 200; on Unix.

    The keys are 'index' and 'match', in seconds of the processor, 'wall', in seconds, and 'peak', of this process.
    ValueError where the copies are not found, or other samples are.
    """
    import time

    random, size = np.random.default_rng(0), 500
    often = np.cumsum(1 / np.arange(1, 32_000 - 2))
    corpus: list[np.ndarray] = []
    for _ in range(0, tokens // size, 4000):
        drawn = np.searchsorted(often, random.random((min(4000, tokens // size - len(corpus)), size)) * often[-1])
        corpus += [*(drawn + 3).astype(np.uint16)]
    for place in range(9, len(corpus), 10):
        corpus[place] = corpus[random.integers(len(corpus))]
    asked = []
    for number in range(samples):
        sample = corpus[random.integers(len(corpus))][100:300].copy() if number % 2 else random.integers(3, 32_000, 200)
        sample[random.integers(0, 200, 3)] = 3
        asked.append(sample)
    with tempfile.TemporaryDirectory() as folder:
        start, began = time.perf_counter(), time.process_time()
        index = build_index(corpus, Path(folder) / "index", 32_000)
        built = time.process_time()
        found = spans(asked, index)
        ended, wall = time.process_time(), time.perf_counter() - start
    shares = np.array([covered(lengths).mean() for lengths in found])
    if shares[1::2].mean() < 0.9 or shares[::2].mean() > 0.1:
        raise ValueError(f"{shares[1::2].mean():.0%} of the copies found, and {shares[::2].mean():.0%} of the others")
    return {"index": built - began, "match": ended - built, "wall": wall, "peak": peak_memory() / 1e9}


# ---------- chapters/09_evaluation.py · From the command line

@dataclass(frozen=True)
class ContaminationConfig:
    "Which tokens of samples stand in a training corpus, and whether that helps the scores (A.6)."

    data: Path  # token shards of the corpus, made by python -m llama2lib.shards
    samples: Path  # JSON lines with `text` or `tokens`, and `score` in all or in none
    index: Path | None = None  # folder of the sorted corpus, made if it is not there; none: `index` in the data's
    tokenizer: Path | None = None  # for `text`; none: the one that the shards were made with, beside them
    out: Path | None = None  # shares of each sample by minimum length, JSON lines; none: beside the samples
    min_lens: tuple[int, ...] = LENGTHS  # a span has more tokens than that
    skip_budget: int = 4  # places in which a span may differ
    part_tokens: int = 2**25  # of the corpus that are sorted at once, in about ten bytes of memory each byte

    def __post_init__(self):
        if not self.min_lens or min(self.min_lens) < EXACT - 1:
            raise ValueError(f"min_lens {self.min_lens}: expected lengths of {EXACT - 1} or more")


def read_samples(path: Path, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[list, np.ndarray | None]:
    "The tokens of each sample of a file, and their scores, if it has them. ValueError with file and line."
    samples, scores = [], []
    for number, row in records(path):
        where = f"{path}:{number}"
        if not isinstance(row, dict) or ("text" in row) == ("tokens" in row):
            raise ValueError(f"{where}: expected an object with either 'text' or 'tokens'")
        if "text" in row and tokenizer is None:
            raise ValueError(f"{where}: 'text' needs a tokenizer; name one with --tokenizer")
        if not isinstance(row.get("text", ""), str):
            raise ValueError(f"{where}: expected 'text' to be a string, found {row['text']!r}")
        samples.append(stored_ids(tokenizer.encode(row["text"]) if "text" in row else row["tokens"], vocab_size, where))
        if not len(samples[-1]):
            raise ValueError(f"{where}: a sample without tokens")
        score = row.get("score")
        if score is not None and (type(score) not in (int, float) or not np.isfinite(score)):
            raise ValueError(f"{where}: expected 'score' to be a number, found {score!r}")
        if scores and (score is None) != (scores[-1] is None):
            raise ValueError(f"{where}: expected a 'score' in every line or in none")
        scores.append(score)
    if not samples:
        raise ValueError(f"{path}: no samples")
    return samples, None if scores[0] is None else np.array(scores, float)


def run(config: ContaminationConfig) -> dict[int, dict[str, Subset]]:
    "Do as `config` says; the subsets by minimum length, with scores of 0 where the file has none."
    shards = Shards(config.data)
    model = config.tokenizer or config.data / "tokenizer.model"
    tokenizer = Tokenizer(model) if config.tokenizer or model.exists() else None
    if tokenizer is not None:
        Shards(config.data, tokenizer)  # ValueError for another one than made them
    samples, scores = read_samples(config.samples, tokenizer, shards.header["vocab_size"])
    index = build_index(shards, config.index or config.data / "index", part_tokens=config.part_tokens)
    lengths = spans(samples, index, config.skip_budget)
    out, lines = config.out or config.samples.with_suffix(".contamination.jsonl"), []
    for number, one in enumerate(lengths):
        row = {"tokens": len(one)} | ({} if scores is None else {"score": scores[number]})
        row["contaminated"] = {min_len: float(covered(one, min_len).mean()) for min_len in config.min_lens}
        lines.append(json.dumps(row) + "\n")
    write_atomic(out, "".join(lines))
    tables = sweep(lengths, np.zeros(len(lengths)) if scores is None else scores, config.min_lens)
    print(f"{len(samples):,} samples in {len(index):,} tokens; the share of each in {out}\n")
    print("   L  subset     contaminated  samples" + ("" if scores is None else "     mean     of all       Z"))
    for min_len, rows in tables.items():
        for name, row in rows.items():
            share = f"{row.contaminated:11.1%}" if row.n else f"{'–':>11}"
            scored = "" if scores is None else f" {row.score:9.4g}  {row.mu:9.4g}  {row.z:+6.2f}" if row.n else ""
            print(f"{min_len:4}  {name:10}{share}  {row.n:9,}{scored}")
    if scores is not None:
        largest = largest_affected(tables)
        print("\nnot affected" if largest is None else f"\naffected, up to L = {largest}")
    return tables


@one_line_errors()
def cli(prog: str = "python -m llama2lib.contamination"):
    "python -m llama2lib.contamination --data SHARDS --samples FILE: contaminated samples, and whether it helps them."
    import tyro

    run(tyro.cli(ContaminationConfig, prog=prog))


if __name__ == "__main__":
    cli()
