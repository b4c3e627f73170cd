"""Generated from chapters/04_reward_model.py by chapters/export.py; edit the chapter."""

__all__ = [
    "forked",
    "RewardModel",
    "MARGINS",
    "LABELS",
    "pair_losses",
    "ranking_loss",
    "safety_losses",
    "Pair",
    "encode_pair",
    "padded",
    "pair_rows",
    "NOTHING",
    "micro_batches",
    "RewardConfig",
    "REWARD",
    "RewardStep",
    "train_reward",
    "passes",
    "divide_again",
    "check_answered",
    "check_fits",
    "score",
    "score_pairs",
    "right",
    "accuracy",
    "read_pairs",
    "run",
    "cli",
    "Scorer",
    "load_scorer",
    "choose",
]


# ---------- chapters/04_reward_model.py · The reward model

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.fsdp import FSDPModule

from llama2lib.checkpoint import load_checkpoint, whole
from llama2lib.dialog import Message, encode_dialog
from llama2lib.distributed import Parallel, check_row, data_ranks, processes
from llama2lib.judge import RATINGS
from llama2lib.model import Llama, ModelConfig, rope_table
from llama2lib.optim import adamw, cosine_lr, set_lr
from llama2lib.preferences import Preference, read_preferences
from llama2lib.pretrain import command, naming_batch, train, train_step
from llama2lib.shards import shuffled
from llama2lib.tokenizer import Tokenizer


def forked(forks: Int[Tensor, "B 2"], length: int) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B 1 T T"]]:
    "Positions of the tokens of forked rows, and which tokens each one reads: those in front, but not the other answer."
    places = torch.arange(length, device=forks.device)
    first, second = places >= forks[:, :1], places >= forks[:, 1:]  # (B T), behind the beginning of an answer
    positions = places - second * (forks[:, 1:] - forks[:, :1])
    others = second[:, :, None] & (first & ~second)[:, None, :]
    return positions, ((places <= places[:, None]) & ~others)[:, None]


class RewardModel(Llama):
    "Llama 2 with a score in the place of the next token's logits (section 3.2.2)."

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        del self.output
        self.score = nn.Linear(config.dim, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def init_std(self, name: str) -> float | None:
        "As of Llama; the score begins at zero."
        return 0.0 if name == "score.weight" else super().init_std(name)

    @classmethod
    def of(cls, model: Llama) -> "RewardModel":
        "A reward model that begins with a copy of a chat model's weights."
        embedding = model.tok_embeddings.weight
        reward_model = cls(model.config).to(embedding.device, embedding.dtype)
        weights = {name: tensor for name, tensor in model.state_dict().items() if name != "output.weight"}
        reward_model.load_state_dict(weights, strict=False)
        return reward_model

    def hidden(self, tokens: Int[Tensor, "B T"], cache=None, documents=None, forks: Int[Tensor, "B 2"] | None = None):
        """As of Llama. With `forks`, a row is a conversation and two answers to it, that begin at these places.

        Both answers stand right behind the conversation: in position, and in what they read.
        """
        if forks is None:
            return super().hidden(tokens, cache, documents)
        if self.rope.device != tokens.device:
            self.rope = rope_table(self.config, tokens.device)
        positions, mask = forked(forks, tokens.shape[1])
        positions = positions.clamp(max=self.config.max_seq_len - 1)  # what fills a row up may stand beyond
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x, self.rope[positions], None, mask)
        return self.norm(x)

    def forward(
        self, tokens: Int[Tensor, "B T"], last: Int[Tensor, "B K"], forks: Int[Tensor, "B 2"] | None = None
    ) -> Float[Tensor, "B K"]:
        "Scores, read at the places `last` of each row: the last real token of an answer, which is EOS. float32"
        return whole(self.score(self.hidden(tokens, forks=forks))).squeeze(-1).float().gather(1, last)


# ---------- chapters/04_reward_model.py · Two losses

