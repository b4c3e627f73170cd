"""Likelihoods beside a plain pass, stops, tasks from planted files, the command, two processes."""

import json
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHAPES, random_model, torchrun

pytest.importorskip("lm_eval")
from llama2lib import continuations, evaluate, mini
from llama2lib.checkpoint import save_checkpoint
from llama2lib.continuations import cut, loglikelihoods, tokens_until, written_until
from llama2lib.evaluate import (
    CHOICE,
    MINI,
    OPEN,
    TASKS,
    EvaluateConfig,
    ask,
    mini_rows,
    mini_task,
    read_problems,
    right,
    run,
    tasks_of,
)
from llama2lib.generation import generate
from llama2lib.harness import LlamaLM
from llama2lib.judge import read_task
from llama2lib.recipes import data_file
from llama2lib.synthetic import dialogues

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def read_alone(model, context: list[int], tokens: list[int]) -> tuple[float, bool]:
    "A continuation's log-probability from one pass over both, without a cache."
    text = (context + tokens)[-model.config.max_seq_len - 1 :]
    logprobs = model(torch.tensor([text[:-1]]))[0, -len(tokens) :].log_softmax(-1)
    wanted = torch.tensor(tokens)
    return logprobs.gather(1, wanted[:, None]).sum().item(), bool((logprobs.argmax(-1) == wanted).all())


def drawn(random, vocab_size: int, low: int, high: int) -> list[int]:
    return random.integers(0, vocab_size, random.integers(low, high)).tolist()


@pytest.mark.parametrize("room", [1, 200, 8192])
@pytest.mark.parametrize("shape", SHAPES)
def test_shared_contexts_change_no_likelihood(shape, room):
    "Many choices of a context, which begin alike or do not, some greedy; contexts and continuations as long as can be."
    model, random = random_model(shape), np.random.default_rng(0)
    size, pairs = model.config.vocab_size, []
    for _ in range(12):
        context, front = drawn(random, size, 1, 125), drawn(random, size, 0, 3)
        pairs += [(context, front + drawn(random, size, 1, 8)) for _ in range(random.integers(1, 5))]
        best = generate(model, [context[:100]], 5, temperature=0)[0].tokens
        pairs += [(context[:100], best), (context[:100], [*best[:4], (best[4] + 1) % size])]
    long = drawn(random, size, 127, 128)
    pairs += [(long, [1, 2]), (long, [1, 3, 4]), (long, [5]), ([1], drawn(random, size, 128, 129)), pairs[0], pairs[0]]
    pairs += [(drawn(random, size, 300, 301), drawn(random, size, 127, 128)), ([3], [4]), ([3], [4, 5, 6])]
    pairs += [([n], drawn(random, size, 120, 121)) for n in range(10, 20)]  # more tokens than are looked up at a time
    pairs = [pairs[n] for n in random.permutation(len(pairs))]
    found = loglikelihoods(model, pairs, room)
    for (context, tokens), (logprob, greedy) in zip(pairs, found, strict=True):
        alone, best = read_alone(model, context, tokens)
        assert logprob == pytest.approx(alone, abs=1e-3) and greedy == best
    assert sum(greedy for _, greedy in found) >= 12


def test_a_context_is_read_once_with_what_its_choices_have_in_common(monkeypatch):
    model, read = random_model("GQA"), []
    hidden = type(model).hidden

    def record(self, tokens, cache=None):
        read.append(tokens.numel())
        return hidden(self, tokens, cache)

    monkeypatch.setattr(type(model), "hidden", record)
    context = list(range(50))
    loglikelihoods(model, [(context, [choice]) for choice in range(4)])
    assert read == [50]
    read.clear()
    loglikelihoods(model, [(context, [7, 8, choice]) for choice in range(4)])
    assert read == [52]
    read.clear()
    loglikelihoods(model, [(context, [choice, 1, 2]) for choice in range(4)])
    assert read == [50, 4 * 2]


