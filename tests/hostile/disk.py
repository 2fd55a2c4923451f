"""Disks that are full, too small, read-only or out of inodes: said with a reason, and nothing whole is lost."""

from __future__ import annotations

import contextlib
import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

from ffvt.cli import main
from ffvt.files import new_folder, write_whole
from ffvt.train import engine
from ffvt.train.checkpoint import checkpoints, load_checkpoint, newest_whole
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from ffvt.train.step import training_step
from tests.helpers import flags
from tests.hostile.case import Case
from tests.hostile.forging import OPTIONS, copied_run, newest
from tests.hostile.places import disk, fill, largest_file

MEGABYTE = 1 << 20


def options(place: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(**{**OPTIONS, "output_dir": str(place), **changes})


def full(leave: int, **changes: Any) -> Callable[[Path], object]:
    """Trains on a disk that is full from the start."""

    def attempt(folder: Path) -> None:
        with disk(folder, MEGABYTE) as place:
            fill(place, leave)
            try:
                train(options(place, **changes))
            finally:
                assert not list(place.rglob("step-*"))
                assert not list(place.rglob(".step-*"))
                assert not (place / "run" / "best").exists()

    return attempt


def claims_nothing(folder: Path) -> None:
    said = io.StringIO()
    with disk(folder, MEGABYTE) as place:
        fill(place, 4096)
        with contextlib.redirect_stdout(said):
            status = main(["train", *flags(options(place))])
    assert status == 1
    assert said.getvalue() == ""


def full_on_the_way(folder: Path) -> None:
    """One checkpoint fits, the last does not: the run fails, the first is whole, and so is best."""
    size = sum(path.stat().st_size for path in newest(copied_run(folder)).iterdir())
    with disk(folder, int(1.7 * size)) as place:
        try:
            train(options(place))
        finally:
            assert [load_checkpoint(path).facts["step"] for path in checkpoints(place / "run")] == [2]
            assert load_checkpoint(place / "run" / "best").facts["step"] == 2
            assert not list(place.rglob(".step-*"))


def freed_before_the_end(folder: Path) -> None:
    with disk(folder, 4 * MEGABYTE) as place:
        filler = fill(place, 50_000)

        def step(state: Any, *given: Any) -> Any:
            if state.step == 3:
                filler.unlink(missing_ok=True)
            return training_step(state, *given)

        with mock.patch.object(engine, "training_step", step):
            result = train(options(place))
        assert result.last.count == 300
        assert [path.name for path in checkpoints(place / "run")] == ["step-00000004"]
        assert load_checkpoint(place / "run").facts["step"] == 4


def full_when_resumed(folder: Path) -> None:
    with disk(folder, 4 * MEGABYTE) as place:
        run = copied_run(place)
        before = newest(run)
        fill(place)
        try:
            train(options(place, resume="auto", num_steps=6))
        finally:
            assert newest_whole(run) == before
            assert load_checkpoint(run / "best").facts["step"] <= 4


def full_when_overwritten(folder: Path) -> None:
    with disk(folder, 4 * MEGABYTE) as place:
        run_named_otherwise = copied_run(place).rename(place / "other")
        fill(place)
        try:
            train(options(place))
        finally:
            assert load_checkpoint(run_named_otherwise).facts["step"] in (2, 4)


def read_only(folder: Path) -> None:
    with disk(folder, MEGABYTE) as place:
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        train(options(place))


def loaded_from_a_read_only_disk(folder: Path) -> None:
    with disk(folder, 4 * MEGABYTE) as place:
        run = copied_run(place)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        assert load_checkpoint(run).facts["step"] in (2, 4)


def resumed_from_a_read_only_disk(folder: Path) -> None:
    with disk(folder, 4 * MEGABYTE) as place:
        run = copied_run(place)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        result = train(options(folder, resume=str(run), num_steps=5))
        assert load_checkpoint(result.folder / "last").facts["step"] == 5


def no_inodes(folder: Path) -> None:
    with disk(folder, 4 * MEGABYTE, ",nr_inodes=6") as place:
        train(options(place))


def limited(folder: Path) -> None:
    with largest_file(20_000):
        try:
            train(options(folder))
        finally:
            assert not list(folder.rglob("*step-*"))


def limited_later(folder: Path) -> None:
    run = copied_run(folder)
    with largest_file(20_000):
        try:
            train(options(folder, resume="auto", num_steps=6))
        finally:
            assert load_checkpoint(run / "last").facts["step"] == 4


def picture(command: str) -> Callable[[Path], object]:
    """A picture of a command over an older one, on a full disk: the older one stays."""

    def attempt(folder: Path) -> None:
        run = copied_run(folder)
        Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(folder / "x.png")
        old = (folder / "x.png").read_bytes()
        with disk(folder, MEGABYTE) as place:
            (place / "out.png").write_bytes(old)
            fill(place)
            given = ["--checkpoint", str(run / "last"), str(folder / "x.png")] if command == "visualize" else [str(run)]
            status = main([command, *given, "--output", str(place / "out.png")])
            assert (status, (place / "out.png").read_bytes()) == (1, old)
            assert sorted(path.name for path in place.iterdir()) == ["filler", "out.png"]

    return attempt


def whole_file(folder: Path) -> None:
    with disk(folder, MEGABYTE) as place:
        (place / "a").write_bytes(b"old")
        fill(place)
        try:
            write_whole(place / "a", b"new" * 9999)
        finally:
            assert (place / "a").read_bytes() == b"old"
            assert len(list(place.iterdir())) == 2


def whole_folder(folder: Path) -> None:
    with disk(folder, MEGABYTE) as place:
        (place / "a").mkdir()
        (place / "a" / "old").touch()
        fill(place)
        try:
            with new_folder(place / "a") as fresh:
                (fresh / "new").write_bytes(b"new" * 9999)
        finally:
            assert sorted(path.name for path in place.rglob("*")) == ["a", "filler", "old"]


def below_a_file(folder: Path) -> None:
    (folder / "out").write_text("mine")
    try:
        train(options(folder / "out"))
    finally:
        assert (folder / "out").read_text() == "mine"


CASES = [
    Case("disk", "full from the start", full(0), "No space left on device"),
    Case("disk", "4 kB left from the start", full(4096), "the checkpoint of step 4 could not be written"),
    Case("disk", "60 kB left from the start", full(60_000), "the checkpoint of step 4 could not be written", slow=True),
    Case("disk", "4 kB left, one save at the end", full(4096, save_every=100), "the checkpoint of step 4", slow=True),
    Case("disk", "4 kB left, a part split off", full(4096, val_split=0.1), "the checkpoint of step 4", slow=True),
    Case("disk", "a full disk and the summary", claims_nothing, None),
    Case("disk", "full after the first checkpoint", full_on_the_way, "the checkpoint of step 4 could not be written"),
    Case("disk", "full, and freed before the end", freed_before_the_end, None),
    Case("disk", "full when a run is resumed", full_when_resumed, "the checkpoint of step 6 could not be written"),
    Case("disk", "full beside another run", full_when_overwritten, "No space left on device"),
    Case("disk", "read-only", read_only, "Read-only file system"),
    Case("disk", "a checkpoint on a read-only disk, loaded", loaded_from_a_read_only_disk, None),
    Case("disk", "a checkpoint on a read-only disk, resumed", resumed_from_a_read_only_disk, None),
    Case("disk", "out of inodes", no_inodes, "No space left on device"),
    Case("disk", "files of 20 kB at most", limited, "the checkpoint of step 4 could not be written"),
    Case(
        "disk",
        "files of 20 kB at most, resumed",
        limited_later,
        "the checkpoint of step 6 could not be written",
        slow=True,
    ),
    Case("disk", "visualize over an old picture, full", picture("visualize"), None),
    Case("disk", "plot over an old picture, full", picture("plot"), None),
    Case("disk", "a file that is replaced, full", whole_file, "No space left on device"),
    Case("disk", "a folder that is replaced, full", whole_folder, "No space left on device"),
    Case("disk", "output_dir is a file", below_a_file, "out"),
]
