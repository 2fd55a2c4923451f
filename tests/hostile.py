"""Inputs that must be refused: each with what it is given to. `python -m tests.faults` counts them."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ffvt
from ffvt.data.archives import extract_archive
from ffvt.data.layouts import read_listing
from ffvt.data.transforms import load_image


class Touch:
    """A pickle of this makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def escaping_tar(folder: Path) -> None:
    with tarfile.open(folder / "set.tar", "w") as tar:
        member = tarfile.TarInfo("../escaped.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    extract_archive(folder / "set.tar", folder / "data")


def escaping_zip(folder: Path) -> None:
    with zipfile.ZipFile(folder / "set.zip", "w") as zipped:
        zipped.writestr("images/1.jpg", "x")
        zipped.writestr("../escaped.txt", "x")
    extract_archive(folder / "set.zip", folder / "data")


def pickled_weights(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(pickle.dumps({"head.weight": Touch(folder / "escaped.txt")}))
    ffvt.load_weights(_model(), folder / "weights.bin")


def pickled_weights_in_torchs_format(folder: Path) -> None:
    torch.save({"head.weight": Touch(folder / "escaped.txt")}, folder / "weights.bin")
    ffvt.load_weights(_model(), folder / "weights.bin")


def object_array(folder: Path) -> None:
    np.savez(folder / "weights.npz", cls=np.array([Touch(folder / "escaped.txt")], dtype=object))
    ffvt.load_weights(_model(), folder / "weights.npz")


def bomb_png(folder: Path) -> None:
    Image.new("1", (20000, 10000)).save(folder / "bomb.png")
    load_image(folder / "bomb.png", 64)


def truncated_jpeg(folder: Path) -> None:
    Image.effect_noise((300, 300), 80).save(folder / "half.jpg")
    (folder / "half.jpg").write_bytes((folder / "half.jpg").read_bytes()[:2000])
    load_image(folder / "half.jpg", 64)


def label_out_of_range(folder: Path) -> None:
    _write_leaves(folder, ["1.png 1", "2.png 2"], ["1.png 9"])
    read_listing("cotton", "test", folder)


def empty_class(folder: Path) -> None:
    _write_leaves(folder, ["1.png 1", "2.png 3"], ["1.png 1"])
    read_listing("cotton", "train", folder)


def missing_file_in_list(folder: Path) -> None:
    _write_leaves(folder, ["1.png 1", "7.png 2"], ["1.png 1"])
    read_listing("cotton", "train", folder)


def list_that_leads_outside(folder: Path) -> None:
    _write_leaves(folder / "set", ["1.png 1", "../../secret.png 2"], ["1.png 1"])
    Image.new("RGB", (4, 4)).save(folder / "secret.png")
    read_listing("cotton", "train", folder / "set")


def sizes_that_do_not_divide(folder: Path) -> None:
    ffvt.create_model("vit_b16", image_size=450)


def images_that_are_not_square(folder: Path) -> None:
    _model()(torch.zeros(1, 3, 64, 48))


def _model() -> torch.nn.Module:
    return ffvt.create_model("vit_s16", image_size=64, num_classes=3, depth=2, num_select=2)


def _write_leaves(root: Path, train: list[str], test: list[str]) -> None:
    (root / "anno").mkdir(parents=True)
    (root / "images").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (4, 4)).save(root / "images" / name)
    for split, lines in (("train", train), ("test", test)):
        (root / "anno" / f"{split}.txt").write_text("\n".join(lines) + "\n")


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {  # name: what is done, and what the refusal must name
    "tar that leads outside": (escaping_tar, "../escaped.txt"),
    "zip that leads outside": (escaping_zip, "../escaped.txt"),
    "pickle as .bin": (pickled_weights, "weights.bin"),
    "pickle in a torch.save file": (pickled_weights_in_torchs_format, "weights.bin"),
    "object array in .npz": (object_array, "weights.npz"),
    "decompression bomb, PNG": (bomb_png, "bomb.png"),
    "truncated JPEG": (truncated_jpeg, "half.jpg"),
    "label out of range": (label_out_of_range, "got 8"),
    "class without pictures": (empty_class, "'2'"),
    "missing file in a list": (missing_file_in_list, "7.png"),
    "list that leads outside": (list_that_leads_outside, "secret.png"),
    "image size that does not divide": (sizes_that_do_not_divide, "got image_size=450"),
    "images that are not square": (images_that_are_not_square, "got images.shape=(1, 3, 64, 48)"),
}


def refused(name: str, folder: Path) -> bool:
    """Whether the input is refused by a ValueError that names what is wrong, and nothing has come of it."""
    attempt, named = HOSTILE[name]
    try:
        attempt(folder)
    except ValueError as error:
        nothing_ran = not list(folder.parent.rglob("escaped.txt"))
        data = folder / "data"
        return named in str(error) and nothing_ran and not (data.exists() and list(data.iterdir()))
    return False