def test_batches_keep_to_their_room(monkeypatch):
    model, read = random_model("MQA"), []
    hidden = type(model).hidden

    def record(self, tokens, cache=None):
        read.append(tokens.numel() if cache is None else cache.keys[0].shape[0] * cache.keys[0].shape[2])
        return hidden(self, tokens, cache)

    monkeypatch.setattr(type(model), "hidden", record)
    random = np.random.default_rng(0)
    contexts = [drawn(random, 131, 1, 60) for _ in range(30)]
    loglikelihoods(model, [(context, drawn(random, 131, 1, 9)) for context in contexts for _ in range(3)], 250)
    assert max(read) <= 250 and sorted(read)[len(read) // 2] > 150


@pytest.mark.parametrize("pair, expected", [
    (([], [1]), "pair 1: 0 and 1 tokens; expected both"),
    (([1], []), "pair 1: 1 and 0 tokens; expected both"),
    (([1], [1] * 129), "pair 1: 1 and 129 tokens; expected both, and at most 128 to score"),
    (([97], [1]), "pair 1: expected ids from 0 to 96"),
    (([1], [-1]), "pair 1: expected ids from 0 to 96"),
])  # fmt: skip
def test_pairs_that_cannot_be_scored_are_refused(pair, expected):
    with pytest.raises(ValueError, match=expected):
        loglikelihoods(random_model("GQA"), [([1], [2]), pair])


def test_logits_that_are_not_finite_stop_the_run(chat, tokenizer):
    model = random_model("GQA")
    model.output.weight.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match="pair 0: the logits are not finite"):
        loglikelihoods(model, [([1], [2])])
    broken = random_model("GQA", vocab_size=tokenizer.vocab_size)
    broken.output.weight.data[:] = torch.nan
    with pytest.raises(FloatingPointError, match="row 0: the logits are not finite"):
        tokens_until(broken, tokenizer, [[1]])


def test_nothing_to_do_is_no_error(chat, tokenizer):
    assert loglikelihoods(chat, []) == tokens_until(chat, tokenizer, []) == []
    assert tokens_until(chat, tokenizer, [[1]], max_new_tokens=0) == [[]]


@pytest.fixture(scope="module")
def strange(tokenizer):
    "A model that writes pieces and bytes at random."
    return random_model("GQA", seed=3, vocab_size=tokenizer.vocab_size)


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("batch", [1, 3, 32])
def test_texts_without_stops_are_those_of_generate(strange, chat, tokenizer, temperature, batch):
    "Whatever stands beside them, up to EOS, the most tokens or the end of the context."
    random = np.random.default_rng(0)
    prompts = [[1, *drawn(random, tokenizer.vocab_size, 0, high)] for high in (2, 9, 60, 120, 9, 30, 126)]
    seeds = list(range(7))
    for model in strange, chat:
        made = tokens_until(model, tokenizer, prompts, (), 20, temperature, 0.9, seeds, batch)
        expected = generate(model, prompts, 20, temperature, 0.9, seeds, tokenizer.eos_id)
        assert made == [completion.tokens for completion in expected]


def test_a_text_ends_with_the_token_that_completes_a_stop(strange, tokenizer):
    "Stops that begin and end inside of tokens, and in the middle of a character."
    prompts = [[1, n] for n in range(260, 300)]
    free = tokens_until(strange, tokenizer, prompts, max_new_tokens=24)
    ends = 0
    for prompt, tokens in zip(prompts, free, strict=True):
        text = tokenizer.decode(tokens)
        for stop in (text[5:7], text[6:12], text[11:12]):
            if not stop or "\ufffd" in stop:
                continue
            (stopped,) = tokens_until(strange, tokenizer, [prompt], ["never", stop], 24)
            assert stopped == tokens[: len(stopped)] and stop in tokenizer.decode(stopped)
            assert stop not in tokenizer.decode(stopped[:-1])
            ends += len(stopped) < 24
    assert ends > 20


def test_rows_that_stop_make_room_and_disturb_nobody(strange, tokenizer):
    prompts = [[1, n] for n in range(259, 299)]
    together = tokens_until(strange, tokenizer, prompts, ("e", "o"), 24, 0.8, 1.0, list(range(40)), batch=6)
    alone = [tokens_until(strange, tokenizer, [p], ("e", "o"), 24, 0.8, 1.0, [n])[0] for n, p in enumerate(prompts)]
    assert together == alone and len(set(map(len, together))) > 3


def test_texts_are_cut_at_every_stop():
    assert cut("one. two.\nthree\n", ["\n", "."]) == cut("one. two.\nthree\n", [".", "\n"]) == "one"
    assert cut("one", ["two"]) == "one" and cut("one", ()) == "one"


