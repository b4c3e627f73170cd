"""Generated from chapters/07_safety.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Axes",
    "PRONOUNS",
    "IDENTITIES",
    "read_axes",
    "mentions",
    "Classifier",
    "profanity",
    "local_classifier",
    "classifier",
    "document_toxicity",
    "BINS",
    "TOXIC",
    "Survey",
    "survey",
    "CompositionConfig",
    "run",
    "cli",
]


# ---------- chapters/07_safety.py · What a corpus says of people (section 4.1)

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from llama2lib.cleaning import language
from llama2lib.corpus import path_documents
from llama2lib.launch import one_line_errors
from llama2lib.recipes import write_atomic

Axes = Mapping[str, Mapping[str, Sequence[str]]]  # axis -> group -> terms, in lower case

_SHE, _HE = ("she", "her", "hers", "herself"), ("he", "him", "his", "himself")
_THEY = ("they", "them", "their", "theirs", "theirself", "themself", "themselves")
PRONOUNS: Axes = {  # Table 9a, with the word lists of A.4.3
    "gendered pronouns": {"she": _SHE, "he": _HE, "unspecified": _THEY},
    "grammatical person": {
        "1st": ("i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves"),
        "2nd": ("you", "your", "yours", "yourself", "yourselves"),
        "3rd": (*_SHE, *_HE, *_THEY, "it", "its", "itself"),
    },
}
IDENTITIES: Axes = {  # Table 9b
    axis: {term: (term,) for term in terms.split()}
    for axis, terms in {
        "gender and sex": "female male feminine transgender masculine",
        "sexual orientation": "gay lesbian lgbt lgbtq queer",
        "nationality": "american indian chinese korean mexican",
        "race and ethnicity": "european african asian latin indigenous",
        "religion": "christian religious spiritual catholic jewish",
    }.items()
}
_WORD = re.compile(r"[^\W\d_]+")


def read_axes(path: str | os.PathLike) -> Axes:
    'Axes from a JSON file `{"axis": {"group": ["term", …]}}`. ValueError with the file for anything else.'
    try:
        found = json.loads(Path(path).read_text("utf-8"))
        axes = {axis: {group: list(terms) for group, terms in groups.items()} for axis, groups in found.items()}
        words = [term for groups in axes.values() for terms in groups.values() for term in terms]
        if not words or not all(isinstance(term, str) and _WORD.findall(term) for term in words):
            raise ValueError("a term without a letter")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: expected an object of axes, of groups, of lists of terms ({error})") from None
    return {axis: {group: [t.lower() for t in terms] for group, terms in row.items()} for axis, row in axes.items()}


def mentions(text: str, axes: Axes) -> dict[str, list[str]]:
    "The groups of each axis that a text mentions, whole words in any case; axes without a mention are left out."
    words = _WORD.findall(text.lower())
    known, line = set(words), ""

    def holds(term: str) -> bool:
        nonlocal line
        parts = _WORD.findall(term)
        if not known.issuperset(parts):
            return False
        line = line or f" {' '.join(words)} "
        return len(parts) == 1 or f" {' '.join(parts)} " in line

    found = {axis: [group for group, terms in row.items() if any(map(holds, terms))] for axis, row in axes.items()}
    return {axis: groups for axis, groups in found.items() if groups}


# ---------- chapters/07_safety.py · Toxicity

Classifier = Callable[[Sequence[str]], np.ndarray]  # texts -> probabilities of toxic


def profanity(texts: Sequence[str]) -> np.ndarray:
    "Probabilities of toxic by a linear model on words. ImportError, in one line, without the package."
    try:
        from profanity_check import predict_prob
    except ImportError:
        raise ImportError("alt-profanity-check is not installed: pip install -e '.[safety]'") from None
    return np.asarray(predict_prob(list(texts)))


def local_classifier(path: str | os.PathLike, batch: int = 64) -> Classifier:
    """The sequence classifier in a Hugging Face folder, as probabilities of its label for toxic.

    That label is 'toxic', 'hate', or 'LABEL_1' of two; labels may exclude each other or, as the folder says, not.
    ValueError with the labels of a classifier without one.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)
    labels = [model.config.id2label[number].lower() for number in range(model.config.num_labels)]
    known = ("toxic", "hate", *["label_1"] * (len(labels) == 2))
    place = next((n for n, name in enumerate(labels) if name in known), None)
    several = model.config.problem_type == "multi_label_classification"
    if place is None or (len(labels) < 2 and not several):
        raise ValueError(f"{path}: labels {', '.join(labels)}; expected toxic or hate among them, or LABEL_1 of two")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device).eval()

    @torch.no_grad()
    def classify(texts: Sequence[str]) -> np.ndarray:
        found = []
        for start in range(0, len(texts), batch):
            rows = list(texts[start : start + batch])
            inputs = tokenizer(rows, return_tensors="pt", padding=True, truncation=True, max_length=512).to(device)
            logits = model(**inputs).logits.float()
            found.append((logits.sigmoid() if several else logits.softmax(-1))[:, place].cpu().numpy())
        return np.concatenate(found) if found else np.zeros(0)

    return classify


def classifier(name: str) -> Classifier:
    "The classifier of a name: 'profanity', or a folder."
    return profanity if name == "profanity" else local_classifier(name)


