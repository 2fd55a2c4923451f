"""The cache of decoded images: facts and pixels damaged or forged, locks that are links, other users' caches."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ffvt.data import cache
from ffvt.data.datasets import CachedPictures, PictureFiles, open_split
from tests.data.layout_fixtures import picture
from tests.hostile.case import Case

SIDE, COUNT = 32, 4


def write(root: Path) -> None:
    for number in range(COUNT):
        picture(root / "train" / f"class{number % 2}" / f"{number}.png", number)


def opened(folder: Path, **more: object) -> CachedPictures:
    return open_split("imagefolder", "train", SIDE, SIDE, str(folder / "set"), cache_dir=str(folder / "cache"), **more)


def entry_of(folder: Path) -> Path:
    return next(path for path in (folder / "cache").iterdir() if path.is_dir())


def survived(name: str, edit: Callable[[Path], object]) -> Case:
    """An entry is changed; the images that are read must be right all the same."""

    def attempt(folder: Path) -> None:
        write(folder / "set")
        opened(folder)
        edit(entry_of(folder))
        _check_images(folder)

    return Case("cache", name, attempt, None, seconds=20)


def _check_images(folder: Path, **more: object) -> None:
    plain = open_split("imagefolder", "train", SIDE, SIDE, str(folder / "set"), **more)
    found = opened(folder, **more)
    for index in range(COUNT):
        assert torch.equal(found[index][0], plain[index][0]), index


def refused(name: str, edit: Callable[[Path], object], named: str) -> Case:
    """Something is in the way of a cache; it is refused by its name."""

    def attempt(folder: Path) -> None:
        write(folder / "set")
        edit(folder / "cache")
        opened(folder)

    return Case("cache", name, attempt, named, seconds=20)


def facts(**changes: object) -> Callable[[Path], None]:
    def edit(entry: Path) -> None:
        path = entry / cache.FACTS_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def without(key: str) -> Callable[[Path], None]:
    def edit(entry: Path) -> None:
        path = entry / cache.FACTS_FILE
        path.write_text(json.dumps({name: one for name, one in json.loads(path.read_text()).items() if name != key}))

    return edit


def facts_text(content: bytes) -> Callable[[Path], None]:
    return lambda entry: (entry / cache.FACTS_FILE).write_bytes(content)


def pixels(change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    def edit(entry: Path) -> None:
        change(np.memmap(entry / cache.PIXELS_FILE, np.uint8, "r+", shape=(COUNT, 3 * SIDE * SIDE)))

    return edit


def instead(file: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(entry: Path) -> None:
        (entry / file).unlink()
        make(entry / file)

    return edit


def resized(size: int) -> Callable[[Path], None]:
    return lambda entry: os.truncate(entry / cache.PIXELS_FILE, size)


def lock_path(folder: Path, cache_dir: Path) -> Path:
    paths = sorted((folder / "set").rglob("*.png"))
    return cache_dir / f"{cache.cache_key(paths, SIDE)}.lock"


def lock_is_a_link(folder: Path) -> None:
    """The file that the lock leads to keeps its contents."""
    write(folder / "set")
    (folder / "cache").mkdir()
    (folder / "precious.txt").write_text("precious")
    lock_path(folder, folder / "cache").symlink_to(folder / "precious.txt")
    try:
        opened(folder)
    finally:
        assert (folder / "precious.txt").read_text() == "precious"


def lock_is(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def attempt(folder: Path) -> None:
        write(folder / "set")
        (folder / "cache").mkdir()
        make(lock_path(folder, folder / "cache"))
        opened(folder)

    return attempt


def read_only_mount(folder: Path) -> None:
    """A whole cache is read from a file system that nothing can be written to."""
    write(folder / "set")
    opened(folder)
    if subprocess.run(["mount", "--bind", folder / "cache", folder / "cache"], capture_output=True).returncode:
        return _unwritable(folder)  # who may not mount can take the right away
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", folder / "cache"], check=True)
        _check_images(folder)
    finally:
        subprocess.run(["umount", folder / "cache"], check=True)


def _unwritable(folder: Path) -> None:
    for path in (*(folder / "cache").rglob("*"), folder / "cache"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        _check_images(folder)
    finally:
        for path in (folder / "cache", *(folder / "cache").rglob("*")):
            path.chmod(0o755)


def without_its_lock(folder: Path) -> None:
    """A whole entry that was copied without its lock is read, and none is made."""
    write(folder / "set")
    opened(folder)
    for lock in (folder / "cache").glob("*.lock"):
        lock.unlink()
    _check_images(folder)
    assert not list((folder / "cache").glob("*.lock"))


def interrupted(folder: Path) -> None:
    """Ctrl-C while it is built leaves the lock alone, and the next process builds it."""
    write(folder / "set")
    earlier = cache.load_image

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    cache.load_image = interrupt
    try:
        with contextlib.suppress(KeyboardInterrupt):
            opened(folder)
    finally:
        cache.load_image = earlier
    assert [path.suffix for path in (folder / "cache").iterdir()] == [".lock"]
    _check_images(folder)


def half_built(folder: Path) -> None:
    """What a killed process left behind is cleared away."""
    write(folder / "set")
    left = folder / "cache" / f".{lock_path(folder, folder / 'cache').stem}.new"
    left.mkdir(parents=True)
    (left / cache.PIXELS_FILE).write_bytes(b"half")
    _check_images(folder)
    assert not left.exists()


def told(folder: Path, message: str, edit: Callable[[Path], object]) -> None:
    """An image that becomes unreadable, or readable again, or another, makes another entry."""
    write(folder / "set")
    opened(folder)
    edit(folder / "set" / "train" / "class0" / "0.png")
    assert len([path for path in (folder / "cache").iterdir() if path.is_dir()]) == 1, message
    _check_images(folder)
    assert len([path for path in (folder / "cache").iterdir() if path.is_dir()]) == 2, message


def one_entry_each(folder: Path) -> None:
    """Every fit has an entry of its own, and so have images that are turned and those that are not."""
    write(folder / "set")
    for fit in ("stretch", "crop", "pad"):
        _check_images(folder, fit=fit)
    files = PictureFiles(open_split("imagefolder", "train", SIDE, SIDE, str(folder / "set")), SIDE, orient=False)
    CachedPictures(files, folder / "cache")
    assert len([path for path in (folder / "cache").iterdir() if path.is_dir()]) == 4


def flipped_bits(folder: Path) -> None:
    """One bit after the other in facts and pixels: the images are right whichever it is."""
    write(folder / "set")
    opened(folder)
    entry, draw = entry_of(folder), random.Random(0)
    for name in [cache.FACTS_FILE] * 40 + [cache.PIXELS_FILE] * 20:
        content = bytearray((entry / name).read_bytes())
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        (entry / name).write_bytes(content)
        _check_images(folder)


DEEP = b"[" * 100_000

CASES = [
    *(
        survived(f"facts {what}", facts_text(content))
        for what, content in (
            ("empty", b""),
            ("cut", b'{"version": 2, "count"'),
            ("of zeros", bytes(1000)),
            ("not UTF-8", b"\xff\xfe\xfd"),
            ("a list", b"[]"),
            ("null", b"null"),
            ("nested 100,000 deep", DEEP),
            ("of 10 MB", b"[" + b"1," * 5_000_000 + b"1]"),
            ("a number of 10,000 digits", b"9" * 10_000),
        )
    ),
    *(
        survived(f"facts without {key}", without(key))
        for key in ("version", "count", "size", "unreadable", "checksums")
    ),
    *(
        survived(f"facts with {key} {str(value)[:40]}", facts(**{key: value}))
        for key, value in (
            ("version", 1),
            ("version", "2"),
            ("count", 0),
            ("count", COUNT + 1),
            ("count", 10**9),
            ("count", -4),
            ("count", "4"),
            ("size", SIDE + 1),
            ("size", 10**9),
            ("size", None),
            ("unreadable", []),
            ("unreadable", {"0": "forged"}),
            ("unreadable", {"99": "forged"}),
            ("unreadable", {"x": "forged"}),
            ("unreadable", {"0": 5}),
            ("checksums", []),
            ("checksums", [1, 2, 3, 4]),
            ("checksums", ["1", "2", "3", "4"]),
            ("checksums", [True, 1.5, -1, 2**40]),
            ("checksums", [None] * COUNT),
            ("checksums", "0000"),
        )
    ),
    survived("facts a pipe", instead(cache.FACTS_FILE, os.mkfifo)),
    survived("facts gone", instead(cache.FACTS_FILE, lambda path: None)),
    survived("facts a link to nothing", instead(cache.FACTS_FILE, lambda path: path.symlink_to("gone"))),
    survived("pixels gone", instead(cache.PIXELS_FILE, lambda path: None)),
    survived("pixels a pipe", instead(cache.PIXELS_FILE, os.mkfifo)),
    survived("pixels a folder", instead(cache.PIXELS_FILE, Path.mkdir)),
    survived("pixels cut", resized(100)),
    survived("pixels empty", resized(0)),
    survived("pixels longer", resized(COUNT * 3 * SIDE * SIDE + 1)),
    survived("pixels of zeros", pixels(lambda rows: rows.fill(0))),
    survived("one bit of an image", pixels(lambda rows: rows[2].__setitem__(5, rows[2, 5] ^ 1))),
    survived("last byte", pixels(lambda rows: rows[-1].__setitem__(-1, rows[-1, -1] ^ 255))),
    survived("two images exchanged", pixels(lambda rows: rows.__setitem__([0, 1], rows[[1, 0]]))),
    Case("cache", "sixty flipped bits", flipped_bits, None, slow=True),
    refused("cache_dir a file", Path.touch, "cache"),
    refused("cache_dir a link to nothing", lambda path: path.symlink_to("gone/gone"), "cache"),
    refused("cache_dir a link to itself", lambda path: path.symlink_to(path.name), "cache"),
    Case("cache", "lock a link to a file", lock_is_a_link, "symbolic link"),
    Case("cache", "lock a link to nothing", lock_is(lambda path: path.symlink_to("gone")), "symbolic link"),
    Case("cache", "lock a pipe", lock_is(os.mkfifo), "regular file", seconds=5),
    Case("cache", "lock a folder", lock_is(Path.mkdir), "cache", seconds=5),
    Case("cache", "entry a file", lock_is(lambda path: path.with_suffix("").touch()), "must be a folder"),
    Case(
        "cache",
        "entry a link to nothing",
        lock_is(lambda path: path.with_suffix("").symlink_to("gone")),
        "must be a folder",
    ),
    Case("cache", "on a read-only mount", read_only_mount, None),
    Case("cache", "copied without its lock", without_its_lock, None),
    Case("cache", "Ctrl-C while it is built", interrupted, None),
    Case("cache", "half built by a killed process", half_built, None),
    Case("cache", "image changed", lambda folder: told(folder, "changed", lambda path: picture(path, 99)), None),
    Case("cache", "entries by fit and orientation", one_entry_each, None),
]
