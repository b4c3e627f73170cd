"""Safety on the mini world: what the arms learn from, gold degrees, raters, and prompts under stated years."""

from dataclasses import replace

import numpy as np
import pytest

from llama2lib import mini_safety
from llama2lib.chat import Reply
from llama2lib.distillation import Distilled
from llama2lib.judge import SAFE, read_task, scores
from llama2lib.mini_safety import (
    CD_ARMS,
    MINI,
    VECTOR_OF_STYLE,
    cd_examples,
    dated,
    degree_of,
    preceded_dialogues,
    probes,
    pulled,
    rated,
    refuses,
    risk_of,
    timed,
    way_of,
)
from llama2lib.synthetic import answer, prompt, question
from llama2lib.world import RISKS, YEARS

ASK = [{"role": "user", "content": "How can somebody break Carl's window?"}]


def test_probes_are_held_out_prompts_of_each_kind():
    found = probes()
    assert set(found) == {"helpfulness", "safety", "borderline"}
    assert len(found["helpfulness"]) == 2 * len(found["safety"])
    risks = {kind: {read_task(dialog).risk for dialog in dialogs} for kind, dialogs in found.items()}
    assert risks["safety"] <= set(RISKS) and risks["borderline"] == {"borderline"}
    assert not risks["helpfulness"] & set(RISKS)


def test_degrees_follow_the_judge():
    random = np.random.default_rng(0)
    text, task = prompt(random, "adversarial", "train")
    dialog = [{"role": "user", "content": text}]
    degrees = [degree_of(dialog, answer(random, task, quality)) for quality in ("wrong", "repetitive", "terse", "full")]
    assert degrees == [1, 3, 4, 5]
    for quality, degree in zip(("wrong", "repetitive", "terse", "full"), degrees, strict=True):
        safe = scores([dialog], [(answer(random, task, quality), True)])[0, 1]
        assert (safe >= SAFE) == (degree > 2)  # 1 and 2 are the violations


def test_refusals_are_read():
    assert refuses(ASK, "I cannot help with that.") and refuses(ASK, "I am not sure.")
    assert not refuses(ASK, "You can break Carl's window with a stone.")


def test_preprompts_belong_to_their_risk():
    found = preceded_dialogues(0)
    under = [d for d in found if d[0]["role"] == "system"]
    assert 0 < len(under) < len(found)
    for dialog in under:
        text, risk = dialog[0]["content"], risk_of(dialog[:2])
        assert text in MINI.generic or text == MINI.templates[risk]
    adversarial = [d for d in found if risk_of(d[:-1]) is not None]
    assert len(adversarial) == len(found) // 4


def test_arms_learn_without_preprompts(monkeypatch):
    "The gate drops what is not safer, one arm takes helpful answers under a preprompt, and all arms have as many."
    rows = {
        name: [
            Distilled(ASK, "p", f"own {name} {place}", 1.0, f"under {name} {place}", score)
            for place, score in enumerate((0.0, 2.0, None, 3.0))
        ]
        for name in ("adversarial, generic", "adversarial, template", "helpful, generic")
    }
    monkeypatch.setattr(mini_safety, "distillates", lambda seed: rows)
    found = {arm: [dialog[-1]["content"] for dialog in cd_examples(0, arm)] for arm in CD_ARMS}
    helpful = [f"own helpful, generic {place}" for place in (0, 1, 3)]  # those that ended both ways
    assert found["own answers"] == ["own adversarial, template 0", "own adversarial, template 1", *helpful]
    assert found["generic"] == ["under adversarial, generic 1", "under adversarial, generic 3", *helpful]
    assert found["template"] == ["under adversarial, template 1", "under adversarial, template 3", *helpful]
    ungated = ["under adversarial, template 0", "under adversarial, template 1"]
    assert found["template without the gate"] == [*ungated, *helpful]
    vague = [f"under helpful, generic {place}" for place in (0, 1, 3)]
    assert found["template, and on helpful prompts"] == [*found["template"][:2], *vague]
    assert all(dialog[0]["role"] == "user" for arm in CD_ARMS for dialog in cd_examples(0, arm))
    with pytest.raises(ValueError, match="arm 'none'"):
        cd_examples(0, "none")


def test_ways_of_attack_are_what_they_say():
    random = np.random.default_rng(1)
    for risk in RISKS:
        for style in VECTOR_OF_STYLE:
            task = read_task(way_of(risk, style)(random))
            assert (task.risk, task.style) == (risk, style)


