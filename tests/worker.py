"""One process of a test: runs the check named on the command line; under torchrun, on every rank.

python tests/worker.py CHECK ARGUMENT …
"""

import json
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from llama2lib import distributed, pretrain
from llama2lib.checkpoint import copy_weights, load_checkpoint, local_block, read_tensors, save_checkpoint, save_meta
from llama2lib.distributed import Parallel
from llama2lib.model import LLAMA2, Llama
from llama2lib.preferences import read_preferences
from llama2lib.reward import RewardModel, score, score_pairs
from llama2lib.tokenizer import Tokenizer

RUN = pretrain.PretrainConfig(
    model="debug",
    lr=3e-3,
    warmup_steps=4,
    batch_tokens=7 * 64,
    tokens=20 * 7 * 64,
    max_seq_len=64,
    micro_batch=2,
    save_every=8,
)


def config(arguments: str) -> pretrain.PretrainConfig:
    "RUN with fields from JSON."
    fields = json.loads(arguments)
    fields |= {name: Path(fields[name]) for name in ("data", "out") if name in fields}
    return replace(RUN, **fields | {"parallel": Parallel(**fields.get("parallel", {}))})


def train(arguments: str, die_after: str = "", how: str = "kill"):
    "A run; on its first attempt it dies after a step, by SIGKILL or an exception."
    if die_after and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        loop = pretrain.pretrain

        def dying(*args, **options):
            for step in loop(*args, **options):
                yield step
                if step.step + 1 == int(die_after):
                    if how == "kill":
                        os.kill(os.getpid(), signal.SIGKILL)
                    raise RuntimeError("told to die")

        pretrain.pretrain = dying
    pretrain.run(config(arguments))


def mixed(_):
    """bfloat16 passes over sharded float32 weights, far into the context: logits equal a plain bfloat16 model's.

    The gradients' mean over ranks is taken in float32.
    """
    with distributed.processes() as device:
        shape = replace(LLAMA2["debug"], max_seq_len=2048)
        model, plain = Llama(shape), Llama(shape)
        for m in (model, plain):
            distributed.init_weights(m, seed=3)
        mesh = distributed.make_mesh(Parallel(), device.type)
        distributed.parallelize(model, mesh, Parallel(), torch.bfloat16)
        tokens = torch.arange(1500)[None] * 7 % 512
        with torch.no_grad():
            logits, expected = model(tokens), plain.bfloat16()(tokens)
        assert torch.equal(logits, expected), (logits - expected).abs().max()
        (logits := model((tokens + dist.get_rank()) % 512)).square().mean().backward()
        gradient = model.layers[0].attention.wq.weight.grad.to_local()
        assert gradient.dtype == torch.float32 == model.norm.weight.dtype
        assert not torch.equal(gradient, gradient.bfloat16().float()), "the gradients' mean was rounded to bfloat16"
        assert logits.dtype == torch.float32


class Scatters(TorchDispatchMode):
    "Counts the reduce-scatters of the block."

    count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += "reduce_scatter" in str(op)
        return op(*args, **(kwargs or {}))


def reductions(_):
    "Gradients cross the network once a step, however many micro-batches it has, unless asked to after each."
    counted = {}
    with distributed.processes() as device:
        for reduce in ("step", "micro_batch"):
            for passes in (1, 4):
                model = Llama(LLAMA2["debug"])
                distributed.init_weights(model, seed=3)
                distributed.parallelize(model, distributed.make_mesh(Parallel(), device.type), Parallel())
                optimizer = pretrain.adamw(model, 1e-3)
                parts = list(pretrain.micro_batches(torch.arange(4 * 33).view(4, 33), passes))
                with Scatters() as traffic:
                    pretrain.train_step(model, optimizer, parts, 4 * 32 * 2, 1.0, reduce)
                counted[reduce, passes] = traffic.count
    blocks = LLAMA2["debug"].n_layers + 1
    assert counted == {
        ("step", 1): blocks, ("step", 4): blocks, ("micro_batch", 1): blocks, ("micro_batch", 4): 4 * blocks,
    }, counted  # fmt: skip


def fails(_):
    "One rank fails while the other waits for it; taking the group down takes both, as with NCCL."
    dist.destroy_process_group = lambda: time.sleep(90)
    with distributed.processes():
        if dist.get_rank() == 1:
            raise RuntimeError("told to die")
        dist.barrier()


