"""Generated from chapters/05_rlhf.py by chapters/export.py; edit the chapter."""

__all__ = [
    "PairsConfig",
    "PAIRS",
    "run",
    "cli",
]


# ---------- chapters/05_rlhf.py · Pairs

import json
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from llama2lib.checkpoint import load_checkpoint
from llama2lib.corpus import records
from llama2lib.distributed import compute_dtype, processes
from llama2lib.preferences import sampler, two_answers
from llama2lib.pretrain import command
from llama2lib.recipes import write_atomic
from llama2lib.rollout import in_chunks, read_prompts, record_settings, untagged
from llama2lib.tokenizer import Tokenizer


@dataclass(frozen=True)
class PairsConfig:
    "Two answers to every prompt, to be compared (section 3.2.1). ValueError for numbers out of range."

    models: tuple[str, ...] = ("runs/sft/model",)  # folders of the policy's variants, of which two answer; or of one
    temperatures: tuple[float, ...] = (0.7, 1.0, 1.2)  # of which one is drawn for each answer
    max_new_tokens: int = 1024  # an answer that does not end within them is not shown
    seed: int = 0  # of the answers

    prompts: Path = Path("prompts.jsonl")  # conversations that end with the user, and is_safety
    out: Path = Path("runs/pairs")  # items.jsonl, and chunks of the work
    chunk: int = 256  # prompts between saves

    def __post_init__(self):
        if not self.models or not self.temperatures or min(self.temperatures) < 0:
            found = f"models {self.models}, temperatures {self.temperatures}"
            raise ValueError(f"{found}: expected one or more, and no temperature below 0")
        if self.max_new_tokens < 1 or self.chunk < 1:
            raise ValueError(f"max_new_tokens {self.max_new_tokens}, chunk {self.chunk}: expected at least 1")


PAIRS = {"paper": PairsConfig(), "mini": PairsConfig(max_new_tokens=64)}


def run(config: PairsConfig) -> Path:
    """Answer every prompt twice, as `config` says; returns the path of items.jsonl.

    Pairs of which an answer did not end, or is empty, or is like the other, are left out, and a line says how many.
    Each rank holds all the variants whole: they must fit on one GPU, which 70B in bfloat16 does not.
    ValueError with file and line for prompts that are none, and for a folder with chunks of another configuration.
    """
    with processes() as device:
        prompts = read_prompts(config.prompts, tagged=False)
        record_settings(config.out, config, prompts=[config.prompts])
        variants = []
        for folder in config.models:
            model, tokenizer = load_checkpoint(folder, device, compute_dtype(device)), Tokenizer(folder)
            variants.append([sampler(model, tokenizer, at, config.max_new_tokens) for at in config.temperatures])

        def work(these, seeds, path):
            lines = []
            pairs = two_answers(variants, [prompt.messages for prompt in these], seeds[0])
            for prompt, replies in zip(these, pairs, strict=True):
                texts, whole = zip(*(untagged(reply.text.strip()) for reply in replies), strict=True)
                if all(reply.finished for reply in replies) and all(whole) and all(texts) and texts[0] != texts[1]:
                    lines.append(prompt._asdict() | {"answers": texts})
            write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

        parts = in_chunks(config.out / "chunks", prompts, config.chunk, config.seed, work)
        if not dist.is_initialized() or dist.get_rank() == 0:
            write_atomic(config.out / "items.jsonl", "".join(part.read_text("utf-8") for part in parts))
            count = sum(1 for _ in records(config.out / "items.jsonl"))
            print(f"{count:,} pairs of answers to {len(prompts):,} prompts; the others did not end, or were alike")
        if dist.is_initialized():
            dist.barrier()
    return config.out / "items.jsonl"


@record
def cli(prog: str = "python -m llama2lib.pairs"):
    "python -m llama2lib.pairs RECIPE [options]: two answers to every prompt; under torchrun, on all its ranks."
    about = {name: f"up to {config.max_new_tokens} tokens an answer" for name, config in PAIRS.items()}
    command(run, {name: (about[name], config) for name, config in PAIRS.items()}, prog)


if __name__ == "__main__":
    cli()
