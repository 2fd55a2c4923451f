"""A user's own folders: what lies in them beside images, how they are called, what cannot be read, what is missing."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ffvt.cli import main
from ffvt.data.datasets import open_split
from ffvt.data.doctor import examine, render
from ffvt.data.layouts import read_listing
from ffvt.train.data import open_data
from ffvt.train.options import TrainOptions
from tests.data.layout_fixtures import picture
from tests.helpers import SMALL
from tests.hostile.case import Case

CLASSES = ("ant", "bee")


def write(root: Path) -> Path:
    """Two classes of two images for training and one for testing."""
    for number, (split, name) in enumerate((split, name) for split in ("train", "train", "test") for name in CLASSES):
        picture(root / split / name / f"{number}.png", number)
    return root


def change(name: str, edit: Callable[[Path], object], named: str | None, count: int = 4) -> Case:
    """A set of folders that is changed; where `named` is None, `count` training images of two classes must be found."""

    def attempt(folder: Path) -> None:
        edit(write(folder / "set"))
        listing = read_listing("imagefolder", "train", folder / "set")
        read_listing("imagefolder", "test", folder / "set")
        assert list(listing.classes) == list(CLASSES), listing.classes
        assert len(listing.paths) == count, listing.paths

    return Case("imagefolder", name, attempt, named, seconds=20)


def started(name: str, edit: Callable[[Path], object], named: str | None, *told: str, **options: object) -> Case:
    """Training is started on a changed set: it is refused before its first step, or warns of what is `told`."""

    def attempt(folder: Path) -> None:
        edit(write(folder / "set"))
        run = SMALL | {"dataset": "imagefolder", "data_root": str(folder / "set"), **options}
        if "cache_dir" in run:
            run["cache_dir"] = str(folder / "cache")
        with heard() as said:
            open_data(TrainOptions(**run)).check_images(run.get("skip_bad_images", False))
        for part in told:
            assert part in said.getvalue(), said.getvalue()

    return Case("imagefolder", name, attempt, named, seconds=20)


@contextlib.contextmanager
def heard():
    """What is logged, as text."""
    said, logger = io.StringIO(), logging.getLogger("ffvt")
    handler = logging.StreamHandler(said)
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def diagnosed(name: str, edit: Callable[[Path], object], *told: str) -> Case:
    """The doctor finishes, as text and as JSON, says what is `told`, and prints no letter that a terminal obeys."""

    def attempt(folder: Path) -> None:
        edit(write(folder / "set"))
        found = examine("imagefolder", folder / "set")
        said = render(found)
        for part in told:
            assert part in said, said
        assert said.replace("\n", "").isprintable()
        assert max(map(len, said.splitlines())) <= 1000
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = main(["doctor", "--dataset", "imagefolder", "--data_root", str(folder / "set"), "--json"])
        assert json.loads(printed.getvalue())["ok"] == (status == 0) == found.ok
        assert printed.getvalue().isascii()

    return Case("imagefolder", f"doctor: {name}", attempt, None, seconds=20)


def copy_to(*names: str | bytes) -> Callable[[Path], None]:
    """The first image once more, under other names."""

    def edit(root: Path) -> None:
        for name in names:
            place = root / (os.fsdecode(name) if isinstance(name, bytes) else name)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / "train/ant/0.png", place)

    return edit


def spoil(*names: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        for name in names:
            (root / name).write_bytes(b"no image")

    return edit


def cut(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:60])


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda root: (root / name).symlink_to(target)


def remove(name: str) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def pipe(name: str) -> Callable[[Path], None]:
    return lambda root: os.mkfifo(root / name)


def all_of(*edits: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        for one in edits:
            one(root)

    return edit


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 40)).save(root / "train/ant/turned.jpg", exif=exif)


def more_test_classes(root: Path) -> None:
    for number in range(300):
        (root / "test" / f"other{number:03}").mkdir()


def not_there(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """data_root itself is something else."""

    def attempt(folder: Path) -> None:
        make(folder / "set")
        read_listing("imagefolder", "train", folder / "set")

    return attempt


def nested(folder: Path) -> None:
    write(folder / "archive" / "small")
    read_listing("imagefolder", "train", folder / "archive")


def fit_unknown(folder: Path) -> None:
    write(folder / "set")
    open_split("imagefolder", "train", 32, 32, str(folder / "set"), fit="squash")


ESCAPE = "\x1b[2J\x1b]0;owned\x07"

CASES = [
    # passed over
    change("hidden folder in a class", copy_to("train/ant/.ipynb_checkpoints/0-checkpoint.png"), None),
    change("thumbnails of a viewer", copy_to("train/ant/.thumbs/0.png", "train/ant/deep/.cache/1.png"), None),
    change("hidden file", copy_to("train/ant/._0.png"), None),
    change("hidden class", copy_to("train/.git/0.png"), None),
    change("hidden split", copy_to(".train/ant/9.png"), None),
    change("file beside the classes", copy_to("train/0.png"), None),
    change("text, table, suffix-less file", copy_to("train/ant/a.txt", "train/ant/b.csv", "train/ant/README"), None),
    change("folder named like an image", lambda root: (root / "train/ant/a.png").mkdir(), None),
    change("pipe named like an image", pipe("train/ant/a.png"), None),
    change("link to a device", link("train/ant/a.png", "/dev/zero"), None),
    change("link to nothing", link("train/ant/a.png", "gone.png"), None),
    change("link to itself", link("train/ant/a.png", "a.png"), None),
    change("folder that links to its parent", link("train/ant/loop", ".."), None),
    # taken
    change("folder within a class", copy_to("train/ant/2024/May/9.png"), None, 5),
    change("suffix in capitals", copy_to("train/ant/9.PNG", "train/ant/8.JPeG"), None, 6),
    change(
        "every suffix",
        copy_to(*(f"train/ant/9.{suffix}" for suffix in ("gif", "avif", "jfif", "jp2", "mpo", "pbm"))),
        None,
        10,
    ),
    change("link to an image", link("train/ant/a.png", "0.png"), None, 5),
    change("name that is not UTF-8", copy_to(b"train/ant/caf\xe9.png"), None, 5),
    change("name of 250 letters", copy_to(f"train/ant/{'n' * 246}.png"), None, 5),
    change("name of blanks and line breaks", copy_to("train/ant/ \n.png"), None, 5),
    change("sixty folders deep", copy_to("train/ant/" + "d/" * 60 + "9.png"), None, 5),
    # refused
    change("test class without training", copy_to("test/cat/0.png"), "got class 'cat'"),
    change("three hundred such classes", more_test_classes, "(300 such)"),
    change("such a class with escape codes", copy_to(f"test/{ESCAPE}/0.png"), "\\x1b[2J"),
    change("such a class in latin-1", copy_to(b"test/caf\xe9/0.png"), "caf\\udce9"),
    change("class without images", lambda root: (root / "train/cat").mkdir(), "'cat'"),
    change("class with escape codes, without images", lambda root: (root / "train" / ESCAPE).mkdir(), "\\x1b[2J"),
    change("class of .heic alone", copy_to("train/cat/0.heic"), "'cat'"),
    change("no train folder", remove("train"), "data_root must hold train"),
    change("no test folder", remove("test"), "data_root must hold test"),
    change("train a file", all_of(remove("train"), lambda root: (root / "train").touch()), "which is no folder"),
    change("train a link to nothing", all_of(remove("train"), link("train", "gone")), "which is no folder"),
    change("train without classes", all_of(remove("train/ant"), remove("train/bee")), "got"),
    change(
        "all test images .heic", all_of(remove("test/ant"), remove("test/bee"), copy_to("test/ant/0.heic")), ".heic 1"
    ),
    Case("imagefolder", "archive's single top folder", nested, "archive/small'"),
    Case("imagefolder", "data_root not there", not_there(lambda path: None), "data_root must be a folder"),
    Case("imagefolder", "data_root a file", not_there(Path.touch), "data_root must be a folder"),
    Case("imagefolder", "data_root a pipe", not_there(os.mkfifo), "data_root must be a folder"),
    Case(
        "imagefolder",
        "data_root with escape codes",
        lambda folder: read_listing("imagefolder", "train", folder / ESCAPE),
        "\\x1b[2J",
    ),
    Case("imagefolder", "unknown fit", fit_unknown, "fit='squash'"),
    # before the first step
    started("test image that is none", spoil("test/bee/5.png"), "5.png"),
    started(
        "test image cut within its header", lambda root: (root / "test/bee/5.png").write_bytes(b"\x89PNG\r\n"), "5.png"
    ),
    started("test image empty", lambda root: (root / "test/bee/5.png").write_bytes(b""), "5.png"),
    started("test image cut behind its header, with a cache", cut("test/bee/5.png"), "5.png", cache_dir="yes"),
    started("both test images", spoil("test/bee/5.png", "test/ant/4.png"), "2 of 2 images cannot be read"),
    started(
        "test image, with --skip_bad_images",
        spoil("test/bee/5.png"),
        None,
        "5.png; they will not be counted",
        skip_bad_images=True,
    ),
    started("training image", spoil("train/bee/1.png"), None, "train: 1 of 4 images cannot be read", "1.png"),
    started(
        "training images, all",
        spoil(*(f"train/{CLASSES[i % 2]}/{i}.png" for i in range(4))),
        None,
        "4 of 4",
        "and 1 more",
    ),
    started(
        "training image split off for validation",
        all_of(
            *(copy_to(f"train/{one}/x{i}.png") for one in CLASSES for i in range(4)),
            *(spoil(f"train/{one}/x{i}.png") for one in CLASSES for i in range(4)),
        ),
        "val: ",
        val_split=0.5,
    ),
    started(
        "validation, with a cache",
        all_of(
            *(copy_to(f"train/{one}/x{i}.png") for one in CLASSES for i in range(4)),
            *(spoil(f"train/{one}/x{i}.png") for one in CLASSES for i in range(4)),
        ),
        "val: ",
        val_split=0.5,
        cache_dir="yes",
    ),
    started(
        "PostScript among test images",
        lambda root: (root / "test/ant/evil.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        "evil.jpg",
    ),
    started(
        "files left out are named",
        copy_to("train/ant/a.heic", "train/ant/b.heic", "test/bee/c.txt"),
        None,
        ".heic 2 (convert .heic to .jpg)",
        "test: files that are no images are left out: .txt 1",
    ),
    started(
        "name with escape codes", lambda root: (root / "test/ant" / f"{ESCAPE}.png").write_bytes(b"no"), "\\x1b[2J"
    ),
    # the doctor
    diagnosed("in order", lambda root: None, "in order", "2 classes"),
    diagnosed("class with escape codes", copy_to(f"train/{ESCAPE}/0.png"), "the same image in two classes", "\\x1b"),
    diagnosed("class in latin-1", copy_to(b"train/caf\xe9/0.png"), "caf\\udce9"),
    diagnosed(
        "unreadable name in latin-1",
        lambda root: (root / "train/ant" / os.fsdecode(b"\xe9.png")).touch(),
        "cannot be read: 1",
    ),
    diagnosed(
        "suffixes left out",
        copy_to("train/ant/a.heic", "test/bee/b.xcf"),
        "left out of train: .heic 1",
        "left out of test: .xcf 1",
    ),
    diagnosed(
        "hundred kinds left out", copy_to(*(f"train/ant/a.s{number}" for number in range(100))), "and 94 more kinds"
    ),
    diagnosed("suffix of 200 letters", copy_to(f"train/ant/a.{'s' * 200}"), "left out of train"),
    diagnosed("EXIF turns", turned, "EXIF says to turn 1 images, which is done"),
    diagnosed("class without test images", copy_to("train/cat/0.png"), "1 classes have no test images: 'cat'"),
    diagnosed(
        "imbalance",
        copy_to(*(f"train/ant/x{number}.png" for number in range(8))),
        "most for training in 'ant' (10), fewest in 'bee' (2), 5.0 times",
    ),
    diagnosed("val folder, with a leak", copy_to("val/ant/0.png"), "val: 1 images", "train and another split: 1"),
    diagnosed(
        "structure and images at once",
        all_of(copy_to("test/cat/0.png"), spoil("train/ant/0.png"), lambda root: (root / "train/dog").mkdir()),
        "got class 'cat'",
        "got none in 'dog'",
        "cannot be read: 1",
    ),
    diagnosed(
        "no test folder, and a bad image",
        all_of(remove("test"), spoil("train/ant/0.png")),
        "data_root must hold test",
        "cannot be read: 1",
    ),
    diagnosed(
        "pipes and loops",
        all_of(pipe("train/ant/a.png"), link("train/ant/loop", "..")),
        "no regular file 1",
        "linked folder 1",
    ),
]
