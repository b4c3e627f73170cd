"""Ghost Attention on the mini world: what is taught before it, and the data of each control."""

import numpy as np
import pytest

from llama2lib import mini, mini_gatt
from llama2lib.dialog import encode_dialog
from llama2lib.gatt import build_gatt_example, joined
from llama2lib.judge import obeys, read_task
from llama2lib.mini_gatt import (
    ARMS,
    GATT_RULES,
    NEUTRAL,
    RULES,
    arm_examples,
    gatt_contexts,
    instructed,
    last_span,
    lessons,
    talk,
)  # fmt: skip
from llama2lib.synthetic import documents
from llama2lib.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def small(monkeypatch, words):
    sizes = {"short": 60, "long": 6, "neutral": 6, "best": 3, "texts": 5, "said": 2, "contexts": 30, "evaluated": 4}
    monkeypatch.setattr(mini_gatt, "SIZES", sizes)
    monkeypatch.setattr(mini, "tokenizer", lambda: words)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    texts = documents(np.random.default_rng(0), 3000)
    return train_tokenizer(texts, 1024, tmp_path_factory.mktemp("words") / "tokenizer.model")


def test_the_judge_finds_the_answers_of_lessons_obedient():
    "All of them, wherever the instruction stands; and no long lesson has it in the system message alone."
    count = {"system": 0, "joined": 0, "neutral": 0}
    for dialog in lessons(0):
        turns = sum(message["role"] == "user" for message in dialog)
        if dialog[0]["role"] == "system":
            assert turns == 1 or dialog[0]["content"] in NEUTRAL
        for place, message in enumerate(dialog):
            if message["role"] == "assistant":
                assert all(obeys(dialog[:place], message["content"]).values()), dialog[: place + 1]
        way = "joined" if dialog[0]["role"] == "user" else "neutral" if dialog[0]["content"] in NEUTRAL else "system"
        count[way] += 1
        if way != "neutral":
            assert obeys(dialog[:-1], dialog[-1]["content"])  # there is something to obey
    assert count == {"system": 30, "joined": 36, "neutral": 6}


def test_instructions_are_drawn_by_weight_and_never_of_one_kind_twice():
    random = np.random.default_rng(0)
    drawn = [instructed(random, "train", {"ending": 1, "hobby": 3}, (0.5, 0.5))[0] for _ in range(400)]
    assert {len(rules) for rules in drawn} == {1, 2}
    assert all(len({rule.kind for rule in rules}) == len(rules) for rules in drawn)
    alone = [rules[0].kind for rules in drawn if len(rules) == 1]
    assert 0.65 < alone.count("hobby") / len(alone) < 0.85
    rules, both = instructed(random, "test", RULES, (0, 0, 0, 1))
    assert len(rules) == 4 and both.long != both.short


def test_a_conversation_has_its_turns_and_is_readable_to_the_end():
    dialog = talk(np.random.default_rng(1), 20, "test")
    assert [message["role"] for message in dialog] == ["user", "assistant"] * 20
    assert all(obeys(dialog[: 2 * n + 1], dialog[2 * n + 1]["content"]) == {} for n in range(20))


def test_a_mask_keeps_its_last_answer():
    assert last_span([0, 1, 1, 0, 0, 1, 1]) == [0, 0, 0, 0, 0, 1, 1]
    assert last_span([0, 1]) == [0, 1] and last_span([1, 1]) == [1, 1]


def test_each_arm_learns_what_it_says(monkeypatch, words):
    dialogs, cuts = gatt_contexts(0, GATT_RULES)
    reply, earlier = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
    found = [[*(m if m["role"] == "user" else earlier for m in cut.messages), reply] for cut in cuts]
    monkeypatch.setattr(mini_gatt, "answers", lambda seed, kinds: [*found[:4], None, *found[5:]])
    made = {arm: arm_examples(0, arm) for arm in ARMS}
    assert {len(examples) for examples in made.values()} == {len(cuts) - 1}
    number = next(number for number, cut in enumerate(cuts[:4]) if len(cut.messages) > 3)
    cut, dialog, talked = cuts[number], dialogs[number], found[number]
    assert dialog[: len(cut.messages)] == cut.messages  # nothing was left out: there is room for 20 turns
    assert made["Ghost Attention"][number] == build_gatt_example(words, talked, cut.system)
    as_written = made["earlier answers as written"][number]
    assert as_written == build_gatt_example(words, [*cut.messages, reply], cut.system)
    assert as_written != made["Ghost Attention"][number]
    system = {"role": "system", "content": cut.system}
    assert made["all answers"][number] == encode_dialog(words, [system, *talked])
    tokens, mask = made["instruction on every turn"][number]
    assert tokens == encode_dialog(words, joined(talked, cut.instruction))[0]
    assert sum(mask) == sum(made["Ghost Attention"][number][1])
    plain, last = made["plain"][number], made["last answer"][number]
    neutral = {"role": "system", "content": NEUTRAL[number % len(NEUTRAL)]}
    written = encode_dialog(words, [neutral, *dialog[: len(talked)]])
    assert plain == written and last == (written[0], last_span(written[1]))
    for other in gatt_contexts(0, {"figure": 1, "hobby": 1})[1]:
        rules = read_task([{"role": "system", "content": other.system}, *other.messages]).rules
        assert {rule.kind for rule in rules} <= {"figure", "hobby"} and rules
