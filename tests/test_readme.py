"""The README's example runs as printed, on a small model in place of Meta's."""

import re
from dataclasses import replace
from pathlib import Path

from conftest import random_model

from llama2lib.checkpoint import load_checkpoint, save_checkpoint
from llama2lib.model import LLAMA2
from llama2lib.tokenizer import train_tokenizer

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_example_loads_writes_and_saves(tmp_path, monkeypatch, capsys):
    tokenizer = train_tokenizer(["the capital of france is warm and water boils"] * 9, 300, tmp_path / "t.model")
    shape = vars(replace(LLAMA2["debug"], vocab_size=300))
    save_checkpoint(random_model(**shape), tmp_path / "Llama-2-7b", tokenizer=tokenizer)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert 'device="cuda", dtype=torch.bfloat16' in code
    monkeypatch.chdir(tmp_path)
    exec(code.replace('device="cuda", dtype=torch.bfloat16', 'device="cpu"'), {})
    assert capsys.readouterr().out.startswith("The capital of France is")
    assert load_checkpoint(tmp_path / "copy").config == load_checkpoint(tmp_path / "Llama-2-7b").config
