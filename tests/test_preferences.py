"""Comparisons: rows, the public sets' readers, statistics, and their collection from simulated raters."""

import builtins
import gzip
import json
import warnings
from importlib import resources

import numpy as np
import pytest
from conftest import random_model

from llama2lib import mini
from llama2lib import preferences as module
from llama2lib.chat import Reply
from llama2lib.judge import RATINGS, SAFE, Verdict, judge, rate, scores
from llama2lib.preferences import (
    READERS,
    check_preference,
    collect,
    helpfulness_mix,
    rated_conversations,
    read_preferences,
    read_public,
    safety_mix,
    sampler,
    statistics,
    transcript,
    two_answers,
    write_preferences,
    written,
)
from llama2lib.recipes import data_file
from llama2lib.synthetic import prompts
from llama2lib.tokenizer import Tokenizer, train_tokenizer

ROW = {
    "messages": [{"role": "user", "content": "Where?"}], "chosen": "In Oslo.", "rejected": "Ask.",
    "rating": "better", "safety": "both_safe", "source": "test",
}  # fmt: skip
USER, REPLY = {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Yes."}


# ---- rows


def test_rows_survive_the_disk(tmp_path):
    rows = [ROW, ROW | {"messages": [*ROW["messages"], REPLY, USER], "rating": None, "safety": None, "chosen": "Élan"}]
    write_preferences(tmp_path / "x.jsonl", rows)
    assert read_preferences(tmp_path / "x.jsonl") == rows
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    assert read_preferences(tmp_path / "x.jsonl.gz") == rows


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"rating": "much better"}, "rating: 'much better' is unknown; expected null or one of significantly better"),
        ({"safety": "safe"}, "safety: 'safe' is unknown; expected null or one of chosen_safe"),
        ({"rejected": " In Oslo. "}, "chosen and rejected are equal"),
        ({"chosen": " "}, "chosen: expected the text of an answer"),
        ({"rejected": 3}, "rejected: expected the text of an answer, found 3"),
        ({"messages": [USER, REPLY]}, "messages: the assistant's comes last; expected the user's"),
        ({"messages": [REPLY]}, "messages: message 0: assistant first"),
        ({"messages": "Where?"}, "messages: expected a list of messages"),
        ({"messages": []}, "messages: expected a list of messages"),
        ({"chosen": "[INST] x"}, r"chosen: message 1: \[INST\] belongs to the chat format"),
        ({"source": None}, "source: expected a string"),
    ],
)  # fmt: skip
def test_a_row_that_is_no_comparison_is_named_by_file_line_and_field(tmp_path, change, told):
    with pytest.raises(ValueError, match="^" + told):
        check_preference(ROW | change)
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | change) + "\n")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: " + told):
        read_preferences(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="^row 1: " + told):
        write_preferences(tmp_path / "y.jsonl", [ROW, ROW | change])
    assert not (tmp_path / "y.jsonl").exists()


@pytest.mark.parametrize("name", list(ROW))
def test_a_missing_field_is_named(name):
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        check_preference({key: value for key, value in ROW.items() if key != name})


def test_files_without_rows_and_lines_that_are_no_json(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl: no comparisons"):
        read_preferences(tmp_path / "empty.jsonl")
    (tmp_path / "bad.jsonl").write_text(json.dumps(ROW) + "\n{\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: not JSON"):
        read_preferences(tmp_path / "bad.jsonl")
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match=r"list\.jsonl:1: expected an object"):
        read_preferences(tmp_path / "list.jsonl")


# ---- public sets


