"""The recipes' transforms: resize to a square, crop, flip, colour, normalise.

The deterministic part (decode, resize) gives uint8 and can be kept in a cache. Of the random part, what depends on a
single picture (crop, flip, policy) is done where it is loaded, on uint8; colour jitter, normalising and erasing are
done on the whole batch, on the device. Every random choice comes from a generator per (seed, epoch, index), so a sample
looks the same whatever the worker, the rank or the batch it lands in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from ffvt.errors import require
from ffvt.kernels.backends import forced_backend, resolve
from ffvt.kernels.reference import ORDERS

NO_JITTER = torch.tensor([1.0, 1.0, 1.0, 0.0])
NOT_ERASED = torch.zeros(4, dtype=torch.int64)
GREY = [128, 128, 128]  # where a policy moves the picture away
POLICIES = {  # on Pillow's images RandAugment and TrivialAugment take 0.3 to 0.4 of the time that they take on tensors
    "auto": v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=GREY),
    "rand": v2.Compose([v2.ToPILImage(), v2.RandAugment(fill=GREY), v2.PILToTensor()]),
    "trivial": v2.Compose([v2.ToPILImage(), v2.TrivialAugmentWide(fill=GREY), v2.PILToTensor()]),
}
_ERASING = v2.RandomErasing(p=1.0)  # draws the rectangle; a recipe says how often


@dataclass(frozen=True)
class Recipe:
    """What training does to resized pictures, and how training and evaluation normalise them.

    Attributes:
        crop: cut the view out at a random place; else the middle.
        flip: mirror half of the views.
        jitter: brightness, contrast, saturation are scaled by factors from [1 - jitter, 1 + jitter], in random order.
        policy: a name of `POLICIES`, or "" for none.
        resized_crop: random crops cover this share of the picture to all of it, and are scaled to the image size; 0:
            they are cut out at that size.
        whole: the middle is the whole picture, scaled to the image size, as small pictures need (CIFAR).
        erasing: how often a rectangle of a view is erased.
        mean, std: of each channel, as shares of white.

    Raises:
        ValueError: mean or std are not three usable numbers.
    """

    crop: bool = True
    flip: bool = True
    jitter: float = 0.0
    policy: str = ""
    resized_crop: float = 0.0
    whole: bool = False
    erasing: float = 0.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        require(_are_channels(self.mean, -math.inf), "recipe", "mean", "three finite numbers", self.mean)
        require(_are_channels(self.std, 1e-4), "recipe", "std", "three finite numbers above 0.0001", self.std)
        for name in ("mean", "std"):  # lists come from JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))


def _are_channels(values: Any, above: float) -> bool:
    numbers = isinstance(values, (tuple, list)) and all(isinstance(value, (int, float)) for value in values)
    return numbers and len(values) == 3 and all(above < value < math.inf for value in values)


PLAIN = Recipe()
AUGMENTATIONS = {  # by name of `--augment`: what it changes in PLAIN's random part, which is crop and flip
    "none": {"crop": False, "flip": False},
    "flip": {"crop": False},
    "crop": {},
    "jitter": {"jitter": 0.4},
    **{policy: {"policy": policy} for policy in ("trivial", "rand", "auto")},
}
_JITTERED = Recipe(jitter=0.4)
_POLICY = Recipe(policy="auto")
_CIFAR = Recipe(flip=False, resized_crop=0.05, whole=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
RECIPES = {  # the authors'; NABirds, of which they give none, is treated as CUB. All others: crop and flip.
    "CUB": _JITTERED,
    "dog": _JITTERED,
    "air": _JITTERED,
    "nabirds": _JITTERED,
    "car": _POLICY,
    "inat2017": _POLICY,
    "cifar10": _CIFAR,
    "cifar100": _CIFAR,
}


def augmented(recipe: Recipe, name: str) -> Recipe:
    """The recipe with the random part of a name of `AUGMENTATIONS` instead of its own.

    Raises:
        ValueError: there is no such name.
    """
    require(name in AUGMENTATIONS, "recipe", "augment", f"one of {', '.join(AUGMENTATIONS)}", name)
    return replace(recipe, **{"crop": True, "flip": True, "jitter": 0.0, "policy": "", **AUGMENTATIONS[name]})


def random_view(image: Tensor, size: int, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One random view of a picture: crop, flip and policy applied, the colours' factors and what is erased drawn.

    image: uint8 (3, R, R). Returns the view, uint8 (3, size, size), perhaps a view of the image; jitter (4,) fp32 for
    `augment`; and for `erase` the rectangle's top, left, height and width, (4,) int64, zeros for none.
    """
    view = _random_crop(image, size, recipe, generator) if recipe.crop else evaluation_view(image, size, recipe)
    if recipe.flip and torch.rand((), generator=generator) < 0.5:
        view = view.flip(-1)
    if recipe.policy:
        with global_generator_from(generator):
            view = POLICIES[recipe.policy](view)
    jitter = draw_jitter(recipe.jitter, generator)
    return view, jitter, draw_erased(recipe.erasing, view, generator)


def _random_crop(image: Tensor, size: int, recipe: Recipe, generator: torch.Generator) -> Tensor:
    if recipe.resized_crop:
        with global_generator_from(generator):
            return v2.RandomResizedCrop(size, scale=(recipe.resized_crop, 1.0), antialias=True)(image)
    room = image.shape[-1] - size
    top, left = torch.randint(room + 1, (2,), generator=generator).tolist()
    return image[:, top : top + size, left : left + size]


