"""A training step traced without GPUs: memory to the byte, work, extrapolation, the roofline, clear refusals."""

import subprocess
import sys
import weakref
from dataclasses import replace
from functools import cache
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama2lib import plan as planning
from llama2lib.distributed import make_mesh, parallelize, training_tensors
from llama2lib.model import LLAMA2, Llama
from llama2lib.optim import adamw
from llama2lib.plan import (
    PlanConfig,
    cli,
    described,
    extrapolated,
    peak,
    per_block,
    plan,
    pretended_ranks,
    search,
    settings,
    trace,
)
from llama2lib.pretrain import micro_batches, train_step
from llama2lib.roofline import A100, collective_seconds, compute_seconds, step_seconds

SMALL = replace(LLAMA2["debug"], dim=128, n_heads=8, n_kv_heads=2, hidden_dim=352, vocab_size=64, n_layers=2)


@pytest.fixture(autouse=True)
def small_model():
    with mock.patch.dict(LLAMA2, small=SMALL):
        yield


def recipe(gpus=4, tp=1, ac="none", reduce="step", micro_batch=2, passes=2, length=64, model="small"):
    "A run whose ranks make so many passes of `micro_batch` rows in a step."
    tokens = gpus // tp * micro_batch * passes * length
    config = PlanConfig(model, gpus, tp=tp, ac=ac, reduce=reduce, micro_batch=micro_batch, compile=False)
    return replace(config, batch_tokens=tokens, seq_len=length).recipe()


@cache
def traced(layers=2, gpus=4, **options) -> dict:
    "A trace, made once for all tests."
    return trace(recipe(gpus, **options), gpus, layers)


def parameters(config) -> list:
    with torch.device("meta"):
        return list(Llama(config).parameters())


