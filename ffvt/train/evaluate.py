"""Exact evaluation: every image counted once, at any number of ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ffvt.data.transforms import normalize
from ffvt.train.distributed import World

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Score:
    """What an evaluation found: images counted, shares right at first and within the first five, mean loss."""

    count: int
    top1: float
    top5: float
    loss: float


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """torch.autocast in bf16 or fp16; nothing for fp32."""
    dtype = AUTOCAST_DTYPES.get(precision)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
        yield


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Dataset, world: World, batch_size: int, precision: str = "fp32", workers: int = 0
) -> Score:
    """Evaluates `model` on (uint8 image, label) samples; each rank takes every world-size-th image.

    Returns the same Score on every rank. Raises ValueError on an empty data set.
    """
    if len(images) == 0:
        raise ValueError("evaluate: the data set must have images; got 0")
    shard = Subset(images, range(world.rank, len(images), world.size))
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)  # count, top-1, top-5, loss
    was_training = model.training
    model.eval()
    own = torch.Generator()  # the loader must not draw from the generator that makes training's dropout masks
    for batch, labels in DataLoader(shard, batch_size, num_workers=workers, generator=own):
        with autocast(world.device, precision):
            logits = model(normalize(batch.to(world.device))).float()
        sums += _sums(logits, labels.to(world.device))
    model.train(was_training)
    count, top1, top5, loss = world.sum(sums).tolist()
    return Score(int(count), top1 / count, top5 / count, loss / count)


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    first = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([labels.new_tensor(len(labels)), first[:, 0].sum(), first.sum(), loss.double()]).double()
