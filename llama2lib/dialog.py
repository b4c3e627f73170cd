"""Generated from chapters/03_sft.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Message",
    "TAGS",
    "FOLLOWERS",
    "check_dialog",
    "encode_dialog",
    "decode_answer",
    "read_dialogs",
    "write_dialogs",
]


# ---------- chapters/03_sft.py · The chat format

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence

from llama2lib.corpus import records
from llama2lib.recipes import write_atomic
from llama2lib.tokenizer import Tokenizer

Message = Mapping[str, str]  # {"role": "system", "user" or "assistant", "content": text}

TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
FOLLOWERS = {None: ("system", "user"), "system": ("user",), "user": ("assistant",), "assistant": ("user",)}


def check_dialog(messages: Sequence[Message]):
    """ValueError, naming the message by its number from 0, for a conversation that the chat format cannot express.

    Roles: a system message or none, then user and assistant in turn. Contents: Unicode text without the format's tags.
    """
    role = None
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number}: expected an object with 'role' and 'content', found {message!r:.60}")
        before, role, content = role, message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            raise ValueError(f"message {number}: unknown role {role!r:.60}; expected system, user or assistant")
        if role not in FOLLOWERS[before]:
            place = f"behind the {before} message" if before else "first"
            raise ValueError(f"message {number}: {role} {place}; expected {' or '.join(FOLLOWERS[before])}")
        if not isinstance(content, str):
            raise ValueError(f"message {number}: expected 'content' to be a string, found {content!r:.60}")
        if held := [tag for tag in TAGS if tag in content]:
            raise ValueError(f"message {number}: {held[0]} belongs to the chat format and cannot stand in a message")
        if not content.isascii():
            try:
                content.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"message {number}: character {error.start} is half a surrogate pair") from None
    if role in (None, "system"):
        raise ValueError("no user message; expected at least one")


# ---------- chapters/03_sft.py · Where an answer begins

def encode_dialog(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Tokens of a conversation in Meta's chat format, and a mask that is 1 on answers, their last space and EOS.

    A last user message without an answer is a prompt: no EOS, nothing behind `[/INST]`, mask 0. User messages and
    answers are stripped as in the released code. ValueError for what `check_dialog` refuses, and for a tokenizer that
    merges the end of a prompt with the answer.
    """
    check_dialog(messages)
    texts = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
    tokens, mask = [], []
    for user, *answer in (texts[i : i + 2] for i in range(0, len(texts), 2)):
        text = f"[INST] {user.strip()} [/INST]"
        pair = prompt = tokenizer.encode(text, bos=True)
        if answer:
            pair = tokenizer.encode(f"{text} {answer[0].strip()} ", bos=True, eos=True)
            if pair[: len(prompt)] != prompt:
                raise ValueError(f"{tokenizer.path}: a piece reaches over the end of a prompt, {text[-20:]!r}")
        tokens += pair
        mask += [0] * len(prompt) + [1] * (len(pair) - len(prompt))
    return tokens, mask


def decode_answer(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    "Text of an answer's tokens, such as a model gives behind a prompt: up to EOS, without the space around it."
    return tokenizer.decode(list(itertools.takewhile(lambda token: token != tokenizer.eos_id, tokens))).strip()


# ---------- chapters/03_sft.py · Conversations on disk

def read_dialogs(path: str | os.PathLike) -> list[list[Message]]:
    """The conversations of a JSONL file; line n of the file is item n - 1 of the list (`corpus.records` reads it).

    ValueError with file and line for one that is not JSON, has no list in 'messages', or fails `check_dialog`; and for
    a file without any.
    """
    dialogs = []
    for number, row in records(path):
        try:
            if not isinstance(row, dict) or not isinstance(row.get("messages"), list):
                raise ValueError("expected an object with a list in the field 'messages'")
            check_dialog(row["messages"])
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        dialogs.append(row["messages"])
    if not dialogs:
        raise ValueError(f"{path}: no conversations; expected a JSON object a line")
    return dialogs


def write_dialogs(path: str | os.PathLike, dialogs: Iterable[Sequence[Message]]):
    "Write conversations as JSONL, all or nothing. ValueError, naming the conversation, when one fails `check_dialog`."
    lines = []
    for number, messages in enumerate(dialogs):
        try:
            check_dialog(messages)
        except ValueError as error:
            raise ValueError(f"conversation {number}: {error}") from None
        lines.append(json.dumps({"messages": [dict(message) for message in messages]}, ensure_ascii=False) + "\n")
    write_atomic(path, "".join(lines))
