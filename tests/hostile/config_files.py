"""Files given to `ffvt train --config`: refused by name, without side effects."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

from ffvt.train.flags import parse_training_flags
from tests.hostile.case import Case

TEXTS = {  # what the file says: what the refusal must name
    "an object to be made": ("name: !!python/object/apply:pathlib.Path.touch [escaped.txt]\n", "name a plain value"),
    "a value that is a mapping": ("seed: {a: 1}\n", "seed a plain value"),
    "a list": ("- seed\n", "got list"),
    "nothing": ("", "got NoneType"),
    "deep nesting": ("[" * 50_000, "must be YAML"),
    "a cycle": ("seed: &a [*a]\n", "must be YAML"),
    "aliases that multiply": (
        "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40))]),
        "got 'a0'",
    ),
    "tabs": ("seed:\t\t- 1\n\t- 2\n", "must be YAML"),
    "an unknown option": ("sede: 1\n", "did you mean seed?"),
    "an option that code would set": ("__class__: 1\n", "got '__class__'"),
    "a number where a switch is": ("fp16: 1\n", "fp16 true or false"),
    "a word where a number is": ("seed: x\n", "invalid int value"),
    "a number too large for its bounds": ("smoothing_value: 1.0\n", "got smoothing_value=1.0"),
    "a name that leads outside": ("name: ../../etc\n", "got name='../../etc'"),
    "a very long key": (f"? {'k' * 100_000}\n: 1\n", "got 'kkk"),
    "control characters": ('"\\e]0;x\\a": 1\n', "x1b]0;x"),
}


def written(text: str) -> Callable[[Path], None]:
    """Writes a file of this text and reads it as training options."""

    def attempt(folder: Path) -> None:
        (folder / "run.yaml").write_text(text)
        read(folder / "run.yaml")

    return attempt


def read(path: Path) -> None:
    """Reads a file as training options; a usage message becomes a ValueError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            parse_training_flags(["--config", str(path)])
    except SystemExit as stop:
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from stop


def not_utf8(folder: Path) -> None:
    (folder / "run.yaml").write_bytes(b"name: caf\xe9\n")
    read(folder / "run.yaml")


def too_large(folder: Path) -> None:
    (folder / "run.yaml").write_bytes(b"#" * (2 << 20))
    read(folder / "run.yaml")


CASES = [
    *(Case("config", name, written(text), refusal, seconds=10) for name, (text, refusal) in TEXTS.items()),
    Case("config", "not UTF-8", not_utf8, "run.yaml must be YAML", seconds=10),
    Case("config", "2 MiB", too_large, "must have at most", seconds=10),
    Case("config", "a folder", read, "must be a file", seconds=10),
    Case("config", "a device", lambda folder: read(Path("/dev/zero")), "must be a file", seconds=10),
]
