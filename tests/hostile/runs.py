"""Run folders: names, locks, links and overlapping folders."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ffvt.cli import main
from ffvt.report.demo import RECIPE, run_demo
from ffvt.train.checkpoint import checkpoints, load_checkpoint
from ffvt.train.engine import train
from ffvt.train.options import LONGEST_NAME, TrainOptions
from ffvt.train.resume import LAUNCH_FILE, _noted_launch, find_start
from tests.helpers import SMALL
from tests.hostile.case import Case
from tests.hostile.forging import OPTIONS, copied_run

ONE_STEP = {**SMALL, "num_steps": 1, "warmup_steps": 0}


def run_once(folder: Path, **changes: Any) -> Path:
    """One step in folder/run; the run's folder."""
    return train(TrainOptions(**{**ONE_STEP, "output_dir": str(folder), "name": "run", **changes})).folder


def goes_on(run: Path) -> None:
    """Trains two steps more, from what the run has."""
    result = train(TrainOptions(**{**OPTIONS, "output_dir": str(run.parent), "resume": "auto", "num_steps": 6}))
    assert result.folder == run
    assert load_checkpoint(run / "last").facts["step"] == 6
    assert load_checkpoint(run / "best").facts["step"] in (2, 4, 6)


def named(name: str) -> Callable[[Path], object]:
    return lambda folder: TrainOptions(output_dir=str(folder), name=name)


