"""A real checkpoint of a tiny run, and forgeries of it whose checksums fit."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ffvt.files import file_digest
from ffvt.train.checkpoint import FILES, SUMS_FILE, load_state
from ffvt.train.data import Data, open_data
from ffvt.train.distributed import World
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from ffvt.train.resume import check_fit, find_start
from ffvt.train.state import TrainState
from tests.helpers import SMALL

ALONE = World(0, 1, torch.device("cpu"))
OPTIONS = {**SMALL, "num_steps": 4, "save_every": 2, "eval_every": 2, "dropout": 0.1, "ema_decay": 0.9}
OPTIONS |= {"optimizer": "adamw", "learning_rate": 1e-3, "name": "run"}
ABSENT = object()  # as the value of a key: the key is deleted


@functools.cache
def _trained() -> Path:
    """The folder of a run of four steps, made once a process."""
    folder = Path(tempfile.mkdtemp(prefix="ffvt-forging-"))
    atexit.register(shutil.rmtree, folder)
    return train(TrainOptions(**OPTIONS, output_dir=str(folder))).folder


@functools.cache
def _data() -> Data:
    return open_data(TrainOptions(**OPTIONS))


def copied_run(folder: Path) -> Path:
    """A copy of the run in a folder."""
    shutil.copytree(_trained(), folder / "run", symlinks=True)
    return folder / "run"


def newest(run: Path) -> Path:
    """Its newest checkpoint."""
    return run / "step-00000004"


def reseal(checkpoint: Path) -> None:
    """Makes the checksums fit whatever the files hold."""
    sums = "".join(f"{file_digest(checkpoint / name)}  {name}\n" for name in FILES)
    (checkpoint / SUMS_FILE).write_text(sums)


def with_json(name: str, key: str, value: Any) -> Callable[[Path], None]:
    """Sets a key ("a.b" is b inside of a; "a.0" the first of a list) of a JSON file, or deletes it."""

    def forge(checkpoint: Path) -> None:
        content = json.loads((checkpoint / name).read_text())
        *outer, last = key.split(".")
        place = content
        for part in outer:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if value is ABSENT:
            del place[last]
        else:
            place[int(last) if isinstance(place, list) else last] = value
        (checkpoint / name).write_text(json.dumps(content))

    return forge


def with_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Changes the bytes of a file."""

    def forge(checkpoint: Path) -> None:
        (checkpoint / name).write_bytes(change((checkpoint / name).read_bytes()))

    return forge


def with_tensors(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Changes the tensors of a file, in place."""

    def forge(checkpoint: Path) -> None:
        tensors = load_file(checkpoint / name)
        change(tensors)
        save_file(tensors, checkpoint / name)

    return forge


def resume(run: Path, **changes: Any) -> TrainState:
    """What `train --resume auto` does before its first step."""
    options = TrainOptions(**{**OPTIONS, "output_dir": str(run.parent), "resume": "auto", "num_steps": 6, **changes})
    start = find_start(options, run)
    check_fit(start.checkpoint, options, _data(), ALONE.size)
    state = TrainState(options, ALONE, len(_data().classes), is_resumed=True)
    state.restore(*load_state(start.checkpoint))
    return state