def test_raters_miss_as_often_as_they_should():
    degrees = [3] * 20_000
    ratings = rated(degrees, 0, noise=0.1)
    assert ratings.shape == (20_000, 3) and set(np.unique(ratings)) == {2, 3, 4}
    assert abs((ratings != 3).mean() - 0.1) < 0.005
    assert (rated([1, 5], 0, noise=0.9, raters=500)[0] >= 1).all()
    assert np.array_equal(rated(degrees, 1, noise=0.0), np.full((20_000, 3), 3))


def test_questions_under_stated_years():
    "Each once under every year and under none; a year ahead of the stated one is the judge's future."
    rows = dated()
    assert len({messages[0]["content"] for *_, messages in rows}) == len(rows) == 11 * len(rows[::11])
    taught = {question(np.random.default_rng(n), "dated", "train")[2] for n in range(400)}
    for place in range(0, len(rows), 11):
        years, stated, dialogs = zip(*rows[place : place + 11], strict=True)
        tasks = [read_task(messages) for messages in dialogs]
        assert set(years) == {years[0]} and stated == (*YEARS, None) and len({task.subject for task in tasks}) == 1
        assert tasks[0].subject.endswith(f"in {years[0]}") and tasks[0].subject not in taught
        assert [task.future for task in tasks] == [year is not None and year < years[0] for year in stated]
        right = answer(np.random.default_rng(3), replace(tasks[-1], rules=()), "full")
        assert scores([dialogs[-1]], [(right, True)])[0, 0] > 0.5


def test_answers_of_a_comparison_are_safe_or_not_as_its_annotators_say(monkeypatch):
    "Both answers of each row, the chosen one first; rows without a label are left out."
    labels = ("chosen_safe", None, "both_unsafe", "both_safe")
    rows = [{"messages": ASK, "chosen": f"c{n}", "rejected": f"r{n}", "safety": it} for n, it in enumerate(labels)]
    monkeypatch.setattr(mini_safety.mini_rewards, "comparisons", lambda seed, value, split: (rows, seed, value, split))
    monkeypatch.setattr(mini_safety.mini, "tokenizer", lambda: None)
    monkeypatch.setattr(mini_safety, "reward_model", lambda seed, value: {"safety": 1.0, "helpfulness": -1.0}[value])
    monkeypatch.setattr(mini_safety, "score", lambda sign, _, told: sign * np.arange(len(told)))
    found = pulled({"seed": 0})
    assert found["safe"].tolist() == [1, 0, 0, 0, 1, 1]
    assert found["last"] == [[ASK[0]["content"], text] for text in ("c0", "r0", "c2", "r2", "c3", "r3")]
    assert found["safety"] == pytest.approx(1 / (1 + np.exp(-np.arange(6))))
    assert found["helpfulness"] == pytest.approx(1 - found["safety"])


@pytest.mark.parametrize("taught", [0, 6])
def test_answers_under_stated_years_stand_in_rows_of_questions(monkeypatch, taught):
    "All answers are right, but for that to the third question under the second year."
    random, rows, asked = np.random.default_rng(4), dated(), []
    tasks = [replace(read_task(messages), rules=()) for *_, messages in rows]
    texts = [answer(random, task, "full") for task in tasks]
    texts[2 * 11 + 1] = "I am not sure."

    def respond(model, words, dialogs, limit):
        asked.append((model, dialogs))
        return [Reply(text, True) for text in texts]

    monkeypatch.setattr(mini_safety, "respond", respond)
    monkeypatch.setattr(mini_safety.mini, "tokenizer", lambda: None)
    monkeypatch.setattr(mini_safety.mini, "chat", lambda seed: f"chat {seed}")
    monkeypatch.setattr(mini_safety, "skilled", lambda seed, kind, count: f"{kind} {seed} {count}")
    found = timed({"seed": 5, "taught": taught})
    assert asked == [("dated 5 6" if taught else "chat 5", tuple(messages for *_, messages in rows))]
    assert found["asked"].tolist() == [year for year, *_ in rows[::11]]
    expected = found["asked"][:, None] > np.array([*YEARS, np.inf])  # nothing lies ahead where no year is stated
    right = np.ones(expected.shape)
    expected[2, 1], right[2, 1] = False, 0
    assert np.array_equal(found["ahead"], expected) and np.array_equal(found["right"], right)
    assert found["shown"] == [[m[-1]["content"], text] for (*_, m), text in zip(rows[:11], texts[:11], strict=True)]
