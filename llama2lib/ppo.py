"""Generated from chapters/05_rlhf.py by chapters/export.py; edit the chapter."""

__all__ = [
    "gae",
    "ppo_losses",
    "ppo_loss",
    "value_losses",
    "PPOConfig",
    "PPO",
    "PPOStep",
    "Batch",
    "answered",
    "rollout",
    "update",
    "ppo",
    "optimizers_of",
    "held_out_reward",
    "opened",
    "run",
    "train",
    "cli",
]


# ---------- chapters/05_rlhf.py · PPO

import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import record
from tqdm import tqdm

from llama2lib.checkpoint import copy_weights, read_tensors, save_checkpoint
from llama2lib.dialog import decode_answer, encode_dialog
from llama2lib.distributed import Parallel, StateFolder, data_ranks, make_mesh, parallelize, processes, training_tensors
from llama2lib.formats import without_memory
from llama2lib.generation import Completion, generate
from llama2lib.model import Llama
from llama2lib.optim import adamw
from llama2lib.pretrain import IGNORE, MAY_CHANGE, Log, check_same, command, train_step
from llama2lib.reward import RewardModel, passes, score
from llama2lib.rollout import (
    Policy, Prompt, Reward, Rows, Value, combined_reward, consolidated, drawn, in_passes, read_prompts, untagged,
    whiten,
)  # fmt: skip
from llama2lib.tokenizer import Tokenizer