def test_the_space_in_front_of_a_continuation_stays(tokenizer, monkeypatch):
    "Which is the indentation of a program."
    prompt, body = "one two\n", "    three\n  four"
    whole = tokenizer.encode(prompt + body, bos=True)
    front = tokenizer.encode(prompt, bos=True)
    assert whole[: len(front)] == front
    monkeypatch.setattr(continuations, "tokens_until", lambda *a, **k: [whole[len(front) :]])
    assert written_until(None, tokenizer, [front], ["\n"]) == ["    three"]
    assert written_until(None, tokenizer, [front]) == [body]
    assert tokenizer.decode(whole[len(front) :]) == body[1:]


def test_an_empty_stop_is_refused(strange, tokenizer):
    with pytest.raises(ValueError, match="a stop is empty"):
        tokens_until(strange, tokenizer, [[1]], ["a", ""])


# ---------- tasks

JSONL = {
    "gsm8k/test.jsonl": [{"question": f"What is {n} and 1?", "answer": f"It is more.\n#### {n + 1}"} for n in range(6)],
    "gsm8k/train.jsonl": [{"question": f"Take {n}.", "answer": f"#### {n}"} for n in range(9)],
    "nq_open/NQ-open.dev.jsonl": [{"question": f"who is {n}", "answer": [f"The Man {n}", f"Mr {n}"]} for n in range(7)],
    "agieval/sat-math.jsonl": [
        {"passage": "P. " if n else None, "question": f"What is {n}?", "options": ["(A)0", "(B)1", "(C)2", "(D)3"],
         "label": "ABCD"[n]} for n in range(4)
    ],
}  # fmt: skip
TRUTH = """Type,Category,Question,Best Answer,Correct Answers,Incorrect Answers,Source
A,Animals,Can pigs fly?,No,"Pigs cannot fly; No",Yes; They can,x
A,Animals,Can cows fly?,Never,Never,"Sometimes; Always; On Sundays",x
"""


@pytest.fixture
def data(tmp_path) -> Path:
    "Small files in the format of each benchmark."
    folder = tmp_path / "data"
    for name, rows in JSONL.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    for name in ("bbh", "truthfulqa"):
        (folder / name).mkdir()
    rows = [{"input": f"Sort: {n} 1", "target": f"1 {n}"} for n in range(2, 5)]
    (folder / "bbh/word_sorting.json").write_text(json.dumps({"canary": "x", "examples": rows}), "utf-8")
    (folder / "truthfulqa/TruthfulQA.csv").write_text(TRUTH, "utf-8")
    return folder


