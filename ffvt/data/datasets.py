"""Data sets by name, and the order in which their samples are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ffvt.data.partbirds import PRESETS as PARTBIRDS_PRESETS
from ffvt.data.partbirds import PartBirds
from ffvt.data.transforms import center_crop, load_image, random_crop_flip

DATASETS = ("imagefolder", "partbirds")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
AUTHORS_DATASETS = ("cifar10", "cifar100", "soyloc", "cotton", "CUB", "dog", "car", "air")


class ImageSet(Protocol):
    """What the trainer needs of a split: uint8 images (3, R, R) with their labels, and the names of the classes."""

    classes: Sequence[str]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...


class FolderImages(Dataset):
    """One picture file per sample, root/split/class/**/picture; hidden files and folders are passed over.

    The classes are `classes`, or else the folders of the training split.

    Raises:
        ValueError: a split is missing, a class is unknown, or (in training) a class has no picture.
    """

    def __init__(self, root: str | Path, split: str, resize_size: int, classes: Sequence[str] | None = None) -> None:
        self.resize_size = resize_size
        self.classes = _subfolders(Path(root) / "train") if classes is None else list(classes)
        label_of = {name: label for label, name in enumerate(self.classes)}
        self.samples: list[tuple[Path, int]] = []
        for name in _subfolders(Path(root) / split):
            if name not in label_of:
                raise ValueError(f"imagefolder: {split} must have only the classes of training; got class {name!r}")
            files = _pictures(Path(root) / split / name)
            if not files and split == "train":
                raise ValueError(f"imagefolder: every class of train must have pictures; got none in {name!r}")
            self.samples += [(file, label_of[name]) for file in files]
        if not self.samples:
            raise ValueError(
                f"imagefolder: {split} must have pictures in class folders; got {str(Path(root) / split)!r}"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return load_image(path, self.resize_size), label


def _subfolders(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"imagefolder: data_root must hold {folder.name}/<class>/<picture>; got {str(folder)!r}")
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _pictures(folder: Path) -> list[Path]:
    files = (file for file in folder.rglob("*") if file.suffix.lower() in PICTURE_SUFFIXES)
    return sorted(file for file in files if file.is_file() and not file.name.startswith("."))


def open_split(
    dataset: str,
    split: str,
    image_size: int,
    resize_size: int,
    data_root: str = "",
    preset: str = "default",
    seed: int = 0,
    classes: Sequence[str] | None = None,
) -> ImageSet:
    """One split of a data set by name.

    dataset: "imagefolder" (data_root/split/class/picture; `classes` gives the labels, else the training split does) or
    "partbirds" (made from `preset` and `seed`, without files; resize_size plays no part).

    Raises:
        ValueError: an unknown name or split, sizes that do not fit, or files that do not make the data set.
    """
    if dataset == "imagefolder":
        if resize_size < image_size:
            raise ValueError(
                f"imagefolder: resize_size must be at least img_size={image_size}; got resize_size={resize_size}"
            )
        return FolderImages(data_root, split, resize_size, classes)
    if dataset == "partbirds":
        if preset not in PARTBIRDS_PRESETS:
            raise ValueError(f"partbirds: preset must be one of {', '.join(PARTBIRDS_PRESETS)}; got preset={preset!r}")
        made_at = PARTBIRDS_PRESETS[preset].image_size
        if made_at != image_size:
            raise ValueError(f"partbirds: img_size must be {made_at} for preset {preset!r}; got img_size={image_size}")
        return PartBirds(split, preset, seed)
    if dataset in AUTHORS_DATASETS:
        raise ValueError(
            f"data set {dataset!r} has no reader in this version: lay it out as folders and use --dataset imagefolder"
        )
    raise ValueError(f"dataset must be one of {', '.join(DATASETS)}; got dataset={dataset!r}")


class TrainingView(Dataset):
    """A split under the random transforms. The key of a sample is (epoch, index), and it decides the sample alone."""

    def __init__(self, images: ImageSet, image_size: int, seed: int) -> None:
        self.images, self.image_size, self.seed = images, image_size, seed

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        epoch, index = key
        image, label = self.images[index]
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch, index))
        return random_crop_flip(image, self.image_size, generator), label


class EvaluationView(Dataset):
    """A split under the deterministic transforms."""

    def __init__(self, images: ImageSet, image_size: int) -> None:
        self.images, self.image_size = images, image_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.images[index]
        return center_crop(image, self.image_size), label


class StepSampler(Sampler):
    """For each step, the keys (epoch, index) of one rank's batch.

    The training stream is one permutation of the data after the other; step t of all ranks together takes its samples
    [t*G, (t+1)*G), with G = batch_size * world_size, and rank r the r-th part of them. So the global batches do not
    depend on the number of ranks, no sample is dropped, and a batch may hold the end of one epoch and the start of the
    next.
    """

    def __init__(
        self, num_samples: int, batch_size: int, num_steps: int, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        self.num_samples, self.batch_size, self.num_steps, self.seed = num_samples, batch_size, num_steps, seed
        self.rank, self.world_size = rank, world_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.num_steps):
            start = (step * self.world_size + self.rank) * self.batch_size
            yield [self._key(position) for position in range(start, start + self.batch_size)]

    def _key(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.num_samples)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, epoch, -1))
            self._epoch, self._order = epoch, torch.randperm(self.num_samples, generator=generator)
        return epoch, int(self._order[offset])


def _mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers, so that neighbouring numbers give unrelated seeds (splitmix64)."""
    state = 0
    for number in numbers:
        state = (state ^ (number & (2**64 - 1))) + 0x9E3779B97F4A7C15 & (2**64 - 1)
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        state = (state ^ state >> 27) * 0x94D049BB133111EB & (2**64 - 1)
        state ^= state >> 31
    return state >> 1
