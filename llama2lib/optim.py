"""Generated from chapters/02_pretraining.py by chapters/export.py; edit the chapter."""

__all__ = [
    "cosine_lr",
    "adamw",
    "set_lr",
]


# ---------- chapters/02_pretraining.py · The optimiser

import math

import torch
from torch import nn


def cosine_lr(step: int, peak: float, warmup_steps: int, total_steps: int, final: float = 0.1) -> float:
    """Learning rate of 0-based `step` (section 2.2): linear to `peak`, then a cosine to `final`·peak at the last step.

    Step warmup_steps - 1 is the first at the peak, step total_steps - 1 the last of all.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps + 1) / max(1, total_steps - warmup_steps)
    return peak * (final + (1 - final) * (1 + math.cos(math.pi * min(progress, 1))) / 2)


def adamw(
    model: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-5,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    "AdamW with the paper's constants (section 2.2); vectors, that is the norms' weights, are not decayed (ours)."
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps)


def set_lr(optimizer: torch.optim.Optimizer, lr: float):
    "Let all parameters move at this learning rate from now on."
    for group in optimizer.param_groups:
        group["lr"] = lr