def gae(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """Advantages of actions, and returns, which are what the values should have been (Schulman et al. 2016).

    `mask`: which places hold an action, a run in each row; elsewhere both results are 0. The value behind the last
    action is 0.
    """
    rewards, values = rewards * mask, values * mask
    advantages, later = torch.zeros_like(values), torch.zeros_like(values[:, 0])
    following = torch.zeros_like(later)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        later = (delta + gamma * lam * later) * mask[:, t]
        advantages[:, t], following = later, values[:, t]
    return advantages, advantages + values


def ppo_losses(
    logprobs: Float[Tensor, "..."], old: Float[Tensor, "..."], advantages: Float[Tensor, "..."], clip: float = 0.2
) -> Float[Tensor, "..."]:
    "PPO's clipped loss of each token, with `old` the log-probabilities under the policy that sampled it."
    ratio = (logprobs - old).exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def ppo_loss(
    logprobs: Float[Tensor, "B T"],
    old: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    clip: float = 0.2,
) -> Float[Tensor, ""]:
    "Mean of `ppo_losses` over the places where `mask` is true."
    return ppo_losses(logprobs, old, advantages, clip)[mask].mean()


def value_losses(
    values: Float[Tensor, "..."], old: Float[Tensor, "..."], returns: Float[Tensor, "..."], clip: float = 0.2
) -> Float[Tensor, "..."]:
    "Half the squared error of each value, or of the value at most `clip` away from the `old` one if that is larger."
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


# ---------- chapters/05_rlhf.py · The recipe

@dataclass(frozen=True)
class PPOConfig:
    """A run of PPO; the recipe's defaults are the paper's for 7B and 13B (section 3.2.3).

    ValueError, naming the numbers, for a recipe that cannot work.
    """

    model: str = "runs/rejection-sft/model"  # the policy's folder to begin with, which is π_0 as well
    helpfulness: str = "runs/reward-helpfulness/model"  # reward models' folders, of the policy's tokenizer
    safety: str | None = "runs/reward-safety/model"  # none: the helpfulness model decides alone
    lr: float = 1e-6  # of the policy, constant
    value_lr: float = 1e-6  # of the value model, constant
    betas: tuple[float, float] = (0.9, 0.95)  # of AdamW
    eps: float = 1e-5  # of AdamW
    weight_decay: float = 0.1  # of matrices; the norms' weights are exempt
    grad_clip: float = 1.0  # largest norm of the gradient, of each of the two models
    iterations: int = 400  # at most; the paper: 200 to 400, by early stopping
    batch: int = 512  # prompts of an iteration, over all GPUs
    minibatch: int = 64  # of them for one gradient step
    clip: float = 0.2  # of the ratio, and of the value
    beta: float = 0.01  # of the KL penalty; 34B and 70B: 0.005
    gate: float = 0.15  # probability of safe below which the safety model's score counts
    gamma: float = 1.0  # discount
    lam: float = 0.95  # of GAE
    unfinished: float = -1.0  # whitened score of an answer that does not end
    temperature: float = 1.0  # of the samples
    max_new_tokens: int = 1024  # of an answer
    recompute: bool = True  # log-probabilities of the samples anew, in training's arithmetic, not generation's
    seed: int = 0  # of prompts and samples

    prompts: Path = Path("prompts.jsonl")  # conversations that end with the user, and is_safety
    held_out: Path | None = None  # prompts for early stopping: the best version by their reward is kept
    every: int = 10  # iterations between looks at them
    patience: int = 5  # looks without a better one, after which training stops
    out: Path = Path("runs/ppo")  # log, checkpoints, and the trained model as a Hugging Face folder
    micro_batch: int = 4  # answers in one pass of one GPU; the rest of the minibatch is accumulated
    parallel: Parallel = field(default_factory=Parallel)
    save_every: int = 10  # iterations between checkpoints, from which the same command resumes
    keep: int = 2  # checkpoints that are kept
    tensorboard: bool = False  # beside out/log.jsonl

    def __post_init__(self):
        counts = "iterations", "batch", "minibatch", "max_new_tokens", "every", "patience", "micro_batch", "save_every"
        for name in (*counts, "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: expected at least 1")
        if self.batch % self.minibatch:
            raise ValueError(f"batch {self.batch} is not a multiple of minibatch {self.minibatch}")
        if self.parallel.tp != 1:
            raise ValueError(f"tp {self.parallel.tp}: PPO divides its models by FSDP alone, expected 1")
        if not 0 < self.gate < 1 or self.temperature <= 0 or self.beta < 0 or self.clip <= 0:
            numbers = f"gate {self.gate}, temperature {self.temperature}, beta {self.beta}, clip {self.clip}"
            raise ValueError(f"{numbers}: expected 0 < gate < 1, above 0, at least 0, above 0")


PPO = {
    "paper": PPOConfig(parallel=Parallel(ac="selective", reduce="micro_batch")),
    "paper-34B": PPOConfig(beta=0.005, micro_batch=1, parallel=Parallel(ac="full", reduce="micro_batch")),
    "mini": PPOConfig(
        lr=2e-4, value_lr=1e-3, iterations=60, batch=64, minibatch=32, beta=0.05, max_new_tokens=64, recompute=False,
        micro_batch=8,
    ),
}  # fmt: skip


# ---------- chapters/05_rlhf.py · An iteration

class PPOStep(NamedTuple):
    """What an iteration measured over its batch.

    `reward`, `helpful`, `safety`: mean logits, of R_c, R_h, R_s; `kl`: mean over answers of log π - log π_0, in nats;
    `loss`: the policy's clipped loss, and `value_loss` the value model's, mean over the tokens of a minibatch;
    `grad_norm`: of the policy alone, before clipping; these three are means over the minibatches;
    `ratio`: largest |π/π_old - 1| in the first minibatch; `clipped`: share of tokens outside the clip threshold;
    `finished`: share of answers with EOS; `tokens`: of answers, so far.
    """

    step: int
    reward: float
    helpful: float
    safety: float
    kl: float
    loss: float
    value_loss: float
    ratio: float
    clipped: float
    finished: float
    grad_norm: float
    tokens: int


class Batch(NamedTuple):
    "A batch of answers with all that the gradient steps need; `sums` over answers: R_c, R_h, R_s, KL, finished."

    rows: Rows
    lengths: Int[np.ndarray, "B"]
    old: Float[Tensor, "B T"]
    advantages: Float[Tensor, "B T"]
    values: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]
    sums: Float[Tensor, "5"]


