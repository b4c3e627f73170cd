"""Context distillation: preprompts, the gate, answers without the preprompt in the data, killed runs, two processes."""

import json
from pathlib import Path

import pytest
import torch
from conftest import NUMBERS, torchrun

from llama2lib import distillation
from llama2lib.chat import Reply
from llama2lib.dialog import read_dialogs
from llama2lib.distillation import (
    PREPROMPTS,
    DistillationConfig,
    Distilled,
    distilled,
    preceded,
    preprompts,
    read_preprompts,
    run,
)

pytestmark = pytest.mark.usefixtures("one_thread")

ASK = [{"role": "user", "content": "one two"}]


def test_a_preprompt_stands_in_the_system_message():
    assert preceded(ASK, "Be kind.") == [{"role": "system", "content": "Be kind."}, *ASK]
    dialog = [{"role": "system", "content": "Be brief."}, *ASK]
    assert preceded(dialog, "Be kind.")[0]["content"] == "Be kind. Be brief." and dialog[0]["content"] == "Be brief."


def test_a_category_has_its_template():
    found = preprompts(["hateful", None, "advice", None] * 20, seed=3)
    assert found[0] == PREPROMPTS.templates["hateful"] and found[2] == PREPROMPTS.templates["advice"]
    assert set(found[1::2]) <= set(PREPROMPTS.generic) and len(set(found[1::2])) > 3
    assert preprompts(["hateful", None], seed=3) == found[:2]
    with pytest.raises(ValueError, match="prompt 1: category 'rude'; expected one of illicit"):
        preprompts([None, "rude"])
    assert all(word in " ".join(PREPROMPTS.generic) for word in ("responsible", "respectful", "wise"))  # section 4.2.4


def test_preprompts_come_from_a_file(tmp_path):
    file = tmp_path / "preprompts.json"
    file.write_text(json.dumps({"generic": ["a", "b"], "templates": {"rude": "c"}}), "utf-8")
    assert preprompts(["rude", None], read_preprompts(file))[0] == "c"
    for text in (
        "[]",
        "x",
        '{"generic": ["a"]}',
        '{"generic": [], "templates": {}}',
        '{"generic": [1], "templates": {}}',
    ):
        file.write_text(text, "utf-8")
        with pytest.raises(ValueError, match=r"preprompts\.json: expected an object with 'generic'"):
            read_preprompts(file)


def test_answers_are_scored_without_the_preprompt(monkeypatch):
    "The scorer sees the same conversation for both answers; one that does not end has no score."
    asked, scored = [], []

    def respond(model, tokenizer, dialogs, *settings):
        asked.append((dialogs, settings))
        return [Reply("four" if m[0]["role"] == "system" else "three", m[-1]["content"] != "six") for m in dialogs]

    def scorer(dialogs):
        scored.extend(dialogs)
        return torch.tensor([float(len(d[-1]["content"])) for d in dialogs])

    monkeypatch.setattr(distillation, "respond", respond)
    dialogs = [ASK, [{"role": "user", "content": "six"}]]
    rows = distilled(None, None, dialogs, ["p", "q"], scorer, 0.7, 0.9, 5, [3, 4])
    assert rows[0] == Distilled(ASK, "p", "three", 5.0, "four", 4.0) and not rows[0].safer
    assert rows[1] == Distilled(dialogs[1], "q", "three", None, "four", None) and not rows[1].safer
    assert [d[0][0]["role"] for d, _ in asked] == ["user", "system"]
    assert all(settings == (5, 0.7, 0.9, [3, 4]) for _, settings in asked)
    assert all(message["role"] != "system" for dialog in scored for message in dialog)


def test_the_gate_keeps_what_is_safer():
    for own, score, safer in (
        (1.0, 2.0, True),
        (2.0, 1.0, False),
        (1.0, 1.0, False),
        (None, 0.0, True),
        (1.0, None, False),
    ):
        assert Distilled(ASK, "", "one", own, "two", score).safer == safer
    assert not Distilled(ASK, "", "one", 1.0, "one", 1.000001).safer  # the same answer, in another batch


