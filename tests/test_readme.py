"""The README's examples run as printed, on a small model in place of Meta's."""

import re
import runpy
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import random_model

from llama2lib.checkpoint import load_checkpoint, save_checkpoint
from llama2lib.model import LLAMA2
from llama2lib.reward import RewardModel
from llama2lib.tokenizer import train_tokenizer

README = Path(__file__).resolve().parent.parent / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)


def test_the_example_loads_writes_and_saves(tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["the capital of france is warm and water boils"] * 9, 300, tmp_path / "t.model")
    shape = vars(replace(LLAMA2["debug"], vocab_size=300))
    save_checkpoint(random_model(**shape), tmp_path / "Llama-2-7b", tokenizer=tokenizer)
    code, _ = EXAMPLES
    assert 'device="cuda", dtype=torch.bfloat16' in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace('device="cuda", dtype=torch.bfloat16', 'device="cpu"'), {})
    assert capsys.readouterr().out.startswith("The capital of France is")
    assert load_checkpoint(tmp_path / "copy").config == load_checkpoint(tmp_path / "Llama-2-7b").config


def test_the_example_scores_an_answer(tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["[INST] where does tom live [/INST] in oslo"] * 9, 300, tmp_path / "t.model")
    model = RewardModel.of(random_model(**vars(replace(LLAMA2["debug"], vocab_size=300))))
    model.score.weight.data.fill_(0.1)
    save_checkpoint(model, tmp_path / "runs" / "rm" / "model", tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(EXAMPLES[1], names)
    scores = names["scorer"]([names["dialog"]])
    assert capsys.readouterr().out == f"{scores}\n" and scores[0]


def test_the_timings_are_those_of_the_benchmarks():
    made = runpy.run_path(str(README.parent / "tests" / "benchmarks" / "table.py"))
    assert made["table"]() in README.read_text() and made["contamination"]() in README.read_text()


COMMANDS = re.findall(r"-m (llama2lib\.\w+) ([^\n#]*)", README.read_text())


@pytest.mark.parametrize(("module", "options"), COMMANDS, ids=[module for module, _ in COMMANDS])
def test_every_command_knows_its_options(module, options):
    "With --help behind them the options are parsed and nothing is run; an unknown one is an error first."
    words = [sys.executable, "-m", module, *shlex.split(options)]
    for extra, code in (["--help"], 0), (["--no-such-option", "1"], 2):
        ran = subprocess.run([*words, *extra], capture_output=True, text=True, cwd=README.parent)
        assert ran.returncode == code, ran.stderr
    shown = subprocess.run([*words[:3], "--help"], capture_output=True, text=True, cwd=README.parent).stdout
    shown += subprocess.run([*words[:4], "--help"], capture_output=True, text=True, cwd=README.parent).stdout
    assert all(word in shown for word in words if word.startswith("--"))
