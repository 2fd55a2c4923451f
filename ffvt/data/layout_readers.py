"""One reader per published layout: (folder, split, classes) -> `Listing`. What they find is checked in `layouts.py`."""

from __future__ import annotations

import csv
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the file
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ListError(ValueError):
    """A list that is not as it must be; the message says which one, and how."""


@dataclass(frozen=True)
class Listing:
    """The samples of a split, in the published order: classes by label, files, labels from 0, boxes if known."""

    classes: Sequence[str]
    paths: Sequence[Path]
    labels: Sequence[int]
    boxes: Sequence[Box | None] | None = None


def read_cub(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """CUB-200-2011: images.txt, image_class_labels.txt (from 1), train_test_split.txt (1 is training), classes.txt."""
    names = [name for _, name in _pairs(root / "classes.txt")]
    listed = root / "image_class_labels.txt"
    label_of = {key: _number(label, listed) - 1 for key, label in _pairs(listed)}
    return _read_birds(root, split, names, label_of)


def read_nabirds(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """NABirds: as CUB, but the classes are the nodes of a hierarchy that have pictures, by their numbers."""
    names = dict(_pairs(root / "classes.txt"))
    node_of = dict(_pairs(root / "image_class_labels.txt"))
    nodes = sorted(set(node_of.values()), key=int)
    rank = {node: label for label, node in enumerate(nodes)}
    return _read_birds(root, split, [names[node] for node in nodes], {key: rank[node] for key, node in node_of.items()})


def _read_birds(root: Path, split: str, names: list[str], label_of: dict[str, int]) -> Listing:
    side = {"train": "1", "test": "0"}[split]
    side_of = dict(_pairs(root / "train_test_split.txt"))
    found = [(key, name) for key, name in _pairs(root / "images.txt") if side_of[key] == side]
    boxes = None
    if (root / "bounding_boxes.txt").exists():
        box_of = {key: _box_of_size(*map(float, box.split())) for key, box in _pairs(root / "bounding_boxes.txt")}
        boxes = [box_of.get(key) for key, _ in found]
    return Listing(names, [root / "images" / name for _, name in found], [label_of[key] for key, _ in found], boxes)


def _box_of_size(left: float, top: float, width: float, height: float) -> Box:
    return left, top, left + width, top + height


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a list: a key, a blank, and the rest, which may hold blanks itself."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            key, _, rest = line.strip().partition(" ")
            yield key, rest.strip()


class DogBoxes(Sequence):
    """Boxes of Stanford Dogs' annotations, one XML file per picture, read on access."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Box | None:
        if not self.files[index].exists():
            return None
        try:
            box = ElementTree.parse(self.files[index]).find("object/bndbox")
            left, top, right, bottom = (float(box.findtext(edge)) for edge in ("xmin", "ymin", "xmax", "ymax"))
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
            raise ListError(f"dog: {self.files[index]} must hold an object's bndbox; got {error}") from error
        return left, top, right, bottom


def read_dogs(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """Stanford Dogs: Images/, Annotation/; train_list.mat, test_list.mat (labels from 1), beside them or in lists/."""
    files, labels = _read_dog_list(root, split)
    names: dict[int, str] = {}
    for file, label in zip(*_read_dog_list(root, "train")):
        names[label] = file.split("/")[0].partition("-")[2]
    classes = [names.get(label, str(label)) for label in range(max(names) + 1)]
    boxes = DogBoxes([root / "Annotation" / Path(file).with_suffix("") for file in files])
    return Listing(classes, [root / "Images" / file for file in files], labels, boxes)


def _read_dog_list(root: Path, split: str) -> tuple[list[str], list[int]]:
    places = [folder / f"{split}_list.mat" for folder in (root, root / "lists", root.parent / "lists", root.parent)]
    found = _load_mat(next((place for place in places if place.exists()), places[0]))
    return _strings(found["file_list"]), [int(label) - 1 for label in found["labels"].ravel()]


def read_ufg(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """Cotton80, SoyLocal: anno/train.txt, anno/test.txt (lines of an image's name and its class from 1), images/."""
    lines = {}
    for name in {"train", split}:
        text = (root / "anno" / f"{name}.txt").read_text(encoding="utf-8")
        lines[name] = [line.strip().rsplit(maxsplit=1) for line in text.splitlines() if line.strip()]
    count = max(_number(label, root / "anno" / "train.txt") for _, label in lines["train"])
    labels = [_number(label, root / "anno" / f"{split}.txt") - 1 for _, label in lines[split]]
    classes = [str(number) for number in range(1, count + 1)]
    return Listing(classes, [root / "images" / name for name, _ in lines[split]], labels)


def _number(text: str, path: Path) -> int:
    if not text.isdigit():
        raise ListError(f"{path}: a class must be a number from 1 on; got {text!r}")
    return int(text)


def read_cars(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """Stanford Cars: devkit/ with cars_meta.mat and cars_train_annos.mat, cars_test_annos_withlabels.mat, pictures.

    Read as torchvision does, which, however, knows no boxes and wants the folder to be called stanford_cars.
    """
    listed = root / ("devkit/cars_train_annos.mat" if split == "train" else "cars_test_annos_withlabels.mat")
    if split == "test" and not listed.exists():
        listed = root / "devkit" / listed.name  # where some copies have it
    if split == "test" and not listed.exists():
        raise ListError(
            f"car: {root / listed.name} must be there: the devkit's test list has no labels, this one comes separately;"
            " got none"
        )
    annotations = _load_mat(listed)["annotations"].ravel()
    classes = _strings(_load_mat(root / "devkit/cars_meta.mat")["class_names"])
    files = [str(_scalar(one["fname"])) for one in annotations]
    labels = [int(_scalar(one["class"])) - 1 for one in annotations]
    edges = ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")
    boxes = [tuple(float(_scalar(one[edge])) for edge in edges) for one in annotations]
    return Listing(classes, [root / f"cars_{split}" / file for file in files], labels, boxes)


def read_aircraft(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """FGVC-Aircraft, 100 variants, by torchvision; train is its trainval."""
    from torchvision.datasets import FGVCAircraft

    root = Path(os.path.abspath(root))  # "." has a name, too
    if root.name != "fgvc-aircraft-2013b":
        raise ListError(f"air: the folder must be called fgvc-aircraft-2013b, as the archive does; got {str(root)!r}")
    found = FGVCAircraft(str(root.parent), {"train": "trainval", "test": "test"}[split], "variant")
    paths = [Path(file) for file in found._image_files]
    box_file, boxes = root / "data" / "images_box.txt", None
    if box_file.exists():
        box_of = {key: tuple(map(float, box.split())) for key, box in _pairs(box_file)}
        boxes = [box_of.get(path.stem) for path in paths]
    return Listing(list(found.classes), paths, list(found._labels), boxes)


def read_inat2017(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """iNaturalist 2017: train2017.json, and val2017.json, which is tested on: the test labels are not public."""
    found = json.loads((root / {"train": "train2017.json", "test": "val2017.json"}[split]).read_text(encoding="utf-8"))
    categories = sorted(found["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    category_of = {one["image_id"]: one["category_id"] for one in found["annotations"]}
    images = found["images"]
    paths = [root / image["file_name"] for image in images]
    labels = [label_of[category_of[image["id"]]] for image in images]
    return Listing([category["name"] for category in categories], paths, labels)


def read_imagefolder(root: Path, split: str, classes: Sequence[str] | None) -> Listing:
    """root/split/class/**/picture; hidden files and folders are passed over. The classes are the folders of train."""
    names = _subfolders(root / "train") if classes is None else list(classes)
    label_of = {name: label for label, name in enumerate(names)}
    paths: list[Path] = []
    labels: list[int] = []
    for name in _subfolders(root / split):
        if name not in label_of:
            raise ListError(f"imagefolder: {split} must have only the classes of training; got class {name!r}")
        files = _pictures(root / split / name)
        paths += files
        labels += [label_of[name]] * len(files)
    if not paths:
        raise ListError(f"imagefolder: {split} must have pictures in class folders; got {str(root / split)!r}")
    return Listing(names, paths, labels)


def read_csv(root: Path, split: str, classes: Sequence[str] | None) -> Listing:
    """root/<split>.csv with the columns image (a path below root) and label (a class's name)."""
    rows = _csv_rows(root / f"{split}.csv")
    names = sorted({label for _, label in _csv_rows(root / "train.csv")}) if classes is None else list(classes)
    label_of = {name: label for label, name in enumerate(names)}
    unknown = [label for _, label in rows if label not in label_of]
    if unknown:
        raise ListError(f"csv: {split}.csv must have only the classes of training; got label {unknown[0]!r}")
    return Listing(names, [root / image for image, _ in rows], [label_of[label] for _, label in rows])


def _csv_rows(path: Path) -> list[tuple[str, str]]:
    if not path.exists():
        raise ListError(f"csv: data_root must hold {path.name}; got {str(path.parent)!r}")
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
        reader = csv.DictReader(file)
        if not {"image", "label"} <= set(reader.fieldnames or ()):
            raise ListError(f"csv: {path} must have the columns image and label; got {reader.fieldnames}")
        rows = []
        for row in reader:
            if not (row["image"] and row["label"]):
                raise ListError(f"csv: {path} must have an image and a label in line {reader.line_num}; got {row}")
            rows.append((row["image"], row["label"]))
    return rows


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ListError(f"imagefolder: data_root must hold {folder.name}/<class>/<picture>; got {str(folder)!r}")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    return sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def _load_mat(path: Path) -> dict[str, Any]:
    """A MATLAB file's variables.

    Raises:
        ListError: it is not there, or is none. ImportError: SciPy is not installed.
    """
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("the lists are MATLAB files, which need SciPy: pip install 'ffvt[train]'") from error
    if not path.exists():
        raise ListError(f"{path} must be there; got no such file")
    try:
        return loadmat(path)
    except Exception as error:  # SciPy has many
        raise ListError(f"{path} must be a MATLAB file; got {error}") from error


def _scalar(value: Any) -> Any:
    """The one entry of MATLAB's nested one-element arrays."""
    while hasattr(value, "ravel") and getattr(value, "shape", ()) != ():
        value = value.ravel()[0]
    return value


def _strings(cells: Any) -> list[str]:
    return [str(_scalar(cell)) for cell in cells.ravel()]
