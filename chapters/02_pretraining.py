# %% [markdown]
# # Pretraining
#
# > From documents to a trained base model: where text comes from, how sources are mixed, and the optimiser's recipe.
# > Paper sections 2.1 and 2.2.
#
# The paper trains on two trillion tokens of public text, with 'the most factual sources' up-sampled, and names no
# source. It does name the recipe: AdamW, warm-up, a cosine to a tenth of the peak, weight decay, clipping, four million
# tokens a step.
#
# > Ours: four domains of real text that every installation has, in place of the paper's private mix. The recipe is the
# > paper's, scaled down.

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch

from llama2lib import ledger, paper, plots
from llama2lib.model import LLAMA2, Llama

plt.rcParams.update(plots.STYLE)

# %% [markdown]
# ## Sources
#
# Four domains come with Python itself and with one small package: human conversations (`chitchat-dataset`, MIT
# licence), the language reference that `help()` prints, the docstrings of the standard library, and its source code. A
# source is a list of documents; the texts differ a little between Python versions, so a digest is recorded with every
# result.

# %%
#| export corpus
import ast
import hashlib
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import chain
from pathlib import Path

import numpy as np

from llama2lib.tokenizer import Tokenizer


@cache
def conversations() -> list[str]:
    "Dialogues between two people, a turn a line, `A:` and `B:` in turn (package chitchat-dataset)."
    dialogs = json.loads(resources.files("chitchat_dataset").joinpath("dataset.json").read_text("utf-8"))
    texts = []
    for dialog in dialogs.values():
        turns = (" ".join(message["text"].strip() for message in turn) for turn in dialog["messages"])
        texts.append("\n".join(f"{'AB'[i % 2]}: {turn}" for i, turn in enumerate(turns)))
    return texts


@cache
def manual() -> list[str]:
    "The Python language reference, a topic a document (the text behind `help()`)."
    from pydoc_data.topics import topics

    return list(topics.values())


@cache
def _modules() -> list[tuple[str, list]]:
    "The standard library's modules, without tests and tables of character codes: (text, [(name, docstring node)])."
    folder = Path(sysconfig.get_paths()["stdlib"])
    left_out = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "encodings",
        "pydoc_data",
        "__pycache__",
    }
    modules, documented = [], (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in sorted(folder.rglob("*.py")):
        if left_out & set(file.relative_to(folder).parts):
            continue
        text = file.read_text("utf-8", errors="replace")
        try:
            nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, documented)]
        except SyntaxError:  # templates and deliberately broken files
            continue
        modules.append((text, [(getattr(n, "name", ""), n) for n in nodes if ast.get_docstring(n)]))
    return modules


@cache
def docstrings() -> list[str]:
    "The standard library's docstrings, a module a document."
    texts = ("\n\n".join(f"{name}\n{ast.get_docstring(n)}".strip() for name, n in found) for _, found in _modules())
    return [text for text in texts if text]


@cache
def source_code() -> list[str]:
    "The standard library's code, a module a document, without its docstrings: those are a source of their own."
    texts = []
    for text, found in _modules():
        gone = {row for _, n in found for row in range(n.body[0].lineno, n.body[0].end_lineno + 1)}
        texts.append("".join(line for row, line in enumerate(text.splitlines(keepends=True), 1) if row not in gone))
    return [text for text in texts if text.strip()]


# %% [markdown]
# Any other text will do as well: a file, or a folder of files. A file that is not UTF-8 stops with its name and the
# place, and is not skipped.