def hh(*said: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {text}" for i, text in enumerate(said))


RECORDS = {  # a record of each set, and which answers it prefers to which
    "helpful": {"chosen": hh("Hi", "Hello", "Why?", "A"), "rejected": hh("Hi", "Hello", "Why?", "B")},
    "harmless": {"chosen": hh("Why?", "A"), "rejected": hh("Why?", "B")},
    "summarize": {"info": {"post": "Why?", "title": "x"}, "summaries": [{"text": " B"}, {"text": " A"}], "choice": 1},
    "webgpt": {"question": {"full_text": "Why?"}, "answer_0": "B", "answer_1": "A", "score_0": -0.5, "score_1": 0.5},
    "stackexchange": {"question": "Why?", "response_j": "A", "response_k": "B"},
    "shp": {"history": "Why?", "human_ref_A": "A", "human_ref_B": "B", "labels": 1},
    "gptj": {"prompt": "Why?", "chosen": "A", "rejected": "B"},
    "pandalm": {"instruction": "Why?", "input": "", "response1": "B", "response2": "A",
                "annotator1": 2, "annotator2": 1, "annotator3": 2},
    "alpaca_eval": {"instruction": "Why?", "output_1": "B", "output_2": "A", "preference": "2"},
}  # fmt: skip


@pytest.mark.parametrize("name", list(READERS))
def test_every_set_is_read_with_the_right_answer_chosen(tmp_path, name):
    (tmp_path / "x.jsonl").write_text(json.dumps(RECORDS[name]) + "\n")
    [row] = read_public(name, tmp_path / "x.jsonl")
    check_preference(row)
    assert (row["chosen"], row["rejected"], row["rating"], row["safety"]) == ("A", "B", None, None)
    assert "Why?" in row["messages"][-1]["content"] and len(row["messages"]) == (3 if name == "helpful" else 1)
    (tmp_path / "x.json").write_text(json.dumps([RECORDS[name]] * 2))
    assert read_public(name, tmp_path / "x.json") == [row, row]
    other = "gptj" if name != "gptj" else "shp"
    with pytest.raises(ValueError, match=rf"x\.jsonl:1: not a record of {other}"):
        read_public(other, tmp_path / "x.jsonl")


def test_the_other_answer_is_chosen_when_the_label_says_so(tmp_path):
    changes = {
        "shp": {"labels": 0}, "webgpt": {"score_0": 1}, "summarize": {"choice": 0}, "pandalm": {"annotator3": 1},
        "alpaca_eval": {"preference": 1.2},
    }  # fmt: skip
    for name, change in changes.items():
        (tmp_path / "x.jsonl").write_text(json.dumps(RECORDS[name] | change) + "\n")
        [row] = read_public(name, tmp_path / "x.jsonl")
        assert (row["chosen"], row["rejected"]) == (("B", "A")), name


def test_what_is_left_out_is_counted_and_told(tmp_path):
    same, ties = RECORDS["gptj"] | {"rejected": "A "}, RECORDS["webgpt"] | {"score_0": 0.5}
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, [RECORDS["gptj"], same, same])))
    with pytest.warns(UserWarning, match="gptj: 2 of 3 records left out .2 times chosen and rejected are equal"):
        assert len(read_public("gptj", tmp_path / "x.jsonl")) == 1
    (tmp_path / "y.jsonl").write_text(json.dumps(ties))
    with pytest.warns(UserWarning, match="1 times a tie"):
        assert read_public("webgpt", tmp_path / "y.jsonl") == []
    other = {"chosen": hh("Why?", "A"), "rejected": hh("Who?", "B")}
    (tmp_path / "z.jsonl").write_text(json.dumps(other))
    with pytest.warns(UserWarning, match="differ in more than the last answer"):
        read_public("harmless", tmp_path / "z.jsonl")


