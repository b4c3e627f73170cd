"""Generated from chapters/09_evaluation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "INDEX",
    "TOKENS",
    "LONGEST",
    "stored_ids",
    "build_index",
    "read_index",
    "CorpusIndex",
    "as_keys",
]


# ---------- chapters/09_evaluation.py · A sorted corpus

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from llama2lib.recipes import write_atomic
from llama2lib.shards import Shards

INDEX, TOKENS = "index.json", "tokens.bin"
LONGEST = 64  # tokens of the longest run that an index can look up


def _type(vocab_size: int) -> np.dtype:
    "Of stored ids; the largest number is free, for borders."
    return np.dtype("<u2" if vocab_size < 2**16 else "<u4")


def stored_ids(tokens, vocab_size: int, what: str) -> np.ndarray:
    "Tokens as an array of stored ids. ValueError, beginning with `what`, for one that is not in the vocabulary."
    ids = np.asarray(tokens)
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        raise ValueError(f"{what}: expected a list of token ids, found {ids.dtype} of shape {ids.shape}")
    if len(wrong := np.flatnonzero((ids < 0) | (ids >= vocab_size))):
        raise ValueError(f"{what}: id {ids[wrong[0]]} at place {wrong[0]}, expected ids from 0 to {vocab_size - 1}")
    return ids.astype(_type(vocab_size))


def _pieces(corpus: Shards | Sequence, vocab_size: int) -> Iterator[np.ndarray]:
    "The ids of a corpus, with a border behind each document."
    border = np.iinfo(_type(vocab_size)).max
    if not isinstance(corpus, Shards):
        for number, document in enumerate(corpus):
            yield np.append(stored_ids(document, vocab_size, f"document {number}"), _type(vocab_size).type(border))
        return
    for start in range(0, len(corpus), 2**22):
        ids = corpus.read(start, min(start + 2**22, len(corpus)))
        stored = ids.astype(_type(vocab_size))
        stored[np.isin(ids, (corpus.header["bos_id"], corpus.header["eos_id"]))] = border
        yield stored

def build_index(
    corpus: Shards | Sequence[Sequence[int]],
    folder: str | Path | None = None,
    vocab_size: int = 2**16 - 1,
    part_tokens: int = 2**25,
) -> "CorpusIndex":
    """Index a corpus, token shards or documents as lists of ids, in a folder (None: one that goes with the index).

    Memory: about ten bytes for each byte of a part's ids. Stopped at any moment, the same call goes on behind the last
    sorted part; a finished index is opened. `vocab_size` is for lists; shards have their own. ValueError: ids outside
    the vocabulary, no tokens, a part that is too large, or a folder that holds something else, or another corpus.
    ImportError, in one line, without pydivsufsort.
    """
    try:
        from pydivsufsort import divsufsort
    except ImportError:
        raise ImportError("pydivsufsort is not installed: pip install -e '.[contamination]'") from None
    scratch = tempfile.TemporaryDirectory() if folder is None else None
    folder = Path(folder or scratch.name)
    header = _begun(corpus, folder, vocab_size, part_tokens)
    parts = range(len(header["parts"]), -(-header["tokens"] // header["part_tokens"]))
    for number in tqdm(parts, unit=" parts", desc="sorting suffixes") if len(parts) > 1 else parts:
        header["parts"].append(_sort_part(folder, header, number, divsufsort))
        write_atomic(folder / INDEX, json.dumps(header, indent=1) + "\n")
    return CorpusIndex(folder, scratch)


def _begun(corpus: Shards | Sequence, folder: Path, vocab_size: int, part_tokens: int) -> dict:
    "The header of the index that this corpus has in the folder; begins one, its tokens written, if there is none."
    borders, digest = [], hashlib.sha256()
    if isinstance(corpus, Shards):
        vocab_size, borders = corpus.header["vocab_size"], [corpus.header["bos_id"], corpus.header["eos_id"]]
        digest.update(corpus.digest.encode())
    else:
        for piece in _pieces(corpus, vocab_size):
            digest.update(piece)
    fixed = {"format": 1, "vocab_size": vocab_size, "borders": borders, "corpus": digest.hexdigest()}
    if (folder / INDEX).exists():
        header = read_index(folder)
        for name, value in fixed.items():
            if header[name] != value:
                raise ValueError(f"{folder / INDEX}: begun with {name} {header[name]!r}, not {value!r}: another corpus")
        return header
    if not 0 < part_tokens * _type(vocab_size).itemsize < 2**31 - 1024:
        raise ValueError(f"part_tokens {part_tokens:,}: expected a part of at least one token and less than 2 GiB")
    left_over = TOKENS, f".{TOKENS}.", f".{INDEX}"  # of a run that was stopped before it had a header
    if folder.exists() and not all(item.name.startswith(left_over) for item in folder.iterdir()):
        raise ValueError(f"{folder}: expected an index, or a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    tokens, content = _write(folder / TOKENS, _bordered(corpus, vocab_size))
    header = fixed | {"part_tokens": part_tokens, "tokens": tokens - LONGEST, "sha256": content, "parts": []}
    if not header["tokens"]:
        raise ValueError(f"{folder}: a corpus without tokens")
    write_atomic(folder / INDEX, json.dumps(header, indent=1) + "\n")
    return header


def _bordered(corpus: Shards | Sequence, vocab_size: int) -> Iterator[np.ndarray]:
    "A corpus's ids, and borders behind its end, so that any look-up from any place finds enough."
    yield from _pieces(corpus, vocab_size)
    yield np.full(LONGEST, np.iinfo(_type(vocab_size)).max, _type(vocab_size))


def _write(file: Path, arrays: Iterator[np.ndarray]) -> tuple[int, str]:
    "Write arrays one behind the other, whole or not at all; how many numbers, and the sha256 of their bytes."
    temporary, count, digest = file.with_name(f".{file.name}.tmp"), 0, hashlib.sha256()
    with temporary.open("wb") as out:
        for array in arrays:
            out.write(array)
            digest.update(array)
            count += len(array)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, file)
    return count, digest.hexdigest()


def _sort_part(folder: Path, header: dict, number: int, divsufsort) -> dict:
    "Sort the places of a part's tokens by what follows there, and write them; the part's entry for the header."
    start, dtype = number * header["part_tokens"], _type(header["vocab_size"])
    size = min(header["part_tokens"], header["tokens"] - start)
    text = np.fromfile(folder / TOKENS, np.uint8, (size + LONGEST) * dtype.itemsize, offset=start * dtype.itemsize)
    places = divsufsort(text)  # of bytes: at most two in four begin a token

    def of_tokens() -> Iterator[np.ndarray]:
        for first in range(0, len(places), 2**22):
            some = places[first : first + 2**22]
            some = some[some % dtype.itemsize == 0] // dtype.itemsize
            yield some[some < size].astype("<u4")

    file = folder / f"suffixes-{number:05}.bin"
    return {"file": file.name, "sha256": _write(file, of_tokens())[1]}


def read_index(folder: str | Path) -> dict:
    "The header of an index. FileNotFoundError, or ValueError if it cannot be read."
    path = Path(folder) / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the header of an index of a corpus")
    try:
        header = json.loads(path.read_bytes())
        known = header["format"] == 1
        _ = header["tokens"] + header["part_tokens"] + header["vocab_size"], header["borders"]
        _ = header["corpus"], header["sha256"], [(part["file"], part["sha256"]) for part in header["parts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not the header of an index ({type(error).__name__}: {error})") from None
    if not known:
        raise ValueError(f"{path}: format {header['format']!r}, expected 1")
    return header

class CorpusIndex:
    """A corpus whose suffixes are sorted: where any run of up to 64 tokens stands in it. Memory-mapped.

    `header` is the folder's, `len()` counts tokens with the borders of documents. FileNotFoundError without a header;
    ValueError when it is not finished, or when a file is missing or has not all its bytes.
    """

    def __init__(self, folder: str | Path, scratch: tempfile.TemporaryDirectory | None = None):
        self.folder, self.header, self._scratch = Path(folder), read_index(folder), scratch
        self.dtype = _type(self.header["vocab_size"])
        self.border = np.iinfo(self.dtype).max
        missing = -(-len(self) // self.header["part_tokens"]) - len(self.header["parts"])
        if missing:
            raise ValueError(f"{self.folder}: not finished, {missing} parts are missing; build it again to go on")
        self.text = self._mapped(TOKENS, self.dtype, len(self) + LONGEST)
        self._first = np.arange(len(self.header["parts"])) * self.header["part_tokens"]
        sizes = np.diff([*self._first, len(self)])
        self._suffixes = [
            self._mapped(part["file"], "<u4", size) for part, size in zip(self.header["parts"], sizes, strict=True)
        ]

    def __len__(self) -> int:
        return self.header["tokens"]

    def _mapped(self, name: str, dtype, count: int) -> np.ndarray:
        file, expected = self.folder / name, int(count) * np.dtype(dtype).itemsize
        found = f"{file.stat().st_size:,}" if file.is_file() else "no file"
        if found != f"{expected:,}":
            raise ValueError(f"{file}: expected {expected:,} bytes, found {found}")
        return np.asarray(np.memmap(file, dtype, "r"))

    def verify(self) -> None:
        "Read every file; ValueError naming the first whose bytes are not those written."
        files = [(TOKENS, self.header["sha256"]), *((part["file"], part["sha256"]) for part in self.header["parts"])]
        for name, digest in tqdm(files, unit=" files", desc="verifying"):
            with (self.folder / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise ValueError(f"{self.folder / name}: its sha256 differs from the header's")

    def places(self, part: int, ranks: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
        "Where in `text` the suffixes with these ranks in a part's order begin."
        return self._first[part] + self._suffixes[part][ranks].astype(np.int64)

    def ranges(
        self, part: int, runs: UInt[np.ndarray, "Q n"]
    ) -> tuple[Int[np.ndarray, "Q"], Int[np.ndarray, "Q"]]:
        "First rank in a part's order, and the one behind the last, of the suffixes that begin with each run."
        wanted, size = as_keys(runs), len(self._suffixes[part])
        rows = sliding_window_view(self.text, runs.shape[1])
        step = max(256, size // max(len(wanted), 1))
        posts = as_keys(rows[self.places(part, np.arange(0, size, step))])  # every so many suffixes

        def bisect(side: str, wanted: np.ndarray) -> np.ndarray:
            behind = np.searchsorted(posts, wanted, side) * step  # the answer lies in the stretch before this post
            low, high = np.maximum(behind - step, 0), np.minimum(behind, size)
            while (open_ := low < high).any():
                middle = np.minimum((low + high) // 2, size - 1)
                keys = as_keys(rows[self.places(part, middle)])
                right = open_ & ((keys < wanted) if side == "left" else (keys <= wanted))
                low, high = np.where(right, middle + 1, low), np.where(open_ & ~right, middle, high)
            return low

        low = bisect("left", wanted)
        high = low.copy()
        there = as_keys(rows[self.places(part, np.minimum(low, size - 1))]) == wanted
        found = np.flatnonzero(there)
        high[found] = bisect("right", wanted[found])
        return low, high

    def counts(self, sample: Sequence[int], n: int) -> Int[np.ndarray, "T-n+1"]:
        "How often each run of n tokens of a sample stands in the corpus. ValueError unless n is 1 to 64."
        if not 1 <= n <= LONGEST:
            raise ValueError(f"runs of {n} tokens: expected 1 to {LONGEST}")
        ids = stored_ids(sample, self.header["vocab_size"], "sample")
        if len(ids) < n:
            return np.zeros(0, np.int64)
        ranges = (self.ranges(part, sliding_window_view(ids, n)) for part in range(len(self._suffixes)))
        return sum(high - low for low, high in ranges)


def as_keys(rows: np.ndarray) -> np.ndarray:
    "Rows of ids as one string of bytes each, in the order of which the suffixes are sorted. (N n) → (N)"
    rows = np.ascontiguousarray(rows)
    return rows.view(f"S{rows.shape[1] * rows.itemsize}")[:, 0]
