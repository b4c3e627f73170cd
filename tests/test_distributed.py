"Two processes learn what one learns; sharded models read and write whole folders; a run outlives its processes."

import importlib
import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import conftest
import numpy as np
import pytest
import torch
from conftest import random_model
from worker import RUN, config

from llama2lib.checkpoint import load_checkpoint, save_checkpoint, save_meta
from llama2lib.distributed import (
    KEPT,
    Parallel,
    StateFolder,
    check_tp,
    compute_dtype,
    init_weights,
    parallelize,
    recompute,
    training_tensors,
)
from llama2lib.model import LLAMA2, Llama
from llama2lib.optim import adamw
from llama2lib.pretrain import Log, PretrainConfig, pretrain, run, train_step
from llama2lib.shards import Shards, write_shards
from llama2lib.tokenizer import train_tokenizer

WORKER = Path(__file__).with_name("worker.py")


def torchrun(*arguments: str, nproc: int = 2, flags: tuple[str, ...] = (), timeout: int = 300):
    command = ["--standalone", f"--nproc-per-node={nproc}", *flags, WORKER, *arguments]
    conftest.torchrun(*command, timeout=timeout, MALLOC_MMAP_THRESHOLD_="65536")  # freed tensors go back to the system


def losses(folder: Path, what: str = "loss") -> list[float]:
    return [json.loads(line)[what] for line in (folder / "log.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(folder / "model").named_parameters())


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    texts = list(topics.values())[:30]
    write_shards(folder, train_tokenizer(texts, 512, folder / "tokenizer.model"), texts, shard_tokens=20_000)
    return folder


@pytest.fixture(scope="module")
def alone(shards, one_thread, tmp_path_factory) -> Path:
    "A run of one process."
    out = tmp_path_factory.mktemp("alone")
    run(config(json.dumps({"data": str(shards), "out": str(out)})))
    return out


@pytest.mark.parametrize(
    ("nproc", "parallel", "micro_batch"),
    [
        (2, {}, 1),  # 7 rows on 2 ranks: one of them has a pass without targets
        (2, {"tp": 2}, 2),
        (4, {"tp": 2, "ac": "selective", "reduce": "micro_batch"}, 2),
        (2, {"ac": "full", "reduce": "micro_batch"}, 4),
    ],
)
def test_several_processes_learn_what_one_learns(alone, shards, tmp_path, nproc, parallel, micro_batch):
    "The same loss curve over 20 steps of float32, from the same weights, on the same data, and the same model saved."
    fields = {"data": str(shards), "out": str(tmp_path), "parallel": parallel, "micro_batch": micro_batch}
    torchrun("train", json.dumps(fields), nproc=nproc)
    assert len(losses(alone)) == 20 and losses(alone)[-1] < losses(alone)[0] - 0.5
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(tmp_path, "grad_norm") == pytest.approx(losses(alone, "grad_norm"), rel=1e-5)
    for name, weight in weights(tmp_path).items():
        assert torch.allclose(weight, weights(alone)[name], atol=1e-5), name


def test_a_run_goes_on_with_another_number_of_processes(alone, shards, tmp_path):
    "Two processes for eight steps and a bit, then one: the curve of one that was never stopped."
    fields = json.dumps({"data": str(shards), "out": str(tmp_path)})
    with pytest.raises(AssertionError, match="told to die"):
        torchrun("train", fields, "11", "raise")
    assert StateFolder(tmp_path).latest().name == "step-00000008"
    run(config(fields))
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)


def test_torchrun_brings_a_run_back_that_lost_a_process(alone, shards, tmp_path):
    fields = json.dumps({"data": str(shards), "out": str(tmp_path)})
    torchrun("train", fields, "13", flags=("--max-restarts=1",))
    assert losses(tmp_path) == pytest.approx(losses(alone), rel=1e-5)


def test_bfloat16_passes_keep_the_rotations_in_float32():
    "FSDP casts a block's inputs unless told not to, and the rotation's table is one of them."
    torchrun("mixed", "")


def test_accumulation_reduces_once_a_step():
    torchrun("reductions", "")


@pytest.mark.parametrize(("layout", "tp"), [("hf", 1), ("meta", 2)])
def test_folders_go_in_and_out_of_sharded_models_without_a_whole_one(tmp_path, layout, tp):
    torch.manual_seed(0)
    shape = dict(dim=768, n_layers=8, n_heads=8, n_kv_heads=8, hidden_dim=2048, vocab_size=4000, max_seq_len=128)
    model = random_model(**shape)
    source = tmp_path / layout
    save_checkpoint(model, source) if layout == "hf" else save_meta(model, source, shards=4)
    torchrun("folders", json.dumps([str(source), str(tmp_path / "out"), tp]))
    for folder in ("hf", "meta"):
        for name, weight in load_checkpoint(tmp_path / "out" / folder).named_parameters():
            assert torch.equal(weight, model.get_parameter(name)), (folder, name)


def test_every_rank_hears_that_a_folder_could_not_be_written(tmp_path):
    torchrun("full_disk", str(tmp_path / "model"))


def test_a_rank_that_cannot_go_on_gathering_ends(tmp_path):
    with pytest.raises(AssertionError, match="told to have none"):
        torchrun("no_memory", str(tmp_path / "model"), timeout=60)
    assert not list(tmp_path.iterdir())


def test_a_process_that_fails_ends_while_the_others_wait_for_it():
    with pytest.raises(AssertionError, match="told to die"):
        torchrun("fails", "", timeout=60)


def test_saving_in_the_background_does_not_cross_what_ranks_tell_each_other(tmp_path):
    torchrun("background", str(tmp_path), nproc=3)


def test_weights_do_not_depend_on_how_many_rows_a_rank_draws():
    model = Llama(LLAMA2["debug"])
    init_weights(model, seed=5)
    expected = {name: p.clone() for name, p in model.named_parameters()}
    init_weights(model, seed=6)
    assert not any(torch.equal(p, expected[name]) for name, p in model.named_parameters() if p.ndim > 1)
    init_weights(model, seed=5)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())
    drawn = torch.cat([p.flatten() / model.init_std(name) for name, p in model.named_parameters() if p.ndim > 1])
    assert drawn.mean().abs() < 0.02 and abs(drawn.std() - 1) < 0.02
    assert drawn.unique().numel() > 0.99 * drawn.numel()  # no two blocks from one seed


