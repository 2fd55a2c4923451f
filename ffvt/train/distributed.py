"""The process group: who am I, how gradients meet, and sums over all ranks. One process is a world of one."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all: rank of `size`, and the device it works on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def wrap(self, model: nn.Module, shard: bool = False) -> nn.Module:
        """The model with gradients averaged over the ranks; with `shard` its parameters are divided among them too.

        A sharded model is changed in place (FSDP2): each block is gathered when it runs.
        """
        if shard:
            for block in model.transformer_blocks:
                fully_shard(block)
            fully_shard(model)
            for method in ("forward_with_selection", "forward_features", "forward_features_with_selection"):
                if hasattr(model, method):
                    register_fsdp_forward_method(model, method)
            return model
        if self.size == 1:
            return model
        devices = [self.device] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank. It runs on the CPU, so it does not wait for a GPU."""
        if self.size == 1:
            return flags
        votes = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return tuple(bool(vote) for vote in votes)

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns, or raises, on the main rank, on every rank."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error if self.size == 1 else _picklable(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        value, error = outcome
        if error is not None:
            error.raised_on_main = True
            raise error
        return value


def _picklable(error: Exception) -> Exception:
    """The error itself, or what it says where it cannot be sent to other ranks."""
    try:
        pickle.dumps(error)
    except Exception:  # whatever its parts raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@contextmanager
def join_world(device: str = "auto", shard: bool = False) -> Iterator[World]:
    """Joins the process group that torchrun's environment describes, and leaves it at the end.

    Args:
        device: "auto" (a GPU if there is one), "cpu" (gloo) or "cuda" (nccl, and gloo for what is on the CPU).
        shard: whether models will be sharded, which takes a process group, if only of one process.

    Raises:
        ValueError: the device is not there, or `shard` without torchrun.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that is present; got device='cuda' without a GPU")
    own = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))) if kind == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    is_launched = "WORLD_SIZE" in os.environ  # also by a torchrun of one process, which sharding needs
    if shard and not is_launched:
        raise ValueError("train: fsdp needs torchrun, with one process or more; got fsdp=True without it")
    if is_launched:
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=_store(), rank=rank, world_size=size)
    try:
        yield World(rank, size, own)
        if is_launched:
            dist.barrier()  # a rank that leaves while another still talks to it can bring that one down
    finally:
        if is_launched:
            dist.destroy_process_group()


def _store() -> dist.Store:
    """Where the processes find each other: what torchrun offers, with a part of its own for every restart.

    torchrun's store outlives its workers, and restarted ones would try addresses of dead ones. On several nodes each
    counts its restarts alone, so there the number is of no use, and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        return store
    return dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextmanager
def gradients_stay_local(model: nn.Module) -> Iterator[None]:
    """Backward passes inside only add to this rank's gradients, as all but the last part of a batch should."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
        return
    with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
        yield
