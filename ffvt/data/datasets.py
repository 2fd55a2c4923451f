"""Data sets by name: `open_split` gives uint8 pictures with their labels, from files, a cache, arrays or a seed."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ffvt.data.cache import DamagedCache, open_cached
from ffvt.data.images import FITS, load_image, open_image, place_in_square
from ffvt.data.layouts import CIFAR, LAYOUTS, Listing, canonical_name, read_cifar, read_listing
from ffvt.data.partbirds import PRESETS as PARTBIRDS_PRESETS
from ffvt.data.partbirds import PartBirds
from ffvt.data.transforms import PLAIN, RECIPES, Recipe, augmented
from ffvt.errors import require

log = logging.getLogger("ffvt")


class ImageSet(Protocol):
    """What the trainer needs of a split: uint8 images (3, R, R), R being `side`, their labels, the classes' names.

    Optional: `paths`, the image files; `unreadable`, the indices of those that are known not to be readable, with the
    reasons; `left_out`, how many files in the folders are no images, by kind; `relative_box(index)`, the object's box
    (left, top, right, bottom) as fractions of the square image's side, or None.
    """

    classes: Sequence[str]
    labels: Sequence[int]
    side: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class PictureFiles(Dataset):
    """The images of a listing, decoded at each access, as uint8 (3, resize_size, resize_size).

    orient, fit: as `load_image`.

    Raises:
        ValueError: fit is unknown, or images with boxes, which are those of the file as it is stored, are to be turned.
    """

    def __init__(self, listing: Listing, resize_size: int, orient: bool = False, fit: str = "stretch") -> None:
        require(fit in FITS, "data", "fit", f"one of {', '.join(FITS)}", fit)
        require(not (orient and listing.boxes is not None), "data", "orient", "False where there are boxes", orient)
        self.classes, self.labels, self.paths = listing.classes, listing.labels, listing.paths
        self.boxes, self.left_out = listing.boxes, listing.left_out
        self.side, self.orient, self.fit = resize_size, orient, fit

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return load_image(self.paths[index], self.side, self.orient, self.fit), self.labels[index]

    def relative_box(self, index: int) -> tuple[float, float, float, float] | None:
        """The object's box as fractions of the square image's side, where the set has one."""
        box = self.boxes[index] if self.boxes is not None else None
        if box is None:
            return None
        with open_image(self.paths[index]) as image:  # reads the header only
            return place_in_square(box, image.size, self.fit)


class CachedPictures(Dataset):
    """Image files read from a cache of decoded pixels (`cache.py`) instead of being decoded again.

    An image whose pixels in the cache are damaged is decoded from its file, after a warning.
    """

    def __init__(self, files: PictureFiles, cache_dir: str | Path, workers: int = 0) -> None:
        self.files = files
        self.classes, self.labels, self.paths, self.side = files.classes, files.labels, files.paths, files.side
        self.relative_box, self.left_out = files.relative_box, files.left_out
        self.pixels = open_cached(files.paths, files.side, Path(cache_dir), workers, files.orient, files.fit)
        self.unreadable: Mapping[int, str] = self.pixels.unreadable

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            return self.pixels[index], self.labels[index]
        except DamagedCache as error:
            log.warning("%s; the image is decoded anew", error)
            return self.files[index]


class ArrayImages(Dataset):
    """Pictures held in memory: pixels (N, H, H, 3) uint8."""

    def __init__(self, classes: Sequence[str], pixels: np.ndarray, labels: Sequence[int]) -> None:
        self.classes, self.labels = classes, labels
        self.pixels, self.side = torch.from_numpy(pixels), pixels.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index].permute(2, 0, 1).contiguous(), self.labels[index]


class ImageSubset(Dataset):
    """Some images of a set, by their indices."""

    def __init__(self, images: ImageSet, indices: Sequence[int]) -> None:
        self.images, self.indices = images, indices
        self.classes, self.labels, self.side = images.classes, [images.labels[i] for i in indices], images.side
        if hasattr(images, "paths"):
            self.paths = [images.paths[i] for i in indices]
        if hasattr(images, "unreadable"):
            known = images.unreadable
            self.unreadable = {new: known[old] for new, old in enumerate(indices) if old in known}

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[self.indices[index]]

    def relative_box(self, index: int) -> tuple[float, float, float, float] | None:
        """The box of the image, where the set has boxes."""
        box = getattr(self.images, "relative_box", None)
        return box(self.indices[index]) if box else None


def describe(images: ImageSet, index: int) -> str:
    """The file of an image, or its number where it has none."""
    paths = getattr(images, "paths", None)
    return str(paths[index]) if paths is not None else f"image {index}"


def recipe_of(dataset: str) -> Recipe:
    """The transforms that a data set is trained with, unless a run's options say something else (`recipe_for`)."""
    return RECIPES.get(canonical_name(dataset), PLAIN)