def lock(put: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the place of the run's lock."""

    def attempt(folder: Path) -> None:
        put(folder / ".run.lock")
        run_once(folder)

    return attempt


def lock_that_is_a_link(folder: Path) -> None:
    (folder / "thesis.txt").write_text("mine")
    (folder / ".run.lock").symlink_to("thesis.txt")
    try:
        run_once(folder)
    finally:
        assert (folder / "thesis.txt").read_text() == "mine"
        assert not (folder / "run").exists()


def lock_with_content(folder: Path) -> None:
    (folder / ".run.lock").write_text("mine")
    run_once(folder)
    assert (folder / ".run.lock").read_text() == "mine"


def bound(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def overlapping(data_root: str = "", cache_dir: str = "", name: str = "run") -> Callable[[Path], object]:
    """A run in folder/out/run whose data or cache lies somewhere near; nothing may be made or renamed."""

    def attempt(folder: Path) -> None:
        (folder / "out" / "run" / "train" / "a").mkdir(parents=True)
        (folder / "alias").symlink_to(folder / "out")
        before = sorted(folder.rglob("*"))
        data = {"data_root": str(folder / data_root), "dataset": "imagefolder"} if data_root else {}
        cache = {"cache_dir": str(folder / cache_dir)} if cache_dir else {}
        try:
            run_once(folder / "out", name=name, **data, **cache)
        finally:
            assert sorted(folder.rglob("*")) == before

    return attempt


def default_data_root_of_partbirds(folder: Path) -> None:
    """PartBirds has no files, so that it does not matter where its data_root would be."""
    run_once(folder, data_root=str(folder / "run"))


def links(best: str | None, last: str | None) -> Callable[[Path], object]:
    """A run whose links lead elsewhere (None: are gone) goes on from its newest checkpoint."""

    def attempt(folder: Path) -> None:
        run = copied_run(folder)
        for name, target in (("best", best), ("last", last)):
            (run / name).unlink()
            if target is not None:
                (run / name).symlink_to(target)
        goes_on(run)
        assert (run / "last").readlink() == Path("step-00000006")

    return attempt


def folders_for_links(folder: Path) -> None:
    run = copied_run(folder)
    for name in ("best", "last"):
        (run / name).unlink()
        (run / name).mkdir()
        (run / name / "mine.txt").write_text("mine")
    goes_on(run)
    assert [path.read_text() for path in run.glob("copied-*/mine.txt")] == ["mine", "mine"]


def files_for_links(folder: Path) -> None:
    run = copied_run(folder)
    for name in ("best", "last"):
        (run / name).unlink()
        (run / name).write_text("mine")
    goes_on(run)
    assert [path.read_text() for path in run.glob("copied-*")] == ["mine", "mine"]


def folder_for_the_next_link(folder: Path) -> None:
    run = copied_run(folder)
    (run / ".last.new" / "deep").mkdir(parents=True)
    goes_on(run)


def leftovers(folder: Path) -> None:
    run = copied_run(folder)
    for name in (".step-00000001.old", ".step-00000001.old.7", ".step-00000006.new"):
        (run / name / "deep").mkdir(parents=True)
    goes_on(run)
    assert not list(run.glob(".step-*"))


def leftover_links(folder: Path) -> None:
    run = copied_run(folder)
    (folder / "precious").mkdir()
    (folder / "precious" / "thesis.txt").write_text("mine")
    (run / ".step-00000001.old").symlink_to(folder / "precious")
    (run / ".step-00000006.new").symlink_to(folder / "precious")
    goes_on(run)
    assert (folder / "precious" / "thesis.txt").read_text() == "mine"


def checkpoint_that_is_a_link(folder: Path) -> None:
    """An old checkpoint that is to be deleted leads outside: what it leads to stays."""
    run = copied_run(folder)
    (run / "step-00000002").rename(folder / "precious")
    (run / "step-00000002").symlink_to(folder / "precious")
    (run / "step-00000001").symlink_to(folder / "precious")
    (run / "best").unlink()
    goes_on(run)
    assert load_checkpoint(folder / "precious").facts["step"] == 2


def checkpoint_that_is_a_file(folder: Path) -> None:
    run = copied_run(folder)
    for number in (1, 3, 5):
        (run / f"step-0000000{number}").write_text("mine")
    goes_on(run)
    kept = [path for path in run.rglob("*-step-0000000[135]*") if path.is_file()]
    assert {path.read_text() for path in (*kept, *run.glob("step-0000000[135]"))} == {"mine"}


def overwritten_link_of_a_log(folder: Path) -> None:
    run = copied_run(folder)
    (run / "log.jsonl").rename(folder / "precious.jsonl")
    before = (folder / "precious.jsonl").read_bytes()
    (run / "log.jsonl").symlink_to(folder / "precious.jsonl")
    run_once(folder, overwrite=True)
    assert (folder / "precious.jsonl").read_bytes() == before


def launch(put: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else in the place of .launch, under torchrun: it is no restart, and nothing is followed."""

    def attempt(folder: Path) -> None:
        run = copied_run(folder)
        (folder / "thesis.txt").write_text("mine")
        put(run / LAUNCH_FILE)
        os.environ["TORCHELASTIC_RUN_ID"] = "x"
        try:
            assert not find_start(TrainOptions(**OPTIONS, output_dir=str(folder)), run).is_restart
            assert len(_noted_launch(run)) <= 10000
            run_once(folder, overwrite=True)
        finally:
            del os.environ["TORCHELASTIC_RUN_ID"]
            assert (folder / "thesis.txt").read_text() == "mine"

    return attempt


def long_launch(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**40)


def name_of_a_symlinked_run(folder: Path) -> None:
    """Kept under a number of its own, the earlier run is the folder, not the link to it."""
    (folder / "real").mkdir()
    (folder / "run").symlink_to("real")
    assert run_once(folder) == folder / "real"
    run_once(folder, seed=1)
    assert load_checkpoint(folder / "real.1").facts["options"]["seed"] == 42
    assert load_checkpoint(folder / "run").facts["options"]["seed"] == 1


def name_of_a_file(folder: Path) -> None:
    (folder / "run").write_text("mine")
    try:
        run_once(folder)
    finally:
        assert (folder / "run").read_text() == "mine"


def link_to_itself(folder: Path) -> None:
    (folder / "run").symlink_to("run")
    run_once(folder)


def resumed_from_itself_by_link(folder: Path) -> None:
    run = copied_run(folder)
    (folder / "alias").symlink_to(run)
    options = {**OPTIONS, "output_dir": str(folder), "resume": str(folder / "alias" / "last"), "num_steps": 6}
    assert train(TrainOptions(**options)).last.count == 300
    assert checkpoints(run)[0].name == "step-00000006"


def resumed_from_a_loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")
    run_once(folder, resume=str(folder / "loop"))


def demo(prepare: Callable[[Path], object]) -> Callable[[Path], object]:
    """The demo into a folder that is not one of its own: nothing is touched."""

    def attempt(folder: Path) -> None:
        prepare(folder / "place")
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        try:
            run_demo(folder / "place", RECIPE)
        finally:
            assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    return attempt


def with_report(path: Path) -> None:
    path.mkdir()
    (path / "report.html").write_text("<p>mine</p>")


def with_log(path: Path) -> None:
    path.mkdir()
    (path / "log.jsonl").write_text("mine")


def with_hidden(path: Path) -> None:
    path.mkdir()
    (path / ".git").mkdir()


def plot(output: str, content: bytes) -> Callable[[Path], object]:
    """`ffvt plot` onto a file of somebody's."""

    def attempt(folder: Path) -> None:
        run = copied_run(folder)
        (folder / output).write_bytes(content)
        status = main(["plot", str(run), "--output", str(folder / output)])
        assert (status, (folder / output).read_bytes()) == (1, content)

    return attempt


SPECIAL = {
    "a link to a file": lambda path: path.symlink_to("../thesis.txt"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "of a terabyte": long_launch,
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "empty": Path.touch,
}
CASES = [
    *(
        Case("run", f"name {shown}", named(name), "name must be")
        for shown, name in {
            "with escape codes": "\x1b]0;pwned\x07",
            "of two lines": "a\nb",
            "with a zero byte": "a\0b",
            "not UTF-8": "a\udcffb",
            "with letters that turn the line": "a\u202eb",
            "too long": "x" * (LONGEST_NAME + 1),
            "empty": "",
            "absolute": "/etc",
            "that leads outside": "../x",
            "that leads outside, deeper": "a/../../x",
            "of this folder": ".",
        }.items()
    ),
    *(
        Case("run", f"the lock is {what}", lock(put), ".run.lock")
        for what, put in {
            "a folder": Path.mkdir,
            "a FIFO": os.mkfifo,
            "a socket": bound,
            "a link to nowhere": lambda path: path.symlink_to("nowhere"),
            "a link to itself": lambda path: path.symlink_to(path.name),
        }.items()
    ),
    Case("run", "the lock is a link to a file", lock_that_is_a_link, ".run.lock"),
    Case("run", "the lock has content", lock_with_content, None),
    *(
        Case("run", f"{what} and the run overlap: {how}", overlapping(**places), named)
        for what, how, places, named in (
            ("data", "equal", {"data_root": "out/run"}, "data_root must be apart"),
            ("data", "inside of the run", {"data_root": "out/run/train"}, "data_root must be apart"),
            ("data", "the run inside", {"data_root": "out"}, "data_root must be apart"),
            ("data", "by a link", {"data_root": "alias/run"}, "data_root must be apart"),
            ("data", "by dots", {"data_root": "out/x/../run"}, "data_root must be apart"),
            ("cache", "equal", {"cache_dir": "out/run"}, "cache_dir must be apart"),
            ("cache", "inside of the run", {"cache_dir": "out/run/cache"}, "cache_dir must be apart"),
            ("cache", "the run inside", {"cache_dir": "out"}, "cache_dir must be apart"),
        )
    ),
    Case("run", "data_root of a set without files", default_data_root_of_partbirds, None),
    *(
        Case("run", f"best leads to {best}, last to {last}", links(best, last), None, slow=best in ("best", "last"))
        for best, last in ((None, None), ("nowhere", "nowhere"), ("best", "last"), ("last", "best"), ("/", "/etc"))
    ),
    Case("run", "folders in place of the links", folders_for_links, None),
    Case("run", "files in place of the links", files_for_links, None),
    Case("run", "a folder in place of the next link", folder_for_the_next_link, None),
    Case("run", "leftovers of a kill", leftovers, None),
    Case("run", "leftovers that are links", leftover_links, None),
    Case("run", "a checkpoint that is a link", checkpoint_that_is_a_link, None),
    Case("run", "checkpoints that are files", checkpoint_that_is_a_file, None),
    Case("run", "the log is a link, overwritten", overwritten_link_of_a_log, None),
    *(Case("run", f".launch is {what}", launch(put), None, slow=True) for what, put in SPECIAL.items()),
    Case("run", ".launch is a folder", launch(Path.mkdir), ".launch"),
    Case("run", ".launch is a FIFO", launch(os.mkfifo), ".launch"),
    Case("run", "the run is a link to a folder", name_of_a_symlinked_run, None),
    Case("run", "the run is a file", name_of_a_file, "run"),
    Case("run", "the run is a link to itself", link_to_itself, "run"),
    Case("run", "resumed through a link to itself", resumed_from_itself_by_link, None),
    Case("run", "resumed from a link that leads to itself", resumed_from_a_loop, "resume must be"),
    Case("report", "demo into a trained run", demo(lambda path: shutil.move(copied_run(path.parent), path)), "best"),
    Case("report", "demo into a folder with a report", demo(with_report), "report.html"),
    Case("report", "demo into a folder with a log", demo(with_log), "log.jsonl"),
    Case("report", "demo into a folder with a hidden one", demo(with_hidden), ".git"),
    Case("report", "demo in place of a file", demo(lambda path: path.write_text("mine")), "place"),
    Case("report", "demo in place of a link to nowhere", demo(lambda path: path.symlink_to("nowhere")), "place"),
    Case("report", "plot onto a log", plot("a.jsonl", b'{"kind": "run"}\n'), None),
    Case("report", "plot onto a script", plot("a.py", b"import ffvt\n"), None),
    Case("report", "plot onto a text named .png", plot("a.png", b"my notes\n"), None),
    Case("report", "plot onto a program named .svg", plot("a.svg", b"\x7fELF"), None),
]
