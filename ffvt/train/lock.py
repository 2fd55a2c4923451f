"""One writer per run: a lock that keeps out other processes, and other threads of this one."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ffvt.errors import printable

_NO_FILE = (errno.ELOOP, errno.ENXIO, errno.EISDIR)  # a link, a socket, a folder
_held: set[Path] = set()  # by this process; the system's lock does not keep threads apart
_guard = threading.Lock()


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Locks a folder by the file .<name>.lock beside it, which is empty and stays.

    The system frees the lock of a process that dies.

    Raises:
        ValueError: another one has the lock, or what stands in its place is no file. OSError: it cannot be opened.
    """
    path = Path(os.path.realpath(folder.parent)) / f".{folder.name}.lock"
    with _guard:
        if path in _held:
            raise ValueError(f"train: {_shown(path)} must be free; another thread of this process writes this run")
        _held.add(path)
    try:
        with _opened(path) as descriptor:
            _lock(descriptor, path)
            yield
    finally:
        _held.discard(path)


def _lock(descriptor: int, path: Path) -> None:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not passed on to loading processes
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise ValueError(f"train: {_shown(path)} must be free; another process writes this run") from error
        raise OSError(error.errno, f"train: {_shown(path)} cannot be locked: {error.strerror}") from error


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The lock's file, made if missing; it is neither emptied nor a link's target."""
    refused = f"train: {_shown(path)} must be a file or absent, as it is the run's lock; got something else there"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
        raise ValueError(refused) from error
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(refused)
        yield descriptor
    finally:
        os.close(descriptor)


def _shown(path: Path) -> str:
    return printable(str(path))
