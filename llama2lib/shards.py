"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "HEADER",
    "write_shards",
    "read_header",
    "Shards",
    "windows",
    "shuffled",
    "Packed",
    "ShardsConfig",
    "make_shards",
    "cli",
]


# ---------- chapters/02_pretraining.py · Tokens on disk

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
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
    in words what the documents are. ValueError: a folder begun with another tokenizer, recipe, size or other documents
    (of a complete folder, the first shard's are compared); no documents. OSError (no space) leaves what is finished.
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
    header = fixed | {"complete": False, "tokens": 0, "documents": 0, "shards": []}
    if (folder / HEADER).exists():
        header = read_header(folder)
    for name, value in fixed.items():
        if header.get(name) != value:
            begun = f"begun with {name} {header.get(name)!r}, not {value!r}"
            raise ValueError(f"{folder / HEADER}: {begun}; take another folder")
    _check_sizes(folder, header)
    for left_over in folder.glob(".shard*.tmp"):
        left_over.unlink()
    if not (folder / HEADER).exists():
        _write_header(folder, header)
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


# ---------- chapters/02_pretraining.py · Rows

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


# ---------- chapters/02_pretraining.py · From names to shards

from dataclasses import asdict, dataclass, field

import tyro

from llama2lib.cleaning import Copies, Rules, clean
from llama2lib.corpus import PACKAGED, Stream, check_shares, mix, shares
from llama2lib.launch import one_line_errors
from llama2lib.tokenizer import train_tokenizer


@dataclass(frozen=True)
class ShardsConfig:
    """Write the token shards of one or several sources.

    The same command continues a run that was stopped. Pretrain on the folder afterwards.
    """

    folder: tyro.conf.Positional[Path]
    "where the shards go, with a copy of the tokenizer"
    sources: tuple[str, ...] = tuple(PACKAGED)
    "packaged domains; text files, JSONL files or folders; hub:owner/name[,config=…][,split=…][,field=…]"
    shares: tuple[float, ...] = ()
    "share of each source in the mix, in their order; they sum to 1"
    upsampling: tuple[float, ...] = ()
    "or: a multiplier for each source's size"
    tokens: int | None = None
    "stop with the document that makes it so many; none: every document once, not mixed"
    tokenizer: Path | None = None
    "a SentencePiece model; none: train one on the first documents"
    vocab_size: int = 32_000
    "pieces of a tokenizer trained here"
    tokenizer_characters: int = 50_000_000
    "text that it is trained on"
    clean: bool = False
    "repair encodings; remove copies, near copies and documents rich in personal data"
    rules: Rules = field(default_factory=Rules)
    "what cleaning removes"
    shard_tokens: int = 2**30
    "tokens in a file; two bytes each up to a vocabulary of 65,536"
    seed: int = 0
    "order of the documents in the mix"

    def __post_init__(self):
        for name, values in (("shares", self.shares), ("upsampling", self.upsampling)):
            if values and len(values) != len(self.sources):
                raise ValueError(f"{name} {values}: expected one for each of {', '.join(self.sources)}")
            if values and self.tokens is None:
                raise ValueError(f"{name} {values} need tokens: a mix has no end")
        if self.shares and self.upsampling:
            raise ValueError(f"shares {self.shares} and upsampling {self.upsampling}: expected one of them")
        if len(set(self.sources)) < len(self.sources) or not self.sources:
            raise ValueError(f"sources {', '.join(self.sources)}: expected at least one, and each once")
        if self.shares:
            check_shares(dict(zip(self.sources, self.shares, strict=True)), self.sources)


def make_shards(config: ShardsConfig) -> Shards:
    "The shards of the sources that `config` names, begun or continued. ValueError as in `write_shards` and `mix`."
    upsampling = config.upsampling or (1.0,) * len(config.sources)
    sources = {name: Stream(name, factor) for name, factor in zip(config.sources, upsampling, strict=True)}
    if config.clean:
        sources = _cleaned(sources, config)
    if config.tokens is not None:
        wanted = dict(zip(sources, config.shares, strict=True)) if config.shares else shares(sources)

    def documents() -> Iterator[str]:
        if config.tokens is None:
            return chain.from_iterable(sources.values())
        return (document for _, document in mix(sources, wanted, config.seed))

    named = ("sources", "shares", "upsampling", "seed", "clean", "rules")
    recipe = json.dumps({name: value for name, value in asdict(config).items() if name in named}, sort_keys=True)
    tokenizer = _tokenizer(config, documents)
    return write_shards(config.folder, tokenizer, documents(), config.tokens, config.shard_tokens, recipe)


def _cleaned(sources: dict[str, Stream], config: ShardsConfig) -> dict[str, Stream]:
    "The sources as files of cleaned text, written when they are not all there; one index for all of them."
    key = hashlib.sha256(repr((config.sources, config.rules)).encode()).hexdigest()[:12]
    files = {name: config.folder / f"clean-{key}-{number:02}.jsonl" for number, name in enumerate(sources)}
    if not all(file.exists() for file in files.values()):
        config.folder.mkdir(parents=True, exist_ok=True)
        copies = Copies(config.rules)
        for name, file in files.items():
            kept, report = clean(sources[name], config.rules, copies)
            with file.with_suffix(".tmp").open("w", encoding="utf-8") as out:
                out.writelines(json.dumps({"text": document}) + "\n" for document in kept)
            print(f"{name}\n{report}")
        for file in files.values():
            os.replace(file.with_suffix(".tmp"), file)
    return {name: Stream(str(file), sources[name].upsampling) for name, file in files.items()}


def _tokenizer(config: ShardsConfig, documents: Callable[[], Iterator[str]]) -> Tokenizer:
    "The tokenizer of the command, and a copy of it in the folder; trained first if there is none."
    copy = config.folder / "tokenizer.model"
    if config.tokenizer is not None:
        tokenizer = Tokenizer(config.tokenizer)
        if not copy.exists():
            write_atomic(copy, tokenizer.path.read_bytes())
        return tokenizer
    if not copy.exists():
        # no more than the run itself will read, at about four characters a token: a small source would only come again
        sample, left = [], config.tokenizer_characters
        left = left if config.tokens is None else min(left, 4 * config.tokens)
        for document in documents():
            sample.append(document)
            left -= len(document)
            if left <= 0:
                break
        train_tokenizer(sample, config.vocab_size, copy)
    if (tokenizer := Tokenizer(copy)).vocab_size != config.vocab_size:
        raise ValueError(f"{copy} has {tokenizer.vocab_size} pieces, not vocab_size {config.vocab_size}")
    return tokenizer


@one_line_errors()
def cli(prog: str = "python -m llama2lib.shards"):
    "python -m llama2lib.shards FOLDER [options]: token shards of one or several sources, or the rest of them."
    shards = make_shards(tyro.cli(ShardsConfig, prog=prog))
    print(f"{shards.folder}: {len(shards):,} tokens of {shards.header['documents']:,} documents, {shards.digest[:12]}")


if __name__ == "__main__":
    cli()