@pytest.mark.parametrize(("name", "text"), [("x.jsonl", ""), ("x.json", "[]")])
def test_a_public_set_without_records_is_an_error(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: no records of gptj; expected a JSON object a line"):
        read_public("gptj", tmp_path / name)


def test_sets_that_are_not_there(monkeypatch):
    with pytest.raises(ValueError, match="'hh' is no set we read; expected one of helpful"):
        read_public("hh")
    with pytest.raises(ValueError, match="pandalm is not on the hub"):
        read_public("pandalm")
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install datasets"):
        read_public("shp")


def test_a_transcript_may_speak_of_humans():
    messages = transcript("\n\nHuman: Is 'Human:' a word?\n\nNot at all?\n\nAssistant: It is.\n\nHuman: Ah")
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert messages[0]["content"] == "Is 'Human:' a word?\n\nNot at all?"


def test_rated_conversations_have_one_opening_a_gap_and_come_once():
    text = resources.files("chitchat_dataset").joinpath("dataset.json").read_text("utf-8")
    ratings = {}  # of the rest of a conversation, all those that it has
    for conversation in json.loads(text).values():
        turns = [" ".join(message["text"] for message in turn).strip() for turn in conversation["messages"]]
        rest = " ".join("\n".join(turns[1:]).split(" ")[:120]).strip()
        ratings.setdefault((turns[0].lower() if turns else "", rest), set()).add(
            sum((conversation.get("ratings") or {}).values())
        )
    rows = rated_conversations(gap=6)
    for row in rows:
        check_preference(row)
        [opening] = row["messages"]
        best, worst = (ratings[opening["content"], row[name]] for name in ("chosen", "rejected"))
        assert max(best) - min(worst - {0}) >= 6
    texts = [row[name] for row in rows for name in ("chosen", "rejected")]
    assert len(set(texts)) > 0.98 * len(texts) and len(rows) > 200  # some conversations are equal
    assert rated_conversations(gap=6) == rows and len(rated_conversations(gap=12)) < len(rows)
    assert all(len(answer.split(" ")) <= 5 for row in rated_conversations(words=5) for answer in (row["chosen"],))


# ---- statistics


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    texts = ["one two three four. Where? In Oslo. Ask. And? Yes. " * 9, "[INST] [/INST] [INST]\n" * 9]
    return train_tokenizer(texts, 300, tmp_path_factory.mktemp("words") / "tokenizer.model")


def test_statistics_by_hand(words):
    def size(text):
        return len(words.encode(text))

    longer = ROW | {"messages": [USER, REPLY, *ROW["messages"]]}
    found = statistics([ROW, longer], words)
    answer = (size("In Oslo.") + size("Ask.")) / 2
    assert found.comparisons == 2 and found.turns == 1.5
    assert found.tokens_in_prompt == pytest.approx((2 * size("Where?") + size("And?")) / 3)
    assert found.tokens_in_response == pytest.approx(answer)
    assert found.tokens_per_example == pytest.approx(size("Where?") + answer + (size("And?") + size("Yes.")) / 2)


def test_half_of_the_harmless_test_set_has_the_sizes_of_table_6():
    file = data_file("hh-rlhf/harmless-base-test.half-a.jsonl.gz")
    pieces = data_file("llama2-tokenizer/tokenizer.model")
    if file is None or pieces is None:
        pytest.skip("needs LLAMA2_DATA with hh-rlhf and llama2-tokenizer")
    with pytest.warns(UserWarning, match="8 of 1,181 records left out"):
        found = statistics(read_public("harmless", file), Tokenizer(pieces))
    assert found.comparisons == 1173
    assert found[2:] == pytest.approx((152.5, 15.7, 46.4), rel=0.03)


# ---- collection


def saying(name: str, calls: list):
    "An answerer that tells its name, its seed and what it was asked."

    def answers(dialogs, seed):
        calls.append((name, seed))
        return [Reply(f"{name} {seed} {messages[0]['content']}", True) for messages in dialogs]

    return answers


def test_two_variants_answer_each_dialog_on_either_side_and_in_every_way():
    calls, dialogs = [], [[{"role": "user", "content": str(i)}] for i in range(400)]
    variants = [[saying("a1", calls), saying("a2", calls)], [saying("b", calls)], [saying("c", calls)]]
    found = two_answers(variants, dialogs, 0)
    assert len({seed for _, seed in calls}) == len(calls) == 8  # no two passes share their randomness
    names = [tuple(reply.text.split()[0] for reply in pair) for pair in found]
    assert {len({name[0] for name in pair}) for pair in names} == {2} and len(set(names)) == 10
    assert all(reply.text.split()[2] == str(i) for i, pair in enumerate(found) for reply in pair)
    for side in (0, 1):
        assert np.mean([pair[side] == "a1" for pair in names]) == pytest.approx(1 / 6, abs=0.07)
    alone = two_answers(variants[:1], dialogs, 0)
    assert {reply.text[0] for pair in alone for reply in pair} == {"a"}
    assert two_answers(variants, dialogs, 0) == found != two_answers(variants, dialogs, 1)


def collected(monkeypatch, dialogs, pairs, value, seed=0):
    monkeypatch.setattr(module, "two_answers", lambda *args: [[Reply(*reply) for reply in pair] for pair in pairs])
    return collect([], dialogs, value, seed, "batch 1")


def test_the_rater_prefers_the_better_answer_and_what_cannot_be_compared_is_counted(monkeypatch):
    [asked] = prompts(np.random.default_rng(0), 1, "train", "adversarial")
    refusal, evasion, harm = ("I cannot help with that.", True), ("My hobby is judo.", True), None
    for text in ("Take a hoe and leave at night.", "You can use a hoe."):
        harm = (text, True) if judge(asked, text).safety < SAFE else harm
    pairs = [[refusal, evasion], [evasion, refusal], [refusal, refusal], [("", True), refusal], [("I", False), refusal]]
    rows, unused = collected(monkeypatch, [asked] * 5, pairs, "safety")
    gold = judge(asked, refusal[0]).safety, judge(asked, evasion[0]).safety
    for i, row in enumerate(rows):
        best, rating = rate(*(gold if i == 0 else gold[::-1]), seed=i)
        assert (row["chosen"], row["rating"]) == (pairs[i][best][0], rating) and row["messages"] == asked
        assert row["safety"] == "both_safe" and row["source"] == "batch 1"
        check_preference(row)
    assert len(rows) == 2 and unused == {"equal": 1, "empty": 1, "cut off": 1}


def test_safety_bins_and_the_excluded_one(monkeypatch):
    asked = prompts(np.random.default_rng(0), 60, "train", "adversarial")
    values = {"good": 1.0, "fair": 0.45, "bad": 0.38, "worse": 0.0}
    monkeypatch.setattr(module, "judge", lambda messages, text: Verdict(values[text], values[text], ()))
    names = [("good", "worse"), ("good", "fair"), ("bad", "worse"), ("bad", "fair")]
    pairs = [[(name, True) for name in names[i % 4]] for i in range(60)]
    rows, unused = collected(monkeypatch, asked, pairs, "safety")
    bins = {}
    for row in rows:
        bins.setdefault(frozenset((row["chosen"], row["rejected"])), set()).add((row["chosen"], row["safety"]))
    assert bins[frozenset(("good", "worse"))] == {("good", "chosen_safe")}
    assert bins[frozenset(("good", "fair"))] == {("good", "both_safe")}
    assert {label for _, label in bins[frozenset(("bad", "worse"))]} == {"both_unsafe"}
    assert bins[frozenset(("bad", "fair"))] == {("fair", "chosen_safe")}  # noise made some prefer the unsafe one:
    assert 0 < unused["unsafe chosen"] < 15 and len(rows) + unused["unsafe chosen"] == 60
    helpful, unused = collected(monkeypatch, asked, pairs, "helpfulness")
    assert {row["safety"] for row in helpful} == {None} and not unused


def test_answers_of_a_model_are_repeatable_and_batches_differ():
    asked, words = prompts(np.random.default_rng(0), 12, "train"), mini.tokenizer()
    model = random_model(vocab_size=words.vocab_size)
    variants = [[sampler(model, words, temperature, max_new_tokens=6) for temperature in (0.7, 1.0)]]
    runs = [two_answers(variants, asked, seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert all(first != second for first, second in runs[0])
    with pytest.raises(ValueError, match="value 'style': expected 'helpfulness' or 'safety'"):
        collect(variants, asked, "style", 0, "x")


def test_the_worlds_writer_answers_each_dialog_as_well_as_it_is_told():
    asked = prompts(np.random.default_rng(0), 150, "train")
    good, bad = (written({quality: 1.0})(asked, 0) for quality in ("full", "wrong"))
    means = [scores(asked, replies)[:, 0].mean() for replies in (good, bad)]
    assert means[0] > 0.8 and means[1] < 0.2
    assert written({"full": 1.0})(asked, 0) == good != written({"full": 1.0})(asked, 1)


def test_the_two_mixtures_have_the_papers_proportions():
    helpful, others, safety = ([(kind, i) for i in range(count)] for kind, count in (("h", 90), ("o", 400), ("s", 180)))
    mixed = helpfulness_mix(helpful, others, 0)
    assert mixed[:90] == helpful and len(mixed) == 180 and len(set(mixed)) == 180
    assert helpfulness_mix(helpful, others[:5], 0)[90:] != [] and len(helpfulness_mix(helpful, others[:5], 0)) == 95
    mixed = safety_mix(safety, helpful, 0)
    assert mixed[:180] == safety and len(mixed) == 200 and {kind for kind, _ in mixed[180:]} == {"h"}
    assert safety_mix(safety, helpful, 1)[180:] != mixed[180:] and safety_mix(safety, helpful, 0, share=0.0) == safety


def test_a_mixture_with_too_few_helpfulness_pairs_takes_all_and_says_so():
    with pytest.warns(UserWarning, match="10% helpfulness pairs beside 90 safety pairs are 10: there are 3"):
        mixed = safety_mix(range(90), range(100, 103), 0)
    assert mixed[:90] == [*range(90)] and sorted(mixed[90:]) == [100, 101, 102]
    with warnings.catch_warnings(action="error"):
        assert len(safety_mix(range(90), range(10), 0)) == 100


def test_the_ratings_are_the_judges():
    assert list(RATINGS) == ["significantly better", "better", "slightly better", "negligibly better"]
