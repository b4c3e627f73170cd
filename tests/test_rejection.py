"""Rejection sampling: which answer is the best, the bag of iterations, and a command that can stop."""

import json
from dataclasses import replace

import conftest
import numpy as np
import pytest
from conftest import NUMBER_PROMPTS as PROMPTS

from llama2lib import rejection as module
from llama2lib.chat import Reply
from llama2lib.dialog import read_dialogs
from llama2lib.launch import torchrun_arguments
from llama2lib.rejection import REJECTION, Best, Candidates, bag, best, candidates, read_best, run, write_best
from llama2lib.rollout import Prompt, Reward

pytestmark = pytest.mark.usefixtures("one_thread")


def length(dialogs):
    return np.array([len(messages[-1]["content"]) for messages in dialogs], np.float32)


def test_the_best_usable_answer_is_chosen():
    rewards = np.array([[1.0, 5.0, 3.0], [2.0, 2.0, 1.0], [0.0, 1.0, 2.0], [-9.0, -8.0, -7.0]])
    usable = np.array([[True, False, True], [True, True, True], [False, False, False], [True, False, False]])
    answers = [[f"{row}{place}" for place in range(3)] for row in range(4)]
    found = best(PROMPTS[:4], Candidates(answers, rewards, usable))
    assert found == [Best(PROMPTS[0], "02", 3.0), Best(PROMPTS[1], "10", 2.0), Best(PROMPTS[3], "30", -9.0)]
    assert found[0].dialog == [*PROMPTS[0].messages, {"role": "assistant", "content": "02"}]


def test_the_bag_scores_anew_and_keeps_the_best_answer_of_a_prompt():
    old = [Best(PROMPTS[0], "long answer", -100.0), Best(PROMPTS[1], "a", 100.0), Best(PROMPTS[3], "b", 0.0)]
    new = [Best(PROMPTS[0], "short", 50.0), Best(PROMPTS[1], "ab", -50.0), Best(PROMPTS[2], "c", 0.0)]
    found = sorted(bag([old, new], Reward(length)), key=lambda row: PROMPTS.index(row.prompt))
    expected = ("long answer", 11.0), ("ab", 2.0), ("c", 1.0), ("b", 1.0)
    assert found == [Best(PROMPTS[n], *row) for n, row in enumerate(expected)]
    assert bag([], Reward(length)) == []
    seen = []
    assert len(bag([old, [*old, *new]], Reward(lambda dialogs: seen.extend(dialogs) or length(dialogs)))) == 4
    assert len(seen) == 6  # an answer that stands in two bags is scored once


def test_candidates_are_in_the_order_of_the_prompts(chat, tokenizer):
    "A row of the result belongs to its prompt, and depends on its own seed alone."
    tagged = Reward(length, lambda dialogs: np.full(len(dialogs), 7.0))
    settings = dict(samples=4, max_new_tokens=12, temperature=1.0)
    found = candidates(chat, tokenizer, PROMPTS, tagged, seed=list(range(9)), **settings)
    assert found.rewards.shape == found.usable.shape == (9, 4)
    for number, prompt in enumerate(PROMPTS):
        expected = [7.0] * 4 if prompt.is_safety else [len(text) for text in found.answers[number]]
        usable = found.usable[number]
        assert usable.any() and found.rewards[number][usable].tolist() == np.array(expected)[usable].tolist()
        assert np.isnan(found.rewards[number][~usable]).all()
    alone = candidates(chat, tokenizer, PROMPTS[5:6], tagged, seed=[5], **settings)
    assert alone.answers[0] == found.answers[5]
    assert len(set(found.answers[5])) > 1


def test_an_answer_that_does_not_end_is_not_usable(tokenizer, monkeypatch):
    replies = [("done", True), ("cut", False), ("", True), ("tagged [INST]", True)]
    monkeypatch.setattr(module, "respond", lambda *_: [Reply(*reply) for reply in replies])
    found = candidates(None, tokenizer, PROMPTS[:1], Reward(length), 4)
    assert found.usable.tolist() == [[True, False, False, False]] and found.answers[0][3] == "tagged"


@pytest.fixture
def recipe(folders):
    return replace(
        REJECTION["mini"], model=str(folders / "chat"), helpfulness=str(folders / "helpful"),
        safety=str(folders / "safe"), prompts=folders / "prompts.jsonl", chunk=2, samples=3, max_new_tokens=12,
        out=folders / "out",
    )  # fmt: skip


def test_the_command_writes_conversations_to_fine_tune_on(recipe, monkeypatch):
    "A killed run goes on behind its last chunk, and ends as one that was not killed."
    path = run(replace(recipe, out=recipe.out.with_name("whole")))
    rows = read_best(path)
    assert rows and [row.dialog for row in rows] == read_dialogs(path)
    calls, ask = [], candidates

    def dying(*args):
        calls.append(args[2])
        if len(calls) == 3:
            raise RuntimeError("told to die")
        return ask(*args)

    monkeypatch.setattr(module, "candidates", dying)
    with pytest.raises(RuntimeError, match="told to die"):
        run(recipe)
    assert run(recipe).read_bytes() == path.read_bytes()
    assert [len(prompts) for prompts in calls] == [2, 2, 2, 2, 2, 1]
    with pytest.raises(ValueError, match="samples 3, now 4"):
        run(replace(recipe, samples=4))


