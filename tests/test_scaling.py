"Figure 5's family: sizes, one stream for all, slopes with intervals, and a fitted law."

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llama2lib.corpus import mix, packaged_sources, shares, token_stream
from llama2lib.model import Llama
from llama2lib.pretrain import pretrain
from llama2lib.scaling import (
    FAMILY,
    STARTS,
    ScalingLaw,
    bootstrap_laws,
    by_seed,
    family_recipe,
    fit_scaling_law,
    late_slopes,
    mixed_text,
    non_embedding,
    probe_rows,
)
from llama2lib.stats import paired_interval
from llama2lib.tokenizer import train_tokenizer

LAW = ScalingLaw(E=1.5, A=10.0, alpha=0.25, B=200.0, beta=0.4)
N, D = (x.ravel() for x in np.meshgrid([3e4, 1e5, 3e5, 1e6], [3e5, 5e5, 1e6]))


# ---------- the family


def test_the_family_is_ordered_and_differs_in_size_only():
    sizes = [non_embedding(config) for config in FAMILY.values()]
    assert len(sizes) >= 4 and all(large > 2 * small for small, large in pairwise(sizes))
    assert {(c.vocab_size, c.max_seq_len, c.head_dim) for c in FAMILY.values()} == {(1024, 128, 16)}
    for name, config in FAMILY.items():
        model = Llama(config)
        inside = sum(p.numel() for p in model.parameters())
        inside -= model.tok_embeddings.weight.numel() + model.output.weight.numel()
        assert inside == non_embedding(config) and name == f"{inside / 1000:.0f}k"


def test_recipes_differ_in_the_learning_rate_only_which_goes_with_one_over_the_width():
    recipes = {config.dim: family_recipe(config, steps=480) for config in FAMILY.values()}
    assert all(recipe.lr * dim == pytest.approx(0.384) for dim, recipe in recipes.items())
    others = {tuple(value for name, value in vars(recipe).items() if name != "lr") for recipe in recipes.values()}
    assert len(others) == 1
    assert recipes[32].steps == 480 and recipes[32].final_lr == 0.1 and recipes[32].tokens <= 1_000_000


def batches_seen(monkeypatch, size: str, stream: np.ndarray, steps: int, seed: int) -> list[list[int]]:
    "The tokens a size is given, batch by batch."
    seen, forward = [], Llama.forward

    def spy(self, tokens, *args, **kwargs):
        seen.append(tokens.flatten().tolist())
        return forward(self, tokens, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Llama, "forward", spy)
        recipe = family_recipe(FAMILY[size], steps, batch_tokens=256, warmup_steps=1)
        torch.manual_seed(seed)
        list(pretrain(Llama(FAMILY[size]), stream, recipe, seed))
    return seen


def test_every_size_reads_the_same_rows_in_the_same_order_and_a_short_run_reads_the_first(monkeypatch):
    stream = np.random.default_rng(0).integers(0, 1024, 256 * 6 + 1).astype(np.uint16)
    small, large = (batches_seen(monkeypatch, size, stream, 6, seed=1) for size in ("27k", "101k"))
    assert small == large and len(small) >= 6
    assert batches_seen(monkeypatch, "27k", stream, 2, seed=1) == small[:2]
    assert batches_seen(monkeypatch, "27k", stream, 6, seed=2) != small
    rows = [tuple(row[i : i + 128]) for row in small for i in range(0, len(row), 128)]
    assert len(set(rows)) == len(rows)  # each row once


# ---------- the held-out rows


@pytest.fixture(scope="module")
def held_out():
    return {name: source.split()[1] for name, source in packaged_sources().items()}


