"""Commands in processes of their own, with a deadline: what does not end, or leaves a process behind, is a failure.

They are forked from a process that has imported PyTorch, so that one costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["ffvt.train.engine", "ffvt.inference", "ffvt.cli", "tests.helpers"])

MARK = "FFVT_TEST_PROCESS"  # in the environment of a command and of all that it starts
DEADLINE = 60.0  # seconds


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (-n: died of signal n), what it wrote, and how long it took after the event."""

    status: int
    output: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        """What it wrote, without blank lines and what PyTorch's own C++ code and warnings say."""
        return [line for line in self.output.splitlines() if line.strip() and not line.startswith("[W")]


class Command:
    """`ffvt ARGUMENTS`, running.

    Args:
        arguments: of the command line; those of a program of its own, such as torchrun, start with `sys.executable`.
        folder: for its output, and its working directory.
        environment: variables to set beside the own ones.
        before: called in the process before the command, to take something from it or to break something.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str] = {},
        before: Callable[..., object] | None = None,
        given: tuple = (),
    ) -> None:
        self.mark = uuid.uuid4().hex
        self.output = folder / f"output-{self.mark[:8]}.txt"
        self.output.touch()
        environment = {**environment, MARK: self.mark}
        self.process = CONTEXT.Process(
            target=_run, args=(list(map(str, arguments)), self.output, folder, environment, before, given)
        )
        self.process.start()

    def wait_for(self, happened: Callable[[], object]) -> None:
        """Waits for something while the command runs.

        Raises:
            AssertionError: the command ends, or the deadline comes, before that.
        """
        deadline = time.monotonic() + DEADLINE
        while not happened():
            if not self.process.is_alive() or time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"waited in vain; it said: {self.output.read_text()[-2000:]}")
            time.sleep(0.005)

    def processes(self) -> list[int]:
        """The numbers of all of its processes that live."""
        return marked(self.mark, self.process.pid)

    def signal(self, number: int, group: bool = False) -> None:
        """Sends a signal to the command, or as a terminal does, to all of its processes."""
        for pid in self.processes() if group else [self.process.pid]:
            os.kill(pid, number)

    def end(self, seconds: float = DEADLINE) -> Ended:
        """Waits for the end.

        Raises:
            AssertionError: it does not come within `seconds`, or leaves a process.
        """
        start = time.monotonic()
        self.process.join(seconds)
        took = time.monotonic() - start
        hangs = self.process.is_alive()
        left = self.processes()
        while left and not hangs and time.monotonic() < start + took + 2:
            time.sleep(0.05)
            left = self.processes()
        self.kill()
        said = self.output.read_text(errors="replace")
        if hangs or left:
            raise AssertionError(f"{'hangs' if hangs else f'leaves {left}'} after {took:.0f} s; said: {said[-2000:]}")
        return Ended(self.process.exitcode, said, took)

    def kill(self) -> None:
        """Ends it and all that it started."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()


def _run(
    arguments: list[str],
    output: Path,
    folder: Path,
    environment: dict[str, str],
    before: Callable[..., object] | None,
    given: tuple,
) -> None:
    os.setsid()
    os.environ.update(environment)
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if arguments[0] == sys.executable:
        os.execv(sys.executable, arguments)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    logging.getLogger().handlers.clear()
    multiprocessing.set_start_method("fork", force=True)  # the default for a command; here it would be the server
    torch.set_num_threads(1)
    if before is not None:
        before(*given)
    from ffvt.cli import main

    sys.exit(main(arguments))


def marked(mark: str, session: int) -> list[int]:
    """The processes of a command: those of its session, and those with its mark in their environment; no zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, of_session = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            is_own = int(of_session) == session or f"{MARK}={mark}".encode() in (folder / "environ").read_bytes()
            if is_own and state != "Z":
                found.append(int(folder.name))
        except (OSError, ValueError):
            continue
    return found


def run(arguments: Sequence[str], folder: Path, seconds: float = DEADLINE, **how: Any) -> Ended:
    """Runs `ffvt ARGUMENTS` to its end. Raises AssertionError where it hangs or leaves a process."""
    return Command(arguments, folder, **how).end(seconds)


def ranks(
    arguments: Sequence[Sequence[str]], folder: Path, changes: Sequence[Mapping[str, str]] = (), **how: Any
) -> list[Command]:
    """The same as several ranks, with the arguments of each, on a free port; `changes` of their environments."""
    port, size = free_port(), len(arguments)
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        Command(
            given,
            folder,
            {**common, "RANK": str(rank), "LOCAL_RANK": str(rank), **(changes[rank] if changes else {})},
            **how,
        )
        for rank, given in enumerate(arguments)
    ]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
