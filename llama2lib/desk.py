"""Generated from chapters/13_annotation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "check_item",
    "read_items",
    "Choice",
    "SCALE",
    "Study",
    "check_choice",
    "TABLES",
    "HOLD",
    "now",
    "Task",
    "unblind",
    "Annotation",
    "Desk",
    "NEXT",
    "DECISIONS",
    "review",
    "unreviewed",
]


# ---------- chapters/13_annotation.py · What is compared

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


# ---------- chapters/13_annotation.py · A file that forgets nothing

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


# ---------- chapters/13_annotation.py · A second pair of eyes

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