def answered(
    policy: Policy, tokenizer: Tokenizer, asked: Sequence[list[int]], config: PPOConfig, seeds: Sequence[int]
) -> tuple[list[Completion], list[str], Bool[Tensor, "B"]]:
    "Sampled answers to prompts, whose tokens are `asked`; their texts, and which of them ended."
    device = policy.tok_embeddings.weight.device
    with consolidated(policy, torch.bfloat16 if device.type == "cuda" else None) as generator:
        made = generate(
            generator, asked, config.max_new_tokens, config.temperature, seed=seeds, eos_id=tokenizer.eos_id
        )
    texts, tidy = zip(*(untagged(decode_answer(tokenizer, completion.tokens)) for completion in made), strict=True)
    ended = [completion.finished and whole for completion, whole in zip(made, tidy, strict=True)]
    return made, list(texts), torch.tensor(ended, device=device)


def rollout(
    policy: Policy,
    reference: Policy,
    value: Value,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    asked: Sequence[list[int]],
    reward: Reward,
    config: PPOConfig,
    seeds: Sequence[int],
    group: dist.ProcessGroup | None = None,
) -> Batch:
    """Answer prompts, whose tokens are `asked`, and put rewards, values and advantages in place (Equation 4).

    All ranks of divided models enter together, with as many prompts each. ValueError and FloatingPointError as of
    `generate` and `Reward`.
    """
    device = policy.tok_embeddings.weight.device
    made, texts, finished = answered(policy, tokenizer, asked, config, seeds)
    scores = reward(prompts, texts)
    rows = Rows(*(x.to(device) for x in Rows.of(asked, [completion.tokens for completion in made])))
    mask = rows.targets != IGNORE
    lengths = np.array([len(ids) + len(c.tokens) - 1 for ids, c in zip(asked, made, strict=True)])
    order = passes(lengths, config.micro_batch)
    if config.recompute:
        old = in_passes(policy, rows, order, lengths, config.temperature)
    else:
        behaviour = torch.tensor([logprob for completion in made for logprob in completion.logprobs], device=device)
        old = torch.zeros(mask.shape, device=device).masked_scatter(mask, behaviour)
    log_ratio = old - in_passes(reference, rows, order, lengths, config.temperature)  # to π_0
    values = in_passes(value, rows, order, lengths) * mask

    combined = torch.tensor(scores.combined, device=device)
    final = torch.full_like(combined, config.unfinished)
    final[finished] = whiten(combined[finished], group)
    rewards = -config.beta * log_ratio
    rewards[torch.arange(len(rewards)), torch.tensor(lengths - 1)] += final
    advantages, returns = gae(rewards, values, mask, config.gamma, config.lam)
    advantages = torch.zeros_like(advantages).masked_scatter(mask, whiten(advantages[mask], group))
    sums = [*(part.sum() for part in scores), log_ratio.sum().item(), finished.sum().item()]
    return Batch(rows, lengths, old, advantages, values, returns, torch.tensor(sums, device=device))


def update(
    policy: Policy,
    value: Value,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    batch: Batch,
    these: Int[np.ndarray, "M"],
    config: PPOConfig,
    group: dist.ProcessGroup | None,
    counted: Float[Tensor, "3"],
) -> tuple[float, float, float]:
    """A gradient step of both models on a minibatch, the answers `these`: mean losses, and the policy's gradient norm.

    `counted` is added to: the largest |ratio - 1| so far, the tokens that are clipped, and the tokens.
    """
    rows, lengths, old, advantages, values, returns, _ = batch
    count = (rows.targets[these] != IGNORE).sum()
    if group is not None:
        dist.all_reduce(count, group=group)
    parts = []
    for order in passes(lengths[these], config.micro_batch):
        part = these[order]
        longest = lengths[part].max()
        parts.append([x[part, :longest] for x in (*rows, old, advantages, values, returns)])

    def policy_loss(model, tokens, targets, old, advantages):
        mask = targets != IGNORE
        logprobs = model(tokens, targets, config.temperature)
        away = ((logprobs - old)[mask].detach().exp() - 1).abs()
        counted[0] = torch.maximum(counted[0], away.max())
        counted[1] += (away > config.clip).sum()
        counted[2] += len(away)
        return ppo_losses(logprobs, old, advantages, config.clip)[mask].sum()

    def value_loss(model, tokens, targets, values, returns):
        return value_losses(model(tokens, targets), values, returns, config.clip)[targets != IGNORE].sum()

    reduce = config.parallel.reduce
    inputs = [(*part[:2], *part[2:4]) for part in parts], [(*part[:2], *part[4:]) for part in parts]
    loss, norm = train_step(policy, optimizers[0], inputs[0], count.item(), config.grad_clip, reduce, policy_loss)
    error, _ = train_step(value, optimizers[1], inputs[1], count.item(), config.grad_clip, reduce, value_loss)
    return loss, error, norm


