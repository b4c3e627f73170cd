"""What rejection sampling and PPO share: prompts, the reward, log-probabilities in passes, whole weights."""

import math
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import random_model, torchrun

from llama2lib.distributed import Parallel, make_mesh, parallelize, processes
from llama2lib.generation import generate
from llama2lib.ppo import combined_reward, whiten
from llama2lib.pretrain import IGNORE
from llama2lib.reward import RewardModel, passes
from llama2lib.rollout import (
    Policy,
    Prompt,
    Reward,
    Rows,
    consolidated,
    drawn,
    in_passes,
    policy_of,
    read_prompts,
    untagged,
    value_of,
    write_prompts,
)

ASKED = Prompt([{"role": "user", "content": "what is red"}], False)


def test_prompts_are_read_as_written(tmp_path):
    prompts = [ASKED, Prompt([*ASKED.messages, {"role": "assistant", "content": "é"}, *ASKED.messages], True)]
    write_prompts(tmp_path / "p.jsonl", prompts)
    assert read_prompts(tmp_path / "p.jsonl") == prompts


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"messages": [{"role": "user", "content": "hi"}]}', "is_safety: found None; expected true where"),
        ('{"messages": [{"role": "user", "content": "hi"}], "is_safety": 1}', "is_safety: found 1; expected true"),
        ('{"messages": [{"role": "assistant", "content": "hi"}], "is_safety": true}', "message 0: assistant first"),
        ('{"prompt": "hi"}', "expected an object with a list in the field 'messages'"),
        ("hi", "not JSON"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "messages: the assistant's comes last; expected the user's",
        ),
    ],
)
def test_a_row_that_is_no_prompt_is_named(tmp_path, line, told):
    file = tmp_path / "p.jsonl"
    write_prompts(file, [ASKED])
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"p\.jsonl:2: {told}"):
        read_prompts(file)


def test_tags_may_be_missing_where_no_safety_model_needs_them(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert read_prompts(tmp_path / "p.jsonl", tagged=False)[0].is_safety is False
    (tmp_path / "p.jsonl").write_text("")
    with pytest.raises(ValueError, match="no prompts"):
        read_prompts(tmp_path / "p.jsonl")


def test_every_prompt_comes_once_before_one_comes_again():
    numbers = np.concatenate([drawn(10, 4, step, seed=3) for step in range(5)])
    assert sorted(numbers[:10]) == sorted(numbers[10:]) == list(range(10))
    assert list(numbers[:10]) != list(numbers[10:])
    assert list(drawn(3, 7, 0, 0)) != list(drawn(3, 7, 0, 1))


def test_the_safety_model_counts_where_the_prompt_is_tagged_or_the_answer_unsafe():
    gate = math.log(0.15 / 0.85)
    safety = torch.tensor([5.0, 5.0, gate - 0.01, gate + 0.01, 40.0])
    helpful = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    tagged = torch.tensor([True, False, False, False, True])
    found = combined_reward(safety, helpful, tagged)
    assert found.tolist() == [5.0, 2.0, pytest.approx(gate - 0.01), 4.0, 40.0]  # 40 is 1.0 as a float32 probability
    assert combined_reward(safety, helpful, tagged, gate=0.1)[2] == 3.0


def test_whitening_has_mean_0_and_variance_1_also_of_one_number():
    x = torch.tensor([3.0, 5.0, 10.0, -4.0])
    assert whiten(x).mean().abs() < 1e-6 and whiten(x).square().mean() == pytest.approx(1, abs=1e-5)
    assert torch.equal(whiten(x).argsort(), x.argsort())
    assert whiten(x[:1]).tolist() == [0.0] and whiten(x[:0]).tolist() == []


def by_length(dialogs):
    return np.array([len(messages[-1]["content"]) for messages in dialogs], np.float32)


def test_reward_gives_all_three_scores_and_refuses_what_is_no_number():
    tagged = ASKED._replace(is_safety=True)
    scores = Reward(by_length, lambda dialogs: -by_length(dialogs))([ASKED, tagged, ASKED], ["a", "abc", "abcd"])
    assert scores.combined.tolist() == [1, -3, -4]  # the third is unsafe: below the gate
    assert scores.helpful.tolist() == [1, 3, 4] and scores.safety.tolist() == [-1, -3, -4]
    alone = Reward(by_length)([ASKED, tagged], ["a", "abc"])
    assert alone.combined.tolist() == [1, 3] and np.isnan(alone.safety).all()
    with pytest.raises(FloatingPointError, match=r"answer 1, 'b': helpfulness 1.0, safety nan; expected numbers"):
        Reward(by_length, lambda _: np.array([0.0, np.nan]))([ASKED, tagged], ["a", "b"])


def test_an_answer_ends_where_a_tag_begins():
    assert untagged("yes <<SYS>> [INST]") == ("yes", False)
    assert untagged(" yes") == (" yes", True)


PROMPTS, ANSWERS = [[1, 5, 6], [1, 7], [1, 8, 9, 10, 11]], [[20, 2], [21, 22, 23, 2], [24]]


def test_rows_hold_the_tokens_of_answers_as_targets_and_nothing_else():
    tokens, targets = Rows.of(PROMPTS, ANSWERS)
    assert tokens.tolist() == [[1, 5, 6, 20, 2], [1, 7, 21, 22, 23], [1, 8, 9, 10, 11]]
    no = IGNORE
    assert targets.tolist() == [[no, no, 20, 2, no], [no, 21, 22, 23, 2], [no, no, no, no, 24]]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_logits_at_the_temperature(temperature):
    model = random_model("GQA")
    rows = Rows.of(PROMPTS, ANSWERS)
    found = policy_of(model)(*rows, temperature)
    for row, prompt, answer in zip(found, PROMPTS, ANSWERS, strict=True):
        logprobs = (model(torch.tensor([prompt + answer]))[0] / temperature).log_softmax(-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        expected = torch.zeros_like(row)
        expected[places] = logprobs[places, answer]
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=0)


def test_generation_returns_the_logprobs_that_training_computes():
    model = random_model("GQA")
    made = generate(model, PROMPTS, 12, temperature=0.8, seed=5, eos_id=2)
    found = policy_of(model)(*Rows.of(PROMPTS, [c.tokens for c in made]), 0.8)
    returned = torch.tensor([logprob for c in made for logprob in c.logprobs])
    torch.testing.assert_close(found[found != 0], returned, atol=1e-5, rtol=0)


def test_passes_take_similar_lengths_together_and_change_nothing():
    lengths = np.array([9, 2, 7, 3, 8, 1, 5])
    order = passes(lengths, 3)
    assert [len(these) for these in order] == [3, 2, 2]
    assert list(lengths[np.concatenate(order)]) == sorted(lengths)
    rows, policy = Rows.of(PROMPTS, ANSWERS), policy_of(random_model("GQA"))
    lengths = np.array([len(p) + len(a) - 1 for p, a in zip(PROMPTS, ANSWERS, strict=True)])
    together = in_passes(policy, rows, passes(lengths, 3), lengths, 0.7)
    alone = in_passes(policy, rows, passes(lengths, 1), lengths, 0.7)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, policy(*rows, 0.7), atol=1e-5, rtol=0)