MARGINS = {  # of Equation 2 by rating, Table 27
    "none": dict.fromkeys(RATINGS, 0.0),
    "small": dict(zip(RATINGS, (1, 2 / 3, 1 / 3, 0), strict=True)),
    "large": dict(zip(RATINGS, (3, 2, 1, 0), strict=True)),
}
LABELS = {"chosen_safe": (1, 0), "both_safe": (1, 1), "both_unsafe": (0, 0), None: (-1, -1)}  # chosen, rejected


def pair_losses(
    chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], margin: Float[Tensor, "N"] | float = 0.0
) -> Float[Tensor, "N"]:
    "-log σ(chosen - rejected - margin) of each pair: Equation 1, with a margin Equation 2. ValueError for shapes."
    shapes = sorted({tuple(x.shape) for x in (chosen, rejected, margin) if isinstance(x, Tensor)})
    if len(shapes) > 1 or chosen.ndim != 1:
        raise ValueError(f"scores and margins of shapes {shapes}: expected a number for each pair, (N)")
    return -F.logsigmoid(chosen - rejected - margin)


def ranking_loss(
    chosen: Float[Tensor, "N"], rejected: Float[Tensor, "N"], margin: Float[Tensor, "N"] | float = 0.0
) -> Float[Tensor, ""]:
    "Mean of `pair_losses`."
    return pair_losses(chosen, rejected, margin).mean()