@pytest.mark.parametrize("ac", ["none", "selective", "full"])
def test_recomputation_changes_memory_and_not_the_gradient(ac):
    model, plain = random_model(), random_model()
    recompute(model, ac)
    names = [name for name, _ in model.named_parameters()]
    tokens = torch.arange(96).view(3, 32) % 97
    for m in (model, plain):
        m(tokens).square().mean().backward()
    assert names == [name for name, _ in plain.named_parameters()]
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-7)


def test_what_is_recomputed_is_what_the_name_says():
    "Matrix products in the backward pass: two per product of the forward pass, and a third only with 'full'."
    from torch.utils.flop_counter import FlopCounterMode

    counted = {}
    for ac in ("none", "selective", "full"):
        model = random_model()
        recompute(model, ac)
        with FlopCounterMode(display=False) as counter:
            model(torch.arange(64)[None] % 97).square().mean().backward()
        counted[ac] = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert counted["selective"] == counted["none"] < counted["full"]
    assert all(isinstance(op, torch._ops.OpOverload) for op in KEPT)


@pytest.mark.parametrize("ac", ["none", "selective"])
def test_a_compiled_loss_learns_the_same(ac):
    "Nine rows in passes of four and five, compiled as a whole; the kernels do not fall back to the eager ones."
    config = PretrainConfig("debug", max_seq_len=32, batch_tokens=288, tokens=864, warmup_steps=1, micro_batch=5)
    stream, runs = np.arange(2000) * 7 % 97, {}
    for compiled in (False, True):
        model, parallel = random_model(), Parallel(ac=ac, compile=compiled)
        parallelize(model, None, parallel)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        runs[compiled] = list(pretrain(model, stream, replace(config, parallel=parallel)))
        assert bool(torch._dynamo.utils.counters["frames"].get("ok")) == compiled
    for eager, fused in zip(*runs.values(), strict=True):
        assert fused.loss == pytest.approx(eager.loss, abs=1e-4)
        assert fused.grad_norm == pytest.approx(eager.grad_norm, rel=1e-3)


