"""Meta's chat format: token for token, masks on the answers alone, and nothing in a message can pass for a bracket."""

import json
from itertools import groupby
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llama2lib.dialog import TAGS, check_dialog, decode_answer, encode_dialog, read_dialogs, write_dialogs
from llama2lib.recipes import data_file
from llama2lib.tokenizer import Tokenizer, train_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog [INST] 1024 times [/INST]\n", "a naïve café — 3.14\n" * 3] * 20


@pytest.fixture(scope="module", params=["small", "packaged", "real"])
def tokenizer(request, tmp_path_factory):
    if request.param == "small":
        return train_tokenizer(TEXT, 350, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")
    if request.param == "packaged":  # Mistral's first tokenizer has Llama 2's format
        package = pytest.importorskip("mistral_common", reason="needs mistral-common (extra 'test')")
        return Tokenizer(Path(package.__file__).parent / "data" / "tokenizer.model.v1")
    file = data_file("llama2-tokenizer/tokenizer.model")
    if file is None:
        pytest.skip("needs llama2-tokenizer/tokenizer.model under LLAMA2_DATA")
    return Tokenizer(file)


def dialog(*contents: str, system: str | None = None) -> list[dict]:
    head = [] if system is None else [{"role": "system", "content": system}]
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


contents = st.text(st.sampled_from(" \n\t[]/<>INSTY\u2581é🦙a1") | st.characters(codec="utf-8")).filter(
    lambda text: not any(tag in text for tag in TAGS)
)
dialogs = st.builds(
    lambda turns, system: dialog(*turns, system=system),
    st.lists(contents, min_size=1, max_size=5),
    st.none() | contents,
)


def spans(mask: list[int]) -> list[tuple[int, int]]:
    "Begin and end of every run of ones."
    ends, place = [], 0
    for value, run in groupby(mask):
        length = len(list(run))
        ends += [(place, place + length)] * (value == 1)
        place += length
    return ends


@settings(max_examples=150, deadline=None)
@given(messages=dialogs)
@example(messages=dialog("hi", ""))
@example(messages=dialog("", " \n ", "  x  ", " y "))
@example(messages=dialog("hi", "\u2581", "", "]", system=""))
@example(messages=dialog("hi [", "/INST] ", system=" <<SYS> "))
def test_the_mask_is_on_answers_their_last_space_and_eos(tokenizer, messages):
    tokens, mask = encode_dialog(tokenizer, messages)
    answers = [message["content"] for message in messages if message["role"] == "assistant"]
    found = spans(mask)
    assert len(tokens) == len(mask) and set(mask) <= {0, 1} and len(found) == len(answers)
    for number, ((begin, end), answer) in enumerate(zip(found, answers, strict=True)):
        # begin: where a model goes on that is given the conversation up to here, for no token of the prompt differs
        place = [i for i, m in enumerate(messages) if m["role"] == "assistant"][number]
        assert encode_dialog(tokenizer, messages[:place])[0] == tokens[:begin]
        # end: EOS, and behind it the next pair or nothing
        assert tokens[end - 1] == tokenizer.eos_id and tokenizer.eos_id not in tokens[begin : end - 1]
        assert end == len(tokens) or tokens[end] == tokenizer.bos_id
        # between: the answer with a space on both sides, and no more
        assert tokenizer.decode([tokenizer.bos_id, *tokens[begin : end - 1]]) == f"{answer.strip()} "
        assert decode_answer(tokenizer, tokens[begin:end]) == answer.strip()
        assert decode_answer(tokenizer, tokens[begin:]) == answer.strip()
    last_is_prompt = messages[-1]["role"] == "user"
    assert (tokens[-1] == tokenizer.eos_id) != last_is_prompt and mask[-1] == (not last_is_prompt)
    assert tokens.count(tokenizer.bos_id) == sum(m["role"] == "user" for m in messages)
    assert tokens.count(tokenizer.eos_id) == len(answers)


@settings(max_examples=100, deadline=None)
@given(messages=dialogs)
def test_tokens_are_those_of_a_plain_reading_of_the_format(tokenizer, messages):
    "Written from Meta's public description, on SentencePiece itself; nothing of `encode_dialog` but the file."
    assume(not any("\u2581" in message["content"] for message in messages))  # SentencePiece takes it for a space
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    rest, opening, expected = list(messages), "", []
    if rest[0]["role"] == "system":
        opening = "<<SYS>>\n" + rest.pop(0)["content"] + "\n<</SYS>>\n\n"
    while rest:
        question, opening = (opening + rest.pop(0)["content"]).strip(), ""
        text = "[INST] " + question + " [/INST]"
        if not rest:
            expected += [1, *reference.encode(text)]
            break
        expected += [1, *reference.encode(text + " " + rest.pop(0)["content"].strip() + " "), 2]
    assert encode_dialog(tokenizer, messages)[0] == expected


def test_no_piece_reaches_over_a_space(tokenizer):
    "Why the tokens of a prompt are the first tokens of its pair for every text."
    pieces = tokenizer.pieces(range(tokenizer.vocab_size))
    assert not [piece for piece in pieces if "\u2581" in piece.lstrip("\u2581")]


def test_a_tokenizer_whose_pieces_reach_over_the_border_is_refused(tmp_path):
    "Pieces across spaces: ']' and the space behind it become one, and no token is the answer's first."
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["[INST] hi [/INST] so "] * 50), model_prefix=str(tmp_path / "t"), model_type="bpe",
        vocab_size=310, byte_fallback=True, split_by_whitespace=False, split_by_unicode_script=False,
        normalization_rule_name="identity", remove_extra_whitespaces=False, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "t.model")
    assert any("\u2581" in piece.lstrip("\u2581") for piece in tokenizer.pieces(range(tokenizer.vocab_size)))
    with pytest.raises(ValueError, match=r"t\.model: a piece reaches over the end of a prompt, '.*hi \[/INST\]'"):
        encode_dialog(tokenizer, dialog("hi", "so"))


