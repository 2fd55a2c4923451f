"""Image files as pixels: what is opened, how it becomes RGB, and how it becomes a square."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ffvt.errors import printable, require
from ffvt.files import open_regular

# Pillow's other formats run programs (PostScript), are drawings, or are nobody's photographs.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM")
UNREADABLE = (OSError, ValueError)  # what reading a file raises where it cannot be read
FITS = ("stretch", "crop", "pad")  # ways to make a square
PAD_COLOUR = (124, 116, 104)  # ImageNet's mean, which normalising takes to zero
EXHAUSTED = (errno.EMFILE, errno.ENFILE)  # it is not the file's fault
NAMED_LETTERS = 600  # of a path in a message
TURNS = {  # EXIF's orientations, and what undoes them
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow warns, with lines of its code, of half the size that it refuses, and of damaged metadata.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@cache
def _formats() -> list[str]:
    """Those of FORMATS that this Pillow knows."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def open_image(path: str | Path) -> Iterator[Image.Image]:
    """An image file, opened: its header is read. What goes wrong with it inside the block is the file's fault, too.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is no regular file (a pipe, a device, a folder), of no format in FORMATS, larger than 179 million
            pixels, or damaged in whatever way; the message names it.
        OSError: too many files are open.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=_formats()) as image:
            yield image
    except FileNotFoundError:
        raise
    except Exception as error:  # damage makes decoders raise whatever their code happens to: RuntimeError, struct.error
        if isinstance(error, OSError) and error.errno in EXHAUSTED:
            raise
        name = printable(str(path), NAMED_LETTERS)
        raise ValueError(f"load_image: path must be a readable image; got '{name}': {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(_formats())}, or damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the path once more
    return printable(str(error)) or type(error).__name__


def read_image(path: str | Path, orient: bool = True) -> Image.Image:
    """An image file at its full size, in RGB; of an animation the first picture.

    Args:
        path: the file.
        orient: turn it upright, as its EXIF orientation says; False as the authors read their sets. (Pillow turns
            TIFF files in any case.)

    Raises:
        FileNotFoundError, ValueError, OSError: as `open_image` and `to_rgb`.
    """
    with open_image(path) as image:
        image.load()
        return to_rgb(upright(image) if orient else image)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8; 1 is upright, and stands for none or a damaged one."""
    try:
        found = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # the pixels may be whole though the EXIF data are not
        return 1
    return found if found in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says."""
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image in RGB.

    Transparent pixels become white, half transparent ones a mixture with white, whatever the format: PNG, WebP, GIF,
    a palette. Integers of 16 bits are scaled to 8, also where they are stored in 32.

    Raises:
        ValueError: its pixels are floating-point numbers, or integers beyond 16 bits.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # convert() would clip at 255 instead of scaling
        return _scaled(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """A greyscale image of integers in 0..65535, in 8 bits."""
    pixels = np.asarray(image)
    low, high = int(pixels.min()), int(pixels.max())
    if low < 0 or high > 65535:
        raise ValueError(f"integer pixels must be in 0..65535; got {low}..{high}")
    return Image.fromarray((pixels.astype(np.float32) / 257).round().astype(np.uint8))


def to_square(image: Image.Image, size: int, fit: str = "stretch") -> Tensor:
    """An RGB image as uint8 (3, size, size), resized bilinearly.

    fit: "stretch" to a square, as the authors do; "crop" keeps the aspect ratio and the middle square; "pad" keeps it
    and all of the image, on a grey ground.
    """
    require(fit in FITS, "to_square", "fit", f"one of {', '.join(FITS)}", fit)
    if fit == "stretch":
        square = image.resize((size, size), Image.Resampling.BILINEAR)
    elif fit == "crop":
        square = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    else:
        square = ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR, color=PAD_COLOUR)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def place_in_square(
    box: tuple[float, float, float, float], size: tuple[int, int], fit: str
) -> tuple[float, float, float, float]:
    """Where a box (left, top, right, bottom; pixels) of an image of size (width, height) lies in its square.

    Returns:
        left, top, right, bottom as fractions of the square's side; below 0 or above 1 where "crop" cuts it off.
    """
    width, height = size
    if fit == "stretch":
        return box[0] / width, box[1] / height, box[2] / width, box[3] / height
    side = min(size) if fit == "crop" else max(size)
    x, y = (width - side) / 2, (height - side) / 2
    return (box[0] - x) / side, (box[1] - y) / side, (box[2] - x) / side, (box[3] - y) / side


def load_image(path: str | Path, size: int, orient: bool = True, fit: str = "stretch") -> Tensor:
    """An image file as uint8 (3, size, size): `read_image`, then `to_square`."""
    return to_square(read_image(path, orient), size, fit)
