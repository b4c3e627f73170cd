"""Generated from chapters/09_evaluation.py by chapters/export.py; edit the chapter."""

__all__ = [
    "BEGIN",
    "END",
    "LlamaLM",
]


# ---------- chapters/09_evaluation.py · An adapter for the harness

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from functools import partial

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise ImportError("lm-eval is not installed: pip install -e '.[eval]'") from None

from llama2lib.continuations import cut, loglikelihoods, over_ranks, tokens_until
from llama2lib.dialog import Message, check_dialog
from llama2lib.model import Llama
from llama2lib.tokenizer import Tokenizer

BEGIN, END = "\x02", "\x03"  # of a conversation's pairs: BOS and EOS in text


class LlamaLM(TemplateLM):
    """A model for `lm_eval.simple_evaluate` and `evaluate`; under torchrun its processes divide the requests.

    `batch_tokens`: of `loglikelihoods`; `batch`: of `tokens_until`; `seed`: of sampled answers, which depend on it and
    on their prompt alone. ValueError for requests that do not fit the model, and for settings it does not know.
    """

    max_gen_toks = 256  # where a task does not say

    def __init__(self, model: Llama, tokenizer: Tokenizer, batch_tokens: int = 8192, batch: int = 64, seed: int = 0):
        super().__init__()
        if tokenizer.vocab_size > model.config.vocab_size:
            found = f"{tokenizer.vocab_size} pieces for a model of {model.config.vocab_size}"
            raise ValueError(f"{tokenizer.path}: {found}; expected the model's own tokenizer")
        self.model, self.words = model, tokenizer
        self.batch_tokens, self.batch, self.seed = batch_tokens, batch, seed
        self._device = model.tok_embeddings.weight.device
        self.shortened = 0  # requests whose context has lost its beginning

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.words.bos_id

    @property
    def max_length(self) -> int:
        return self.model.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return f"llama2lib-{self.words.digest[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        "Tokens of a text, behind BOS unless `add_special_tokens` is False; of a conversation as in `encode_dialog`."
        if not string.startswith(BEGIN):
            return self.words.encode(string, bos=add_special_tokens is not False)
        signs, tokens = {BEGIN: [self.words.bos_id], END: [self.words.eos_id]}, []
        for part in re.split(f"([{BEGIN}{END}])", string):
            tokens += signs.get(part) or self.words.encode(part)
        return tokens

    def tok_decode(self, tokens: Sequence[int]) -> str:
        return self.words.decode(tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        "Log-probabilities of continuations, and whether they are greedy; each different text is encoded once."
        texts = []
        for context, continuation in (request.args for request in requests):
            front = context.rstrip()
            texts.append((front, context[len(front) :] + continuation))
        plain = list(dict.fromkeys(part for front, rest in texts for part in (front, front + rest)))
        chats = [text for text in plain if text.startswith(BEGIN)]
        plain = [text for text in plain if not text.startswith(BEGIN)]
        tokens = dict(zip(plain, self.words.encode_batch(plain, bos=True), strict=True))
        tokens |= {text: self.tok_encode(text) for text in chats}
        fronts = [tokens[front] for front, _ in texts]
        rest = [tokens[front + rest][len(tokens[front]) :] for front, rest in texts]
        if [] in rest:
            front, more = texts[rest.index([])]
            raise ValueError(f"{more!r:.60} adds no token to {front[-30:]!r}; expected a continuation that does")
        return self._loglikelihood_tokens([
            (request.args, *pair) for request, *pair in zip(requests, fronts, rest, strict=True)
        ])  # fmt: skip

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        self.shortened += sum(len(context) + len(rest) > self.max_length + 1 for context, rest in pairs)
        results = over_ranks(pairs, lambda some: loglikelihoods(self.model, some, self.batch_tokens))
        for (texts, *_), result in zip(requests, results, strict=True):
            if texts is not None:  # a window of a document is none of the harness's requests
                self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        "Log-probabilities of documents: each token once, behind as many as the context holds; the first behind BOS."
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            tokens = self.words.encode(text)
            parts = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            parts = [(None, *make_disjoint_window(part)) for part in parts]
            windows, counts = windows + parts, [*counts, len(parts)]
        found = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(found).logprob for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        "What the model writes behind contexts, up to the stops; greedy, or sampled where a task says so."
        asked, groups = Counter(), {}
        for number, (context, settings) in enumerate(request.args for request in requests):
            key = hashlib.sha256(f"{self.seed} {asked[context]} {context}".encode()).digest()
            asked[context] += 1  # the same question again gets another sample
            until, rest = self._settings(settings)
            room = self.max_length - rest["max_new_tokens"]
            if room < 1:
                found = f"{rest['max_new_tokens']} tokens to write leave no room in a context of {self.max_length}"
                raise ValueError(f"{found}: expected a smaller max_gen_toks")
            tokens = self.tok_encode(context.rstrip() if context.startswith(BEGIN) else context)
            self.shortened += len(tokens) > room
            row = tokens[-room:], int.from_bytes(key[:8], "big"), number
            groups.setdefault((until, *rest.items()), []).append(row)
        texts: dict[int, str] = {}
        for (until, *rest), rows in groups.items():
            found = over_ranks(rows, partial(self._written, until, dict(rest)))
            texts |= zip((number for *_, number in rows), found, strict=True)
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _written(self, until: tuple[str, ...], settings: dict, rows: Sequence[tuple[list[int], int, int]]) -> list[str]:
        prompts, seeds = [row[0] for row in rows], [row[1] for row in rows]
        made = tokens_until(self.model, self.words, prompts, until, seeds=seeds, batch=self.batch, **settings)
        return [cut(self.words.decode(tokens), until) for tokens in made]

    def _settings(self, given: dict) -> tuple[tuple[str, ...], dict]:
        "Stops, and the settings of `tokens_until`, of the harness's `generation_kwargs`."
        left = dict(given)
        until, samples = left.pop("until", None) or (), left.pop("do_sample", None)
        lengths = [left.pop(name, None) for name in ("max_gen_toks", "max_new_tokens", "max_tokens")]
        temperature, top_p = left.pop("temperature", None), float(left.pop("top_p", 1.0))
        if left:
            raise ValueError(f"generation_kwargs: {', '.join(left)}; expected until, max_gen_toks, do_sample, "
                             "temperature and top_p only")  # fmt: skip
        if temperature is None or samples is False:
            temperature = 1.0 if samples else 0.0
        longest = next((length for length in lengths if length is not None), self.max_gen_toks)
        until = (until,) if isinstance(until, str) else until
        numbers = {"max_new_tokens": int(longest), "temperature": float(temperature), "top_p": top_p}
        return tuple(stop for stop in until if stop), numbers

    def chat_template(self, chat_template: bool | str = False) -> str:
        return "Meta's Llama 2" if chat_template else ""

    def apply_chat_template(self, chat_history: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """A conversation as text for `tok_encode`; its last message is the user's, or the beginning of an answer.

        ValueError for one that Meta's format cannot express, or that holds the signs of BOS and EOS.
        """
        check_dialog(chat_history)
        texts = [message["content"] for message in chat_history]
        if held := [text for text in texts if BEGIN in text or END in text]:
            raise ValueError(f"a message holds one of the signs U+0002 and U+0003: {held[0][:60]!r}")
        if chat_history[0]["role"] == "system":
            texts[:2] = [f"<<SYS>>\n{texts[0]}\n<</SYS>>\n\n{texts[1]}"]
        pairs = ((user.strip(), *answer) for user, *answer in (texts[n : n + 2] for n in range(0, len(texts), 2)))
        return f" {END}".join(f"{BEGIN}[INST] {user} [/INST] {''.join(answer).strip()}" for user, *answer in pairs)