def test_two_processes_write_what_one_writes(recipe):
    path = run(recipe)
    names = "model helpfulness safety prompts chunk samples max_new_tokens"
    options = [x for n in names.split() for x in (f"--{n.replace('_', '-')}", getattr(recipe, n))]
    out = recipe.out.with_name("two")
    told = conftest.torchrun(*torchrun_arguments("llama2lib.rejection", "mini", *options, "--out", out, nproc=2))
    assert told.count("best answers") == 1
    one, two = read_best(path), read_best(out / "best.jsonl")
    assert [row.answer for row in one] == [row.answer for row in two]
    assert [row.reward for row in one] == pytest.approx([row.reward for row in two], abs=1e-5)


def test_earlier_iterations_join(recipe, tmp_path):
    write_best(tmp_path / "v1.jsonl", [Best(Prompt([{"role": "user", "content": "ten nine"}], False), "eight", 0.0)])
    rows = read_best(run(replace(recipe, earlier=(tmp_path / "v1.jsonl",))))
    assert rows[0].answer == "eight" and rows[0].reward != 0.0
    write_best(tmp_path / "v1.jsonl", [])
    with pytest.raises(ValueError, match="earlier"):
        run(replace(recipe, earlier=(tmp_path / "v1.jsonl",)))


ASKED = [{"role": "user", "content": "ten nine"}]
LINE = {"messages": [*ASKED, {"role": "assistant", "content": "eight"}], "is_safety": False, "reward": 0.5}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"messages": []}, "no user message"),
        ({"messages": ASKED}, "messages: the user's comes last; expected the assistant's"),
        ({"messages": LINE["messages"][1:]}, "message 0: assistant first; expected system or user"),
        ({"messages": [*LINE["messages"], LINE["messages"][1]]}, "message 2: assistant behind the assistant"),
        ({"messages": [*ASKED, {"role": "assistant"}]}, "message 1: expected 'content' to be a string"),
        ({"messages": "hi"}, "expected an object with a list in the field 'messages'"),
        ({"is_safety": None}, "is_safety: found None; expected true or false"),
        ({"is_safety": 1}, "is_safety: found 1; expected true or false"),
        ({"reward": "x"}, "reward: found 'x'; expected a finite number"),
        ({"reward": True}, "reward: found True; expected a finite number"),
        ({"reward": float("nan")}, "reward: found nan; expected a finite number"),
        ({"reward": None}, "reward: found None; expected a finite number"),
    ],
)
def test_a_row_that_is_no_best_answer_is_named(tmp_path, change, told):
    file = tmp_path / "best.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (LINE, LINE | change)))
    with pytest.raises(ValueError, match=rf"best\.jsonl:2: not a line of best\.jsonl \({told}"):
        read_best(file)
    file.write_text(json.dumps(LINE) + "\n")
    assert read_best(file) == [Best(Prompt(ASKED, False), "eight", 0.5)]


def test_a_recipe_that_cannot_work_is_refused(recipe):
    for change, told in (
        ({"samples": 0}, "samples 0: expected at least 1"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"gate": 1.0}, "gate 1.0"),
        ({"temperatures": (0.5, 0.0)}, "temperatures"),
        ({"tune": 0}, "tune 0"),
    ):
        with pytest.raises(ValueError, match=told):
            replace(recipe, **change)


def test_the_temperature_whose_best_answers_score_highest_is_used(recipe, monkeypatch):
    "It is looked for once, on the first prompts; a run that goes on does not look again."
    asked = []

    def ask(model, tokenizer, prompts, reward, samples, temperature, *rest):
        asked.append((len(prompts), temperature))
        rewards = np.full((len(prompts), samples), -abs(temperature - 0.8), np.float32)
        return Candidates([["yes"] * samples] * len(prompts), rewards, np.full(rewards.shape, True))

    monkeypatch.setattr(module, "candidates", ask)
    tuned = replace(recipe, temperatures=(0.5, 0.9, 1.2), tune=4, chunk=5)
    run(tuned)
    assert asked == [(4, 0.5), (4, 0.9), (4, 1.2), (5, 0.9), (4, 0.9)]
    (recipe.out / "chunks" / "000001.jsonl").unlink()
    run(tuned)
    assert asked[5:] == [(4, 0.9)]


def test_a_model_without_an_answer_is_an_error(recipe):
    with pytest.raises(ValueError, match="no answer ended within 1 tokens"):
        run(replace(recipe, max_new_tokens=1))
    with pytest.raises(ValueError, match="no answer ended within 1 tokens"):
        run(replace(recipe, max_new_tokens=1, temperatures=(1.0,), out=recipe.out.with_name("other")))