# %%
#| export corpus
def read_documents(path: str | Path) -> list[str]:
    """Documents of a text file, a JSONL file (field `text`), or a folder of such. Long texts are cut at blank lines.

    Raises FileNotFoundError; ValueError with file and place for text that is not UTF-8, a bad row, or no text at all.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a text file, a JSONL file or a folder of them")
    files = (
        [f for f in sorted(path.rglob("*")) if f.is_file() and not _hidden(f.relative_to(path))]
        if path.is_dir()
        else [path]
    )
    documents = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: byte {error.start} is not UTF-8 text ({error.reason})") from None
        documents += list(_rows(file, text)) if file.suffix == ".jsonl" else cut(text)
    if not documents:
        raise ValueError(f"{path}: no text in {len(files)} file{'s' * (len(files) != 1)}")
    return documents


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _rows(file: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        try:
            row = json.loads(line) if line.strip() else {"text": ""}
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"{file}:{number}: expected an object with a string in the field 'text'")
        if row["text"].strip():
            yield row["text"]


def cut(text: str, size: int = 4000) -> list[str]:
    "Cut a text into documents of about `size` characters: at a blank line, or else at a line; nothing is lost."
    documents, current = [], ""
    for line in text.splitlines(keepends=True):
        current += line
        if len(current) >= (size if not line.strip() else 2 * size):
            documents, current = [*documents, current], ""
    return [document for document in [*documents, current] if document.strip()]


# %% [markdown]
# ## The mix
#
# Each source gets a share of the tokens: its size times a multiplier. The factual ones count eight- and fourfold, which
# is what the paper means by up-sampling; it does not say by how much.
#
# A twentieth of each source is held out. A document's own digest decides, so that the split stays when documents come
# and go, and a text that occurs twice cannot be on both sides. For the same reason the code comes without its
# docstrings.


# %%
#| export corpus
@dataclass(frozen=True)
class Source:
    "Documents of one domain; `upsampling` multiplies its share of the mix (section 2.1)."

    documents: tuple[str, ...]
    upsampling: float = 1.0

    def __post_init__(self):
        if not any(self.documents) or not self.upsampling > 0:
            raise ValueError(f"a source of {self.characters} characters, up-sampled {self.upsampling}×: expected some")

    @property
    def characters(self) -> int:
        "Unicode characters in all documents."
        return sum(map(len, self.documents))

    @property
    def digest(self) -> str:
        "sha256 of all documents in order: which text a result was measured on."
        return hashlib.sha256("\0".join(self.documents).encode("utf-8", "replace")).hexdigest()

    def split(self) -> tuple[list[str], list[str]]:
        "Documents for training, and about one in twenty (at least one) held out; ValueError if there is only one."
        digests = [hashlib.sha256(document.encode("utf-8", "replace")).digest() for document in self.documents]
        limit = max(min(digests, default=b""), bytes([256 // 20]))
        parts: tuple[list[str], list[str]] = [], []
        for document, digest in zip(self.documents, digests, strict=True):
            parts[digest <= limit].append(document)
        if not parts[0]:
            what = f"{len(self.documents)} documents, {len(set(self.documents))} of them different"
            raise ValueError(f"{what} ({self.characters} characters): expected at least two, one to test on")
        return parts


PACKAGED: dict[str, tuple[Callable[[], list[str]], float]] = {
    "conversations": (conversations, 1),
    "manual": (manual, 8),
    "docstrings": (docstrings, 4),
    "source code": (source_code, 1),
}


def packaged_sources() -> dict[str, Source]:
    "The four domains that come with the installation, the factual ones up-sampled."
    return {name: Source(tuple(load()), upsampling) for name, (load, upsampling) in PACKAGED.items()}


def describe(sources: Mapping[str, Source]) -> str:
    "A table of sources: documents, characters, up-sampling, share of the mix, and the digest that identifies the text."
    lines = [f"{'source':16} {'documents':>9} {'characters':>11}  up-sampled  share  sha256"]
    for name, source in sources.items():
        sizes = f"{len(source.documents):9,} {source.characters:11,} {source.upsampling:10}×"
        lines.append(f"{name:16} {sizes} {shares(sources)[name]:6.1%}  {source.digest[:12]}")
    return "\n".join(lines)


def shares(sources: Mapping[str, Source]) -> dict[str, float]:
    "Share of each source in the mix: characters times up-sampling, made to sum to one."
    weights = {name: source.characters * source.upsampling for name, source in sources.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


# %%
from llama2lib.corpus import describe, packaged_sources, shares

sources = packaged_sources()
print(describe(sources))
assert math.isclose(sum(shares(sources).values()), 1)

# %% [markdown]
# ## A stream of tokens
#
# Documents are drawn from whichever source lags most behind its share, each source in an order shuffled by the seed,
# and again from the start when it runs out. Every document stands between one BOS and one EOS, as every dialogue turn
# will, and they follow each other without padding.


# %%
#| export corpus
def mix(sources: Mapping[str, Sequence[str]], shares: Mapping[str, float], seed: int = 0) -> Iterator[tuple[str, str]]:
    "Yield (source, document) without end, keeping each source's characters at its share; ValueError if one is empty."
    for name, documents in sources.items():
        if not any(documents):
            raise ValueError(f"source {name!r} has no text")
    random = np.random.default_rng(seed)
    drawn = dict.fromkeys(sources, 0)
    waiting: dict[str, list[str]] = {name: [] for name in sources}
    while True:
        name = min(sources, key=lambda name: drawn[name] / shares[name])
        if not waiting[name]:
            waiting[name] = [sources[name][i] for i in random.permutation(len(sources[name]))]
        document = waiting[name].pop()
        drawn[name] += len(document)
        yield name, document


# %%
#| export corpus
def token_dtype(vocab_size: int) -> np.dtype:
    "The type of stored token ids: little-endian uint16 where the vocabulary fits, else uint32."
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def encoded(tokenizer: Tokenizer, documents: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (document, its ids between one BOS and one EOS), tokenised some at a time in several threads.

    ValueError when a tokenizer gives an id outside its vocabulary, or BOS or EOS inside a document.
    """
    dtype, tokens = token_dtype(tokenizer.vocab_size), (tokenizer.bos_id, tokenizer.eos_id)
    for batch in _batches(documents):
        ids = tokenizer.encode_batch(batch, bos=True, eos=True)
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        flat = np.fromiter(chain.from_iterable(ids), np.int64, lengths.sum())
        if flat.min() < 0 or flat.max() >= tokenizer.vocab_size:
            size = tokenizer.vocab_size
            raise ValueError(f"ids from {flat.min()} to {flat.max()}: the vocabulary has ids 0 to {size - 1}")
        if any((flat == token).sum() != len(batch) for token in tokens):
            raise ValueError(f"one of {len(batch)} documents holds BOS or EOS ({tokens[0]}, {tokens[1]}) inside")
        yield from zip(batch, np.split(flat.astype(dtype), lengths.cumsum()[:-1]), strict=True)


