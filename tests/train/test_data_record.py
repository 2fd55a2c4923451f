"""The record of a data set: the same wherever it lies, another after any change of names, sizes, labels, contents."""

import numpy as np
import pytest

from ffvt.data.datasets import ArrayImages, open_split
from ffvt.train.data_record import changes, record_of


def recorded(root, **more):
    splits = ("train", "test")
    return record_of({name: open_split("imagefolder", name, 32, 40, str(root), **more) for name in splits})


def test_a_data_set_that_is_moved_or_named_otherwise_is_the_same(photographs, monkeypatch):
    before = recorded(photographs)
    assert {name: split["count"] for name, split in before.items()} == {"train": 15, "test": 4}
    monkeypatch.chdir(photographs)
    assert recorded(".") == before
    assert recorded(photographs.rename(photographs.parent / "elsewhere")) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda root: (root / "train/a/0.png").unlink(), ["train: 15 -> 14 images"]),
        (lambda root: (root / "test/a/0.png").unlink(), ["test: 4 -> 3 images"]),
        (
            lambda root: (root / "train/a/0.png").rename(root / "train/b/9.png"),
            ["train: 15 images as before, but other files, sizes or labels"],
        ),
        (lambda root: None, []),
    ],
)
def test_a_change_is_told_of_the_split_that_has_it(photographs, change, said):
    before = recorded(photographs)
    change(photographs)
    assert changes(before, recorded(photographs)) == said


def test_a_cache_tells_other_contents_and_is_itself_no_change(photographs, tmp_path):
    bare, cached = recorded(photographs), recorded(photographs, cache_dir=str(tmp_path / "cache"))
    assert changes(bare, cached) == changes(cached, bare) == []
    path = photographs / "train" / "a" / "0.png"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert changes(bare, recorded(photographs)) == []  # contents are not read
    assert changes(cached, recorded(photographs, cache_dir=str(tmp_path / "cache"))) == [
        "train: 15 images of the same names and sizes, but other contents"
    ]


def test_images_without_files_go_by_their_labels_and_earlier_versions_kept_nothing():
    pixels = np.zeros((3, 8, 8, 3), np.uint8)
    first, second = (record_of({"train": ArrayImages("ab", pixels, labels)}) for labels in ([0, 1, 0], [0, 1, 1]))
    assert changes(first, first) == []
    assert changes(first, second) == ["train: 3 images as before, but other files, sizes or labels"]
    assert changes({}, first) == []
