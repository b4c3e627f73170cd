"""Generated from chapters/13_annotation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "GUIDELINES",
    "CHECKS",
    "Mark",
    "AnnotatorTest",
    "TESTS",
    "passed",
    "LEVELS",
    "SAFE_KEYS",
    "scale_rows",
    "safety_row",
    "Annotating",
    "Reviewing",
    "widget",
    "review_widget",
    "Agreement",
    "agreed_share",
    "agreement",
    "export",
]


# ---------- chapters/13_annotation.py · Guidelines

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


# ---------- chapters/13_annotation.py · Four tests

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


# ---------- chapters/13_annotation.py · In a notebook

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


# ---------- chapters/13_annotation.py · Do they agree?

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


# ---------- chapters/13_annotation.py · From annotations to comparisons

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