def _batches(documents: Iterable[str], characters: int = 2**18) -> Iterator[list[str]]:
    "Documents in lists of at least so many characters (fewer at the end)."
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def token_stream(tokenizer: Tokenizer, documents: Iterable[str], limit: int | None = None) -> np.ndarray:
    "BOS, document, EOS, BOS, next document, … as one array of uint16 or uint32, at most `limit` tokens; 1-D."
    pieces, total = [], 0
    for _, ids in encoded(tokenizer, documents):
        pieces.append(ids)
        total += len(ids)
        if limit is not None and total >= limit:
            break
    if not pieces:
        raise ValueError("no documents to make tokens of")
    return np.concatenate(pieces)[:limit]


# %%
#| export shards
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from tqdm import tqdm

from llama2lib.corpus import encoded, token_dtype
from llama2lib.recipes import write_atomic
from llama2lib.tokenizer import Tokenizer

HEADER = "shards.json"


def write_shards(
    folder: str | Path,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    tokens: int | None = None,
    shard_tokens: int = 2**30,
    recipe: str = "",
) -> "Shards":
    """Write documents as `folder`/shard-00000.bin, … and a header; a shard ends with the document that fills it.

    Stops at the end of the first document that makes it `tokens`, or with the last. Stopped at any moment, the same
    call with the same documents goes on after the last finished shard, and the files are those of one go. `recipe` says
    in words what the documents are. ValueError: a folder begun with another tokenizer, recipe, size or other documents;
    no documents. OSError (no space) leaves the finished shards.
    """
    folder, documents = Path(folder), iter(documents)
    header = _begun(folder, tokenizer, {"limit": tokens, "shard_tokens": shard_tokens, "recipe": recipe})
    for shard in header["shards"][: 1 if header["complete"] else None]:
        _skip(documents, shard, folder)
    if header["complete"]:
        return Shards(folder, tokenizer)
    limit = math.inf if tokens is None else tokens
    with tqdm(total=tokens, initial=header["tokens"], unit=" tokens", unit_scale=True, desc=folder.name) as bar:
        stream = encoded(tokenizer, documents)
        while header["tokens"] < limit:
            file = folder / f"shard-{len(header['shards']):05}.bin"
            shard = _write_shard(file, stream, min(shard_tokens, limit - header["tokens"]), bar)
            if shard is None:
                break
            header["shards"].append(shard)
            for total in ("tokens", "documents"):
                header[total] += shard[total]
            _write_header(folder, header)
    if not header["shards"]:
        raise ValueError(f"{folder}: no documents to make tokens of")
    _write_header(folder, header | {"complete": True})
    return Shards(folder, tokenizer)


