"""The chat: what the model is given, what the user sees, what is forgotten, and how a reply is stopped."""

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import random_model
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llama2lib import chat as chat_module
from llama2lib.chat import Chat, check_room, fit, needed, print_reply, respond, talk, text_of
from llama2lib.checkpoint import save_checkpoint
from llama2lib.dialog import TAGS, decode_answer, encode_dialog
from llama2lib.generation import generate
from llama2lib.model import LLAMA2
from llama2lib.tokenizer import train_tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog 1024 times\n", "a naïve café — 3.14\n" * 3] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_tokenizer(TEXT, 330, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def model(tokenizer):
    return random_model(vocab_size=tokenizer.vocab_size, max_seq_len=512)


@pytest.fixture
def scripted(monkeypatch, tokenizer):
    "Replies of the model, in order, in the place of its own; the prompts it is given are kept."
    prompts, replies = [], []

    def stream(model, prompt, max_new_tokens, temperature, top_p, seed, eos_id):
        prompts.append(prompt)
        yield from tokenizer.encode(replies[len(prompts) - 1], eos=True)[:max_new_tokens]

    monkeypatch.setattr(chat_module, "stream", stream)
    return prompts, replies


def turns(*contents: str, system: str = "") -> list[dict]:
    head = [{"role": "system", "content": system}] if system else []
    return head + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


# ---------- the text of a reply


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from(" \n[]/<>INSTY\u2581é🦙a1") | st.characters(codec="utf-8"), max_size=40))
@example(text="see [INS")
@example(text="🦙🦙")
@example(text="a [/INST")
def test_pieces_of_a_reply_are_its_text_up_to_a_tag(tokenizer, text):
    tokens = tokenizer.encode(text, eos=True)
    whole = decode_answer(tokenizer, tokens)
    places = [whole.index(tag) for tag in TAGS if tag in whole]
    expected = whole[: min(places)].rstrip() if places else whole
    assert "".join(text_of(tokenizer, tokens)) == expected


def test_what_is_shown_is_never_taken_back(tokenizer):
    "Half a character, or half a tag, is not shown before it is sure."
    tokens = tokenizer.encode("fox 🦙 dog [INST] times")
    for end in range(len(tokens)):
        pieces = list(text_of(tokenizer, tokens[:end]))
        assert "fox 🦙 dog".startswith("".join(pieces[:-1]))
    pieces = []
    for piece in text_of(tokenizer, iter(tokens)):
        pieces.append(piece)
        assert "\ufffd" not in piece and "[" not in piece
    assert len(pieces) >= 3 and "".join(pieces) == "fox 🦙 dog"


def test_a_reply_is_read_no_further_than_its_end(tokenizer):
    def tokens():
        yield from tokenizer.encode("fox [/INST]")
        raise AssertionError("read on behind a tag")

    assert "".join(text_of(tokenizer, tokens())) == "fox"


# ---------- the conversation


def test_the_model_is_given_the_whole_conversation(tokenizer, model, scripted):
    prompts, replies = scripted
    replies += [" the fox ", "", "dog"]
    chat = Chat(model, tokenizer, system="be brief")
    assert "".join(chat.reply("who jumps?")) == "the fox" and chat.finished
    assert "".join(chat.reply("over whom?")) == "" and chat.finished
    list(chat.reply("over whom?"))
    expected = turns("who jumps?", "the fox", "over whom?", "", "over whom?", "dog", system="be brief")
    assert chat.messages == expected
    assert prompts == [encode_dialog(tokenizer, expected[:end])[0] for end in (2, 4, 6)]
    chat.begin()
    assert chat.messages == []


def test_a_reply_is_what_generate_gives(tokenizer, model):
    chat = Chat(model, tokenizer, temperature=0.7, top_p=0.8, max_new_tokens=20, seed=5)
    prompt, _ = encode_dialog(tokenizer, turns("who jumps?"))
    [made] = generate(model, [prompt], 20, temperature=0.7, top_p=0.8, seed=5, eos_id=tokenizer.eos_id)
    assert "".join(chat.reply("who jumps?")) == "".join(text_of(tokenizer, made.tokens))
    assert chat.finished is made.finished


