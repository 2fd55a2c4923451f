"""The optimiser and the learning-rate schedule of the authors' recipes."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

OPTIMIZERS = ("sgd", "adamw")
DECAYS = ("cosine", "linear")


def make_optimizer(
    name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, as the authors; or AdamW, whose decay leaves out vectors (biases, norms, LayerScale)."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=weight_decay)
    if name == "adamw":
        parameters = list(parameters)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=learning_rate)
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}; got optimizer={name!r}")


def make_scheduler(optimizer: torch.optim.Optimizer, decay: str, warmup_steps: int, num_steps: int) -> LambdaLR:
    """Linear warm-up from 0, then half a cosine or a line down to 0 at `num_steps`.

    Stepped after the optimiser, as the authors do: the first update is made at learning rate 0.
    """
    if decay not in DECAYS:
        raise ValueError(f"decay_type must be one of {', '.join(DECAYS)}; got decay_type={decay!r}")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * progress)) if decay == "cosine" else 1 - progress

    return LambdaLR(optimizer, factor)
