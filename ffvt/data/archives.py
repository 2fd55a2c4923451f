"""Unpacks a downloaded archive without trusting it."""

from __future__ import annotations

import errno
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

MAX_BYTES = 400 << 30  # iNaturalist 2017 is 186 GB
MAX_MEMBERS = 2_000_000
MAX_PADDING = 64 << 20  # bytes that may follow a tar's last member
BLOCK = 1 << 20
DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
)
IN_THE_WAY = (None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)  # None: gzip and bz2 tell of damage by a bare OSError


def extract_archive(
    archive: str | Path, folder: str | Path, max_bytes: int = MAX_BYTES, max_members: int = MAX_MEMBERS
) -> list[Path]:
    """Unpacks a tar (.gz, .bz2, .xz) or zip file into `folder`, whole or not at all.

    Members that would lie outside, links, devices, sparse and encrypted members are refused, and so are
    archives of too many members or bytes, whatever sizes they declare. What is there already is never replaced.

    Returns the files and folders that appeared in `folder`.

    Raises:
        FileNotFoundError: no such archive. FileExistsError: something of that name is there. ValueError: the archive is
        damaged, of another kind, or not to be trusted; the message names the member. OSError: it cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    if not archive.is_file():
        raise FileNotFoundError(f"extract_archive: archive must be a file; got archive={str(archive)!r}")
    budget = _Budget(max_bytes, max_members)
    with _fresh_folder(folder) as fresh:
        try:
            _unpack(archive, fresh, budget)
        except OSError as error:
            if error.errno in IN_THE_WAY:  # the folder was empty: only the archive can stand in its own way
                raise ValueError(f"extract_archive: {archive} is refused: {budget.place}{error}") from error
            raise OSError(error.errno, f"extract_archive: {archive}: {budget.place}{error.strerror}") from error
        except DAMAGE as error:
            raise ValueError(f"extract_archive: {archive} is refused: {budget.place}{error}") from error
        return _move_entries(fresh, folder, archive)


@dataclass
class _Budget:
    """What an archive may still give, and the member at which it is."""

    max_bytes: int
    max_members: int
    bytes: int = 0
    members: int = 0
    place: str = ""

    def enter(self, name: str) -> None:
        self.place = f"member {name!r}: "
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
    if tarfile.is_tarfile(archive):
        _unpack_tar(archive, folder, budget)
    elif zipfile.is_zipfile(archive):
        _unpack_zip(archive, folder, budget)
    else:
        raise ValueError("it is neither a tar nor a zip file, or damaged")


def _unpack_tar(archive: Path, folder: Path, budget: _Budget) -> None:
    with tarfile.open(archive) as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # else all of a million headers stay in memory
            budget.enter(member.name)
            if member.issym() or member.islnk():  # Python's filter has been got around through chains of links
                raise ValueError("is a link")
            if member.issparse() or member.size < 0:  # the map of a sparse member may ask for more than its size
                raise ValueError("has no plain size")
            budget.spend(member.size)
            tar.extract(member, folder, filter="data")  # refuses what leads outside, and devices
        budget.place, padding = "", 0
        while block := tar.fileobj.read(BLOCK):  # the compressed stream's checksum stands at its end
            padding += len(block)
            if padding > MAX_PADDING:
                raise ValueError(f"more than {MAX_PADDING} bytes follow the last member")


def _unpack_zip(archive: Path, folder: Path, budget: _Budget) -> None:
    with zipfile.ZipFile(archive) as zipped:
        members = zipped.infolist()
        budget.check(len(members), sum(member.file_size for member in members))
        for member in members:
            budget.enter(member.filename)
            target = folder / _checked_name(member)
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with zipped.open(member) as source, target.open("xb") as file:
                while block := source.read(BLOCK):
                    budget.spend(len(block))
                    file.write(block)


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
    return path
