"""What this user may not change, read or delete: said by name, and never the end of what is whole."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ffvt.cli import main
from ffvt.train.checkpoint import checkpoints, is_whole, load_checkpoint
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from tests.hostile.case import Case
from tests.hostile.forging import OPTIONS, copied_run, newest, reseal, with_json
from tests.hostile.places import as_nobody, give_to_nobody, immutable, open_folder
from tests.hostile.resume import warnings

MORE = {"resume": "auto", "num_steps": 10}


def run_with_an_old_checkpoint(folder: Path) -> Path:
    """A copy of the run whose best is its newest, so that its oldest is to be deleted when it goes on."""
    run = copied_run(folder)
    state = json.loads((newest(run) / "state.json").read_text())
    for key, value in (("best_step", 4), ("best", state["last"])):
        with_json("state.json", key, value)(newest(run))
    reseal(newest(run))
    return run


def options(place: Path, **changes: Any) -> TrainOptions:
    return TrainOptions(**{**OPTIONS, "output_dir": str(place), **changes})


def undeletable(*names: str) -> Callable[[Path], object]:
    """Goes on from a run whose oldest checkpoint cannot be deleted, twice: it is told once by name."""

    def attempt(folder: Path) -> None:
        run = run_with_an_old_checkpoint(folder)
        with immutable(*(run / "step-00000002" / name for name in names)), warnings() as told:
            first = train(options(folder, **MORE))
            checked(first, 10, told)
            assert "step-00000002" in " ".join(text for text in told if "cannot be deleted" in text), told
            told.clear()
            second = train(options(folder, **{**MORE, "num_steps": 14}))
            checked(second, 14, told)

    return attempt


def checked(result: Any, step: int, told: list[str]) -> None:
    """The last checkpoint is written, best/ is what the run says it is, and the trouble is told once at most."""
    assert not [text for text in told if "could not be written" in text], told
    assert len([text for text in told if "cannot be deleted" in text]) <= 1, told
    assert load_checkpoint(result.folder / "last").facts["step"] == step
    assert load_checkpoint(result.folder / "best").facts["top1"] == result.best.top1


def immutable_leftover(folder: Path) -> None:
    run = copied_run(folder)
    (run / ".step-00000001.old.1").mkdir()
    (run / ".step-00000001.old.1" / "state.json").touch()
    with immutable(run / ".step-00000001.old.1" / "state.json"), warnings() as told:
        checked(train(options(folder, **MORE)), 10, told)
        assert ".step-00000001.old.1" in " ".join(told)


def immutable_when_overwritten(folder: Path) -> None:
    """The new run does not take the earlier one's checkpoint for its own."""
    run = copied_run(folder)
    with immutable(run / "step-00000002" / "model.safetensors"), warnings():
        train(options(folder, overwrite=True, num_steps=1))
        assert [path.name for path in checkpoints(run)] == ["step-00000001"]


def immutable_run(folder: Path) -> None:
    run = copied_run(folder)
    with immutable(run):
        try:
            train(options(folder, **MORE))
        finally:
            assert is_whole(newest(run))


def other_users(change: Callable[[Path], object], **given: Any) -> Callable[[Path], object]:
    """As a user without rights in a folder of that user's, where `change` has put something of root's."""

    def attempt(folder: Path) -> None:
        with open_folder() as place:
            run = run_with_an_old_checkpoint(place)
            give_to_nobody(place)
            change(run)
            with as_nobody(), warnings() as told:
                result = train(options(place, **{**MORE, **given}))
                checked(result, 10, told)

    return attempt


def protected(run: Path) -> None:
    """Its owner protects a checkpoint; it must stay, and whole."""
    (run / "step-00000002").chmod(0o555)


