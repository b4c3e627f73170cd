"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "conversations",
    "manual",
    "docstrings",
    "source_code",
    "PACKAGED",
    "records",
    "path_documents",
    "read_documents",
    "cut",
    "documents_of",
    "Stream",
    "Source",
    "packaged_sources",
    "describe",
    "shares",
    "check_shares",
    "mix",
    "token_dtype",
    "encoded",
    "token_stream",
]


# ---------- chapters/02_pretraining.py · Sources

import ast
import gzip
import hashlib
import json
import math
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

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

PACKAGED: dict[str, tuple[Callable[[], list[str]], float]] = {
    "conversations": (conversations, 1),
    "manual": (manual, 8),
    "docstrings": (docstrings, 4),
    "source code": (source_code, 1),
}

def records(path: str | os.PathLike, skip_blank: bool = False) -> Iterator[tuple[int, Any]]:
    """The records of JSON lines, or of the JSON list in a file named .json, numbered from 1; gzipped if named .gz.

    Of JSON lines one is in memory at a time; with `skip_blank` those without text count, and are passed over.
    ValueError with file and line for what is not JSON in UTF-8.
    """
    opened, number = gzip.open if str(path).endswith(".gz") else open, 0
    with opened(path, "rb") as file:
        try:
            if re.search(r"\.json(\.gz)?$", str(path)):
                yield from enumerate(json.load(file), 1)
                return
            for number, line in enumerate(file, 1):
                if line.strip() or not skip_blank:
                    yield number, json.loads(line.decode().rstrip("\r\n"))
        except json.JSONDecodeError as error:
            place = f"{path}:{number or error.lineno}"
            raise ValueError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number or 1}: byte {error.start} is not UTF-8 text ({error.reason})") from None
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}:{number + 1}: not gzip ({error})") from None

def path_documents(path: str | Path) -> Iterator[str]:
    """Yield the documents of a text file, a JSONL file (field `text`) or a folder of such; long texts are cut.

    Only one document is in memory at a time. Raises FileNotFoundError; ValueError with file and place for text that is
    not UTF-8, a bad row, or no text at all.
    """
    path, found = Path(path), False
    if not path.exists():
        raise FileNotFoundError(f"{path}: expected a text file, a JSONL file or a folder of them")
    files = (
        [f for f in sorted(path.rglob("*")) if f.is_file() and not _hidden(f.relative_to(path))]
        if path.is_dir()
        else [path]
    )
    for file in files:
        for document in _rows(file) if file.suffix == ".jsonl" else _cut(_lines(file)):
            if document.strip():
                found = True
                yield document
    if not found:
        raise ValueError(f"{path}: no text in {len(files)} file{'s' * (len(files) != 1)}")


def read_documents(path: str | Path) -> list[str]:
    "The documents of a file or folder as a list; errors as in `path_documents`."
    return list(path_documents(path))


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _lines(file: Path) -> Iterator[str]:
    "The lines of a UTF-8 file, ends and all; a Windows end becomes a plain one."
    start = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                yield line.decode("utf-8").replace("\r\n", "\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}: byte {start + error.start} is not UTF-8 text ({error.reason})") from None
            start += len(line)


def _rows(file: Path) -> Iterator[str]:
    for number, row in records(file, skip_blank=True):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"{file}:{number}: expected an object with a string in the field 'text'")
        try:
            row["text"].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{file}:{number}: character {error.start} of 'text' is half a surrogate pair") from None
        yield row["text"]


def cut(text: str, size: int = 4000) -> list[str]:
    "Cut a text into documents of about `size` characters: at a blank line, or else at a line; nothing is lost."
    return [document for document in _cut([text], size) if document.strip()]


def _cut(texts: Iterable[str], size: int = 4000) -> Iterator[str]:
    "`cut` for a text that comes in pieces of whole lines."
    current: list[str] = []
    length = 0
    for line in chain.from_iterable(text.splitlines(keepends=True) for text in texts):
        current.append(line)
        length += len(line)
        if length >= (size if not line.strip() else 2 * size):
            yield "".join(current)
            current, length = [], 0
    yield "".join(current)

