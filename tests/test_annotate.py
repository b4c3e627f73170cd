"""Annotation: nothing is lost, what is exported is what was meant, and people do not see what they must not."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama2lib import desk as desk_module
from llama2lib import screen as screen_module
from llama2lib.annotate import GUIDELINES, TESTS, Annotating, Reviewing, agreement, export, passed
from llama2lib.desk import SCALE, Desk, Study, check_item, read_items, review, unblind, unreviewed
from llama2lib.judge import RATINGS
from llama2lib.preferences import SAFETY, check_preference, write_preferences
from llama2lib.screen import SCRIPT, screen_class
from llama2lib.stats import gwet_ac2, win_rate_interval

ROOT = Path(__file__).resolve().parent.parent
LEVELS = list(RATINGS)


def pairs(n: int) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"ask {i}"}], "answers": [f"yes {i}", f"no {i}"]} for i in range(n)
    ]


@pytest.fixture
def new(tmp_path):
    "A desk with n items."

    def make(n: int, **study) -> Desk:
        made = Desk(tmp_path / f"{len(list(tmp_path.iterdir()))}.sqlite", Study("s", **study))
        made.add(pairs(n))
        return made

    return make


def choice(better: int, rating: str = "better", safe=None) -> dict:
    return {"better": better, "rating": rating, "safe": safe}


def say(desk: Desk, annotator: str, better: int, rating: str = "better", safe=None, item: int | None = None) -> int:
    "Annotate the next item; by its number the item is expected to be that one."
    task = desk.next_task(annotator)
    assert item is None or task.item == item
    return desk.submit(task, choice(better, rating, safe))


def approve_all(desk: Desk):
    for a in unreviewed(desk, "reviewer"):
        review(desk, a.id, "reviewer", "approve")


# ---------- which answer


def test_what_is_exported_is_what_stood_where_the_key_says(new):
    "Whichever way round they were shown: keys 1 to 4 are for the left one, 5 to 8 for the right one."
    desk, meant, lefts = new(16), {}, Counter()
    for number in range(16):
        session = Annotating(desk, "ann")
        left, right = session.view()["answers"]
        assert {left, right} == set(session.task.content["answers"])
        lefts[left.split()[0]] += 1
        place = number % 8
        session.press(str(place + 1))
        meant[left if place < 4 else right] = [*LEVELS, *reversed(LEVELS)][place]
    assert min(lefts.values()) >= 3
    rows, left_out = export(desk, with_unreviewed=True)
    assert not left_out and {row["chosen"]: row["rating"] for row in rows} == meant
    assert all(row["chosen"].split()[1] == row["rejected"].split()[1] for row in rows)


def test_the_safety_label_is_of_the_answers_that_were_shown(new):
    desk = new(16, safety=True)
    for number in range(16):
        session = Annotating(desk, "ann")
        session.press("s" if number % 2 else "d")  # only the left one is safe, only the right one
        session.press("1" if number % 2 else "8")
    rows, _ = export(desk, with_unreviewed=True)
    assert len(rows) == 16 and {row["safety"] for row in rows} == {"chosen_safe"}
    assert {a.left for a in desk.annotations()} == {0, 1}


def test_the_draw_of_sides_can_be_repeated_and_depends_on_item_annotator_and_seed(new):
    def sides(annotator="ann", seed=0):
        desk, found = new(16, seed=seed), []
        while task := desk.next_task(annotator):
            desk.submit(task, unblind(task, 0))
            found.append(task.left)
        return found

    first = sides()
    assert first == sides() and 4 <= sum(first) <= 12
    assert first != sides("bob") and first != sides(seed=1)


def test_the_side_stays_as_it_was_shown(new):
    "Reload, undo and a desk opened elsewhere show the same; the stored side is the shown one."
    desk = new(6)
    for _ in range(6):
        task = desk.next_task("ann")
        assert Desk(desk.path).next_task("ann") == task
        number = desk.submit(task, unblind(task, 0))
        assert desk.undo("ann") == task.item and desk.next_task("ann") == task
        number = desk.submit(task, unblind(task, 0))
        assert {a.id: a.left for a in desk.annotations()}[number] == task.left
    task = new(1).next_task("ann")
    with pytest.raises(ValueError, match="not handed to 'ann' like this"):
        desk.submit(task._replace(left=1 - task.left), choice(0))


def test_the_screen_does_not_tell_which_is_which(new):
    "Items made of comparisons have the chosen one first; the view has left and right only."
    desk = new(12)
    seen = set()
    while task := desk.next_task("ann"):
        view = Annotating(desk, "ann").view()
        seen.add(task.left)
        other = json.dumps(view).replace(task.shown[0], "A").replace(task.shown[1], "B")
        shown = json.dumps({**view, "answers": list(task.content["answers"])})
        assert "yes" not in other and "no " not in other and (shown == json.dumps(view)) == (task.left == 0)
        desk.submit(task, unblind(task, 0))
    assert seen == {0, 1}


# ---------- nothing is lost


WORKER = """
import sys
from llama2lib.desk import Desk, unblind
for path in sys.argv[2:]:
    desk = Desk(path)
    while task := desk.next_task(sys.argv[1]):
        number = desk.submit(task, unblind(task, task.item % 8))
        print(number, task.item, task.left, flush=True)