def protected_stays(folder: Path) -> None:
    with open_folder() as place:
        run = run_with_an_old_checkpoint(place)
        give_to_nobody(place)
        protected(run)
        with as_nobody(), warnings() as told:
            train(options(place, **MORE))
        assert is_whole(run / "step-00000002")
        assert len([text for text in told if "step-00000002: it is write-protected" in text]) == 1, told
        (run / "step-00000002").chmod(0o755)


def of_root(path: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        for found in (run / path, *(run / path).glob("*")):
            os.chown(found, 0, 0)
            found.chmod(0o755 if found.is_dir() else 0o644)

    return change


def forbidden(path: str, mode: int = 0) -> Callable[[Path], object]:
    return lambda run: (run / path).chmod(mode)


def output_of_root(folder: Path) -> None:
    with open_folder() as place:
        place.chmod(0o755)
        with as_nobody():
            train(options(place / "out"))


def lock_of_root(folder: Path) -> None:
    with open_folder() as place:
        (place / ".run.lock").touch(0o600)
        with as_nobody():
            train(options(place))


def read_by_another(folder: Path) -> None:
    """A checkpoint of another user in a folder that cannot be written is loaded."""
    with open_folder() as place:
        run = copied_run(place)
        subprocess.run(["chmod", "-R", "a-w", str(place)], check=True)
        with as_nobody():
            assert load_checkpoint(run).facts["step"] in (2, 4)
        subprocess.run(["chmod", "-R", "u+w", str(place)], check=True)


def unreadable_checkpoint(folder: Path) -> None:
    with open_folder() as place:
        run = copied_run(place)
        (newest(run) / "model.safetensors").chmod(0)
        with as_nobody():
            load_checkpoint(newest(run))


def figure_of_root(folder: Path) -> None:
    with open_folder() as place:
        run = copied_run(place)
        (place / "a").mkdir(0o755)
        with as_nobody():
            assert main(["plot", str(run), "--output", str(place / "a" / "x.png")]) == 1
        assert not list((place / "a").iterdir())


CASES = [
    Case("permissions", "an old checkpoint that is immutable", undeletable(""), None),
    Case(
        "permissions",
        "a file of an old checkpoint that is immutable",
        undeletable("model.safetensors"),
        None,
        slow=True,
    ),
    Case("permissions", "two files of it", undeletable("state.json", "SHA256SUMS"), None, slow=True),
    Case("permissions", "a leftover that is immutable", immutable_leftover, None),
    Case("permissions", "an immutable checkpoint, overwritten", immutable_when_overwritten, None),
    Case("permissions", "an immutable run", immutable_run, "Operation not permitted"),
    Case("permissions", "an old checkpoint that its owner protects", protected_stays, None),
    Case("permissions", "a protected checkpoint, run goes on", other_users(protected), None, slow=True),
    Case("permissions", "an old checkpoint of root's", other_users(of_root("step-00000002")), None, slow=True),
    Case(
        "permissions", "a file of root's in an old checkpoint", other_users(of_root("step-00000002/state.json")), None
    ),
    Case("permissions", "the newest checkpoint of root's", other_users(of_root("step-00000004")), None, slow=True),
    Case(
        "permissions",
        "a newest that cannot be read",
        other_users(forbidden("step-00000004/state.json")),
        None,
        slow=True,
    ),
    Case("permissions", "a newest that cannot be entered", other_users(forbidden("step-00000004")), None, slow=True),
    Case("permissions", "a log that cannot be written", other_users(forbidden("log.jsonl", 0o444)), "log.jsonl"),
    Case("permissions", "a run that cannot be written", other_users(forbidden("", 0o555)), "Permission denied"),
    Case("permissions", "output_dir of root's", output_of_root, "out"),
    Case("permissions", "a lock of root's", lock_of_root, ".run.lock"),
    Case("permissions", "a checkpoint of another user, read-only", read_by_another, None),
    Case("permissions", "a checkpoint that cannot be read", unreadable_checkpoint, "model.safetensors"),
    Case("permissions", "a figure into a folder of root's", figure_of_root, None),
]