def document_toxicity(documents: Iterable[str], classify: Classifier, lines: int = 4096) -> Iterator[float]:
    "Of each document the mean score of its lines that are not empty, 0 without any; some `lines` go through at a time."
    waiting: list[list[str]] = []

    def flush() -> Iterator[float]:
        texts = [line for part in waiting for line in part]
        scores = iter(classify(texts) if texts else ())
        for part in waiting:
            yield float(np.mean([next(scores) for _ in part])) if part else 0.0
        waiting.clear()

    for text in documents:
        waiting.append([line for line in text.splitlines() if line.strip()])
        if sum(map(len, waiting)) >= lines:
            yield from flush()
    yield from flush()


# ---------- chapters/07_safety.py · A survey

BINS = 50  # of the histogram of toxicity, from 0 to 1
TOXIC = 0.5  # the score from which on a text counts as toxic (sections 4.1 and A.4.7)


@dataclass
class Survey:
    "Counts of documents, made by `survey`."

    documents: int = 0
    languages: Counter = field(default_factory=Counter)  # code, or 'unknown' -> documents
    surveyed: int = 0  # documents whose mentions were counted: the English ones
    axes: dict[str, int] = field(default_factory=dict)  # documents with any term of an axis
    groups: dict[str, dict[str, int]] = field(default_factory=dict)  # and of these, with one of a group
    toxicity: list[int] = field(default_factory=lambda: [0] * BINS)  # histogram of the documents that were scored
    toxic: int = 0  # of these, with a score of TOXIC or more

    def share(self, axis: str, group: str | None = None) -> float:
        "As Table 9: documents with any term of an axis, of all; or with a group's, of those of its axis. NaN of none."
        part, of = (self.axes[axis], self.surveyed) if group is None else (self.groups[axis][group], self.axes[axis])
        return part / of if of else float("nan")

    def report(self, least: float = 5e-5) -> str:
        "Tables 9 and 10 for this corpus, and a line for Figure 13; `least`: share of a language that is shown."
        lines = [f"{self.documents:,} documents, {self.surveyed:,} in English"]
        for code, count in self.languages.most_common():
            if count / self.documents >= least:
                lines.append(f"{code:>30} {count / self.documents:8.2%}")
        for axis, groups in self.groups.items():
            lines.append(f"{axis:<30} {self.share(axis):8.2%}")
            lines += [f"{group:>30} {self.share(axis, group):8.2%}" for group in groups]
        if scored := sum(self.toxicity):
            share = self.toxic / scored
            lines.append(f"toxicity of {TOXIC} or more: {self.toxic:,} of {scored:,} documents, {share:.2%}")
        return "\n".join(lines)


def survey(
    documents: Iterable[str],
    axes: Axes = PRONOUNS | IDENTITIES,
    classify: Classifier | None = None,
    rate: float = 0.1,
    threshold: float = 0.5,
    seed: int = 0,
) -> Survey:
    """Count what the documents say, in one pass (section 4.1).

    classify: scores the toxicity of a share `rate` of the English documents, drawn with `seed`; threshold: of the
    language's score. ValueError for a rate that is no share.
    """
    if not 0 < rate <= 1:
        raise ValueError(f"rate {rate}: expected a share above 0")
    random, found = np.random.default_rng(seed), Survey()
    found.axes = dict.fromkeys(axes, 0)
    found.groups = {axis: dict.fromkeys(row, 0) for axis, row in axes.items()}

    def english() -> Iterator[str]:
        for text in documents:
            found.documents += 1
            code = language(text, threshold)
            found.languages[code] += 1
            if code != "en":
                continue
            found.surveyed += 1
            for axis, groups in mentions(text, axes).items():
                found.axes[axis] += 1
                for group in groups:
                    found.groups[axis][group] += 1
            if classify is not None and random.random() < rate:
                yield text

    for value in document_toxicity(english(), classify or (lambda texts: np.zeros(0))):
        found.toxicity[min(int(value * BINS), BINS - 1)] += 1
        found.toxic += value >= TOXIC
    return found


@dataclass(frozen=True)
class CompositionConfig:
    "What a corpus says of people, how toxic it is, and in which languages (section 4.1)."

    sources: tyro.conf.Positional[tuple[Path, ...]]  # text and JSONL files, or folders of them
    toxicity: str | None = "profanity"  # a classifier's Hugging Face folder, or this package's model; none: not scored
    rate: float = 0.1  # share of the documents whose toxicity is scored
    axes: Path | None = None  # JSON of axes, groups and terms in the place of Table 9b's
    seed: int = 0  # of the documents drawn for scoring
    out: Path | None = None  # JSON of all counts


def run(config: CompositionConfig) -> Survey:
    "Survey a corpus as `config` says, and print the report. Errors as of `path_documents` and `read_axes`."
    axes = PRONOUNS | (read_axes(config.axes) if config.axes else IDENTITIES)
    texts = (text for source in config.sources for text in path_documents(source))
    classify = classifier(config.toxicity) if config.toxicity else None
    found = survey(tqdm(texts, desc="survey", unit=" documents"), axes, classify, config.rate, seed=config.seed)
    print(found.report())
    if config.out:
        write_atomic(config.out, json.dumps(vars(found), indent=1) + "\n")
    return found


@one_line_errors()
def cli(prog: str = "python -m llama2lib.composition"):
    "python -m llama2lib.composition FILES …: Tables 9 and 10 and Figure 13 for a corpus (section 4.1)."
    run(tyro.cli(CompositionConfig, prog=prog))


if __name__ == "__main__":
    cli()
