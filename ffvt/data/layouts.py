"""Data sets on disk by name: how each is laid out, how many pictures it has, where it comes from, who reads it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ffvt.data import layout_readers as readers
from ffvt.data.layout_readers import ListError, Listing, shown
from ffvt.data.own_readers import did_you_mean, read_csv, read_imagefolder
from ffvt.errors import printable

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CIFAR",
    "DATASETS",
    "LAYOUTS",
    "Layout",
    "Listing",
    "canonical_name",
    "find_layout",
    "find_root",
    "inspect_listing",
    "read_cifar",
    "read_listing",
]
NAMED = 3  # files or classes that an error names before it only counts


@dataclass(frozen=True)
class Layout:
    """One data set.

    aliases: other spellings of its name. marker: a file or folder that every copy has. folders: names that its folder
    may have below data_root, which may also be the folder itself. counts: official numbers of pictures per split.
    read: (folder, split, classes) -> Listing; None for CIFAR, which `read_cifar` reads. upright: whether images are
    turned as their EXIF orientation says; the authors do not for theirs.
    """

    name: str
    read: Callable[[Path, str, Sequence[str] | None], Listing] | None
    marker: str
    aliases: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    num_classes: int | None = None
    url: str = ""
    upright: bool = False


def _set(name: str, read, marker: str, aliases: str, folders: str, train: int, test: int, classes: int, url: str):
    counts = (("train", train), ("test", test))
    return Layout(name, read, marker, tuple(aliases.split()), tuple(folders.split()), counts, classes, url)


_UFG = "https://maxwell.ict.griffith.edu.au/cvipl/UFG_dataset.html"
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar.html"
LAYOUTS = {
    layout.name: layout
    for layout in (
        _set(
            "CUB",
            readers.read_cub,
            "train_test_split.txt",
            "CUB_200_2011 CUB200",
            "CUB_200_2011 CUB",
            5994,
            5794,
            200,
            "https://data.caltech.edu/records/65de6-vp158",
        ),
        _set(
            "dog",
            readers.read_dogs,
            "Images",
            "dogs StanfordDogs Stanford_Dogs",
            "dog dogs Stanford_Dogs StanfordDogs",
            12000,
            8580,
            120,
            "http://vision.stanford.edu/aditya86/ImageNetDogs/",
        ),
        _set("cotton", readers.read_ufg, "anno", "cotton80", "COTTON Cotton80 cotton", 240, 240, 80, _UFG),
        _set(
            "soyloc", readers.read_ufg, "anno", "soylocal soybean200", "soybean200 SoyLocal soyloc", 600, 600, 200, _UFG
        ),
        _set(
            "car",
            readers.read_cars,
            "devkit",
            "cars StanfordCars stanford_cars",
            "stanford_cars cars car",
            8144,
            8041,
            196,
            "https://github.com/pytorch/vision/issues/7545",
        ),
        _set(
            "air",
            readers.read_aircraft,
            "data/images_variant_trainval.txt",
            "aircraft FGVCAircraft",
            "fgvc-aircraft-2013b aircraft air",
            6667,
            3333,
            100,
            "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        ),
        _set(
            "nabirds",
            readers.read_nabirds,
            "train_test_split.txt",
            "nabird",
            "nabirds NABirds",
            23929,
            24633,
            555,
            "https://dl.allaboutbirds.org/nabirds",
        ),
        _set(
            "inat2017",
            readers.read_inat2017,
            "train2017.json",
            "iNaturalist2017",
            "inat2017 iNat2017 INat2017",
            579184,
            95986,
            5089,
            "https://github.com/visipedia/inat_comp/tree/master/2017",
        ),
        _set("cifar10", None, "cifar-10-batches-py", "", "", 50000, 10000, 10, _CIFAR_URL),
        _set("cifar100", None, "cifar-100-python", "", "", 50000, 10000, 100, _CIFAR_URL),
        Layout("imagefolder", read_imagefolder, "", ("folder",), upright=True),
        Layout("csv", read_csv, "", upright=True),
    )
}
CIFAR = ("cifar10", "cifar100")
DATASETS = (*LAYOUTS, "partbirds")


def canonical_name(dataset: str) -> str:
    """The name that a data set goes by here, whatever spelling was given: "dogs" -> "dog".

    Raises:
        ValueError: no such data set; the message names those that there are.
    """
    return "partbirds" if dataset.lower() == "partbirds" else find_layout(dataset).name


def find_layout(name: str) -> Layout:
    """The data set of a name or alias, in any case.

    Raises:
        ValueError: there is none; the message names those that there are.
    """
    for layout in LAYOUTS.values():
        if name.lower() in (known.lower() for known in (layout.name, *layout.aliases)):
            return layout
    raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got dataset={name!r}")


def find_root(layout: Layout, data_root: str | Path) -> Path:
    """The folder of a data set: data_root, or a folder of a usual name in it.

    Raises:
        ValueError: none of them holds the set; the message says what was looked for, and where to get it.
    """
    root = Path(data_root)
    if not layout.marker:
        if not root.is_dir():
            raise ValueError(f"{layout.name}: data_root must be a folder; got data_root='{shown(root)}'")
        return root
    tried = [root, *(root / folder for folder in layout.folders)]
    for folder in tried:
        if (folder / layout.marker).exists():
            return folder
    hint = did_you_mean(root, layout.marker)
    if layout.name == "CUB" and any(list(root.glob(f"{below}train_list.mat")) for below in ("", "*/", "*/*/")):
        hint = "; this looks like Stanford Dogs, which the authors' README calls CUB: use --dataset dog"
    places = ", ".join(str(folder) for folder in tried)
    raise ValueError(
        f"{layout.name}: data_root must hold {layout.marker}, from {layout.url}; looked in {printable(places, 400)}; "
        f"got data_root='{shown(root)}'{hint}"
    )


def read_listing(
    dataset: str, split: str, data_root: str | Path, classes: Sequence[str] | None = None, image_root: str | Path = ""
) -> Listing:
    """The images, labels and boxes of one split, checked.

    classes: the classes in label order, for "imagefolder" and "csv"; by default those of the training split.
    image_root: the folder of the images that a "csv" lists, by default data_root.

    Raises:
        ValueError: the set is not there, or its lists are not right: they do not read or do not fit together, a file is
        missing or lies outside of the set, a label is out of range, a class has no training images, a split is empty.
        ImportError: SciPy, which reads the lists of "dog" and "car", is not installed.
    """
    listing, problems = inspect_listing(dataset, split, data_root, classes, image_root)
    if problems:
        raise ValueError(problems[0])
    return listing


def inspect_listing(
    dataset: str, split: str, data_root: str | Path, classes: Sequence[str] | None = None, image_root: str | Path = ""
) -> tuple[Listing, list[str]]:
    """The same as `read_listing`, with all that is wrong of it, worst first, where something is to be had at all.

    Raises:
        ValueError: the set is not there, or its lists do not read.
    """
    layout = find_layout(dataset)
    root = find_root(layout, data_root)
    if layout.counts and split not in ("train", "test"):
        raise ValueError(f"{layout.name}: split must be train or test; got split={split!r}")
    if image_root and layout.name != "csv":
        raise ValueError(f"{layout.name}: image_root is for csv alone; got image_root='{shown(image_root)}'")
    more = {"image_root": Path(image_root)} if image_root else {}
    try:
        listing = layout.read(root, split, classes, **more)
    except (ListError, ImportError):
        raise
    except Exception as error:  # whatever a list makes of the code that reads it
        reason = printable(f"{type(error).__name__}: {error}", 300)
        raise ValueError(f"{layout.name}: the lists in {shown(root)} must be as published; got {reason}") from error
    return listing, [*listing.problems, *_problems(layout.name, listing.image_root or root, split, listing)]


def _problems(name: str, root: Path, split: str, listing: Listing) -> Iterator[str]:
    boxes = len(listing.paths) if listing.boxes is None else len(listing.boxes)
    if not listing.paths:
        yield f"{name}: {split} must have images; got none in '{shown(root)}'"
    if not len(listing.paths) == len(listing.labels) == boxes:
        yield (
            f"{name}: the lists of {split} must be of one length; got {len(listing.paths)} images, "
            f"{len(listing.labels)} labels, {boxes} boxes"
        )
    unnamed = [one for one in listing.classes if not isinstance(one, str)]
    if unnamed:
        yield f"{name}: a class must have a name; got {printable(repr(unnamed[0]))}"
    wrong = [label for label in listing.labels if not 0 <= label < len(listing.classes)]
    if wrong:
        yield f"{name}: labels of {split} must be in 0..{len(listing.classes) - 1}; got {wrong[0]} ({len(wrong)} such)"
    top = os.path.abspath(root)
    outside = [path for path in listing.paths if not os.path.abspath(path).startswith(os.path.join(top, ""))]
    if outside:
        hint = "; image_root may name another folder" if name == "csv" else ""
        yield f"{name}: images must lie in {shown(top)}; the list of {split} names {shown(outside[0])}{hint}"
    missing = [path for path in listing.paths if not os.path.isfile(path)]
    if missing:
        some = ", ".join(printable(str(path), 250) for path in missing[:NAMED])
        yield f"{name}: every listed image must be there; {len(missing)} of {split} are missing: {some}"
    counts = Counter(listing.labels)
    empty = [one for label, one in enumerate(listing.classes) if not counts[label]]
    if split == "train" and empty:
        some = ", ".join(f"'{printable(str(one))}'" for one in empty[:NAMED])
        yield f"{name}: every class of train must have images; got none in {some} ({len(empty)} such)"


def read_cifar(name: str, split: str, data_root: str | Path) -> tuple[list[str], np.ndarray, list[int]]:
    """Classes, pixels (N, 32, 32, 3) uint8 and labels of CIFAR-10 or CIFAR-100, by torchvision, which checks MD5 sums.

    Raises:
        ValueError: it is not there, or damaged.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    if split not in ("train", "test"):
        raise ValueError(f"{name}: split must be train or test; got split={split!r}")
    try:
        found = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name](str(data_root), train=split == "train")
    except RuntimeError as error:  # torchvision says the same of a missing and of a damaged copy
        layout = LAYOUTS[name]
        raise ValueError(
            f"{name}: data_root must hold an undamaged {layout.marker}, from {layout.url}; got "
            f"data_root={str(data_root)!r}"
        ) from error
    return list(found.classes), found.data, list(found.targets)
