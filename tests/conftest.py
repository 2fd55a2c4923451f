"""Every test starts from one seed, with unwritten memory poisoned."""

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(autouse=True)
def _seeded_and_poisoned():
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN, so an unwritten output shows
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def photographs(tmp_path):
    """An ImageFolder of 3 classes: train 5 each, test 2 of two classes only, one file no picture."""
    draw = np.random.default_rng(0)
    for split, classes, count in (("train", "abc", 5), ("test", "ac", 2)):
        for label, name in enumerate(classes):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (40, 60 + 10 * label, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "photos" / "train" / "a" / "notes.txt").write_text("not a picture")
    return tmp_path / "photos"
