"""Generated from chapters/03_sft.py by chapters/export.py; edit the chapter."""

__all__ = [
    "Reply",
    "respond",
    "fit",
    "text_of",
    "Chat",
    "ChatConfig",
    "HELP",
    "talk",
    "print_reply",
    "DTYPES",
    "needed",
    "check_room",
    "cli",
    "widget",
]


# ---------- chapters/03_sft.py · A chat model of the mini world

from collections.abc import Sequence
from typing import NamedTuple

from llama2lib.dialog import Message, decode_answer, encode_dialog
from llama2lib.generation import generate
from llama2lib.model import Llama
from llama2lib.tokenizer import Tokenizer


class Reply(NamedTuple):
    "An answer, and whether the model ended it."

    text: str
    finished: bool


def respond(
    model: Llama,
    tokenizer: Tokenizer,
    dialogs: Sequence[Sequence[Message]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
) -> list[Reply]:
    "Answers to conversations that end with the user, `num_samples` each, in order; arguments and errors of `generate`."
    prompts = [encode_dialog(tokenizer, messages)[0] for messages in dialogs]
    completions = generate(model, prompts, max_new_tokens, temperature, top_p, seed, tokenizer.eos_id, num_samples)
    return [Reply(decode_answer(tokenizer, made.tokens), made.finished) for made in completions]


# ---------- chapters/03_sft.py · Chat

import contextlib
import html
import importlib
import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro

from llama2lib.checkpoint import load_checkpoint, read_tensors
from llama2lib.dialog import TAGS
from llama2lib.distributed import compute_dtype
from llama2lib.generation import stream
from llama2lib.launch import one_line_errors
from llama2lib.model import ModelConfig


def fit(tokenizer: Tokenizer, messages: Sequence[Message], room: int) -> tuple[list[int], int]:
    """Tokens of a conversation that ends with the user, and how many of its oldest turns they leave out to fit `room`.

    ValueError when the last message does not even fit alone, and as in `encode_dialog`.
    """
    first = int(messages[0]["role"] == "system")
    for turns in range((len(messages) - first + 1) // 2):
        tokens, _ = encode_dialog(tokenizer, [*messages[:first], *messages[first + 2 * turns :]])
        if len(tokens) <= room:
            return tokens, turns
    raise ValueError(f"{len(tokens)} tokens in the last message alone: expected at most {room}")

def text_of(tokenizer: Tokenizer, tokens: Iterable[int]) -> Iterator[str]:
    "The text of a reply in pieces, as its tokens come; it ends at EOS or in front of a tag of the chat format."
    made, shown, text = [], 0, ""
    for token in tokens:
        made.append(token)
        text = decode_answer(tokenizer, made)
        if places := [text.index(tag) for tag in TAGS if tag in text]:
            text = text[: min(places)].rstrip()
            break
        ends = (text[-n:] for n in range(len(max(TAGS, key=len)), 0, -1))
        held = next((len(end) for end in ends if any(tag.startswith(end) for tag in TAGS)), 0)
        sure = text[: len(text) - held].rstrip("\ufffd").rstrip()
        if len(sure) > shown:
            yield sure[shown:]
            shown = len(sure)
    if len(text) > shown:
        yield text[shown:]

class Chat:
    """A model and a conversation with it, `messages`, which may be read and changed between replies.

    After a reply, `dropped` is how many of the oldest turns it was the first to do without, and `finished` whether the
    model ended it (False: it was stopped, or reached `max_new_tokens`).
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        system: str = "",
        temperature: float = 0.6,
        top_p: float = 0.9,
        max_new_tokens: int = 256,
        seed: int = 0,
    ):
        self.model, self.tokenizer, self.seed = model, tokenizer, seed
        self.temperature, self.top_p = temperature, top_p
        self.max_new_tokens, self.room = max_new_tokens, model.config.max_seq_len - max_new_tokens
        if self.room < 1:
            context = f"a context of {model.config.max_seq_len}"
            raise ValueError(f"max_new_tokens {max_new_tokens} leaves no room for a message in {context}")
        self.replies = 0
        self.begin(system)

    def begin(self, system: str = ""):
        "Forget the conversation; begin one with this system message, or without."
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        self.dropped, self.finished = 0, True

    def reply(self, text: str) -> Iterator[str]:
        "Answer a message, in pieces as they come. ValueError for a message that is too long or holds a tag."
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, self.dropped = fit(self.tokenizer, messages, self.room)
        first = int(messages[0]["role"] == "system")
        del messages[first : first + 2 * self.dropped]
        tokens = stream(
            self.model, prompt, self.max_new_tokens, self.temperature, self.top_p, self.seed + self.replies,
            self.tokenizer.eos_id,
        )  # fmt: skip
        self.replies, self.finished, made, said = self.replies + 1, False, [], ""

        def noted():
            for token in tokens:
                made.append(token)
                yield token

        try:
            for piece in text_of(self.tokenizer, noted()):
                said += piece
                yield piece
            self.finished = len(made) < self.max_new_tokens or made[-1] == self.tokenizer.eos_id
        finally:
            if said or self.finished:
                self.messages = [*messages, {"role": "assistant", "content": said}]


# ---------- chapters/03_sft.py · In a terminal

@dataclass(frozen=True)
class ChatConfig:
    "A chat in the terminal."

    model: Path  # checkpoint folder, Hugging Face's layout or Meta's
    tokenizer: Path | None = None  # SentencePiece file; none: the one in the model's folder
    dtype: Literal["bf16", "fp32"] | None = None  # of weights, keys and values; none: bf16 on a GPU, fp32 on a CPU
    system: str = ""  # the system message
    temperature: float = 0.6  # 0: always the likeliest token
    top_p: float = 0.9  # sample among the likeliest tokens that have this probability together
    max_new_tokens: int = 256  # longest reply
    seed: int = 0  # the same messages get the same replies


HELP = "Ctrl-C stops a reply, Ctrl-D leaves; /new begins again, /system TEXT begins again with a system message"


def talk(chat: Chat):
    "Read messages from the terminal and print replies, until the input ends."
    print(HELP)
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        match text.split(maxsplit=1):
            case []:
                continue
            case ["/new"]:
                chat.begin()
                print("a new conversation")
            case ["/system", *words]:
                chat.begin(" ".join(words))
                print(f"a new conversation, {'with' if words else 'without'} a system message")
            case [word, *_] if word.startswith("/"):
                print(HELP)
            case _:
                print_reply(chat, text)


def print_reply(chat: Chat, text: str):
    "Print the reply to a message as it comes, and what has to be said about it."
    try:
        with contextlib.closing(chat.reply(text)) as pieces:
            for number, piece in enumerate(pieces):
                if not number and chat.dropped:
                    print(f"(the oldest {chat.dropped} turns are forgotten: the context is full)")
                print(piece, end="", flush=True)
        print("" if chat.finished else f" … (cut off after {chat.max_new_tokens} tokens)")
    except KeyboardInterrupt:
        print(" … (stopped)")
    except ValueError as error:
        print(f"not sent: {error}")


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def needed(shape: ModelConfig, dtype: torch.dtype) -> tuple[int, int]:
    "Bytes of a model's weights, and of the keys and values of one conversation that fills its context."
    return shape.num_params * dtype.itemsize, shape.max_seq_len * shape.kv_bytes_per_token(dtype.itemsize)


def check_room(shape: ModelConfig, dtype: torch.dtype, device: torch.device):
    "Print what a model needs; ValueError if its weights are larger than the memory of a GPU, or of the machine."
    weights, context = needed(shape, dtype)
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    print(f"{shape.num_params:,} parameters of {dtype.itemsize} bytes: {weights / 1e9:,.1f} GB, "
          f"and {context / 1e9:,.1f} GB for a conversation of {shape.max_seq_len:,} tokens")  # fmt: skip
    if weights > room:
        hint = "; --dtype bf16 takes half" if dtype == torch.float32 else ""
        raise ValueError(f"weights of {weights / 1e9:,.1f} GB do not fit into {room / 1e9:,.1f} GB of memory{hint}")


@one_line_errors()
def cli(prog: str = "python -m llama2lib.chat"):
    "python -m llama2lib.chat --model FOLDER: talk to a model in the terminal."
    config = tyro.cli(ChatConfig, prog=prog)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = DTYPES[config.dtype] if config.dtype else compute_dtype(device)
    with contextlib.suppress(ImportError):
        importlib.import_module("readline")  # gives input() line editing and a history
    tokenizer = Tokenizer(config.tokenizer or config.model)
    check_room(read_tensors(config.model)[0], dtype, device)
    model = load_checkpoint(config.model, device, dtype)
    talk(Chat(model, tokenizer, config.system, config.temperature, config.top_p, config.max_new_tokens, config.seed))


# ---------- chapters/03_sft.py · In a notebook

def widget(chat: Chat):
    "A chat in a notebook, an ipywidgets box: a line to write in, Send, Stop, New, and the system message."
    try:
        import ipywidgets as w
    except ImportError:
        raise ImportError("the chat widget needs ipywidgets: pip install ipywidgets") from None
    shown, stopped = w.HTML(), threading.Event()
    line = w.Text(placeholder="a message", layout=w.Layout(flex="1"))
    system = w.Text(description="system", placeholder="none; takes effect with New", layout=w.Layout(width="100%"))
    send, stop, new = (w.Button(description=name, layout=w.Layout(width="5em")) for name in ("Send", "Stop", "New"))
    system.value = next((m["content"] for m in chat.messages if m["role"] == "system"), "")

    def show(*more: Message, note: str = ""):
        rows = [f"<b>{m['role']}</b> {html.escape(m['content'])}" for m in (*chat.messages, *more)]
        rows += [f"<i>{html.escape(note)}</i>"] if note else []
        shown.value = "".join(f"<p style='white-space: pre-wrap'>{row}</p>" for row in rows)

    def work(text: str):
        said, note = "", ""
        try:
            with contextlib.closing(chat.reply(text)) as pieces:
                for piece in pieces:
                    said += piece
                    show({"role": "user", "content": text}, {"role": "assistant", "content": said})
                    if stopped.is_set():
                        break
            if chat.dropped:
                note = f"the oldest {chat.dropped} turns are forgotten: the context is full"
            if not chat.finished:
                note = "stopped" if stopped.is_set() else f"cut off after {chat.max_new_tokens} tokens"
        except ValueError as error:
            note = f"not sent: {error}"
        finally:
            show(note=note)
            send.disabled = new.disabled = False

    def on_send(*_):
        text = line.value.strip()
        if text and not send.disabled:
            line.value, send.disabled, new.disabled = "", True, True
            stopped.clear()
            threading.Thread(target=work, args=(text,), daemon=True).start()

    def on_new(_):
        chat.begin(system.value.strip())
        show()

    send.on_click(on_send)
    line.on_msg(lambda _, content, __: on_send() if content.get("event") == "submit" else None)  # the Enter key
    stop.on_click(lambda _: stopped.set())
    new.on_click(on_new)
    show()
    return w.VBox([shown, w.HBox([line, send, stop, new]), system])


if __name__ == "__main__":
    cli()
