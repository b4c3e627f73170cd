"""Tokens in, trained model out: packing, schedule, the loop."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import random_model
from torch.nn.functional import cross_entropy

from llama2lib.checkpoint import save_checkpoint
from llama2lib.distributed import Parallel
from llama2lib.optim import adamw, cosine_lr
from llama2lib.pretrain import (
    PRETRAIN,
    PretrainConfig,
    fresh_or_loaded,
    held_out_loss,
    is_reward_folder,
    micro_batches,
    pretrain,
)
from llama2lib.shards import Packed

CONFIG = PretrainConfig(
    "debug", lr=1e-3, warmup_steps=2, batch_tokens=256, tokens=256 * 6, max_seq_len=32, micro_batch=8
)


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


@pytest.mark.parametrize(
    "wrong",
    [
        dict(max_seq_len=300),
        dict(tokens=100),
        dict(warmup_steps=6),
        dict(micro_batch=0),
        dict(max_seq_len=31, parallel=Parallel(tp=2)),  # the ranks share out the tokens of a row
        dict(parallel=Parallel(tp=0)),
    ],
)
def test_recipes_that_cannot_work_are_refused(wrong):
    with pytest.raises(ValueError, match="expected"):
        replace(CONFIG, **wrong)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'{"architectures": ["LlamaForSequenceClassification"]}', True),
        (b'{"architectures": ["LlamaForCausalLM"]}', False),
        (b'{"architectures": null}', False),
        (b"{}", False),
        (b'["LlamaForSequenceClassification"]', False),
        (b'{"architectures": ["LlamaForSequenceClassif', False),
        (b"\xff\xfe", False),
        (None, False),
    ],
)
def test_a_reward_folder_is_known_by_its_config_and_a_damaged_one_is_none(tmp_path, content, found):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    assert is_reward_folder(tmp_path) is is_reward_folder(str(tmp_path)) is found
    assert not is_reward_folder(tmp_path / "nowhere")


def test_a_run_from_a_folder_with_a_damaged_config_names_the_file(tmp_path):
    save_checkpoint(random_model(), tmp_path)
    (tmp_path / "config.json").write_text("{oops")
    with pytest.raises(ValueError, match=r"config\.json"):
        fresh_or_loaded(replace(CONFIG, model=str(tmp_path)), 97, torch.device("cpu"), load=True)


def test_the_papers_recipe_takes_half_a_million_steps():
    assert [PRETRAIN[size].steps for size in ("7B", "13B", "34B", "70B")] == [500_000] * 4
    assert [PRETRAIN[size].lr for size in ("7B", "13B", "34B", "70B")] == [3e-4, 3e-4, 1.5e-4, 1.5e-4]
