"""One reader per published layout: (folder, split, classes) -> `Listing`. What they find is checked in `layouts.py`."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ffvt.errors import printable
from ffvt.files import open_regular

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the file
FEW = 1000  # classes without images that are told by their names


class ListError(ValueError):
    """A list that is not as it must be; the message says which one, and how."""


@dataclass(frozen=True)
class Listing:
    """The samples of a split, in the published order: classes by label, files, labels from 0, boxes if known.

    image_root: the folder in which the images must lie, where that is not the data set's. problems: what is wrong with
    the lists beside what they do give. left_out: how many files in the folders are no images, by kind.
    """

    classes: Sequence[str]
    paths: Sequence[Path]
    labels: Sequence[int]
    boxes: Sequence[Box | None] | None = None
    image_root: Path | None = None
    problems: Sequence[str] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)


def shown(path: str | Path) -> str:
    """A path for a message: one line of bounded length."""
    return printable(str(path), 300)


def read_text(path: Path) -> str:
    """A list's text, in UTF-8, perhaps behind a byte order mark, which spreadsheets write.

    Raises:
        ListError: it is not there, no regular file or not UTF-8.
    """
    try:
        with open_regular(path) as file:
            content = file.read()
    except FileNotFoundError:
        raise ListError(f"{shown(path)} must be there; got no such file") from None
    except OSError as error:
        raise ListError(f"{shown(path)} must be a readable file; got one that {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ListError(
            f"{shown(path)} must be UTF-8 text; got byte 0x{content[error.start]:02x} in line {line}"
        ) from None


def _of(table: Mapping[str, Any], key: str, path: Path) -> Any:
    """The entry of an image, or of another list's line, in a list."""
    if key not in table:
        raise ListError(f"{shown(path)} must have what other lists name; got no '{printable(key)}'")
    return table[key]