@pytest.mark.parametrize(("gpus", "tp"), [(4, 1), (6, 1), (8, 2)])
def test_parameters_gradients_and_optimizer_are_those_of_arithmetic(gpus, tp):
    "Float32 weights and gradients, two averages and a step for each tensor; rank 0 holds the largest part of rows."
    ranks, memory, expected = gpus // tp, traced(gpus=gpus, tp=tp)["memory"], 0
    with torch.device("meta"):
        named = dict(Llama(SMALL).named_parameters())
    for name, p in named.items():
        rows, columns = p.shape[0], p[0].numel()
        if tp > 1 and p.ndim == 2:  # matrices are divided by rows, those at a residual branch's end by columns
            by_columns = name.endswith(("wo.weight", "w2.weight"))
            rows, columns = (rows, columns // tp) if by_columns else (rows // tp, columns)
        expected += 4 * -(-rows // ranks) * columns
    assert memory["update"]["parameters"] == memory["update"]["gradients"] == expected
    assert memory["first forward"]["optimizer"] == 2 * expected + 4 * len(named)
    assert memory["first forward"]["gradients"] == 0


def test_gradients_of_a_whole_step_are_kept_in_float32_or_reduced_after_every_pass():
    whole = 4 * sum(p.numel() for p in parameters(SMALL))
    step, each = (traced(reduce=reduce)["memory"]["last forward"] for reduce in ("step", "micro_batch"))
    assert step["gradients"] == whole and each["gradients"] == whole // 4


class Alive(TorchDispatchMode):
    "Bytes of all real storages that are alive, counted anew after every operation."

    def __init__(self):
        super().__init__()
        self.storages, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented
        out = func(*args, **kwargs or {})
        for tensor in tree_leaves((args, kwargs, out)):
            if type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = weakref.ref(storage)
        alive = [(key, reference()) for key, reference in self.storages.items()]
        self.storages = {key: self.storages[key] for key, storage in alive if storage is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for _, storage in alive if storage is not None))
        return out


def real_peak(config, gpus) -> int:
    "The same step on real tensors in this process, with collectives that do nothing."
    with pretended_ranks(gpus):
        with torch.device("meta"):
            model = Llama(replace(LLAMA2[config.model], max_seq_len=config.max_seq_len))
        parallelize(model, make_mesh(config.parallel, "cpu"), config.parallel, torch.bfloat16)
        alive = Alive()
        with alive:
            model.to_empty(device="cpu")
            for parameter in model.parameters():
                torch.nn.init.zeros_(parameter)
            optimizer = adamw(model, 1e-3)
            for group in optimizer.param_groups:
                group["foreach"] = True
            training_tensors(model, optimizer)
            batch = torch.zeros(4, config.max_seq_len + 1, dtype=torch.int64)
            parts = list(micro_batches(batch, 2))
            targets = config.batch_rows * config.max_seq_len
            train_step(model, optimizer, parts, targets, 1.0, config.parallel.reduce)
    return alive.peak


@pytest.mark.parametrize(
    ("tp", "ac", "reduce", "tolerance"),
    [(1, "none", "step", 0), (1, "selective", "micro_batch", 0), (1, "full", "step", 0), (2, "full", "step", 0.015)],
)
def test_the_traced_peak_is_that_of_real_tensors(tp, ac, reduce, tolerance):
    "With the attention kernel that a CPU has, since only that one can run here."
    with mock.patch.dict(LLAMA2, mha=replace(SMALL, n_kv_heads=8, n_layers=3)):
        config = recipe(4, tp, ac, reduce, model="mha")
        with mock.patch.object(planning, "flash_attention", F.scaled_dot_product_attention):
            traced = peak(trace(config, 4))[1]["total"]
        assert traced == pytest.approx(real_peak(config, 4), rel=tolerance, abs=0)


def test_activations_are_what_the_backward_pass_keeps():
    "Against PyTorch's own hook for saved tensors, on a model that runs alone."
    length, rows = 64, 2
    block = {}
    for layers in (2, 3):
        with mock.patch.object(F, "scaled_dot_product_attention", planning.flash_attention), torch.device("meta"):
            model = Llama(replace(SMALL, n_layers=layers, max_seq_len=length)).bfloat16()
            kept = {}

            def keep(tensor, kept=kept):
                storage = tensor.untyped_storage()
                kept[storage._cdata] = storage
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                logits = model(torch.zeros(rows, length, dtype=torch.int64))
            weights = {p.untyped_storage()._cdata for p in model.parameters()}
            block[layers] = sum(s.nbytes() for key, s in kept.items() if key not in weights)
            del logits
    forward = [traced(layers)["memory"]["last forward"]["activations"] for layers in (2, 3)]
    assert forward[1] - forward[0] == pytest.approx(block[3] - block[2], rel=0.02)


def test_recomputation_keeps_a_blocks_input_only():
    "Full: the bfloat16 input, of B T D numbers. Selective: the products' results besides, and less than all."
    growth = {}
    for ac in ("none", "selective", "full"):
        two, three = (traced(layers, ac=ac)["memory"]["last forward"] for layers in (2, 3))
        growth[ac] = three["activations"] - two["activations"]
    assert growth["full"] == 2 * 2 * 64 * SMALL.dim
    assert growth["full"] < growth["selective"] < growth["none"]


def test_attention_is_flash_attention_with_shared_heads():
    "No T×T scores, and keys and values are not repeated: four times the context takes four times the memory."
    growth = {}
    for length in (64, 256):
        two, three = (traced(layers, length=length)["memory"]["last forward"] for layers in (2, 3))
        growth[length] = three["activations"] - two["activations"]
    assert growth[256] == pytest.approx(4 * growth[64], rel=1e-3)
    seen = []
    flash = planning.flash_attention

    def watched(q, k, v, **kwargs):
        seen.append((q.shape[1], k.shape[1]))
        return flash(q, k, v, **kwargs)

    with mock.patch.object(planning, "flash_attention", watched):
        trace(recipe(), 4, 1)
    assert set(seen) == {(SMALL.n_heads, SMALL.n_kv_heads)}


@pytest.mark.parametrize("ac", ["none", "selective", "full"])
def test_the_operations_are_those_of_the_formula(ac):
    work, tokens, length = traced(ac=ac)["work"], 2 * 64, 64
    attention = 4 * SMALL.n_layers * SMALL.dim * length * tokens
    matmul = tokens * SMALL.forward_flops_per_token(0)
    again = 1 if ac == "full" else 0  # selective recomputation keeps the products
    head, w2 = tokens * 2 * SMALL.dim * SMALL.vocab_size, SMALL.n_layers * tokens * 2 * SMALL.dim * SMALL.hidden_dim
    for name in ("first", "last"):
        assert work[f"{name} forward"]["matmul"] == matmul and work[f"{name} forward"]["attention"] == attention
        backward = 2 * matmul + again * (matmul - head - w2)  # a block's last product is not needed, nor made, again
        assert work[f"{name} backward"]["matmul"] == backward
        assert work[f"{name} backward"]["attention"] == (2.5 + again) * attention


def test_tensor_parallel_ranks_share_the_work_and_exchange_every_blocks_stream():
    "A block gathers its input twice in the forward pass, and scatters its output twice: B T D numbers each time."
    assert 2 * traced(gpus=8, tp=2)["work"]["first forward"]["matmul"] == traced()["work"]["first forward"]["matmul"]
    block = per_block(traced(2, gpus=8, tp=2), traced(3, gpus=8, tp=2))["first forward"]["block"]
    stream = 2 * 2 * 64 * SMALL.dim
    assert block["tp all_gather"] == block["tp reduce_scatter"] == 2 * stream
    assert block["tp all_gather calls"] == block["tp reduce_scatter calls"] == 2


def test_weights_are_gathered_in_every_pass_and_gradients_scattered_as_the_recipe_says():
    whole = sum(p.numel() for p in parameters(SMALL))
    for reduce, scattered in (("step", 0), ("micro_batch", 4 * whole)):
        work = traced(reduce=reduce)["work"]
        assert work["first forward"]["dp all_gather"] == 2 * whole
        assert work["first backward"].get("dp reduce_scatter", 0) == scattered
        assert work["last backward"]["dp reduce_scatter"] == 4 * whole


@pytest.mark.parametrize(
    ("tp", "ac", "reduce", "passes"),
    [(1, "full", "micro_batch", 2), (2, "selective", "step", 1)],
)
def test_three_and_four_blocks_tell_of_six(tp, ac, reduce, passes):
    options = dict(gpus=4 * tp, tp=tp, ac=ac, reduce=reduce, passes=passes)
    three, four, six = (traced(layers, **options) for layers in (3, 4, 6))
    guess = extrapolated(three, four, 6)
    assert "block" in peak(six)[0]  # inside a block, where the neighbours matter
    assert peak(guess) == peak(six) and guess["work"] == six["work"]


def test_a_third_pass_changes_no_peak():
    with mock.patch.object(planning, "PASSES", 3):
        three = trace(recipe(passes=3), 4)
    assert peak(three)[1]["total"] - peak(traced())[1]["total"] == 2 * 65 * 8  # two more rows of inputs


def test_a_ring_passes_on_all_but_one_part_and_waits_for_every_hop():
    near = collective_seconds(A100, "all_gather", 1e9, 1, 8, 8)
    assert near == pytest.approx(7 / 8 * 1e9 / A100.nvlink, rel=0.02)
    assert collective_seconds(A100, "all_reduce", 1e9, 1, 8, 8) == 2 * near
    assert collective_seconds(A100, "all_gather", 1e9, 1, 1, 1) == 0
    far = collective_seconds(A100, "all_gather", 1e9, 1, 16, 8)  # eight cards a node
    assert far == pytest.approx(15 / 16 * 1e9 / (8 * A100.network), rel=0.02)
    assert collective_seconds(A100, "all_gather", 1e9, 1, 2, 1) == pytest.approx(1e9 / 2 / A100.network, rel=0.02)
    empty = [collective_seconds(A100, "all_gather", 0, 1, ranks, 8) for ranks in (16, 128, 1024)]
    assert all(4 < b / a < 16 for a, b in pairwise(empty))


def test_communication_shows_where_computation_is_shorter():
    work = {"matmul": 1e12}
    seconds = compute_seconds(A100, work, False)
    assert seconds == 1e12 / (A100.matmul * A100.peak_flops)
    block = work | {"dp all_gather": 1e9, "dp all_gather calls": 1}
    gather = collective_seconds(A100, "all_gather", 1e9, 1, 64, 8)

    def step(block, rest, passes=1):
        phases = {"last forward": {"rest": rest, "block": block}}
        return step_seconds(A100, phases, 10, passes, 64, 1, False)

    assert step(block, {})["step"] == pytest.approx(10 * max(seconds, gather))
    assert step(block, block)["dp"] == pytest.approx(10 * max(0, gather - seconds) + gather)
    tensor = work | {"tp all_gather": 1e9, "tp all_gather calls": 1}
    phases = {"first forward": {"rest": {}, "block": tensor}}
    shown = step_seconds(A100, phases, 10, 4, 64, 8, False)
    assert shown["tp"] == pytest.approx(3 * 10 * collective_seconds(A100, "all_gather", 1e9, 1, 8, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model="71B"), "model '71B': expected one of 7B, 13B, 34B, 70B"),
        (dict(gpus=4, tp=8), "tp 8 does not divide 4 GPUs"),
        (dict(gpus=12, tp=8), "tp 8 does not divide 12 GPUs"),
        (dict(gpus=48, tp=3, seq_len=4095), "tp 3 does not divide n_heads 64"),
        (dict(gpus=48, tp=3), "max_seq_len 4096: expected a multiple of tp 3"),
        (dict(gpus=1024, tp=1), "977 rows of 4096 tokens, fewer than the 1024 ranks that 1024 GPUs make with tp 1"),
        (dict(micro_batch=0), "micro_batch 0: expected at least 1"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(replace(PlanConfig(), **changes))


def test_the_command_explains_itself(capsys):
    with mock.patch.object(sys, "argv", ["plan", "--help"]), pytest.raises(SystemExit):
        cli()
    shown = capsys.readouterr().out
    assert all(f"--{name}" in shown for name in ("model", "gpus", "tp", "ac", "micro-batch", "reduce", "search"))


def test_the_command_fails_with_one_line():
    command = [sys.executable, "-m", "llama2lib.plan", *"--model 7B --gpus 12 --tp 8".split()]
    wrong = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert wrong.returncode == 1 and wrong.stderr.strip().splitlines()[-1] == "ValueError: tp 8 does not divide 12 GPUs"


def test_a_search_finds_the_fewest_gpus_and_the_fastest_setting_that_fits():
    "On traces by a formula: memory per GPU falls with GPUs and tp and grows with rows, larger settings are faster."
    looked_at = []

    def formula(config, hardware):
        looked_at.append(config)
        total = 2**30 * (800 / config.gpus + 8 * config.micro_batch / config.tp + 5 * (config.reduce == "step"))
        fits = total + hardware.reserve <= hardware.memory
        return {"total": total, "fits": fits, "tokens_per_second": 100 * config.micro_batch + config.tp, "mfu": 0.5}

    with mock.patch.object(planning, "plan", formula):
        found = search(PlanConfig("70B", 64, ac="full"))
        assert {setting.gpus for setting, _ in found} == {16}  # 8 GPUs: 100 GiB each; 16: 50
        assert len(settings(PlanConfig("70B", 64, ac="full"), 16)) == 4 * 2 * 3
        assert len(found) == 4 * 2 * 3 - 1  # of two with 4 rows and tp 1, the leaner one does not fit
        best, facts = found[0]
        assert facts["fits"] and (best.tp, best.micro_batch, best.ac) == (8, 4, "full")
        fitting = [facts["tokens_per_second"] for _, facts in found if facts["fits"]]
        assert 0 < len(fitting) < len(found) and fitting == sorted(fitting, reverse=True)
        assert not any(facts["fits"] for _, facts in found[len(fitting) :])
        assert len(looked_at) < 2 * len(found)  # not all settings on all numbers of GPUs
        assert search(PlanConfig("70B", 40, ac="full"))[0][0].gpus == 16
        with pytest.raises(ValueError, match=r"70B fits on no number of GPUs up to 8: .* needs 101\.0 GiB"):
            search(PlanConfig("70B", 8, ac="full"))


def test_a_search_looks_only_at_numbers_of_gpus_that_the_batch_can_be_divided_over():
    "Four rows: at most eight GPUs, with two of them for a row. All fit, so that the fewest is one."
    fits = {"total": 2**30, "fits": True, "tokens_per_second": 1.0, "mfu": 0.5}
    config = PlanConfig("debug", 64, batch_tokens=512, seq_len=128)
    with mock.patch.object(planning, "plan", lambda config, hardware: fits):
        assert search(config)[0][0].gpus == 1
        assert search(replace(config, tp=2))[0][0].gpus == 2
        assert search(replace(config, tp=2, gpus=3))[0][0].gpus == 2
        for tp, gpus, message in ((8, 64, "tp 8 does not divide n_heads 4"), (2, 1, "tp 2 does not divide 1 GPUs")):
            with pytest.raises(ValueError, match=message):
                search(replace(config, tp=tp, gpus=gpus))


def test_a_search_leaves_out_no_setting_that_could_be_the_fastest():
    "Against trying all: each choice but that of tp needs more memory than the one before it, by random numbers."
    pruned = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        needs = {
            name: dict(zip(choices, np.cumsum(rng.uniform(0, 15, len(choices))), strict=True))
            for name, choices in planning.CHOICES.items()
        }
        needs["tp"] = {tp: rng.uniform(0, 40) for tp in planning.CHOICES["tp"]}
        speeds = {}

        def formula(config, hardware=A100, needs=needs, rng=rng, speeds=speeds):
            gigabytes = 10 + 300 / config.gpus + sum(table[getattr(config, name)] for name, table in needs.items())
            fits = 2**30 * gigabytes + hardware.reserve <= hardware.memory
            speed = speeds.setdefault(config, rng.uniform(1, 2))
            return {"total": 2**30 * gigabytes, "fits": fits, "tokens_per_second": speed, "mfu": 0.5}

        with mock.patch.object(planning, "plan", formula):
            found = search(PlanConfig("70B", 64))
        every = settings(PlanConfig("70B", 64), found[0][0].gpus)
        fitting = [setting for setting in every if formula(setting)["fits"]]
        assert found[0][0] == max(fitting, key=lambda setting: formula(setting)["tokens_per_second"])
        assert sum(facts["fits"] for _, facts in found) == len(fitting)
        pruned += len(every) - len(found)
    assert pruned > 0


def test_a_plan_of_a_small_run_and_its_words():
    config = PlanConfig("small", 4, ac="full", tp=1, micro_batch=2, batch_tokens=16 * 64, seq_len=64)
    with mock.patch.object(planning, "trace", lambda recipe, gpus, layers=None: traced(layers or 2, ac="full")):
        found = plan(config)
        assert found == plan(replace(config, every_block=False))  # too few blocks to extrapolate to
        assert not plan(config, replace(A100, memory=found["total"] + A100.reserve - 1))["fits"]
    assert found["fits"] and found["total"] == sum(found["memory"].values()) == peak(traced(ac="full"))[1]["total"]
    assert found["gpu_hours"] == pytest.approx(2e12 / 3600 / found["tokens_per_second"])
    assert f"{found['mfu']:.1%} MFU" in described(config, found) and "fits into 80 less 6" in described(config, found)