@contextmanager
def global_generator_from(generator: torch.Generator) -> Iterator[None]:
    """The CPU's global generator, from which torchvision draws, seeded from another one and afterwards as before."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(int(torch.randint(2**62, (), generator=generator)))  # no GPU's
    try:
        yield
    finally:
        torch.set_rng_state(state)


def draw_jitter(strength: float, generator: torch.Generator) -> Tensor:
    """Factors of brightness, contrast and saturation, and the number of their order in `ORDERS`: (4,) fp32."""
    if strength == 0:
        return NO_JITTER
    low = max(0.0, 1 - strength)
    factors = low + (1 + strength - low) * torch.rand(3, generator=generator)
    return torch.cat([factors, torch.randint(len(ORDERS), (1,), generator=generator)])


def draw_erased(share: float, view: Tensor, generator: torch.Generator) -> Tensor:
    """In a share of the views a rectangle, as torchvision's RandomErasing draws it: top, left, height, width, int64."""
    if share == 0 or torch.rand((), generator=generator) >= share:
        return NOT_ERASED
    with global_generator_from(generator):
        drawn = _ERASING.make_params([view])
    return NOT_ERASED if drawn["v"] is None else torch.tensor([drawn[key] for key in "ijhw"])


def erase(pixels: Tensor, rectangles: Tensor) -> None:
    """Sets rectangles of normalised pixels (B, 3, S, S) to zero, the mean colour; rectangles (B, 4) on the CPU."""
    for image, (top, left, height, width) in zip(pixels, rectangles.tolist()):
        image[:, top : top + height, left : left + width] = 0


def center_crop(image: Tensor, size: int) -> Tensor:
    """The middle size x size of (3, R, R)."""
    start = (image.shape[-1] - size) // 2
    return image[:, start : start + size, start : start + size]


def evaluation_view(image: Tensor, size: int, recipe: Recipe) -> Tensor:
    """What evaluation sees of (3, R, R) uint8: the middle, or all of it, scaled to the size."""
    if recipe.whole:
        return v2.functional.resize(image, [size, size], antialias=True)
    return center_crop(image, size)


def patches_in_box(
    box: tuple[float, float, float, float], patch_size: float, grid_size: int, stride: float | None = None
) -> Tensor:
    """Which patches overlap a box (left, top, right, bottom; pixels, half-open): bool (grid_size**2,), row by row.

    stride: pixels from one patch to the next; patch_size where None.
    """
    left, top, right, bottom = box
    edges = torch.arange(grid_size) * (stride or patch_size)
    columns, rows = ((edges < high) & (edges + patch_size > low) for low, high in ((left, right), (top, bottom)))
    return (rows[:, None] & columns).flatten()


def augment(images: Tensor, jitter: Tensor | None, recipe: Recipe, out: Tensor | None = None) -> Tensor:
    """Colour jitter and normalisation of a batch, on the device where it is.

    Args:
        images: (B, 3, S, S) uint8.
        jitter: (B, 4) fp32 from `random_view`, on the CPU or the images' device; None for none, as in evaluation.
        recipe: whether there is jitter, the mean and the standard deviation.
        out: an earlier result that nobody needs any more; it is written over where its shape fits, as fresh memory
            costs more than the arithmetic.

    Returns:
        (B, 3, S, S) fp32.

    Raises:
        ValueError: images or jitter have another shape, or an order is none of 0 to 5 (of a jitter on the CPU).
        TypeError: images are not uint8.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"augment: images must be (B, 3, S, S); got images.shape={tuple(images.shape)}")
    if images.dtype != torch.uint8:
        raise TypeError(f"augment: images must be uint8; got images.dtype={images.dtype}")
    rows = torch.empty(0) if jitter is None or not recipe.jitter else _checked_jitter(jitter, len(images))
    scale, shift = _normalisation(recipe)
    rows, scale, shift = (t.to(images.device, torch.float32, non_blocking=True) for t in (rows, scale, shift))
    fits = out is not None and (out.shape, out.dtype, out.device) == (images.shape, torch.float32, images.device)
    if not (fits and out.is_contiguous()):
        out = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    backend = resolve("augment", forced_backend(), images)
    backend.augment(images.contiguous(), rows.contiguous(), scale, shift, out)
    return out


def _checked_jitter(jitter: Tensor, count: int) -> Tensor:
    if jitter.shape != (count, 4):
        raise ValueError(f"augment: jitter must be ({count}, 4); got jitter.shape={tuple(jitter.shape)}")
    if jitter.device.type == "cpu" and not ((jitter[:, 3] >= 0) & (jitter[:, 3] < len(ORDERS))).all():
        raise ValueError(f"augment: orders must be 0 to 5; got {jitter[:, 3].tolist()}")
    return jitter


def normalize(images: Tensor, recipe: Recipe = PLAIN) -> Tensor:
    """uint8 images (B, 3, S, S) to fp32, by the recipe's mean and standard deviation (ImageNet's by default)."""
    return augment(images, None, recipe)


def _normalisation(recipe: Recipe) -> tuple[Tensor, Tensor]:
    """scale and shift (3,) that take [0, 255] to normalised values."""
    mean, std = torch.tensor(recipe.mean), torch.tensor(recipe.std)
    return 1 / (255 * std), -mean / std
