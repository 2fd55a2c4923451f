"""Small data sets in the layouts in which the official ones are published."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from ffvt.data.datasets import open_split

CLASSES, TRAIN, TEST = 3, 2, 1  # pictures per class and split
SIZE = (50, 40)


def picture(path: Path, seed: int = 0, size: tuple[int, int] = SIZE) -> None:
    """A smooth random picture that no other seed gives."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)


def _samples() -> list[tuple[int, int, str]]:
    """(number from 1, label, split), class by class as the official lists go."""
    splits = ["train"] * TRAIN + ["test"] * TEST
    pairs = [(label, split) for label in range(CLASSES) for split in splits]
    return [(number, label, split) for number, (label, split) in enumerate(pairs, start=1)]


def write_cub(root: Path) -> Path:
    folder = root / "CUB_200_2011"
    lists: dict[str, list[str]] = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    lists |= {"bounding_boxes": [], "classes": [f"{i + 1} {i + 1:03}.Bird_{i}" for i in range(CLASSES)]}
    for number, label, split in _samples():
        file = f"{label + 1:03}.Bird_{label}/Bird_{number:04}.jpg"
        picture(folder / "images" / file, number)
        lists["images"].append(f"{number} {file}")
        lists["image_class_labels"].append(f"{number} {label + 1}")
        lists["train_test_split"].append(f"{number} {int(split == 'train')}")
        lists["bounding_boxes"].append(f"{number} 10.0 5.0 20.0 30.0")
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_nabirds(root: Path) -> Path:
    folder = root / "nabirds"
    nodes = [1010, 817, 295]  # numbers of a hierarchy's leaves
    lists: dict[str, list[str]] = {name: [] for name in ("images", "image_class_labels", "train_test_split")}
    lists["classes"] = ["0 Birds", *(f"{node} Warbler (Adult, {node})" for node in nodes)]
    lists["bounding_boxes"] = []
    for number, label, split in _samples():
        key, node = f"0000139e-21dc-4d0c-bfe1-{number:012}", nodes[label]
        file = f"{node:04}/{key.replace('-', '')}.jpg"
        picture(folder / "images" / file, number)
        lists["images"].append(f"{key} {file}")
        lists["image_class_labels"].append(f"{key} {node}")
        lists["train_test_split"].append(f"{key} {int(split == 'train')}")
        lists["bounding_boxes"].append(f"{key} 10 5 20 30")
    for name, lines in lists.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_dogs(root: Path) -> Path:
    for split in ("train", "test"):
        files, labels = [], []
        for number, label, own in _samples():
            if own != split:
                continue
            name = f"n0208562{label}-Breed_{label}/n0208562{label}_{number}"
            picture(root / "Images" / f"{name}.jpg", number)
            annotation = root / "Annotation" / name
            annotation.parent.mkdir(parents=True, exist_ok=True)
            box = "<xmin>10</xmin><ymin>5</ymin><xmax>30</xmax><ymax>35</ymax>"
            annotation.write_text(f"<annotation><object><bndbox>{box}</bndbox></object></annotation>")
            files.append(f"{name}.jpg")
            labels.append(label + 1)
        cells, annotations = (np.empty((len(files), 1), object) for _ in range(2))
        cells[:, 0], annotations[:, 0] = files, [file[:-4] for file in files]
        lists = {"file_list": cells, "annotation_list": annotations, "labels": np.array(labels, np.uint8)[:, None]}
        savemat(root / f"{split}_list.mat", lists)
    return root