def _begun(folder: Path, tokenizer: Tokenizer, settings: dict) -> dict:
    "The header of a folder that these settings began, or a new one; removes what a kill left half-written."
    fixed = {"format": 1, "tokenizer": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
    fixed |= {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id, "dtype": token_dtype(tokenizer.vocab_size).name}
    fixed |= settings
    if not (folder / HEADER).exists():
        header = fixed | {"complete": False, "tokens": 0, "documents": 0, "shards": []}
        _write_header(folder, header)
        return header
    header = read_header(folder)
    for name, value in fixed.items():
        if header.get(name) != value:
            raise ValueError(
                f"{folder / HEADER}: begun with {name} {header.get(name)!r}, not {value!r}; take another folder"
            )
    _check_sizes(folder, header)
    for left_over in folder.glob(".shard-*.tmp"):
        left_over.unlink()
    return header


def _skip(documents: Iterator[str], shard: dict, folder: Path) -> None:
    "Pass over the documents of a finished shard; ValueError unless they are the ones it was made of."
    digest, count = hashlib.sha256(), 0
    for document in islice(documents, shard["documents"]):
        digest.update(document.encode() + b"\0")
        count += 1
    if (count, digest.hexdigest()) != (shard["documents"], shard["text"]):
        raise ValueError(f"{folder / shard['file']} was made of other documents; take another folder for these")


def _write_shard(file: Path, stream: Iterator[tuple[str, np.ndarray]], enough: float, bar: tqdm) -> dict | None:
    "Write documents until there are `enough` tokens: the shard's entry for the header, or None if no document is left."
    temporary = file.with_name(f".{file.name}.tmp")
    shard = {"file": file.name, "tokens": 0, "documents": 0}
    content, text = hashlib.sha256(), hashlib.sha256()
    try:
        with temporary.open("wb") as out:
            for document, ids in stream:
                out.write(ids)
                content.update(ids)
                text.update(document.encode() + b"\0")
                shard["tokens"] += len(ids)
                shard["documents"] += 1
                bar.update(len(ids))
                if shard["tokens"] >= enough:
                    break
            out.flush()
            os.fsync(out.fileno())
        if shard["documents"]:
            os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
    return shard | {"sha256": content.hexdigest(), "text": text.hexdigest()} if shard["documents"] else None


def _write_header(folder: Path, header: dict) -> None:
    write_atomic(folder / HEADER, json.dumps(header, indent=1) + "\n")


def read_header(folder: str | Path) -> dict:
    "The header of a folder of shards. FileNotFoundError, or ValueError if it cannot be read."
    path = Path(folder) / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected the header of a folder of token shards")
    try:
        header = json.loads(path.read_bytes())
        known, _, _ = header["format"] == 1, header["tokens"], [shard["sha256"] for shard in header["shards"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a header of token shards ({type(error).__name__}: {error})") from None
    if not known:
        raise ValueError(f"{path}: format {header['format']!r}, expected 1")
    return header


def _check_sizes(folder: Path, header: dict) -> None:
    "ValueError unless every shard is there with all its bytes."
    for shard in header["shards"]:
        file, expected = folder / shard["file"], shard["tokens"] * np.dtype(header["dtype"]).itemsize
        found = f"{file.stat().st_size:,}" if file.is_file() else "no file"
        if found != f"{expected:,}":
            raise ValueError(f"{file}: expected {expected:,} bytes ({shard['tokens']:,} tokens), found {found}")


# %%
#| export shards
class Shards:
    """The tokens of a finished folder of shards, memory-mapped: none is in memory until it is read.

    `header` is the folder's; `len()` counts tokens. FileNotFoundError without a header; ValueError when it is not
    complete, when a file is missing or has not all its bytes, or when `tokenizer` is not the one that made it.
    """

    def __init__(self, folder: str | Path, tokenizer: Tokenizer | None = None):
        self.folder = Path(folder)
        self.header = read_header(folder)
        if not self.header["complete"]:
            raise ValueError(f"{self.folder}: not finished; run the command that began it again")
        _check_sizes(self.folder, self.header)
        if tokenizer is not None and tokenizer.digest != self.header["tokenizer"]:
            made, given = self.header["tokenizer"][:12], tokenizer.digest[:12]
            raise ValueError(f"{self.folder}: made with tokenizer {made}…, not with {tokenizer.path} ({given}…)")
        self.dtype = np.dtype(self.header["dtype"]).newbyteorder("<")
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in self.header["shards"])])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def digest(self) -> str:
        "sha256 that identifies the tokens: of the type of their ids and the sha256 of every shard."
        parts = [self.header["dtype"], *(shard["sha256"] for shard in self.header["shards"])]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()

    def verify(self) -> None:
        "Read every shard; ValueError naming the first whose bytes are not those written, or an id too large."
        for number, shard in enumerate(tqdm(self.header["shards"], unit=" shards", desc="verifying")):
            ids, content = self._shard(number), hashlib.sha256()
            for start in range(0, len(ids), 2**24):
                content.update(part := ids[start : start + 2**24])
                if part.max() >= self.header["vocab_size"]:
                    size = self.header["vocab_size"]
                    raise ValueError(f"{self.folder / shard['file']}: id {part.max()} in a vocabulary of {size}")
            if content.hexdigest() != shard["sha256"]:
                raise ValueError(f"{self.folder / shard['file']}: its sha256 differs from the header's")

    def read(self, start: int, stop: int) -> np.ndarray:
        "Tokens start … stop - 1, across the borders of shards; 1-D. IndexError outside the data."
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        parts, number = [np.empty(0, self.dtype)], int(np.searchsorted(self._starts, start, "right")) - 1
        while start < stop:
            first, end = int(self._starts[number]), min(stop, int(self._starts[number + 1]))
            parts.append(self._shard(number)[start - first : end - first])
            start, number = end, number + 1
        return np.concatenate(parts)

    def windows(self, starts: np.ndarray, width: int) -> np.ndarray:
        "Rows of `width` tokens that begin at each of `starts`. (R) → (R, width)"
        out = np.empty((len(starts), width), self.dtype)
        numbers = np.searchsorted(self._starts, starts, "right") - 1
        whole = starts + width <= self._starts[numbers + 1]
        for number in np.unique(numbers[whole]):
            picked = whole & (numbers == number)
            out[picked] = windows(self._shard(number), starts[picked] - self._starts[number], width)
        for row in np.flatnonzero(~whole):
            out[row] = self.read(int(starts[row]), int(starts[row]) + width)
        return out

    def _shard(self, number: int) -> np.ndarray:
        "One shard, mapped for this call only: thousands of open maps would run out of file handles."
        return np.asarray(np.memmap(self.folder / self.header["shards"][number]["file"], self.dtype, "r"))


