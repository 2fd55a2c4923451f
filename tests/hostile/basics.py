"""One or two of every kind: archives, weights, pictures, lists, models."""

from __future__ import annotations

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ffvt
from ffvt.data.archives import extract_archive
from ffvt.data.images import load_image
from ffvt.data.layouts import read_listing
from tests.hostile.case import Case


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


CASES = [
    Case("archives", "tar that leads outside", escaping_tar, "../escaped.txt"),
    Case("archives", "zip that leads outside", escaping_zip, "../escaped.txt"),
    Case("weights", "pickle as .bin", pickled_weights, "weights.bin"),
    Case("weights", "pickle in a torch.save file", pickled_weights_in_torchs_format, "weights.bin"),
    Case("weights", "object array in .npz", object_array, "weights.npz"),
    Case("pictures", "decompression bomb, PNG", bomb_png, "bomb.png"),
    Case("pictures", "truncated JPEG", truncated_jpeg, "half.jpg"),
    Case("lists", "label out of range", label_out_of_range, "got 8"),
    Case("lists", "class without pictures", empty_class, "'2'"),
    Case("lists", "missing file in a list", missing_file_in_list, "7.png"),
    Case("lists", "list that leads outside", list_that_leads_outside, "secret.png"),
    Case("model", "image size that does not divide", sizes_that_do_not_divide, "got image_size=450"),
    Case("model", "images that are not square", images_that_are_not_square, "got images.shape=(1, 3, 64, 48)"),
]
