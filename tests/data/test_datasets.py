"""Data sets by name: folders, classes, subsets."""

from pathlib import Path

import pytest
import torch

from ffvt.data.datasets import ImageSubset, PictureFiles, open_split
from ffvt.data.layout_readers import Listing
from ffvt.data.layouts import DATASETS
from tests.data.layout_fixtures import folder_images


def test_folders_give_the_classes_of_training(photographs):
    test = folder_images(photographs, "test", 32)
    assert list(test.classes) == ["a", "b", "c"]
    assert [test[i][1] for i in range(4)] == [0, 0, 2, 2]
    assert test[0][0].shape == (3, 32, 32)
    assert test[0][0].dtype == torch.uint8
    assert len(folder_images(photographs, "train", 32)) == 15
    (photographs / "test" / "d").mkdir()
    with pytest.raises(ValueError, match="got class 'd'"):
        folder_images(photographs, "test", 32)
    with pytest.raises(ValueError, match="data_root must hold val/<class>/<image>"):
        folder_images(photographs, "val", 32)
    (photographs / "train" / "empty").mkdir()
    with pytest.raises(ValueError, match="every class of train must have images; got none in 'empty'"):
        folder_images(photographs, "train", 32)


def test_hidden_files_are_passed_over_and_nested_ones_found(photographs):
    picture = (photographs / "train" / "a" / "0.png").read_bytes()
    for name in ("train/.cache/0.png", "train/a/more/deep/0.PNG", "train/a/._0.png", "train/a/folder.jpg/note.txt"):
        path = photographs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
    images = folder_images(photographs, "train", 32)
    assert images.classes == ["a", "b", "c"]
    assert len(images) == 16
    assert len(folder_images(photographs, "test", 32, classes=["a", "c"])) == 4


def test_data_sets_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="got resize_size=32"):
        open_split("imagefolder", "train", 64, 32, "x")
    with pytest.raises(ValueError, match="img_size must be 64 for preset 'easy'; got img_size=448"):
        open_split("partbirds", "train", 448, 600, preset="easy")
    with pytest.raises(ValueError, match="got preset='huge'"):
        open_split("partbirds", "train", 64, 64, preset="huge")
    with pytest.raises(ValueError, match=f"{', '.join(DATASETS)}; got dataset='x'"):
        open_split("x", "train", 448, 600)


def test_a_subset_is_its_images(photographs):
    images = folder_images(photographs, "train", 32)
    some = ImageSubset(images, [14, 3])
    assert len(some) == 2
    assert torch.equal(some[0][0], images[14][0])
    assert some.labels == [2, 0]
    assert some.paths == [images.paths[14], images.paths[3]]


def test_images_with_boxes_are_never_turned():
    listing = Listing(["a"], [Path("a.jpg")], [0], [(0, 0, 1, 1)])
    with pytest.raises(ValueError, match="orient must be False where there are boxes"):
        PictureFiles(listing, 32, orient=True)
    with pytest.raises(ValueError, match="fit must be one of stretch, crop, pad; got fit='squash'"):
        PictureFiles(listing, 32, fit="squash")