def test_the_oldest_turns_go_when_the_context_is_full(tokenizer, model, scripted):
    prompts, replies = scripted
    replies += ["the lazy dog"] * 12
    chat = Chat(model, tokenizer, system="be brief", max_new_tokens=300)
    dropped = []
    for number in range(12):
        list(chat.reply(f"{number} times"))
        dropped.append(chat.dropped)
        assert chat.messages[0] == {"role": "system", "content": "be brief"}
        assert len(prompts[-1]) + 300 <= model.config.max_seq_len
        assert prompts[-1] == encode_dialog(tokenizer, chat.messages[:-1])[0]
        assert chat.messages[-2]["content"] == f"{number} times"
    assert dropped[0] == 0 and sum(dropped) > 5 and set(dropped) <= {0, 1}
    assert [m["role"] for m in chat.messages[1:]] == ["user", "assistant"] * (len(chat.messages) // 2)


def test_no_more_is_dropped_than_has_to_be(tokenizer):
    messages = turns("a", "b", "c", "d", "e", system="be brief")
    for kept in (5, 3, 1):
        left = [messages[0], *messages[-kept:]]
        size = len(encode_dialog(tokenizer, left)[0])
        assert fit(tokenizer, messages, size) == (encode_dialog(tokenizer, left)[0], (5 - kept) // 2)
    with pytest.raises(ValueError, match=rf"{size} tokens in the last message alone: expected at most {size - 1}"):
        fit(tokenizer, messages, size - 1)


def test_a_refused_message_changes_nothing(tokenizer, model, scripted):
    scripted[1].append("fox")
    chat = Chat(model, tokenizer, max_new_tokens=300)
    list(chat.reply("who jumps?"))
    before = list(chat.messages)
    for text, reason in (("x [/INST] y", "belongs to the chat format"), ("dog " * 300, "in the last message alone")):
        with pytest.raises(ValueError, match=reason):
            list(chat.reply(text))
        assert chat.messages == before
    with pytest.raises(ValueError, match="max_new_tokens 512"):
        Chat(model, tokenizer, max_new_tokens=512)


def test_a_stopped_reply_stays_as_far_as_it_got(tokenizer, model, scripted):
    scripted[1].extend(["the quick brown fox", "dog", "the quick brown fox"])
    chat = Chat(model, tokenizer)
    with contextlib.closing(chat.reply("who?")) as pieces:
        said = next(pieces) + next(pieces)
    assert chat.messages == turns("who?", said) and not chat.finished
    list(chat.reply("whom?"))
    assert chat.messages == turns("who?", said, "whom?", "dog") and chat.finished
    chat.max_new_tokens = 3
    list(chat.reply("again?"))
    assert not chat.finished and len(chat.messages) == 6


def test_a_reply_stopped_before_it_began_leaves_no_trace(tokenizer, model, monkeypatch):
    def stream(*_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(chat_module, "stream", stream)
    chat = Chat(model, tokenizer)
    with pytest.raises(KeyboardInterrupt):
        list(chat.reply("who?"))
    assert chat.messages == []


def test_a_reply_that_speaks_for_the_user_can_be_followed_up(tokenizer, model, scripted):
    scripted[1].extend(["fox [INST] and I obey", "dog"])
    chat = Chat(model, tokenizer)
    list(chat.reply("who?"))
    list(chat.reply("whom?"))
    assert chat.messages == turns("who?", "fox", "whom?", "dog")


def test_an_answer_ends_at_eos_and_says_so(tokenizer, model):
    dialog = turns("who jumps?")
    [long] = respond(model, tokenizer, [dialog], 12)
    with torch.no_grad():
        model.output.weight[tokenizer.eos_id] = 10 * model.output.weight.abs().max()
        model.norm.weight.fill_(1)
        model.tok_embeddings.weight[:, 0], model.output.weight[tokenizer.eos_id, 1:] = 50, 0
    [short] = respond(model, tokenizer, [dialog], 12)
    assert not long.finished and short == ("", True)


def test_many_conversations_are_answered_as_one_by_one(tokenizer, model):
    dialogs = [turns("who jumps?"), turns("fox", "dog", "1024 times?"), turns("a", system="be brief")]
    together = respond(model, tokenizer, dialogs, 12)
    assert together == [respond(model, tokenizer, [messages], 12)[0] for messages in dialogs]
    sampled = respond(model, tokenizer, dialogs, 12, temperature=1.0, num_samples=2)
    assert len(sampled) == 6 and len({reply.text for reply in sampled}) > 3
    made = generate(model, [encode_dialog(tokenizer, d)[0] for d in dialogs], 12, 0.0, eos_id=tokenizer.eos_id)
    assert [(decode_answer(tokenizer, c.tokens), c.finished) for c in made] == together


# ---------- the terminal


def test_the_terminal_says_what_happens(tokenizer, model, scripted, monkeypatch, capsys):
    scripted[1].extend(["the fox", "the quick brown fox", "dog", "cat"])
    lines = iter(["", "who?", "/system be brief", "who?", "x [INST]", "/new", "/huh", "whom?"])

    def read(_):
        with contextlib.suppress(StopIteration):
            return next(lines)
        raise EOFError

    monkeypatch.setattr("builtins.input", read)
    chat = Chat(model, tokenizer)
    talk(chat)
    shown = capsys.readouterr().out.split("\n")
    assert shown[1:3] == ["the fox", "a new conversation, with a system message"]
    assert shown[3] == "the quick brown fox" and shown[4].startswith("not sent: ") and "[INST]" in shown[4]
    assert shown[5] == "a new conversation" and shown[6] == shown[0] and shown[7] == "dog"
    assert chat.messages == turns("whom?", "dog")
    chat.max_new_tokens = 1
    print_reply(chat, "again?")
    assert "cut off after 1 tokens" in capsys.readouterr().out


def test_the_terminal_says_that_turns_are_forgotten(tokenizer, model, scripted, capsys):
    scripted[1].extend(["the lazy dog"] * 12)
    chat = Chat(model, tokenizer, max_new_tokens=300)
    for number in range(12):
        print_reply(chat, f"{number} times")
        assert ("forgotten" in capsys.readouterr().out) is bool(chat.dropped)
    assert chat.dropped


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    "A model that talks without end."
    path, model = tmp_path_factory.mktemp("chat") / "model", random_model(vocab_size=330, max_seq_len=4096)
    with torch.no_grad():
        model.output.weight[tokenizer.eos_id] = 0
    save_checkpoint(model, path, tokenizer=tokenizer)
    return path


def test_python_m_chat_reads_a_pipe(folder):
    command = [sys.executable, "-m", "llama2lib.chat", "--model", folder, "--max-new-tokens", "5"]
    run = subprocess.run([*command], input="who?\nwhom?\n", capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("cut off after 5 tokens") == 2
    assert run.stdout.index("parameters of 4 bytes: 0.0 GB") < run.stdout.index("Ctrl-C")
    missing = subprocess.run([*command[:4], folder / "none"], capture_output=True, text=True, timeout=120)
    assert missing.returncode == 1 and "none" in missing.stderr and "Traceback" not in missing.stderr


def test_the_memory_that_a_model_needs_is_told_before_it_is_loaded(capsys):
    "Llama 2 70B by its card: 69 billion parameters, eight key/value heads of 128 in each of 80 layers."
    model = LLAMA2["70B"]
    assert needed(model, torch.bfloat16) == (2 * model.num_params, 4096 * 80 * 2 * 8 * 128 * 2)
    check_room(LLAMA2["debug"], torch.float32, torch.device("cpu"))
    assert "parameters of 4 bytes" in capsys.readouterr().out
    deep = replace(model, n_layers=10**5)  # hundreds of terabytes
    with pytest.raises(ValueError, match=r"do not fit into .* GB of memory; --dtype bf16 takes half"):
        check_room(deep, torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"GB of memory$"):
        check_room(deep, torch.bfloat16, torch.device("cpu"))


def test_ctrl_c_stops_a_reply_and_not_the_chat(folder):
    main, terminal = pty.openpty()
    # a background job of a shell is born deaf to SIGINT, and passes that on
    code = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "runpy.run_module('llama2lib.chat', run_name='__main__')"
    command = [sys.executable, "-c", code, "--model", folder, "--max-new-tokens", "3000"]
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    seen = ""

    def until(what, seconds=120):
        nonlocal seen
        end = time.monotonic() + seconds
        while what not in seen:
            assert time.monotonic() < end, f"no {what!r} in {seen!r}"
            if select.select([main], [], [], 0.1)[0]:
                seen += os.read(main, 4096).decode(errors="replace")
        before, _, seen = seen.partition(what)
        return before

    try:
        until("\n> ")
        for message in (b"who?\n", b"whom?\n"):
            os.write(main, message)
            until("?\r\n")
            while len(seen) < 50:
                seen += os.read(main, 4096).decode(errors="replace")
            process.send_signal(signal.SIGINT)
            until("(stopped)")
            until("\n> ")
        os.write(main, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        os.close(main)


# ---------- the notebook


def test_the_widget_does_the_same(tokenizer, model, scripted):
    widgets = pytest.importorskip("ipywidgets", reason="needs ipywidgets (extra 'notebook')")
    scripted[1].extend(["the <b>fox</b>", "dog", "cat"])
    chat = Chat(model, tokenizer)
    box = chat_module.widget(chat)
    shown, row, system = box.children
    line, send, _, new = row.children
    assert isinstance(shown, widgets.HTML)

    def finished():
        end = time.monotonic() + 60
        while send.disabled:
            assert time.monotonic() < end
            time.sleep(0.01)

    line.value = "who?"
    send.click()
    finished()
    assert line.value == "" and chat.messages == turns("who?", "the <b>fox</b>")
    assert "the &lt;b&gt;fox&lt;/b&gt;" in shown.value
    line.value = "x [INST]"
    send.click()
    finished()
    assert "not sent" in shown.value and len(chat.messages) == 2
    system.value = "be brief"
    new.click()
    assert chat.messages == [{"role": "system", "content": "be brief"}]
    line.value = "whom?"
    line._handle_custom_msg({"event": "submit"}, [])
    finished()
    assert chat.messages == turns("whom?", "dog", system="be brief")


def test_stop_ends_a_reply_of_the_widget(tokenizer, model, monkeypatch):
    pytest.importorskip("ipywidgets", reason="needs ipywidgets (extra 'notebook')")

    def stream(*_):
        while True:
            time.sleep(0.01)
            yield from tokenizer.encode("fox")

    monkeypatch.setattr(chat_module, "stream", stream)
    chat = Chat(model, tokenizer)
    shown, row, _ = chat_module.widget(chat).children
    line, send, stop, _ = row.children
    line.value = "who?"
    send.click()
    end = time.monotonic() + 60
    while "fox fox" not in shown.value:
        assert time.monotonic() < end
        time.sleep(0.01)
    stop.click()
    while send.disabled:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert "stopped" in shown.value and chat.messages[-1]["content"].startswith("fox fox")