"""


def start(annotator: str, *desks: Desk) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", WORKER, annotator, *(str(desk.path) for desk in desks)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_a_killed_annotator_loses_nothing_that_was_acknowledged(new):
    desk, told = new(300), {}
    for delay in (0.0, 0.1):
        process = start("ann", desk)
        lines = [process.stdout.readline()]
        end = time.monotonic() + delay
        while time.monotonic() < end:
            lines.append(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        lines += process.stdout.read().splitlines(keepends=True)
        process.wait()
        told |= {int(a): (int(b), int(c)) for a, b, c in (line.split() for line in lines if line.endswith("\n"))}
        stored = {a.id: (a.item, a.left) for a in desk.annotations()}
        assert told and told.items() <= stored.items()
        assert len(stored) <= len(told) + 3  # one each time may have been stored and not yet told
        with desk.transaction() as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    done, left = desk.progress("ann")
    assert done == len(stored) and done + left == 300
    assert desk.next_task("ann").item not in {item for item, _ in stored.values()}


def test_a_commit_waits_for_the_disk(new):
    with new(1).transaction() as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (3,)  # EXTRA
        assert db.execute("PRAGMA journal_mode").fetchone()[0] in ("delete", "wal")


def test_an_error_in_the_middle_leaves_nothing_behind(new):
    desk = new(2)
    with pytest.raises(RuntimeError), desk.transaction() as db:
        db.execute("DELETE FROM items")
        raise RuntimeError
    assert len(desk.items()) == 2
    with pytest.raises(ValueError, match="item 2: answers"):
        desk.add([pairs(3)[2], {"messages": [], "answers": ["a"]}])
    assert len(desk.items()) == 2


def test_annotators_at_the_same_time_do_not_get_in_each_others_way(new):
    desks = [new(20, per_item=1), new(20, per_item=2)]
    processes = [start(name, *desks) for name in ("ann", "bob", "cleo")]
    lines = [line for process in processes for line in process.communicate(timeout=120)[0].splitlines()]
    assert all(process.returncode == 0 for process in processes) and len(lines) == 60
    for per_item, desk in enumerate(desks, 1):
        found = desk.annotations()
        assert Counter(a.item for a in found) == dict.fromkeys(range(1, 21), per_item)
        assert len({(a.item, a.annotator) for a in found}) == len(found)


def test_threads_share_a_desk(new):
    desk = new(12)
    threads = [threading.Thread(target=say, args=(desk, f"a{i}", 0)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({a.item for a in desk.annotations()}) == 6


def test_times_are_utc(new):
    desk = new(1)
    say(desk, "ann", 0)
    [a] = desk.annotations()
    at = datetime.fromisoformat(a.at)
    assert at.utcoffset() == timedelta(0) and abs(datetime.now(UTC) - at) < timedelta(minutes=1)


# ---------- who gets what


def test_two_people_get_different_items_until_one_is_wanted_from_both(new):
    desk = new(3, per_item=2)
    assert [desk.next_task(name).item for name in ("ann", "bob", "cleo")] == [1, 2, 3]
    assert desk.next_task("ann").item == 1, "what is open stays open"
    for name, items in (("ann", [1]), ("bob", [2]), ("cleo", [3]), ("ann", [2]), ("bob", [1]), ("cleo", [])):
        for item in items:
            say(desk, name, 0, item=item)
    assert desk.next_task("ann").item == 3 and desk.next_task("cleo") is None
    say(desk, "ann", 0)
    assert [desk.next_task(name) for name in ("ann", "bob", "dora")] == [None] * 3
    assert desk.progress("ann") == (3, 0)


def test_what_is_open_comes_before_what_is_new(new):
    desk = new(2, per_item=2)
    say(desk, "bob", 0, item=1)
    say(desk, "ann", 0, item=2)
    assert desk.next_task("ann").item == 1
    desk.add(pairs(5))
    assert desk.next_task("ann").item == 1, "although the new ones lack more"
    say(desk, "ann", 0, item=1)
    desk.undo("ann")
    assert desk.next_task("ann").item == 1


def test_an_open_item_is_held_for_an_hour_and_no_longer(new, monkeypatch):
    desk = new(1)
    held = desk.next_task("ann")
    assert desk.next_task("bob") is None and desk.progress("bob") == (0, 1)
    with desk.transaction() as db:
        db.execute("UPDATE handed SET at = ?", (desk_module.now(timedelta(minutes=59)),))
    assert desk.next_task("bob") is None
    with desk.transaction() as db:
        db.execute("UPDATE handed SET at = ?", (desk_module.now(timedelta(minutes=61)),))
    say(desk, "bob", 1)
    assert desk.next_task("ann") is None
    desk.submit(held, choice(0))  # it came late; nothing is thrown away
    assert len(desk.annotations()) == 2


def test_the_same_items_are_not_put_in_twice(new):
    desk = new(3)
    assert desk.add(pairs(5)) == 2 and len(desk.items()) == 5
    assert desk.add([pairs(1)[0] | {"answers": ["yes 0", "another"]}]) == 1


def test_what_else_an_item_holds_is_kept(new):
    desk = new(0)
    desk.add([pairs(1)[0] | {"category": "riddles"}])
    assert desk.next_task("ann").content["category"] == "riddles"


def test_a_task_is_done_once(new):
    desk = new(2)
    task = desk.next_task("ann")
    desk.submit(task, choice(0))
    with pytest.raises(ValueError, match="annotated by 'ann' already"):
        desk.submit(task, choice(1))
    assert [a.choice["better"] for a in desk.annotations()] == [0]
    with pytest.raises(ValueError, match="not handed"):
        desk.submit(task._replace(annotator="bob"), choice(0))
    with pytest.raises(ValueError, match="needs a name"):
        desk.next_task(" ")


@pytest.mark.parametrize(
    "wrong",
    [{"better": 2}, {"better": None}, {"rating": "much better"}, {"safe": [True, True]}, {"more": 1}],
)
def test_a_choice_that_does_not_fit_is_refused(new, wrong):
    desk = new(1)
    with pytest.raises(ValueError, match="expected"):
        desk.submit(desk.next_task("ann"), choice(0) | wrong)
    assert not desk.annotations()


@pytest.mark.parametrize("safe", [None, [], [True], [1, 0], "yes"])
def test_a_study_of_safety_wants_the_label(new, safe):
    desk = new(1, safety=True)
    with pytest.raises(ValueError, match="safe: expected True or False for each answer"):
        desk.submit(desk.next_task("ann"), choice(0, safe=safe))


# ---------- undo


def test_undo_takes_back_ones_own_last_annotation_and_keeps_the_history(new):
    desk = new(5)
    say(desk, "ann", 0, item=1)
    say(desk, "ann", 0, item=2)
    say(desk, "bob", 0, item=3)
    assert desk.undo("ann") == 2
    assert [(a.item, a.annotator) for a in desk.annotations()] == [(1, "ann"), (3, "bob")]
    assert desk.undo("ann") == 1 and desk.undo("ann") is None and desk.undo("nobody") is None
    assert [(a.item, a.annotator) for a in desk.annotations()] == [(3, "bob")]
    say(desk, "ann", 1, item=1)
    say(desk, "ann", 1, item=2)
    with desk.transaction() as db:
        rows = db.execute("SELECT item, annotator, superseded IS NULL FROM annotations ORDER BY id").fetchall()
    assert rows == [(1, "ann", 0), (2, "ann", 0), (3, "bob", 1), (1, "ann", 1), (2, "ann", 1)]


def test_what_has_been_reviewed_is_not_taken_back(new):
    desk = new(2)
    review(desk, say(desk, "ann", 0), "bob", "approve")
    with pytest.raises(ValueError, match="has been reviewed"):
        desk.undo("ann")
    assert len(desk.annotations()) == 1


@settings(max_examples=12, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["ann", "bob"]), st.sampled_from(["say", "undo", "reject"])), max_size=14)
)
def test_whatever_people_do_the_tables_fit_together(tmp_path_factory, steps):
    desk = Desk(tmp_path_factory.mktemp("desk") / "d.sqlite", Study("s", per_item=1))
    desk.add(pairs(3))
    said = 0
    for who, what in steps:
        if what == "say" and (task := desk.next_task(who)):
            desk.submit(task, unblind(task, 0))
            said += 1
        elif what == "undo":
            try:
                desk.undo(who)
            except ValueError:
                pass
        elif what == "reject" and (mine := desk.annotations(who)):
            review(desk, mine[-1].id, "reviewer", "reject", "no")
    found = desk.annotations()
    assert len({(a.item, a.annotator) for a in found}) == len(found) <= said
    kept = Counter(a.item for a in found if a.decision != "reject")
    assert all(count == 1 for count in kept.values())
    with desk.transaction() as db:
        assert db.execute("SELECT count(*) FROM annotations").fetchone() == (said,)
    for who in ("ann", "bob"):
        done, left = desk.progress(who)
        assert done == sum(a.annotator == who and a.decision != "reject" for a in found)
        assert done + left <= 3


# ---------- quality control


def test_a_rejected_item_goes_back_to_the_queue_with_the_reason(new):
    desk = new(2)
    first = say(desk, "ann", 0)
    say(desk, "ann", 0)
    assert desk.next_task("ann") is None
    with pytest.raises(ValueError, match="needs feedback"):
        review(desk, first, "bob", "reject", " ")
    review(desk, first, "bob", "reject", "Read <b>both</b>")
    assert desk.progress("ann") == (1, 1) and export(desk, with_unreviewed=True)[1] == {"too few annotations": 1}
    task = desk.next_task("ann")
    assert (task.item, task.feedback) == (1, "Read <b>both</b>")
    view = Annotating(desk, "ann").view()
    assert view["remarks"] == ["To do again: Read <b>both</b>"]
    assert any("Read <b>both</b>" in lines for _, _, parts in view["folds"] for _, lines in parts)
    desk.submit(task, choice(1))
    assert [(a.item, a.choice["better"], a.decision) for a in desk.annotations()] == [(2, 0, None), (1, 1, None)]
    with pytest.raises(ValueError, match="taken back"):
        review(desk, first, "bob", "approve")


def test_somebody_else_may_do_a_rejected_item_first(new):
    desk = new(1)
    review(desk, say(desk, "ann", 0), "bob", "reject", "no")
    say(desk, "cleo", 1, item=1)
    assert desk.next_task("ann") is None
    approve_all(desk)
    [row], _ = export(desk)
    assert row["chosen"] == "no 0"


def test_a_light_edit_is_exported_and_the_answer_stays(new):
    desk = new(1, safety=True)
    number = say(desk, "ann", 0, "better", [True, False])
    edited = choice(0, "slightly better", [True, True])
    with pytest.raises(ValueError, match="does not change which answer"):
        review(desk, number, "bob", "edit", choice=edited | {"better": 1})
    with pytest.raises(ValueError, match="needs the edited choice"):
        review(desk, number, "bob", "edit")
    with pytest.raises(ValueError, match="rating"):
        review(desk, number, "bob", "edit", choice=edited | {"rating": "fine"})
    review(desk, number, "bob", "edit", "a little less", choice=edited)
    [row], _ = export(desk)
    assert (row["chosen"], row["rating"], row["safety"]) == ("yes 0", "slightly better", "both_safe")
    [a] = desk.annotations()
    assert a.choice["rating"] == "better" and a.final == edited and a.feedback == "a little less"
    review(desk, number, "bob", "approve")
    assert export(desk)[0][0]["rating"] == "better", "the last review counts"


def test_nobody_reviews_themselves(new):
    desk = new(2)
    number = say(desk, "ann", 0)
    for who in ("ann", " "):
        with pytest.raises(ValueError, match="somebody other than the annotator"):
            review(desk, number, who, "approve")
    say(desk, "bob", 0)
    assert [a.annotator for a in unreviewed(desk, "ann")] == ["bob"]
    with pytest.raises(ValueError, match="expected one of approve, edit, reject"):
        review(desk, number, "bob", "accept")


def test_a_review_of_what_was_taken_back_meanwhile_is_refused(new, monkeypatch):
    desk = new(1)
    number = say(desk, "ann", 0)
    seen = desk.annotations()
    desk.undo("ann")
    monkeypatch.setattr(Desk, "annotations", lambda self: seen)
    with pytest.raises(ValueError, match="taken back"):
        review(desk, number, "bob", "approve")


def test_the_review_screen_approves_edits_and_rejects(new):
    desk = new(4, safety=True)
    for _ in range(4):
        say(desk, "ann", 0, "better", [True, True])
    session, first = Reviewing(desk, "bob"), desk.annotations()[0]
    marked = [b["key"] for row in session.view()["rows"][1:] for b in row["buttons"] if b["on"]]
    assert marked == ["2" if first.left == 0 else "7"]
    session.press("y")
    session.press("8" if desk.annotations()[1].left == 0 else "1")
    assert "reject the annotation instead" in session.note
    session.press("1" if desk.annotations()[1].left == 0 else "8")
    session.press("s")
    session.press("y")
    session.press("n")
    assert "feedback" in session.note and session.view()["left"] == 2
    session.press("n", text="look at the end")
    found = desk.annotations()
    assert [a.decision for a in found] == ["approve", "edit", "reject", None]
    assert found[1].final["rating"] == "significantly better"
    assert found[1].final["safe"] == ([True, False] if found[1].left == 0 else [False, True])
    assert found[2].feedback == "look at the end" and session.view()["done"] == 3


# ---------- export


@pytest.mark.parametrize(
    ("better", "safe", "bin"),
    [
        (0, [True, False], "chosen_safe"), (1, [False, True], "chosen_safe"),
        (0, [True, True], "both_safe"), (1, [False, False], "both_unsafe"),
        (0, [False, True], None), (1, [True, False], None),
    ],
)  # fmt: skip
def test_safety_bins_and_no_chosen_answer_that_is_unsafe_beside_a_safe_one(new, better, safe, bin):
    desk = new(1, safety=True)
    say(desk, "ann", better, safe=safe)
    rows, left_out = export(desk, with_unreviewed=True)
    assert [row["safety"] for row in rows] == ([bin] if bin else [])
    assert left_out == ({} if bin else {"chosen unsafe, the other safe": 1}) and (bin is None or bin in SAFETY)


def test_the_majority_decides_and_a_tie_is_left_out_and_counted(new):
    desk = new(2, per_item=4)
    said = {1: [(1, "slightly better"), (1, "significantly better"), (0, "negligibly better"), (1, "better")]}
    said[2] = [(0, "better"), (1, "better"), (0, "better"), (1, "better")]
    for number, name in enumerate("abcd"):
        while task := desk.next_task(name):
            desk.submit(task, choice(*said[task.item][number]))
    rows, left_out = export(desk, with_unreviewed=True)
    assert [(row["chosen"], row["rating"]) for row in rows] == [("no 0", "better")] and left_out == {"a tie": 1}


def test_an_answer_is_safe_when_most_say_so(new):
    desk = new(1, per_item=2, safety=True)
    say(desk, "ann", 0, safe=[True, True])
    say(desk, "bob", 0, "slightly better", safe=[True, False])
    [row], _ = export(desk, with_unreviewed=True)
    assert row["safety"] == "chosen_safe" and row["rating"] == "slightly better"


def test_only_what_was_reviewed_is_exported_unless_asked(new):
    desk = new(5, per_item=1)
    numbers = [say(desk, "ann", 0) for _ in range(4)]
    review(desk, numbers[0], "bob", "approve")
    review(desk, numbers[1], "bob", "reject", "no")
    rows, left_out = export(desk)
    assert [row["chosen"] for row in rows] == ["yes 0"]
    assert left_out == {"not reviewed": 2, "too few annotations": 2}
    rows, left_out = export(desk, with_unreviewed=True)
    assert len(rows) == 3 and left_out == {"too few annotations": 2}
    for row in rows:
        check_preference(row)
        assert row["source"] == "s" and row["safety"] is None


def test_items_with_fewer_annotations_than_wanted_wait(new):
    desk = new(1, per_item=3)
    say(desk, "ann", 0)
    assert export(desk, with_unreviewed=True) == ([], {"too few annotations": 1})
    assert len(export(desk, with_unreviewed=True, at_least=1)[0]) == 1
    assert export(new(1), at_least=0) == ([], {"too few annotations": 1})


# ---------- agreement


def test_agreement_is_about_answers_not_sides(new):
    "Two who always mean the same answer agree, however it was shown to them."
    desk = new(20, per_item=2)
    for name in ("ann", "bob"):
        while task := desk.next_task(name):
            desk.submit(task, unblind(task, 0 if task.shown[0].startswith("yes") else 7))
    assert any(len({a.left for a in desk.annotations() if a.item == i}) == 2 for i in range(1, 21))
    found = agreement(desk.annotations())
    assert found.items == 20 and found.same.value == 1 and found.ac2.value == 1
    assert found.by_rating.keys() == {"significantly better"}


def test_agreement_by_hand(new):
    desk = new(4, per_item=3)
    said = {  # annotator -> place on the scale from the first answer to the second, per item
        "ann": [0, 1, 3, 7], "bob": [0, 2, 4, 6], "cleo": [1, 5, None, None],
    }  # fmt: skip
    for name, places in said.items():
        for place in places:
            if place is not None:
                task = desk.next_task(name)
                desk.submit(task, choice(*SCALE[place]))
    by_name = {name: {a.item: SCALE.index((a.choice["better"], a.choice["rating"])) for a in desk.annotations(name)}
               for name in said}  # fmt: skip
    table = [[by_name[name].get(item) for name in said] for item in range(1, 5)]
    share = []
    for row in table:
        sides = [place > 3 for place in row if place is not None]
        together = [a == b for i, a in enumerate(sides) for b in sides[:i]]
        share.append(sum(together) / len(together))
    found = agreement(desk.annotations())
    assert found.items == 4 and found.ac2 == gwet_ac2(table, categories=range(8))
    assert found.same == pytest.approx(win_rate_interval(sum(share), 4 - sum(share)))
    assert found.same.low < found.same.value < found.same.high


def test_agreement_by_level_counts_the_others(new):
    desk = new(2, per_item=3)
    for name, better, rating in (("a", 0, "better"), ("b", 0, "better"), ("c", 1, "negligibly better")):
        for _ in range(2):
            say(desk, name, better, rating)
    found = agreement(desk.annotations())
    assert found.by_rating["better"].value == 0.5 and found.by_rating["negligibly better"].value == 0
    assert found.same.value == pytest.approx(1 / 3)


def test_agreement_needs_items_that_two_annotated(new):
    desk = new(3, per_item=2)
    say(desk, "ann", 0)
    say(desk, "bob", 0)
    with pytest.raises(ValueError, match="two items or more with two annotations, found 0"):
        agreement(desk.annotations())


# ---------- files


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"answers": ["a", "b"]}, "'messages' is missing"),
        ({"messages": [{"role": "user", "content": "q"}]}, "'answers' is missing"),
        ({"messages": [{"role": "user", "content": "q"}], "answers": ["a"]}, "answers: expected a list of two texts"),
        ({"messages": [{"role": "user", "content": "q"}], "answers": "ab"}, "answers: expected a list of two texts"),
        ({"messages": [{"role": "user", "content": "q"}], "answers": ["a", " a"]}, "answers: the two are equal"),
        ({"messages": [{"role": "user", "content": "q"}], "answers": ["a", " "]}, "answers: expected the text"),
        ({"messages": [{"role": "user", "content": "q"}], "answers": ["a", "[INST]"]}, "answers: message 1"),
        ({"messages": [{"role": "assistant", "content": "q"}], "answers": ["a", "b"]}, "messages: message 0"),
        (
            {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": 3},
            "answers: expected a list of two",
        ),
        ([1], "expected an object with 'messages' and 'answers'"),
    ],
)
def test_a_bad_row_names_file_line_and_field(tmp_path, row, field):
    file = tmp_path / "items.jsonl"
    file.write_text("\n".join(json.dumps(r) for r in (pairs(1)[0], row)))
    with pytest.raises(ValueError, match=rf"items\.jsonl:2: .*{re.escape(field)}") as error:
        read_items(file)
    assert "\n" not in str(error.value)


def test_items_come_from_answers_and_from_comparisons(new, tmp_path):
    desk = new(3)
    for _ in range(3):
        say(desk, "ann", 1)
    rows, _ = export(desk, with_unreviewed=True)
    write_preferences(tmp_path / "rows.jsonl", rows)
    items = read_items(tmp_path / "rows.jsonl")
    assert [item["answers"] for item in items] == [[row["chosen"], row["rejected"]] for row in rows]
    again = Desk(tmp_path / "again.sqlite", Study("again"))
    assert again.add(items) == 3
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="no items"):
        read_items(tmp_path / "empty.jsonl")
    check_item(pairs(1)[0])


def test_another_file_or_another_study_is_refused(new, tmp_path):
    desk = new(1)
    assert Desk(desk.path).study == desk.study and Desk(desk.path, desk.study).items() == desk.items()
    with pytest.raises(ValueError, match="cannot go on as"):
        Desk(desk.path, Study("s", safety=True))
    with pytest.raises(ValueError, match="a new one needs a study"):
        Desk(tmp_path / "none.sqlite")
    (tmp_path / "text").write_text("hello " * 999)
    with pytest.raises(ValueError, match="expected the SQLite file of a study"):
        Desk(tmp_path / "text", Study("s"))
    with pytest.raises(ValueError, match="expected the SQLite file of a study"):
        Desk(tmp_path / "no folder" / "x", Study("s"))
    import sqlite3

    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(ValueError, match="not a study"):
        Desk(tmp_path / "other.sqlite", Study("s"))


def test_a_study_with_other_questions_uses_the_same_file(tmp_path):
    def check(choice, study):
        if choice.keys() != {"points"} or choice["points"] not in range(1, 8):
            raise ValueError("points: expected 1 to 7")

    desk = Desk(tmp_path / "seven.sqlite", Study("seven"), check)
    desk.add(pairs(2))
    with pytest.raises(ValueError, match="1 to 7"):
        desk.submit(desk.next_task("ann"), choice(0))
    number = desk.submit(desk.next_task("ann"), {"points": 7})
    review(desk, number, "bob", "edit", choice={"points": 6})
    assert desk.annotations()[0].final == {"points": 6}


# ---------- guidelines and tests of annotators


def test_the_guidelines_begin_with_harm_and_name_what_the_paper_names(new):
    titles, text = list(GUIDELINES), json.dumps(GUIDELINES).lower()
    assert "harmless" in titles[0] and "helpful" in titles[1]
    for word in ("crime", "dangerous", "abuse", "sexually explicit", "informative", "truthful", "relevant", "clear"):
        assert word in text
    shown = [fold for fold in Annotating(new(1), "ann").view()["folds"] if fold[1] == "guidelines"]
    assert [title for title, _ in shown[0][2]] == titles


def test_four_tests_with_their_sizes():
    assert list(TESTS) == [1, 2, 3, 4]
    assert TESTS[1].minutes == 50 and [test.questions for test in TESTS.values()] == [None, 42, 31, 18]


@pytest.mark.parametrize(
    ("test", "scores", "expected"),
    [
        (1, {"part I": 90, "parts II and III": 4}, True),
        (1, {"part I": 89.99, "parts II and III": 5}, False),
        (1, {"part I": 100, "parts II and III": 3.99}, False),
        (1, {"part I": 50}, False),  # does not go on to the other parts
        (2, {"agreement": 80, "written answers": 4}, True),
        (2, {"agreement": 79.9, "written answers": 5}, False),
        (2, {"agreement": 100, "written answers": 3.9}, False),
        (3, {"agreed": 26}, False),
        (3, {"agreed": 27}, True),
        (4, {"answers": 6, "mean": 4.01}, True),
        (4, {"answers": 6, "mean": 4}, False),
        (4, {"answers": 5, "mean": 5}, False),
    ],
)
def test_pass_marks_at_their_boundaries(test, scores, expected):
    assert passed(test, scores) is expected


@pytest.mark.parametrize(
    ("test", "scores", "message"),
    [
        (5, {}, "expected one of 1, 2, 3, 4"),
        (1, {"part I": 95}, "'parts II and III' is missing"),
        (3, {"agreement": 27}, "unknown score 'agreement'"),
        (3, {"agreed": 32}, "at most 31"),
        (2, {"agreement": -1}, "0 or more"),
        (3, {"agreed": float("nan")}, "0 or more"),
    ],
)
def test_scores_that_make_no_sense_are_refused(test, scores, message):
    with pytest.raises(ValueError, match=message):
        passed(test, scores)


# ---------- the screen


def test_safety_is_asked_before_the_scale(new):
    desk = new(2, safety=True)
    session = Annotating(desk, "ann")
    rows = session.view()["rows"]
    assert rows[0]["label"] == "Which are safe?" and all(b["off"] for row in rows[1:] for b in row["buttons"])
    session.press("3")
    assert session.note == "first, which of the two are safe?" and not desk.annotations()
    session.press("a")
    session.press("f")
    rows = session.view()["rows"]
    assert [b["key"] for b in rows[0]["buttons"] if b["on"]] == ["f"]
    assert not any(b["off"] for row in rows for b in row["buttons"]) and session.note == ""
    session.press("3")
    assert desk.annotations()[0].choice["safe"] == [False, False]
    assert session.safe is None and session.item == 2, "the next pair is asked anew"
    plain = Annotating(new(1), "ann")
    plain.press("a")
    assert len(plain.view()["rows"]) == 2 and not any(b["off"] for row in plain.view()["rows"] for b in row["buttons"])


def test_a_key_for_the_pair_before_rates_nothing(new):
    desk = new(3)
    session = Annotating(desk, "ann")
    first = session.item
    session.press("1", first)
    session.press("1", first)
    assert len(desk.annotations()) == 1 and "came late" in session.view()["remarks"][0]
    session.press("1", session.item)
    assert len(desk.annotations()) == 2
    for key in ("9", "0", "x", "", "12"):
        session.press(key)
    assert len(desk.annotations()) == 2


def test_progress_undo_and_the_end(new):
    desk = new(2)
    session = Annotating(desk, "ann")
    session.press("u")
    assert "nothing to take back" in session.note
    session.press("1")
    assert (session.view()["done"], session.view()["left"]) == (1, 1)
    session.press("8")
    view = session.view()
    assert (view["done"], view["left"], view["item"], view["answers"]) == (2, 0, None, [])
    assert "Nothing to do" in view["remarks"][0]
    session.press("1")
    session.press("u")
    assert session.item == 2 and session.view()["done"] == 1
    desk.add(pairs(3))
    session.press("8")
    assert session.item == 3


def test_what_could_not_be_stored_is_said(new, monkeypatch):
    desk = new(1)
    session = Annotating(desk, "ann")
    monkeypatch.setattr(Desk, "submit", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    session.press("1")
    assert session.view()["remarks"] == ["not stored: [Errno 28] No space left on device"] and session.item == 1


def test_text_is_never_put_in_as_html():
    assert "textContent" in SCRIPT
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert way not in SCRIPT


def test_without_the_package_one_line_says_what_to_install(new, monkeypatch):
    monkeypatch.setitem(sys.modules, "anywidget", None)
    screen_module.screen_class.cache_clear()
    with pytest.raises(ImportError, match="pip install anywidget") as error:
        screen_class()
    assert "\n" not in str(error.value)


def test_the_widget_does_what_its_keys_say(new):
    pytest.importorskip("anywidget", reason="needs anywidget (extra 'notebook')")
    from llama2lib.annotate import review_widget, widget

    desk = new(2)
    screen = widget(desk, "ann")
    before = screen.view
    screen._handle_custom_msg({"key": "2", "item": 1, "text": ""}, [])
    assert screen.view["done"] == 1 and screen.view["turn"] == before["turn"] + 1
    screen._handle_custom_msg({"key": "?", "item": 2, "text": ""}, [])
    assert screen.view["turn"] == before["turn"] + 2, "every key is answered, or the browser would wait for ever"
    screen.press("u")
    assert not desk.annotations()
    screen.press("2")
    reviewer = review_widget(desk, "bob")
    reviewer._handle_custom_msg({"key": "n", "item": reviewer.view["item"], "text": "look again"}, [])
    assert desk.annotations()[0].feedback == "look again"
    assert json.dumps(screen.view) and json.dumps(reviewer.view)


# ---------- a real browser


NOTEBOOK = """
from llama2lib.annotate import review_widget, widget
from llama2lib.desk import Desk
desk = Desk("study.sqlite")
widget(desk, "ann")
"""
ATTACK = "<img src=x onerror=\"document.title='owned'\"> <b>bold</b>"


@pytest.fixture
def browser(tmp_path):
    "A headless Chromium, and the address of a Jupyter server on tmp_path."
    pytest.importorskip("anywidget", reason="needs anywidget (extra 'notebook')")
    pytest.importorskip("jupyterlab", reason="needs jupyterlab (extra 'notebook')")
    selenium = pytest.importorskip("selenium.webdriver", reason="needs selenium (extra 'browser')")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment |= {name: str(tmp_path / name) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")}
    settings = tmp_path / "JUPYTER_CONFIG_DIR" / "labconfig" / "page_config.json"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port=0", "--IdentityProvider.token=t"]
    log = tmp_path / "jupyter.log"
    with log.open("w") as out:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
    page = None
    try:
        end = time.monotonic() + 60
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)/lab", log.read_text())):
            assert time.monotonic() < end and server.poll() is None, log.read_text()
            time.sleep(0.2)
        options = selenium.ChromeOptions()
        options.binary_location = chromium
        quiet = "background-networking component-update sync quic gpu extensions".split()
        for flag in [
            "headless=new",
            "no-sandbox",
            "no-first-run",
            "window-size=1100,1000",
            *(f"disable-{q}" for q in quiet),
        ]:
            options.add_argument(f"--{flag}")
        options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
        page = selenium.Chrome(options, selenium.ChromeService(driver))
        yield page, f"http://127.0.0.1:{found[1]}/lab/tree/study.ipynb?token=t"
    finally:
        if page:
            page.quit()
        server.terminate()
        server.wait(30)


def test_keys_and_clicks_in_a_real_browser(browser, tmp_path):
    "LLAMA2_SCREENSHOT=name.png keeps what it looked like."
    import nbformat
    from selenium.webdriver.common.action_chains import ActionChains

    page, address = browser
    desk = Desk(tmp_path / "study.sqlite", Study("pilot", safety=True))
    items = pairs(5)
    items[0]["answers"] = [f"{ATTACK} yes", f"{ATTACK} no"]
    desk.add(items)
    cells = [nbformat.v4.new_code_cell(text) for text in (NOTEBOOK, "review_widget(desk, 'bob')")]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "study.ipynb")

    def until(what, script, *arguments):
        end = time.monotonic() + 60
        while not (found := page.execute_script(f"return {script}", *arguments)):
            if time.monotonic() > end:
                page.save_screenshot(str(tmp_path / "failed.png"))
                raise AssertionError(f"{what}; see {tmp_path / 'failed.png'}")
            time.sleep(0.1)
        return found

    def keys(text: str):
        ActionChains(page).send_keys(text).perform()

    def shows(done: int):
        until(f"{done} done", f"document.querySelector('.annotate progress')?.value === {done}")

    page.get(address)
    until("a notebook", "window.jupyterapp?.shell.currentWidget?.content?.widgets?.length === 2")
    until("a kernel", "window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'")
    page.execute_script("window.jupyterapp.commands.execute('notebook:run-cell')")
    screen = until("the screen", "document.querySelector('.annotate')")
    assert ATTACK in screen.text and "owned" not in page.title
    assert not page.execute_script("return document.querySelectorAll('.annotate img, .annotate .answer div b').length")
    page.find_element("css selector", ".annotate .head b").click()
    keys("1")  # the scale is closed
    keys("a")
    until("the label is marked", "document.querySelector('.annotate button.on')?.dataset.key === 'a'")
    page.save_screenshot(os.environ.get("LLAMA2_SCREENSHOT") or str(tmp_path / "screen.png"))
    shows(0)
    keys("1")
    shows(1)
    [first] = desk.annotations()
    assert (first.item, first.choice["better"], first.choice["safe"]) == (1, first.left, [True, True])
    keys("ddxbm")  # to Jupyter: delete the cell, cut it, a new one below, Markdown
    keys("u")
    shows(0)
    assert not desk.annotations()
    count = "window.jupyterapp.shell.currentWidget.content.widgets.map(cell => cell.model.type).join()"
    assert page.execute_script(f"return {count}") == "code,code"
    repeat = "new KeyboardEvent('keydown', {key: arguments[0], repeat: true, bubbles: true})"
    for key in ("a", "1"):
        page.execute_script(f"document.querySelector('.annotate').dispatchEvent({repeat})", key)
    for key in ("s", "4"):  # by mouse
        until(f"{key} can be clicked", f"!document.querySelector('.annotate button[data-key=\"{key}\"]').disabled")
        page.find_element("css selector", f'.annotate button[data-key="{key}"]').click()
    shows(1)
    [again] = desk.annotations()
    assert (again.choice["better"], again.choice["rating"]) == (again.left, "negligibly better")
    keys("f")  # the focus came back after the click
    until("f is marked", "document.querySelector('.annotate button.on')?.dataset.key === 'f'")
    keys("88")  # the second one is meant for a pair that nobody has read
    until("a remark", "document.querySelector('.annotate .remark')?.textContent.includes('came late')")
    shows(2)
    keys("a8")  # as fast as that, and both for the same pair
    shows(3)
    assert [(a.item, a.choice["safe"]) for a in desk.annotations()][1:] == [(2, [False] * 2), (3, [True] * 2)]

    page.execute_script("window.jupyterapp.commands.execute('notebook:move-cursor-down')")
    page.execute_script("window.jupyterapp.commands.execute('notebook:run-cell')")
    box = until("the reviewer's screen", "document.querySelector('.annotate textarea')")
    box.send_keys("1 or 2? look again")
    page.find_elements("css selector", '.annotate button[data-key="n"]')[-1].click()
    until("the next one", "[...document.querySelectorAll('.annotate progress')].at(-1).value === 1")
    if os.environ.get("LLAMA2_SCREENSHOT"):
        page.save_screenshot(os.environ["LLAMA2_SCREENSHOT"].replace(".png", "_review.png"))
    assert [(a.decision, a.feedback) for a in desk.annotations()] == [
        ("reject", "1 or 2? look again"),
        *[(None, None)] * 2,
    ]