def windows(tokens: np.ndarray, starts: np.ndarray, width: int) -> np.ndarray:
    "Rows of `width` tokens that begin at each of `starts` in a 1-D array. (R) → (R, width)"
    return sliding_window_view(tokens, width)[starts]


# %%
#| export shards
def shuffled(numbers: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Places of `numbers` (int64, 0 … size - 1) in an order that `key` shuffles: one to one, and without a table.

    A Feistel network: split the bits in two halves, and let each half in turn be changed by a hash of the other, which
    can be undone whatever the hash. It permutes 4^k numbers; what lands at `size` or beyond goes through again.
    """
    half = np.uint64(max(2, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = np.random.SeedSequence(key).generate_state(6, np.uint64)
    out, todo = numbers.astype(np.uint64), np.arange(len(numbers))
    while len(todo):
        left, right = out[todo] >> half, out[todo] & mask
        for round_key in keys:
            mixed = (right ^ round_key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
            left, right = right, left ^ (mixed >> (np.uint64(64) - half))
        out[todo] = left << half | right
        todo = todo[out[todo] >= size]
    return out.astype(np.int64)


class Packed:
    """Rows of `length` + 1 tokens cut from data one behind the other; neighbours share a token, so no target is lost.

    `data`: a 1-D array of ids, or `Shards`. An epoch shows every row once, in an order shuffled by `seed` and the
    epoch's number (None: as they stand); the rows of all epochs form one endless stream, and a row's number in it is
    all that a run has to remember. ValueError when the data does not fill one row.
    """

    def __init__(self, data: np.ndarray | Shards, length: int, seed: int | None = None):
        self.data, self.length, self.seed = data, length, seed
        if length < 1 or len(self) < 1:
            raise ValueError(f"{len(data)} tokens do not fill one row of {length} and its target")

    def __len__(self) -> int:
        "Rows of an epoch."
        return (len(self.data) - 1) // self.length

    def rows(self, first: int, count: int) -> Tensor:
        "Rows first … first + count - 1 of the endless stream, int64. → (count, length + 1)"
        if first < 0 or count < 0:
            raise ValueError(f"{count} rows from row {first}: expected numbers that are not negative")
        epochs, places = np.divmod(np.arange(first, first + count), len(self))
        if self.seed is not None:
            for epoch in np.unique(epochs):
                now = epochs == epoch
                places[now] = shuffled(places[now], len(self), (self.seed, int(epoch)))
        starts, width = places * self.length, self.length + 1
        if isinstance(self.data, Shards):
            return torch.from_numpy(self.data.windows(starts, width).astype(np.int64))
        return torch.from_numpy(windows(self.data, starts, width).astype(np.int64))


# %%
from itertools import islice

from llama2lib.corpus import mix

drawn = dict.fromkeys(sources, 0)
for name, document in islice(mix({n: s.documents for n, s in sources.items()}, shares(sources)), 3000):
    drawn[name] += len(document)
for name, share in shares(sources).items():
    print(f"{name:14} wanted {share:.1%}, drew {drawn[name] / sum(drawn.values()):.1%}")

# %% [markdown]
# ## The optimiser
#
# The paper gives AdamW with $\beta = (0.9, 0.95)$ and $\epsilon = 10^{-5}$, weight decay 0.1, gradients clipped to norm
# 1, a warm-up of 2,000 steps and a cosine down to a tenth of the peak.
#
# > Ours: the paper does not say what is exempt from weight decay. We decay matrices, the embedding among them, and
# > leave the norms' weights alone: pulling a scale towards zero is not a prior anyone wants.

# %%
#| export optim
import math

import torch
from torch import nn


def cosine_lr(step: int, peak: float, warmup_steps: int, total_steps: int, final: float = 0.1) -> float:
    """Learning rate of 0-based `step` (section 2.2): linear to `peak`, then a cosine to `final`·peak at the last step.

    Step warmup_steps - 1 is the first at the peak, step total_steps - 1 the last of all.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / max(1, total_steps - warmup_steps)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * min(progress, 1))) / 2)


