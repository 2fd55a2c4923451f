"""The optimiser, its groups and the learning-rate schedule."""

from __future__ import annotations

import math
import re

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from ffvt.errors import require
from ffvt.train.options import DECAYS, OPTIMIZERS

CURVES = {  # by name of DECAYS: the factor of the peak rate at a fraction of the way to the last step
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
}


def make_optimizer(
    name: str, model: nn.Module, learning_rate: float, weight_decay: float, layer_decay: float = 1.0
) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, as the authors; or AdamW, whose weight decay leaves out vectors.

    layer_decay: the learning rate of each block is that of the block above it times this, the head's is the full one.
    """
    require(name in OPTIMIZERS, "make_optimizer", "optimizer", f"one of {', '.join(OPTIMIZERS)}", name)
    if name == "sgd":
        groups = _groups(model, learning_rate, weight_decay, weight_decay, layer_decay)
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9)
    return torch.optim.AdamW(_groups(model, learning_rate, weight_decay, 0.0, layer_decay), lr=learning_rate)


def _groups(model: nn.Module, rate: float, decay: float, vectors_decay: float, layer_decay: float) -> list[dict]:
    """Parameter groups by learning rate and weight decay, in the order in which their parameters first appear."""
    depth = len(getattr(model, "transformer_blocks", ()))
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()  # timm's
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter in model.named_parameters():
        lr = rate * layer_decay ** (depth + 1 - _layer(name, depth))
        own_decay = decay if parameter.ndim >= 2 and name not in exempt else vectors_decay
        group = groups.setdefault((lr, own_decay), {"params": [], "lr": lr, "weight_decay": own_decay})
        group["params"].append(parameter)
    return list(groups.values())


def _layer(name: str, depth: int) -> int:
    """0 for the embeddings, 1 to depth for the blocks, depth + 1 for norm and head."""
    name = name.removeprefix("vit.")  # of timm
    block = re.match(r"blocks\.(\d+)\.", name)
    if block:
        return int(block[1]) + 1
    if name.startswith("last_block."):
        return depth
    return depth + 1 if name.startswith(("norm.", "fc_norm.", "head", "attn_pool.")) else 0


def make_scheduler(
    optimizer: torch.optim.Optimizer, decay: str, warmup_steps: int, num_steps: int, done: int = 0
) -> LambdaLR:
    """Linear warm-up from 0, then half a cosine or a line down to 0 at `num_steps`.

    Stepped after the optimiser, as the authors do: the first update is made at learning rate 0. `done`: how many steps
    it has made already, in a run that is resumed.
    """
    require(decay in DECAYS, "make_scheduler", "decay_type", f"one of {', '.join(DECAYS)}", decay)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / max(1, warmup_steps)
        progress = min(1.0, (step - warmup_steps) / max(1, num_steps - warmup_steps))
        return CURVES[decay](progress)

    for group in optimizer.param_groups:
        group.setdefault("initial_lr", group["lr"])
    return LambdaLR(optimizer, factor, last_epoch=done - 1)
