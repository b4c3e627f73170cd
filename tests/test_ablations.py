"Tables 16 to 18: compensated shapes, the command for 30B, and facts whose answers lie where they should."

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama2lib import ablations, paper
from llama2lib.ablations import (
    ATTRIBUTES,
    FACT_TOKENS,
    RECIPES,
    SHAPES,
    VALUES,
    answered,
    fact_stream,
    questions,
    with_facts,
)
from llama2lib.checkpoint import load_checkpoint
from llama2lib.model import LLAMA2, Llama, ModelConfig, compensated
from llama2lib.pretrain import PRETRAIN
from llama2lib.shards import write_shards
from llama2lib.tokenizer import train_tokenizer

TEXT = 100  # the vocabulary of the text in these tests; facts lie behind it


# ---------- shapes


@given(
    heads=st.sampled_from([2, 4, 6, 8, 12]),
    groups=st.integers(1, 12),
    head_dim=st.sampled_from([4, 16, 26]),
    width=st.integers(10, 3000),
)
@settings(deadline=None)
def test_compensation_keeps_the_parameters_to_half_a_unit_of_width(heads, groups, head_dim, width):
    assume(groups <= heads)
    config = ModelConfig(heads * head_dim, 3, heads, heads, width, vocab_size=50, max_seq_len=8)
    if heads % groups:
        with pytest.raises(ValueError, match="not a multiple of n_kv_heads"):
            compensated(config, groups)
        return
    with torch.device("meta"):
        before, after = (
            sum(p.numel() for p in Llama(c).parameters()) for c in (config, compensated(config, groups))
        )
    assert abs(after - before) <= 3 * 3 * config.dim / 2
    assert compensated(config, groups).kv_bytes_per_token() * heads == config.kv_bytes_per_token() * groups


def test_the_way_there_does_not_matter_and_more_heads_make_it_narrower():
    config = replace(SHAPES["30B-MHA"], n_heads=64)
    assert compensated(compensated(config, 8), 64) == config
    once, twice = compensated(config, 1), compensated(compensated(config, 8), 1)
    assert abs(once.hidden_dim - twice.hidden_dim) <= 1


