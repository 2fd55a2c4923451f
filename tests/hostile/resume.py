"""Resuming from what is forged, from other data, and into other options: refused by file and key, or told."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ffvt.train.checkpoint import load_checkpoint
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from tests.helpers import SMALL
from tests.hostile.case import Case
from tests.hostile.checkpoints import BROKEN_JSON, TENSORS, shown
from tests.hostile.forging import (
    ABSENT,
    copied_run,
    newest,
    reseal,
    resume,
    with_bytes,
    with_json,
    with_tensors,
)

STATE = {  # key -> bad values
    "step": [ABSENT, -5, 2.5, "4", None, True, 10**30],
    "samples": [ABSENT, -1, 10**30, "x", 1],
    "skipped": [-1, 5],
    "skipped_in_a_row": [-1, 3],
    "best_step": [ABSENT, "../../etc", -1, 0, 9, 10**9],
    "evaluated_step": [-2, 7, None],
    "cpu_products": ["fp16", "auto", 3, []],
    "world_size": [ABSENT, 0, -1, 10**9, 2, "1"],
    "schedule_steps": [ABSENT, -3, 5, "4"],
    "scaler": [None, [], {"scale": 0}, {"scale": 65536.0}, {"scale": -1.0}, {"scal": 1.0}],
    "averaged_steps": [-1, 9, 2.5],
    "meter": [ABSENT, [], [0.0] * 4, [0.0] * 7, [0] * 10**6, [-1.0] * 5, ["0"] * 5, None],
    "last": [{}, 3, "x", None],
    "last.top1": [-0.5, 1.5, "1", ABSENT],
    "last.count": [0, -1],
    "last.extra": [1],
    "best": [None, []],
    "best.selection": [{}, 4],
    "best.selection.layer_hit_rates": [[], "x", [2.0], [None]],
    "generators": [[], None, [{}], [{}] * 3],
    "generators.0.python": [[], [3, [1, 2], None], [2, [1] * 625, None], [3, [1] * 624 + [9999], None]],
    "generators.0.numpy": [
        ["MT19937", [1] * 623, 0, 0, 0.0],
        ["MT19937", [1] * 624, 10**6, 0, 0.0],
        ["PCG64", [1] * 624, 0, 0, 0.0],
        ["MT19937", [-1] * 624, 0, 0, 0.0],
        ["MT19937", [2**32] * 624, 0, 0, 0.0],
    ],
    "surprise": [1],
}
MODEL_TENSORS = [name for name in TENSORS if name != "an empty file"]


def forged(forge: Callable[[Path], Any]) -> Callable[[Path], object]:
    """Resumes a run whose newest checkpoint is forged."""

    def attempt(folder: Path) -> None:
        run = copied_run(folder)
        forge(newest(run))
        reseal(newest(run))
        resume(run)

    return attempt


def named(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Changes the first tensor of state.safetensors whose name has a part in it."""

    def apply(tensors: dict[str, torch.Tensor]) -> None:
        found = next(key for key in tensors if name in key)
        tensors[found] = change(tensors[found])

    return with_tensors("state.safetensors", apply)


