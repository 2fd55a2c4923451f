"""Unpacks a downloaded archive without trusting it."""

from __future__ import annotations

import bz2
import errno
import gzip
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ffvt.errors import printable

MAX_BYTES = 400 << 30  # iNaturalist 2017 is 186 GB
MAX_RATIO, ALLOWANCE = 200, 100 << 20  # bytes that each byte of the archive may make, beside these
MAX_MEMBERS = 2_000_000
MAX_PADDING = 64 << 20  # bytes that may follow a tar's last member
MAX_HEADER = 256 << 10  # bytes of one extended header of a tar, which its reader takes into memory at once
MAX_GLOBAL_HEADERS = 100
MAX_DEPTH = 64  # folders within one another
BLOCK = 1 << 20
IN_THE_WAY = (None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)  # None: gzip and bz2 tell of damage by a bare OSError
OPENERS: dict[bytes, Callable[..., BinaryIO]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


def extract_archive(
    archive: str | Path, folder: str | Path, max_bytes: int = MAX_BYTES, max_members: int = MAX_MEMBERS
) -> list[Path]:
    """Unpacks a tar (.gz, .bz2, .xz) or zip file into `folder`, whole or not at all.

    Members that would lie outside, links, devices, sparse and encrypted members are refused, and so are
    archives of too many members or bytes, whatever sizes they declare: more than `max_bytes`, or 200 times the
    archive. A tar must have its end: two blocks of zeros. What is there already is never replaced.

    Returns the files and folders that appeared in `folder`.

    Raises:
        FileNotFoundError: no such archive. FileExistsError: something of that name is there. ValueError: the archive is
        damaged, of another kind, or not to be trusted; the message names the member. OSError: it cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise FileNotFoundError(f"extract_archive: archive must be a file; got archive={str(archive)!r}")
    budget = _Budget(min(max_bytes, ALLOWANCE + MAX_RATIO * archive.stat().st_size), max_members)
    with _fresh_folder(folder) as fresh:
        try:
            _unpack(archive, fresh, budget)
        except Exception as error:  # damage makes the standard library raise whatever its code happens to
            reason = f"{budget.place}{_reason(error, fresh)}"
            if isinstance(error, OSError) and error.errno not in IN_THE_WAY:
                raise OSError(error.errno, f"extract_archive: {archive}: {reason}") from error
            # The folder was empty: only the archive can stand in its own way.
            raise ValueError(f"extract_archive: {archive} is refused: {reason}") from error
        return _move_entries(fresh, folder, archive)


def _reason(error: Exception, fresh: Path) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return printable(str(error).replace(str(fresh), ""), 300) or type(error).__name__


@dataclass
class _Budget:
    """What an archive may still give, and the member at which it is."""

    max_bytes: int
    max_members: int
    bytes: int = 0
    members: int = 0
    place: str = ""

    def enter(self, name: str) -> None:
        self.place = f"member '{printable(name)}': "
        self.members += 1
        self.check(self.members, self.bytes)

    def spend(self, count: int) -> None:
        self.bytes += count
        self.check(self.members, self.bytes)

    def check(self, members: int, total: int) -> None:
        if members > self.max_members:
            raise ValueError(f"the archive has more than {self.max_members} members")
        if total > self.max_bytes:
            raise ValueError(f"the archive makes more than {self.max_bytes} bytes")


@contextmanager
def _fresh_folder(folder: Path) -> Iterator[Path]:
    """An empty folder on the disk of `folder`, which need not exist yet; removed at the end."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    fresh = Path(tempfile.mkdtemp(prefix=".extract-", dir=there))
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _move_entries(fresh: Path, folder: Path, archive: Path) -> list[Path]:
    names = sorted(entry.name for entry in fresh.iterdir())
    there = [name for name in names if os.path.lexists(folder / name)]
    if there:
        raise FileExistsError(f"extract_archive: {folder} must not have what {archive} holds; got {there[0]!r}")
    folder.mkdir(parents=True, exist_ok=True)
    moved: list[str] = []
    try:
        for name in names:
            os.rename(fresh / name, folder / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            os.rename(folder / name, fresh / name)
        raise
    return [folder / name for name in names]


def _unpack(archive: Path, folder: Path, budget: _Budget) -> None:
    with archive.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
        file.seek(0)
        opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), None)
        if opener is not None:
            with opener(file) as stream:
                _unpack_tar(stream, folder, budget)
        elif not start.startswith(b"PK") and _is_tar_header(start):
            _unpack_tar(file, folder, budget)
        elif zipfile.is_zipfile(file):
            _unpack_zip(file, folder, budget)
        else:
            raise ValueError("it is neither a tar (plain, .gz, .bz2, .xz) nor a zip file, or damaged")