def adamw(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-5,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    "AdamW with the paper's constants (section 2.2); vectors, that is the norms' weights, are not decayed (ours)."
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


# %%
from llama2lib.optim import adamw, cosine_lr

lr = [cosine_lr(step, peak=3e-4, warmup_steps=2000, total_steps=500_000) for step in range(500_000)]
assert max(lr) == lr[1999] == 3e-4 and math.isclose(lr[-1], 3e-5)
fig, ax = plt.subplots()
ax.plot(np.arange(0, 500, 0.5), np.array(lr[::500]) * 1e4)
ax.plot(2, 3, "o", label="end of the warm-up, step 2,000")
ax.set(
    xlabel="thousand steps of 4M tokens",
    ylabel="learning rate (×10⁻⁴)",
    title="7B: the warm-up takes 0.4 % of the training",
    ylim=(0, None),
)
ax.legend()
plots.save(fig, "02_learning_rate.png")

# %% [markdown]
# ## The recipe
#
# One frozen record holds what a run needs besides the model. Its defaults are the paper's; the sizes differ in their
# learning rate only (Table 1). Two trillion tokens in steps of four million are 500,000 steps (of 977 whole rows, the
# program rounds).

# %%
#| export pretrain
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from llama2lib.model import Llama
from llama2lib.optim import adamw, cosine_lr


@dataclass(frozen=True)
class PretrainConfig:
    "The pretraining recipe of section 2.2; the defaults are the paper's for 7B and 13B."

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-5
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    warmup_steps: int = 2000
    final_lr: float = 0.1  # share of the peak that the cosine ends at
    batch_tokens: int = 4_000_000
    tokens: int = 2_000_000_000_000
    max_seq_len: int = 4096
    micro_batch: int = 16  # rows in one forward pass; the rest of the batch is accumulated

    def __post_init__(self):
        if not self.max_seq_len <= self.batch_tokens <= self.tokens:
            sizes = f"max_seq_len {self.max_seq_len}, batch_tokens {self.batch_tokens}, tokens {self.tokens}"
            raise ValueError(f"{sizes}: expected a row to fit into a batch, and a batch into all tokens")
        if not 0 <= self.warmup_steps < self.steps or self.micro_batch < 1:
            raise ValueError(f"warmup_steps {self.warmup_steps} of {self.steps} steps: expected fewer than all")

    @property
    def batch_rows(self) -> int:
        "Rows of `max_seq_len` tokens in an optimiser step: `batch_tokens`, rounded to whole rows."
        return max(1, round(self.batch_tokens / self.max_seq_len))

    @property
    def steps(self) -> int:
        "Optimiser steps of the run."
        return max(1, round(self.tokens / self.batch_tokens))


PRETRAIN = {
    "7B": PretrainConfig(),
    "13B": PretrainConfig(),
    "34B": PretrainConfig(lr=1.5e-4),
    "70B": PretrainConfig(lr=1.5e-4),
    "book-1M": PretrainConfig(lr=3e-3, warmup_steps=40, batch_tokens=2048, tokens=1_500_000, max_seq_len=256),
}

# %%
from llama2lib.pretrain import PRETRAIN

constants = paper.TEXT["Section 2.2"]
for name in (
    "betas",
    "eps",
    "weight_decay",
    "grad_clip",
    "warmup_steps",
    "final_lr",
    "batch_tokens",
    "tokens",
    "max_seq_len",
):
    ledger.record(
        "Section 2.2", name, "preset", constants[name], getattr(PRETRAIN["7B"], name),
        evidence=f"llama2lib/pretrain.py::{name}",
    )  # fmt: skip
for size, peak in constants["lr"].items():
    ledger.record(
        "Table 1",
        f"{size}: learning rate",
        "preset",
        peak,
        PRETRAIN[size].lr,
        evidence="llama2lib/pretrain.py::PRETRAIN",
    )
assert PRETRAIN["70B"].steps == 500_000

# %% [markdown]
# Two claims of section 2 follow from Table 1 alone: a context twice as long as Llama 1's, and '40 % more tokens', which
# holds against the larger Llama 1 models (1.4T), rounded to tens.

# %%
new, old = paper.PAPER["Table 1"]["Llama 2 70B"], paper.PAPER["Table 1"]["Llama 1 65B"]
for claim, criterion, printed, ours in (
    ("context length, times Llama 1's", "= paper", 2, new["context_k"] / old["context_k"]),
    ("more tokens than Llama 1 33B and 65B (%)", "= paper ± 5", 40, 100 * (new["tokens_T"] / old["tokens_T"] - 1)),
):
    row = ledger.record("Section 2", claim, criterion, printed, ours, evidence="chapters/02_pretraining.py::ours")
    print(f"{claim}: {ours:.4g}, the paper says {printed}: {row['status']}")

# %% [markdown]
# ## The loop
#
# A step adds up the loss over its micro-batches, divides by the number of targets in the whole step, clips, and moves.
# The loop hands out a line of numbers after every step and stops at the first loss that is not finite; what to do
# between steps (draw, evaluate, save) is up to the caller.


# %%
#| export pretrain
class Step(NamedTuple):
    "What one optimiser step measured: loss in nats per token, gradient norm before clipping, tokens seen so far."

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int


def rows(stream: np.ndarray, length: int, seed: int | None = None) -> torch.Tensor:
    "Cut a 1-D stream into rows of `length` + 1 tokens, each sharing one with the next, in an order shuffled by `seed`."
    count = (len(stream) - 1) // length
    if count < 1:
        raise ValueError(f"{len(stream)} tokens do not fill one row of {length} and its target")
    starts = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count)
    return torch.from_numpy(stream.astype(np.int64)[starts[:, None] * length + np.arange(length + 1)])


