"""Unreadable images are found before training, by their headers or by the cache."""

import logging

import pytest

from ffvt.data.datasets import ImageSubset, open_split
from ffvt.data.headers import check_headers, tell_left_out, unreadable
from tests.data.layout_fixtures import folder_images


def spoil_header(path):
    path.write_bytes(b"no image")


def test_images_that_can_be_read_are_no_matter(photographs, caplog):
    train, test = (folder_images(photographs, split, 32) for split in ("train", "test"))
    check_headers(train, {"test": test})
    assert caplog.text == ""
    check_headers(open_split("partbirds", "train", 64, 64, preset="easy"), {})


def test_a_test_image_stops_the_start_and_a_training_image_does_not(photographs, caplog):
    spoil_header(photographs / "train" / "a" / "0.png")
    train, test = (folder_images(photographs, split, 32) for split in ("train", "test"))
    check_headers(train, {"test": test})
    assert "train: 1 of 15 images cannot be read: " in caplog.text
    assert "0.png; others are drawn in their place" in caplog.text
    for name in ("0.png", "1.png"):
        spoil_header(photographs / "test" / "c" / name)
    with pytest.raises(
        ValueError, match=r"test: images must be readable, or skip_bad_images be given; 2 of 4 .*c/0\.png"
    ):
        check_headers(train, {"test": test})
    check_headers(train, {"test": test}, skip_bad=True)
    assert "they will not be counted" in caplog.text


def test_what_a_cache_knows_is_asked_of_it(photographs, tmp_path):
    path = photographs / "train" / "b" / "1.png"
    path.write_bytes(path.read_bytes()[:60])  # behind the header
    assert unreadable(folder_images(photographs, "train", 32)) == {}
    images = open_split("imagefolder", "train", 32, 32, str(photographs), cache_dir=str(tmp_path / "cache"))
    assert list(unreadable(images)) == [6]
    assert list(unreadable(ImageSubset(images, [3, 6, 7]))) == [1]
    assert "1.png" in unreadable(ImageSubset(images, [3, 6, 7]))[1]


def test_files_left_out_are_told_by_kind(photographs, caplog):
    caplog.set_level(logging.WARNING, logger="ffvt")
    for name in ("a.heic", "b.heic", "notes.txt"):
        (photographs / "train" / "a" / name).touch()
    tell_left_out({"train": folder_images(photographs, "train", 32), "test": folder_images(photographs, "test", 32)})
    assert "train: files that are no images are left out: .heic 2, .txt 1 (convert .heic to .jpg)" in caplog.text
    assert "test" not in caplog.text