def background(out: str):
    "Saves in the background, one behind the other: all of them succeed, and the last is what was saved last."
    with distributed.processes() as device:
        model = Llama(LLAMA2["debug"])
        distributed.parallelize(model, distributed.make_mesh(Parallel(), device.type), Parallel())
        distributed.init_weights(model, seed=3)
        tensors = distributed.training_tensors(model, pretrain.adamw(model, 1e-3))
        states = distributed.StateFolder(Path(out), in_background=True)
        for step in range(1, 21):
            tensors["model.norm.weight"].fill_(step)
            states.save(step, tensors, {})
        states.wait()
        tensors["model.norm.weight"].fill_(0)
        assert states.load(tensors) == {"step": 20} and tensors["model.norm.weight"].full_tensor().eq(20).all()


def anonymous_bytes() -> int:
    "Memory of this process that no file backs."
    return int(next(s for s in open("/proc/self/status") if s.startswith("RssAnon")).split()[1]) * 1024


class Peak:
    "The most anonymous memory while the block ran, over what there was at its begin."

    def __enter__(self):
        self.begin = self.peak = anonymous_bytes()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while not self.done.is_set():
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.bytes = self.peak - self.begin


def folders(arguments: str):
    "Load a checkpoint into a sharded model and save it again in both layouts; a rank never has memory for the whole."
    source, out, tp = json.loads(arguments)
    with distributed.processes() as device:
        parallel = Parallel(tp=tp)
        mesh = distributed.make_mesh(parallel, device.type)
        with Peak() as loading:
            shape, _, pieces = read_tensors(source)
            with torch.device("meta"):
                model = Llama(shape)
            distributed.parallelize(model, mesh, parallel).to_empty(device=device)
            copy_weights(model, pieces)
        size = 4 * shape.num_params
        assert loading.bytes < 0.75 * size, f"loading took {loading.bytes / size:.2f} of the model"
        with Peak() as saving:
            save_checkpoint(model, f"{out}/hf", shard_bytes=size // 10)
            save_meta(model, f"{out}/meta", shards=8)
        assert saving.bytes < 0.5 * size, f"saving took {saving.bytes / size:.2f} of the model"
        if dist.get_rank() == 0:
            print("loading", loading.bytes / size, "saving", saving.bytes / size)
        expected = dict(load_checkpoint(source).named_parameters())
        for name, parameter in model.named_parameters():
            local, block = local_block(parameter)
            assert torch.equal(local, expected[name][block]), name
            assert torch.equal(parameter.full_tensor(), expected[name]), name


def scored(folder: str):
    "Scores of a divided model, of single answers and of pairs, are a whole one's before and after its weights change."
    whole, words = load_checkpoint(f"{folder}/model", kind=RewardModel), Tokenizer(f"{folder}/model")
    rows = read_preferences(f"{folder}/rows.jsonl")
    dialogs = [[*row["messages"], {"role": "assistant", "content": row["chosen"]}] for row in rows]
    with distributed.processes() as device:
        for look, given in ((score, dialogs), (score_pairs, rows)):
            divided = load_checkpoint(f"{folder}/model", kind=RewardModel)
            distributed.parallelize(divided, distributed.make_mesh(Parallel(), device.type), Parallel())
            weights = [*whole.parameters(), *divided.parameters()]  # as an optimiser holds them
            before = look(whole, words, given)
            assert np.allclose(look(divided, words, given), before, atol=1e-4)
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(1.1)
            after = look(whole, words, given)
            assert not np.allclose(after, before, atol=1e-2)
            assert np.allclose(look(divided, words, given), after, atol=1e-4)
            whole = load_checkpoint(f"{folder}/model", kind=RewardModel)


def full_disk(out: str):
    "Rank 0 cannot write: every rank hears of it, and the old folder stays."
    with distributed.processes() as device:
        model = Llama(LLAMA2["debug"])
        distributed.parallelize(model, distributed.make_mesh(Parallel(), device.type), Parallel())
        save_checkpoint(model, out)
        import llama2lib.checkpoint as checkpoint

        def no_space(*_, **__):
            raise OSError(28, "No space left on device")

        checkpoint.save_file = no_space
        try:
            save_checkpoint(model, out)
        except (OSError, RuntimeError) as error:
            assert "No space left" in str(error)
        else:
            raise AssertionError("the failure was not noticed")
        assert load_checkpoint(out).config == model.config


def no_memory(out: str):
    "Rank 0 has no memory for a gathered tensor, so it cannot go on gathering: it ends, and does not wait."
    import llama2lib.checkpoint as checkpoint

    with distributed.processes() as device:
        model = Llama(LLAMA2["debug"])
        distributed.parallelize(model, distributed.make_mesh(Parallel(), device.type), Parallel())
        gathered, calls = checkpoint._gathered, []

        def failing(*args, keep):
            calls.append(gathered(*args, keep=keep))
            if keep and len(calls) == 3:
                raise MemoryError("told to have none")
            return calls[-1]

        checkpoint._gathered = failing
        save_checkpoint(model, out)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
