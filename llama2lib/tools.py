"""Generated from chapters/07_safety.py by chapters/export.py; edit the chapter."""

__all__ = [
    "calculate",
    "answer_with",
]


# ---------- chapters/07_safety.py · Tools and time (section 5.1)

import ast
import math
import operator
import re
from collections.abc import Callable, Sequence

from llama2lib.chat import Reply
from llama2lib.dialog import Message, decode_answer, encode_dialog
from llama2lib.generation import generate
from llama2lib.model import Llama
from llama2lib.tokenizer import Tokenizer

_CALL = re.compile(r"calc\(([^=]{1,200}?)\) =")
_SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(text: str) -> str:
    "The value of numbers joined by + - * / and brackets. ValueError for any other text, and for a division by 0."

    def value(node: ast.AST) -> float:
        match node:
            case ast.Constant(value=int() | float()) if not isinstance(node.value, bool):
                return node.value
            case ast.BinOp() if type(node.op) in _SIGNS:
                return _SIGNS[type(node.op)](value(node.left), value(node.right))
            case ast.UnaryOp(op=ast.USub()):
                return -value(node.operand)
        raise ValueError(f"{text!r}: expected numbers joined by + - * /")

    try:
        found = value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"{text!r}: cannot be calculated ({type(error).__name__})") from None
    if not math.isfinite(found):
        raise ValueError(f"{text!r}: too large")
    return str(int(found)) if found == int(found) else f"{found:.12g}"


def answer_with(
    model: Llama,
    tokenizer: Tokenizer,
    dialogs: Sequence[Sequence[Message]],
    max_new_tokens: int,
    tool: Callable[[str], str] = calculate,
    calls: int = 4,
) -> list[Reply]:
    """Greedy answers in which the first `calls` calls have the tool's results; a part between two has max_new_tokens.

    From a call on that the tool refuses with a ValueError the answer is the model's own.
    """
    starts = [encode_dialog(tokenizer, messages)[0] for messages in dialogs]
    settled = [""] * len(starts)  # the part of each answer that stands
    replies: list[Reply | None] = [None] * len(starts)
    for turn in range(calls + 1):
        open_ = [place for place, reply in enumerate(replies) if reply is None]
        if not open_:
            break
        prompts = [starts[place] + tokenizer.encode(settled[place]) for place in open_]
        found = generate(model, prompts, max_new_tokens, 0.0, eos_id=tokenizer.eos_id)
        for place, made in zip(open_, found, strict=True):
            text = f"{settled[place]} {decode_answer(tokenizer, made.tokens)}".strip()
            call = _CALL.search(text, len(settled[place]))
            try:
                if call is None or turn == calls:
                    raise ValueError("no call")
                settled[place] = f"{text[: call.end()]} {tool(call[1])}."
            except ValueError:
                replies[place] = Reply(text, made.finished)
    return replies