def pretrain(model: Llama, stream: np.ndarray, config: PretrainConfig, seed: int = 0) -> Iterator[Step]:
    """Train `model` on a 1-D array of token ids, yielding a `Step` after each step; goes round when the array ends.

    Leaves the model in training mode. ValueError when the array does not fill one row.
    Raises FloatingPointError, before the weights change, when the loss or the gradient is not finite.
    """
    device = model.tok_embeddings.weight.device
    data = rows(stream, config.max_seq_len, seed)
    optimizer = adamw(model, config.lr, config.betas, config.eps, config.weight_decay)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    for step in range(config.steps):
        picked = torch.arange(step * config.batch_rows, (step + 1) * config.batch_rows) % len(data)
        lr = cosine_lr(step, config.lr, config.warmup_steps, config.steps, config.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        targets, loss = config.batch_rows * config.max_seq_len, 0.0
        for part in picked.split(config.micro_batch):
            batch = data[part].to(device)
            part_loss = next_token_loss(model, batch) / targets
            part_loss.backward()
            loss += part_loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip).item()
        if not math.isfinite(loss + norm):
            raise FloatingPointError(
                f"step {step}: loss {loss}, gradient norm {norm}; rows {picked.tolist()} of the stream"
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield Step(step, loss, lr, norm, (step + 1) * targets)


def next_token_loss(model: Llama, batch: torch.Tensor) -> torch.Tensor:
    "Summed cross-entropy (nats) of tokens 1…T of each row given those before. (B T+1) → ()"
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")


@torch.no_grad()
def held_out_loss(model: Llama, stream: np.ndarray, length: int, max_rows: int = 64) -> float:
    "Mean loss in nats per token over the first `max_rows` rows of a stream."
    data = rows(stream, length)[:max_rows].to(model.tok_embeddings.weight.device)
    return sum(next_token_loss(model, part).item() for part in data.split(16)) / data[:, 1:].numel()


# %% [markdown]
# A quick look: a model with 100,000 parameters learns one page by heart.

# %%
from llama2lib.pretrain import PretrainConfig, pretrain

torch.manual_seed(0)
page = np.frombuffer(sources["manual"].documents[0].encode()[:1025], np.uint8).astype(np.uint16)
tiny = Llama(LLAMA2["debug"])
config = PretrainConfig(lr=1e-2, warmup_steps=5, batch_tokens=1024, tokens=1024 * 60, max_seq_len=128)
losses = [step.loss for step in pretrain(tiny, page, config)]
print(f"loss {losses[0]:.2f} → {losses[-1]:.2f} nats per byte; a uniform guess costs {math.log(512):.2f}")
assert abs(losses[0] - math.log(512)) < 0.3 and losses[-1] < losses[0] / 2