def test_heads_that_do_not_divide_are_refused_with_the_numbers():
    with pytest.raises(ValueError, match="tp 16 does not divide n_kv_heads 8"):
        check_tp(LLAMA2["70B"], 16)
    check_tp(LLAMA2["70B"], 8)
    with pytest.raises(ValueError, match="tp 3 does not divide n_heads 4"):
        check_tp(LLAMA2["debug"], 3)


def test_masked_targets_count_once_over_the_whole_step():
    "The mean over targets, not the mean of the micro-batches' means."
    model = random_model()
    tokens, targets = torch.arange(64).view(2, 32) % 97, torch.arange(1, 65).view(2, 32) % 97
    targets[0, 3:] = -100
    parts = [(tokens[:1], targets[:1]), (tokens[1:], targets[1:])]
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    loss, _ = train_step(model, adamw(model, 0.0), parts, targets=35, grad_clip=1.0)
    assert loss == pytest.approx(expected.item(), rel=1e-6)


# ---------- checkpoints of a run


def trained(tmp_path, steps: int = 2, **options):
    model = random_model()
    optimizer = adamw(model, 1e-2)
    folder = StateFolder(tmp_path / "run", **options)
    for step in range(1, steps + 1):
        train_step(model, optimizer, [(torch.arange(8)[None], torch.arange(1, 9)[None])], 8, 1.0)
        folder.save(step, training_tensors(model, optimizer), {"note": "here"})
    folder.wait()
    return model, optimizer, folder


@pytest.mark.parametrize("in_background", [False, True])
def test_an_error_without_words_is_a_failure_too(tmp_path, monkeypatch, in_background):
    model, optimizer, folder = trained(tmp_path, in_background=in_background)

    def no_memory(*_, **__):
        raise MemoryError

    monkeypatch.setattr(torch.distributed.checkpoint.filesystem.FileSystemWriter, "write_data", no_memory)
    with pytest.raises(OSError, match=r"after step 3 .*MemoryError; the last good checkpoint is .*step-00000002"):
        folder.save(3, training_tensors(model, optimizer), {})
        folder.wait()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_brings_everything_back(tmp_path, in_background):
    torch.manual_seed(7)
    model, optimizer, folder = trained(tmp_path, in_background=in_background)
    expected = {name: tensor.clone() for name, tensor in training_tensors(model, optimizer).items()}
    draw = torch.rand(3)  # the generator's next numbers
    other = random_model(seed=9)
    restored = adamw(other, 1e-2)
    tensors = training_tensors(other, restored)
    assert folder.load(tensors) == {"note": "here", "step": 2}
    assert torch.equal(torch.rand(3), draw)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert torch.equal(other.output.weight, expected["model.output.weight"])
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        state = restored.state[theirs]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"} and state["step"] == 2
        assert all(torch.equal(state[name], value) for name, value in optimizer.state[ours].items())


def test_a_background_save_is_of_the_moment_it_was_asked_for(tmp_path):
    model, optimizer, folder = trained(tmp_path, in_background=True)
    before = model.output.weight.clone()
    folder.save(3, training_tensors(model, optimizer), {})
    with torch.no_grad():
        model.output.weight.zero_()
    folder.wait()
    folder.load(training_tensors(model, optimizer))
    assert torch.equal(model.output.weight, before)


