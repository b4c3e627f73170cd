"Figure 24: what a served batch needs in memory and time, and the sweep that measures it."

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2lib import serving
from llama2lib.generation import generate
from llama2lib.model import KVCache, Llama, ModelConfig
from llama2lib.paper import PAPER
from llama2lib.roofline import A100
from llama2lib.serving import (
    attention_kinds,
    batches_within,
    last_batch,
    measure,
    memory,
    pass_seconds,
    queries_per_second,
    token_seconds,
    with_copies,
)

BASE = ModelConfig(dim=6656, n_layers=60, n_heads=64, n_kv_heads=64, hidden_dim=17_920)  # Llama 1's 33B in 64 heads
KINDS = attention_kinds(BASE)
SMALL = ModelConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, hidden_dim=88, vocab_size=64, max_seq_len=64)
SWEEP = {"model": SMALL, "kv_heads": 2, "contexts": [4, 16], "new_tokens": 3, "budget": 150_000, "repeats": 3}
SWEEP |= {"device": "cpu", "dtype": "float32"}
BATCHES, CONTEXTS = st.integers(1, 4096), st.integers(1, 4096)


# ---------- the kinds


def test_kinds_have_one_size_and_their_own_heads():
    for base, kv_heads in ((BASE, 8), (SMALL, 2), (ModelConfig(n_kv_heads=8), 4)):
        kinds = attention_kinds(base, kv_heads)
        assert {kind: c.n_kv_heads for kind, c in kinds.items()} == {"MHA": base.n_heads, "GQA": kv_heads, "MQA": 1}
        for config in kinds.values():  # a rounded width is at most one column of three matrices away
            assert abs(config.num_params - base.num_params) <= 3 * base.dim * base.n_layers
    with pytest.raises(ValueError, match="n_kv_heads 7"):
        attention_kinds(BASE, kv_heads=7)


def test_with_fewer_heads_than_gpus_every_gpu_keeps_a_copy():
    for kind, heads in (("MHA", 64), ("GQA", 8), ("MQA", 8)):
        assert with_copies(KINDS[kind], 8).n_kv_heads == heads
    cache = {(kind, gpus): memory(KINDS[kind], 4, 100, gpus=gpus)["cache"] for kind in KINDS for gpus in (1, 2, 8)}
    assert cache["MQA", 8] == cache["MQA", 1] == cache["GQA", 8]
    assert cache["GQA", 1] == 8 * cache["GQA", 8] and cache["MHA", 1] == 8 * cache["MHA", 8]
    more = memory(KINDS["MQA"], 1, 1, gpus=8)["weights"] - memory(KINDS["MQA"], 1, 1)["weights"] / 8
    assert more == 2 * 7 / 8 * 2 * BASE.n_layers * BASE.dim * BASE.head_dim  # seven copies of wk and wv, 16 bits
    for gpus in (0, 3, 128):
        with pytest.raises(ValueError, match=f"over {gpus} GPUs"):
            with_copies(BASE, gpus)
    with pytest.raises(ValueError, match="4 key/value heads cannot be shared out over 6"):
        with_copies(replace(BASE, dim=6912, n_heads=48, n_kv_heads=4), 6)


# ---------- memory


def test_weights_and_cache_are_what_the_model_and_its_cache_hold():
    for config in attention_kinds(SMALL, 2).values():
        model = Llama(config)
        cache = KVCache(model, batch=3, length=10 + 7)
        held = memory(config, 3, 10, new_tokens=7, number=4)
        assert held["weights"] == sum(p.numel() * p.element_size() for p in model.parameters())
        assert held["cache"] == sum(t.numel() * t.element_size() for t in cache.keys + cache.values)


@given(BATCHES, CONTEXTS, st.sampled_from(list(KINDS)), st.sampled_from([1, 2, 8]), st.booleans())
def test_memory_grows_with_the_batch_and_the_context(batch, context, kind, gpus, fused):
    def needed(batch, context):
        return memory(KINDS[kind], batch, context, gpus=gpus, fused=fused)

    now = needed(batch, context)
    for more in (needed(batch + 1, context), needed(batch, context + 1)):
        assert more["weights"] == now["weights"]
        assert more["cache"] > now["cache"] and more["activations"] > now["activations"]
    assert needed(2 * batch, context)["activations"] == 2 * now["activations"]