def _is_tar_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _TarStream:
    """The bytes of a tar as its reader takes them: never many at once, and the last of them known."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.last = stream, b""
        self.tell, self.seek = stream.tell, stream.seek

    def read(self, size: int) -> bytes:
        if size > MAX_HEADER:  # members are read in small pieces, so this is a header
            raise ValueError(f"has a header of {size} bytes, more than {MAX_HEADER}")
        self.last = self.stream.read(size)
        return self.last


def _unpack_tar(stream: BinaryIO, folder: Path, budget: _Budget) -> None:
    source = _TarStream(stream)
    with tarfile.open(fileobj=source, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # else all of a million headers stay in memory
            if len(tar.pax_headers) > MAX_GLOBAL_HEADERS:
                raise ValueError(f"the archive has more than {MAX_GLOBAL_HEADERS} global headers")
            budget.enter(member.name)
            _check_member(member, folder)
            budget.spend(member.size)
            member.mtime = None  # it may be infinite, and nobody needs it
            tar.extract(member, folder, filter="data")  # refuses what leads outside, and devices
    if not budget.members:
        raise ValueError("it holds nothing")
    _check_end(source, budget)


def _check_member(member: tarfile.TarInfo, folder: Path) -> None:
    if member.issym() or member.islnk():  # Python's filter has been got around through chains of links
        raise ValueError("is a link")
    if member.issparse() or member.size < 0:  # the map of a sparse member may ask for more than its size
        raise ValueError("has no plain size")
    _check_depth(member.name)
    if member.isreg() and os.path.lexists(folder / member.name.lstrip("/")):
        raise ValueError("is there twice")


def _check_depth(name: str) -> None:
    if name.count("/") > MAX_DEPTH:
        raise ValueError(f"lies in more than {MAX_DEPTH} folders")


def _check_end(source: _TarStream, budget: _Budget) -> None:
    """Refuses a tar that does not end as one must. To the reader, a damaged header or a cut are ends as well."""
    rest = source.last  # where the reader found no member
    if len(rest) < tarfile.BLOCKSIZE or any(rest):
        raise ValueError("it is cut off or damaged after this member")
    budget.place, length = "", len(rest)
    while block := source.stream.read(BLOCK):  # the compressed stream's checksum stands at its end
        if any(block):
            raise ValueError("it is damaged: its end is followed by more than zeros")
        length += len(block)
        if length > MAX_PADDING:
            raise ValueError(f"more than {MAX_PADDING} bytes follow the last member")
    if length < 2 * tarfile.BLOCKSIZE:
        raise ValueError("it is cut off: its end is missing")


def _unpack_zip(file: BinaryIO, folder: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(file) as zipped:
        members = zipped.infolist()
        budget.check(len(members), sum(member.file_size for member in members))
        if not members:
            raise ValueError("it holds nothing")
        for member in members:
            budget.enter(member.filename)
            target = folder / _checked_name(member)
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(member) as source, target.open("xb") as made:
                while block := source.read(BLOCK):
                    budget.spend(len(block))
                    made.write(block)
                if made.tell() != member.file_size:
                    raise ValueError(f"must have {member.file_size} bytes; got {made.tell()}")


def _checked_name(member: zipfile.ZipInfo) -> PurePosixPath:
    name = member.filename.replace("\\", "/")
    path = PurePosixPath(name)
    mode = member.external_attr >> 16
    if path.is_absolute() or ".." in path.parts or ":" in name:
        raise ValueError("leads outside of the folder")
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise ValueError("is a link or a device")
    if member.flag_bits & 1:
        raise ValueError("is encrypted")
    _check_depth(name)
    return path
