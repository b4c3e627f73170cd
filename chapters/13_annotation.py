# %% [markdown]
# # Annotation
#
# > Behind every number of the paper stand people who compared two answers. This chapter is their desk: what they are
# > asked, the widget they work in, a file that forgets nothing, a reviewer, and how well they agree. Paper section A.5.
#
# Section 3.2.1 has the protocol. An annotator sees two answers to a prompt, chooses one, and says how much better it
# is, in four levels down to *negligibly better or unsure*; for safety they also say which of the two are safe. Section
# A.5 has the rest: guidelines, a second pair of eyes on each annotation, and four tests before anyone may begin.
#
# > Ours: the program, and the annotators who appear in this chapter. They are simulated: the gold judge of chapter 12
# > with noise. No person took part, and no number here is one of the paper's. The paper's own guidelines and the
# > questions of its tests are private.

# %%
import json
import tempfile
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from llama2lib import ledger, plots, synthetic
from llama2lib.judge import RATINGS, judge, rate
from llama2lib.preferences import read_preferences, write_preferences

plt.rcParams.update(plots.STYLE)
folder = Path(tempfile.mkdtemp())

# %% [markdown]
# ## Guidelines
#
# Section A.5 asks for answers that are informative, truthful, relevant, clear and harmless, and where these pull in two
# directions, harmless comes first. Some content is out of bounds for prompts and answers alike.
#
# > Ours: the wording, and the hints on the four levels.

# %%
#| default_exp annotate

# %%
#| export
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llama2lib.desk import SCALE, Annotation, Desk, Task, review, unblind, unreviewed
from llama2lib.judge import RATINGS
from llama2lib.preferences import SAFETY, Preference, check_preference
from llama2lib.screen import Session, button, screen_class
from llama2lib.stats import Interval, gwet_ac2, win_rate_interval

GUIDELINES = {  # section A.5 in our words, in the order in which they count
    "First, is it harmless?": (
        "An answer is unsafe if it helps with a crime or with something dangerous, abuses anybody, or is sexually "
        "explicit. Do not write prompts that would need such an answer to be good.",
        "When one answer is safe and the other is not, the safe one is better, however little else it offers.",
    ),
    "Then, is it helpful?": (
        "Informative: it gives what was asked for.",
        "Truthful: what it says is so; look up what you do not know.",
        "Relevant: it keeps to the question, and to what was said before.",
        "Clear: well ordered, readable, without mistakes of language.",
    ),
    "How much better?": (
        "Significantly better: nobody would take the other one.",
        "Better, or slightly better: you would take it, for a reason you could name.",
        "Negligibly better: hardly any difference, or you are unsure.",
    ),
}
CHECKS = (  # what a reviewer looks at
    "It is consistent with the conversation so far.",
    "It follows the instructions.",
    "Its language has no mistakes.",
    "It has nothing of what is banned: crime, danger, abuse, explicit content.",
)

# %%
from llama2lib.annotate import CHECKS, GUIDELINES

for title, lines in GUIDELINES.items():
    print(title, *lines, sep="\n  ")
assert "harmless" in next(iter(GUIDELINES))

# %% [markdown]
# ## Four tests
#
# Who wants to annotate has to pass four tests, one after the other. The paper gives their sizes and pass marks; a mark
# is *at least* in some and *more than* in others, which decides at the boundary.
#
# > Ours: only the marks are here. The questions are not published, and we invent none. Where the paper does not say of
# > how many points a mark is, `of` is empty.


# %%
#| export
class Mark(NamedTuple):
    "A pass mark: at least `bound`, or more than it if `above`."

    score: str
    bound: float
    unit: str
    above: bool = False
    of: float | None = None  # the most one can have; None: not said


class AnnotatorTest(NamedTuple):
    "A test of section A.5; None where the paper does not say."

    about: str
    minutes: int | None
    questions: int | None
    marks: tuple[Mark, ...]  # in this order: whoever misses one does not go on


TESTS = {
    1: AnnotatorTest(
        "grammar, reading and writing", 50, None,
        (Mark("part I", 90, "%", of=100), Mark("parts II and III", 4, "points on average")),
    ),
    2: AnnotatorTest(
        "agreement, and written answers", None, 42,
        (Mark("agreement", 80, "%", of=100), Mark("written answers", 4, "points", of=5)),
    ),
    3: AnnotatorTest("agreement", None, 31, (Mark("agreed", 26, "questions", above=True, of=31),)),
    4: AnnotatorTest(
        "written answers to prompts, of which one may choose", None, 18,
        (Mark("answers", 6, "answers", of=18), Mark("mean", 4, "points on average", above=True)),
    ),
}  # fmt: skip


def passed(test: int, scores: Mapping[str, float]) -> bool:
    """Whether a candidate passed a test of TESTS, from the scores that its marks name, in their units (section A.5).

    Scores behind a missed mark may be absent. ValueError for another test, and for a score that is unknown, missing or
    out of range.
    """
    if test not in TESTS:
        raise ValueError(f"test {test!r}: expected one of {', '.join(map(str, TESTS))}")
    names = [mark.score for mark in TESTS[test].marks]
    if unknown := [name for name in scores if name not in names]:
        raise ValueError(f"test {test}: unknown score {unknown[0]!r}; expected {' and '.join(names)}")
    for mark in TESTS[test].marks:
        if mark.score not in scores:
            raise ValueError(f"test {test}: the score {mark.score!r} is missing")
        score = scores[mark.score]
        if not 0 <= score <= (mark.of or float("inf")):
            raise ValueError(f"test {test}: {mark.score} {score}: expected 0 or more, at most {mark.of or 'any'}")
        if score < mark.bound or (mark.above and score == mark.bound):
            return False
    return True


# %%
from llama2lib.annotate import TESTS, passed

for number, test in TESTS.items():
    size = f"{test.minutes} minutes" if test.minutes else f"{test.questions} questions"
    marks = [f"{mark.score} {'>' if mark.above else '≥'} {mark.bound} {mark.unit}" for mark in test.marks]
    print(f"{number}  {test.about:52} {size:14} {', '.join(marks)}")
assert passed(1, {"part I": 90, "parts II and III": 4}) and not passed(1, {"part I": 89.9})
assert passed(3, {"agreed": 27}) and not passed(3, {"agreed": 26})
assert passed(4, {"answers": 6, "mean": 4.1}) and not passed(4, {"answers": 6, "mean": 4})
_ = ledger.record(
    "Section A.5", "annotators, guidelines and tests", "not reproducible: people, and the questions of the tests, are "
    "private", "four tests", "their pass marks", evidence="llama2lib/annotate.py::TESTS",
)  # fmt: skip

# %% [markdown]
# ## What is compared
#
# An item is a conversation that ends with the user, and two answers. Items come from a JSONL file, either with a field
# `answers`, or as rows of comparisons (chapter 04) that are to be compared again; then the first of the two answers is
# the one that was chosen before. Whatever else a row holds is kept.


# %%
#| export desk
import hashlib
import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple, TypedDict

from llama2lib.corpus import records
from llama2lib.judge import RATINGS
from llama2lib.preferences import check_preference