TEMPLATE = """
{%- set ns = namespace(system='') -%}
{%- for m in messages -%}
{%- if m['role'] == 'system' -%}{%- set ns.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' -%}
{%- elif m['role'] == 'user' -%}
{{- '<s>' + '[INST] ' + (ns.system + m['content']).strip() + ' [/INST]' -}}{%- set ns.system = '' -%}
{%- else -%}{{- ' ' + m['content'].strip() + ' </s>' -}}{%- endif -%}
{%- endfor -%}
"""


@pytest.mark.parametrize(
    "messages",
    [
        dialog("Hello"),
        dialog("Hello", "Hi! How are you?"),
        dialog("Who wrote Emma?", "Jane Austen.", "When?", "In 1815.", "Thanks", system="You are brief."),
        dialog("Σ naïve 🦙\ntwo lines", "```python\nx = 1\n```", " what?\n", " 12345 "),
    ],
)
def test_transformers_gives_the_same_tokens(real_tokenizer_file, messages):
    """Hugging Face's tokenizer, read from Meta's file, with a chat template: an implementation without SentencePiece.

    No runs of spaces: of two ways to merge those, equally good, it takes the other one than Meta's SentencePiece.
    """
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra 'hub')")
    theirs = transformers.LlamaTokenizer.from_pretrained(str(real_tokenizer_file.parent), legacy=True)
    theirs.chat_template = TEMPLATE
    text = theirs.apply_chat_template(messages, tokenize=False)
    assert text.count("<s>") == sum(m["role"] == "user" for m in messages)
    expected = theirs(text, add_special_tokens=False).input_ids
    assert encode_dialog(Tokenizer(real_tokenizer_file), messages)[0] == expected


def test_the_documented_pieces_of_metas_tokenizer(real_tokenizer_file):
    tokenizer = Tokenizer(real_tokenizer_file)
    tokens, mask = encode_dialog(tokenizer, dialog("Hello", "Hi"))
    assert tokenizer.pieces(tokens) == "<s> ▁[ INST ] ▁Hello ▁[ / INST ] ▁Hi ▁ </s>".split()
    assert mask == [0] * 9 + [1] * 3


