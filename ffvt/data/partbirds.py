"""PartBirds: a procedural fine-grained image set, drawn from a seed (`partbirds_drawing.py`), without files.

A class is a family (seen in the hue of the whole bird) times a variety (seen only in one small mark on its wing).
All marks are rearrangements of the same pixels, and stray marks of other varieties lie around the bird, so neither
overall colour nor the mere presence of a mark settles the class: a model has to look at the mark, on the bird.
"""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ffvt.data.partbirds_drawing import FAMILIES, MARKS, Box, PartBirdsConfig, Scene, draw_scene, put_marks
from ffvt.data.transforms import patches_in_box

_SPLITS = {"train": 0, "test": 1}

PRESETS = {
    "easy": PartBirdsConfig(
        64, 3, 3, mark_size=14, distractors=1, clutter=0.15, train_size=1500, test_size=300, bird=0.55, wander=0.5
    ),
    "default": PartBirdsConfig(),
    "hard": PartBirdsConfig(
        112, 5, 8, mark_size=14, distractors=4, clutter=1.0, train_size=8000, test_size=2000, bird=0.42, wander=1.0
    ),
}


class PartBirds(Dataset):
    """Images of birds whose variety only a small mark on the wing gives away; map-style, drawn on first use.

    `split` is "train" or "test" and `preset` a key of `PRESETS`; `overrides` replace fields of the preset's
    `PartBirdsConfig`, and `size` its number of images. Image i depends on the seed, the split, i and the config alone:
    not on the size, nor on the order of access. Finished images are kept, as uint8. Raises ValueError for an unknown
    split, preset or setting and for values that make no sense.

    Attributes: `config`; `split`; `seed`; `families` and `varieties`, the counts; `classes`, names such as
    "amber-ring", in label order; `labels`, a list of int, every class equally often, to within one.
    """

    def __init__(
        self, split: str = "train", preset: str = "default", seed: int = 0, size: int | None = None, **overrides
    ):
        for name, value, known in (("split", split, _SPLITS), ("preset", preset, PRESETS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        unknown = sorted(set(overrides) - {item.name for item in fields(PartBirdsConfig)})
        if unknown:
            raise ValueError(f"unknown PartBirds settings: {', '.join(unknown)}")
        if type(seed) is not int or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be int in 0..2**32-1, got {seed!r}")
        self.split, self.seed = split, seed
        self.config = replace(PRESETS[preset], **overrides, **({} if size is None else {f"{split}_size": size}))
        self.families, self.varieties = self.config.families, self.config.varieties
        self.classes = [f"{a}-{b}" for a in [*FAMILIES][: self.families] for b in [*MARKS][: self.varieties]]
        count, self.side = getattr(self.config, f"{split}_size"), self.config.image_size
        # Every run of len(classes) images holds each class once, in an order drawn for that run: balanced at any
        # size, and a larger set only appends to a smaller one.
        runs = range(-(-count // len(self.classes)))
        orders = [np.argsort(self._stream(0, run).random(len(self.classes)), kind="stable") for run in runs]
        self.labels: list[int] = np.concatenate(orders)[:count].tolist()
        self._images = np.empty((count, 3, self.side, self.side), np.uint8)
        self._boxes: list[Box | None] = [None] * count

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Image, uint8 (3, S, S), yours to change, and its label. Raises IndexError out of range."""
        index = self._drawn(index)
        return torch.from_numpy(self._images[index].copy()), self.labels[index]

    @property
    def coarse_only_ceiling(self) -> float:
        """Best accuracy to be had from the family alone."""
        return 1 / self.varieties

    @property
    def bag_of_marks_ceiling(self) -> float:
        """Best accuracy to be had from the family and the marks in sight, blind to which of them the bird wears."""
        return 1 / (self.config.distractors + 1)

    def family(self, label: int) -> int:
        """Family number of a label. Raises ValueError for a label out of range."""
        if not 0 <= label < len(self.classes):
            raise ValueError(f"label must be in 0..{len(self.classes) - 1}, got {label!r}")
        return int(label) // self.varieties

    def box(self, index: int) -> Box:
        """Box (x0, y0, x1, y1) of the mark on the bird, in pixels, half-open."""
        return self._boxes[self._drawn(index)]

    def relative_box(self, index: int) -> tuple[float, float, float, float]:
        """The same box as shares of the image's side."""
        x0, y0, x1, y1 = (edge / self.config.image_size for edge in self.box(index))
        return x0, y0, x1, y1

    def distractors(self, index: int) -> list[tuple[Box, int]]:
        """The stray marks of an image: the box of each, as in `box`, and its variety."""
        return list(self._scene(self._position(index)).strays)

    def mark_tokens(self, index: int, patch_size: int) -> Tensor:
        """Patches that the mark's box overlaps: bool (grid * grid,), row by row, without a class token.

        Raises ValueError if `patch_size`, in pixels, does not divide the image.
        """
        size = self.config.image_size
        if patch_size < 1 or size % patch_size:
            raise ValueError(f"patch_size must divide the image size {size}, got {patch_size!r}")
        return patches_in_box(self.box(index), patch_size, size // patch_size)

    def render(self, index: int, variety: int | None = None) -> Tensor:
        """Draw image `index` anew, uint8 (3, S, S); `variety` puts that mark on the bird and changes nothing else."""
        index = self._position(index)
        chosen = self.labels[index] % self.varieties if variety is None else variety
        if not 0 <= chosen < self.varieties:
            raise ValueError(f"variety must be in 0..{self.varieties - 1}, got {variety!r}")
        return torch.from_numpy(put_marks(self._scene(index), chosen))

    def materialize(self) -> tuple[Tensor, Tensor]:
        """Draw whatever is missing: images, uint8 (N, 3, S, S) in the set's own memory, and labels, int64 (N,)."""
        for index in range(len(self)):
            self._drawn(index)
        return torch.from_numpy(self._images), torch.tensor(self.labels)

    def _stream(self, purpose: int, index: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, _SPLITS[self.split], purpose, index])

    def _position(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return int(index) % len(self)

    def _scene(self, index: int) -> Scene:
        return draw_scene(self.config, self._stream(1, index), *divmod(self.labels[index], self.varieties))

    def _drawn(self, index: int) -> int:
        """See to it that an image is in the cache; its index, counted from 0."""
        index = self._position(index)
        if self._boxes[index] is None:
            scene = self._scene(index)
            self._images[index] = put_marks(scene, self.labels[index] % self.varieties)
            self._boxes[index] = scene.box
        return index
