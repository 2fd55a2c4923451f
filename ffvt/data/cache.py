"""A cache of decoded pictures: one memory-mapped file of uint8 pixels per split and size.

What is cached is the recipes' deterministic part (decode, resize to a square), so that a sample costs one copy of its
crop. An entry is named by what it is made from: the contents of all pictures in their order, the size, and the format's
version. It appears by one rename, whole or not at all; processes that want the same one wait for the first.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ffvt.data.images import load_image
from ffvt.files import file_digest, new_folder

log = logging.getLogger("ffvt")

VERSION = 1
PIXELS_FILE, FACTS_FILE = "pixels.u8", "facts.json"


class CachedPixels:
    """pixels[i] is a picture, uint8 (3, size, size), mapped from the file; writing to it does not change the file.

    Raises ValueError for a picture that could not be read when the cache was built, as `load_image` does.
    """

    def __init__(self, entry: Path) -> None:
        facts = json.loads((entry / FACTS_FILE).read_text())
        self.shape = (facts["count"], 3, facts["size"], facts["size"])
        self.unreadable = {int(index): reason for index, reason in facts["unreadable"].items()}
        self.key, self.file = entry.name, entry / PIXELS_FILE
        if self.file.stat().st_size != int(np.prod(self.shape)):
            raise ValueError(f"cache: {self.file} must have {int(np.prod(self.shape))} bytes; delete {entry}")
        self._mapped: np.memmap | None = None

    def __getitem__(self, index: int) -> Tensor:
        if index in self.unreadable:
            raise ValueError(self.unreadable[index])
        if self._mapped is None:
            self._mapped = np.memmap(self.file, np.uint8, "c", shape=self.shape)
        return torch.from_numpy(self._mapped[index])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_mapped": None}  # a mapping would be sent to a worker as all of its bytes


def open_cached(paths: Sequence[Path], size: int, cache_dir: Path, workers: int = 0) -> CachedPixels:
    """The pictures at side `size` pixels from the cache, built first by `workers` threads (all CPUs for 0) if needed.

    Every picture file is read and hashed at each opening, so a changed one is never taken for the old one.

    Raises:
        OSError: the cache cannot be read or written. ValueError: the disk has no room for it.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    threads = workers or os.cpu_count() or 1
    entry = cache_dir / cache_key(paths, size, threads)
    with _only_one(cache_dir / f"{entry.name}.lock"):
        if not entry.exists():
            _build(entry, paths, size, threads)
    return CachedPixels(entry)


def cache_key(paths: Sequence[Path], size: int, threads: int = 1) -> str:
    """The name of an entry: a hash of the version, the size and every picture's contents, in order."""
    key = hashlib.sha256(f"ffvt pixels {VERSION}, {size}".encode())
    with ThreadPoolExecutor(threads) as pool:
        for digest in pool.map(_digest, paths):
            key.update(digest.encode())
    return key.hexdigest()[:32]


def _digest(path: Path) -> str:
    try:
        return file_digest(path)
    except OSError as error:  # it may be readable another time, and then makes another entry
        return f"{type(error).__name__} {error.errno}"


@contextmanager
def _only_one(lock: Path) -> Iterator[None]:
    """One process at a time; the others wait. The system frees the lock of a process that dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(entry: Path, paths: Sequence[Path], size: int, threads: int) -> None:
    needed = len(paths) * 3 * size * size
    free = shutil.disk_usage(entry.parent).free
    log.info("cache: decoding %d pictures to %.2f GB in %s (%.1f GB free)", len(paths), needed / 1e9, entry, free / 1e9)
    if needed > free:
        raise ValueError(f"cache: {entry.parent} must have room for {needed} bytes; got {free} bytes free")
    with new_folder(entry) as fresh:
        with (fresh / PIXELS_FILE).open("wb") as file:
            if hasattr(os, "posix_fallocate"):  # not on macOS
                os.posix_fallocate(file.fileno(), 0, needed)  # a full disk is an error here, not a SIGBUS later
            else:
                file.truncate(needed)
        pixels = np.memmap(fresh / PIXELS_FILE, np.uint8, "r+", shape=(len(paths), 3, size, size))
        unreadable = _fill(pixels, paths, size, threads)
        pixels.flush()
        facts = {"version": VERSION, "count": len(paths), "size": size, "unreadable": unreadable}
        (fresh / FACTS_FILE).write_text(json.dumps(facts))


def _fill(pixels: np.memmap, paths: Sequence[Path], size: int, threads: int) -> dict[int, str]:
    """Decodes every picture into its row; what could not be read, with the reason."""
    unreadable: dict[int, str] = {}

    def fill(index: int) -> None:
        try:
            pixels[index] = load_image(paths[index], size).numpy()
        except (ValueError, OSError) as error:
            unreadable[index] = str(error)

    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(paths), desc="cache", unit="picture", disable=not sys.stderr.isatty()) as progress,
    ):
        for _ in pool.map(fill, range(len(paths))):
            progress.update()
    for _, reason in sorted(unreadable.items()):
        log.warning("cache: %s", reason)
    return dict(sorted(unreadable.items()))