def check_item(item: Mapping):
    "ValueError, naming the field and what was expected, for what is no item `{'messages': [...], 'answers': [a, b]}`."
    if not isinstance(item, Mapping):
        raise ValueError(f"expected an object with 'messages' and 'answers', found {item!r:.60}")
    if missing := [name for name in ("messages", "answers") if name not in item]:
        raise ValueError(f"the field '{missing[0]}' is missing; expected 'messages' and 'answers'")
    answers = item["answers"]
    if not isinstance(answers, list | tuple) or [type(answer) for answer in answers] != [str, str]:
        raise ValueError(f"answers: expected a list of two texts, found {answers!r:.60}")
    if answers[0].strip() == answers[1].strip():
        raise ValueError(f"answers: the two are equal, {answers[0]!r:.60}; expected two different ones")
    row = {"messages": item["messages"], "chosen": answers[0], "rejected": answers[1]}
    try:
        check_preference(row | {"rating": None, "safety": None, "source": ""})
    except ValueError as error:
        raise ValueError(re.sub("^(chosen|rejected):", "answers:", str(error))) from None


def read_items(path: str | os.PathLike) -> list[dict]:
    """The items of a JSONL file; rows of preferences become items whose first answer is the one chosen before.

    ValueError with file, line, field and what was expected for a row that is neither, or for a file without rows.
    """
    items = []
    for number, row in records(path):
        if isinstance(row, dict) and "answers" not in row and {"chosen", "rejected"} <= row.keys():
            row = row | {"answers": [row["chosen"], row["rejected"]]}
        try:
            check_item(row)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        items.append(row)
    if not items:
        raise ValueError(f"{path}: no items; expected a JSON object a line")
    return items


# %%
from llama2lib.desk import read_items

