"""Signals: a run stops after its step, other commands stop at once, loading processes live as long as their trainer.

Ctrl-C (SIGINT) and SIGTERM, with which a scheduler ends a job, mean the same; only the exit status differs.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line heeds signals before it imports torch
    from ffvt.train.distributed import World

SECOND = 1.0  # seconds after which another signal is a second one: launchers and terminals send the first one twice
PR_SET_PDEATHSIG = 1  # prctl(2): the signal that a process gets when its parent dies


class Terminated(KeyboardInterrupt):
    """SIGTERM, as the exception that Ctrl-C is."""


class Stopped(Exception):
    """A run was asked to stop, and stops here, on all ranks."""


def interruption(number: int) -> KeyboardInterrupt:
    """A signal as an exception."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `Terminated` inside, so that what is half done is cleaned up; in the main thread only."""

    def terminate(number: int, _frame: FrameType | None) -> None:
        raise interruption(number)

    with _handling(terminate, signal.SIGTERM):
        yield


class StopRequest:
    """What stops a run: the first signal that it got, or None."""

    signal: signal.Signals | None = None
    since: float

    def __bool__(self) -> bool:
        return self.signal is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Notes the first signal; a second one ends everything at once."""
        if self.signal is None:
            self.signal, self.since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.since > SECOND:
            raise interruption(number)

    def agreed(self, world: World) -> signal.Signals:
        """What stopped the run, the same on every rank: SIGTERM if any of them got that."""
        return signal.SIGTERM if world.any(self.signal == signal.SIGTERM)[0] else signal.SIGINT


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Ctrl-C and SIGTERM are noted instead of ending the process at once; in the main thread only."""
    request = StopRequest()
    with _handling(request.handle, signal.SIGINT, signal.SIGTERM):
        yield request


@contextmanager
def _handling(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    earlier = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in numbers:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as in a background job of a shell
                    earlier[number] = signal.signal(number, handler)
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)


def serve_parent(_worker: int) -> None:
    """Makes this a loading process that lives as long as the process it loads for.

    A terminal and a scheduler signal all processes of a job: these signals are its parent's to heed. It ends when the
    parent ends it, or dies, however that may be. Outside Linux, SIGTERM ends it whoever sends it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()  # whose child may be a server that forks
    if sys.platform != "linux":
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(parent.pid,), daemon=True).start()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if not parent.is_alive():  # it died before that
        os._exit(1)


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
