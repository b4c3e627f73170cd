"""Killed at random moments, saves included, a run comes back and ends with the very same weights.

FAULTS=50 python -m pytest tests/test_faults.py, or make faults, kills more often than the tests of every day.
"""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from worker import config

from llama2lib.checkpoint import load_checkpoint
from llama2lib.pretrain import run
from llama2lib.shards import write_shards
from llama2lib.tokenizer import train_tokenizer

FAULTS = int(os.environ.get("FAULTS", "6"))


def attempt(fields: str):
    torch.set_num_threads(1)
    run(config(fields))


def started(context, fields: dict):
    process = context.Process(target=attempt, args=(json.dumps(fields),))
    process.start()
    return process


@pytest.mark.parametrize("save_every", [1, 3])
def test_kills_at_random_moments_change_nothing(tmp_path, save_every):
    texts = [f"{n} llamas and {m} alpacas eat {n * m} leaves." for n in range(40) for m in range(40)]
    shards = tmp_path / "shards"
    write_shards(shards, train_tokenizer(texts, 300, shards / "tokenizer.model"), texts)
    context = multiprocessing.get_context("forkserver")  # a fresh process in milliseconds, PyTorch already imported
    context.set_forkserver_preload(["llama2lib.pretrain"])
    fields = {"data": str(shards), "save_every": save_every, "batch_tokens": 256, "tokens": 256 * 30}

    alone = {**fields, "out": str(tmp_path / "alone")}
    begin = time.perf_counter()
    process = started(context, alone)
    process.join()
    whole = time.perf_counter() - begin
    assert process.exitcode == 0

    killed, chance = {**fields, "out": str(tmp_path / "killed")}, random.Random(save_every)
    kills, while_saving, steps = 0, 0, []
    folder, left = Path(killed["out"]), set()
    while kills < FAULTS:
        process = started(context, killed)
        process.join(chance.uniform(0.2, 1) * whole)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), "a restart failed"
        before, left = left, {path.stat().st_ino for path in folder.glob(".step-*.partial")}
        while_saving += bool(left - before)  # one that an earlier kill left, before any new save, counts once
        if process.exitcode == 0:  # it got to the end: begin anew, so that all kills hit a run
            steps.append(compare(tmp_path))
            folder.rename(tmp_path / f"finished-{len(steps)}")
            left = set()
    process = started(context, killed)
    process.join()
    assert process.exitcode == 0
    compare(tmp_path)
    assert FAULTS < 50 or while_saving, "no kill hit a save"
    print(f"{kills} kills, {while_saving} of them while a checkpoint was being written")


def compare(tmp_path: Path):
    one, other = (load_checkpoint(tmp_path / name / "model") for name in ("alone", "killed"))
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), f"{name} differs"
    lines = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("alone", "killed")
    ]
    assert lines[0] == lines[1], "the logs differ"