GOOD = dialog("hi", "hello", "bye", "so long", system="Be kind.")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no user message; expected at least one"),
        (GOOD[:1], "no user message; expected at least one"),
        (GOOD[2:], "message 0: assistant first; expected system or user"),
        (GOOD[:1] + GOOD[2:], "message 1: assistant behind the system message; expected user"),
        (GOOD[:2] + GOOD[1:], "message 2: user behind the user message; expected assistant"),
        (GOOD[:3] + GOOD[2:], "message 3: assistant behind the assistant message; expected user"),
        (GOOD[1:3] + GOOD, "message 2: system behind the assistant message; expected user"),
        (GOOD[:1] + GOOD, "message 1: system behind the system message; expected user"),
        ([{"role": "human", "content": "hi"}], "message 0: unknown role 'human'"),
        ([{"role": ["user"], "content": "hi"}], "message 0: unknown role ['user']"),
        ([{"content": "hi"}], "message 0: unknown role None"),
        ([*GOOD[:2], {"role": "assistant"}], "message 2: expected 'content' to be a string, found None"),
        ([{"role": "user", "content": 7}], "message 0: expected 'content' to be a string, found 7"),
        (["hi"], "message 0: expected an object with 'role' and 'content', found 'hi'"),
        (dialog("hi", "ab\ud800"), "message 1: character 2 is half a surrogate pair"),
    ],
)
def test_what_the_format_cannot_express_is_refused_with_the_message(tokenizer, messages, reason):
    for refuse in (check_dialog, lambda found: encode_dialog(tokenizer, found)):
        with pytest.raises(ValueError) as error:
            refuse(messages)
        assert str(error.value).startswith(reason)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_no_message_can_hold_a_bracket_of_the_format(tokenizer, tag, place):
    messages = [dict(message) for message in GOOD]
    messages[place]["content"] += f"x{tag}x"
    with pytest.raises(ValueError, match=f"message {place}: ") as error:
        encode_dialog(tokenizer, messages)
    assert tag in str(error.value)


@settings(max_examples=50, deadline=None)
@given(found=st.lists(dialogs, min_size=1, max_size=4))
@example(found=[dialog("a\u2028b\x85c\rd\n", "\\ \"")])
def test_conversations_survive_the_way_to_disk_and_back(tmp_path_factory, found):
    path = tmp_path_factory.mktemp("dialogs") / "d.jsonl"
    write_dialogs(path, found)
    assert read_dialogs(path) == found and len(path.read_bytes().splitlines()) >= len(found)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b'["hi"]', "expected an object with a list in the field 'messages'"),
        (b'{"messages": "hi"}', "expected an object with a list in the field 'messages'"),
        (b'{"messages": []}', "no user message"),
        (b'{"messages": [{"role": "user", "content": "hi [INST]"}]}', r"message 0: \[INST\]"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "byte 43 is not UTF-8 text"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "message 0: character 0"),
    ],
)
def test_a_bad_line_stops_with_file_and_line(tmp_path, line, reason):
    path, good = tmp_path / "d.jsonl", json.dumps({"messages": GOOD}).encode()
    path.write_bytes(b"\n".join([good, line, good]))
    with pytest.raises(ValueError, match=rf"d\.jsonl:2: .*{reason}"):
        read_dialogs(path)


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "d.jsonl").touch()
    with pytest.raises(ValueError, match=r"d\.jsonl: no conversations"):
        read_dialogs(tmp_path / "d.jsonl")


def test_a_bad_conversation_leaves_the_old_file(tmp_path):
    path = tmp_path / "d.jsonl"
    write_dialogs(path, [GOOD])
    with pytest.raises(ValueError, match="conversation 1: message 0: unknown role"):
        write_dialogs(path, [GOOD, [{"role": "bot", "content": "hi"}]])
    assert read_dialogs(path) == [GOOD] and [file.name for file in tmp_path.iterdir()] == ["d.jsonl"]
