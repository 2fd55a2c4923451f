"""SIGTERM, with which a scheduler ends a run: the trainer stops after its step, loading processes ignore it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, instead of ending the process at once; in the main thread only."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    earlier = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, earlier)


def ignore_sigterm(_worker: int) -> None:
    """For loading processes, which a scheduler may signal too: they live as long as the rank that they load for."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