def test_a_background_save_counts_from_its_end_and_not_from_the_next_save(shards, tmp_path, monkeypatch):
    "A run killed between two saves would otherwise lose the steps of both."
    from llama2lib import pretrain as module

    class InBackground(StateFolder):
        def __init__(self, folder, keep, in_background):
            super().__init__(folder, keep, in_background=True)

    def dying(*args, **options):
        for step in pretrain(*args, **options):
            if step.step == 13:
                assert states(tmp_path) == ["step-00000008"], "a kill would now lose 13 steps"
                raise RuntimeError("told to die")
            if step.step == 12:
                time.sleep(1)  # the writing of step 8 ends
            yield step

    monkeypatch.setattr(module, "StateFolder", InBackground)
    monkeypatch.setattr(module, "pretrain", dying)
    with pytest.raises(RuntimeError, match="told to die"):
        run(config(json.dumps({"data": str(shards), "out": str(tmp_path)})))
    assert StateFolder(tmp_path).latest().name == "step-00000008"


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step-*"))


def test_old_checkpoints_go_and_none_is_left_half_written(tmp_path):
    _, _, folder = trained(tmp_path, steps=4, keep=2)
    names = sorted(path.name for path in folder.folder.iterdir())
    assert names == ["latest", "step-00000003", "step-00000004"]


def test_a_run_that_was_set_back_keeps_what_it_writes_next(tmp_path):
    model, optimizer, folder = trained(tmp_path, steps=4, keep=2)
    (folder.folder / "latest").write_text("step-00000003\n")
    folder.load(tensors := training_tensors(model, optimizer))
    folder.save(3, tensors, {})
    assert folder.latest().name == "step-00000003" and not (folder.folder / "step-00000004").exists()


def test_a_full_disk_names_the_last_good_checkpoint_which_stays(tmp_path, monkeypatch):
    model, optimizer, folder = trained(tmp_path)

    def no_space(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed.checkpoint.filesystem.FileSystemWriter, "write_data", no_space)
        with pytest.raises(OSError, match=r"after step 3 .*No space left.*last good checkpoint is .*step-00000002"):
            folder.save(3, training_tensors(model, optimizer), {})
    assert sorted(path.name for path in folder.folder.iterdir()) == ["latest", "step-00000001", "step-00000002"]
    folder.load(training_tensors(model, optimizer))
    folder.save(3, training_tensors(model, optimizer), {})
    assert folder.latest().name == "step-00000003"


def test_a_latest_that_is_gone_is_named(tmp_path):
    _, _, folder = trained(tmp_path)
    for name in ("step-00000009", "", "..", "step-00000001/../../run"):
        (folder.folder / "latest").write_text(name)
        with pytest.raises(ValueError, match=r"latest names '.*step-00000001, step-00000002 is\): write a name"):
            folder.latest()


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata", "run.json"])
@pytest.mark.parametrize("left", [None, 0, 20])
def test_a_damaged_checkpoint_is_named(tmp_path, file, left):
    model, optimizer, folder = trained(tmp_path)
    path = folder.latest() / file
    content = path.read_bytes()
    path.unlink() if left is None else path.write_bytes(content[:left])
    with pytest.raises(ValueError, match="step-00000002 cannot be read"):
        folder.load(training_tensors(model, optimizer))


def test_without_latest_a_run_goes_on_from_the_newest_instead_of_removing_it(tmp_path):
    _, _, folder = trained(tmp_path)
    (folder.folder / "latest").unlink()
    assert folder.latest().name == "step-00000002"
    assert StateFolder(tmp_path / "nothing").latest() is None


def test_what_is_called_step_is_whole_also_when_its_removal_is_killed(tmp_path, monkeypatch):
    model, optimizer, folder = trained(tmp_path)
    whole = {path.name for path in folder.latest().iterdir()}

    def killed(path, **_):
        for file in list(path.glob("*"))[:1]:
            file.unlink()

    monkeypatch.setattr(shutil, "rmtree", killed)
    folder.keep = 1
    folder.save(3, training_tensors(model, optimizer), {})
    assert states(folder.folder) == ["step-00000003"]
    assert {path.name for path in folder.latest().iterdir()} == whole
    monkeypatch.undo()
    (folder.folder / ".step-00000077.partial").mkdir()  # of a run that saved more often
    folder.save(4, training_tensors(model, optimizer), {})
    assert sorted(path.name for path in folder.folder.iterdir()) == ["latest", "step-00000004"]


