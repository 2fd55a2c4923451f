"""How a command ends: its exit status, and the one line that says why."""

from __future__ import annotations

import argparse
import errno
import os
import re
import select
import sys
from collections.abc import Callable
from typing import NoReturn

from ffvt.errors import printable
from ffvt.train.signals import Terminated, sigterm_raises

OK, ERROR, USAGE = 0, 1, 2
PIPE_CLOSED, INTERRUPTED, TERMINATED = 141, 130, 143  # as a shell counts a death by SIGPIPE, SIGINT and SIGTERM

LONGEST = 480  # characters of a message
# What bad input, missing extras, a full disk or a diverged run raise; anything else is our mistake and shows its trace.
USAGE_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)
REFUSED_TYPE = r"\S+: .* must .*; got "  # how this package says that a value has the wrong type
# Of all other errors those that a machine's limits raise: what they say, in other words and with what helps.
LIMITS = (
    (
        r"shared memory|/torch_\d+|Bus error",
        "no shared memory is left for the loading processes: --workers 0 needs none, and so does a larger /dev/shm "
        "(docker run --shm-size 2g)",
    ),
    (
        r"OutOfMemory|out of memory|MemoryError|[Cc](an't|annot) allocate memory|not enough memory",
        "out of memory: a smaller batch, --gradient_accumulation_steps, --gradient_checkpointing or --precision bf16 "
        "needs less, and ffvt plan tells what fits",
    ),
    (r"Too many open files|items of ancdata", "too many open files: raise the limit (ulimit -n), or use --workers 0"),
    (
        r"(DataLoader worker|loading process).* (killed|exited)",
        "a loading process died, perhaps for want of memory or of /dev/shm: --workers 0 does without",
    ),
    (
        r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|Socket closed|ProcessGroup|remote process",
        "another rank has ended; its own message says why",
    ),
)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """Ends with status 2."""
        self.exit(USAGE, f"{self.prog}: {printable(message, LONGEST)} (see {self.prog} --help)\n")


def run_to_exit(command: Callable[[], int | None], name: str) -> int:
    """Runs a command and gives its exit status, after one line on standard error where it did not end well.

    Args:
        command: gives the status, None for 0.
        name: of the program and the command, for that line.

    Raises:
        Exception: what `command` raised, where that is a mistake of ours.
    """
    rank = os.environ.get("RANK", "0")  # the processes that torchrun starts beside the main one stay silent
    try:
        with sigterm_raises():
            status = command() or OK
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as interruption:
        is_term = isinstance(interruption, Terminated)
        if rank == "0":
            print(f"{name}: {'terminated' if is_term else 'interrupted'}", file=sys.stderr)
        return TERMINATED if is_term else INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_listens():
            return PIPE_CLOSED
        explanation = explain(error)
        if explanation is None:
            raise
        explanation = explanation.removeprefix(f"{name.rpartition(' ')[2]}: ")  # it is said before that
        of_rank = getattr(error, "of_rank", None)  # set where every rank raises it
        if rank == "0" or of_rank is None:
            origin = rank if of_rank is None else str(of_rank)
            print(f"{name}{'' if origin == '0' else f', rank {printable(origin, 20)}'}: {explanation}", file=sys.stderr)
        return ERROR


def explain(error: Exception) -> str | None:
    """What an error says to a user, in one line; None for a mistake of ours."""
    said = f"{type(error).__name__}: {error}"
    is_refused = isinstance(error, TypeError) and re.match(REFUSED_TYPE, str(error)) is not None
    is_usage = is_refused or isinstance(error, USAGE_ERRORS)
    if not is_usage or getattr(error, "errno", None) in (errno.EMFILE, errno.ENOMEM):
        for pattern, help in LIMITS:
            if re.search(pattern, said):
                return f"{help}; got {printable(said.strip().splitlines()[0], 200)}"
    return printable(str(error) or said, LONGEST) if is_usage else None


def _nobody_listens() -> bool:
    """Whether it is standard output that was closed, as `| head` does; it is then let go, so that nothing complains."""
    try:
        sys.stdout.flush()  # what is in its buffer raises again
        poll = select.poll()  # and where that is empty, as after a flush that failed, the pipe itself tells
        poll.register(sys.stdout.fileno(), 0)
        is_closed = any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except BrokenPipeError:
        is_closed = True
    if is_closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_closed