class Knowing(LlamaLM):
    "Answers with what it is told, and keeps what it was asked."

    def __init__(self, tokenizer, *known: str):
        super().__init__(random_model("GQA", vocab_size=tokenizer.vocab_size), tokenizer)
        self.known, self.asked = known, []

    def loglikelihood(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        return [(-1.0 if request.args[1].strip() in self.known else -9.0, False) for request in requests]

    def generate_until(self, requests, disable_tqdm=False):
        self.asked += [request.args for request in requests]
        known = [one.split("|") for one in self.known]
        questions = [request.args[0].rsplit("Q", 1)[1] for request in requests]
        return [next((answer for part, answer in known if part in one), "") for one in questions]


def scored(lm, name: str, folder, **settings) -> dict:
    scores, _ = ask(lm, tasks_of([name], folder, **settings)[name])
    return scores[name] | {key: metric["value"] for key, metric in scores[name]["metrics"].items()}


def test_gsm8k_from_files_is_the_harness_task(data, tokenizer):
    lm = Knowing(tokenizer, "is 2 and|So\n#### 3", "is 3 and|so 4 it is", "is 4 and|#### 6")
    found = scored(lm, "gsm8k", data)
    assert (found["n"], found["shots"]) == (6, 8)
    assert found["exact_match, strict-match"] == pytest.approx(1 / 6)
    assert found["exact_match, flexible-extract"] == pytest.approx(2 / 6)
    error = np.std([1, 0, 0, 0, 0, 0], ddof=1) / 6**0.5
    assert found["metrics"]["exact_match, strict-match"]["stderr"] == pytest.approx(error)
    context, settings = lm.asked[0]
    assert context.endswith("\n\nQuestion: What is 0 and 1?\nAnswer:") and context.count("Question: Take") == 8
    assert "Question:" in settings["until"]


def test_solved_examples_are_never_the_question_itself(data, tokenizer):
    "Where there is no file for training, they come from the other questions."
    for name in "nq_open", "agieval_sat_math":
        lm = Knowing(tokenizer)
        scored(lm, name, data, shots=3)
        for context, _ in lm.asked:
            questions = [part.split("Answer Choices")[0].split("\n")[0] for part in context.split("Q: ")[1:]]
            assert len(set(questions)) == len(questions) == 4, context


def test_nq_takes_any_of_the_right_answers(data, tokenizer):
    lm = Knowing(tokenizer, "is 1?|the man 1", "is 2?|Mr 2", "is 3?|Mr 4")
    found = scored(lm, "nq_open", data)
    assert found["exact_match, remove_whitespace"] == pytest.approx(2 / 7) and found["shots"] == 5
    assert scored(lm, "nq_open", data, shots=0)["shots"] == 0


def test_agieval_has_its_zero_shot_wording_and_solved_examples(data, tokenizer):
    lm = Knowing(tokenizer, "(B)1")
    found = scored(lm, "agieval_sat_math", data, shots=0)
    assert found["acc"] == 1 / 4 and found["n"] == 4
    first = "Q: What is {}? Answer Choices: (A)0 (B)1 (C)2 (D)3\nA: Among A through D, the answer is"
    assert lm.asked[0] == (first.format(0), " (A)0") and lm.asked[4] == ("P. " + first.format(1), " (A)0")
    lm = Knowing(tokenizer)
    assert scored(lm, "agieval_sat_math", data, shots=2)["shots"] == 2
    solved = lm.asked[0][0].split("\n\n")
    assert len(solved) == 3 and all(part[-5:-1] in (" (A)", " (B)", " (C)", " (D)") for part in solved[:2])


def test_bbh_has_the_three_examples_of_the_harness(data, tokenizer):
    lm = Knowing(tokenizer, "Sort: 3 1|1 3", "Sort: 4 1|4 1")
    found = scored(lm, "bbh_fewshot_word_sorting", data)
    assert found["exact_match"] == pytest.approx(1 / 3) and found["shots"] == 3
    assert lm.asked[0][0].count("Sort the following words") == 3


def test_truthfulqa_has_choices(data, tokenizer):
    assert scored(Knowing(tokenizer, "No", "Always"), "truthfulqa_mc1", data)["acc"] == 0.5
    found = scored(Knowing(tokenizer, "Pigs cannot fly", "Never"), "truthfulqa_mc2", data)["acc"]
    e1, e9 = np.exp(-1), np.exp(-9)
    assert found == pytest.approx(((e1 + e9) / (e1 + 3 * e9) + e1 / (e1 + 3 * e9)) / 2)


@pytest.mark.parametrize("file, content, task, expected", [
    ("gsm8k/test.jsonl", '{"question": "a", "answer": "b"}\n{"question": "a"}\n', "gsm8k",
     r"test\.jsonl:2: field 'answer' is None; expected a str"),
    ("gsm8k/test.jsonl", "", "gsm8k", r"test\.jsonl: empty"),
    ("gsm8k/test_2.jsonl", "{}", "gsm8k", r"test\.jsonl, test_2\.jsonl all fit gsm8k/test\*\.jsonl; expected one"),
    ("nq_open/NQ-open.dev.jsonl", "{", "nq_open", r"dev\.jsonl:1: not JSON"),
    ("agieval/sat-math.jsonl", '{"question": "q", "options": ["(A)1", "(B)2"], "label": "C"}', "agieval_sat_math",
     r"sat-math\.jsonl:1: label 'C' of 2 options; expected one"),
    ("bbh/word_sorting.json", '{"examples": [{"input": 1}]}', "bbh_fewshot_word_sorting", "expected JSON with a list"),
    ("bbh/word_sorting.json", '{"examples": []}', "bbh_fewshot_word_sorting", "no examples"),
    ("truthfulqa/TruthfulQA.csv", TRUTH.replace("Best Answer", "Best"), "truthfulqa_mc1", "row 1 lacks a best answer"),
])  # fmt: skip
def test_files_of_another_format_are_refused(data, file, content, task, expected):
    (data / file).write_text(content, "utf-8")
    with pytest.raises(ValueError, match=expected):
        tasks_of([task], data)


def test_shots_that_nobody_solved_are_refused(data, tokenizer):
    with pytest.raises(ValueError, match="truthfulqa_mc1: 5 shots, but it has no solved examples; expected 0"):
        tasks_of(["truthfulqa_mc1"], data, shots=5)
    with pytest.raises(ValueError, match=r"task bbh_fewshot_word_sorting: the harness refuses \(.*exceeds the 3"):
        scored(Knowing(tokenizer), "bbh_fewshot_word_sorting", data, shots=4)


@pytest.mark.parametrize("file, task", [
    ("gsm8k/test_first500.jsonl", "gsm8k"), ("nq_open/NQ-open.dev.jsonl", "nq_open"),
    ("agieval/sat-math.jsonl", "agieval_sat_math"), ("agieval/logiqa-en.jsonl", "agieval_logiqa_en"),
    ("bbh/boolean_expressions.json", "bbh_fewshot_boolean_expressions"),
    ("truthfulqa/TruthfulQA.csv", "truthfulqa_mc2"),
])  # fmt: skip
def test_the_real_files_are_read(file, task):
    path = data_file(file)
    if path is None:
        pytest.skip(f"needs {file} under LLAMA2_DATA")
    found = tasks_of([task], path.parent.parent)[task]["tasks"][task]
    assert len(found.eval_docs) >= 200 and found.doc_to_text(found.eval_docs[0])


def test_every_task_of_a_group_is_one_of_the_harness():
    "By the names in its files; its own index of them takes long."
    import lm_eval

    named = re.compile(r"^(?:task|group|tag): *['\"]?(\w+)", re.M)
    files = Path(lm_eval.__file__).parent.glob("tasks/**/*.yaml")
    known = {name for file in files for name in named.findall(file.read_text("utf-8"))}
    assert {name for names in TASKS.values() for name in names} <= known | {*MINI, *evaluate.CODE}


def test_an_unknown_task_is_named_with_its_neighbours(monkeypatch):
    import lm_eval.tasks

    few = Path(lm_eval.tasks.__file__).parent / "gsm8k"
    small = partial(lm_eval.tasks.TaskManager, include_path=few, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", small)
    with pytest.raises(ValueError, match=r"task 'gsm9k': expected .*commonsense.* near it are gsm8k"):
        tasks_of(["gsm9k"], None)


def test_a_task_whose_questions_cannot_be_had_says_where_they_were_looked_for(tmp_path, monkeypatch):
    import lm_eval.tasks

    class Offline:
        all_tasks = ("gsm8k", "hellaswag")

        def load(self, names):
            raise ConnectionError("no network\nand more")

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Offline)
    reason = r"the harness cannot load it \(ConnectionError: no network\)"
    with pytest.raises(ValueError, match=rf"task gsm8k: no file gsm8k/test\*\.jsonl in {tmp_path}, and {reason}"):
        tasks_of(["gsm8k"], tmp_path)
    with pytest.raises(ValueError, match=rf"task hellaswag: {reason}"):
        tasks_of(["hellaswag"], tmp_path)


def test_mini_questions_have_one_right_choice_and_are_held_out():
    rows = mini_rows(CHOICE, 200, "test")
    taught = {message["content"] for dialog in dialogues(np.random.default_rng(0), 300) for message in dialog}
    assert Counter(row["gold"] for row in rows).keys() == {0, 1, 2, 3}
    assert {row["kind"] for row in rows} == set(CHOICE)
    for row in rows:
        assert [right(row["question"], choice) for choice in row["choices"]] == [n == row["gold"] for n in range(4)]
        assert row["question"] not in taught
    assert rows != mini_rows(CHOICE, 200, "train") and rows == mini_rows(CHOICE, 200, "test")


def test_written_answers_are_read_by_what_they_claim():
    for row in mini_rows(OPEN, 100, "test"):
        task = read_task([{"role": "user", "content": row["question"]}])
        assert task.expected == row["expected"]
        if row["kind"] not in ("list", "copy", "count"):  # their values are lists
            assert right(row["question"], f"{row['expected']}.".capitalize())
        assert not right(row["question"], "") and not right(row["question"], "I do not know.")
    asked = "Where does the mouse live?"
    assert right(asked, "The mouse lives in the hole. It eats cheese.")
    assert not right(asked, "The mouse lives in the barn.")
    assert not right(asked, "The mouse lives in the hole. The mouse lives in the barn.")
    assert not right(asked, "The mouse eats cheese.") and not right(asked, "The cow lives in the hole.")


def test_the_mini_task_counts_right_answers(tokenizer):
    rows = mini_rows(CHOICE, 400, "test")[:10]
    known = [row["choices"][row["gold"]] for row in rows[:4]]
    scores, samples = ask(Knowing(tokenizer, *known), tasks_of(["mini_choice"], None)["mini_choice"], limit=10)
    found = [row["acc"] for row in samples["mini_choice"]]
    assert found[:4] == [1.0] * 4 and scores["mini_choice"]["metrics"]["acc"]["value"] == pytest.approx(np.mean(found))


def test_a_name_that_is_no_task_is_told_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="task 'mini_choices': expected one of mini_choice, mini_open"):
        mini_task("mini_choices")
    with pytest.raises(ValueError, match="task 'apps': expected one of humaneval, mbpp"):
        read_problems("apps", tmp_path)


