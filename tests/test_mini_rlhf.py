"""The mini world's prompts for the iterated program, and what later chapters read from it."""

import json
from dataclasses import replace

import pytest

from llama2lib.dialog import check_dialog
from llama2lib.judge import read_task
from llama2lib.mini_rlhf import PROGRAM, asked, state_of
from llama2lib.recipes import write_atomic
from llama2lib.world import RISKS


def test_tagged_prompts_are_the_adversarial_ones():
    prompts = asked(0, 0, 40)
    assert sum(prompt.is_safety for prompt in prompts) == 10
    for prompt in prompts:
        check_dialog(prompt.messages)
        assert prompt.messages[-1]["role"] == "user"
        assert (read_task(prompt.messages).risk in RISKS) == prompt.is_safety
    assert not any(prompt.is_safety for prompt in asked(0, 0, 10, tagged=0.0))


def test_draws_differ_by_seed_number_and_split():
    draws = [asked(0, 0, 30), asked(1, 0, 30), asked(0, 1, 30), asked(0, 0, 30, "test")]
    assert draws[0] == asked(0, 0, 30)
    assert all(one != other for place, one in enumerate(draws) for other in draws[:place])


def test_the_state_behind_a_version_is_that_of_its_last_stage(tmp_path):
    for number, stage in enumerate("reward tune collect reward a b c d e ppo".split(), 1):
        write_atomic(tmp_path / "V2" / f"{number}-{stage}" / "done.json", json.dumps({"model": number}))
    config = replace(PROGRAM, out=tmp_path, model="chat")
    assert state_of(config, 0) == {"model": "chat"}
    assert state_of(config, 2)["model"] == 10  # not 9, though its name sorts last
    assert state_of(config, 2, "reward")["model"] == 4 and state_of(config, 2, "tune")["model"] == 2
    with pytest.raises(ValueError):
        state_of(config, 3)
