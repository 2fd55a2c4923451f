"""One hostile input or fault: what is done, and what must come of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LONGEST_MESSAGE = 1000  # letters
REFUSALS = (ValueError, OSError, FloatingPointError, TypeError, ImportError)


class CannotBeTried(Exception):
    """A case needs what this machine or user does not have: a mount, another user."""


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        group: what is attacked: pictures, archives, lists, cache, checkpoint, resume, run, disk, permissions, signals,
            exits, concurrency, distributed, flags, weights, report, model.
        name: what is done.
        attempt: does it, in an empty folder of its own.
        refusal: what the one-line error that `attempt` must raise has to say (the offending value or file); None where
            it must not raise, as it checks by itself what came of it.
        seconds: how long it may take.
        slow: whether it takes more than two seconds, so that only `make test-all` runs it.
    """

    group: str
    name: str
    attempt: Callable[[Path], object]
    refusal: str | None
    seconds: float = 60
    slow: bool = False


def outcome(case: Case, folder: Path) -> str:
    """What went wrong with a case; "" where it held. `folder` is empty, and lies in a folder of its own.

    Raises:
        CannotBeTried: not here.
    """
    try:
        with _limited(case.seconds):
            case.attempt(folder)
    except _TooSlow:
        return f"took more than {case.seconds} s"
    except CannotBeTried:
        raise
    except REFUSALS as error:
        if case.refusal is None:
            return f"raised {type(error).__name__}: {error}"
        return _unclear(str(error), case.refusal) or _left_behind(folder)
    except BaseException as error:  # whatever a user would see as a traceback
        return f"raised {type(error).__name__}: {error}"
    return "" if case.refusal is None else "was not noticed"


def _unclear(message: str, named: str) -> str:
    if named not in message:
        return f"does not name {named!r}: {message[:LONGEST_MESSAGE]}"
    if len(message) > LONGEST_MESSAGE:
        return f"has a message of {len(message)} letters"
    return "has unprintable letters in its message" if not message.replace("\n", "").isprintable() else ""


def _left_behind(folder: Path) -> str:
    if list(folder.parent.rglob("escaped.txt")):
        return "ran code of the input, or wrote outside"
    data = folder / "data"
    return "left something in data/" if data.exists() and list(data.iterdir()) else ""


class _TooSlow(BaseException):
    """No Exception, so that nothing on the way takes it for one of its own."""


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow

    earlier = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, earlier)
