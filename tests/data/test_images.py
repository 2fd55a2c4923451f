"""Image files as pixels: formats, orientation, transparency, integers, squares; the rest is in `tests/hostile`."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ffvt.data.images import FITS, FORMATS, load_image, orientation, place_in_square, read_image, to_rgb, to_square
from ffvt.data.own_readers import PICTURE_SUFFIXES
from ffvt.train.options import TrainOptions
from tests.hostile.pictures import FORMATS as WRITTEN
from tests.hostile.pictures import seed_image


@pytest.mark.parametrize("kind", WRITTEN)
def test_every_format_is_read(kind, tmp_path):
    (tmp_path / "image").write_bytes(seed_image(kind))
    assert read_image(tmp_path / "image").size == (48, 48)


def test_every_suffix_that_is_listed_is_of_a_format_that_is_opened():
    known = Image.registered_extensions()
    assert {known[suffix] for suffix in PICTURE_SUFFIXES} <= set(FORMATS)


def test_importing_shows_no_warning_of_pillows_for_a_large_image(tmp_path):
    Image.new("1", (19_000, 5_000)).save(tmp_path / "large.png")
    code = f"from ffvt.data.images import open_image\nwith open_image({str(tmp_path / 'large.png')!r}): pass"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stderr == ""


def test_an_image_is_turned_as_exif_says_or_left_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (60, 40)).save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg").size == (40, 60)
    assert read_image(tmp_path / "a.jpg", orient=False).size == (60, 40)
    with Image.open(tmp_path / "a.jpg") as image:
        assert orientation(image) == 8


def test_integers_are_scaled_from_16_bits_and_refused_beyond():
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    for dtype in (np.uint16, np.int32):
        grey = np.asarray(to_rgb(Image.fromarray(ramp.astype(dtype))))[..., 0]
        assert (grey == np.arange(256).reshape(16, 16)).all()
    with pytest.raises(ValueError, match=r"must be in 0\.\.65535; got 0\.\.65536"):
        to_rgb(Image.fromarray(np.array([[0, 65536]], np.int32)))
    with pytest.raises(ValueError, match="floating-point pixels"):
        to_rgb(Image.new("F", (2, 2)))


def test_a_square_is_stretched_cropped_or_padded():
    image = Image.new("RGB", (80, 40), "red")
    image.paste((0, 0, 255), (0, 0, 20, 40))  # the left quarter
    stretch, crop, pad = (to_square(image, 40, fit) for fit in FITS)
    assert stretch[2, 20, 5] == 255
    assert stretch[0, 20, 15] == 255
    assert (crop[0, :, 2:] == 255).all()  # the quarter is cut off
    assert pad[:, 0, 0].tolist() == [124, 116, 104]
    assert pad[2, 20, 5] == 255
    with pytest.raises(ValueError, match="fit must be one of stretch, crop, pad; got fit='squash'"):
        to_square(image, 40, "squash")


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(120, 60), (60, 120), (90, 90)])
def test_a_box_follows_its_object_into_the_square(fit, size):
    image = Image.new("RGB", size)
    box = (40, 30, 55, 50)
    image.paste((255, 255, 255), box)
    seen = to_square(image, 180, fit)[0] > 200
    rows, columns = torch.nonzero(seen.any(1)), torch.nonzero(seen.any(0))
    found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    expected = place_in_square(box, size, fit)
    assert torch.tensor(found) / 180 == pytest.approx(torch.tensor(expected), abs=0.02)


def test_the_options_know_the_same_fits():
    choices = TrainOptions.__dataclass_fields__["fit"].metadata["limits"]["choices"]
    assert choices == FITS
    assert TrainOptions().fit == "stretch"


def test_a_missing_file_is_missing_and_a_broken_one_is_named(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_image(tmp_path / "gone.png", 8)
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"path must be a readable image; got '.*broken\.png': it is none of JPEG"):
        load_image(tmp_path / "broken.png", 8)
