"""The process group: who am I, how gradients meet, and sums over all ranks. One process is a world of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from ffvt.errors import portable
from ffvt.train.rendezvous import meet, place

T = TypeVar("T")

RENDEZVOUS_TIMEOUT = 300.0  # seconds


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
            for method in ("forward_with_selection",):
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

    def tensors(self, own: Tensor) -> list[Tensor]:
        """The tensors of all ranks, of one shape and dtype, on every rank; without gradient."""
        if self.size == 1:
            return [own]
        found = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(self.size)]
        dist.all_gather(found, own.contiguous())
        return found

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns, or raises, on the main rank, on every rank."""
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except Exception as error:
                outcome[1] = error if self.size == 1 else portable(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        value, error = outcome
        if error is not None:
            error.of_rank = 0
            raise error
        return value

    def on_all(self, function: Callable[[], T]) -> T:
        """What `function` returns on this rank. Where it raises on any, its error is raised on every rank.

        The error has an attribute `of_rank`: the first rank on which it was raised.
        """
        if self.size == 1:
            return function()
        value, own = None, None
        try:
            value = function()
        except Exception as error:
            own = error
        if not self.any(own is not None)[0]:
            return value
        errors = self.gather(own and portable(own))
        rank = next(rank for rank, error in enumerate(errors) if error is not None)
        error = own if rank == self.rank else errors[rank]
        error.of_rank = rank
        raise error


@contextmanager
def join_world(device: str = "auto", shard: bool = False, timeout: float = RENDEZVOUS_TIMEOUT) -> Iterator[World]:
    """Joins the process group that torchrun's environment describes, and leaves it at the end.

    Args:
        device: "auto" (a GPU if there is one), "cpu" (gloo) or "cuda" (nccl, and gloo for what is on the CPU).
        shard: whether models will be sharded, which takes a process group, if only of one process.
        timeout: seconds to wait for the other processes.

    Raises:
        ValueError: the device is not there, the environment makes no sense, or `shard` without torchrun.
        OSError: the other processes are not there in time.
    """
    here = place()
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("device must be one that is present; got device='cuda' without a GPU")
    if kind == "cuda" and here.local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"train: LOCAL_RANK must be that of one of {count} GPUs; got LOCAL_RANK={here.local_rank}")
    own = torch.device(kind, here.local_rank) if kind == "cuda" else torch.device("cpu")
    if own.type == "cuda":
        torch.cuda.set_device(own)
    if shard and not here.is_launched:
        raise ValueError("train: fsdp needs torchrun, with one process or more; got fsdp=True without it")
    if here.is_launched:
        backend = "cpu:gloo,cuda:nccl" if own.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=meet(here, timeout), rank=here.rank, world_size=here.size)
    try:
        yield World(here.rank, here.size, own)
        if here.is_launched:
            dist.barrier()  # a rank that leaves while another still talks to it can bring that one down
    finally:
        if here.is_launched:
            dist.destroy_process_group()


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