def documents_of(name: str) -> Iterator[str]:
    """Yield the documents of a source named by a string: 'manual' and so on, a path, or 'hub:owner/name,split=…'.

    Raises FileNotFoundError when it is none of them; ValueError for a source without text, or one that cannot be read.
    """
    if name in PACKAGED:
        yield from PACKAGED[name][0]()
    elif name.startswith("hub:"):
        yield from _hub_documents(name)
    elif Path(name).exists():
        yield from path_documents(name)
    else:
        raise FileNotFoundError(f"{name!r}: expected one of {', '.join(PACKAGED)}; a path; or hub:owner/name")


def _hub_documents(name: str) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"{name} needs the package datasets: pip install -e '.[hub]'") from None
    path, *options = name.removeprefix("hub:").split(",")
    chosen = {"config": None, "split": "train", "field": "text"}
    for key, equals, value in (option.partition("=") for option in options):
        if key not in chosen or not equals:
            raise ValueError(f"{name}: cannot read {key + equals + value!r}; expected config=…, split=… or field=…")
        chosen[key] = value
    found = False
    for number, row in enumerate(load_dataset(path, chosen["config"], split=chosen["split"], streaming=True)):
        text = row.get(chosen["field"])
        if not isinstance(text, str):
            fields = ", ".join(key for key, value in row.items() if isinstance(value, str)) or "none"
            raise ValueError(f"{name}: row {number} has no text in {chosen['field']!r}; fields with text: {fields}")
        if text.strip():
            found = True
            yield text
    if not found:
        raise ValueError(f"{name}: no text")


@dataclass(frozen=True)
class Stream:
    "A source by its name, read anew each time it is gone through; `upsampling` multiplies its share of the mix."

    name: str
    upsampling: float = 1.0

    def __iter__(self) -> Iterator[str]:
        return documents_of(self.name)

    @cached_property
    def characters(self) -> int:
        "Unicode characters in all documents; reads them once."
        return sum(map(len, self))


# ---------- chapters/02_pretraining.py · The mix

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


def shares(sources: Mapping[str, Source | Stream]) -> dict[str, float]:
    "Share of each source in the mix: characters times up-sampling, made to sum to one. ValueError if one has none."
    weights = {name: source.characters * source.upsampling for name, source in sources.items()}
    for name, weight in weights.items():
        if not 0 < weight < math.inf:
            source = sources[name]
            raise ValueError(f"source {name!r}: {source.characters} characters, up-sampled {source.upsampling}×")
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def check_shares(shares: Mapping[str, float], names: Iterable[str]) -> None:
    "ValueError unless there is a share for every name, none is negative, and they sum to one."
    if set(shares) != set(names):
        raise ValueError(f"shares of {', '.join(shares)}: expected one for each of {', '.join(names)}")
    for name, share in shares.items():
        if not share >= 0:
            raise ValueError(f"source {name!r} has the share {share}: expected 0 or more")
    if not math.isclose(sum(shares.values()), 1, abs_tol=1e-6):
        listed = ", ".join(f"{name} {share}" for name, share in shares.items())
        raise ValueError(f"shares sum to {sum(shares.values()):.6g}, not to 1: {listed}")

def mix(
    sources: Mapping[str, Iterable[str]], shares: Mapping[str, float], seed: int = 0, window: int = 10_000
) -> Iterator[tuple[str, str]]:
    """Yield (source, document) without end, keeping each source's characters at its share.

    Lists are shuffled whole, a `Stream` within `window` documents. ValueError for a source without text, or shares that
    are negative or do not sum to one; a share of 0 leaves a source out.
    """
    check_shares(shares, sources)
    for name, documents in sources.items():
        if iter(documents) is documents:
            raise ValueError(f"source {name!r} can be gone through only once: expected a list or a Stream")
        if not any(documents):
            raise ValueError(f"source {name!r} has no text")
    random = np.random.default_rng(seed)
    drawn = {name: 0 for name in sources if shares[name]}
    endless = {name: _endless(sources[name], random, window) for name in drawn}
    while True:
        name = min(drawn, key=lambda name: drawn[name] / shares[name])
        document = next(endless[name])
        drawn[name] += len(document)
        yield name, document


def _endless(documents: Iterable[str], random: np.random.Generator, window: int) -> Iterator[str]:
    "Documents again and again, in another order each time."
    while True:
        if isinstance(documents, Sequence):
            held = documents
        else:
            held = []
            for document in documents:
                if len(held) < window:
                    held.append(document)
                    continue
                place = random.integers(window)
                held[place], document = document, held[place]
                yield document
        yield from (held[i] for i in random.permutation(len(held))[::-1])


# ---------- chapters/02_pretraining.py · A stream of tokens

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
