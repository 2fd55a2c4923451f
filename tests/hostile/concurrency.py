"""Two writers of one run, whatever it is called by: one is refused, and readers never see half of anything."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ffvt.files import new_folder, point, write_whole
from ffvt.train.checkpoint import load_checkpoint
from ffvt.train.engine import train
from ffvt.train.lock import only_writer
from ffvt.train.options import TrainOptions
from tests.helpers import SMALL
from tests.hostile.case import Case
from tests.hostile.forging import OPTIONS, copied_run

ONE_STEP = {**SMALL, "num_steps": 1, "warmup_steps": 0, "name": "run"}


def once(folder: Path, **changes: Any) -> Path:
    return train(TrainOptions(**{**ONE_STEP, "output_dir": str(folder), **changes})).folder


@contextmanager
def other_process(run: Path) -> Iterator[int]:
    """A process that has the lock of a run."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with only_writer(run):
                os.write(writing, b"x")
                signal.pause()
        finally:
            os._exit(1)
    try:
        os.read(reading, 1)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)


@contextmanager
def other_thread(run: Path) -> Iterator[None]:
    """A thread that has the lock of a run."""
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with only_writer(run):
            held.set()
            done.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    try:
        yield
    finally:
        done.set()
        thread.join()


def while_held(holder: Callable, prepare: Callable[[Path], Any], **changes: Any) -> Callable[[Path], object]:
    """Trains while the lock of folder/run is held; `changes` name that folder in another way."""

    def attempt(folder: Path) -> None:
        prepare(folder)
        given = {name: str(folder / value) if name == "output_dir" else value for name, value in changes.items()}
        with holder(folder / "run"):
            once(folder, **given)

    return attempt


def folder_and_alias(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "alias").symlink_to("run")


def alias_of_the_parent(folder: Path) -> None:
    (folder / "near").symlink_to(folder)


def deeper(folder: Path) -> None:
    (folder / "a").mkdir()


def working_folder(folder: Path) -> None:
    before = os.getcwd()
    os.chdir(folder)
    try:
        with other_process(folder / "run"):
            train(TrainOptions(**ONE_STEP, output_dir="."))
    finally:
        os.chdir(before)


def freed_by_a_kill(folder: Path) -> None:
    with other_process(folder / "run"):
        pass
    once(folder)


def freed_by_an_error(folder: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="resume must be auto"):
            once(folder, resume="nowhere")
    once(folder)


def freed_by_an_end(folder: Path) -> None:
    once(folder)
    once(folder, overwrite=True)


def not_freed_by_a_refused_thread(folder: Path) -> None:
    """A second attempt of this process must not take the lock away from the first, as closing its file would."""
    with only_writer(folder / "run"):
        with pytest.raises(ValueError, match="another thread"):
            once(folder)
        child = os.fork()
        if child == 0:
            try:
                with only_writer(folder / "run"):
                    os._exit(0)
            except ValueError:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def two_runs_beside_each_other(folder: Path) -> None:
    with other_process(folder / "other"), other_thread(folder / "third"):
        once(folder)


def loaded_while_another_writes(folder: Path) -> None:
    run = copied_run(folder)
    with other_process(run):
        assert load_checkpoint(run).facts["step"] in (2, 4)


def resumed_elsewhere_while_another_writes(folder: Path) -> None:
    run = copied_run(folder)
    with other_process(run):
        options = {**OPTIONS, "output_dir": str(folder), "name": "other", "resume": str(run), "num_steps": 5}
        assert load_checkpoint(train(TrainOptions(**options)).folder).facts["step"] in (2, 4, 5)


def reader(write: Callable[[Path, int], None], read: Callable[[Path], set[int]]) -> Callable[[Path], object]:
    """Reads while another thread writes 60 times: what is read is always of one write."""

    def attempt(folder: Path) -> None:
        write(folder, 0)
        thread = threading.Thread(target=lambda: [write(folder, number) for number in range(1, 60)])
        thread.start()
        reads = 0
        while thread.is_alive():
            assert len(read(folder)) == 1
            reads += 1
        thread.join()
        assert reads > 0
        assert read(folder) == {59}

    return attempt


def write_file(folder: Path, number: int) -> None:
    write_whole(folder / "a", f"{number}\n".encode() * 5000)


def read_file(folder: Path) -> set[int]:
    return set(map(int, (folder / "a").read_text().split()))


def write_folder(folder: Path, number: int) -> None:
    with new_folder(folder / f"step-{number}") as fresh:
        for name in "ab":
            (fresh / name).write_text(str(number))
    point(folder / "last", folder / f"step-{number}")


def read_folder(folder: Path) -> set[int]:
    step = (folder / "last").resolve()
    return {int((step / name).read_text()) for name in "ab"}


PROCESS, THREAD = "another process writes this run", "another thread of this process writes this run"
CASES = [
    *(
        Case("concurrency", f"{who}: {what}", while_held(holder, prepare, **changes), said)
        for who, holder, said in (("a process", other_process, PROCESS), ("a thread", other_thread, THREAD))
        for what, prepare, changes in (
            ("the same name", Path.exists, {}),
            ("a link to its folder", folder_and_alias, {"name": "alias"}),
            ("a link to the folder above", alias_of_the_parent, {"output_dir": "near"}),
            ("a way with dots", deeper, {"output_dir": "a/../a/.."}),
            ("a name with dots", Path.exists, {"name": "./run"}),
            ("to resume it", Path.exists, {"resume": "auto"}),
            ("to overwrite it", Path.exists, {"overwrite": True}),
        )
    ),
    Case("concurrency", "a process: a relative output_dir", working_folder, PROCESS),
    Case("concurrency", "a killed process frees the lock", freed_by_a_kill, None),
    Case("concurrency", "an error frees the lock", freed_by_an_error, None),
    Case("concurrency", "the end frees the lock", freed_by_an_end, None),
    Case("concurrency", "a refused thread does not free it", not_freed_by_a_refused_thread, None),
    Case("concurrency", "other runs beside it", two_runs_beside_each_other, None),
    Case("concurrency", "loaded while another writes", loaded_while_another_writes, None),
    Case("concurrency", "resumed elsewhere while another writes", resumed_elsewhere_while_another_writes, None),
    Case("concurrency", "a file read while it is written", reader(write_file, read_file), None),
    Case("concurrency", "a folder read while it is written", reader(write_folder, read_folder), None),
]