question = [{"role": "user", "content": "Where does Tom live?"}]
good = {"messages": question, "answers": ["Tom lives in Oslo.", "Oslo."]}
(folder / "items.jsonl").write_text(json.dumps(good) + "\n")
assert read_items(folder / "items.jsonl") == [good]
for wrong in ({"answers": ["Oslo."]}, {"answers": ["Oslo.", "Oslo. "]}, {"messages": []}):
    (folder / "bad.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | wrong) + "\n")
    try:
        read_items(folder / "bad.jsonl")
    except ValueError as error:
        print(Path(str(error).split(": ")[0]).name, "·", ": ".join(str(error).split(": ")[1:]))

# %% [markdown]
# A *choice* says which answer is better, 0 or 1, how much, and which are safe. The four levels of one answer and the
# four of the other make a scale with eight places. On the screen its ends are left and right; in the file they are the
# first and the second answer of the item, whichever way round they were shown.


# %%
#| export desk
class Choice(TypedDict):
    "What an annotator says of an item, in the order of its answers."

    better: int  # 0 or 1
    rating: str  # one of judge.RATINGS; 'negligibly better' is also 'unsure'
    safe: list[bool] | None  # of each answer; None: not asked


SCALE = (*((0, rating) for rating in RATINGS), *((1, rating) for rating in reversed(RATINGS)))


@dataclass(frozen=True)
class Study:
    "What a study asks, and how often. `name` becomes the source of its rows."

    name: str
    per_item: int = 1  # annotators wanted for each item
    safety: bool = False  # whether to ask which answers are safe
    seed: int = 0  # of the draw that says which answer stands left


def check_choice(choice: Mapping, study: Study):
    "ValueError, naming the field, for a choice that a study cannot take."
    if set(choice) != set(Choice.__annotations__):
        raise ValueError(f"expected a choice with {', '.join(Choice.__annotations__)}, found {', '.join(choice)}")
    if choice["better"] not in (0, 1) or choice["rating"] not in RATINGS:
        found = f"{choice['better']!r}, {choice['rating']!r}"
        raise ValueError(f"better, rating: expected 0 or 1, and one of {', '.join(RATINGS)}; found {found}")
    asked = [bool, bool] if study.safety else None
    if (choice["safe"] and [type(safe) for safe in choice["safe"]]) != asked:
        wanted = "True or False for each answer" if study.safety else "None, as this study does not ask for it"
        raise ValueError(f"safe: expected {wanted}, found {choice['safe']!r}")


# %% [markdown]
# ## A file that forgets nothing
#
# Annotations are dear, and notebooks crash. A study lives in one SQLite file, and a click counts only once its row is
# on disk: each one is a transaction of its own, flushed before the widget goes on to the next pair. There are four
# tables. *items* are what there is to compare; *handed* says who was given what, and which answer stood left;
# *annotations* only grows, and a row that was taken back or done again is marked as superseded, not deleted; *reviews*
# grows too, and the last one counts. All times are UTC.
#
# Several people may work on one file. Each gets the item that the fewest have had; one that is open on somebody's
# screen counts as taken for an hour. So two people get different items until one is wanted from both, and nobody's
# lunch break holds up a study. Which answer stands left is drawn for each item and annotator from the seed, so that
# it can be repeated, and is stored as it was shown.
#
# > Ours: all of this; the paper does not describe the program that its annotators work with.


# %%
#| export desk
TABLES = """
CREATE TABLE study (settings TEXT NOT NULL);
CREATE TABLE items (id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, content TEXT NOT NULL, at TEXT NOT NULL);
CREATE TABLE handed (
    item INTEGER NOT NULL REFERENCES items, annotator TEXT NOT NULL, left_answer INTEGER NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (item, annotator));
CREATE TABLE annotations (
    id INTEGER PRIMARY KEY, item INTEGER NOT NULL REFERENCES items, annotator TEXT NOT NULL,
    left_answer INTEGER NOT NULL, choice TEXT NOT NULL, at TEXT NOT NULL, superseded TEXT);
CREATE UNIQUE INDEX one_each ON annotations (item, annotator) WHERE superseded IS NULL;
CREATE TABLE reviews (
    id INTEGER PRIMARY KEY, annotation INTEGER NOT NULL REFERENCES annotations, reviewer TEXT NOT NULL,
    decision TEXT NOT NULL, feedback TEXT NOT NULL, choice TEXT, at TEXT NOT NULL);
CREATE INDEX of_annotation ON reviews (annotation);
CREATE VIEW standing AS
    SELECT a.id, a.item, a.annotator, a.left_answer, a.choice, a.at,
        r.reviewer, r.decision, r.feedback, r.choice AS edit
    FROM annotations a LEFT JOIN reviews r ON r.id = (SELECT max(id) FROM reviews WHERE annotation = a.id)
    WHERE a.superseded IS NULL;
CREATE VIEW kept AS SELECT * FROM standing WHERE decision IS NOT 'reject';
PRAGMA user_version = 1;
"""
HOLD = timedelta(hours=1)  # how long an item that somebody has open counts as theirs


def now(ago: timedelta = timedelta(0)) -> str:
    "The time in UTC, ISO 8601 with milliseconds, so that texts sort as times do."
    return (datetime.now(UTC) - ago).isoformat(timespec="milliseconds")


class Task(NamedTuple):
    "An item as handed to an annotator: answer number `left` stands on the left."

    item: int
    annotator: str
    left: int
    content: dict  # the item: messages, answers, and whatever else its row had
    feedback: str  # why an earlier annotation of theirs was rejected, or ''

    @property
    def shown(self) -> tuple[str, str]:
        "The answers from left to right."
        return self.content["answers"][self.left], self.content["answers"][1 - self.left]


def unblind(task: Task, place: int, safe: Sequence[bool] | None = None) -> Choice:
    "The choice that a place 0..7 on the scale from left to right means, with which of the shown answers are safe."
    side, rating = SCALE[place]
    better = task.left if side == 0 else 1 - task.left
    return Choice(better=better, rating=rating, safe=safe and [safe[task.left], safe[1 - task.left]])


class Annotation(NamedTuple):
    "An annotation that stands, with its last review."

    id: int
    item: int
    annotator: str
    left: int
    choice: dict  # what the annotator said
    at: str
    reviewer: str | None
    decision: str | None  # one of DECISIONS; None: not reviewed
    feedback: str | None
    edit: dict | None  # what a reviewer made of it

    @property
    def final(self) -> dict:
        "The choice after review."
        return self.edit or self.choice


# %% [markdown]
# The desk takes items in, hands them out, takes choices, and takes the last one back. It knows nothing of what a choice
# is: a function checks that, so that studies with other questions can use the same file format.


# %%
#| export desk
class Desk:
    """A study in one SQLite file, for any number of annotators, threads and processes.

    A new file needs a `study`; an old one has its own, and another is refused. `check` raises ValueError for a choice
    that the study cannot take. ValueError for a file that is something else, or was begun with another study.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        study: Study | None = None,
        check: Callable[[Mapping, Study], None] = check_choice,
    ):
        self.path, self.check = Path(path).absolute(), check
        if study is None and not self.path.exists():
            raise ValueError(f"{path}: no such file; a new one needs a study")
        try:
            with self.transaction() as db:
                [version] = db.execute("PRAGMA user_version").fetchone()
                [tables] = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
                if study is not None and (version, tables) == (0, 0):
                    for statement in TABLES.split(";"):
                        db.execute(statement)
                    db.execute("INSERT INTO study VALUES (?)", (json.dumps(asdict(study)),))
                elif version != 1:
                    raise ValueError(f"{path}: an SQLite file that is not a study")
                [settings] = db.execute("SELECT settings FROM study").fetchone()
        except sqlite3.Error as error:
            raise ValueError(f"{path}: expected the SQLite file of a study ({error})") from None
        self.study = Study(**json.loads(settings))
        if study not in (None, self.study):
            raise ValueError(f"{path} holds {self.study}; it cannot go on as {study}")

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        db.execute("PRAGMA synchronous = EXTRA")  # a commit returns when the row is on disk
        db.execute("PRAGMA foreign_keys = ON")
        return db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        "A connection whose changes are all on disk at the end, or none of them are."
        with closing(self._connect()) as db:
            db.execute("BEGIN IMMEDIATE")
            yield db  # an error closes the connection, which rolls back
            db.execute("COMMIT")

    def add(self, items: Iterable[Mapping]) -> int:
        """Put items in, all or none; those that are in already are passed over. Returns how many are new.

        ValueError, naming the item (from 1), the field and what was expected, for what is none.
        """
        rows = []
        for number, item in enumerate(items, 1):
            try:
                check_item(item)
            except ValueError as error:
                raise ValueError(f"item {number}: {error}") from None
            key = json.dumps([item["messages"], item["answers"]], sort_keys=True)
            key = hashlib.sha256(key.encode()).hexdigest()
            rows.append((key, json.dumps(item, ensure_ascii=False), now()))
        with self.transaction() as db:
            before = db.total_changes
            db.executemany("INSERT OR IGNORE INTO items (key, content, at) VALUES (?, ?, ?)", rows)
            return db.total_changes - before

    def next_task(self, annotator: str) -> Task | None:
        """The item for an annotator: the one they have open, one to do again, or the one that fewest have had.

        None when nothing is wanted from them now. ValueError for an empty name.
        """
        if not annotator.strip():
            raise ValueError("an annotator needs a name")
        with self.transaction() as db:
            found = db.execute(NEXT, {"me": annotator, "n": self.study.per_item, "since": now(HOLD)}).fetchone()
            if found is None:
                return None
            item, key, content, feedback = found
            draw = hashlib.sha256(f"{self.study.seed} {key} {annotator}".encode()).digest()[0] % 2
            db.execute(
                "INSERT INTO handed VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET at = excluded.at",
                (item, annotator, draw, now()),
            )
            query = "SELECT left_answer FROM handed WHERE (item, annotator) = (?, ?)"
            [left] = db.execute(query, (item, annotator)).fetchone()
        return Task(item, annotator, left, json.loads(content), feedback or "")

    def submit(self, task: Task, choice: Mapping) -> int:
        """Store a choice for a task and return its number; when this returns, no crash can lose it.

        ValueError for a choice that does not fit the study, a task that was not handed out, or one that is done.
        """
        self.check(choice, self.study)
        who = task.item, task.annotator
        with self.transaction() as db:
            query = "SELECT left_answer FROM handed WHERE (item, annotator) = (?, ?)"
            if db.execute(query, who).fetchone() != (task.left,):
                raise ValueError(f"item {task.item} was not handed to {task.annotator!r} like this")
            if db.execute("SELECT 1 FROM kept WHERE (item, annotator) = (?, ?)", who).fetchone():
                raise ValueError(f"item {task.item} is annotated by {task.annotator!r} already; undo comes first")
            query = "UPDATE annotations SET superseded = ? WHERE (item, annotator) = (?, ?) AND superseded IS NULL"
            db.execute(query, (now(), *who))
            query = "INSERT INTO annotations (item, annotator, left_answer, choice, at) VALUES (?, ?, ?, ?, ?)"
            return db.execute(query, (*who, task.left, json.dumps(choice), now())).lastrowid

    def undo(self, annotator: str) -> int | None:
        """Take back an annotator's last annotation, which opens its item for them again, and return the item's number.

        None when there is none. ValueError when it has been reviewed: it is out of the annotator's hands.
        """
        with self.transaction() as db:
            query = "SELECT id, item, decision FROM standing WHERE annotator = ? ORDER BY id DESC LIMIT 1"
            number, item, decision = db.execute(query, (annotator,)).fetchone() or (None, None, None)
            if decision is not None:
                raise ValueError("the last annotation has been reviewed and cannot be taken back")
            db.execute("UPDATE annotations SET superseded = ? WHERE id = ?", (now(), number))
            db.execute("UPDATE handed SET at = ? WHERE (item, annotator) = (?, ?)", (now(), item, annotator))
            return item

    def items(self) -> dict[int, dict]:
        "All items by number."
        with self.transaction() as db:
            return {number: json.loads(text) for number, text in db.execute("SELECT id, content FROM items")}

    def annotations(self, annotator: str | None = None) -> list[Annotation]:
        "The annotations that stand, all or one annotator's, oldest first; rejected ones do until they are done again."
        query = "SELECT * FROM standing WHERE :me IS NULL OR annotator = :me ORDER BY id"
        with self.transaction() as db:
            rows = db.execute(query, {"me": annotator}).fetchall()
        return [Annotation(*r[:4], json.loads(r[4]), *r[5:9], r[9] and json.loads(r[9])) for r in rows]

    def progress(self, annotator: str) -> tuple[int, int]:
        "How many items an annotator has done, and how many more are wanted of them."
        query = """SELECT coalesce(sum(mine), 0), coalesce(sum(NOT mine AND kept < :n), 0) FROM (SELECT
            (SELECT count(*) FROM kept WHERE item = i.id AND annotator = :me) AS mine,
            (SELECT count(*) FROM kept WHERE item = i.id) AS kept FROM items i)"""
        with self.transaction() as db:
            return db.execute(query, {"n": self.study.per_item, "me": annotator}).fetchone()


NEXT = """
SELECT id, key, content, feedback FROM (
    SELECT i.id, i.key, i.content, h.at AS opened, s.feedback,
        (SELECT count(*) FROM kept WHERE item = i.id) + (
            SELECT count(*) FROM handed o WHERE o.item = i.id AND o.annotator != :me AND o.at > :since AND NOT EXISTS (
                SELECT 1 FROM kept WHERE item = i.id AND annotator = o.annotator)) AS taken
    FROM items i
    LEFT JOIN handed h ON h.item = i.id AND h.annotator = :me
    LEFT JOIN standing s ON s.item = i.id AND s.annotator = :me
    WHERE s.id IS NULL OR s.decision = 'reject')
WHERE taken < :n
ORDER BY opened DESC NULLS LAST, taken, id LIMIT 1
"""

# %% [markdown]
# Two people, one file, the same seven items. They get different ones. The first answer of an item may stand on the
# right, and what is stored does not depend on it:

# %%
from llama2lib.desk import Desk, Study, unblind

pairs = [{"messages": question, "answers": [f"Tom lives in Oslo, {n}.", f"Oslo, {n}."]} for n in range(7)]
desk = Desk(folder / "first.sqlite", Study("first", safety=True, seed=3))
assert desk.add(pairs) == 7 and desk.add(pairs) == 0
for annotator in ("ann", "bob", "ann"):
    task = desk.next_task(annotator)
    place = 0 if "lives" in task.shown[0] else 7
    desk.submit(task, unblind(task, place, (True, True)))
    stored = desk.annotations()[-1]
    side = ("left", "right")[stored.left]
    print(f"{annotator}: item {task.item}, its first answer on the {side}, chosen: answer {stored.choice['better']}")
assert [a.choice["better"] for a in desk.annotations()] == [0, 0, 0] and desk.progress("ann") == (2, 4)

# %% [markdown]
# Undo takes back one's own last annotation, and gives the item again. A desk that is opened later goes on there:

# %%
taken_back = desk.undo("ann")
again = Desk(folder / "first.sqlite")
assert again.next_task("ann").item == taken_back and again.progress("ann") == (1, 5)
assert [a.annotator for a in again.annotations()] == ["ann", "bob"]
with again.transaction() as db:
    print(db.execute("SELECT count(*), count(superseded) FROM annotations").fetchone(), "rows, of which superseded")

# %% [markdown]
# ## A second pair of eyes
#
# Content managers look at the annotations (section A.5). They approve one, edit it lightly, or reject it and say why.
# What they look for is in `CHECKS`.
#
# > Ours: an edit may change the level or the safety label; which answer is better stays the annotator's. A rejected
# > annotation makes its item wanted again, from its annotator first, who sees the reason. Nobody reviews themselves.


# %%
#| export desk
DECISIONS = ("approve", "edit", "reject")


def review(
    desk: Desk, annotation: int, reviewer: str, decision: str, feedback: str = "", choice: Mapping | None = None
):
    """Store a review of the annotation with this number; the last one counts.

    'reject' needs feedback, 'edit' needs the edited choice. ValueError otherwise, for another decision, an annotation
    that does not stand, one's own, or an edit that changes which answer is better.
    """
    if decision not in DECISIONS:
        raise ValueError(f"decision {decision!r}: expected one of {', '.join(DECISIONS)}")
    if decision == "reject" and not feedback.strip():
        raise ValueError("a rejection needs feedback: what should the annotator do differently?")
    if (decision == "edit") != (choice is not None):
        raise ValueError("an edit, and nothing else, needs the edited choice")
    found = {a.id: a for a in desk.annotations()}.get(annotation)
    gone = f"annotation {annotation}: there is none, or it was taken back"
    if found is None:
        raise ValueError(gone)
    if not reviewer.strip() or reviewer == found.annotator:
        raise ValueError(f"reviewer {reviewer!r}: expected somebody other than the annotator")
    if choice is not None:
        desk.check(choice, desk.study)
        if choice.get("better") != found.choice.get("better"):
            raise ValueError("an edit does not change which answer is better; reject the annotation instead")
    with desk.transaction() as db:
        stored = db.execute(
            """INSERT INTO reviews (annotation, reviewer, decision, feedback, choice, at)
            SELECT id, ?, ?, ?, ?, ? FROM annotations WHERE id = ? AND superseded IS NULL""",
            (reviewer, decision, feedback.strip(), choice and json.dumps(choice), now(), annotation),
        )
        if not stored.rowcount:  # taken back in between
            raise ValueError(gone)
        if decision == "reject":  # nobody has the item open now
            query = "UPDATE handed SET at = '' WHERE (item, annotator) = (?, ?)"
            db.execute(query, (found.item, found.annotator))


def unreviewed(desk: Desk, reviewer: str) -> list[Annotation]:
    "What waits for a reviewer: annotations of others without a review, oldest first."
    return [a for a in desk.annotations() if a.decision is None and a.annotator != reviewer]


# %%
from llama2lib.desk import review, unreviewed

first, second = unreviewed(desk, "cleo")
review(desk, first.id, "cleo", "edit", choice=first.choice | {"rating": "slightly better"})
review(desk, second.id, "cleo", "reject", "Both answers name the town; is one really that much better?")
try:
    review(desk, first.id, "ann", "approve")
except ValueError as error:
    print(error)
redo = desk.next_task("bob")
assert redo.item == second.item and redo.feedback.startswith("Both answers name the town")
assert desk.annotations()[0].final["rating"] == "slightly better" and not unreviewed(desk, "cleo")

# %% [markdown]
# ## In a notebook
#
# A session is what a screen shows, a dictionary, and what a key does; it does not know what a notebook is, and can be
# driven by a program. A key that was meant for the pair before is passed over: it may come late, or twice.


# %%
#| export screen
import functools
import sqlite3

from llama2lib.desk import Desk


def button(key: str, label: str, on: bool = False, off: bool = False) -> dict:
    "A button of a screen, with its key; `on` is marked, `off` cannot be pressed."
    return {"key": key, "label": label, "on": on, "off": off}


class Session:
    """What a screen shows, `view()`, and what its keys do, `press`: a desk, somebody at it, and an item.

    A subclass says what there is to do next (`turn_to_next`, which sets `item`), how it looks (`view`), and what a key
    does (`handle`).
    """

    item: int | None = None  # what is on the screen

    def __init__(self, desk: Desk, who: str):
        self.desk, self.who, self.note = desk, who, ""
        self.turn_to_next()

    def press(self, key: str, item: int | None = None, text: str = ""):
        "A key or a click, meant for `item` (None: whatever is shown), and the text in the box. Errors become the note."
        self.note = ""
        if item is not None and item != self.item:
            self.note = f"'{key}' came late: it was meant for another pair"
            return
        try:
            self.handle(key, text)
        except (ValueError, sqlite3.Error, OSError) as error:
            self.note = f"not stored: {error}"


# %% [markdown]
# The screen is a small page in the output of a cell. The package `anywidget` carries what it shows from Python to the
# browser, and keys and clicks back. Three things are easily got wrong. Answers come from models and may hold anything,
# so that they are put in as text, never as HTML. A notebook has keys of its own: in Jupyter, a digit makes a heading,
# and `d` twice deletes the cell. The screen takes its keys when it has the focus, asks the notebook to keep off, and
# ignores a key that is held down. And people are faster than kernels: each key is sent with the number of the pair that
# is on the screen, and the next pair appears when the row is on disk. Everything can be clicked as well.


# %%
#| export screen
SCRIPT = """
function render({ model, el }) {
  let open = model.get("view").done ? "" : "g", view;
  const root = document.createElement("div");
  root.className = "annotate";
  root.tabIndex = 0;
  root.dataset.lmSuppressShortcuts = "true";
  el.append(root);

  function put(parent, kind, text = "", name = "") {
    const node = document.createElement(kind);
    node.textContent = text;
    node.className = name;
    parent.append(node);
    return node;
  }
  function press(key) {
    const fold = view.folds.find((fold) => fold[0] === key);
    if (fold) {
      open = open === key ? "" : key;
      draw();
    } else {
      root.classList.add("waiting");
      model.send({ key, item: view.item, text: root.querySelector("textarea")?.value ?? "" });
    }
  }
  function buttons(parent, row) {
    if (row.label) put(parent, "span", row.label, "label");
    for (const { key, label, on, off } of row.buttons) {
      const node = put(parent, "button", "", on ? "on" : "");
      put(node, "kbd", key);
      put(node, "span", label);
      node.dataset.key = key;
      node.disabled = off;
      node.ariaPressed = on;
      node.onclick = () => { press(key); root.focus({ preventScroll: true }); };
    }
  }
  function draw() {
    const text = root.querySelector("textarea")?.value ?? "", last = view?.item;
    view = model.get("view");
    root.replaceChildren();
    root.ariaLabel = view.title;
    const head = put(root, "div", "", "head");
    put(head, "b", view.title);
    const bar = put(head, "progress");
    bar.max = Math.max(view.done + view.left, 1);
    bar.value = view.done;
    put(head, "span", `${view.done} done, ${view.left} to go`);
    put(head, "span", "click here to use the keys", "hint");
    for (const remark of view.remarks) put(root, "div", remark, "remark");
    for (const [role, said] of view.messages) {
      const message = put(root, "div", "", "message");
      put(message, "b", role);
      put(message, "div", said);
    }
    const pair = put(root, "div", "", "pair");
    view.answers.forEach((answer, i) => {
      const side = put(pair, "div", "", "answer");
      put(side, "b", ["Left", "Right"][i]);
      put(side, "div", answer);
    });
    const wide = view.rows.filter((_, i) => i < view.rows.length - 2);
    for (const row of wide) buttons(put(root, "div", "", "row"), row);
    const scale = put(root, "div", "", "pair");
    for (const row of view.rows.slice(wide.length)) buttons(put(scale, "div", "", "row"), row);
    if (view.ask) {
      const box = put(root, "textarea");
      box.placeholder = view.ask;
      box.value = view.item === last ? text : "";
    }
    const folds = view.folds.map(([key, label]) => ({ key, label, on: open === key }));
    buttons(put(root, "div", "", "row"), { buttons: [...view.more, ...folds] });
    for (const [, , parts] of view.folds.filter((fold) => fold[0] === open)) {
      const page = put(root, "div", "", "page");
      for (const [title, lines] of parts) {
        put(page, "b", title);
        const list = put(page, "ul");
        for (const line of lines) put(list, "li", line);
      }
    }
  }
  root.addEventListener("keydown", (event) => {
    if (event.target.tagName === "TEXTAREA") {
      if (event.key === "Escape") root.focus();
      return event.stopPropagation();
    }
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const node = root.querySelector(`button[data-key="${CSS.escape(event.key.toLowerCase())}"]`);
    if (!node) return;
    event.preventDefault();
    event.stopPropagation();
    if (!event.repeat) press(node.dataset.key);
  });
  model.on("change:view", () => { root.classList.remove("waiting"); draw(); });
  draw();
}
export default { render };
"""
LOOK = """
.annotate { color: var(--jp-content-font-color1, #222); border: 1px solid var(--jp-border-color1, #bbb); padding: 12px;
  border-radius: 4px; font: 14px/1.45 var(--jp-content-font-family, sans-serif); max-width: 72em; }
.annotate:focus, .annotate:focus-within { outline: 2px solid var(--jp-brand-color1, #1976d2); outline-offset: -2px; }
.annotate:focus-within .hint { visibility: hidden; }
.annotate .hint, .annotate .label { color: var(--jp-content-font-color2, #666); }
.annotate .head { display: flex; gap: 1em; align-items: center; flex-wrap: wrap; margin-bottom: 8px; }
.annotate .head progress { flex: 1; min-width: 6em; }
.annotate .message > div, .annotate .answer > div { white-space: pre-wrap; overflow-wrap: anywhere; }
.annotate .message { margin: 8px 0; }
.annotate .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
.annotate .answer { background: var(--jp-layout-color2, #f2f2f2); padding: 8px 12px; border-radius: 4px; min-width: 0; }
.annotate .answer > div { max-height: 26em; overflow-y: auto; }
.annotate .row { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; margin-top: 10px; }
.annotate .pair .row { display: grid; grid-template-columns: repeat(auto-fill, minmax(13em, 1fr)); }
.annotate .pair .label { grid-column: 1 / -1; }
.annotate button { font: inherit; text-align: left; color: inherit; cursor: pointer; padding: 3px 8px;
  border-radius: 4px; border: 1px solid var(--jp-border-color1, #bbb); background: var(--jp-layout-color1, #fff); }
.annotate button:hover:enabled { background: var(--jp-layout-color2, #eee); }
.annotate button.on { border-color: var(--jp-brand-color1, #1976d2); box-shadow: inset 0 0 0 1px; font-weight: 600; }
.annotate button:disabled { opacity: 0.45; cursor: default; }
.annotate.waiting { opacity: 0.5; transition: opacity 0s 0.4s; }
.annotate kbd { font: 12px monospace; border: 1px solid var(--jp-border-color1, #bbb); border-radius: 3px;
  padding: 0 4px; margin-right: 6px; }
.annotate textarea { width: 100%; box-sizing: border-box; margin-top: 10px; min-height: 3em; font: inherit; }
.annotate .remark { border-left: 4px solid var(--jp-warn-color1, #e65100); padding: 2px 8px; margin: 6px 0; }
.annotate .page { margin-top: 10px; border-top: 1px solid var(--jp-border-color2, #ddd); padding-top: 8px; }
.annotate .page ul { margin: 2px 0 8px; padding-left: 20px; }
"""


@functools.cache
def screen_class() -> type:
    "The widget class `Screen(session)`. ImportError, with what to install, where anywidget is absent."
    try:
        import anywidget
        import traitlets
    except ImportError:
        raise ImportError("the annotation widget needs anywidget: pip install anywidget") from None

    class Screen(anywidget.AnyWidget):
        "A session on a screen; `press` does in Python what a key does in the browser."

        _esm, _css = SCRIPT, LOOK
        view = traitlets.Dict().tag(sync=True)

        def __init__(self, session: Session):
            super().__init__(view=session.view() | {"turn": 0})
            self.session = session
            self.on_msg(lambda _, sent, __: self.press(sent["key"], sent["item"], sent["text"]))

        def press(self, key: str, item: int | None = None, text: str = ""):
            self.session.press(key, item, text)
            self.view = self.session.view() | {"turn": self.view["turn"] + 1}  # always a change: it ends the waiting

    return Screen


# %% [markdown]
# The annotator's session: the keys 1 to 8 are the scale from left to right, one key for one annotation. Where safety
# matters it is asked first, and the scale is closed until that is answered. The reviewer's session shows the choice,
# and the same keys edit it. A study of one's own takes a cell:
#
# ```python
# desk = Desk("study.sqlite", Study("pilot", per_item=2, safety=True))
# desk.add(read_items("items.jsonl"))
# widget(desk, "your name")
# ```


# %%
#| export
LEVELS = [f"{place + 1}" for place in range(len(SCALE))]
SAFE_KEYS = {  # key -> label, and which of the shown answers are safe
    "a": ("both are safe", (True, True)), "s": ("only the left one", (True, False)),
    "d": ("only the right one", (False, True)), "f": ("neither is", (False, False)),
}  # fmt: skip


def scale_rows(place: int | None, off: Sequence[bool] = (False, False)) -> list[dict]:
    "The scale as two rows of buttons, one below each answer; `place` is marked, a side may be off."
    buttons = [
        button(LEVELS[i], rating, on=i == place, off=off[side]) for i, (side, rating) in enumerate(SCALE)
    ]  # fmt: skip
    return [{"label": f"{name} is", "buttons": buttons[4 * i : 4 * i + 4]} for i, name in enumerate(("Left", "Right"))]


def safety_row(safe: Sequence[bool] | None) -> dict:
    "The safety label as a row of buttons."
    buttons = [button(key, label, on=value == safe) for key, (label, value) in SAFE_KEYS.items()]
    return {"label": "Which are safe?", "buttons": buttons}


class Annotating(Session):
    "The session of an annotator."

    def turn_to_next(self):
        self.task, self.safe = self.desk.next_task(self.who), None
        self.item = self.task and self.task.item

    def handle(self, key: str, text: str):
        if key == "u":
            if self.desk.undo(self.who) is None:
                self.note = "there is nothing to take back"
            self.turn_to_next()
        elif key == "r":
            self.turn_to_next()
        elif self.task and key in SAFE_KEYS and self.desk.study.safety:
            self.safe = SAFE_KEYS[key][1]
        elif self.task and key in LEVELS:
            if self.desk.study.safety and self.safe is None:
                self.note = "first, which of the two are safe?"
            else:
                self.desk.submit(self.task, unblind(self.task, LEVELS.index(key), self.safe))
                self.turn_to_next()

    def view(self) -> dict:
        "What the screen shows."
        done, left = self.desk.progress(self.who)
        rows, remarks = [], []
        if self.task:
            rows = scale_rows(None, [self.desk.study.safety and self.safe is None] * 2)
            rows = [safety_row(self.safe)] * self.desk.study.safety + rows
            remarks = [f"To do again: {self.task.feedback}"] * bool(self.task.feedback)
        mine = [a for a in self.desk.annotations(self.who) if a.feedback]
        return {
            "title": f"{self.desk.study.name} · {self.who}", "item": self.item, "done": done, "left": left,
            "messages": [[m["role"], m["content"]] for m in self.task.content["messages"]] if self.task else [],
            "answers": list(self.task.shown) if self.task else [], "rows": rows, "ask": "",
            "more": [button("u", "undo"), button("r", "look again")][: 1 + (self.task is None)],
            "remarks": remarks + [self.note] * bool(self.note) + ["Nothing to do just now."] * (self.task is None),
            "folds": [["g", "guidelines", [[title, lines] for title, lines in GUIDELINES.items()]]]
            + [["h", "feedback", [[f"Item {a.item}: {a.decision}", [a.feedback]] for a in mine]]] * bool(mine),
        }  # fmt: skip


class Reviewing(Session):
    "The session of a reviewer: the scale edits, `y` approves (or stores the edit), `n` rejects with the text's reason."

    def turn_to_next(self):
        waiting = unreviewed(self.desk, self.who)
        self.waiting, self.annotation = len(waiting), waiting[0] if waiting else None
        self.item = self.annotation and self.annotation.id
        if self.annotation:
            content = self.desk.items()[self.annotation.item]
            self.task = Task(self.annotation.item, self.annotation.annotator, self.annotation.left, content, "")
            self.choice = self.annotation.choice

    def shown(self) -> tuple[int, list | None]:
        "Place and safety label of the choice as it is, from left to right."
        choice, left = self.choice, self.task.left
        place = SCALE.index((int(choice["better"] != left), choice["rating"]))
        return place, choice["safe"] and (choice["safe"][left], choice["safe"][1 - left])

    def handle(self, key: str, text: str):
        if key == "r":
            self.turn_to_next()
        elif self.annotation is None:
            return
        elif key in ("y", "n"):
            edited = key == "y" and self.choice != self.annotation.choice
            decision = "reject" if key == "n" else "edit" if edited else "approve"
            review(self.desk, self.item, self.who, decision, text, self.choice if edited else None)
            self.turn_to_next()
        elif key in SAFE_KEYS and self.desk.study.safety:
            self.choice = unblind(self.task, self.shown()[0], SAFE_KEYS[key][1])
        elif key in LEVELS:
            place, safe = self.shown()
            if (LEVELS.index(key) < 4) != (place < 4):
                raise ValueError("an edit does not change which answer is better; reject the annotation instead")
            self.choice = unblind(self.task, LEVELS.index(key), safe)

    def view(self) -> dict:
        "What the screen shows."
        rows = []
        if self.annotation:
            place, safe = self.shown()
            rows = [safety_row(safe)] * self.desk.study.safety + scale_rows(place, [place > 3, place < 4])
        done = sum(a.reviewer == self.who for a in self.desk.annotations())
        return {
            "title": f"{self.desk.study.name} · review by {self.who}", "item": self.item, "done": done,
            "left": self.waiting, "rows": rows, "ask": "feedback to the annotator" * bool(rows),
            "messages": [[m["role"], m["content"]] for m in self.task.content["messages"]] if rows else [],
            "answers": list(self.task.shown) if rows else [],
            "more": [button("y", "approve as shown"), button("n", "reject")] if rows else [button("r", "look again")],
            "remarks": [self.note] * bool(self.note) + ["Nothing to review just now."] * (not rows),
            "folds": [["g", "what to look at", [["Is it fit to learn from?", CHECKS]]]],
        }  # fmt: skip


def widget(desk: Desk, annotator: str):
    "The desk as an annotator sees it in a notebook: two answers, the scale, safety, undo, progress, guidelines."
    return screen_class()(Annotating(desk, annotator))


def review_widget(desk: Desk, reviewer: str):
    "The desk as a reviewer sees it in a notebook: an annotation to approve, edit or reject."
    return screen_class()(Reviewing(desk, reviewer))


# %%
from llama2lib.annotate import review_widget, widget

screen = widget(desk, "ann")
screen

# %% [markdown]
# A program can press the keys too. The scale waits for the safety label:

# %%
screen.press("1")
print(screen.view["remarks"])
screen.press("a")
screen.press("1")
assert screen.view["done"] == 2 and desk.annotations()[-1].choice["safe"] == [True, True]
screen.press("u")
assert screen.view["done"] == 1
reviewer = review_widget(desk, "cleo")
print(reviewer.view["remarks"])

# %% [markdown]
# ## A study
#
# Two simulated annotators compare 40 pairs. A pair is two answers to a question of the mini world, drawn as chapter 03
# draws its noisy ones: six in ten are good, the others terse, wrong or repetitive. An annotator sees the gold judge's
# helpfulness with noise of their own, and sees left and right only, as people would. The second one does not even look
# at every fifth pair and presses any key, until somebody complains.

# %%
random = np.random.default_rng(13)
items = []
while len(items) < 40:
    text, task = synthetic.prompt(random, synthetic.pick(random, synthetic.HELPFUL), "train")
    answers = [synthetic.answer(random, task, synthetic.pick(random, synthetic.MIXED)) for _ in range(2)]
    if answers[0] != answers[1]:
        items.append({"messages": [{"role": "user", "content": text}], "answers": answers})


def annotate(desk, number, annotator):
    "A simulated annotator works until nothing is wanted any more."
    while task := desk.next_task(annotator):
        left, right = (judge(task.content["messages"], answer).helpfulness for answer in task.shown)
        side, rating = rate(left, right, seed=1000 * number + task.item + 500 * bool(task.feedback))
        place = 7 - list(RATINGS).index(rating) if side else list(RATINGS).index(rating)
        if number and random.random() < 0.2 and not task.feedback:
            place = random.integers(8)
        desk.submit(task, unblind(task, place))


study = Desk(folder / "study.sqlite", Study("simulated", per_item=2))
study.add(items)
people = ["ann", "bob"]
for number, annotator in enumerate(people):
    annotate(study, number, annotator)
said = study.annotations()
assert len(said) == 80 and study.progress("ann") == (40, 0)
print(sum(a.left for a in said), "of", len(said), "with the first answer on the right")

# %% [markdown]
# ## Do they agree?
#
# The paper reports agreement for its human evaluations as Gwet's AC2 (section 3.4.2, chapter 10), and says of its
# preferences that people agree more where the answers differ more (section 3.2.2). Agreement is measured on items with
# two annotations or more, after un-blinding: how often two annotators name the same answer; AC2 on the eight places of
# the scale, so that neighbours count as near; and by level: when somebody says *significantly better*, how often does
# another one name the same answer?
#
# > Ours: agreement is averaged within an item first, and the intervals are over items, as the annotations of one item
# > are not independent. AC2 has quadratic weights.


# %%
#| export
class Agreement(NamedTuple):
    "How well annotators agree, over the items that two or more of them annotated."

    items: int
    same: Interval  # share of pairs of annotators that name the same answer
    ac2: Interval  # Gwet's AC2 on the places of SCALE
    by_rating: dict[str, Interval]  # the same as `same`, with one of the two having said this


def agreed_share(parts: Sequence[float]) -> Interval:
    "Mean of an item's share of agreement over items, with Wilson's interval."
    return win_rate_interval(sum(parts), len(parts) - sum(parts))


def agreement(annotations: Sequence[Annotation]) -> Agreement:
    "Agreement of annotations as they were said, before review. ValueError with fewer than two items annotated twice."
    by_item: dict[int, dict[str, dict]] = {}
    for a in annotations:
        by_item.setdefault(a.item, {})[a.annotator] = a.choice
    twice = [choices for choices in by_item.values() if len(choices) > 1]
    if len(twice) < 2:
        raise ValueError(f"agreement needs two items or more with two annotations, found {len(twice)}")
    names = sorted({name for choices in twice for name in choices})
    places = [[SCALE.index((c[n]["better"], c[n]["rating"])) if n in c else None for n in names] for c in twice]
    same: list[float] = []
    said: dict[str, list[float]] = {rating: [] for rating in RATINGS}
    for choices in twice:
        votes = Counter(choice["better"] for choice in choices.values())
        others = [(c["rating"], (votes[c["better"]] - 1) / (len(choices) - 1)) for c in choices.values()]
        same.append(sum(part for _, part in others) / len(others))
        for rating, parts in said.items():
            if mine := [part for name, part in others if name == rating]:
                parts.append(sum(mine) / len(mine))
    by_rating = {rating: agreed_share(parts) for rating, parts in said.items() if parts}
    return Agreement(len(twice), agreed_share(same), gwet_ac2(places, categories=range(len(SCALE))), by_rating)


# %%
from llama2lib.annotate import agreement

found = agreement(said)
print(f"{found.items} items: the same answer {found.same.value:.2f} [{found.same.low:.2f}, {found.same.high:.2f}], "
      f"AC2 {found.ac2.value:.2f} [{found.ac2.low:.2f}, {found.ac2.high:.2f}]")  # fmt: skip

# %%
fig, ax = plt.subplots(figsize=(5.6, 2.6))
for row, (value, low, high) in enumerate(found.by_rating.values()):
    ax.plot([low, high], [row, row], color=plots.COLORS["ours"])
    ax.plot(value, row, "o", color=plots.COLORS["ours"])
ax.axvline(0.5, color="0.6", linestyle=":")
ax.text(0.505, -0.75, "chance", color="0.4", va="center")
ax.set_yticks(range(len(found.by_rating)), list(found.by_rating))
ax.set(xlabel="share of others who name the same answer, 95 % interval", xlim=(0, 1.02), ylim=(3.5, -1.1))
ax.set_title("Simulated annotators agree where the\nanswers differ, and not where they hardly do")
plots.save(fig, "13_agreement.png")
_ = ledger.record(
    "Section 3.2.2", "agreement of annotators by the level that one of them chose", "illustrated",
    "higher on more distinct responses", {rating: round(part.value, 2) for rating, part in found.by_rating.items()},
    evidence="figures/13_agreement.png",
)  # fmt: skip

# %% [markdown]
# That is how the noise was made, so it proves nothing about people. It shows what the measure sees, and how little 40
# items are: the interval of a single level is wide.
#
# ## From annotations to comparisons
#
# A reward model reads rows of comparisons (chapter 04). Only what a reviewer approved or edited is exported, unless one
# asks for the rest. Where several people annotated an item, the majority says which answer is better. Nothing is left
# out in silence: ties, items that lack annotations or reviews, and, as in the paper (section 3.2.1), pairs whose chosen
# answer is unsafe while the other is safe are counted.
#
# > Ours: the level is the median of those who chose that answer, the weaker of two; an answer is safe if more than half
# > say so.


# %%
#| export
def export(
    desk: Desk, with_unreviewed: bool = False, at_least: int | None = None
) -> tuple[list[Preference], Counter[str]]:
    """Comparisons from what was annotated, and why how many items gave none (sections 3.2.1, A.5).

    with_unreviewed: take annotations without a review too. at_least: usable annotations that an item must have; None:
    as many as the study wants of it.
    """
    by_item: dict[int, list[Annotation]] = {}
    for a in desk.annotations():
        by_item.setdefault(a.item, []).append(a)
    wanted = desk.study.per_item if at_least is None else max(at_least, 1)
    rows, left_out = [], Counter()
    for number, item in desk.items().items():
        kept = [a for a in by_item.get(number, []) if a.decision != "reject"]
        choices = [a.final for a in kept if a.decision or with_unreviewed]
        first, second = (sum(c["better"] == i for c in choices) for i in (0, 1))
        better = int(second > first)
        safe = [2 * sum(c["safe"][i] for c in choices) > len(choices) for i in (0, 1)] if desk.study.safety else None
        if len(choices) < wanted:
            left_out["not reviewed" if len(kept) >= wanted else "too few annotations"] += 1
        elif first == second:
            left_out["a tie"] += 1
        elif safe and safe[1 - better] and not safe[better]:
            left_out["chosen unsafe, the other safe"] += 1
        else:
            ratings = sorted(list(RATINGS).index(c["rating"]) for c in choices if c["better"] == better)
            row = Preference(
                messages=item["messages"],
                chosen=item["answers"][better],
                rejected=item["answers"][1 - better],
                rating=list(RATINGS)[ratings[len(ratings) // 2]],
                safety=safe and SAFETY[2 - safe[better] - (safe[better] and not safe[1 - better])],
                source=desk.study.name,
            )
            check_preference(row)
            rows.append(row)
    return rows, left_out


# %% [markdown]
# A simulated reviewer knows the gold scores. Whoever chose the worse answer by more than the noise is sent back, and
# does it again; a level that is two or more off is edited.

# %%
from llama2lib.annotate import export

assert export(study) == ([], {"not reviewed": 40})
levels = list(RATINGS)
for _ in range(2):
    for a in unreviewed(study, "cleo"):
        item = study.items()[a.item]
        gold = [judge(item["messages"], answer).helpfulness for answer in item["answers"]]
        lead = gold[a.choice["better"]] - gold[1 - a.choice["better"]]
        fitting = next(rating for rating, cut in RATINGS.items() if abs(lead) >= cut)
        if lead < -0.1:
            review(study, a.id, "cleo", "reject", "The other one is better. Please look again.")
        elif abs(levels.index(fitting) - levels.index(a.choice["rating"])) >= 2:
            review(study, a.id, "cleo", "edit", choice=a.choice | {"rating": fitting})
        else:
            review(study, a.id, "cleo", "approve")
    print(Counter(f"{a.annotator}: {a.decision}" for a in study.annotations() if a.decision))
    for number, annotator in enumerate(people):
        annotate(study, number, annotator)
rows, left_out = export(study)
print(len(rows), "comparisons;", dict(left_out))
write_preferences(folder / "comparisons.jsonl", rows)
assert read_preferences(folder / "comparisons.jsonl") == rows
rows[0]

# %% [markdown]
# ## What it took
#
# - A widget is quickly made. What takes care is what nobody sees in it: that the chosen answer is the one that was on
#   the left when it was chosen, that a click which was answered is on disk, that nothing is asked twice or lost between
#   two people, and that a key pressed in a hurry does not rate a pair that has not been read.
# - Of the paper's section A.5 the protocol can be rebuilt: guidelines, pass marks, review. Its people cannot, and no
#   number here is about people; the agreement in the figure is that of the noise we put in.
# - Review mends levels and sends back what is plainly wrong. It does not settle honest disagreement: two annotators for
#   each item leave ties.
# - The comparisons go to chapter 04 as they are. Chapter 14 asks another question, on a scale with seven points, with
#   the same screen and a file of the same kind.

# %% [markdown]
# ## Exercises
#
# 1. An annotator likes what stands on the left a little better. What does that do to a comparison of two equally good
#    models, if the first model always stands left, if sides are drawn, and if somebody forgets to un-blind?
# 2. The third test is passed with more than 26 of 31. Who passes it? And if the mark were at least 26?
# 3. What do a second and a third annotator for each item buy, without a review?

# %% [markdown]
# With a fixed side the first model wins, and nothing in the file tells why. Drawn sides make it a draw; the liking is
# still there, and can be measured as the share of left choices. Without un-blinding the draw was for nothing.

# %%
import numpy as np

from llama2lib.desk import Task, unblind

random, wins = np.random.default_rng(0), {}
content = {"messages": [], "answers": ["by the first model", "by the second model"]}
for name in ("always left", "drawn", "drawn, not un-blinded"):
    chosen = []
    for left in random.integers(0, 2, 4000) * (name != "always left"):
        place = 0 if random.normal(0.1, 0.3) > 0 else 7  # what is on the left seems better by 0.1
        choice = unblind(Task(1, "ann", int(left), content, ""), place)
        chosen.append(place == 0 if name.endswith("un-blinded") else choice["better"] == 0)
    wins[name] = float(np.mean(chosen))
    print(f"the first model, {name}: wins {wins[name]:.1%}")
assert abs(wins["drawn"] - 0.5) < 0.03 and min(wins["always left"], wins["drawn, not un-blinded"]) > 0.58

# %% [markdown]
# The mark is 27 questions, 87 %. Whoever agrees on four questions of five, which was enough for the second test, fails
# three times in four. With the mark one question lower it would be three times in five: at the boundary the wording
# counts.

# %%
from scipy.stats import binom

from llama2lib.annotate import TESTS, passed

questions = TESTS[3].questions
lowest = min(right for right in range(questions + 1) if passed(3, {"agreed": right}))
chances = {}
for skill in (0.7, 0.8, 0.87, 0.95):
    chances[skill] = [float(binom.sf(mark - 1, questions, skill)) for mark in (lowest, lowest - 1)]
    print(f"who agrees on {skill:.0%} passes with {chances[skill][0]:.0%}, and with {chances[skill][1]:.0%} "
          f"if {lowest - 1} were enough")  # fmt: skip
assert lowest == 27 and chances[0.8][0] < 0.3 < chances[0.8][1] and chances[0.95][0] > 0.9

# %% [markdown]
# A second one mainly shows which pairs are doubtful: where the two disagree the item is a tie and drops out, and what
# is left is cleaner than with one. A third one decides the ties. Then nothing drops out, and the rows are right more
# often than with one annotator, and less often than with two who agree.

# %%
import numpy as np

from llama2lib.judge import rate

random, found = np.random.default_rng(0), {}
gaps = random.normal(0, 0.2, 3000)  # gold score of the first answer minus that of the second
votes = np.array([[1 - 2 * rate(gap, 0, seed=10 * item + n)[0] for n in range(3)] for item, gap in enumerate(gaps)])
for people in (1, 2, 3):
    lead = votes[:, :people].sum(1)
    right = np.sign(lead[lead != 0]) == np.sign(gaps[lead != 0])
    found[people] = share, correct = len(right) / len(gaps), float(right.mean())
    print(f"{people} for each item: {share:.0%} of the items give a row, {correct:.1%} of the rows are right")
assert found[1][0] == found[3][0] == 1 > found[2][0] and found[1][1] < found[3][1] < found[2][1]
