"""A cache of decoded images: one memory-mapped file of uint8 pixels per split, size and fit.

What is cached is the recipes' deterministic part (decode, resize to a square), so that a sample costs one copy of its
crop. An entry is named by what it is made from: the contents of all image files in their order, the size, how they are
fitted, and the format's version. It appears by one rename, whole or not at all; processes that want the same one wait
for the first. A whole entry is read without a lock, so it may be another user's, or on a disk that is read-only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffvt.data.images import load_image
from ffvt.data.threads import each
from ffvt.errors import printable
from ffvt.files import file_digest, new_folder, open_regular

log = logging.getLogger("ffvt")

VERSION = 2
PIXELS_FILE, FACTS_FILE = "pixels.u8", "facts.json"
FACTS_PER_IMAGE = 2000  # bytes at most that the facts have on each image


class DamagedCache(ValueError):
    """The cache does not hold what was written."""


class CachedPixels:
    """pixels[i] is an image, uint8 (3, size, size), mapped from the file; writing to it does not change the file.

    The checksum of an image is verified when a process first reads it. `unreadable` has the images that could not be
    read when the cache was built, with the reasons: these raise ValueError, as `load_image` does.

    Raises:
        DamagedCache: the facts or the size of the file are not those of `count` images; when an image is read, its
            pixels are not what was written. OSError: the files cannot be read.
    """

    def __init__(self, entry: Path, count: int, size: int) -> None:
        self.key = entry.name
        self.entry, self.file, self.shape = entry, entry / PIXELS_FILE, (count, 3, size, size)
        facts = _read_facts(entry / FACTS_FILE, count, size)
        self.unreadable = {int(index): reason for index, reason in facts["unreadable"].items()}
        self.checksums = np.array([checksum or 0 for checksum in facts["checksums"]], np.uint32)
        needed = count * 3 * size * size
        with open_regular(self.file) as file:
            found = os.fstat(file.fileno()).st_size
        if found != needed:
            raise DamagedCache(f"cache: {self.file} must have {needed} bytes; got {found}")
        self._mapped: np.memmap | None = None
        self._verified = bytearray(count)

    def __getitem__(self, index: int) -> Tensor:
        if index in self.unreadable:
            raise ValueError(self.unreadable[index])
        if self._mapped is None:
            self._mapped = np.memmap(self.file, np.uint8, "c", shape=self.shape)
        pixels = self._mapped[index]
        if not self._verified[index]:
            if zlib.crc32(pixels) != self.checksums[index]:
                raise DamagedCache(
                    f"cache: {self.file} is damaged at image {index}; delete {self.entry} to have it built again"
                )
            self._verified[index] = True
        return torch.from_numpy(pixels)

    def __getstate__(self) -> dict:  # a mapping would be sent to a worker as all of its bytes
        return {**self.__dict__, "_mapped": None, "_verified": bytearray(len(self._verified))}


def _read_facts(path: Path, count: int, size: int) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            content = file.read(FACTS_PER_IMAGE * (count + 1))
        facts = json.loads(content)
        keys = [str(index) for index, checksum in enumerate(facts["checksums"]) if checksum is None]
        holds = (
            (facts["version"], facts["count"], facts["size"]) == (VERSION, count, size)
            and len(facts["checksums"]) == count
            and all(one is None or (type(one) is int and 0 <= one < 1 << 32) for one in facts["checksums"])
            and sorted(facts["unreadable"], key=int) == keys
            and all(isinstance(reason, str) for reason in facts["unreadable"].values())
        )
    except OSError:
        raise
    except Exception as error:  # they may be anything
        raise DamagedCache(f"cache: {path} is damaged: {printable(str(error))}") from error
    if not holds:
        raise DamagedCache(f"cache: {path} must be the facts of {count} images of side {size}; got others")
    return facts


def open_cached(
    paths: Sequence[Path], size: int, cache_dir: Path, workers: int = 0, orient: bool = True, fit: str = "stretch"
) -> CachedPixels:
    """The images as `load_image` gives them, from the cache, built first by `workers` threads (all CPUs for 0).

    Every image file is read and hashed at each opening, so a changed one is never taken for the old one. An entry whose
    facts or length are damaged is built again.

    Raises:
        OSError: the cache cannot be read or written. ValueError: the disk has no room for it, or something that is no
        cache is in its place.
    """
    entry = cache_dir / cache_key(paths, size, workers, orient, fit)
    if entry.exists():
        try:
            return CachedPixels(entry, len(paths), size)
        except PermissionError:  # there is no telling what another user's files are
            raise
        except (DamagedCache, OSError) as error:
            log.warning("%s; it is built again", error)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with _only_one(cache_dir / f"{entry.name}.lock"):
        try:  # another process may have built it in the meantime
            return CachedPixels(entry, len(paths), size)
        except (DamagedCache, OSError):
            _build(entry, paths, size, workers, partial(load_image, size=size, orient=orient, fit=fit))
    return CachedPixels(entry, len(paths), size)


def cache_key(paths: Sequence[Path], size: int, threads: int = 1, orient: bool = True, fit: str = "stretch") -> str:
    """The name of an entry: a hash of the version, of how images are made, and of every file's contents, in order."""
    key = hashlib.sha256(f"ffvt pixels {VERSION}, {size}, {'upright' if orient else 'as stored'}, {fit}".encode())
    for digest in each(_digest, paths, "hashing images", threads):
        key.update(digest.encode())
    return key.hexdigest()[:32]


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:  # it may be readable another time, and then makes another entry
        return f"{type(error).__name__} {error.errno}"


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """One process at a time; the others wait. The system frees the lock of a process that dies.

    Raises:
        OSError: the lock cannot be opened, or is a link, or no file.
    """
    flags = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        try:
            descriptor = os.open(lock, flags | os.O_RDWR, 0o666)
        except PermissionError:  # of a file that another user made, reading is enough
            descriptor = os.open(lock, flags | os.O_RDONLY, 0o666)
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror
        raise OSError(error.errno, f"cache: cannot build in {lock.parent}: {reason}", str(lock)) from error
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "cache: the lock must be a regular file", str(lock))
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(entry: Path, paths: Sequence[Path], size: int, threads: int, load: partial[Tensor]) -> None:
    if os.path.lexists(entry) and (entry.is_symlink() or not entry.is_dir()):
        raise ValueError(f"cache: {entry} must be a folder, or not be there; got something else")
    needed = len(paths) * 3 * size * size
    free = shutil.disk_usage(entry.parent).free
    log.info("cache: decoding %d images to %.2f GB in %s (%.1f GB free)", len(paths), needed / 1e9, entry, free / 1e9)
    if needed > free:
        raise ValueError(f"cache: {entry.parent} must have room for {needed} bytes; got {free} bytes free")
    with new_folder(entry) as fresh:
        with (fresh / PIXELS_FILE).open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, needed)  # a full disk is an error here, not a SIGBUS later
            else:
                file.truncate(needed)
        pixels = np.memmap(fresh / PIXELS_FILE, np.uint8, "r+", shape=(len(paths), 3, size, size))
        checksums, unreadable = _fill(pixels, paths, threads, load)
        pixels.flush()
        facts = {"version": VERSION, "count": len(paths), "size": size}
        (fresh / FACTS_FILE).write_text(json.dumps({**facts, "unreadable": unreadable, "checksums": checksums}))


def _fill(
    pixels: np.memmap, paths: Sequence[Path], threads: int, load: partial[Tensor]
) -> tuple[list[int | None], dict[int, str]]:
    """Decodes every image into its row; their checksums, and of those that could not be read the reasons."""
    unreadable: dict[int, str] = {}

    def fill(index: int) -> int | None:
        try:
            pixels[index] = load(paths[index]).numpy()
        except (ValueError, FileNotFoundError) as error:
            unreadable[index] = str(error)
            return None
        return zlib.crc32(pixels[index])

    checksums = list(each(fill, range(len(paths)), "cache", threads))
    for _, reason in sorted(unreadable.items()):
        log.warning("cache: %s", reason)
    return checksums, dict(sorted(unreadable.items()))
