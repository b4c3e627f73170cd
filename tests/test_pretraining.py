"""Text in, trained model out: sources, mixing, packing, schedule, the loop."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from llama2lib.corpus import PACKAGED, Source, cut, mix, packaged_sources, read_documents, shares, token_stream
from llama2lib.optim import adamw, cosine_lr
from llama2lib.pretrain import PRETRAIN, PretrainConfig, held_out_loss, micro_batches, pretrain
from llama2lib.shards import Packed
from llama2lib.tokenizer import train_tokenizer

CONFIG = PretrainConfig(
    "debug", lr=1e-3, warmup_steps=2, batch_tokens=256, tokens=256 * 6, max_seq_len=32, micro_batch=8
)


@pytest.fixture(scope="module")
def sources():
    return packaged_sources()


def test_four_real_domains_come_with_the_installation(sources):
    assert set(sources) == set(PACKAGED)
    assert all(source.characters > 100_000 for source in sources.values())
    assert sources["conversations"].documents[0].startswith("A: ")
    assert sum(shares(sources).values()) == pytest.approx(1)


def test_docstrings_do_not_leak_into_the_code(sources):
    "They would be trained on in one source and held out in the other."
    code = "".join(sources["source code"].documents)
    lines = [line.strip() for text in sources["docstrings"].split()[1] for line in text.split("\n")]
    lines = [line for line in lines if len(line) > 60]
    assert len(lines) > 100 and sum(line in code for line in lines) < 0.05 * len(lines)


def test_factual_sources_are_upsampled(sources):
    plain = {name: replace(source, upsampling=1) for name, source in sources.items()}
    assert shares(sources)["manual"] > 5 * shares(plain)["manual"]
    assert shares(sources)["docstrings"] > 2 * shares(plain)["docstrings"]


def test_held_out_documents_are_never_trained_on(sources):
    for source in sources.values():
        train, held_out = source.split()
        assert len(held_out) < 0.1 * len(train)
        assert held_out and not set(train) & set(held_out)
        assert sorted(train + held_out) == sorted(source.documents)


@pytest.mark.parametrize("documents", [("a", "b"), ("a", "b", "a"), tuple("abcdefgh")])
def test_a_small_source_holds_out_at_least_one_text_with_its_copies(documents):
    train, held_out = Source(documents).split()
    assert train and held_out and not set(train) & set(held_out)


def test_a_single_text_cannot_be_split():
    with pytest.raises(ValueError, match="2 documents, 1 of them different"):
        Source(("a", "a")).split()


def test_the_digest_tells_texts_apart():
    assert Source(("ab", "c")).digest != Source(("a", "bc")).digest
    assert Source(("ab", "c")).digest == Source(("ab", "c"), upsampling=3).digest


def test_the_mix_keeps_the_shares_and_repeats_small_sources():
    texts = {"big": ["x" * 100] * 50, "small": ["y" * 30, "z" * 50]}
    drawn = list(itertools.islice(mix(texts, {"big": 0.25, "small": 0.75}, seed=1), 400))
    sizes = {name: sum(len(d) for n, d in drawn if n == name) for name in texts}
    assert sizes["small"] / sum(sizes.values()) == pytest.approx(0.75, abs=0.01)
    assert drawn == list(itertools.islice(mix(texts, {"big": 0.25, "small": 0.75}, seed=1), 400))


def test_an_epoch_shows_every_document_once():
    texts = {"only": [f"document {i}" for i in range(20)]}
    drawn = [d for _, d in itertools.islice(mix(texts, {"only": 1.0}, seed=3), 40)]
    assert sorted(drawn[:20]) == sorted(drawn[20:]) == sorted(texts["only"]) and drawn[:20] != drawn[20:]


def test_empty_sources_are_named(tmp_path):
    with pytest.raises(ValueError, match="source 'b' has no text"):
        next(mix({"a": ["x"], "b": []}, {"a": 0.5, "b": 0.5}))
    with pytest.raises(ValueError, match="no documents"):
        token_stream(train_tokenizer(["text"] * 5, 264, tmp_path / "t.model"), [])


@given(st.lists(st.text(alphabet="ab\n", max_size=60)).map("\n\n".join))
def test_cutting_loses_nothing(text):
    pieces = cut(text, size=20)
    assert "".join(pieces).replace("\n", "") == text.replace("\n", "")
    assert all(piece.strip() for piece in pieces)


def test_text_without_blank_lines_is_cut_at_lines():
    pieces = cut("a line of text\n" * 1000, size=100)
    assert len(pieces) > 50 and all(piece.endswith("\n") for piece in pieces)


def test_files_and_folders_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nsecond", "utf-8")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "third"}) + "\n\n" + json.dumps({"text": "fourth"}) + "\n")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    assert read_documents(tmp_path) == ["first\n\nsecond", "third", "fourth"]
    assert read_documents(tmp_path / "a.txt") == ["first\n\nsecond"]
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "object").write_bytes(b"\xff")
    (tmp_path / "c.jsonl").write_text('{"text": "fifth\u2028line"}\r\n', "utf-8")
    assert read_documents(tmp_path)[-1] == "fifth\u2028line"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "fine\ncafé".encode("latin-1"), r"latin\.txt: byte 8 is not UTF-8"),
        ("empty.txt", b" \n", r"empty\.txt: no text in 1 file"),
        ("rows.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"rows\.jsonl:2: expected an object with a string"),
        ("rows.jsonl", b'{"text": "a"}\n{oops\n', r"rows\.jsonl:2: not JSON"),
    ],
)
def test_bad_files_stop_with_file_and_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_a_missing_path_and_an_empty_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no text in 0 files"):
        read_documents(tmp_path)


def test_one_bos_and_one_eos_around_every_document(tmp_path):
    tokenizer = train_tokenizer(["some words to learn from"] * 5, 280, tmp_path / "t.model")
    stream = token_stream(tokenizer, ["some words", "to", "learn"])
    assert stream.dtype == np.uint16 and stream[0] == 1 and stream[-1] == 2
    pairs = list(zip(stream[:-1].tolist(), stream[1:].tolist(), strict=True))
    assert pairs.count((2, 1)) == 2 and (1, 1) not in pairs and (2, 2) not in pairs
    assert len(token_stream(tokenizer, ["some words"] * 9, limit=10)) == 10


def test_micro_batches_share_out_the_rows_and_stay_in_step():
    rows = torch.arange(15).view(3, 5)
    for count in (1, 2, 3):
        parts = list(micro_batches(rows, count))
        assert len(parts) == count
        assert torch.equal(torch.cat([tokens for tokens, _ in parts]), rows[:, :-1])
        assert torch.equal(torch.cat([targets for _, targets in parts]), rows[:, 1:])
    *full, (tokens, targets) = micro_batches(rows, 4)
    assert len(full) == 3 and tokens.shape == (1, 4) and targets.eq(-100).all()


def test_the_schedule_peaks_after_the_warm_up_and_ends_at_a_tenth():
    for warmup, total in ((2000, 500_000), (10, 400), (0, 100)):
        lr = [cosine_lr(step, 3e-4, warmup, total) for step in range(total)]
        assert max(lr) == pytest.approx(3e-4, rel=1e-2) and lr[-1] == pytest.approx(3e-5)
        if warmup:
            assert lr[warmup - 1] == 3e-4 and lr[0] == pytest.approx(3e-4 / warmup)
        assert all(a >= b for a, b in itertools.pairwise(lr[max(warmup - 1, 0) :]))


def test_the_norms_weights_alone_are_not_decayed():
    model = random_model()
    decayed, exempt = adamw(model, 1e-3).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and exempt["weight_decay"] == 0
    assert all(names[id(p)].endswith("norm.weight") for p in exempt["params"])
    assert len(exempt["params"]) == 2 * model.config.n_layers + 1
    assert len(decayed["params"]) + len(exempt["params"]) == len(names)
    assert (decayed["betas"], decayed["eps"]) == ((0.9, 0.95), 1e-5)


def test_accumulation_does_not_change_the_training():
    "One pass over 8 rows equals eight passes over one: the loss is divided once, by all targets of the step."
    stream = np.random.default_rng(0).integers(0, 97, 256 * 6 + 1).astype(np.uint16)
    runs = []
    for micro_batch in (8, 3, 1):
        model = random_model()
        losses = [step.loss for step in pretrain(model, stream, replace(CONFIG, micro_batch=micro_batch))]
        runs.append((losses, model))
    for losses, model in runs[1:]:
        assert losses == pytest.approx(runs[0][0], rel=1e-5)
        for a, b in zip(model.parameters(), runs[0][1].parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_the_loop_is_the_recipe_step_by_step():
    "Against an independent loop with PyTorch's own mean loss, clipping and AdamW."
    stream = np.random.default_rng(1).integers(0, 97, 256 * 6 + 1).astype(np.uint16)
    ours, plain = random_model(), random_model()
    config = replace(CONFIG, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.7, grad_clip=0.5, final_lr=0.3)
    for parameter in ours.parameters():
        parameter.grad = torch.ones_like(parameter)  # left over by somebody else
    logged = list(pretrain(ours, stream, config, seed=4))
    matrices, norms = ([p for p in plain.parameters() if (p.ndim > 1) == m] for m in (True, False))
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.7}, {"params": norms, "weight_decay": 0.0}], betas=(0.8, 0.9), eps=1e-3
    )
    packed = Packed(stream, 32, seed=4)
    data = packed.rows(0, 48)
    for log, batch in zip(logged, data.split(8), strict=True):
        loss = cross_entropy(plain(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = log.lr
        optimizer.step()
        optimizer.zero_grad()
        assert (log.loss, log.grad_norm) == pytest.approx((loss.item(), norm.item()), rel=1e-4)
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-4)
    assert [log.tokens for log in logged] == [256 * (i + 1) for i in range(6)]
    assert [log.lr for log in logged] == [cosine_lr(i, config.lr, 2, 6, 0.3) for i in range(6)]
    assert min(log.grad_norm for log in logged) > config.grad_clip  # so that clipping matters


def test_training_is_deterministic():
    stream = np.random.default_rng(2).integers(0, 97, 2000).astype(np.uint16)
    first, second = (list(pretrain(random_model(), stream, CONFIG, seed=1)) for _ in range(2))
    assert first == second


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    model = random_model()
    with torch.no_grad():
        model.output.weight[3, 0] = torch.inf
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(FloatingPointError, match="step 0"):
        list(pretrain(model, np.arange(97).repeat(4).astype(np.uint16), CONFIG))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_held_out_loss_of_a_fresh_model_is_that_of_guessing():
    model = random_model()
    model.init_weights()
    stream = np.random.default_rng(0).integers(0, 97, 1000).astype(np.uint16)
    assert held_out_loss(model, stream, 32) == pytest.approx(math.log(97), abs=0.05)
    model = random_model()
    assert held_out_loss(model, stream, 32, max_rows=3) == held_out_loss(model, stream[: 3 * 32 + 1], 32)


@pytest.mark.parametrize("wrong", [dict(max_seq_len=300), dict(tokens=100), dict(warmup_steps=6), dict(micro_batch=0)])
def test_recipes_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        replace(CONFIG, **wrong)


@pytest.mark.parametrize("wrong", [dict(documents=()), dict(documents=("", "")), dict(documents=("a",), upsampling=0)])
def test_sources_without_text_are_refused(wrong):
    with pytest.raises(ValueError, match="a source of"):
        Source(**wrong)


def test_the_papers_recipe_takes_half_a_million_steps():
    assert [PRETRAIN[size].steps for size in ("7B", "13B", "34B", "70B")] == [500_000] * 4
    assert [PRETRAIN[size].lr for size in ("7B", "13B", "34B", "70B")] == [3e-4, 3e-4, 1.5e-4, 1.5e-4]
