"""Checkpoints that are forged, with fitting checksums, or damaged: refused by file and key when they are loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ffvt.cli import main
from ffvt.inference import load
from ffvt.train.checkpoint import SUMS_FILE, find_checkpoint, load_checkpoint
from ffvt.train.kinds import LONGEST_FILE
from tests.hostile.case import Case
from tests.hostile.forging import ABSENT, copied_run, newest, reseal, with_bytes, with_json, with_tensors

FACTS = {  # key -> bad values
    "classes": [ABSENT, "abcdefghi", [{"a": 1}] * 9, [1] * 9, [], None, {"a": 1}, [["x"]] * 9, ["x" * 2000] * 9],
    "resize_size": [ABSENT, -64, 0, 10**9, 64.5, "64", None, True, [64]],
    "step": [ABSENT, -5, 2.5, "4", 10**30],
    "options": [ABSENT, None, [], "x"],
    "options.dataset": [ABSENT, 7, None, "x" * 5000],
    "options.data_root": [ABSENT, ["a"], None],
    "options.preset": [ABSENT, 1],
    "options.seed": [ABSENT, "0", 1.5, 10**30, None],
    "options.img_size": ["64", None],
    "options.feature_fusion": ["no", 1],
    "options.learning_rate": ["fast", None],
    "top1": [-1, 2, "1", None],
    "count": [0, -3, 1.5],
    "loss": ["low"],
    "selection": [3, {"hit_rate": 1}],
    "data": [[], {"train": 3}, {"train": {"count": -1, "files": "x"}}, {"train": {"count": 1}}],
}
BROKEN_JSON = {  # what is done to a whole file -> what the refusal names beside the file
    "empty": (lambda content: b"", "Expecting value"),
    "not UTF-8": (lambda content: b"\xff\xfe" + content, "utf-8"),
    "cut": (lambda content: content[: len(content) // 2], "training.json"),
    "NaN": (lambda content: content.replace(b'"step": 4', b'"step": NaN', 1), "got NaN"),
    "Infinity": (lambda content: content.replace(b'"step": 4', b'"step": -Infinity', 1), "got -Infinity"),
    "1e999": (lambda content: content.replace(b'"step": 4', b'"step": 1e999', 1), "step must be"),
    "a number of 5,000 digits": (lambda content: b"9" * 5000, "digits"),
    "nested 100,000 deep": (lambda content: b"[" * 100_000 + b"]" * 100_000, "nested"),
    "records 100,000 deep": (lambda content: b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested"),
    "a list": (lambda content: b"[" + content + b"]", "record of keys"),
    "a number": (lambda content: b"4", "record of keys"),
    "a key twice": (lambda content: content.replace(b'"step": 4', b'"step": 4, "step": 5', 1), "twice"),
    "two values": (lambda content: content + content, "Extra data"),
    "text after it": (lambda content: content + b"x", "Extra data"),
    "zeros": (lambda content: bytes(len(content)), "training.json"),
}


def forged(forge: Callable[[Path], Any]) -> Callable[[Path], object]:
    """Loads a forged checkpoint."""

    def attempt(folder: Path) -> None:
        checkpoint = newest(copied_run(folder))
        forge(checkpoint)
        reseal(checkpoint)
        load_checkpoint(checkpoint)

    return attempt


def damaged(damage: Callable[[Path], Any]) -> Callable[[Path], object]:
    """Loads a checkpoint that is damaged, its checksums as they are."""

    def attempt(folder: Path) -> None:
        checkpoint = newest(copied_run(folder))
        damage(checkpoint)
        load_checkpoint(checkpoint)

    return attempt


def shown(value: Any) -> str:
    """A value in the name of a case."""
    text = "absent" if value is ABSENT else repr(value)
    return text if len(text) < 60 else f"{text[:30]}...{text[-20:]}"


def too_long(checkpoint: Path) -> None:
    os.truncate(checkpoint / "training.json", LONGEST_FILE + 1)


def sums(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return with_bytes(SUMS_FILE, change)


def replaced(name: str, put: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Puts something else in the place of a file."""

    def damage(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        put(checkpoint / name)

    return damage


def head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def apply(tensors: dict[str, torch.Tensor]) -> None:
        tensors["head.bias"] = change(tensors["head.bias"])

    return with_tensors("model.safetensors", apply)


TENSORS = {
    "int32 head": (head(torch.Tensor.int), "head.bias"),
    "bool head": (head(torch.Tensor.bool), "head.bias"),
    "complex head": (head(lambda t: t.to(torch.complex64)), "head.bias"),
    "fp64 head": (head(torch.Tensor.double), "head.bias"),
    "fp16 head": (head(torch.Tensor.half), "head.bias"),
    "head of another shape": (head(lambda t: t[:5].clone()), "head.bias"),
    "head of no dimension": (head(lambda t: t.sum()), "head.bias"),
    "head of size 0": (head(lambda t: t[:0].clone()), "head.bias"),
    "no head.bias": (with_tensors("model.safetensors", lambda t: t.pop("head.bias")), "head.bias"),
    "no tensors": (with_tensors("model.safetensors", dict.clear), "model.safetensors"),
    "one tensor more": (with_tensors("model.safetensors", lambda t: t.update(extra=torch.ones(1))), "extra"),
    "a tensor renamed": (
        with_tensors("model.safetensors", lambda t: t.update({"norm.weigth": t.pop("norm.weight")})),
        "norm.wei",
    ),
    "another's weights": (with_bytes("model.safetensors", lambda content: b"PK\x03\x04" + content), "safetensors"),
    "a header of 2^60 bytes": (
        with_bytes("model.safetensors", lambda content: (2**60).to_bytes(8, "little") + content[8:]),
        "safetensors",
    ),
    "an empty file": (with_bytes("model.safetensors", lambda content: b""), "safetensors"),
    "a tensor cut off": (with_bytes("model.safetensors", lambda content: content[:-100]), "safetensors"),
}
SUMS = {
    "absolute path": sums(lambda content: content + b"0" * 64 + b"  /etc/passwd\n"),
    "path that leads outside": sums(lambda content: content + b"0" * 64 + b"  ../../secret\n"),
    "a file twice": sums(lambda content: content + content.splitlines(keepends=True)[0]),
    "a file of another name": sums(lambda content: content + b"0" * 64 + b"  extra.json\n"),
    "a line of a megabyte": sums(lambda content: content + b"0" * 2**20 + b"\n"),
    "a million lines": sums(lambda content: content * 2**18),
    "capital digits": sums(bytes.upper),
    "escape codes": sums(lambda content: content + b"0" * 64 + b"  \x1b[2J\n"),
    "not UTF-8": sums(lambda content: content + b"\xff\n"),
    "no last newline": sums(lambda content: content[:-1]),
    "Windows' line ends": sums(lambda content: content.replace(b"\n", b"\r\n")),
    "empty": sums(lambda content: b""),
    "missing": lambda checkpoint: (checkpoint / SUMS_FILE).unlink(),
    "a folder": replaced(SUMS_FILE, Path.mkdir),
    "a FIFO": replaced(SUMS_FILE, os.mkfifo),
    "a link to itself": replaced(SUMS_FILE, lambda path: path.symlink_to(path.name)),
}
PLACES = {
    "model.safetensors is a FIFO": replaced("model.safetensors", os.mkfifo),
    "model.safetensors is a folder": replaced("model.safetensors", Path.mkdir),
    "config.json is a link to nowhere": replaced("config.json", lambda path: path.symlink_to("nowhere")),
    "state.json is a link to itself": replaced("state.json", lambda path: path.symlink_to("state.json")),
    "state.safetensors is /dev/zero": replaced("state.safetensors", lambda path: path.symlink_to("/dev/zero")),
    "training.json is missing": lambda checkpoint: (checkpoint / "training.json").unlink(),
}


def through(use: Callable[[Path], object]) -> Callable[[Path], object]:
    """A forged class list through a public way in; that way's error must name it."""

    def attempt(folder: Path) -> None:
        checkpoint = newest(copied_run(folder))
        with_json("training.json", "classes", "abcdefghi")(checkpoint)
        reseal(checkpoint)
        use(checkpoint)

    return attempt


def ends_with_one_line(*arguments: str) -> Callable[[Path], object]:
    def attempt(checkpoint: Path) -> None:
        status = main([arguments[0], "--checkpoint", str(checkpoint), *arguments[1:]])
        if status != 1:
            raise AssertionError(f"ended with status {status}")

    return attempt


def finds_the_best_in_a_runs_folder(folder: Path) -> None:
    run = copied_run(folder)
    assert load_checkpoint(run).folder == (run / "best").resolve()
    (run / "best").unlink()
    assert find_checkpoint(run) == run / "last"
    (run / "last").unlink()
    assert find_checkpoint(run) == run / "step-00000004"


def link(target: str) -> Callable[[Path], object]:
    """best/ leads elsewhere, and last/ does not: last/ is taken."""

    def attempt(folder: Path) -> None:
        run = copied_run(folder)
        (run / "best").unlink()
        (run / "best").symlink_to(target)
        assert load_checkpoint(run).folder == newest(run)

    return attempt


def extra_files(folder: Path) -> None:
    checkpoint = newest(copied_run(folder))
    (checkpoint / "notes.txt").write_text("mine")
    (checkpoint / "more").mkdir()
    assert load_checkpoint(checkpoint).facts["step"] == 4


def damaged_best(folder: Path) -> None:
    run = copied_run(folder)
    (run / "best" / "model.safetensors").write_bytes(b"")
    load_checkpoint(run)


def whole_in_the_place_of_a_link(folder: Path) -> None:
    run = copied_run(folder)
    step = (run / "best").resolve()
    (run / "best").unlink()
    step.rename(run / "best")
    assert load_checkpoint(run).folder == run / "best"


CASES = [
    *(
        Case("checkpoint", f"training.json {key}: {shown(value)}", forged(with_json("training.json", key, value)), key)
        for key, values in FACTS.items()
        for value in values
    ),
    *(
        Case("checkpoint", f"training.json is {name}", forged(with_bytes("training.json", change)), named)
        for name, (change, named) in BROKEN_JSON.items()
    ),
    *(
        Case("checkpoint", f"config.json is {name}", forged(with_bytes("config.json", BROKEN_JSON[name][0])), "config")
        for name in ("empty", "not UTF-8", "cut", "nested 100,000 deep", "a list", "zeros")
    ),
    Case("checkpoint", "training.json of 32 MiB", forged(too_long), "training.json"),
    *(Case("checkpoint", f"model.safetensors: {name}", forged(forge), key) for name, (forge, key) in TENSORS.items()),
    *(Case("checkpoint", f"SHA256SUMS: {name}", damaged(damage), "SHA256SUMS") for name, damage in SUMS.items()),
    *(Case("checkpoint", name, damaged(damage), name.split()[0]) for name, damage in PLACES.items()),
    Case("checkpoint", "forged classes, ffvt.load", through(load), "classes"),
    Case("checkpoint", "forged classes, predict", through(ends_with_one_line("predict", "x.png")), None),
    Case("checkpoint", "forged classes, evaluate", through(ends_with_one_line("evaluate")), None),
    Case("checkpoint", "forged classes, visualize", through(ends_with_one_line("visualize", "x.png")), None),
    Case("checkpoint", "a run's folder in place of a checkpoint", finds_the_best_in_a_runs_folder, None),
    *(Case("checkpoint", f"best leads to {to}", link(to), None) for to in ("nowhere", "best", "/", "log.jsonl")),
    Case("checkpoint", "files of others in it", extra_files, None),
    Case("checkpoint", "best is damaged, last is not", damaged_best, "is damaged: model.safetensors"),
    Case("checkpoint", "best is the folder itself, no link", whole_in_the_place_of_a_link, None),
    Case("checkpoint", "an empty folder", load_checkpoint, "best/ or last/"),
    Case("checkpoint", "no folder", lambda folder: load_checkpoint(folder / "none"), "best/ or last/"),
    Case("checkpoint", "a name with escape codes", lambda f: load_checkpoint(f / "\x1b[2J"), "x1b[2J"),
    Case("checkpoint", "a name with a zero byte", lambda f: load_checkpoint(f / "a\0b"), "best/ or last/"),
]