def write_ufg(root: Path) -> Path:
    (root / "anno").mkdir(parents=True)
    for split in ("train", "test"):
        lines = []
        for number, label, own in _samples():
            if own == split:
                picture(root / "images" / f"leaf {number}.png", number)
                lines.append(f"leaf {number}.png {label + 1}")
        (root / "anno" / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_cars(root: Path) -> Path:
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.empty((1, CLASSES), object)
    names[0] = [f"Maker Model {label}" for label in range(CLASSES)]
    savemat(folder / "devkit/cars_meta.mat", {"class_names": names})
    for split, file in (("train", "devkit/cars_train_annos.mat"), ("test", "cars_test_annos_withlabels.mat")):
        rows = []
        for number, label, own in _samples():
            if own == split:
                picture(folder / f"cars_{split}" / f"{number:05}.jpg", number)
                rows.append((10, 5, 30, 35, label + 1, f"{number:05}.jpg"))
        fields = [(f"bbox_{edge}", object) for edge in ("x1", "y1", "x2", "y2")]
        annotations = np.array([rows], dtype=[*fields, ("class", object), ("fname", object)])
        savemat(folder / file, {"annotations": annotations})
    return root


def write_aircraft(root: Path) -> Path:
    data = root / "fgvc-aircraft-2013b" / "data"
    lists: dict[str, list[str]] = {"trainval": [], "test": []}
    boxes = []
    for number, label, split in _samples():
        picture(data / "images" / f"{number:07}.jpg", number)
        lists["trainval" if split == "train" else "test"].append(f"{number:07} 7{label}7-200 ER")
        boxes.append(f"{number:07} 10 5 30 35")
    (data / "variants.txt").write_text("".join(f"7{label}7-200 ER\n" for label in range(CLASSES)))
    (data / "images_box.txt").write_text("\n".join(boxes) + "\n")
    for split, lines in lists.items():
        (data / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    return root


def write_inat2017(root: Path) -> Path:
    categories = [{"id": label, "name": f"Genus species{label}", "supercategory": "Aves"} for label in range(CLASSES)]
    for split, name in (("train", "train2017"), ("test", "val2017")):
        images, annotations = [], []
        for number, label, own in _samples():
            if own == split:
                file = f"train_val_images/Aves/Genus species{label}/{number:032x}.jpg"
                picture(root / file, number)
                images.append({"id": number, "file_name": file, "width": SIZE[0], "height": SIZE[1]})
                annotations.append({"id": number, "image_id": number, "category_id": label})
        found = {"images": images, "annotations": annotations[::-1], "categories": categories[::-1]}
        (root / f"{name}.json").write_text(json.dumps(found))
    return root


def write_imagefolder(root: Path) -> Path:
    for number, label, split in _samples():
        picture(root / split / f"class {label}" / f"{number}.png", number)
    return root


def write_csv(root: Path) -> Path:
    rows = {"train": ["image,label"], "test": ["image,label"]}
    for number, label, split in _samples():
        picture(root / "pictures" / f"{number}.png", number)
        rows[split].append(f"pictures/{number}.png,class {label}")
    for split, lines in rows.items():
        (root / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return root


def write_cifar(root: Path, name: str, monkeypatch) -> Path:
    """CIFAR's pickles; torchvision is told the sums of these instead of the official ones."""
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    key, names = ("labels", "label_names") if name == "cifar10" else ("fine_labels", "fine_label_names")

    def write(file: str, content: dict) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    draw = np.random.default_rng(0)
    for attribute, per_class in (("train_list", TRAIN), ("test_list", TEST)):
        sums = []
        for file, _ in getattr(kind, attribute):
            labels = [label for label in range(CLASSES) for _ in range(per_class)]
            pixels = draw.integers(0, 256, (len(labels), 3072), np.uint8)
            sums.append([file, write(file, {"data": pixels, key: labels})])
        monkeypatch.setattr(kind, attribute, sums)
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {names: [f"class {label}" for label in range(CLASSES)]})
    monkeypatch.setattr(kind, "meta", meta)
    return root


LAYOUT_WRITERS: dict[str, Callable[[Path], Path]] = {
    "CUB": write_cub,
    "dog": write_dogs,
    "cotton": write_ufg,
    "soyloc": write_ufg,
    "car": write_cars,
    "air": write_aircraft,
    "nabirds": write_nabirds,
    "inat2017": write_inat2017,
    "imagefolder": write_imagefolder,
    "csv": write_csv,
}


def folder_images(root, split, size, classes=None):
    return open_split("imagefolder", split, size, size, str(root), classes=classes)


def spoil(path):
    path.write_bytes(path.read_bytes()[:60])
