"""The recipes' transforms: resize to a square, crop, flip, normalise.

The deterministic part (decode, resize) gives uint8; the random part draws from a generator of its own per
(seed, epoch, index), so a sample looks the same whatever the worker, the rank or the batch it lands in; normalising is
done on the whole batch, on the device.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def load_image(path: str | Path, size: int) -> Tensor:
    """A picture file as uint8 (3, size, size), resized bilinearly to a square as the authors do.

    Greyscale and palettes become RGB, 16-bit greyscale is scaled to 8 bits, alpha and EXIF orientation are ignored.

    Raises:
        FileNotFoundError: no such file. ValueError: it is no readable picture; the message names it.
    """
    try:
        with Image.open(path) as image:
            resized = _to_rgb(image).resize((size, size), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's ways to refuse a file
        raise ValueError(f"load_image: path must be a readable picture; got {str(path)!r}: {error}") from error
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits: convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    return image.convert("RGB")


def random_crop_flip(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random size x size crop of (3, R, R), mirrored half of the time."""
    room = image.shape[-1] - size
    top, left = (int(torch.randint(room + 1, (), generator=generator)) for _ in range(2))
    crop = image[:, top : top + size, left : left + size]
    return crop.flip(-1) if torch.rand((), generator=generator) < 0.5 else crop


def center_crop(image: Tensor, size: int) -> Tensor:
    """The middle size x size of (3, R, R)."""
    start = (image.shape[-1] - size) // 2
    return image[:, start : start + size, start : start + size]


def normalize(images: Tensor) -> Tensor:
    """uint8 images (B, 3, S, S) to fp32, by ImageNet's mean and standard deviation."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1)
    return (images.float() / 255 - mean) / std
