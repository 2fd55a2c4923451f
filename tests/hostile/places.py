"""Places where writing fails: small disks, what cannot be changed, folders of other users."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.hostile.case import CannotBeTried

NOBODY = 65534


@contextmanager
def disk(folder: Path, size: int, options: str = "") -> Iterator[Path]:
    """A file system of `size` bytes in memory."""
    place = folder / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise CannotBeTried("a tmpfs cannot be mounted by this user")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int = 0) -> Path:
    """Fills a disk but for `leave` bytes; the file that does it."""
    filler = place / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError:
            pass  # full
    os.truncate(filler, max(0, filler.stat().st_size - leave))
    return filler


@contextmanager
def immutable(*paths: Path) -> Iterator[None]:
    """Paths that nobody can change or delete, root neither."""
    names = [str(path) for path in paths]
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", *names], capture_output=True).returncode:
        raise CannotBeTried("chattr +i does not work for this user or on this file system")
    try:
        yield
    finally:
        found = [str(path) for name in names for path in _wherever(Path(name))]
        subprocess.run(["chattr", "-i", *found], check=True)


def _wherever(path: Path) -> list[Path]:
    """A path, also where the folder that it lies in was renamed."""
    return [path] if os.path.lexists(path) else list(path.parent.parent.glob(f".{path.parent.name}*/{path.name}"))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that every user may write, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="ffvt-open-"))
    folder.chmod(0o777)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@contextmanager
def as_nobody() -> Iterator[None]:
    """Acts as a user without rights, if this one is root; else as this one."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def give_to_nobody(folder: Path) -> None:
    """Makes everything in a folder that user's."""
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, -1, follow_symlinks=False)
