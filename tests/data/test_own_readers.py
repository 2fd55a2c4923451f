"""A user's own folders and lists; what is refused is in `tests/hostile`."""

from collections import Counter

import pytest

from ffvt.data.layouts import LAYOUTS, inspect_listing, read_listing
from ffvt.data.own_readers import describe_left_out
from tests.data import layout_fixtures as fixtures
from tests.data.layout_fixtures import CLASSES, TRAIN, picture


def test_files_that_are_no_images_are_counted_and_hidden_ones_are_not(photographs):
    for name in ("a/x.heic", "a/deep/y.HEIC", "b/notes", "b/.hidden.txt", ".git/z.txt", "readme.md"):
        path = photographs / "train" / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    listing = read_listing("imagefolder", "train", photographs)
    assert len(listing.paths) == 15
    assert listing.left_out == {
        ".heic": 2,
        ".txt": 1,  # of the fixture
        "no suffix": 1,
        ".md outside of the class folders": 1,
    }


def test_left_out_files_are_told_in_a_line():
    assert describe_left_out({".txt": 1, ".xcf": 12_000}) == ".xcf 12,000, .txt 1"
    assert describe_left_out({".heic": 1}) == ".heic 1 (convert .heic to .jpg)"
    assert describe_left_out(Counter(f".{i}" for i in range(9))).endswith(" and 3 more kinds")


def test_all_problems_of_a_set_are_told_and_the_first_is_raised(photographs):
    (photographs / "test" / "d").mkdir()
    (photographs / "train" / "empty").mkdir()
    listing, problems = inspect_listing("imagefolder", "test", photographs)
    assert len(listing.paths) == 4
    assert len(problems) == 1
    assert "got class 'd'" in problems[0]
    assert "got none in 'empty'" in inspect_listing("imagefolder", "train", photographs)[1][0]
    with pytest.raises(ValueError, match="got class 'd'"):
        read_listing("imagefolder", "test", photographs)


def test_a_list_may_lie_apart_from_its_images(tmp_path):
    root = fixtures.write_csv(tmp_path)
    (root / "lists").mkdir()
    for split in ("train", "test"):
        (root / f"{split}.csv").rename(root / "lists" / f"{split}.csv")
    listing = read_listing("csv", "train", root / "lists", image_root=root)
    assert len(listing.paths) == CLASSES * TRAIN
    with pytest.raises(ValueError, match=r"images must lie in .*lists.*; image_root may name another folder|missing"):
        read_listing("csv", "train", root / "lists")


def test_only_a_users_own_images_are_turned_upright():
    assert [name for name, layout in LAYOUTS.items() if layout.upright] == ["imagefolder", "csv"]


def test_a_list_of_another_spelling_is_the_same_list(tmp_path):
    for number in range(2):
        picture(tmp_path / f"{number}.png", number)
    expected = None
    for text in (
        "image,label\n0.png,x\n1.png,y\n",
        "Class;File;id\nx;0.png;7\n y ;1.png;8\n",
        "path\ttarget\n0.png\tx\n1.png\ty\n",
    ):
        (tmp_path / "train.csv").write_text(text)
        listing = read_listing("csv", "train", tmp_path)
        expected = expected or listing
        assert listing == expected