def ppo(
    policy: Policy,
    reference: Policy,
    value: Value,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    reward: Reward,
    config: PPOConfig,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer] | None = None,
    start: int = 0,
    tokens: int = 0,
) -> Iterator[PPOStep]:
    """Train `policy`, and `value`, on prompts, yielding a `PPOStep` after each iteration (section 3.2.3).

    With the `optimizers` of an earlier part of the run, `start` at a later iteration, after so many `tokens`. The
    models may be of different sizes, and divided among ranks. ValueError without prompts, for one that leaves no room
    for an answer, and for a batch that the ranks cannot share; FloatingPointError, naming the iteration, for a score,
    loss or gradient that is not finite.
    """
    if not prompts:
        raise ValueError("no prompts to train on")
    rank, ranks, group = data_ranks(policy)
    if config.minibatch % ranks:
        raise ValueError(f"minibatch {config.minibatch} is not a multiple of {ranks} ranks")
    optimizers = optimizers or optimizers_of(policy, value, config)
    asked = [encode_dialog(tokenizer, prompt.messages)[0] for prompt in prompts]
    room = policy.config.max_seq_len
    if (least := min(reference.config.max_seq_len, value.config.max_seq_len)) < room:
        raise ValueError(f"a context of {least} tokens is too short for the policy's answers, which may have {room}")
    if (longest := max(map(len, asked))) >= room:
        number = next(i for i, ids in enumerate(asked) if len(ids) == longest)
        raise ValueError(f"prompt {number} has {longest} tokens: the context of {room} leaves no room for an answer")
    device = policy.tok_embeddings.weight.device
    for step in range(start, config.iterations):
        numbers = drawn(len(prompts), config.batch, step, config.seed)[rank::ranks]
        seeds = np.random.SeedSequence([config.seed, step]).generate_state(config.batch)[rank::ranks].tolist()
        try:
            batch = rollout(
                policy, reference, value, tokenizer, [prompts[i] for i in numbers], [asked[i] for i in numbers], reward,
                config, seeds, group,
            )  # fmt: skip
            measured, opening, share = [], None, config.minibatch // ranks
            counted = torch.zeros(3, device=device)
            for these in np.arange(len(numbers)).reshape(-1, share):
                measured.append(update(policy, value, optimizers, batch, these, config, group, counted))
                opening = counted[0].clone() if opening is None else opening
        except FloatingPointError as error:
            raise FloatingPointError(f"iteration {step}: {error}") from None
        sums = torch.cat([batch.sums, counted[1:]])
        if group is not None:
            dist.all_reduce(sums, group=group)
            dist.all_reduce(opening, op=dist.ReduceOp.MAX, group=group)
        *means, clipped, count = (sums / sums.new_tensor([*[config.batch] * 5, sums[6], 1.0])).tolist()
        tokens += int(count)
        loss, value_loss, norm = np.mean(measured, axis=0).tolist()
        *scores, kl, finished = means
        yield PPOStep(
            step, *scores, kl, loss, value_loss, opening.item(), clipped, finished, norm, tokens
        )


def optimizers_of(policy: Policy, value: Value, config: PPOConfig) -> tuple[torch.optim.AdamW, torch.optim.AdamW]:
    "AdamW for the two models that learn."
    settings = config.betas, config.eps, config.weight_decay
    return adamw(policy, config.lr, *settings), adamw(value, config.value_lr, *settings)


