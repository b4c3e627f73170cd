"""Generated from chapters/01_architecture.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Tokenizer",
    "train_tokenizer",
]


# ---------- chapters/01_architecture.py · Tokenizer

import hashlib
import io
import itertools
import operator
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece

from llama2lib.recipes import write_atomic

_SPACE = "\u2581"  # SentencePiece's sign for a space


class Tokenizer:
    """A SentencePiece model, Meta's or ours (section 2.2). `path`: the file, or a folder that holds `tokenizer.model`.

    `bos_id`, `eos_id`, `pad_id` (-1: none) and `vocab_size` are the file's, `digest` is its sha256.
    Raises FileNotFoundError or ValueError.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: expected a SentencePiece model file")
        content = self.path.read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content or b"empty")
        except RuntimeError as error:
            raise ValueError(f"{self.path}: not a SentencePiece model ({error})") from None
        self.vocab_size = self._model.vocab_size()
        self.bos_id, self.eos_id, self.pad_id = self._model.bos_id(), self._model.eos_id(), self._model.pad_id()
        self._line_start = self._model.encode("\n")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        "Token ids of a text, with BOS before and EOS behind when asked for. Text never becomes a control token."
        parts = self._parts(text, "the text")
        return self._joined([self._model.encode(part) for part in parts], bos, eos)

    def encode_batch(self, texts: Iterable[str], bos: bool = False, eos: bool = False) -> list[list[int]]:
        "`encode` of every text, in SentencePiece's own threads, one to a core."
        parts = [self._parts(text, f"text {number}") for number, text in enumerate(texts)]
        encoded = iter(self._model.encode(list(itertools.chain.from_iterable(parts))))
        return [self._joined(list(itertools.islice(encoded, len(part))), bos, eos) for part in parts]

    def _parts(self, text: str, name: str) -> list[str]:
        "What SentencePiece encodes for a text: it would read its own sign as a space, so the text is split there."
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"position {error.start} of {name} is half a surrogate pair: not Unicode text") from None
        first, *rest = text.split(_SPACE)
        return [first, *("\n" + part for part in rest)]  # behind a line break no space is put in front

    def _joined(self, parts: list[list[int]], bos: bool, eos: bool) -> list[int]:
        "Ids of the parts, with the bytes of the sign between them, and BOS and EOS around."
        ids = [self.bos_id, *parts[0]] if bos else parts[0]
        for part in parts[1:]:
            ids += [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
            ids += part[len(self._line_start) :]
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; control tokens vanish, bytes that are not UTF-8 become U+FFFD, one leading space goes.

        The space is the one that `encode` puts in front; of a text that goes on, see `continuation`.
        """
        ids = [operator.index(token) for token in ids]
        for place, token in enumerate(ids):
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"ids[{place}] is {token}: the vocabulary has ids 0 to {self.vocab_size - 1}")
        return self._model.decode(ids)

    def continuation(self, prompt: Sequence[int], ids: Sequence[int]) -> str:
        "The text that token ids add to a prompt's: both are decoded together, since alone they lose their first space."
        return self.decode([*prompt, *ids])[len(self.decode(prompt)) :]

    def pieces(self, ids: Sequence[int]) -> list[str]:
        "The vocabulary's spelling of token ids, with `▁` for a space: for people to look at."
        return [self._model.id_to_piece(token) for token in ids]

def train_tokenizer(texts: Iterable[str], vocab_size: int, path: str | os.PathLike) -> Tokenizer:
    """Train a BPE vocabulary on texts, write it to `path`, and load it. The settings are those of Meta's own file.

    Digits are split and bytes stand in for rare characters (section 2.2). Raises ValueError when there is no text, or
    when it does not yield `vocab_size` pieces.
    """
    lines = [line for text in texts for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError("no text to train a tokenizer on: every text is empty or white space")
    if vocab_size < 260:
        raise ValueError(f"vocab_size {vocab_size}: expected at least 260 (3 control tokens, 256 bytes, one piece)")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.99995,
            split_digits=True,
            byte_fallback=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            max_sentence_length=2**30,  # the default drops lines over 4 kB without a word
            num_threads=os.cpu_count(),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"vocab_size {vocab_size} does not suit this text: {error}") from None
    write_atomic(Path(path), model.getvalue())
    return Tokenizer(path)
