"""The recipes' transforms: resize to a square, crop, flip, colour, normalise.

The deterministic part (decode, resize) gives uint8 and can be kept in a cache. Of the random part, what depends on the
single picture (crop, flip, policy) is done where it is loaded, on uint8; colour jitter and normalising are done on the
whole batch, on the device. Every random choice comes from a generator per (seed, epoch, index), so a sample looks the
same whatever the worker, the rank or the batch it lands in.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

from ffvt.kernels.backends import forced_backend, resolve
from ffvt.kernels.reference import ORDERS

NO_JITTER = torch.tensor([1.0, 1.0, 1.0, 0.0])


@dataclass(frozen=True)
class Recipe:
    """What a data set's training adds to resize, crop and flip, and its normalisation.

    jitter: brightness, contrast and saturation are scaled by factors from [1 - jitter, 1 + jitter], in random order.
    policy: AutoAugment's ImageNet policy. resized_crop: crops cover 5 to 100 % of the picture and are scaled to the
    image size, without flips (the CIFAR recipe), instead of being cut out at that size.
    """

    jitter: float = 0.0
    policy: bool = False
    resized_crop: bool = False
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # ImageNet's
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


PLAIN = Recipe()
_JITTERED = Recipe(jitter=0.4)
_POLICY = Recipe(policy=True)
_CIFAR = Recipe(resized_crop=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
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


def random_view(image: Tensor, size: int, recipe: Recipe, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One random view of a picture: crop, flip and policy applied, the colours' factors drawn.

    image: uint8 (3, R, R). Returns the view, uint8 (3, size, size), and jitter (4,) fp32 for `augment`.
    """
    if recipe.resized_crop:
        return _resized_crop(image, size, generator), NO_JITTER
    view = random_crop_flip(image, size, generator)
    if recipe.policy:
        with _global_generator_from(generator):
            view = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, fill=[128, 128, 128])(view)
    return view, draw_jitter(recipe.jitter, generator)


def random_crop_flip(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random size x size crop of (3, R, R), a view of it, or mirrored half of the time, a copy."""
    room = image.shape[-1] - size
    top, left = torch.randint(room + 1, (2,), generator=generator).tolist()
    crop = image[:, top : top + size, left : left + size]
    return crop.flip(-1) if torch.rand((), generator=generator) < 0.5 else crop


def _resized_crop(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    with _global_generator_from(generator):
        return v2.RandomResizedCrop(size, scale=(0.05, 1.0), antialias=True)(image)


@contextmanager
def _global_generator_from(generator: torch.Generator) -> Iterator[None]:
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


def center_crop(image: Tensor, size: int) -> Tensor:
    """The middle size x size of (3, R, R)."""
    start = (image.shape[-1] - size) // 2
    return image[:, start : start + size, start : start + size]


def evaluation_view(image: Tensor, size: int, recipe: Recipe) -> Tensor:
    """What evaluation sees of (3, R, R) uint8: the middle, or with the CIFAR recipe all of it, scaled to the size."""
    if recipe.resized_crop:
        return v2.functional.resize(image, [size, size], antialias=True)
    return center_crop(image, size)


def patches_in_box(box: tuple[float, float, float, float], patch_size: float, grid_size: int) -> Tensor:
    """Which patches overlap a box (left, top, right, bottom; pixels, half-open): bool (grid_size**2,), row by row."""
    left, top, right, bottom = box
    edges = torch.arange(grid_size) * patch_size
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