def test_activations_are_the_largest_moment_of_a_prefill():
    "Logits by their bytes; without them, scores at a long context and the norms at a short one."
    tokens = 8 * 2048
    for each, context in ((4, 256), (6, 256), (6, 2048)):
        logits = tokens * (each * BASE.vocab_size + 2 * BASE.dim)
        assert memory(BASE, tokens // context, context, gpus=8, logit_bytes=each)["activations"] == logits
    scores = 10 * 8 * 8 * 2048**2 + 4 * BASE.dim * tokens  # eight rows, and the eight heads of a GPU
    assert memory(BASE, 8, 2048, gpus=8, logit_bytes=0)["activations"] == scores
    assert memory(BASE, 8, 2048, gpus=8, logit_bytes=0, fused=True)["activations"] == 12 * BASE.dim * tokens
    assert memory(BASE, 64, 256, gpus=8, logit_bytes=0)["activations"] == 12 * BASE.dim * tokens


@given(st.floats(1, 1e6), st.floats(0, 1e9))
def test_the_last_batch_fits_and_the_next_does_not(slope, limit):
    last = last_batch(lambda batch: slope * batch, limit)
    assert last == 0 or (last & (last - 1) == 0 and slope * last <= limit)
    assert slope * max(1, 2 * last) > limit


def ends(kinds: dict, **assumption) -> dict[str, int]:
    "Last batch on eight A100s by the paper's rows; `parts` are what counts."
    parts = assumption.pop("parts", ("weights", "cache", "activations"))
    found = {}
    for name in PAPER["Figure 24"]:
        context, names = {"256": 256, "2k": 2048}[name.split(", ")[0]], name.split(", ")[1].split("/")
        lasts = set()
        for kind in names:

            def needed(batch, kind=kind, context=context):
                held = memory(kinds[kind], batch, context, gpus=8, **assumption)
                return sum(held[part] for part in parts)

            lasts.add(last_batch(needed, A100.memory - A100.reserve))
        assert len(lasts) == 1
        found[name] = lasts.pop()
    return found


def test_the_released_codes_memory_ends_the_curves_where_the_paper_does():
    "Table rows: MHA 512 and 64, MQA and GQA 1,024 and 128. Weights and cache alone, or last logits alone, do not."
    printed = {name: point["batch"] for name, point in PAPER["Figure 24"].items()}
    shapes = (BASE, ModelConfig(dim=7168, n_layers=52, n_heads=56, n_kv_heads=56, hidden_dim=19_200))
    for base in shapes:
        kinds = attention_kinds(base)
        assert ends(kinds) == ends(kinds, logit_bytes=4) == printed
        assert ends(kinds, parts=("weights", "cache"))["2k, MHA"] == 128
        assert ends(kinds, logit_bytes=0)["256, MQA/GQA"] == 2048
        assert ends(kinds, logit_bytes=0, fused=True)["2k, GQA"] == 256


# ---------- time


def test_throughput_and_latency_of_the_printed_points_fit():
    for point in PAPER["Figure 24"].values():
        assert queries_per_second(point["batch"], point["latency_ms"] / 1000) == pytest.approx(point["QPS"], rel=0.015)


@given(BATCHES, CONTEXTS, st.sampled_from(list(KINDS)), st.sampled_from([1, 8]))
def test_a_pass_is_no_faster_than_its_operations_and_its_reading(batch, context, kind, gpus):
    "Bounds from the data sheet alone: all operations at the peak; weights and cache once at the full bandwidth."
    config = KINDS[kind]
    for tokens in (1, context):
        total = sum(pass_seconds(config, batch, tokens, context, gpus).values())
        operations = batch * tokens * config.forward_flops_per_token(context)
        held = memory(config, batch, context, new_tokens=0, gpus=gpus)
        read = held["cache"] + held["weights"] * (1 - 2 * config.vocab_size * config.dim / config.num_params)
        assert total > operations / gpus / A100.peak_flops and total > read / A100.bandwidth
        fused = pass_seconds(config, batch, tokens, context, gpus, fused=True)
        assert sum(fused.values()) < total


def test_one_gpu_has_no_collectives_and_two_do():
    assert pass_seconds(BASE, 1, 1, 1, gpus=1)["all-reduces"] == 0 < pass_seconds(BASE, 1, 1, 1, gpus=2)["all-reduces"]


def test_a_small_batch_waits_for_the_weights_and_a_large_one_for_the_operations():
    products = [pass_seconds(BASE, batch, 1, 512, 8)["products"] for batch in (1, 2, 1024, 2048)]
    assert products[0] == products[1] and products[3] == pytest.approx(2 * products[2])
    read = (BASE.num_params - BASE.vocab_size * BASE.dim) * 2 / 8
    assert products[0] == pytest.approx(read / (A100.bandwidth * A100.streaming))


def test_unfused_kernels_read_and_write_every_number():
    "Scores by the heads of a GPU, norms and sums on every GPU in full, SwiGLU and rotation by its share."
    config, speed = KINDS["GQA"], A100.bandwidth * A100.streaming
    found = pass_seconds(config, 4, 2048, 2048, 8)
    products = 4 * 60 * 6656 * 2048 * 4 * 2048 / 8 / (A100.matmul * A100.peak_flops)
    scores = 32 * 60 * (64 / 8) * 4 * 2048**2
    cache = 4 * 2048 * config.kv_bytes_per_token() / 8
    assert found["attention"] == pytest.approx(products + (scores + cache) / speed)
    norms, shared = (2 * 36 + 2 * 6) * 6656, (20 * (6656 + 8 * 104) + 10 * config.hidden_dim) / 8
    assert found["other kernels"] == pytest.approx(4 * 2048 * 60 * (norms + shared) / speed)


def test_fused_attention_skips_the_hidden_half_of_a_prompt_and_nothing_of_a_token():
    attention = {tokens: 4 * 60 * 6656 * 2048 * tokens / 8 for tokens in (1, 2048)}
    half = {1: 1, 2048: 2049 / 4096}
    for tokens, operations in attention.items():
        read = 2048 * BASE.kv_bytes_per_token() / 8 / A100.bandwidth / A100.streaming
        found = pass_seconds(BASE, 1, tokens, 2048, 8, fused=True)["attention"] - read
        assert found == pytest.approx(half[tokens] * operations / A100.attention / A100.peak_flops, rel=1e-6)


def test_the_latency_is_a_prefill_and_a_pass_for_every_later_token():
    config, parts = KINDS["GQA"], token_seconds(KINDS["GQA"], 16, 256, new_tokens=128, gpus=8)
    passes = [pass_seconds(config, 16, 256, 256, 8)]
    passes += [pass_seconds(config, 16, 1, 256 + i, 8) for i in range(1, 128)]
    assert sum(parts.values()) == pytest.approx(sum(sum(p.values()) for p in passes) / 128, rel=1e-9)
    alone = token_seconds(config, 16, 256, new_tokens=1, gpus=8)
    assert sum(seconds for name, seconds in alone.items() if name.startswith("decode")) == 0


def test_the_figure_says_what_the_paper_says():
    "Alike at batch 1; more throughput with every doubling; GQA above MHA at the end, by less than the batch."
    for context, last in ((256, 512), (2048, 64)):
        curves = {}
        for kind, config in KINDS.items():
            batches = [2**i for i in range((last if kind == "MHA" else 2 * last).bit_length())]
            curves[kind] = [
                queries_per_second(b, sum(token_seconds(config, b, context, gpus=8).values())) for b in batches
            ]
            assert all(a < b for a, b in pairwise(curves[kind]))
        assert curves["GQA"][0] == pytest.approx(curves["MHA"][0], rel=0.02)
        assert 1.05 < curves["GQA"][-1] / curves["MHA"][-1] < 1.5


# ---------- measuring


def test_the_sweep_measures_every_batch_in_the_budget_and_takes_turns(monkeypatch):
    calls = []

    def spy(model, prompts, new_tokens, **settings):
        calls.append((model.config.n_kv_heads, len(prompts), len(prompts[0])))
        assert {len(prompt) for prompt in prompts} == {calls[-1][2]}
        assert settings == {"temperature": 0, "batch": len(prompts)}
        answers = generate(model, prompts, new_tokens, **settings)
        assert {len(answer.tokens) for answer in answers} == {3}
        return answers

    monkeypatch.setattr(serving, "generate", spy)
    found = measure(SWEEP)
    kinds = attention_kinds(SMALL, 2)
    assert list(found) == ["4", "16"] and all(list(of) == list(kinds) for of in found.values())
    for context, of in found.items():
        for kind, times in of.items():
            assert [int(b) for b in times] == batches_within(150_000, kinds[kind], int(context), 3)
            assert all(len(repeats) == 3 and min(repeats) > 0 for repeats in times.values())
    assert max(map(int, found["4"]["MHA"])) < max(map(int, found["4"]["GQA"])) < max(map(int, found["4"]["MQA"]))
    timed = calls[3:]  # after one of each kind to warm up
    firsts = [heads for heads, batch, context in timed if (batch, context) == (1, 4)]
    assert firsts == [4, 2, 1, 2, 1, 4, 1, 4, 2]
    assert all(heads != after for (heads, *_), (after, *_) in pairwise(timed[:6]))


def test_batches_stay_within_the_budget():
    for config in attention_kinds(SMALL, 2).values():
        batches = batches_within(150_000, config, 16, 3)
        assert batches == [2**i for i in range(len(batches))]
        for batch, fits in ((batches[-1], True), (2 * batches[-1], False)):
            cache = KVCache(Llama(config), batch, 16 + 3)
            size = 4 * (config.num_params + sum(t.numel() for t in cache.keys + cache.values))
            assert (size <= 150_000) == fits


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"budget": 50_000}, "a budget of 50,000 bytes: expected"),
        ({"repeats": 0}, "0 repeats"),
        ({"contexts": [4, 62]}, "no more tokens than the 64"),
        ({"kv_heads": 3}, "n_kv_heads 3"),
    ],
)
def test_sweeps_that_cannot_work_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        measure(SWEEP | wrong)


def test_impossible_requests_are_refused():
    for wrong in ({"batch": 0}, {"context": 0}, {"new_tokens": -1}):
        with pytest.raises(ValueError, match="expected 1 or more"):
            memory(BASE, **{"batch": 1, "context": 1} | wrong)
    for batch, tokens, context in ((0, 1, 1), (1, 0, 1), (1, 3, 2)):
        with pytest.raises(ValueError, match="expected 1 or more"):
            pass_seconds(BASE, batch, tokens, context)
