"""The model against independent formulas, and the properties that silent bugs break."""

import math
import re
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from conftest import SHAPES, random_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from llama2lib.model import (
    LLAMA2,
    Attention,
    KVCache,
    Llama,
    ModelConfig,
    RMSNorm,
    apply_rope,
    rope_table,
    separate,
    swiglu_width,
)

RELEASED = {"7B": 6_738_415_616, "13B": 13_015_864_320, "34B": 33_743_970_304, "70B": 68_976_648_192}


@pytest.mark.parametrize("name", LLAMA2)
def test_num_params_counts_the_parameters_that_exist(name):
    with torch.device("meta"):
        model = Llama(LLAMA2[name])
    assert (
        sum(p.numel() for p in model.parameters())
        == LLAMA2[name].num_params
        == RELEASED.get(name, LLAMA2[name].num_params)
    )


def test_released_widths_follow_the_rule():
    assert [swiglu_width(d) for d in (4096, 5120, 8192)] == [11_008, 13_824, 22_016]
    assert swiglu_width(8192, 4096, 1.3) == 28_672


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(n_heads=0), "n_heads = 0"),
        (dict(dim=65), "dim 65"),
        (dict(n_heads=4, n_kv_heads=3), "not a multiple of n_kv_heads 3"),
        (dict(dim=12, n_heads=4, n_kv_heads=4), "even whole number"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(LLAMA2["debug"], **changes)


def test_rms_norm_multiplies_by_the_weight_after_the_cast():
    "In bfloat16 the order shows: Meta casts the normalised state back first."
    torch.manual_seed(0)
    norm, x = RMSNorm(512, 1e-5).bfloat16(), torch.randn(64, 512).bfloat16()
    torch.nn.init.normal_(norm.weight, 1, 0.5)
    wide = x.float()
    normalised = wide * (wide.pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    assert torch.equal(norm(x), normalised.bfloat16() * norm.weight)
    assert not torch.equal(norm(x), (normalised * norm.weight.float()).bfloat16())


def test_rope_rotates_neighbouring_pairs_by_the_published_angles():
    "Independent: complex numbers, angle of pair i at position t = t·θ^(-2i/H), written from the formula."
    config = replace(LLAMA2["debug"], rope_theta=500.0)
    x = torch.randn(1, config.max_seq_len, 1, config.head_dim)
    out = apply_rope(x, rope_table(config))
    for t in (0, 1, 77):
        for i in range(config.head_dim // 2):
            angle = t * 500.0 ** (-2 * i / config.head_dim)
            z = complex(*x[0, t, 0, 2 * i : 2 * i + 2].tolist()) * complex(math.cos(angle), math.sin(angle))
            assert out[0, t, 0, 2 * i : 2 * i + 2].tolist() == pytest.approx([z.real, z.imag], abs=1e-5)


@settings(max_examples=20, deadline=None)
@given(shift=st.integers(0, 60), distance=st.integers(0, 50), seed=st.integers(0, 100))
def test_rope_scores_depend_on_distance_only(shift, distance, seed):
    torch.manual_seed(seed)
    rope = rope_table(LLAMA2["debug"])
    q, k = torch.randn(2, 1, 1, 1, 16).unbind(0)

    def score(t):
        return (apply_rope(q, rope[t + distance][None]) * apply_rope(k, rope[t][None])).sum()

    assert torch.allclose(score(0), score(shift), atol=1e-4)


def test_a_token_changes_itself_and_the_future_never_the_past(model):
    tokens = torch.randint(model.config.vocab_size, (2, 20))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % model.config.vocab_size
    with torch.no_grad():
        moved = (model(changed) - model(tokens)).abs().amax((0, 2))
    assert (moved[:9] == 0).all() and (moved[9:] > 0).all()


def test_grouped_queries_equal_full_attention_with_copied_heads():
    grouped = random_model("GQA").layers[0].attention
    config = ModelConfig(dim=64, n_layers=1, n_heads=8, n_kv_heads=8, hidden_dim=8, vocab_size=8, max_seq_len=32)
    full = Attention(config)
    with torch.no_grad():
        full.wq.weight.copy_(grouped.wq.weight)
        full.wo.weight.copy_(grouped.wo.weight)
        for name in ("wk", "wv"):  # heads 0-3 share the first key/value head, 4-7 the second
            shared = getattr(grouped, name).weight.unflatten(0, (2, 8))
            getattr(full, name).weight.copy_(shared.repeat_interleave(4, 0).flatten(0, 1))
        x, rope = torch.randn(2, 32, 64), rope_table(config)
        assert torch.allclose(full(x, rope), grouped(x, rope), atol=1e-5)


@pytest.mark.parametrize("pieces", [[1] * 24, [24], [10, 1, 13], [5, 5, 5, 5, 4]])
def test_cached_decoding_equals_one_pass(model, pieces):
    tokens = torch.randint(model.config.vocab_size, (3, 24))
    cache = KVCache(model, batch=3, length=30)
    with torch.no_grad():
        parts = [model(part, cache) for part in tokens.split(pieces, 1)]
        assert torch.allclose(torch.cat(parts, 1), model(tokens), atol=1e-4)


@pytest.mark.parametrize("shape", [(), (8,), (1, 2, 8)])
def test_tokens_that_are_not_rows_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match=rf"tokens of shape {re.escape(str(shape))}: expected rows of tokens"):
        random_model().hidden(torch.zeros(shape, dtype=torch.int64))


def test_the_cache_refuses_more_than_it_holds():
    model = random_model(max_seq_len=32)
    with pytest.raises(ValueError, match="33 tokens is longer than the context of 32"):
        KVCache(model, 1, 33)
    cache = KVCache(model, 1, 8)
    model(torch.zeros(1, 8, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match=r"1 rows of 8 \+ 1 tokens, for a cache of 1 rows of 8"):
        model(torch.zeros(1, 1, dtype=torch.int64), cache)
    with pytest.raises(ValueError, match="33 tokens are more than the context of 32"):
        model(torch.zeros(1, 33, dtype=torch.int64))


def test_the_rotation_table_stays_float32_and_follows_the_tokens():
    "A table that is cast with the weights, or stays on meta, is a table of nonsense."
    table, tokens = rope_table(LLAMA2["debug"]), torch.zeros(1, 2, dtype=torch.int64)
    assert torch.equal(Llama(LLAMA2["debug"]).bfloat16().rope, table)
    filled = random_model()
    for fill in (lambda m: m.load_state_dict(filled.state_dict(), assign=True), lambda m: m.to_empty(device="cpu")):
        with torch.device("meta"):
            model = Llama(filled.config)
        fill(model)
        model(tokens)
        assert torch.equal(model.rope, rope_table(filled.config))


def test_a_cache_of_other_size_is_refused_and_lengths_can_be_set_back():
    model = random_model()
    cache = KVCache(model, batch=2, length=14)
    with pytest.raises(ValueError, match="1 rows of 0"):
        model(torch.zeros(1, 3, dtype=torch.int64), cache)
    tokens = torch.randint(97, (2, 12))
    with torch.no_grad():
        model(tokens[:, :7], cache)
        cache.set_lengths(torch.tensor([7, 4]))  # the second row's last three were padding
        assert cache.used == 7
        logits = model(tokens[:, 7:], cache)
        assert torch.allclose(logits[0], model(tokens[:1])[0, 7:], atol=1e-4)
        shorter = torch.cat((tokens[1:, :4], tokens[1:, 7:]), 1)
        assert torch.allclose(logits[1], model(shorter)[0, 4:], atol=1e-4)


def test_generation_under_autocast_writes_to_a_float32_cache():
    model = random_model()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        cache = KVCache(model, batch=1, length=8)
        for part in (torch.zeros(1, 5, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)):
            assert model(part, cache).isfinite().all()


def test_logits_are_float32_whatever_the_weights_are():
    model = random_model().bfloat16()
    assert model(torch.zeros(1, 4, dtype=torch.int64)).dtype == torch.float32


def test_a_fresh_model_guesses_evenly_and_every_weight_learns(model):
    model.init_weights()
    tokens = torch.randint(model.config.vocab_size, (8, 32))
    loss = cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert abs(loss.item() - math.log(model.config.vocab_size)) < 0.05
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_residual_writes_start_smaller_with_depth():
    deep = Llama(replace(LLAMA2["debug"], n_layers=8))
    assert deep.layers[0].attention.wo.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert deep.layers[0].attention.wq.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_operations_match_pytorchs_counter():
    "The counter does not know the fused CPU kernel, so attention runs as plain matrix products."
    model = random_model("GQA")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(2, 64, dtype=torch.int64))
    assert counter.get_total_flops() == 2 * 64 * model.config.forward_flops_per_token(64)


def test_cache_bytes_are_those_that_a_cache_takes(model):
    cache = KVCache(model, batch=3, length=50)
    taken = sum(t.nbytes for t in cache.keys + cache.values)
    assert taken == 3 * 50 * model.config.kv_bytes_per_token(bytes_per_number=4)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5), shape=st.sampled_from(list(SHAPES)))