def test_a_users_copy_of_a_checkpoint_stays(tmp_path):
    model, optimizer, folder = trained(tmp_path, steps=1)
    folder.latest().rename(folder.folder / "step-00000001-good")
    for step in (2, 3, 4):
        folder.save(step, training_tensors(model, optimizer), {})
    assert states(folder.folder) == ["step-00000001-good", "step-00000003", "step-00000004"]


@pytest.mark.parametrize("place", [("posix", "system"), ("torch.distributed.checkpoint.filesystem", "os.system")])
def test_a_checkpoint_cannot_run_code(tmp_path, place):
    "Neither by naming a function, nor by reaching through a module that imports it."
    model, optimizer, folder = trained(tmp_path)
    module, name = (b"\x8c" + bytes([len(part)]) + part.encode() for part in place)
    call = b"\x80\x04" + module + name + b"\x93\x8c\x10touch owned.file \x85R."
    with pytest.raises(ValueError, match=r"step-00000002 cannot be read \(UnpicklingError: .*system does not belong"):
        (folder.latest() / ".metadata").write_bytes(call)
        folder.load(training_tensors(model, optimizer))
    assert not Path("owned.file").exists()


# ---------- the run


def test_a_checkpoint_of_another_recipe_or_other_data_is_refused(alone, shards, tmp_path):
    fields = {"data": str(shards), "out": str(alone)}
    with pytest.raises(ValueError, match=r"step-00000020 is of another configuration \(lr 0.003, now 0.001\)"):
        run(config(json.dumps(fields | {"lr": 1e-3})))
    other = tmp_path / "other"
    texts = list(topics.values())[30:50]
    write_shards(other, train_tokenizer(texts, 512, other / "tokenizer.model"), texts)
    with pytest.raises(ValueError, match="data digest"):
        run(config(json.dumps(fields | {"data": str(other)})))
    assert len(losses(alone)) == 20


def test_a_finished_run_is_left_as_it_is(alone, shards):
    before = weights(alone)
    run(config(json.dumps({"data": str(shards), "out": str(alone), "micro_batch": 1})))
    assert len(losses(alone)) == 20 and all(torch.equal(w, before[name]) for name, w in weights(alone).items())


def test_the_log_has_every_step_once_also_when_lines_were_lost(tmp_path):
    "Cut by the number of lines, a log that was moved away would keep steps that are to come again."
    for step, begin in (8, 0), (13, 10):
        log = Log(tmp_path, begin, tensorboard=False)
        for now in range(step, step + 5):
            log.write({"step": now})
        log.close()
    (tmp_path / "log.jsonl").open("a").write('{"step": 1')  # the power failed
    Log(tmp_path, 15, tensorboard=False).close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [8, 9, 13, 14]


def test_training_goes_on_from_a_folder(alone, shards, tmp_path):
    run(config(json.dumps({"data": str(shards), "out": str(tmp_path), "model": str(alone / "model"), "lr": 1e-4})))
    assert losses(tmp_path)[0] < losses(alone)[0] - 0.5
    with pytest.raises(ValueError, match="max_seq_len 64; the run has 512 and 128"):
        fields = {"data": str(shards), "out": str(tmp_path / "b"), "model": str(alone / "model"), "max_seq_len": 128}
        run(config(json.dumps(fields)))


def test_a_loss_that_is_not_finite_names_step_rows_and_checkpoint(shards, tmp_path, monkeypatch):
    from llama2lib import pretrain as module

    cosine = module.cosine_lr
    monkeypatch.setattr(module, "cosine_lr", lambda step, *rest: math.inf if step == 10 else cosine(step, *rest))
    with pytest.raises(FloatingPointError, match=r"step 11: loss nan.*rows 77 to 83 .*checkpoint is .*step-00000008"):
        run(config(json.dumps({"data": str(shards), "out": str(tmp_path)})))
    monkeypatch.undo()
    run(config(json.dumps({"data": str(shards), "out": str(tmp_path)})))
    assert len(losses(tmp_path)) == 20 and all(map(math.isfinite, losses(tmp_path)))


