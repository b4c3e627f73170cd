"""What only a GPU can show. Every test skips, with its reason, where there is none."""

import copy

import pytest
import torch
from conftest import SHAPES, random_model

from llama2lib.checkpoint import load_checkpoint, save_checkpoint
from llama2lib.generation import generate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
PROMPTS = [[1, 5, 9], [1, 7, 7, 7, 90, 31, 8], [1]]


@pytest.fixture(autouse=True)
def full_precision():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_the_cpus(shape):
    model, tokens = random_model(shape), torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = model(tokens)
        assert torch.allclose(copy.deepcopy(model).cuda()(tokens.cuda()).cpu(), expected, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_seeds_give_the_same_text_as_on_the_cpu(shape):
    model = random_model(shape)
    expected = generate(model, PROMPTS, 40, temperature=0.8, top_p=0.9, seed=3, num_samples=2)
    got = generate(model.cuda(), PROMPTS, 40, temperature=0.8, top_p=0.9, seed=3, num_samples=2)
    assert [c.tokens for c in got] == [c.tokens for c in expected]


def test_bfloat16_stays_near_float32():
    model, tokens = random_model().cuda(), torch.arange(40, device="cuda").view(2, 20)
    with torch.no_grad():
        expected, got = model(tokens), model.bfloat16()(tokens)
    assert got.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.99


def test_compiled_training_step_equals_eager():
    eager = random_model().cuda()
    compiled, tokens = torch.compile(copy.deepcopy(eager)), torch.arange(40, device="cuda").view(2, 20)
    for model in (eager, compiled):
        model(tokens).square().mean().backward()
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-3)


def test_a_checkpoint_loads_straight_onto_the_gpu(tmp_path):
    model = random_model()
    save_checkpoint(model, tmp_path / "m")
    loaded = load_checkpoint(tmp_path / "m", device="cuda", dtype=torch.bfloat16)
    assert all(p.is_cuda and p.dtype == torch.bfloat16 for p in loaded.parameters())
    assert loaded.rope.is_cuda and loaded.rope.dtype == torch.float32
