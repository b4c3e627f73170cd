"""Human evaluation: ratings to shares, raters who see left and right only, and models as judges."""

import contextlib
import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import torchrun
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from llama2lib import human_eval
from llama2lib.desk import Desk, Study, review
from llama2lib.human_eval import (
    CRITERIA,
    Comparing,
    JudgeConfig,
    Ruling,
    chat_judge,
    check_rating,
    comparison_items,
    judge_prompt,
    load_chat,
    position_bias,
    ratings_of,
    read_answers,
    run,
    score_judge,
    verdict_of,
    win_rate,
)
from llama2lib.judge import RATINGS, rate
from llama2lib.paper import PAPER
from llama2lib.tallies import count_that_pools, outcomes, pooled, simulated, tally, tally_votes

pytestmark = pytest.mark.usefixtures("one_thread")
NAN = float("nan")


def ask(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


# ---------- the paper's figures


def test_pooled_shares_are_those_of_all_prompts():
    "As if every prompt were counted one by one."
    random = np.random.default_rng(0)
    groups = [random.integers(-1, 2, size) for size in (70, 230)]
    shares = [[np.mean(group == side) for side in (1, 0, -1)] for group in groups]
    everything = np.concatenate(groups)
    expected = [np.mean(everything == side) for side in (1, 0, -1)]
    assert np.allclose(pooled(shares, [70, 230]), expected)


def test_the_count_that_was_put_in_comes_out():
    first, second = [83.0, 10.0, 7.0], [63.0, 23.0, 14.0]
    for count in (100, 960, 1960):
        whole = pooled([first, second], [1917, count])
        best, low, high = count_that_pools(first, second, whole, 1917, 0.1)
        assert best == count and low < count < high
        for edge, outside in ((low, low - 1), (high, high + 1)):
            off = [abs(pooled([first, second], [1917, n]) - whole).max() for n in (edge, outside)]
            assert off[0] <= 0.1 < off[1]


def test_a_count_that_cannot_be_told_is_an_error():
    with pytest.raises(ValueError, match=r"even 38,339 leaves every share"):
        count_that_pools([36, 31, 33], [36, 31, 33], [36, 31, 33], 1917, 0.1)
    with pytest.raises(ValueError, match="no count leaves every share"):
        count_that_pools([30, 70], [20, 80], [50, 50], 100, 0.1)


def test_table_32_does_not_fit_figure_1():
    "With 960 prompts of several turns Falcon's pairing pools to what is printed, with 1960 it does not."
    name = "34B vs Falcon-40B-instruct"
    whole, one, several = (list(PAPER[f"Figure {figure}"][name].values()) for figure in ("1", "12 single", "12 multi"))
    counts = PAPER["Table 32"]["Falcon"]
    assert abs(pooled([one, several], [counts["single"], 960]) - whole).max() < 0.2
    assert abs(pooled([one, several], [counts["single"], counts["multi"]]) - whole).max() > 3


# ---------- ratings


@given(st.lists(st.lists(st.integers(1, 7), min_size=3, max_size=3), min_size=1, max_size=8), st.sampled_from([0, 2]))
@settings(max_examples=60, deadline=None)
def test_most_raters_are_the_side_of_the_median(rows, more):
    "For an odd number of raters; the extra ones say the same as the first."
    ratings = np.array([row + row[:1] * more for row in rows])
    found = outcomes(ratings)
    assert found.tolist() == np.sign(np.median(ratings, 1) - 4).astype(int).tolist()
    assert outcomes(8 - ratings).tolist() == (-found).tolist(), "the other answer's view"


def test_without_a_majority_it_is_a_tie():
    rows = [[7, 4, 1], [5, 5, 1], [7, 1, 1], [5, 4, 4], [7, 3, NAN], [6, NAN, NAN], [7, 6, 4], [7, 4, NAN]]
    assert outcomes(rows).tolist() == [0, 1, -1, 0, 0, 1, 1, 0]
    assert outcomes([[1, 1, 7, 7]]).tolist() == [0] and outcomes([[3, 3, 3, 7]]).tolist() == [-1]


@pytest.mark.parametrize(
    ("ratings", "message"),
    [([[0, 4]], "1 to 7"), ([[8, 4]], "1 to 7"), ([[4.5, 4]], "1 to 7"), ([4, 5], "shape"), ([[4], [NAN]], "prompt 1")],
)
def test_what_is_no_rating_is_refused(ratings, message):
    for count in (outcomes, tally_votes):
        with pytest.raises(ValueError, match=message):
            count(ratings)


def test_shares_and_their_intervals_by_hand():
    found = tally([1] * 50 + [0] * 30 + [-1] * 20)
    assert [part.value for part in found[:4]] == pytest.approx([0.5, 0.3, 0.2, 0.3]) and found.prompts == 100
    for part, count in zip(found, (50, 30, 20), strict=False):
        assert part[1:] == pytest.approx(tuple(binomtest(count, 100).proportion_ci(method="wilson")))
    spread = np.sqrt((0.7 - 0.3**2) / 99)  # of a mean of 100 outcomes
    assert found.net.high - found.net.value == pytest.approx(1.984 * spread, rel=1e-3)
    assert str(found) == "win 50.0, tie 30.0, loss 20.0, wins − losses +30.0 [+14.4, +45.6] % of 100"
    few = tally([1, -1])
    assert few.net == (0.0, -1.0, 1.0)
    for wrong in ([1], [0.5, 1], [[1, 0]], [2, 1]):
        with pytest.raises(ValueError, match="two or more of -1, 0, 1"):
            tally(wrong)


def test_votes_of_one_prompt_belong_together():
    "Three raters who always agree are no more than one; three who are independent are nearly three."
    width, patterns = {}, np.array([*itertools.product([2, 6], repeat=3)])
    for name, ratings in {
        "alike": np.repeat([[2] * 3, [6] * 3], 152, 0),
        "apart": np.repeat(patterns, 38, 0),
    }.items():
        found = tally_votes(ratings)
        assert found.win.value == pytest.approx(np.mean(ratings == 6)) and found.tie == (0, 0, 0)
        assert found.net.value == pytest.approx(found.win.value - found.loss.value)
        width[name] = found.win.high - found.win.low
    one = tally(outcomes(np.repeat([[2], [6]], 152, 0)))
    assert width["alike"] == pytest.approx(one.win.high - one.win.low, rel=0.08)
    assert width["alike"] / width["apart"] == pytest.approx(3**0.5, rel=0.1)


def test_votes_weigh_prompts_alike_and_pass_missing_ones_over():
    found = tally_votes([[7, NAN, NAN], [1, 1, 4], [7, 1, NAN]])
    assert found.win.value == pytest.approx((1 + 0 + 0.5) / 3) and found.loss.value == pytest.approx((2 / 3 + 0.5) / 3)
    assert found.tie.value == pytest.approx(1 / 9) and found.prompts == 3
    ratings = simulated(np.linspace(-0.5, 0.5, 99), 0.2)
    assert tally_votes(ratings, seed=1) == tally_votes(ratings, seed=1) != tally_votes(ratings, seed=2)


def test_simulated_raters_use_the_levels_of_the_annotators():
    "With the noise that chapter 12's rater had, the same sides and levels."
    levels = list(RATINGS)
    random = np.random.default_rng(0)
    for seed, (first, second) in enumerate(random.integers(0, 101, (200, 2)) / 100):
        side, rating = rate(first, second, seed)
        seen = first - second + np.random.default_rng([3, seed]).normal(0, 0.1)
        [[rated]] = simulated([seen], 0.0, 1)
        assert rated == 4 + (-1 if side else 1) * (3 - levels.index(rating))
    assert simulated([0.85 - 0.75, 0.95 - 0.45, 0.65 - 0.4], 0.0, 1)[:, 0].tolist() == [5, 7, 6]


def test_simulated_noise_is_what_was_asked_for():
    ratings = simulated(np.zeros(20_000), 0.1, 3, seed=1)
    assert ratings.shape == (20_000, 3)
    assert np.mean(ratings == 4) == pytest.approx(0.6827, abs=0.01)  # within one deviation
    assert np.mean(ratings > 4) == pytest.approx(np.mean(ratings < 4), abs=0.01)
    assert abs(np.corrcoef(ratings.T)[0, 1]) < 0.03
    assert (ratings != simulated(np.zeros(20_000), 0.1, 3, seed=2)).any()


# ---------- the desk


@pytest.fixture
def desk(tmp_path):
    made = Desk(tmp_path / "study.sqlite", Study("s", per_item=3), check_rating)
    made.add(comparison_items([ask(f"ask {i}") for i in range(16)], ["first"] * 16, ["second"] * 16)[0])
    return made


def test_what_is_stored_is_what_was_meant_whichever_side_it_stood_on(desk):
    "A rater who likes 'first' by a level has that level on record, from either side."
    likes = {"ann": 3, "bob": 0, "cleo": -2}
    lefts = set()
    for rater, level in likes.items():
        session = Comparing(desk, rater)
        while session.task:
            left, _ = session.view()["answers"]
            lefts.add(left)
            session.press(str(4 - level if left == "first" else 4 + level), session.item)
    assert lefts == {"first", "second"}
    assert ratings_of(desk).tolist() == [[7, 4, 2]] * 16
    assert outcomes(ratings_of(desk)).tolist() == [0] * 16


def test_the_screen_shows_seven_points_and_not_which_is_which(desk):
    session = Comparing(desk, "ann")
    view = session.view()
    assert json.dumps(view) and sorted(b["key"] for row in view["rows"] for b in row["buttons"]) == list("1234567")
    same, left, right = view["rows"]
    assert [b["key"] for b in same["buttons"]] == ["4"]
    assert [b["label"] for b in left["buttons"]] == ["much better", "better", "slightly better"]
    assert [b["label"] for b in right["buttons"]] == ["slightly better", "better", "much better"]
    assert {view["answers"][0], view["answers"][1]} == {"first", "second"}
    assert [fold[0] for fold in view["folds"]] == ["g"]
    for key in ("8", "0", "a", "", "12"):
        session.press(key)
        assert session.note == "" and not desk.annotations()
    session.press("u")
    assert "nothing to take back" in session.note
    session.press("7", session.item)
    session.press("u")
    assert not desk.annotations() and session.item == view["item"]
    for _ in range(16):
        session.press("4", session.item)
    assert session.view()["rows"] == [] and session.view()["done"] == 16


def test_the_widget_shows_it(desk):
    pytest.importorskip("anywidget", reason="needs anywidget (extra 'notebook')")
    screen = human_eval.widget(desk, "ann")
    screen._handle_custom_msg({"key": "4", "item": screen.view["item"], "text": ""}, [])
    assert screen.view["done"] == 1 and desk.annotations()[0].choice == {"rating": 4}


def test_missing_ratings_are_missing_and_rejected_ones_too(desk):
    for rater, key in (("ann", "4"), ("bob", "4")):
        session = Comparing(desk, rater)
        session.press(key, session.item)
    first = desk.annotations()[0]
    review(desk, first.id, "eve", "reject", "read it again")
    review(desk, desk.annotations()[1].id, "eve", "edit", choice={"rating": 5})
    found = ratings_of(desk)
    assert found.shape == (16, 3) and np.isnan(found).sum() == 47
    assert found[~np.isnan(found)].tolist() == [5]


@pytest.mark.parametrize("choice", [{"rating": 8}, {"rating": 4.0}, {"rating": True}, {"better": 0}, {}])
def test_what_is_no_rating_is_not_stored(desk, choice):
    with pytest.raises(ValueError, match="a rating of 1 to 7"):
        desk.submit(desk.next_task("ann"), choice)


def test_another_studys_desk_is_refused(tmp_path):
    other = Desk(tmp_path / "other.sqlite", Study("s"))
    other.add([{"messages": ask("ask"), "answers": ["a", "b"]}])
    other.submit(other.next_task("ann"), {"better": 0, "rating": "better", "safe": None})
    with pytest.raises(ValueError, match="a rating of 1 to 7"):
        ratings_of(other)


def test_equal_answers_are_counted_and_not_asked():
    dialogs = [ask("a"), ask("b"), ask("a"), ask("a")]
    items, left_out = comparison_items(dialogs, ["x", "x", "x", "z"], ["y", " x ", "y", "y"])
    assert [item["answers"] for item in items] == [["x", "y"], ["z", "y"]] and left_out == {"equal": 1, "twice": 1}
    with pytest.raises(ValueError, match="pair 2: answers: expected the text"):
        comparison_items(dialogs[:2], ["x", "x"], ["y", ""])
    with pytest.raises(ValueError, match="shorter"):
        comparison_items(dialogs, ["x"], ["y"])


# ---------- judges


@pytest.mark.parametrize(
    ("reply", "side"),
    [
        ("A", 1), ("B", -1), ("C", 0), ("tie", 0), (" **A**\n", 1), ("(B)", -1), ("B.", -1), ("Answer: A", 1),
        ("My final verdict is B.", -1), ("I choose A", 1), ("The best answer is: C", 0), ("Answer B", -1),
        ("A. It names the town.", 1), ("A\n\nIt names the town.", 1), ("Both name the town.\n\nVerdict: B", -1),
        ("[[A]]", 1), ("I think that [[B]] is better, as A lies.", -1), ("[[C]]", 0), ("[[A]] and again [[A]]", 1),
        ("A good answer would name the town.", None), ("A is B's opposite", None), ("A or B", None), ("", None),
        ("[[A]] or [[B]]", None), ("A\nB", None), ("I cannot say.", None), ("D", None), ("a", None), ("Above", None),
        ("Because it is true", None), ("AB", None), ("Assistant", None),
    ],
)  # fmt: skip
def test_verdicts_are_read_or_are_none(reply, side):
    assert verdict_of(reply) == side


def sees(dialogs) -> list[tuple[str, str]]:
    "The two answers that a judge is shown."
    texts = [message["content"] for [message] in dialogs]
    return [(text.split("<A>\n")[1].split("\n</A>")[0], text.split("<B>\n")[1].split("\n</B>")[0]) for text in texts]


MANY = range(400)
PAIRS = [[ask(f"question {i}") for i in MANY], [f"good {i}" for i in MANY], [f"bad {i}" for i in MANY]]


def test_a_judge_that_knows_gets_every_pair_right_in_either_order():
    rulings = chat_judge(lambda dialogs: ["A" if one.startswith("good") else "B" for one, _ in sees(dialogs)])(*PAIRS)
    assert {ruling.outcome for ruling in rulings} == {1}
    assert 160 < sum(ruling.swapped for ruling in rulings) < 240
    found = win_rate(rulings)
    assert (found.wins, found.losses, found.ties, found.unread) == (400, 0, 0, 0) and found.rate.value == 1
    assert position_bias(rulings).low < 0.5 < position_bias(rulings).high


def test_a_judge_that_always_takes_the_first_gets_half():
    rulings = chat_judge(lambda dialogs: ["A"] * len(dialogs))(*PAIRS)
    assert win_rate(rulings).rate.low < 0.5 < win_rate(rulings).rate.high
    assert position_bias(rulings).value == 1
    assert position_bias(chat_judge(lambda dialogs: ["B"] * len(dialogs))(*PAIRS)).value == 0


def test_the_order_depends_on_the_pair_and_the_seed_alone():
    def orders(seed, these):
        return [r.swapped for r in chat_judge(lambda dialogs: ["A"] * len(dialogs), seed=seed)(*these)]

    whole, back = orders(0, PAIRS), [part[::-1] for part in PAIRS]
    assert orders(0, [part[100:130] for part in PAIRS]) == whole[100:130]
    assert orders(0, back)[::-1] == whole and orders(1, PAIRS) != whole


def test_what_cannot_be_read_is_neither_a_tie_nor_a_loss():
    said = iter(["A", "B", "hm", "C", "A", "well"])
    rulings = chat_judge(lambda dialogs: [next(said) for _ in dialogs])(*(part[:6] for part in PAIRS))
    assert [r.reply for r in rulings] == ["A", "B", "hm", "C", "A", "well"]
    found = win_rate(rulings)
    assert (found.wins + found.losses, found.ties, found.unread) == (3, 1, 2)
    found = win_rate([Ruling(side, False, "") for side in (1, 1, 1, -1, 0, 0, 0, None, None)])
    assert found.rate.value == 0.75 and found[1:] == (3, 1, 3, 2)
    assert found.rate[1:] == pytest.approx(tuple(binomtest(3, 4).proportion_ci(method="wilson")))
    with pytest.raises(ValueError, match="no ruling decides: 1 ties, 1 that cannot be read, such as 'hm'"):
        win_rate([Ruling(0, False, "C"), Ruling(None, True, "hm")])
    with pytest.raises(ValueError, match="none of 1 rulings"):
        position_bias([Ruling(0, True, "")])


def test_equal_answers_are_ties_that_nobody_is_asked_about():
    asked = []

    def chat(dialogs):
        asked.extend(sees(dialogs))
        return ["A"] * len(dialogs)

    rulings = chat_judge(chat)([ask("x"), ask("y")], ["same ", "one"], ["same", "two"])
    assert len(asked) == 1 and set(asked[0]) == {"one", "two"} and rulings[0] == Ruling(0, False, "")
    assert chat_judge(lambda _: pytest.fail("asked"))([ask("x")], ["s"], ["s"]) == [Ruling(0, False, "")]
    scores = iter([np.array([0.1, 2.0, 1.0]), np.array([0.1000001, 1.0, 3.0])])
    rulings = score_judge(lambda told: next(scores))([ask("x")] * 3, ["s", "a", "b"], ["s", "c", "d"])
    assert [r.outcome for r in rulings] == [0, 1, -1]


def test_the_judge_is_asked_about_all_of_it():
    messages = [{"role": "system", "content": "be brief"}, *ask("hello"), {"role": "assistant", "content": "hi"}]
    messages += ask("how are you?")
    [prompt] = judge_prompt(messages, "fine", "well", "safety")
    for part in ("System: be brief", "User: hello", "Assistant: hi", "User: how are you?", CRITERIA["safety"]):
        assert part in prompt["content"]
    assert sees([[prompt]]) == [("fine", "well")] and "Choose the best answer between A and B" in prompt["content"]
    with pytest.raises(ValueError, match="value 'beauty': expected one of helpfulness, safety"):
        chat_judge(len, "beauty")
    with pytest.raises(ValueError, match="gave 1 replies to 2 questions"):
        chat_judge(lambda dialogs: ["A"])([ask("x"), ask("y")], ["1", "2"], ["3", "4"])


# ---------- folders and the command line


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def answers(tmp_path):
    rows = [{"messages": ask(f"one two {'three ' * (i % 4)}"), "answer": "four five", "more": i} for i in range(9)]
    others = [row | {"answer": f"six {'seven ' * i}"} for i, row in enumerate(rows)]
    return write(tmp_path / "first.jsonl", rows), write(tmp_path / "second.jsonl", others)


TEMPLATE = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    "A Hugging Face chat model of another kind: GPT-2's architecture, its own chat template."
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'hub')")
    from tokenizers import Tokenizer as Words
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    path = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    words = "A B C one two three user assistant < > [pad] [unk] [end]".split()
    made = Words(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[unk]"))
    made.pre_tokenizer = Whitespace()
    special = {"pad_token": "[pad]", "unk_token": "[unk]", "eos_token": "[end]"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
    tokenizer.chat_template = TEMPLATE
    sizes = {"n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(vocab_size=len(words), eos_token_id=12, **sizes)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_hugging_face_folder_is_a_chat(foreign):
    "Its greedy answer behind its own template, without the prompt and without special tokens."
    from transformers import AutoModelForCausalLM, AutoTokenizer

    dialogs = [ask("one two"), [*ask("three"), {"role": "assistant", "content": "A"}, *ask("B")]]
    words, network = AutoTokenizer.from_pretrained(foreign), AutoModelForCausalLM.from_pretrained(foreign).eval()
    for dialog, text in zip(dialogs, load_chat(foreign, max_new_tokens=5)(dialogs), strict=True):
        rendered = "".join(f"<{m['role']}> {m['content']} " for m in dialog) + "<assistant>"
        ids, made = words(rendered, add_special_tokens=False)["input_ids"], []
        for _ in range(5):
            made.append(int(network(torch.tensor([ids + made])).logits[0, -1].argmax()))
            if made[-1] == 12:
                break
        assert text == words.decode(made, skip_special_tokens=True).strip()


def test_a_folder_of_llama_2s_format_is_read_here_and_one_of_another_format_is_not(folders, tokenizer, chat):
    from llama2lib.chat import respond

    dialogs = [ask("one two"), ask("three")]
    expected = [reply.text for reply in respond(chat, tokenizer, dialogs, 6)]
    assert load_chat(folders / "chat", max_new_tokens=6)(dialogs) == expected
    template = folders / "chat" / "chat_template.jinja"
    template.write_text("{{ '[INST]' }}")
    assert load_chat(folders / "chat", max_new_tokens=6)(dialogs) == expected
    template.write_text(TEMPLATE)
    pytest.importorskip("transformers", reason="needs transformers (extra 'hub')")
    assert load_chat(folders / "chat", max_new_tokens=6)(dialogs) != expected, "read through its own template"


def test_a_folder_without_a_chat_template_is_refused(foreign, tmp_path):
    for file in foreign.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="no chat template; expected a chat model"):
        load_chat(tmp_path)


@pytest.mark.parametrize("scorer", [False, True])
def test_a_judge_from_a_folder(folders, answers, monkeypatch, capsys, scorer):
    "Every pair is ruled once, in the order of the files; a run that was killed goes on where it was."
    judge = folders / ("helpful" if scorer else "chat")
    config = JudgeConfig(*answers, str(judge), scorer, out=folders / "out", chunk=2, max_new_tokens=8)
    if not scorer:  # the chat of the tests knows numbers only; here it says letters
        monkeypatch.setattr(human_eval, "load_chat", lambda *_: lambda dialogs: ["A" if "six" in a else "no idea"
                                                                               for a, _ in sees(dialogs)])  # fmt: skip
    work, done = human_eval.write_atomic, []

    def dies(path, text):
        if path.parent.name == "chunks" and len(done) == 2:
            raise RuntimeError("told to die")
        done.append(path)
        work(path, text)

    monkeypatch.setattr(human_eval, "write_atomic", dies)
    with pytest.raises(RuntimeError, match="told to die"):
        run(config)
    assert sorted(path.name for path in (folders / "out" / "chunks").iterdir()) == ["000000.jsonl", "000001.jsonl"]
    monkeypatch.setattr(human_eval, "write_atomic", work)
    kept = (folders / "out" / "chunks" / "000000.jsonl").stat().st_mtime_ns
    result = run(config)
    assert (folders / "out" / "chunks" / "000000.jsonl").stat().st_mtime_ns == kept
    rows = [json.loads(line) for line in (folders / "out" / "rulings.jsonl").read_text().splitlines()]
    files = [read_answers(path) for path in answers]
    assert [(row["messages"], row["first"], row["second"]) for row in rows] == [
        (one["messages"], one["answer"], other["answer"]) for one, other in zip(*files, strict=True)
    ]
    assert json.loads((folders / "out" / "results.json").read_text())["wins"] == result.wins
    printed = capsys.readouterr().out
    assert str(result) in printed and ("shown first" in printed) == (not scorer)
    if scorer:
        from llama2lib.reward import load_scorer

        told = ([[*row["messages"], {"role": "assistant", "content": row[side]}] for row in rows]
                for side in ("first", "second"))  # fmt: skip
        one, other = map(load_scorer(judge), told)
        assert [row["outcome"] for row in rows] == np.sign(one - other).astype(int).tolist()
    else:
        assert [row["outcome"] for row in rows] == [-1 if row["swapped"] else None for row in rows]
        assert (result.wins, result.losses) == (0, sum(row["swapped"] for row in rows))
        assert result.unread == 9 - result.losses
    with pytest.raises(ValueError, match="seed"):
        run(replace(config, seed=1))


def test_two_processes_rule_the_same(folders, answers):
    config = JudgeConfig(*answers, str(folders / "helpful"), scorer=True, chunk=2, out=folders / "alone")
    run(config)
    printed = torchrun(
        "--standalone", "--nproc-per-node=2", "-m", "llama2lib.human_eval", "--first", answers[0], "--second",
        answers[1], "--judge", config.judge, "--scorer", "--chunk", "2", "--out", folders / "together",
    )  # fmt: skip
    assert printed.count("the first against the second") == 1
    ours, theirs = ((folders / out / "rulings.jsonl").read_text() for out in ("alone", "together"))
    assert ours == theirs


def test_files_that_do_not_belong_together_are_named(answers, tmp_path):
    first, second = answers
    rows = read_answers(first)
    config = JudgeConfig(first, second, "none", out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"has 9 answers, .*short.jsonl 8"):
        run(replace(config, second=write(tmp_path / "short.jsonl", rows[:8])))
    rows[3] = rows[3] | {"messages": ask("another")}
    with pytest.raises(ValueError, match=r"moved.jsonl:4: other messages than in line 4 of .*first.jsonl"):
        run(replace(config, second=write(tmp_path / "moved.jsonl", rows)))
    with pytest.raises(ValueError, match="expected a value of helpfulness, safety"):
        replace(config, value="beauty")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": ask("x")}, "'answer'"),
        ({"answer": "x"}, "messages: expected a list"),
        ({"messages": [], "answer": "x"}, "no user message"),
        ({"messages": [*ask("x"), {"role": "assistant", "content": "y"}], "answer": "x"}, "the user's to come last"),
        ([], "expected an object"),
    ],
)
def test_a_bad_row_names_file_and_line(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [{"messages": ask("x"), "answer": ""}, row])
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{message}"):
        read_answers(path)
    with pytest.raises(ValueError, match="no answers"):
        read_answers(write(tmp_path / "empty.jsonl", []))


def test_the_command_line_ends_with_one_line(answers, monkeypatch, capsys, tmp_path):
    options = ["--first", answers[0], "--second", answers[1], "--judge", tmp_path / "nowhere"]
    options += ["--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["human_eval", *map(str, options)])
    with pytest.raises(SystemExit, match="nowhere") as ended:
        human_eval.cli()
    assert "\n" not in str(ended.value)
    monkeypatch.setattr(sys, "argv", ["human_eval", "--help"])
    with contextlib.suppress(SystemExit):
        human_eval.cli()
    assert "the opponent's" in capsys.readouterr().out
