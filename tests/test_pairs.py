"""Pairs of answers to be compared: what is shown, and a command that can stop."""

from dataclasses import replace

import conftest
import pytest
from conftest import NUMBER_PROMPTS, random_model

from llama2lib import pairs as module
from llama2lib.chat import Reply
from llama2lib.checkpoint import save_checkpoint
from llama2lib.desk import read_items
from llama2lib.launch import torchrun_arguments
from llama2lib.pairs import PAIRS, run
from llama2lib.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def recipe(folders):
    return replace(
        PAIRS["mini"], models=(str(folders / "chat"),), prompts=folders / "prompts.jsonl", out=folders / "out",
        max_new_tokens=12, chunk=2,
    )  # fmt: skip


def test_items_have_two_answers_that_ended_and_differ(recipe, monkeypatch, capsys):
    b = Reply("b", True)
    others = Reply("a", True), b, Reply("", True), Reply(" b", True), Reply("a [INST]", True)
    replies = [[other, b] for other in others]
    replies[1] = [Reply("a", False), b]
    monkeypatch.setattr(module, "two_answers", lambda _, dialogs, __: (replies * 2)[: len(dialogs)])
    items = read_items(run(replace(recipe, chunk=5)))
    assert [item["messages"] for item in items] == [NUMBER_PROMPTS[0].messages, NUMBER_PROMPTS[5].messages]
    assert all(item["answers"] == ["a", "b"] for item in items)
    assert [item["is_safety"] for item in items] == [True, False]
    assert "2 pairs of answers to 9 prompts" in capsys.readouterr().out


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(recipe, monkeypatch):
    path = run(replace(recipe, out=recipe.out.with_name("whole")))
    assert len(read_items(path)) > 3
    calls, ask = [], module.two_answers

    def dying(*args):
        calls.append(len(args[1]))
        if len(calls) == 3:
            raise RuntimeError("told to die")
        return ask(*args)

    monkeypatch.setattr(module, "two_answers", dying)
    with pytest.raises(RuntimeError, match="told to die"):
        run(recipe)
    assert run(recipe).read_bytes() == path.read_bytes() and calls == [2, 2, 2, 2, 2, 1]
    with pytest.raises(ValueError, match="seed 0, now 1"):
        run(replace(recipe, seed=1))


def test_answers_are_of_the_variants_that_are_given(recipe, folders, monkeypatch):
    found, other = [], random_model("MHA", vocab_size=Tokenizer(folders / "chat").vocab_size)
    save_checkpoint(other, folders / "other", Tokenizer(folders / "chat"))
    replies = [[Reply("a", True), Reply("b", True)]] * 9
    monkeypatch.setattr(module, "two_answers", lambda ways, dialogs, _: found.append(ways) or replies[: len(dialogs)])
    monkeypatch.setattr(module, "sampler", lambda model, _, temperature, limit: (len(model.layers), temperature, limit))
    run(replace(recipe, models=(str(folders / "chat"), str(folders / "other")), temperatures=(0.5, 2.0)))
    assert found[0] == [[(3, 0.5, 12), (3, 2.0, 12)], [(2, 0.5, 12), (2, 2.0, 12)]]


def test_two_processes_write_what_one_writes(recipe):
    options = [x for n in ("models", "prompts", "chunk", "max_new_tokens") for x in (
        f"--{n.replace('_', '-')}", *(getattr(recipe, n) if n == "models" else [getattr(recipe, n)])
    )]  # fmt: skip
    out = recipe.out.with_name("two")
    told = conftest.torchrun(*torchrun_arguments("llama2lib.pairs", "mini", *options, "--out", out, nproc=2))
    assert told.count("pairs of answers") == 1
    assert (out / "items.jsonl").read_bytes() == run(recipe).read_bytes()


def test_a_recipe_that_cannot_work_is_refused(recipe):
    for change, told in (
        ({"models": ()}, r"models \(\)"), ({"temperatures": ()}, r"temperatures \(\)"),
        ({"temperatures": (1.0, -0.5)}, "no temperature below 0"), ({"chunk": 0}, "chunk 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=told):
            replace(recipe, **change)