def test_a_value_model_begins_at_zero_with_the_reward_models_body():
    reward_model = RewardModel.of(random_model("GQA"))
    torch.nn.init.normal_(reward_model.score.weight)
    value, rows = value_of(reward_model), Rows.of(PROMPTS, ANSWERS)
    assert value(*rows).shape == rows.tokens.shape and not value(*rows).any()
    with torch.no_grad():
        value.score.weight.copy_(reward_model.score.weight)
    last = torch.tensor([[0], [3], [4]])
    torch.testing.assert_close(value(*rows).gather(1, last), reward_model(rows.tokens, last))


def test_whole_weights_need_no_copy():
    model = random_model()
    with consolidated(model) as same:
        assert same is model
    assert model.output.weight.numel()


def test_two_processes_gather_weights_and_whiten_together():
    torchrun("--standalone", "--nproc-per-node=2", __file__)


def main():
    "On each of two ranks: a divided model generates as a whole one does, and its copy is gone afterwards."
    with processes() as device:
        whole_model = random_model("GQA")
        model = policy_of(random_model("GQA"))
        divided = parallelize(model, make_mesh(Parallel(), device.type), Parallel())
        with consolidated(divided) as copy:
            assert not isinstance(copy, Policy)
            for name, weight in copy.named_parameters():
                assert torch.equal(weight, whole_model.get_parameter(name)), name
            settings = dict(max_new_tokens=8, temperature=1.0, seed=1, eos_id=2)
            assert generate(copy, PROMPTS, **settings) == generate(whole_model, PROMPTS, **settings)
        assert all(weight.numel() == 0 for weight in copy.parameters())
        x = torch.randn(7, generator=torch.Generator().manual_seed(0))
        mine = x[:2] if dist.get_rank() == 0 else x[2:]
        expected = whiten(x)[:2] if dist.get_rank() == 0 else whiten(x)[2:]
        torch.testing.assert_close(whiten(mine, dist.group.WORLD), expected)


if __name__ == "__main__":
    sys.exit(main())