# ---------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "A checkpoint of the mini world."
    place = tmp_path_factory.mktemp("model") / "base"
    save_checkpoint(mini.base(0), place, mini.tokenizer())
    return place


def test_the_command_scores_writes_and_goes_on(folder, data, tmp_path, capsys, monkeypatch):
    config = EvaluateConfig(folder, "mini, gsm8k", tmp_path / "scores.json", data, shots=0, limit=5, log=True)
    found = run(config)
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines()] == ["task", "mini_choice", "mini_open", "gsm8k", "gsm8k"]
    stored = json.loads((tmp_path / "scores.json").read_text())
    assert {name: task["scores"] for name, task in stored["tasks"].items()} == found
    assert found["mini_choice"]["mini_choice"]["n"] == 5
    rows = [json.loads(line) for line in (tmp_path / "scores.mini_choice.jsonl").open()]
    assert np.mean([row["acc"] for row in rows]) == found["mini_choice"]["mini_choice"]["metrics"]["acc"]["value"]

    asked = []

    def record(lm, unit, *settings):
        asked.append([*unit["tasks"]])
        return ask(lm, unit, *settings)

    monkeypatch.setattr(evaluate, "ask", record)
    more = run(EvaluateConfig(folder, "gsm8k,nq_open", tmp_path / "scores.json", data, shots=0, limit=5))
    assert asked == [["nq_open"]] and more["gsm8k"] == found["gsm8k"]
    assert {*json.loads((tmp_path / "scores.json").read_text())["tasks"]} == {*MINI, "gsm8k", "nq_open"}
    with pytest.raises(ValueError, match=r"json was made with limit 5, now 6: expected the same, or another --out"):
        run(EvaluateConfig(folder, "gsm8k", tmp_path / "scores.json", data, shots=0, limit=6))