def safety_losses(scores: Float[Tensor, "..."], safe: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    "Cross-entropy of each score as the logit of 'safe', 1 or 0; where `safe` is -1, unknown, it is 0 (A.3.4; ours)."
    losses = F.binary_cross_entropy_with_logits(scores, safe.clamp(min=0), reduction="none")
    return losses * (safe >= 0)


# ---------- chapters/04_reward_model.py · Rows of a step

class Pair(NamedTuple):
    "A comparison as the loss wants it: tokens of conversation and answers, the margin, who is safe."

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    margin: float
    safe: tuple[int, int]  # of chosen and rejected: 1, 0, or -1 if unknown

    @property
    def size(self) -> int:
        "Tokens of its row."
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def encode_pair(tokenizer: Tokenizer, row: Preference, margin: str = "none", length: int | None = None) -> Pair:
    "A comparison with one of MARGINS. ValueError when the conversation with an answer is longer than `length` tokens."
    prompt, _ = encode_dialog(tokenizer, row["messages"])
    answers = []
    for name in ("chosen", "rejected"):
        tokens, _ = encode_dialog(tokenizer, [*row["messages"], {"role": "assistant", "content": row[name]}])
        if length is not None and len(tokens) > length:
            raise ValueError(f"{name}: {len(tokens)} tokens with the conversation, more than max_seq_len {length}")
        answers.append(tokens[len(prompt) :])
    return Pair(prompt, *answers, MARGINS[margin].get(row["rating"], 0.0), LABELS[row["safety"]])


def padded(rows: Sequence[Sequence[int]], multiple: int = 1) -> Int[Tensor, "B T"]:
    "Rows filled up at the end with 0, T a multiple of `multiple`."
    length = math.ceil(max(map(len, rows)) / multiple) * multiple
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = torch.as_tensor(ids)
    return tokens


def pair_rows(pairs: Sequence[Pair], multiple: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    "Forked rows (B T), the last token of each answer (B 2), and where the answers begin (B 2)."
    tokens = padded([[*pair.prompt, *pair.chosen, *pair.rejected] for pair in pairs], multiple)
    sizes = torch.tensor([[len(part) for part in pair[:3]] for pair in pairs]).cumsum(1)
    return tokens, sizes[:, 1:] - 1, sizes[:, :2]


NOTHING = Pair([0], [0], [0], 0.0, (-1, -1))  # what a rank that has no pairs left passes through, with weight 0


def micro_batches(pairs: Sequence[Pair], count: int, multiple: int = 1) -> Iterator[tuple[Tensor, ...]]:
    "Pairs, in their order, as `count` micro-batches: `pair_rows`, margins (B), who is safe (B 2), weights (B)."
    for places in np.array_split(np.arange(len(pairs)), count):
        part = [pairs[i] for i in places] or [NOTHING]
        margins = torch.tensor([pair.margin for pair in part], dtype=torch.float32)
        safe = torch.tensor([pair.safe for pair in part], dtype=torch.float32)
        yield *pair_rows(part, multiple), margins, safe, torch.full((len(part),), float(len(places) > 0))


# ---------- chapters/04_reward_model.py · Training

@dataclass(frozen=True)
class RewardConfig:
    """A reward model's training; the recipe's defaults are the paper's (section 3.2.2).

    ValueError, naming the numbers, for a recipe that cannot work.
    """

    model: str = "runs/sft/model"  # the folder to begin with: a chat model's, or a reward model's to go on with
    lr: float = 1e-5  # at the end of the warm-up
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-5  # of AdamW
    weight_decay: float = 0.1  # of matrices; the norms' weights are exempt
    grad_clip: float = 1.0  # largest norm of the gradient
    warmup: float = 0.03  # share of the steps in which the learning rate rises to its peak
    min_warmup: int = 5  # steps of warm-up at least
    final_lr: float = 0.1  # share of the peak that the cosine ends at
    batch_pairs: int = 512  # pairs of one optimiser step, over all GPUs; an epoch's last step may have fewer
    max_seq_len: int = 4096  # tokens of a conversation with an answer, at most
    epochs: int = 1  # how often all pairs are seen
    margin: Literal["none", "small", "large"] = "small"  # of Equation 2, by rating
    auxiliary: float = 0.0  # weight of the safety loss
    center: float = 0.0  # weight of (r_c + r_r)², which holds the mean of the scores at zero (ours)
    seed: int = 0  # of the order of the pairs

    data: Path = Path("preferences.jsonl")  # comparisons, see llama2lib.preferences
    tokenizer: Path | None = None  # SentencePiece file; none: the one in the model's folder
    out: Path = Path("runs/reward")  # log, checkpoints, and the trained model as a Hugging Face folder
    micro_batch: int = 8  # pairs in one forward pass of one GPU; the rest of the batch is accumulated
    parallel: Parallel = field(default_factory=Parallel)
    save_every: int = 200  # steps between checkpoints, from which the same command resumes
    keep: int = 2  # checkpoints that are kept
    tensorboard: bool = False  # beside out/log.jsonl

    def __post_init__(self):
        for name in ("batch_pairs", "max_seq_len", "epochs", "micro_batch", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if not 0 <= self.warmup < 1 or self.min_warmup < 0:
            raise ValueError(f"warmup {self.warmup}, min_warmup {self.min_warmup}: expected a share, and at least 0")
        if self.margin not in MARGINS:
            raise ValueError(f"margin {self.margin!r}: expected one of {', '.join(MARGINS)}")
        if min(self.auxiliary, self.center) < 0:
            raise ValueError(f"auxiliary {self.auxiliary}, center {self.center}: expected at least 0")
        check_row(self.max_seq_len, self.parallel.tp)

    def steps(self, pairs: int) -> int:
        "Optimiser steps of a run on so many pairs."
        return self.epochs * math.ceil(pairs / self.batch_pairs)


REWARD = {
    "paper": RewardConfig(micro_batch=2, parallel=Parallel(ac="selective", reduce="micro_batch")),
    "paper-70B": RewardConfig(lr=5e-6, micro_batch=1, parallel=Parallel(ac="full", reduce="micro_batch")),
    "mini": RewardConfig(lr=1e-3, batch_pairs=32, max_seq_len=512, micro_batch=4, center=0.01),
}


class RewardStep(NamedTuple):
    "What an optimiser step measured: loss and accuracy are means over its pairs; `tokens` counts real ones so far."

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    accuracy: float


def train_reward(
    model: RewardModel,
    pairs: Sequence[Pair],
    config: RewardConfig,
    optimizer: torch.optim.Optimizer | None = None,
    start: int = 0,
) -> Iterator[RewardStep]:
    """Train `model` on pairs from `encode_pair`, yielding a `RewardStep` after each (section 3.2.2).

    With the `optimizer` of an earlier part of the run, `start` at a later step. Leaves the model in training mode.
    ValueError without pairs; FloatingPointError, before the weights change, when loss or gradient are not finite.
    """
    if not pairs:
        raise ValueError("no pairs to train on")
    device, steps = model.tok_embeddings.weight.device, config.steps(len(pairs))
    optimizer = optimizer or adamw(model, config.lr, config.betas, config.eps, config.weight_decay)
    rank, ranks, group = data_ranks(model)
    sizes = np.array([pair.size for pair in pairs])
    hits = torch.zeros((), device=device)
    if config.parallel.compile and group is None:
        model.compile(dynamic=True)

    def loss_of(model, tokens, last, forks, margins, safe, weights):
        scores = model(tokens, last, forks)
        chosen, rejected = scores.unbind(1)
        hits.add_(((chosen > rejected) * weights).sum().detach())
        losses = pair_losses(chosen, rejected, margins)
        if config.auxiliary:
            losses = losses + config.auxiliary * safety_losses(scores, safe).mean(1)
        if config.center:
            losses = losses + config.center * scores.sum(1).square()
        return (losses * weights).sum()

    per_epoch, tokens = steps // config.epochs, 0
    model.train()
    optimizer.zero_grad(set_to_none=True)
    for step in range(steps):
        epoch, place = divmod(step, per_epoch)
        if place == 0:
            order = shuffled(np.arange(len(pairs)), len(pairs), (config.seed, epoch))
        these = order[place * config.batch_pairs : (place + 1) * config.batch_pairs]
        tokens += int(sizes[these].sum())
        if step < start:
            continue
        lr = cosine_lr(step, config.lr, max(config.min_warmup, round(config.warmup * steps)), steps, config.final_lr)
        set_lr(optimizer, lr)
        mine = sorted((pairs[i] for i in these), key=lambda pair: pair.size)[rank::ranks]
        passes = math.ceil(math.ceil(len(these) / ranks) / config.micro_batch)
        parts = ((x.to(device) for x in part) for part in micro_batches(mine, passes, config.parallel.tp))
        hits.zero_()
        where = f"pairs {', '.join(map(str, these[:8]))}{' …' if len(these) > 8 else ''} of {len(pairs)}"
        with naming_batch(step, where):
            loss, norm = train_step(
                model, optimizer, [tuple(part) for part in parts], len(these), config.grad_clip,
                config.parallel.reduce, loss_of,
            )  # fmt: skip
        if ranks > 1:
            dist.all_reduce(hits, group=group)
        yield RewardStep(step, loss, lr, norm, tokens, hits.item() / len(these))

def passes(lengths: Int[np.ndarray, "B"], most: int) -> list[Int[np.ndarray, "N"]]:
    "Numbers of rows, those of similar length together, at most `most` in a pass; as many passes for as many rows."
    return np.array_split(np.argsort(lengths, kind="stable"), math.ceil(len(lengths) / most))


def divide_again(model: Llama):
    """Let FSDP take apart what it leaves whole after a pass without a backward pass: embedding, last norm, output.

    Else the next pass would use these as they are, whatever an optimiser has done to its parts of them.
    """
    if isinstance(model, FSDPModule):
        model.reshard()


def check_answered(dialogs: Sequence[Sequence[Message]]):
    "ValueError, naming the conversation by its number from 0, for one without an answer at its end."
    for number, messages in enumerate(dialogs):
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"dialog {number} ends with the {messages[-1]['role']}: expected an answer to score")


def check_fits(number: int, messages: Sequence[Message], size: int, context: int):
    "ValueError, naming the conversation, for one of more tokens than a reward model's context."
    if size > context:
        begin = f"{messages[0]['content']!r:.60}"
        raise ValueError(f"dialog {number}, {begin}: {size} tokens with the answer, more than the context's {context}")


@torch.no_grad()
def score(
    model: RewardModel, tokenizer: Tokenizer, dialogs: Sequence[Sequence[Message]], batch: int = 128, cut: bool = False
) -> Float[np.ndarray, "N"]:
    """Scores of conversations that end with an answer: raw logits; a higher one is a better answer.

    batch: conversations of a forward pass, at most. All ranks of a divided model bring as many. ValueError, naming the
    conversation, for one without an answer at its end, and for one that is longer than the context; with `cut`, that
    one is read up to there.
    """
    check_answered(dialogs)
    context = model.config.max_seq_len
    rows = [encode_dialog(tokenizer, messages)[0] for messages in dialogs]
    for number, (messages, row) in enumerate(zip(dialogs, rows, strict=True)):
        if not cut:
            check_fits(number, messages, len(row), context)
    rows = [row[:context] for row in rows]
    lengths, scores = np.array([len(row) for row in rows]), np.empty(len(rows), np.float32)
    device, training = model.tok_embeddings.weight.device, model.training
    model.eval()
    for these in passes(lengths, batch):
        last = torch.from_numpy(lengths[these, None] - 1)
        scores[these] = model(padded([rows[i] for i in these]).to(device), last.to(device))[:, 0].cpu().numpy()
    divide_again(model)
    model.train(training)
    return scores


@torch.no_grad()
def score_pairs(
    model: RewardModel, tokenizer: Tokenizer, rows: Sequence[Preference], batch: int = 128
) -> Float[np.ndarray, "2 N"]:
    """Scores of the chosen and of the rejected answers of comparisons, `batch` of them in one forward pass.

    All ranks of a divided model bring as many. ValueError, naming the comparison by its number from 0, for one that is
    longer than the model's context.
    """
    pairs = []
    for number, row in enumerate(rows):
        try:
            pairs.append(encode_pair(tokenizer, row, length=model.config.max_seq_len))
        except ValueError as error:
            raise ValueError(f"comparison {number}: {error}") from None
    scores, training = np.empty((2, len(rows))), model.training
    model.eval()
    for these in passes(np.array([pair.size for pair in pairs]), batch):
        inputs = (part.to(model.tok_embeddings.weight.device) for part in pair_rows([pairs[i] for i in these]))
        scores[:, these] = model(*inputs).T.cpu().numpy()
    divide_again(model)
    model.train(training)
    return scores


def right(scores: Float[np.ndarray, "... 2 N"]) -> Float[np.ndarray, "... N"]:
    "1 for a pair whose chosen answer, the first, has the higher score, 0.5 for equal scores, else 0."
    chosen, rejected = scores[..., 0, :], scores[..., 1, :]
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def accuracy(scores: Float[np.ndarray, "2 N"], rows: Sequence[Preference]) -> dict[str, float]:
    "Share of pairs whose chosen answer has the higher score; equal scores count half. By rating, and 'all'."
    hits, rated = right(scores), np.array([str(row["rating"]) for row in rows])
    found = {rating: float(hits[rated == rating].mean()) for rating in RATINGS if (rated == rating).any()}
    return found | {"all": float(hits.mean())}

def read_pairs(path: Path, tokenizer: Tokenizer, config: RewardConfig) -> list[Pair]:
    "The comparisons of a JSONL file as pairs. ValueError with file, line and field, and for one that is too long."
    pairs = []
    for number, row in enumerate(read_preferences(path), 1):
        try:
            pairs.append(encode_pair(tokenizer, row, config.margin, config.max_seq_len))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return pairs


def run(config: RewardConfig) -> Path:
    """Train a reward model, or go on training it, as `config` says; returns the folder of the trained model.

    Writes out/log.jsonl, out/step-…, and out/model, a Hugging Face folder that `transformers` opens as a sequence
    classifier, at the end. Errors as in `pretrain.run`.
    """
    with processes() as device:
        tokenizer = Tokenizer(config.tokenizer or config.model)
        pairs = read_pairs(config.data, tokenizer, config)
        if os.environ.get("RANK", "0") == "0":
            sizes = sorted(pair.size for pair in pairs)
            print(f"{len(pairs):,} pairs, the longest of {sizes[-1]} tokens, the median {sizes[len(sizes) // 2]}")
        digest = hashlib.sha256(config.data.read_bytes() + tokenizer.digest.encode()).hexdigest()

        def loop(model, optimizer, start):
            return train_reward(model, pairs, config, optimizer, start)

        steps = config.steps(len(pairs))
        return train(config, device, tokenizer, tokenizer.vocab_size, digest, steps, loop, "reward model", RewardModel)


@record
def cli(prog: str = "python -m llama2lib.reward"):
    "python -m llama2lib.reward RECIPE [options]: train a reward model (section 3.2.2); under torchrun, on all ranks."
    about = {n: f"{c.batch_pairs} pairs a step, peak lr {c.lr:g}, margin {c.margin}" for n, c in REWARD.items()}
    command(run, {name: (about[name], config) for name, config in REWARD.items()}, prog)

Scorer = Callable[[Sequence[Sequence[Message]]], Float[np.ndarray, "N"]]  # of conversations that end with an answer


def load_scorer(path: str | os.PathLike, device: str | torch.device | None = None, cut: bool = False) -> Scorer:
    """The reward model in a folder, as a function: one of ours, or a Hugging Face sequence classifier with one output.

    Ours are the folders of Llama's architecture with a tokenizer.model; others read a conversation through their own
    chat template, without one as question and answer. Conversations and `cut`: as in `score`, and so are errors.
    ValueError for a model with several outputs; ImportError without `transformers` where it is needed.
    """
    folder = Path(path).expanduser()
    fields = json.loads((folder / "config.json").read_text("utf-8"))
    if fields.get("model_type") == "llama" and (folder / "tokenizer.model").exists():
        model, tokenizer = load_checkpoint(folder, device, kind=RewardModel), Tokenizer(folder)
        return lambda dialogs: score(model, tokenizer, dialogs, cut=cut)
    try:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
    except ImportError:
        raise ImportError(f"{folder} needs a package: pip install transformers") from None
    network = AutoModelForSequenceClassification.from_pretrained(folder).to(device or "cpu").eval()
    if network.config.num_labels != 1:
        raise ValueError(f"{folder} has {network.config.num_labels} outputs; a reward model has one")
    words = AutoTokenizer.from_pretrained(folder)
    positions = getattr(network.config, "max_position_embeddings", None) or words.model_max_length
    context = min(positions, words.model_max_length)

    @torch.no_grad()
    def scorer(dialogs):
        check_answered(dialogs)
        scores = []
        for number, messages in enumerate(dialogs):
            if words.chat_template:
                texts = [words.apply_chat_template([dict(message) for message in messages], tokenize=False)]
            else:
                texts = ["\n\n".join(message["content"] for message in messages[:-1]), messages[-1]["content"]]
            inputs = words(*texts, return_tensors="pt", add_special_tokens=not words.chat_template)
            if not cut:
                check_fits(number, messages, inputs["input_ids"].shape[1], context)
            inputs = {name: part[:, :context].to(network.device) for name, part in inputs.items()}
            scores.append(network(**inputs).logits.float().item())
        return np.array(scores, np.float32)

    return scorer


@torch.no_grad()
def choose(model: Llama, tokenizer: Tokenizer, rows: Sequence[Preference], batch: int = 128) -> Float[np.ndarray, "N"]:
    """How much a chat model prefers the chosen answers when it is asked for the best one, A or B.

    The difference of the letters' log-probabilities, mean over both orders; above 0 it agrees with the annotator.
    """
    prompts, letters = [], [tokenizer.encode(letter)[-1] for letter in "AB"]
    for row in rows:
        for first, second in (("chosen", "rejected"), ("rejected", "chosen")):
            question = row["messages"][-1]["content"]
            asked = f"{question}\n\nA: {row[first]}\n\nB: {row[second]}\n\nChoose the best answer between A and B."
            prompts.append(encode_dialog(tokenizer, [*row["messages"][:-1], {"role": "user", "content": asked}])[0])
    lengths, differences = np.array([len(ids) for ids in prompts]), np.empty(len(prompts), np.float32)
    for these in passes(lengths, batch):
        states = model.hidden(padded([prompts[i] for i in these]).to(model.tok_embeddings.weight.device))
        logits = model.output(states[torch.arange(len(these)), lengths[these] - 1])[:, letters].float()
        differences[these] = (logits[:, 0] - logits[:, 1]).cpu()
    first, second = differences.reshape(-1, 2).T
    return (first - second) / 2


if __name__ == "__main__":
    cli()