# ---------- chapters/05_rlhf.py · The run

def held_out_reward(
    policy: Policy, tokenizer: Tokenizer, prompts: Sequence[Prompt], reward: Reward, config: PPOConfig
) -> float:
    """Mean R_c, as a logit, of an answer to each prompt; the ranks of a divided policy share the prompts out.

    A rank that has none left answers one again, which does not count, so that all of them enter the passes together.
    As in training an answer that did not end has the mean of the others plus `unfinished` standard deviations of them;
    without any other one the result is -inf.
    """
    rank, ranks, group = data_ranks(policy)
    numbers = np.arange(rank, math.ceil(len(prompts) / ranks) * ranks, ranks)
    mine = [prompts[i] for i in numbers % len(prompts)]
    seeds = np.random.SeedSequence([config.seed, len(prompts)]).generate_state(len(prompts))[numbers % len(prompts)]
    asked = [encode_dialog(tokenizer, prompt.messages)[0] for prompt in mine]
    _, texts, finished = answered(policy, tokenizer, asked, config, seeds.tolist())
    finished &= torch.tensor(numbers < len(prompts), device=finished.device)
    combined = torch.tensor(reward(mine, texts).combined, device=finished.device)[finished].double()
    sums = torch.stack([combined.sum(), combined.square().sum(), finished.sum()])
    if group is not None:
        dist.all_reduce(sums, group=group)
    total, squares, ended = sums.tolist()
    if not ended:
        return -math.inf
    mean = total / ended
    deviation = max(squares / ended - mean**2, 0) ** 0.5
    return mean + config.unfinished * deviation * (1 - ended / len(prompts))


def opened(path: str, kind: type[Llama], holds: type[Llama], mesh, parallel: Parallel, device: torch.device) -> Llama:
    "The checkpoint of a model that `holds` says, as a model of a `kind` with the same parameters, divided over a mesh."
    shape, _, pieces = read_tensors(path, holds)
    model = without_memory(shape, kind)
    compute = torch.bfloat16 if device.type == "cuda" else None
    parallelize(model, mesh, parallel, compute).to_empty(device=device)
    copy_weights(model, pieces)
    return model


def run(config: PPOConfig) -> Path:
    """Train with PPO, or go on training, as `config` says; returns the folder of the trained policy.

    Writes out/log.jsonl, out/step-…, and out/model, a Hugging Face folder. ValueError, naming the folders, for reward
    models of another tokenizer or a shorter context; other errors as in `pretrain.run`.
    """
    with processes() as device:
        tokenizer = Tokenizer(config.model)
        judged_by = [folder for folder in (config.helpfulness, config.safety) if folder is not None]
        for folder in judged_by:
            if Tokenizer(folder).digest != tokenizer.digest:
                raise ValueError(f"{folder} has another tokenizer than {config.model}: expected the same")
        paths = [config.prompts] + [config.held_out] * (config.held_out is not None)
        prompts, *held_out = (read_prompts(path, tagged=config.safety is not None) for path in paths)
        digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths) + tokenizer.digest.encode()).hexdigest()
        frozen, most = replace(config.parallel, ac="none"), config.micro_batch
        mesh = make_mesh(config.parallel, device.type)
        policy = opened(config.model, Policy, Llama, mesh, config.parallel, device)
        reference = opened(config.model, Policy, Llama, mesh, frozen, device)
        value = opened(config.helpfulness, Value, RewardModel, mesh, config.parallel, device)
        with torch.no_grad():
            value.score.weight.zero_()
        scorers = []
        for folder in judged_by:
            judge = opened(folder, RewardModel, RewardModel, mesh, frozen, device)
            if (context := judge.config.max_seq_len) < policy.config.max_seq_len:
                raise ValueError(f"{folder} has a context of {context} tokens: expected {policy.config.max_seq_len}")
            scorers.append(partial(score, judge, tokenizer, batch=most, cut=True))
        rewards = Reward(*scorers, gate=config.gate)
        return train(config, policy, reference, value, tokenizer, prompts, held_out, rewards, digest)