def test_documents_that_share_a_row_are_read_as_if_alone(lengths, shape):
    "Logits and gradients; a document's number may come again behind another one."
    model, alone = random_model(shape), random_model(shape)
    tokens = torch.arange(sum(lengths))[None] * 7 % 97
    numbers = torch.cat([torch.full((n,), i % 2) for i, n in enumerate(lengths)])[None]
    logits = model(tokens, documents=numbers)
    expected = torch.cat([alone(part) for part in tokens.split(lengths, 1)], 1)
    assert torch.allclose(logits, expected, atol=1e-4)
    logits.square().mean().backward()
    expected.square().mean().backward()
    for (name, a), b in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-5), name


@settings(max_examples=50, deadline=None)
@given(numbers=st.lists(st.integers(-1, 1), min_size=1, max_size=12))
def test_positions_begin_anew_with_every_document(numbers):
    "Logits do not show it: RoPE's scores depend on distances alone."
    positions, reads = separate(torch.tensor([numbers]))
    runs = [list(range(len(list(run)))) for _, run in groupby(numbers)]
    assert positions[0].tolist() == [position for run in runs for position in run]
    assert torch.equal(reads[0, 0], torch.block_diag(*(torch.ones(len(r), len(r)).tril() for r in runs)).bool())


def test_one_document_in_a_row_is_a_row_without_documents():
    model, tokens = random_model(), torch.arange(40).view(2, 20)
    assert torch.allclose(model(tokens, documents=torch.ones_like(tokens)), model(tokens), atol=1e-5)
    with pytest.raises(ValueError, match="expected no documents"):
        model(tokens, KVCache(model, 2, 20), torch.ones_like(tokens))