def test_a_chat_model_is_asked_in_the_chat_format(folder, tmp_path, monkeypatch):
    asked, encode = [], LlamaLM.tok_encode

    def record(self, text, **settings):
        asked.append(text)
        return encode(self, text, **settings)

    monkeypatch.setattr(LlamaLM, "tok_encode", record)
    run(EvaluateConfig(folder, "mini", tmp_path / "scores.json", shots=1, limit=3, chat=True))
    assert asked and all(text.startswith("\x02[INST] ") and text.count("[/INST]") == 2 for text in asked)


PROGRAMS = [
    {"task_id": f"HumanEval/{n}", "prompt": f"def f{n}():\n", "entry_point": f"f{n}",
     "test": f"def check(candidate):\n    assert candidate() == {n}\n"} for n in range(3)
]  # fmt: skip


def test_programs_of_a_model_are_run_and_counted(folder, tmp_path, monkeypatch):
    "pass@1 at a temperature of 0.1, pass@100 at 0.8 from 100 samples on, top-p 0.95."
    (tmp_path / "humaneval").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in PROGRAMS)
    (tmp_path / "humaneval/HumanEval.jsonl").write_text(text, "utf-8")
    calls, words = [], mini.tokenizer()

    def planted(model, tokenizer, prompts, until, seeds, **settings):
        calls.append((len(prompts), settings["temperature"], settings["top_p"], len(set(seeds))))
        assert "\ndef" in until
        places = Counter()
        texts = []
        for prompt in prompts:
            n = int(words.decode(prompt)[5])
            places[n] += 1
            texts.append(f"    return {n if places[n] <= (0, 1, 100)[n] else 9}\n")
        return texts

    monkeypatch.setattr(evaluate, "written_until", planted)
    found = run(EvaluateConfig(folder, "humaneval", tmp_path / "a.json", tmp_path, samples=4, log=True))["humaneval"]
    metrics = found["humaneval"]["metrics"]
    assert metrics.keys() == {"pass@1"} and metrics["pass@1"]["value"] == pytest.approx((0 + 1 / 4 + 1) / 3)
    rows = [json.loads(line) for line in (tmp_path / "a.humaneval.jsonl").open()]
    assert [row["passed of 4 at temperature 0.1"] for row in rows] == [0, 1, 4]
    found = run(EvaluateConfig(folder, "humaneval", tmp_path / "b.json", tmp_path, samples=200, limit=2))["humaneval"]
    assert found["humaneval"]["metrics"]["pass@100"]["value"] == pytest.approx(1 / 4)
    assert calls == [(12, 0.1, 0.95, 12), (400, 0.1, 0.95, 400), (400, 0.8, 0.95, 400)]


