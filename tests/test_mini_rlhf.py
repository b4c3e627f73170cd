"""The mini world's prompts for the iterated program, the program, and what later chapters read from it."""

import json
import os
import subprocess
import sys
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


RUN = """
from llama2lib.mini_rlhf import program, state_of

config = program(0)
print("made", state_of(config, len(config.versions))["model"].split("/program/")[1], flush=True)
assert program(0) == config
"""


def test_the_program_runs_once_at_the_smoke_scale():
    found = os.environ | {"LLAMA2_SCALE": "smoke", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, env=found)
    assert ran.returncode == 0, ran.stderr[-3000:]
    first, again = ran.stdout.split("made ")
    stages = ["V1 collect", "V1 reward", "V1 reject", "V1 tune"]
    stages += ["V2 collect", "V2 reward", "V2 bag", "V2 tune", "V2 ppo"]
    assert [line for line in first.splitlines() if line.startswith("V")] == stages
    assert again == "V2/5-ppo/model\n"  # nothing was made anew


def test_two_processes_make_a_program_one_after_the_other(tmp_path):
    "As two notebooks do that are tested side by side."
    code = "from llama2lib.mini_rlhf import program; print(program(0).out.exists())"
    environment = os.environ | {"LLAMA2_CACHE": str(tmp_path), "LLAMA2_SCALE": "smoke", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in started:
        out, errors = process.communicate(timeout=300)
        assert process.returncode == 0 and out.endswith("True\n"), errors[-2000:]