def recipe_for(
    options: Mapping[str, Any],
    default_mean: Sequence[float] | None = None,
    default_std: Sequence[float] | None = None,
) -> Recipe:
    """The transforms of a run, from its training options, also those of a checkpoint from before some of them.

    What the options leave open is the data set's. default_mean and default_std, those that a model was pretrained with,
    come before the data set's.

    Raises:
        ValueError: mean or std are not three usable numbers.
    """
    recipe = recipe_of(options["dataset"])
    if options.get("augment"):
        recipe = augmented(recipe, options["augment"])
    return replace(
        recipe,
        resized_crop=options.get("resized_crop") or recipe.resized_crop,
        erasing=options.get("random_erasing") or 0.0,
        mean=options.get("mean") or default_mean or recipe.mean,
        std=options.get("std") or default_std or recipe.std,
    )


def open_split(
    dataset: str,
    split: str,
    image_size: int,
    resize_size: int,
    data_root: str = "",
    preset: str = "default",
    seed: int = 0,
    classes: Sequence[str] | None = None,
    cache_dir: str = "",
    workers: int = 0,
    fit: str = "stretch",
    image_root: str = "",
    whole: bool = False,
) -> ImageSet:
    """One split of a data set by name.

    dataset: a name of `DATASETS`, or an alias. Images come from data_root, resized to squares of resize_size pixels
    (`fit`: stretch, crop or pad) after those of an "imagefolder" or "csv" are turned upright; with `cache_dir` they are
    decoded once, by `workers` threads, and then read from there. "partbirds" is made from `preset` and `seed`, without
    files; it and CIFAR have a size of their own. `classes` gives the labels of an "imagefolder" or "csv" (else the
    training split does); `image_root` is the folder of the images that a "csv" lists (else data_root is). `whole` says
    that the images are scaled to image_size, not cropped, so that resize_size may be smaller.

    Raises:
        ValueError: an unknown name or split, sizes that do not fit, or files that do not make the data set.
    """
    name = canonical_name(dataset)
    if name == "partbirds":
        return _open_partbirds(split, image_size, preset, seed)
    if name in CIFAR:
        return ArrayImages(*read_cifar(name, split, data_root))
    if resize_size < image_size and not whole:
        raise ValueError(f"{name}: resize_size must be at least img_size={image_size}; got resize_size={resize_size}")
    listing = read_listing(name, split, data_root, classes, image_root)
    files = PictureFiles(listing, resize_size, LAYOUTS[name].upright, fit)
    return CachedPictures(files, cache_dir, workers) if cache_dir else files


def _open_partbirds(split: str, image_size: int, preset: str, seed: int) -> PartBirds:
    if preset not in PARTBIRDS_PRESETS:
        raise ValueError(f"partbirds: preset must be one of {', '.join(PARTBIRDS_PRESETS)}; got preset={preset!r}")
    made_at = PARTBIRDS_PRESETS[preset].image_size
    if made_at != image_size:
        raise ValueError(f"partbirds: img_size must be {made_at} for preset {preset!r}; got img_size={image_size}")
    return PartBirds(split, preset, seed)