def test_a_model_writes_programs_of_its_own(folder, tmp_path):
    "Through its tokenizer and sampler, to the end; a model of the mini world solves nothing."
    (tmp_path / "mbpp").mkdir()
    rows = [{"task_id": n, "text": "Add.", "code": "x = 1", "test_list": ["assert x == 1"]} for n in (2, 3, 4, 11, 12)]
    (tmp_path / "mbpp/mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = run(EvaluateConfig(folder, "mbpp", tmp_path / "a.json", tmp_path, samples=2))["mbpp"]["mbpp"]
    assert found == {"n": 2, "shots": 3, "metrics": {"pass@1": {"value": 0.0, "stderr": 0.0}}}


@pytest.mark.parametrize("settings, expected", [
    ({"tasks": " , "}, "expected names, and positive numbers"),
    ({"tasks": "mini", "limit": 0}, "limit 0, samples 1: expected names"),
    ({"tasks": "humaneval", "data": Path("/nowhere")}, "/nowhere: no such folder"),
    ({"tasks": "mini,mbpp", "chat": True}, "task mbpp: a model continues its programs.* expected no --chat"),
    ({"tasks": "humaneval", "shots": 2}, r"no humaneval/HumanEval\*\.jsonl\* in"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused_before_the_model_is_read(data, tmp_path, settings, expected):
    config = {"data": data, "out": tmp_path / "scores.json", "model": Path("/no/model")} | settings
    with pytest.raises(ValueError, match=expected):
        run(EvaluateConfig(**config))


def test_a_file_of_something_else_is_not_overwritten(folder, tmp_path):
    for content in ("{", "[1]", '{"scores": 1}'):
        (tmp_path / "notes.json").write_text(content)
        with pytest.raises(ValueError, match=r"notes\.json: no scores of this command; expected another --out"):
            run(EvaluateConfig(folder, "mini", tmp_path / "notes.json"))


def test_two_processes_are_one(folder, data, tmp_path):
    options = ["--model", folder, "--tasks", "mini,nq_open", "--data", data, "--shots", 1, "--limit", 7]
    shown = torchrun("--standalone", "--nproc-per-node=2", "-m", "llama2lib.evaluate", *options, "--out",
                     tmp_path / "two.json", LLAMA2_SCALE="smoke")  # fmt: skip
    assert shown.count("mini_choice") == 1
    run(EvaluateConfig(folder, "mini,nq_open", tmp_path / "one.json", data, shots=1, limit=7))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text())["tasks"] for name in ("one", "two"))
    assert one == two


def test_the_command_explains_itself_and_an_error_is_one_line(tmp_path):
    command = [sys.executable, "-m", "llama2lib.evaluate"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert "--shots" in helped.stdout and "as many as in the paper" in " ".join(helped.stdout.replace("│", "").split())
    options = ["--model", tmp_path, "--tasks", "mini", "--out", tmp_path / "scores.json"]
    failed = subprocess.run([*command, *map(str, options)], capture_output=True, text=True)
    assert failed.returncode == 1 and "no checkpoint among" in failed.stderr and "Traceback" not in failed.stderr