@pytest.fixture(scope="module")
def pieces(held_out, tmp_path_factory):
    texts = [text for documents in held_out.values() for text in documents]
    return train_tokenizer(texts, 1024, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_held_out_rows_come_from_every_domain_at_its_share_and_never_twice(pieces, held_out):
    share = shares(packaged_sources())
    whole = probe_rows(pieces, held_out, share, rows=64, length=128)
    assert whole.shape[1] == 129 and 56 <= len(whole) <= 66
    assert len({tuple(row[1:]) for row in whole.tolist()}) == len(whole)
    for name, documents in held_out.items():
        alone = probe_rows(pieces, {name: documents}, share, rows=64, length=128)
        assert len(alone) <= round(64 * share[name])
        assert {tuple(row) for row in alone.tolist()} <= {tuple(row) for row in whole.tolist()}
    dialogs = probe_rows(pieces, {"conversations": held_out["conversations"]}, share, rows=64, length=128)
    text = [pieces.decode(row[1:-1].tolist()) for row in dialogs]
    places = [next((i for i, d in enumerate(held_out["conversations"]) if part[10:60] in d), None) for part in text]
    assert len({p for p in places if p is not None}) > 15  # spread over the documents


def test_the_experiments_read_the_split_text_at_its_shares_in_the_seeds_order():
    "By the functions of `corpus` one after the other; held-out documents are none of the training's."
    mixed, sources = mixed_text(), packaged_sources()
    assert mixed.tokenizer.vocab_size == 1024 and mixed.shares == shares(sources)
    for name, source in sources.items():
        assert (mixed.training[name], mixed.held_out[name]) == source.split()
        assert not set(mixed.training[name]) & set(mixed.held_out[name])
    documents = (document for _, document in mix(mixed.training, mixed.shares, seed=3))
    assert np.array_equal(mixed.stream(3, 5000), token_stream(mixed.tokenizer, documents, 5000))
    assert len(mixed.stream(3, 5000)) == 5000 and not np.array_equal(mixed.stream(4, 5000), mixed.stream(3, 5000))
    assert mixed_text().tokenizer.digest == mixed.tokenizer.digest


def test_scores_by_seed_are_means_over_all_the_rest():
    scores = np.arange(24.0).reshape(2, 3, 4)
    assert by_seed([7, 3], scores) == {7: 5.5, 3: 17.5}
    assert by_seed({7: "stream", 3: "stream"}, scores[:, 0]) == {7: 1.5, 3: 13.5}
    with pytest.raises(ValueError):
        by_seed([7], scores)


# ---------- slopes


@given(st.floats(-5, 5), st.floats(0, 10), st.integers(5, 60))
def test_a_planted_slope_is_found_whatever_came_before(slope, level, checkpoints):
    tokens = np.linspace(1e6 / checkpoints, 1e6, checkpoints)
    line = level + slope * tokens / 1e6
    losses = np.stack([line, line + 1, np.where(tokens < 0.79e6, 50, line)], 1)
    late = (tokens >= 0.8e6).sum()
    if late < 2:
        with pytest.raises(ValueError, match="two or more"):
            late_slopes(tokens, losses)
    else:
        assert np.allclose(late_slopes(tokens, losses), slope, atol=1e-9)


def test_the_slopes_interval_holds_the_truth_as_often_as_it_says():
    "Three seeds whose runs wander, rows that differ, one planted slope."
    random, covered, tokens = np.random.default_rng(0), 0, np.linspace(5e4, 1e6, 20)
    for _ in range(400):
        wander = random.normal(0, 0.02, (3, 20, 1))
        rows = random.normal(3, 0.5, 40) + random.normal(0, 0.1, 40) * tokens[:, None] / 1e6
        losses = rows - 0.3 * tokens[:, None] / 1e6 + wander + random.normal(0, 0.05, (3, 20, 40))
        slopes = np.stack([late_slopes(tokens, run) for run in losses])
        interval = paired_interval(slopes, 0 * slopes)
        covered += interval.low <= -0.3 <= interval.high
    assert 0.91 <= covered / 400 <= 0.99


# ---------- the law


def test_a_planted_law_is_found():
    assert np.allclose(fit_scaling_law(N, D, LAW.loss(N, D)), LAW, rtol=0.02)
    assert LAW.loss(1e30, 1e30) == pytest.approx(LAW.E, abs=1e-3)


def test_one_bad_point_hardly_moves_the_predictions():
    "The Huber loss: with squares, the same point moves them several times as far."
    losses = LAW.loss(N, D)
    losses[4] += 0.5
    fitted = fit_scaling_law(N, D, losses).loss(N, D)
    assert np.abs(np.delete(fitted - LAW.loss(N, D), 4)).max() < 0.01


def test_noise_of_a_hundredth_leaves_the_predictions_good_and_the_constant_open():
    random = np.random.default_rng(0)
    losses = LAW.loss(N, D) * np.exp(random.normal(0, 0.01, (3, len(N))))
    laws = bootstrap_laws(N, D, losses, resamples=12)
    inside = np.array([law.loss(N, D) for law in laws])
    assert np.abs(inside.mean(0) - LAW.loss(N, D)).max() < 0.1
    constants = [law.E for law in laws]
    assert max(constants) - min(constants) > 0.3
    assert laws == bootstrap_laws(N, D, losses, resamples=12)


@pytest.mark.parametrize("points", [4, 0])
def test_too_few_points_are_refused(points):
    with pytest.raises(ValueError, match="five or more"):
        fit_scaling_law(N[:points], D[:points], LAW.loss(N, D)[:points])
    with pytest.raises(ValueError, match="five or more"):
        fit_scaling_law(N, D, LAW.loss(N, D)[:6])


def test_starts_lie_inside_the_bounds():
    assert all(0 < share < 1 and 0.01 < alpha < 3 and 0.01 < beta < 3 for share, alpha, beta in STARTS)
