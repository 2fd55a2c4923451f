"""The process group: who am I, and sums over all ranks. One process without a launcher is a world of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process among all: rank of `size`, and the device it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over the ranks, where there are several."""
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Joins the process group that torchrun's environment describes, and leaves it at the end.

    device: "auto" (a GPU if there is one), "cpu" (gloo) or "cuda" (nccl).
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that is present; got device='cuda' without a GPU")
    own = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if size > 1:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield World(rank, size, own)
    finally:
        if size > 1:
            dist.destroy_process_group()
