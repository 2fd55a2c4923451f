"""Picture files as pixels: what is opened, how it becomes RGB, and how it becomes a square."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # PIL's ways to refuse a file
FITS = ("stretch", "crop", "pad")  # ways to make a square


def read_image(path: str | Path, orient: bool = True) -> Image.Image:
    """A picture file at its full size, in RGB.

    Greyscale and palettes become RGB, 16-bit greyscale is scaled to 8 bits.

    Args:
        path: the file.
        orient: turn it upright, as its EXIF orientation says; False as the authors read their sets.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no readable picture; the message names it.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(ImageOps.exif_transpose(image) if orient else image)
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        raise ValueError(f"load_image: path must be a readable picture; got {str(path)!r}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture in RGB.

    Raises:
        ValueError: its pixels are floating-point numbers.
    """
    if image.mode.startswith("I"):  # 16 bits: convert() would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    return image.convert("RGB")


def to_square(image: Image.Image, size: int, fit: str = "stretch") -> Tensor:
    """An RGB picture as uint8 (3, size, size), resized bilinearly.

    fit: "stretch" to a square, as the authors do; "crop" keeps the aspect ratio and the middle square; "pad" keeps it
    and all of the picture, on a grey ground.
    """
    if fit == "stretch":
        square = image.resize((size, size), Image.Resampling.BILINEAR)
    elif fit == "crop":
        square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    else:
        square = ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR, color=(124, 116, 104))
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def load_image(path: str | Path, size: int, orient: bool = True, fit: str = "stretch") -> Tensor:
    """A picture file as uint8 (3, size, size): `read_image`, then `to_square`."""
    return to_square(read_image(path, orient), size, fit)
