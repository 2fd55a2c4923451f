"""How the processes of a run find each other: what the environment says of this one, and the store they meet at.

All that waits here looks around several times a second, so that Ctrl-C and SIGTERM are heeded.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ffvt.errors import printable

PAUSE = 0.05  # seconds between two looks
PORTS = 65536


@dataclass(frozen=True)
class Place:
    """This process among those that torchrun, or whoever set the environment, has started.

    Attributes:
        rank, size: its number, of how many.
        local_rank: its number on this machine.
        is_launched: whether the environment speaks of several processes at all, if only of one.
    """

    rank: int
    size: int
    local_rank: int
    is_launched: bool


def place() -> Place:
    """This process's place, from RANK, WORLD_SIZE and LOCAL_RANK.

    Raises:
        ValueError: they are no such numbers, or MASTER_ADDR and MASTER_PORT are not given.
    """
    is_launched = "WORLD_SIZE" in os.environ  # also by a torchrun of one process, which sharding needs
    size = _integer("WORLD_SIZE", "1", 1, None)
    rank = _integer("RANK", "" if size > 1 else "0", 0, size)
    local_rank = _integer("LOCAL_RANK", "0", 0, None)
    if is_launched:
        _integer("MASTER_PORT", "", 1, PORTS)
        if not os.environ.get("MASTER_ADDR"):
            raise ValueError("train: MASTER_ADDR must name the machine of rank 0; got none in the environment")
    return Place(rank, size, local_rank, is_launched)


def _integer(name: str, default: str, low: int, above: int | None) -> int:
    """A number of the environment, at least `low` and below `above`."""
    given = os.environ.get(name, default)
    if given.isascii() and given.isdigit() and low <= int(given[:20]) and (above is None or int(given[:20]) < above):
        return int(given[:20])
    must = f"an integer of at least {low}" if above is None else f"an integer in [{low}, {above})"
    size = f" with WORLD_SIZE={os.environ.get('WORLD_SIZE', '1')}" if name == "RANK" else ""
    got = f"'{printable(given, 80)}'" if given else "none"
    raise ValueError(f"train: {name} must be {must}{size}; got {got} in the environment")


def meet(place: Place, timeout: float) -> dist.Store:
    """The store of a group whose processes are all there.

    torchrun's store outlives its workers, and restarted ones would try addresses of dead ones, so every restart has a
    part of its own. On several nodes each counts its restarts alone, so there the number is of no use, and
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is.

    Args:
        place: of this process.
        timeout: seconds to wait for the others.

    Raises:
        OSError: the store cannot be reached or made, or some process has not come by then.
        ValueError: two processes say that they are the same one.
    """
    deadline = time.monotonic() + timeout
    try:
        store = _connect(place, deadline)
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            store = dist.PrefixStore(f"restart-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        if store.add(f"present/{place.rank}", 1) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
            raise ValueError(
                f"train: RANK must differ among the processes that meet at {_address()}; got RANK={place.rank} twice"
            )
        _wait_for_all(store, place.size, deadline, timeout)
    except dist.DistError as error:
        raise OSError(f"train: the processes must meet at {_address()}; {_first_line(error)}") from error
    return store


def _connect(place: Place, deadline: float) -> dist.Store:
    """The store, made by rank 0 unless torchrun has made it."""
    is_made = place.rank > 0 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    while is_made and not _is_open(deadline):
        time.sleep(PAUSE)
    try:
        return _make_store(place.rank, deadline)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise OSError(f"train: {_address()} must be free for rank 0; another process has this port") from error


def _make_store(rank: int, deadline: float) -> dist.Store:
    """The store, made in a thread: nothing interrupts that, and at a port where no store is it never ends.

    Raises:
        OSError: there is none at the deadline.
    """
    outcome: dict[str, Any] = {}

    def make() -> None:
        timeout = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        try:  # world_size=1: rank 0 does not wait for the others here
            outcome["store"] = next(dist.rendezvous("env://", rank=rank, world_size=1, timeout=timeout))[0]
        except Exception as error:
            outcome["error"] = error

    threading.Thread(target=make, daemon=True).start()
    while not outcome:
        if time.monotonic() > deadline + 2:
            raise OSError(f"train: rank 0 must be at {_address()} (MASTER_ADDR, MASTER_PORT); something else is")
        time.sleep(PAUSE)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["store"]


def _is_open(deadline: float) -> bool:
    """Whether somebody listens where the store is to be.

    Raises:
        OSError: nobody does at the deadline.
    """
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection((host, port), timeout=min(5.0, max(PAUSE, deadline - time.monotonic()))).close()
    except OSError as error:
        if time.monotonic() < deadline:
            return False
        raise OSError(f"train: rank 0 must be at {_address()} (MASTER_ADDR, MASTER_PORT); {error}") from error
    return True


def _wait_for_all(store: dist.Store, size: int, deadline: float, timeout: float) -> None:
    while not store.check([f"present/{rank}" for rank in range(size)]):
        if time.monotonic() > deadline:
            missing = [rank for rank in range(size) if not store.check([f"present/{rank}"])]
            names = ", ".join(str(rank) for rank in missing[:5]) + ", ..." * (len(missing) > 5)
            raise OSError(
                f"train: all {size} processes must come to {_address()} within rendezvous_timeout={timeout:g} s; "
                f"missing: rank {names}"
            )
        time.sleep(PAUSE)


def _address() -> str:
    return printable(f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}", 80)


def _first_line(error: Exception) -> str:
    return printable(str(error).split("\n", 1)[0], 300)
