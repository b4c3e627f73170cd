"""A tool in the middle of an answer: its result takes the place of the model's guess."""

import pytest
import torch
from conftest import random_model

from llama2lib import tools
from llama2lib.generation import Completion
from llama2lib.tokenizer import train_tokenizer
from llama2lib.tools import answer_with, calculate


def test_sums_are_calculated():
    for text, value in (
        ("12 + 30", "42"),
        ("2 - 5", "-3"),
        ("6 * 7", "42"),
        ("1 / 4", "0.25"),
        ("-(2 + 3) * 2", "-10"),
        ("8 / 2", "4"),
        ("2469134 / 2", "1234567"),
        ("1000000 * 1.0", "1000000"),
        ("0.1 + 0.2", "0.3"),
        ("1234567 / 2", "617283.5"),
    ):
        assert calculate(text) == value


@pytest.mark.parametrize(
    "text", ["", "a + 1", "2 ** 8", "__import__('os')", "1 / 0", "True + 1", "1,2", "(" * 300 + ")" * 300,
             "9" * 400 + " / 3", "9" * 400 + " * 1.5", "1e400 - 1e400", "1e300 * 1e300"],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(ValueError, match=r"expected numbers|cannot be calculated|too large"):
        calculate(text)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    texts = ["calc(1 + 2) = 3. The sum is 9. [INST] [/INST]", "calc(4 * 5) = 7. What is 0 + 6 - 8?"] * 50
    return train_tokenizer(texts, 320, tmp_path_factory.mktemp("words") / "tokenizer.model")


def scripted(words, continuations):
    "A `generate` that goes on with the text that belongs to the end of the prompt."
    asked = []

    def generate(model, prompts, max_new_tokens, temperature, eos_id):
        assert temperature == 0
        found = []
        for prompt in prompts:
            text = words.decode(prompt)
            asked.append(text)
            end = next(end for end in continuations if text.endswith(end))
            found.append(Completion([*words.encode(continuations[end]), words.eos_id], [], True))
        return found

    return generate, asked


def test_the_result_takes_the_place_of_the_guess(words, monkeypatch):
    generate, asked = scripted(words, {
        "[/INST]": "calc(1 + 2) = 7. The sum is 7.", "= 3.": "The sum is 3. calc(4 * 5) = 1.", "= 20.": "And 20.",
    })  # fmt: skip
    monkeypatch.setattr(tools, "generate", generate)
    [reply] = answer_with(None, words, [[{"role": "user", "content": "What is 1 + 2?"}]], 32)
    assert reply.text == "calc(1 + 2) = 3. The sum is 3. calc(4 * 5) = 20. And 20." and reply.finished
    assert len(asked) == 3 and asked[1].endswith("[/INST] calc(1 + 2) = 3.")


def test_calls_that_the_tool_refuses_keep_the_guess(words, monkeypatch):
    generate, _ = scripted(words, {"[/INST]": "calc(1 / 0) = 7. The sum is 7."})
    monkeypatch.setattr(tools, "generate", generate)
    [reply] = answer_with(None, words, [[{"role": "user", "content": "What is 1?"}]], 32)
    assert reply.text == "calc(1 / 0) = 7. The sum is 7."


def test_calls_end(words, monkeypatch):
    generate, asked = scripted(words, {"[/INST]": "calc(1 + 2) = 7.", "= 3.": "calc(1 + 2) = 7."})
    monkeypatch.setattr(tools, "generate", generate)
    [reply] = answer_with(None, words, [[{"role": "user", "content": "What is 1?"}]], 32, calls=2)
    assert len(asked) == 3 and reply.text.count("calc") == 3 and reply.text.count("= 3.") == 2


def test_without_a_call_it_is_an_answer(words):
    "Greedy, as `respond`; dialogs do not depend on their neighbours."
    from llama2lib.chat import respond

    torch.manual_seed(0)
    model = random_model("MHA", vocab_size=words.vocab_size)
    dialogs = [[{"role": "user", "content": text}] for text in ("What is 1?", "The sum is 9. What is 4?")]
    assert answer_with(model, words, dialogs, 8) == respond(model, words, dialogs, 8)