def train(
    config: PPOConfig,
    policy: Policy,
    reference: Policy,
    value: Value,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    held_out: Sequence[Sequence[Prompt]],
    reward: Reward,
    digest: str,
) -> Path:
    "What `run` does when all is loaded: log, bar, checkpoints, early stopping on the first of `held_out`, if any."
    first, device = not dist.is_initialized() or dist.get_rank() == 0, policy.tok_embeddings.weight.device
    states = StateFolder(config.out, config.keep, in_background=device.type == "cuda")
    newest, optimizers = states.latest(), optimizers_of(policy, value, config)
    tensors = {
        f"{name}.{key}": tensor
        for name, model, optimizer in zip(("policy", "value"), (policy, value), optimizers, strict=True)
        for key, tensor in training_tensors(model, optimizer).items()
    }
    kept = {name: x for name, x in asdict(config).items() if name not in (*MAY_CHANGE, "prompts", "held_out")}
    facts = {"settings": json.loads(json.dumps(kept | {"data digest": digest}))}
    progress = {"step": 0, "tokens": 0, "best": None, "waited": 0}
    if newest:
        check_same(states.facts()["settings"], facts["settings"], newest)
        stored = states.load(tensors)
        progress = {name: stored[name] for name in progress}
    log = Log(config.out, progress["step"], config.tensorboard) if first else None
    lines = "RANK" in os.environ and not sys.stderr.isatty()
    bar = tqdm(
        total=config.iterations, initial=progress["step"], unit="iteration", desc="PPO", disable=not first or lines
    )
    loop = ppo(
        policy, reference, value, tokenizer, prompts, reward, config, optimizers, progress["step"], progress["tokens"]
    )
    folder = config.out / "model"

    def keep():
        save_checkpoint(policy, folder, tokenizer, dtype=torch.bfloat16 if device.type == "cuda" else None)

    try:
        for step in loop if progress["waited"] < config.patience else ():
            states.poll()
            progress |= {"step": step.step + 1, "tokens": step.tokens}
            line, last = {n: x if math.isfinite(x) else None for n, x in step._asdict().items()}, False
            if held_out and ((step.step + 1) % config.every == 0 or step.step + 1 == config.iterations):
                found = held_out_reward(policy, tokenizer, held_out[0], reward, config)
                better = progress["best"] is None or found > progress["best"]
                progress |= {"best": found, "waited": 0} if better else {"waited": progress["waited"] + 1}
                line["held_out"] = found if math.isfinite(found) else None
                last = progress["waited"] >= config.patience
                if better:
                    keep()
            if first:
                log.write(line)
                shown = f"reward {step.reward:.3f} | KL {step.kl:.2f} | finished {step.finished:.0%}"
                bar.set_postfix_str(shown, refresh=False)
                bar.update()
                if lines and ((step.step + 1) % max(1, config.iterations // 20) == 0 or last):
                    print(f"iteration {step.step + 1} of {config.iterations} | {shown}", flush=True)
            if last or (step.step + 1) % config.save_every == 0 or step.step + 1 == config.iterations:
                states.save(step.step + 1, tensors, facts | progress)
            if last:
                break
        states.wait()
    except FloatingPointError as error:
        states.wait()
        raise FloatingPointError(f"{error}; the last good checkpoint is {states.latest() or 'none'}") from None
    finally:
        bar.close()
        if log:
            log.close()
    if not held_out:
        keep()
    return folder


@record
def cli(prog: str = "python -m llama2lib.ppo"):
    "python -m llama2lib.ppo RECIPE [options]: PPO on two reward models (section 3.2.3); under torchrun, on all ranks."
    about = {name: f"{c.batch} prompts an iteration, β {c.beta:g}, lr {c.lr:g}" for name, c in PPO.items()}
    command(run, {name: (about[name], config) for name, config in PPO.items()}, prog)


if __name__ == "__main__":
    cli()
