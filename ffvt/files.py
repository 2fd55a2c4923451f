"""File-system helpers: folders that appear whole or not at all, also when the power fails; digests."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger("ffvt")

BLOCK = 1 << 20  # bytes read at once


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A fresh folder to write into; when the block ends it becomes `target` by one rename, after all of it is on disk.

    An older `target` stays until then; what cannot be deleted of it is left as .<name>.old.1, which is a warning. If
    the block raises, nothing is left behind.
    """
    fresh = target.with_name(f".{target.name}.new")
    clear(fresh)  # of a process that died
    try:
        fresh.mkdir(parents=True)
        yield fresh
        for path in (*fresh.iterdir(), fresh):
            sync(path)
        doomed = set_aside(target, f".{target.name}.old") if os.path.lexists(target) else None
        os.rename(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync(target.parent)
    if doomed is not None:
        try:
            clear(doomed)
        except OSError as error:
            log.warning("%s is left over: %s", doomed, error)


def clear(path: Path) -> None:
    """Deletes a file, a link or a folder, if there is one. What a link leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Deletes a folder, if it is there; at no time does a part of it stand under its name."""
    if os.path.lexists(folder):
        clear(set_aside(folder, f".{folder.name}.old"))


def set_aside(path: Path, name: str) -> Path:
    """Renames a file or folder to <name>.1, <name>.2, ...: the first that is not taken."""
    number = 1
    while os.path.lexists(path.with_name(f"{name}.{number}")):
        number += 1
    aside = path.with_name(f"{name}.{number}")
    path.rename(aside)
    return aside


def point(link: Path, target: Path) -> None:
    """Makes `link` a symbolic link to its sibling `target`, replacing an earlier one in one step."""
    fresh = link.with_name(f".{link.name}.new")
    clear(fresh)
    fresh.symlink_to(target.name)
    if link.exists() and not link.is_symlink():  # a copied run has folders where links were
        set_aside(link, f"copied-{link.name}")
    os.replace(fresh, link)
    sync(link.parent)


def sync(path: Path) -> None:
    """Waits until a file's contents, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: str | Path) -> BinaryIO:
    """Opens a regular file for reading. A pipe, a device or a socket is never waited for, nor touched.

    Raises:
        OSError: it is none, is not there or does not open.
    """
    _check_regular(os.stat(path), path)  # before it is opened: to open a device may do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(descriptor), path)  # it may have been exchanged since
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file", str(path))


def file_digest(path: Path) -> str:
    """The SHA-256 of a regular file's contents, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def write_whole(path: str | Path, content: bytes) -> None:
    """Writes a file that appears whole or not at all; an older one stays until then, also where the disk is full.

    Raises:
        OSError: it cannot be written, or `path` is there and no regular file (a folder, a device).
    """
    path = Path(os.path.realpath(path))  # a link stays, and leads to the new file
    if path.exists() and not path.is_file():
        raise OSError(f"write_whole: path must be a regular file or new; got path={str(path)!r}")
    fresh = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        fresh.write_bytes(content)
        sync(fresh)
        fresh.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        fresh.unlink(missing_ok=True)
