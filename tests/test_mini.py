"""The mini world's models, at the smoke scale: made once, the same each time, and what they are made of counts."""

import os
import subprocess
import sys

import pytest

CODE = """
import hashlib
from dataclasses import replace
import numpy as np
from llama2lib import mini
from llama2lib.dialog import encode_dialog
from llama2lib.sft import SFT, sft
from llama2lib.synthetic import dialogues

def digest(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()[:12]

one, two = (dialogues(np.random.default_rng(seed), 20) for seed in (0, 1))
models = mini.base(0), mini.base(1), mini.chat(0), mini.tuned(0, one), mini.tuned(0, two), mini.tuned(1, one)
models += (mini.base(0, "0.4M"), mini.tuned(0, one, size="0.4M"))
assert all(f"{model.config.num_params / 1e6:.1f}M" in mini.SIZES for model in models)
assert models[-1].config == models[-2].config == mini.SIZES["0.4M"]
by_hand = mini.base(1)
list(sft(by_hand, [encode_dialog(mini.tokenizer(), d) for d in one], replace(SFT["mini"], seed=1)))
print(mini.tokenizer().digest[:12], *map(digest, models), digest(by_hand))
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    "The same lines in new processes: twice with one cache, once with another."

    def run(cache):
        environment = os.environ | {"LLAMA2_SCALE": "smoke", "LLAMA2_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
        ran = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return ran

    one, other = (tmp_path_factory.mktemp(name) for name in ("one", "other"))
    return run(one), run(one), run(other)


def test_the_models_are_the_same_in_every_process_and_every_cache(runs):
    first, again, elsewhere = runs
    assert first.stdout == again.stdout == elsewhere.stdout


def test_seed_and_dialogues_make_the_model(runs):
    *made, last, by_hand = runs[0].stdout.split()
    assert len({*made, last}) == len(made) + 1 and by_hand == made[6]


def test_a_model_is_trained_once_with_a_bar(runs):
    first, again, _ = runs
    assert "pretraining" in first.stderr and "fine-tuning" in first.stderr
    assert "pretraining" not in again.stderr and "fine-tuning" not in again.stderr