def test_data_of_another_tokenizer_is_refused(alone, shards, tmp_path):
    "The checkpoint that a run begins with has a tokenizer, and the data must have been made with it."
    texts = list(topics.values())[30:50]
    write_shards(tmp_path / "s", train_tokenizer(texts, 512, tmp_path / "s" / "tokenizer.model"), texts)
    with pytest.raises(ValueError, match="made with tokenizer"):
        run(config(json.dumps({"data": str(tmp_path / "s"), "out": str(tmp_path), "model": str(alone / "model")})))
    (tmp_path / "s" / "tokenizer.model").write_bytes((shards / "tokenizer.model").read_bytes())
    with pytest.raises(ValueError, match="made with tokenizer"):
        run(config(json.dumps({"data": str(tmp_path / "s"), "out": str(tmp_path)})))


def test_tensorboard_gets_what_the_log_gets(shards, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(config(json.dumps({"data": str(shards), "out": str(tmp_path), "tensorboard": True})))
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.value for event in board.Scalars("loss")] == pytest.approx(losses(tmp_path), rel=1e-6)


def test_the_command_line_is_the_record():
    def command(*words):
        words = [sys.executable, "-m", "llama2lib.pretrain", *words]
        return subprocess.run(words, capture_output=True, text=True, cwd=WORKER.parent.parent)

    shown = command("70B", "--help")
    text = " ".join(shown.stdout.split())
    assert shown.returncode == 0 and "--batch-tokens" in text and "--tp" in text and "default: 0.00015" in text
    wrong = command("book-1M", "--data", "nowhere")
    assert wrong.returncode == 1 and "FileNotFoundError: nowhere" in wrong.stderr and "Traceback" not in wrong.stderr
    missing = command("debug")
    assert missing.returncode == 2 and "book-1M" in missing.stderr


def test_the_rows_of_a_step_are_shared_out_and_none_is_lost(shards):
    "What the loop trains on in 20 steps are the first 140 rows of the data, whatever the micro-batch."
    from llama2lib.shards import Packed

    packed = Packed(Shards(shards), RUN.max_seq_len, RUN.seed)
    seen = []

    class Spy(Llama):
        def forward(self, tokens, *others, **named):
            seen.append(tokens)
            return super().forward(tokens, *others, **named)

    for _ in pretrain(Spy(LLAMA2["debug"]), Shards(shards), RUN):
        pass
    assert torch.equal(torch.cat(seen), packed.rows(0, 140)[:, :-1])


@pytest.mark.parametrize("stage", ["pairs", "rejection", "distillation", "safety"])
def test_a_model_that_only_answers_is_loaded_in_the_devices_numbers(folders, chat, tokenizer, monkeypatch, stage):
    "Whatever its folder holds."
    assert compute_dtype("cuda:1") is torch.bfloat16
    assert {compute_dtype("cpu"), compute_dtype(torch.device("meta"))} == {torch.float32}
    save_checkpoint(chat, folders / "half", tokenizer, dtype=torch.bfloat16)
    (folders / "gender_prompt.json").write_text('{"women": {"page": ["one two"]}}', "utf-8")
    model, prompts, out = str(folders / "half"), folders / "prompts.jsonl", folders / "out"
    scorers = {"helpfulness": str(folders / "helpful"), "safety": str(folders / "safe")}
    module = importlib.import_module(f"llama2lib.{stage}")
    config = {
        "pairs": lambda: replace(module.PAIRS["mini"], models=(model,), prompts=prompts, out=out),
        "rejection": lambda: replace(module.REJECTION["mini"], model=model, prompts=prompts, out=out, **scorers),
        "distillation": lambda: module.DistillationConfig(model, scorers["safety"], prompts, out=out),
        "safety": lambda: module.SafetyConfig(model, bold=folders, out=out),
    }[stage]()
    types = []

    def loaded(*given):
        types.append(load_checkpoint(*given).tok_embeddings.weight.dtype)
        raise RuntimeError("seen")

    monkeypatch.setattr(module, "load_checkpoint", loaded)
    with pytest.raises(RuntimeError, match="seen"):
        module.run(config)
    assert types == [torch.float32]