def test_the_factor_is_that_of_the_formula_and_the_paper_prints_more():
    mha = replace(SHAPES["30B-MHA"], hidden_dim=8 * 6656 // 3)
    for kv_heads, factor, printed in ((1, 1.246, 1.33), (8, 1.219, 1.3)):
        assert compensated(mha, kv_heads).hidden_dim / mha.hidden_dim == pytest.approx(factor, abs=5e-4)
        assert factor == pytest.approx(1 + (1 - kv_heads / 64) / 4, abs=5e-4) and factor < printed - 0.05


def test_the_30b_shapes_differ_in_heads_and_width_only_and_are_about_30b():
    assert {(s.dim, s.n_layers, s.n_heads) for s in SHAPES.values()} == {(6656, 60, 64)}
    assert {name: shape.n_kv_heads for name, shape in SHAPES.items()} == {"30B-MHA": 64, "30B-GQA": 8, "30B-MQA": 1}
    for kind, factor in paper.TEXT["Section A.2.1"]["ffn_factor"].items():
        assert 0 <= SHAPES[f"30B-{kind}"].hidden_dim - factor * 8 * 6656 / 3 < 257  # rounded up to multiples of 256
    assert all(30e9 < shape.num_params < 35e9 for shape in SHAPES.values())
    assert {name: recipe.model for name, recipe in RECIPES.items()} == dict(zip(SHAPES, SHAPES, strict=True))


def test_the_command_trains_the_shape_it_names(monkeypatch, tmp_path):
    "With the table's GQA shape made small; the model that comes out has its heads and width, and no other table grew."
    small = compensated(replace(LLAMA2["debug"], n_kv_heads=4), 1)
    monkeypatch.setattr(ablations, "SHAPES", {"30B-GQA": small})
    documents = ["facts and more facts, one after the other " * 5 + str(i) for i in range(40)]
    tokenizer = train_tokenizer(documents, 300, tmp_path / "shards" / "tokenizer.model")
    write_shards(tmp_path / "shards", tokenizer, documents)
    options = f"30B-GQA --data {tmp_path / 'shards'} --out {tmp_path / 'out'} --tokens 512 --batch-tokens 128"
    options += " --max-seq-len 64 --warmup-steps 1 --micro-batch 2 --no-compile --ac none"
    monkeypatch.setattr(sys, "argv", ["ablations", *options.split()])
    before = dict(LLAMA2), dict(PRETRAIN)
    try:
        ablations.cli()
    finally:
        for table, old in zip((LLAMA2, PRETRAIN), before, strict=True):
            table.clear()
            table.update(old)
    config = load_checkpoint(tmp_path / "out" / "model").config
    assert (config.n_kv_heads, config.hidden_dim) == (1, small.hidden_dim)


# ---------- facts


@given(mentions=st.integers(2, 8), seed=st.integers(0, 99))
def test_every_mention_of_an_attribute_has_its_one_value_and_the_rest_is_text(mentions, seed):
    text = np.random.default_rng(seed).integers(3, TEXT, 64)
    row = with_facts(text, mentions, TEXT, np.random.default_rng(seed))
    taken = np.zeros(64, dtype=bool)
    for attribute in range(ATTRIBUTES):
        places = np.flatnonzero(row == TEXT + attribute)
        assert len(places) == mentions and len({*row[places + 1].tolist()}) == 1
        value = row[places[0] + 1] - TEXT - ATTRIBUTES - attribute * VALUES
        assert 0 <= value < VALUES
        taken[places] = taken[places + 1] = True
    assert (row[~taken] == text[~taken]).all() and row.max() < TEXT + FACT_TOKENS


def test_values_are_drawn_anew_for_each_document_and_evenly():
    random, text = np.random.default_rng(0), np.zeros(16, dtype=np.int64)
    rows = np.stack([with_facts(text, 2, TEXT, random) for _ in range(800)])
    values, counts = np.unique(rows[rows >= TEXT + ATTRIBUTES], return_counts=True)
    assert len(values) == ATTRIBUTES * VALUES and counts.min() > 0.6 * counts.mean()


def test_facts_without_room_are_refused():
    with pytest.raises(ValueError, match="9 mentions of 4 attributes do not fit into 64 tokens"):
        with_facts(np.zeros(64, np.int64), 9, TEXT, np.random.default_rng(0))


def test_a_stream_keeps_its_length_its_text_and_the_share_of_blocks():
    text = np.random.default_rng(0).integers(3, TEXT, 64 * 200 + 7).astype(np.uint16)
    stream = fact_stream(text, 64, TEXT, np.random.default_rng(1), share=0.3)
    blocks = stream[: 64 * 200].reshape(200, 64)
    with_some = (blocks >= TEXT).any(1)
    assert len(stream) == len(text) and stream.dtype == text.dtype and 40 < with_some.sum() < 80
    assert (blocks[~with_some] == text[: 64 * 200].reshape(200, 64)[~with_some]).all()
    assert (stream[-7:] == text[-7:]).all()
    shares = (blocks[with_some] >= TEXT).mean(1)
    assert shares.max() <= 0.75 and shares.min() == 0.25


class Remembers:
    "Stands in for a model: answers with the token behind the last earlier mention in what it is shown, else with 0."

    def __init__(self):
        self.tok_embeddings, self.shown = torch.nn.Embedding(1, 1), []

    def __call__(self, tokens):
        seen = tokens[0].tolist()
        self.shown.append(len(seen))
        earlier = [i for i, token in enumerate(seen[:-1]) if token == seen[-1]]
        logits = torch.zeros(1, len(seen), TEXT + FACT_TOKENS)
        logits[0, -1, seen[earlier[-1] + 1] if earlier else 0] = 1
        return logits


def test_a_perfect_memory_answers_all_and_with_a_window_what_lies_inside():
    random = np.random.default_rng(3)
    rows = np.stack([with_facts(random.integers(3, TEXT, 128), 2, TEXT, random) for _ in range(30)])
    asked = questions(rows, TEXT)
    assert len(asked) == 30 * ATTRIBUTES and (asked[:, 2] > 64).sum() > 10
    memory = Remembers()
    assert answered(memory, rows, asked).all() and memory.shown == (asked[:, 1] + 1).tolist()
    memory = Remembers()
    inside = answered(memory, rows, asked, window=64)
    assert (inside == (asked[:, 2] < 64)).all() and max(memory.shown) == 64  # the attribute itself must be seen here