@pytest.fixture
def prompts(folders):
    "Some tagged, some of these with a category."
    lines = [
        {
            "messages": [{"role": "user", "content": word}],
            "is_safety": n % 2 == 0,
            "category": "advice" if n % 4 == 0 else None,
        }
        for n, word in enumerate(NUMBERS)
    ]  # fmt: skip
    path = folders / "asked.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    known = {"generic": ["eight"], "templates": {"advice": "nine ten"}}
    (folders / "preprompts.json").write_text(json.dumps(known), "utf-8")
    return path


def settings(folders: Path, prompts: Path, out: str, **more) -> DistillationConfig:
    given = {"max_new_tokens": 6, "chunk": 2, "prompts": prompts, "preprompts": folders / "preprompts.json"}
    given |= {"out": folders / out} | more
    return DistillationConfig(str(folders / "chat"), str(folders / "safe"), **given)


def test_a_killed_run_goes_on_and_two_processes_are_one(folders, prompts, monkeypatch):
    "Tagged prompts alone; the file to learn from has no preprompt."
    whole, calls = distillation.distilled, []

    def dying(*given):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("told to die")
        return whole(*given)

    monkeypatch.setattr(distillation, "distilled", dying)
    config = settings(folders, prompts, "one", gate=False)
    with pytest.raises(RuntimeError, match="told to die"):
        run(config)
    path = run(config)
    assert len(calls) == 2 + 3 - 1
    dialogs = read_dialogs(path)
    assert 0 < len(dialogs) <= 5 and all([m["role"] for m in d] == ["user", "assistant"] for d in dialogs)
    assert {d[0]["content"] for d in dialogs} <= set(NUMBERS[::2])
    pairs = [json.loads(line) for line in (folders / "one" / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert [row["preprompt"] for row in pairs] == ["nine ten", "eight", "nine ten", "eight", "nine ten"]
    safer = [
        row
        for row in pairs
        if row["score"] is not None and (row["own_score"] is None or row["score"] > row["own_score"])
    ]
    if safer:
        kept = read_dialogs(run(settings(folders, prompts, "gated")))
        assert [d[-1]["content"] for d in kept] == [row["answer"] for row in safer]
    else:
        with pytest.raises(ValueError, match="no answer under a preprompt is safer"):
            run(settings(folders, prompts, "gated"))


def test_templates_can_be_left_out(folders, prompts):
    run(settings(folders, prompts, "generic", templates=False, gate=False))
    pairs = [json.loads(line) for line in (folders / "generic" / "pairs.jsonl").read_text("utf-8").splitlines()]
    assert {row["preprompt"] for row in pairs} == {"eight"}


def test_two_processes_give_the_same_file(folders, prompts):
    config = settings(folders, prompts, "one")
    arguments = ["paper", "--model", config.model, "--safety", config.safety, "--prompts", prompts,
                 "--max-new-tokens", 6, "--preprompts", config.preprompts, "--chunk", 2, "--no-gate"]  # fmt: skip
    for processes in (1, 2):
        torchrun(
            f"--nproc-per-node={processes}",
            "-m",
            "llama2lib.distillation",
            *arguments,
            "--out",
            folders / f"p{processes}",
        )
    one, two = ((folders / out / "distilled.jsonl").read_text("utf-8") for out in ("p1", "p2"))
    assert one == two and one


def test_bad_prompts_are_refused(folders, prompts):
    lines = prompts.read_text("utf-8").splitlines()
    prompts.write_text("\n".join(line.replace("true", "false") for line in lines), "utf-8")
    with pytest.raises(ValueError, match="no prompt with is_safety true"):
        run(settings(folders, prompts, "none"))
    prompts.write_text("\n".join([*lines[:3], lines[3].replace("null", '"rude"')]), "utf-8")
    with pytest.raises(ValueError, match=r"asked\.jsonl:4: category 'rude'; expected one of advice, or null"):
        run(settings(folders, prompts, "bad"))
    prompts.write_text("\n".join([*lines[:3], lines[3].replace("null", '["advice"]')]), "utf-8")
    with pytest.raises(ValueError, match=r"asked\.jsonl:4: category \['advice'\]"):
        run(settings(folders, prompts, "bad"))
    for wrong in ({"max_new_tokens": 0}, {"chunk": 0}, {"temperature": 0.0}, {"top_p": 0.0}):
        with pytest.raises(ValueError, match="expected numbers of at least 1"):
            settings(folders, prompts, "bad", **wrong)