def renamed(name: str, to: str) -> Callable[[Path], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        found = next(key for key in tensors if name in key)
        tensors[to] = tensors.pop(found)

    return with_tensors("state.safetensors", apply)


def without(name: str) -> Callable[[Path], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if name in key]:
            del tensors[key]

    return with_tensors("state.safetensors", apply)


STATE_TENSORS = {
    "int32 momentum": (named("exp_avg", torch.Tensor.int), "exp_avg"),
    "complex momentum": (named("exp_avg", lambda t: t.to(torch.complex64)), "exp_avg"),
    "bool momentum": (named("exp_avg", torch.Tensor.bool), "exp_avg"),
    "momentum of another shape": (named("exp_avg", lambda t: t.flatten()[:1].clone()), "exp_avg"),
    "one momentum missing": (without("optimizer/norm.weight/exp_avg_sq"), "state.safetensors"),
    "a parameter's state missing": (without("optimizer/norm.weight/"), "state.safetensors"),
    "all state of the optimiser missing": (without("optimizer/"), "state.safetensors"),
    "state of a parameter that is none": (renamed("optimizer/norm.weight/exp_avg", "optimizer/x/exp_avg"), "optimiser"),
    "state of another kind": (renamed("optimizer/norm.weight/exp_avg", "optimizer/norm.weight/x"), "optimizer"),
    "a step of -5": (named("/step", lambda t: t - 100), "/step"),
    "a step of NaN": (named("/step", lambda t: t * float("nan")), "/step"),
    "a step of a million": (named("/step", lambda t: t + 1e6), "/step"),
    "a step that is a vector": (named("/step", lambda t: t.expand(3).clone()), "/step"),
    "trained weights as int32": (named("model/head.bias", torch.Tensor.int), "head.bias"),
    "trained weights of another shape": (named("model/head.bias", lambda t: t[:2].clone()), "head.bias"),
    "a trained weight missing": (without("model/head.bias"), "head.bias"),
    "a generator of three bytes": (named("generator/0/cpu", lambda t: t[:3].clone()), "generators"),
    "a generator of floats": (named("generator/0/cpu", torch.Tensor.float), "generators"),
    "a generator of ones": (named("generator/0/cpu", torch.ones_like), "generators"),
    "no generator": (without("generator/"), "generators"),
    "tensors that nobody takes": (renamed("generator/0/cpu", "surprise/0"), "surprise"),
    "no safetensors": (with_bytes("state.safetensors", lambda content: b"PK" + content), "state.safetensors"),
    "empty": (with_bytes("state.safetensors", lambda content: b""), "state.safetensors"),
}


def of_another_step(folder: Path) -> None:
    """The whole checkpoint of step 2 under the name of step 4."""
    run = copied_run(folder)
    shutil.rmtree(newest(run))
    shutil.copytree(run / "step-00000002", newest(run))
    resume(run)


def refused_restore_changes_nothing(folder: Path) -> None:
    run = copied_run(folder)
    state = resume(run)
    before = {name: value.clone() for name, value in state.model.state_dict().items()}
    tensors = {"generator/0/cpu": torch.get_rng_state(), "optimizer/norm.weight/exp_avg": torch.zeros(1)}
    model = {name: torch.zeros_like(value) for name, value in before.items()}
    plain = state.capture()[2]
    try:
        state.restore(model, tensors, plain)
    except ValueError:
        assert all(torch.equal(value, before[name]) for name, value in state.model.state_dict().items())
        return
    raise AssertionError("was not refused")


def pictures(folder: Path) -> Path:
    """An ImageFolder of 3 classes: 4 pictures to train on and 2 to test on, of each."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for label, name in enumerate("abc"):
            (folder / "set" / split / name).mkdir(parents=True)
            for number in range(count):
                path = folder / "set" / split / name / f"{number}.png"
                Image.fromarray(draw.integers(0, 256, (64, 64 + label, 3), np.uint8)).save(path)
    return folder / "set"


def small(folder: Path, **changes: Any) -> TrainOptions:
    options = {**SMALL, "dataset": "imagefolder", "data_root": str(folder / "set"), "output_dir": str(folder)}
    return TrainOptions(**{**options, "num_steps": 1, "warmup_steps": 0, "name": "run", **changes})


@contextmanager
def warnings() -> Iterator[list[str]]:
    """The warnings of the block."""
    told: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.WARNING:
                told.append(record.getMessage())

    handler = Keep()
    logging.getLogger("ffvt").addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger("ffvt").removeHandler(handler)


def changed_data(change: Callable[[Path], Any], said: str, with_cache: bool = False) -> Callable[[Path], object]:
    """Trains, changes the data set, resumes: one warning tells what changed, none where nothing has.

    Where something has, what `strict` says to it is the case's error.
    """

    def attempt(folder: Path) -> None:
        pictures(folder)
        first = small(folder, cache_dir=str(folder / "cache") if with_cache else "")
        train(first)
        again = replace(first, num_steps=2, resume="auto")
        root = change(Path(first.data_root))
        if isinstance(root, Path) and root.is_dir():
            again = replace(again, data_root=str(root))
        with warnings() as told:
            train(again)
        about = [text for text in told if "with other data" in text]
        assert len(about) == bool(said), told
        assert said in "".join(about), told
        if said:
            raise ValueError(refusal_when_strict(first, folder))

    return attempt


def refusal_when_strict(first: TrainOptions, folder: Path) -> str:
    """What --strict says to the first checkpoint of a run whose data has changed."""
    os.rename(folder / "run" / "step-00000001", folder / "step1")
    try:
        train(replace(first, name="other", strict=True, resume=str(folder / "step1")))
    except ValueError as error:
        return str(error)
    return "nothing"


def rewrite(path: Path, size: int) -> None:
    Image.new("RGB", (size, size), "red").save(path)


def swap_classes(root: Path) -> None:
    for split in ("train", "test"):
        (root / split / "a").rename(root / split / "x")
        (root / split / "b").rename(root / split / "a")
        (root / split / "x").rename(root / split / "b")


def moved(root: Path) -> Path:
    return root.rename(root.parent / "elsewhere")


def touched(root: Path) -> None:
    for path in root.rglob("*.png"):
        os.utime(path, (1, 1))


DATA = {
    "a picture deleted": (lambda root: (root / "train/a/0.png").unlink(), "train: 12 -> 11 images"),
    "a picture added": (lambda root: rewrite(root / "train/a/9.png", 64), "train: 12 -> 13 images"),
    "a picture replaced": (lambda root: rewrite(root / "train/a/0.png", 80), "train: 12 images as before, but other"),
    "a picture renamed": (
        lambda root: (root / "train/a/0.png").rename(root / "train/a/7.png"),
        "train: 12 images as before",
    ),
    "two classes swapped": (swap_classes, "train: 12 images as before"),
    "a test picture deleted": (lambda root: (root / "test/c/1.png").unlink(), "test: 6 -> 5 images"),
    "a test picture replaced": (lambda root: rewrite(root / "test/c/1.png", 80), "test: 6 images as before"),
    "a picture moved to another class": (
        lambda root: (root / "train/a/0.png").rename(root / "train/b/9.png"),
        "train: 12 images as before",
    ),
    "the data set moved": (moved, ""),
    "only times changed": (touched, ""),
    "nothing changed": (lambda root: None, ""),
}


def same_size_in_a_cache(root: Path) -> None:
    path = root / "train/a/0.png"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\x00")  # the last byte of a checksum, which no decoder needs


def old_record(folder: Path) -> None:
    """A checkpoint of a version that kept no record of the data, nor of newer options, resumes without a word."""
    run = copied_run(folder)
    for forge in (with_json("training.json", "data", ABSENT), with_json("training.json", "options.strict", ABSENT)):
        forge(newest(run))
    with_json("state.json", "optimizer_tensors", ABSENT)(newest(run))
    reseal(newest(run))
    with warnings() as told:
        resume(run, num_steps=4)
    assert told == []


def strict(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: resume(copied_run(folder), strict=True, **{"num_steps": 4, **changes})


def strict_lets_pass(folder: Path) -> None:
    neutral = {"workers": 1, "save_every": 1, "log_every": 3, "data_root": "/nowhere", "cache_dir": "x", "prefetch": 4}
    assert resume(copied_run(folder), strict=True, num_steps=4, **neutral).step == 4


def weights_that_are_gone(folder: Path) -> None:
    assert resume(copied_run(folder), pretrained_dir=str(folder / "gone.npz")).step == 4


def weights_that_are_gone_in_a_new_run(folder: Path) -> None:
    train(TrainOptions(**SMALL, output_dir=str(folder), pretrained_dir=str(folder / "gone.npz")))


def whole_run_goes_on(folder: Path) -> None:
    run = copied_run(folder)
    assert resume(run).samples == 32
    assert load_checkpoint(run / "last").facts["step"] == 4


CASES = [
    *(
        Case("resume", f"state.json {key}: {shown(value)}", forged(with_json("state.json", key, value)), "state.json")
        for key, values in STATE.items()
        for value in values
    ),
    *(
        Case(
            "resume",
            f"optimizer_tensors: {value}",
            forged(with_json("state.json", "optimizer_tensors", value)),
            "state",
        )
        for value in (3, -1, "x")
    ),
    *(
        Case("resume", f"state.json is {name}", forged(with_bytes("state.json", BROKEN_JSON[name][0])), "state.json")
        for name in ("empty", "not UTF-8", "cut", "nested 100,000 deep", "a list", "zeros", "two values")
    ),
    *(
        Case("resume", f"model.safetensors: {name}", forged(TENSORS[name][0]), TENSORS[name][1])
        for name in MODEL_TENSORS
    ),
    *(Case("resume", f"state.safetensors: {name}", forged(forge), key) for name, (forge, key) in STATE_TENSORS.items()),
    *(
        Case("resume", f"training.json {key}: {shown(value)}", forged(with_json("training.json", key, value)), said)
        for key, value, said in (
            ("classes", "abcdefghi", "classes"),
            ("classes", ["x"] * 9, "classes must be the checkpoint's"),
            ("options", ABSENT, "options"),
            ("step", 2, "of one step"),
        )
    ),
    Case("resume", "a checkpoint under another's name", of_another_step, "of one step"),
    Case("resume", "a refused restore changes nothing", refused_restore_changes_nothing, None),
    *(Case("resume", name, changed_data(change, said), said or None) for name, (change, said) in DATA.items()),
    Case(
        "resume",
        "a cached picture replaced by one of the same size",
        changed_data(same_size_in_a_cache, "train: 12 images of the same names and sizes", with_cache=True),
        "but other contents",
    ),
    Case("resume", "no record of the data, of an earlier version", old_record, None),
    Case("resume", "strict, other learning rate", strict(learning_rate=0.5), "learning_rate"),
    Case("resume", "strict, more steps", strict(num_steps=6), "num_steps: 4 -> 6"),
    Case("resume", "strict, other seed", strict(seed=1), "seed: 42 -> 1"),
    Case("resume", "strict, what changes no result", strict_lets_pass, None),
    Case("resume", "fewer steps than are made", lambda f: resume(copied_run(f), num_steps=3), "got num_steps=3"),
    Case("resume", "starting weights that are gone", weights_that_are_gone, None),
    Case("resume", "starting weights that are gone, new run", weights_that_are_gone_in_a_new_run, "gone.npz"),
    Case("resume", "another model", lambda f: resume(copied_run(f), embed_dim=64), "model must be the checkpoint's"),
    Case("resume", "another optimiser", lambda f: resume(copied_run(f), optimizer="sgd"), "got optimizer='sgd'"),
    Case("resume", "the untouched copy", whole_run_goes_on, None),
]
