"""Likelihoods and texts on a GPU; every test skips where there is none."""

import copy

import numpy as np
import pytest
import torch
from conftest import SHAPES, random_model

from llama2lib.continuations import loglikelihoods, tokens_until

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("shape", SHAPES)
def test_likelihoods_equal_the_cpus(shape):
    model, random = random_model(shape), np.random.default_rng(0)
    contexts = [random.integers(0, 97, random.integers(1, 120)).tolist() for _ in range(12)]
    pairs = [(context, random.integers(0, 97, length).tolist()) for context in contexts for length in (1, 3, 6)]
    expected = loglikelihoods(model, pairs, 500)
    found = loglikelihoods(copy.deepcopy(model).cuda(), pairs, 500)
    assert np.allclose([one.logprob for one in found], [one.logprob for one in expected], atol=1e-2)
    rounded = loglikelihoods(model.cuda().bfloat16(), pairs, 500)
    assert np.allclose([one.logprob for one in rounded], [one.logprob for one in expected], rtol=0.05, atol=0.5)


def test_texts_with_stops_equal_the_cpus(tokenizer):
    model = random_model("GQA", vocab_size=tokenizer.vocab_size)
    prompts = [[1, n] for n in range(259, 299)]
    settings = dict(max_new_tokens=24, temperature=0.8, top_p=0.9, seeds=list(range(40)), batch=8)
    expected = tokens_until(model, tokenizer, prompts, ("e", "o"), **settings)
    assert tokens_until(model.cuda(), tokenizer, prompts, ("e", "o"), **settings) == expected