def read_cub(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """CUB-200-2011: images.txt, image_class_labels.txt (from 1), train_test_split.txt (1 is training), classes.txt."""
    names = [name for _, name in _pairs(root / "classes.txt")]
    listed = root / "image_class_labels.txt"
    label_of = {key: _number(label, listed) - 1 for key, label in _pairs(listed)}
    return _read_birds(root, split, names, label_of)


def read_nabirds(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """NABirds: as CUB, but the classes are the nodes of a hierarchy that have pictures, by their numbers."""
    listed, named = root / "image_class_labels.txt", root / "classes.txt"
    names, node_of = dict(_pairs(named)), dict(_pairs(listed))
    nodes = sorted(set(node_of.values()), key=lambda node: _number(node, listed))
    rank = {node: label for label, node in enumerate(nodes)}
    classes = [_of(names, node, named) for node in nodes]
    return _read_birds(root, split, classes, {key: rank[node] for key, node in node_of.items()})


def _read_birds(root: Path, split: str, names: list[str], label_of: dict[str, int]) -> Listing:
    side = {"train": "1", "test": "0"}[split]
    halves, boxed = root / "train_test_split.txt", root / "bounding_boxes.txt"
    side_of = dict(_pairs(halves))
    found = [(key, name) for key, name in _pairs(root / "images.txt") if _of(side_of, key, halves) == side]
    labels = [_of(label_of, key, root / "image_class_labels.txt") for key, _ in found]
    boxes = None
    if boxed.exists():
        sizes = {key: _box(box, boxed) for key, box in _pairs(boxed)}
        box_of = {key: (left, top, left + width, top + height) for key, (left, top, width, height) in sizes.items()}
        boxes = [box_of.get(key) for key, _ in found]
    return Listing(names, [root / "images" / name for _, name in found], labels, boxes)


def _box(text: str, path: Path) -> Box:
    """Four finite numbers."""
    try:
        box = tuple(float(number) for number in text.split())
    except ValueError:
        box = ()
    if len(box) != 4 or not all(map(math.isfinite, box)):
        raise ListError(f"{shown(path)}: a box must be four numbers; got '{printable(text)}'")
    return box


def _pairs(path: Path) -> Iterator[tuple[str, str]]:
    """The lines of a list: a key, a blank, and the rest, which may hold blanks itself."""
    for line in read_text(path).splitlines():
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
            with open_regular(self.files[index]) as file:
                box = ElementTree.parse(file).find("object/bndbox")
            left, top, right, bottom = (float(box.findtext(edge)) for edge in ("xmin", "ymin", "xmax", "ymax"))
        except (ElementTree.ParseError, AttributeError, TypeError, ValueError, OSError) as error:
            reason = printable(str(error))
            raise ListError(f"dog: {shown(self.files[index])} must hold an object's bndbox; got {reason}") from error
        return left, top, right, bottom


def read_dogs(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """Stanford Dogs: Images/, Annotation/; train_list.mat, test_list.mat (labels from 1), beside them or in lists/."""
    files, labels = _read_dog_list(root, split)
    names: dict[int, str] = {}
    for file, label in zip(files, labels) if split == "train" else zip(*_read_dog_list(root, "train")):
        names[label] = file.split("/")[0].partition("-")[2]
    _check_count(max(names) + 1, len(names), root / "train_list.mat")
    classes = [names.get(label, str(label)) for label in range(max(names) + 1)]
    boxes = DogBoxes([root / "Annotation" / Path(file).with_suffix("") for file in files])
    return Listing(classes, [root / "Images" / file for file in files], labels, boxes)


def _read_dog_list(root: Path, split: str) -> tuple[list[str], list[int]]:
    places = [folder / f"{split}_list.mat" for folder in (root, root / "lists", root.parent / "lists", root.parent)]
    found = _load_mat(next((place for place in places if place.exists()), places[0]), "file_list", "labels")
    return _strings(found["file_list"]), [int(label) - 1 for label in found["labels"]]


def read_ufg(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """Cotton80, SoyLocal: anno/train.txt, anno/test.txt (lines of an image's name and its class from 1), images/."""
    lines = {}
    for name in {"train", split}:
        path = root / "anno" / f"{name}.txt"
        lines[name] = [_name_and_class(line, path) for line in read_text(path).splitlines() if line.strip()]
    count = max((label for _, label in lines["train"]), default=0)
    _check_count(count, len(lines["train"]), root / "anno" / "train.txt")
    classes = [str(number) for number in range(1, count + 1)]
    paths = [root / "images" / name for name, _ in lines[split]]
    return Listing(classes, paths, [label - 1 for _, label in lines[split]])


def _name_and_class(line: str, path: Path) -> tuple[str, int]:
    name, blank, label = line.strip().rpartition(" ")
    if not blank:
        raise ListError(f"{shown(path)}: a line must be an image and its class; got '{printable(line)}'")
    return name.strip(), _number(label, path)


def _number(text: str, path: Path) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ListError(f"{shown(path)}: a class must be a number from 1 on; got '{printable(text)}'")
    return int(text)


def _check_count(classes: int, images: int, path: Path) -> None:
    """Refuses a class of a huge number before there are names for all below it: every class must have images."""
    if classes > images + FEW:
        raise ListError(f"{shown(path)} must have images of every class up to its last; got class {classes}")


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
    annotations = _load_mat(listed, "annotations")["annotations"]
    classes = _strings(_load_mat(root / "devkit/cars_meta.mat", "class_names")["class_names"])
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
    for name in ("variants", "images_variant_trainval", "images_variant_test"):
        read_text(root / "data" / f"{name}.txt")  # torchvision would wait for a pipe, and name no file
    found = FGVCAircraft(str(root.parent), {"train": "trainval", "test": "test"}[split], "variant")
    paths = [Path(file) for file in found._image_files]
    box_file, boxes = root / "data" / "images_box.txt", None
    if box_file.exists():
        box_of = {key: _box(box, box_file) for key, box in _pairs(box_file)}
        boxes = [box_of.get(path.stem) for path in paths]
    return Listing(list(found.classes), paths, list(found._labels), boxes)


def read_inat2017(root: Path, split: str, _classes: Sequence[str] | None) -> Listing:
    """iNaturalist 2017: train2017.json, and val2017.json, which is tested on: the test labels are not public."""
    listed = root / {"train": "train2017.json", "test": "val2017.json"}[split]
    try:
        found = json.loads(read_text(listed))
    except json.JSONDecodeError as error:
        raise ListError(f"{shown(listed)} must be JSON; got {error}") from None
    categories = sorted(found["categories"], key=lambda category: category["id"])
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    category_of = {one["image_id"]: one["category_id"] for one in found["annotations"]}
    images = found["images"]
    paths = [root / image["file_name"] for image in images]
    labels = [label_of[category_of[image["id"]]] for image in images]
    return Listing([category["name"] for category in categories], paths, labels)


def _load_mat(path: Path, *names: str) -> dict[str, Any]:
    """Variables of a MATLAB file: arrays and cells as flat lists, structures as dicts.

    Raises:
        ListError: it is not there, is none or has none of that name. ImportError: SciPy is not installed.
    """
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("the lists are MATLAB files, which need SciPy: pip install 'ffvt[train]'")
    try:
        with open_regular(path) as file:
            command = [sys.executable, str(Path(__file__).with_name("matlab_dump.py")), *names]
            reader = subprocess.run(command, stdin=file, capture_output=True, text=True)
    except FileNotFoundError:
        raise ListError(f"{shown(path)} must be there; got no such file") from None
    except OSError as error:
        raise ListError(f"{shown(path)} must be a readable file; got one that {error.strerror}") from error
    if reader.returncode:
        lines = reader.stderr.strip().splitlines() if reader.returncode > 0 else []  # below: a signal
        raise ListError(f"{shown(path)} {printable((lines or ['must be undamaged; got what crashes its reader'])[-1])}")
    return json.loads(reader.stdout)


def _scalar(value: Any) -> Any:
    """The one entry of MATLAB's nested one-element arrays."""
    while isinstance(value, list) and value:
        value = value[0]
    return value


def _strings(cells: list[Any]) -> list[str]:
    return [str(_scalar(cell)) for cell in cells]
