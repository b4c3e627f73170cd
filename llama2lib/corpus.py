"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "conversations",
    "manual",
    "docstrings",
    "source_code",
    "read_documents",
    "cut",
    "Source",
    "PACKAGED",
    "packaged_sources",
    "describe",
    "shares",
    "mix",
    "token_dtype",
    "encoded",
    "token_stream",
]


# ---------- chapters/02_pretraining.py · Sources

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


# ---------- chapters/02_pretraining.py · A stream of tokens

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
