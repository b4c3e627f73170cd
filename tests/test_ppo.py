"""PPO: advantages, the clipped loss, where rewards stand, and a run that can stop and be divided."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import dies_after, random_model

from llama2lib import ppo as module
from llama2lib.checkpoint import load_checkpoint, save_checkpoint
from llama2lib.dialog import encode_dialog
from llama2lib.distributed import Parallel, StateFolder
from llama2lib.launch import torchrun_arguments
from llama2lib.ppo import (
    PPO,
    PPOConfig,
    answered,
    gae,
    held_out_reward,
    ppo,
    ppo_loss,
    ppo_losses,
    rollout,
    run,
    value_losses,
)
from llama2lib.pretrain import IGNORE
from llama2lib.reward import RewardModel, score
from llama2lib.rollout import Prompt, Reward, Rows, policy_of, value_of, whiten, write_prompts
from llama2lib.sft import SFTConfig, sft
from llama2lib.tokenizer import train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = "one two three four five six seven eight nine ten".split()
CONFIG = PPOConfig(
    lr=1e-3, value_lr=1e-3, iterations=3, batch=8, minibatch=4, max_new_tokens=5, micro_batch=3, recompute=False,
    temperature=0.8, beta=0.1,
)  # fmt: skip
PROMPTS = [
    Prompt([{"role": "user", "content": " ".join(WORDS[number % 7 : number % 7 + 1 + number % 4])}], number % 3 == 0)
    for number in range(13)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = [*WORDS, "[INST] [/INST] [INST]\n"] * 50
    return train_tokenizer(texts, 320, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="module")
def chat(tokenizer):
    "A model that answers with some words at random, so that not all answers end within CONFIG's five tokens."
    random = np.random.default_rng(0)
    said = [" ".join(random.choice(WORDS, random.integers(1, 5))) for _ in range(300)]
    dialogs = [[*PROMPTS[n % 13].messages, {"role": "assistant", "content": text}] for n, text in enumerate(said)]
    model = random_model("GQA", vocab_size=tokenizer.vocab_size)
    recipe = SFTConfig(lr=1e-2, batch_rows=16, max_seq_len=64, epochs=2, block_diagonal=True)
    for _ in sft(model, [encode_dialog(tokenizer, messages) for messages in dialogs], recipe):
        pass
    return model


@pytest.fixture
def models(chat, tokenizer):
    "Policy, reference, value model and a reward model, of two sizes."
    model = chat
    scoring = RewardModel.of(random_model("MHA", seed=1, vocab_size=tokenizer.vocab_size))
    torch.nn.init.normal_(scoring.score.weight, generator=torch.Generator().manual_seed(1))
    return policy_of(model), policy_of(model), value_of(scoring), scoring


def rewarded(models, tokenizer):
    safety = lambda dialogs: np.array([len(messages[-1]["content"]) for messages in dialogs])  # noqa: E731
    return Reward(partial(score, models[3], tokenizer, batch=4), safety)


def batch_of(models, tokenizer, config=CONFIG, reward=None):
    asked = [encode_dialog(tokenizer, prompt.messages)[0] for prompt in PROMPTS]
    reward = reward or rewarded(models, tokenizer)
    return rollout(*models[:3], tokenizer, PROMPTS, asked, reward, config, list(range(len(PROMPTS))))


def test_advantages_are_sums_of_later_surprises():
    "Against the definition: A_t is the sum of (γλ)^k δ_{t+k}, δ_t = r_t + γ V_{t+1} - V_t."
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 9, generator=generator, dtype=torch.float64)
    mask = torch.zeros(3, 9, dtype=torch.bool)
    for row, (begin, end) in enumerate([(0, 9), (2, 6), (5, 6)]):
        mask[row, begin:end] = True
    for gamma, lam in (1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0):
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        for row, (begin, end) in enumerate([(0, 9), (2, 6), (5, 6)]):
            v = [*values[row, begin:end].tolist(), 0.0]
            deltas = [r + gamma * v[t + 1] - v[t] for t, r in enumerate(rewards[row, begin:end].tolist())]
            expected = [
                sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(end - begin)
            ]
            assert advantages[row, begin:end].tolist() == pytest.approx(expected)
            assert returns[row, begin:end].tolist() == pytest.approx([a + b for a, b in zip(expected, v, strict=False)])
        assert not advantages[~mask].any() and not returns[~mask].any()


def test_what_stands_outside_the_answers_changes_no_advantage():
    mask = torch.tensor([[False, True, True, False]])
    rewards, values = torch.tensor([[0.0, 1, 2, 0]]), torch.tensor([[0.0, 0.5, 0.1, 0]])
    clean = gae(rewards, values, mask)
    dirty = gae(rewards + 7 * ~mask, values + 9 * ~mask, mask)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_the_ratio_is_clipped_only_where_that_lowers_the_gain():
    old = torch.zeros(4)
    new = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0])
    assert ppo_losses(new, old, advantages, 0.2).tolist() == pytest.approx([-2.4, 3.0, -1.0, 1.6])
    new.requires_grad_()
    ppo_losses(new, old, advantages, 0.2).sum().backward()
    assert (new.grad != 0).tolist() == [False, True, True, False]


def test_the_loss_is_a_mean_over_answer_tokens():
    new, old, advantages = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 1, 1, 0]], dtype=torch.bool)
    expected = sum(ppo_losses(new[i, j], old[i, j], advantages[i, j]) for i, j in mask.nonzero().tolist()) / 5
    assert ppo_loss(new, old, advantages, mask) == pytest.approx(expected.item())
    assert ppo_loss(new + 3.0 * ~mask, old, advantages, mask) == pytest.approx(expected.item())


def test_the_value_loss_does_not_reward_a_leap():
    values, old, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    assert value_losses(values, old, returns, 0.2).tolist() == pytest.approx([0.5 * 0.8**2, 0.5 * 0.9**2])


def test_the_first_minibatch_has_a_ratio_of_one(models, tokenizer):
    "With generation's log-probabilities nearly, with recomputed ones exactly when the passes are the same."
    for recompute, most in (False, 1e-5), (True, 0.0):
        config = replace(CONFIG, recompute=recompute, minibatch=8, micro_batch=8)
        steps = list(ppo(*part_of(models), tokenizer, PROMPTS, rewarded(models, tokenizer), config))
        assert steps[0].ratio <= most and steps[2].ratio <= max(most, 1e-5), recompute
        assert steps[0].kl == pytest.approx(0, abs=1e-4) and abs(steps[2].kl) > 1e-4


def test_answers_are_sampled_from_the_whole_distribution(models, tokenizer):
    "In the mean a sample is as surprising as the entropy says; without the unlikely tokens it would be less so."
    asked = [encode_dialog(tokenizer, prompt.messages)[0] for prompt in PROMPTS] * 40
    made, _, _ = answered(models[0], tokenizer, asked, CONFIG, range(len(asked)))
    rows = Rows.of(asked, [completion.tokens for completion in made])
    answers = rows.targets != IGNORE
    with torch.no_grad():
        logprobs = (load_plain(models[0])(rows.tokens)[answers] / CONFIG.temperature).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    beyond = -logprobs.gather(1, rows.targets[answers][:, None])[:, 0] - entropy
    assert len(beyond) > 1500 and abs(beyond.mean()) < 4 * beyond.std() / len(beyond) ** 0.5


def test_the_score_stands_on_the_last_token_of_an_answer(models, tokenizer):
    "Without a penalty, discount and value, every token's return is the whitened score of its answer."
    config = replace(CONFIG, lam=1.0, beta=0.0)
    rising = Reward(lambda dialogs: np.arange(len(dialogs), dtype=np.float32))
    batch = batch_of(models, tokenizer, config, rising)
    mask = batch.rows.targets != IGNORE
    ended = torch.tensor([tokenizer.eos_id in row.tolist() for row in batch.rows.targets])
    assert 2 < ended.sum() < len(PROMPTS)
    expected = torch.full((len(PROMPTS),), config.unfinished)
    expected[ended] = whiten(torch.arange(len(PROMPTS)).float()[ended])
    torch.testing.assert_close(batch.returns, expected[:, None] * mask)
    assert (batch.lengths - 1 == [row.nonzero().max().item() for row in mask]).all()
    early = batch_of(models, tokenizer, replace(config, lam=0.0), rising)
    assert (early.returns != 0).sum(1).tolist() == [1] * len(PROMPTS)  # all of the surprise is at the last token
    assert (early.returns.abs().argmax(1) == torch.tensor(batch.lengths - 1)).all()


def test_moving_away_from_the_reference_costs(models, tokenizer):
    "The last term of Equation 4, token by token, at the temperature of the samples."
    policy, _, value, scoring = models
    other = policy_of(random_model("MHA", seed=3, vocab_size=tokenizer.vocab_size))
    nothing = Reward(lambda dialogs: np.zeros(len(dialogs), np.float32))
    config = replace(CONFIG, unfinished=0.0, lam=0.0, beta=0.5)
    batch = batch_of((policy, other, value, scoring), tokenizer, config, nothing)
    targets = batch.rows.targets
    expected = torch.zeros(targets.shape)
    for model, sign in (policy, -0.5), (other, 0.5):
        logits = torch.nn.Module.__call__(load_plain(model), batch.rows.tokens) / 0.8
        chosen = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
        expected += sign * chosen * (targets != IGNORE)
    torch.testing.assert_close(batch.returns, expected, atol=2e-5, rtol=0)
    assert batch.sums[3].item() == pytest.approx(-expected.sum().item() / 0.5, abs=1e-3)


def load_plain(policy):
    "The language model that a policy is."
    model = random_model("GQA")
    model = type(model)(policy.config)
    model.load_state_dict(policy.state_dict())
    return model


def test_advantages_are_whitened_over_the_tokens_of_answers(models, tokenizer):
    batch = batch_of(models, tokenizer)
    advantages = batch.advantages[batch.rows.targets != IGNORE]
    assert advantages.mean().abs() < 1e-5 and advantages.square().mean() == pytest.approx(1, abs=1e-4)
    assert not batch.advantages[batch.rows.targets == IGNORE].any()


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_passes_change_nothing(models, tokenizer, micro_batch):
    expected, found = (
        list(ppo(*part_of(models), tokenizer, PROMPTS, rewarded(models, tokenizer), recipe))
        for recipe in (CONFIG, replace(CONFIG, micro_batch=micro_batch))
    )
    for one, other in zip(expected, found, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


def part_of(models):
    "Fresh copies of policy, reference and value model."
    policy, reference, _, scoring = models
    return policy_of(policy), reference, value_of(scoring)


def test_ppo_finds_what_is_rewarded(models, tokenizer):
    "Answers gain the word that the reward counts, though they may move only so far from the reference."
    reward = Reward(lambda dialogs: np.array([m[-1]["content"].split().count("seven") for m in dialogs], np.float32))
    config = replace(CONFIG, lr=3e-3, iterations=20, batch=32, minibatch=16, micro_batch=16, max_new_tokens=12)
    steps = list(ppo(*models[:3], tokenizer, PROMPTS, reward, config))
    early, late = (np.mean([step.reward for step in part]) for part in (steps[:5], steps[-5:]))
    assert late > early + 0.3, (early, late)
    assert steps[-1].kl > 0


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"batch": 10, "minibatch": 4}, "batch 10 is not a multiple of minibatch 4"),
        ({"minibatch": 0}, "minibatch 0: expected at least 1"),
        ({"gate": 0.0}, "gate 0.0"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"parallel": Parallel(tp=2)}, "tp 2: PPO divides its models by FSDP alone"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(change, told):
    with pytest.raises(ValueError, match=told):
        replace(CONFIG, **change)


def test_bad_inputs_are_named(models, tokenizer):
    policy, reference, value, _ = models
    short = policy_of(random_model("GQA", vocab_size=tokenizer.vocab_size, max_seq_len=64))
    reward = rewarded(models, tokenizer)
    with pytest.raises(ValueError, match="no prompts"):
        next(ppo(policy, reference, value, tokenizer, [], reward, CONFIG))
    with pytest.raises(ValueError, match="a context of 64 tokens is too short for the policy's answers"):
        next(ppo(policy, short, value, tokenizer, PROMPTS, reward, CONFIG))
    long = [*PROMPTS, Prompt([{"role": "user", "content": "one " * 200}], False)]
    with pytest.raises(ValueError, match=r"prompt 13 has \d+ tokens: the context of 128"):
        next(ppo(policy, reference, value, tokenizer, long, reward, CONFIG))
    broken = Reward(lambda dialogs: np.full(len(dialogs), np.inf))
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    with pytest.raises(FloatingPointError, match="iteration 0: scores of answer 0"):
        next(ppo(policy, reference, value, tokenizer, PROMPTS, broken, CONFIG))
    assert all(torch.equal(weight, before[name]) for name, weight in policy.state_dict().items())


# the command


@pytest.fixture
def recipe(models, tokenizer, tmp_path):
    policy, _, _, scoring = models
    save_checkpoint(load_plain(policy), tmp_path / "chat", tokenizer)
    save_checkpoint(scoring, tmp_path / "helpful", tokenizer)
    other = RewardModel.of(random_model("MQA", seed=2, vocab_size=tokenizer.vocab_size))
    torch.nn.init.normal_(other.score.weight, generator=torch.Generator().manual_seed(2))
    save_checkpoint(other, tmp_path / "safe", tokenizer)
    write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    folders = {name: str(tmp_path / folder) for name, folder in [("model", "chat"), ("helpfulness", "helpful")]}
    return replace(
        CONFIG, **folders, safety=str(tmp_path / "safe"), prompts=tmp_path / "prompts.jsonl", save_every=1, iterations=4
    )


def log(folder: Path, name: str = "loss") -> list:
    return [json.loads(line)[name] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_killed_run_ends_as_one_that_was_not(recipe, tmp_path, monkeypatch):
    run(replace(recipe, out=tmp_path / "whole"))
    monkeypatch.setattr(module, "ppo", dies_after(ppo, 3))
    with pytest.raises(RuntimeError, match="told to die"):
        run(replace(recipe, out=tmp_path / "cut"))
    assert StateFolder(tmp_path / "cut").latest().name == "step-00000003"
    monkeypatch.setattr(module, "ppo", ppo)
    run(replace(recipe, out=tmp_path / "cut"))
    for name in ("loss", "value_loss", "reward", "kl", "tokens", "ratio"):
        assert log(tmp_path / "cut", name) == log(tmp_path / "whole", name)
    one, other = (load_checkpoint(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())
    with pytest.raises(ValueError, match=r"beta 0\.1, now 0\.2"):
        run(replace(recipe, out=tmp_path / "cut", beta=0.2))


def test_the_gate_of_the_recipe_decides_whose_score_counts(recipe, tmp_path):
    "With a gate near 1 every answer is below it, and R_c is R_s; near 0 only tagged prompts have R_s."
    for gate in (1 - 1e-9, 1e-9):
        run(replace(recipe, gate=gate, iterations=1, out=tmp_path / str(gate)))
        reward, safety = (log(tmp_path / str(gate), name) for name in ("reward", "safety"))
        assert (reward == safety) == (gate > 0.5)


def test_two_processes_learn_what_one_learns(recipe, tmp_path):
    "Thirteen held-out prompts do not divide among two ranks: seven and six, which are not as many passes."
    recipe = replace(recipe, held_out=recipe.prompts, every=1)
    run(replace(recipe, out=tmp_path / "one"))
    names = "model helpfulness safety prompts lr value_lr iterations batch minibatch max_new_tokens temperature beta"
    options = [x for n in names.split() for x in (f"--{n.replace('_', '-')}", getattr(recipe, n))]
    options += ["--held-out", recipe.held_out, "--every", 1, "--out", tmp_path / "two", "--micro-batch", 2]
    conftest.torchrun(*torchrun_arguments("llama2lib.ppo", "mini", *options, nproc=2))
    for name in "reward helpful safety kl loss value_loss clipped finished tokens held_out".split():
        one, two = (log(tmp_path / out, name) for out in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-5, abs=1e-5), name


def test_the_best_version_on_held_out_prompts_is_kept(recipe, tmp_path, monkeypatch):
    looks = iter([1.0, 3.0, 2.0, 2.5, 9.0])
    monkeypatch.setattr(module, "held_out_reward", lambda *_: next(looks))
    recipe = replace(recipe, iterations=9, every=1, patience=2, held_out=recipe.prompts, out=tmp_path / "out")
    run(recipe)
    assert log(recipe.out, "held_out") == [1.0, 3.0, 2.0, 2.5]  # two looks without a better one
    run(recipe)  # nothing is left to do
    assert len(log(recipe.out)) == 4
    monkeypatch.undo()
    two = replace(recipe, iterations=2, held_out=None, out=tmp_path / "two")
    run(two)
    one, other = (load_checkpoint(folder / "model").state_dict() for folder in (recipe.out, two.out))
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_an_answer_that_did_not_end_is_held_against_the_policy(models, tokenizer, monkeypatch):
    "As in training: a deviation below the mean of the answers that ended, whatever its own score is."
    policy, said = models[0], ["1", "9", "5", "3"]
    rated = Reward(lambda dialogs: np.array([float(dialog[-1]["content"]) for dialog in dialogs]))

    def look(ended):
        monkeypatch.setattr(module, "answered", lambda *_: (None, said, torch.tensor(ended)))
        return held_out_reward(policy, tokenizer, PROMPTS[:4], rated, CONFIG)

    assert look([True] * 4) == pytest.approx(4.5)
    assert look([True, False, True, True]) == pytest.approx(3 - (8 / 3) ** 0.5 / 4)
    assert look([False] * 4) == -np.inf


def test_a_reward_model_of_another_tokenizer_is_refused(recipe, tmp_path):
    other = train_tokenizer([*reversed(WORDS), "[INST] [/INST]\n"] * 50, 320, tmp_path / "other.model")
    save_checkpoint(random_reward(other), tmp_path / "other", other)
    with pytest.raises(ValueError, match=r"other has another tokenizer than .*chat"):
        run(replace(recipe, safety=str(tmp_path / "other"), out=tmp_path / "out"))


def test_a_reward_model_must_hold_what_the_policy_says(recipe, tokenizer, tmp_path):
    "One of a shorter context is refused; in one as long, an answer that fills the context is scored without its EOS."
    save_checkpoint(random_reward(tokenizer, max_seq_len=64), tmp_path / "short", tokenizer)
    with pytest.raises(ValueError, match="short has a context of 64 tokens: expected 128"):
        run(replace(recipe, safety=str(tmp_path / "short"), out=tmp_path / "out"))
    long = Prompt([{"role": "user", "content": "one " * 115}], False)
    assert 120 < len(encode_dialog(tokenizer, long.messages)[0]) < 126
    write_prompts(tmp_path / "long.jsonl", [long])
    run(replace(recipe, prompts=tmp_path / "long.jsonl", max_new_tokens=50, iterations=1, out=tmp_path / "long"))
    assert np.isfinite(log(tmp_path / "long", "helpful")).all()


def random_reward(tokenizer, **changes):
    return RewardModel.of(random_model("MHA", vocab_size=tokenizer.vocab_size, **changes))


def test_the_papers_constants():
    paper = PPO["paper"]
    assert (paper.lr, paper.betas, paper.eps) == (1e-6, (0.9, 0.95), 1e-5)
    assert (paper.weight_decay, paper.grad_clip) == (0.1, 1.0)
    assert (paper.batch, paper.minibatch, paper.clip, paper.gate) == (512, 64, 0.2, 0.15)
    assert (paper.beta, PPO["paper-34B"].beta) == (0.01, 0.005)
