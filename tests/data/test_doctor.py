"""`ffvt doctor`: finds what is wrong with a data set, and says that nothing is where nothing is."""

import dataclasses
import json
import shutil
import tarfile

import pytest

from ffvt.cli import main
from ffvt.data import doctor, threads
from ffvt.data.doctor import examine, render
from ffvt.data.layouts import LAYOUTS
from tests.data import layout_fixtures as fixtures
from tests.data.layout_fixtures import CLASSES, TEST, TRAIN


@pytest.fixture
def small_cub(tmp_path, monkeypatch):
    """A CUB of three classes, with the published numbers changed to its."""
    counts = (("train", CLASSES * TRAIN), ("test", CLASSES * TEST))
    monkeypatch.setitem(LAYOUTS, "CUB", dataclasses.replace(LAYOUTS["CUB"], counts=counts, num_classes=CLASSES))
    return fixtures.write_cub(tmp_path / "data")


def test_a_set_in_order_is_in_order(small_cub, capsys):
    found = examine("cub", small_cub)
    assert found.ok
    assert found.counts == {"train": 6, "test": 3}
    assert not found.duplicates
    assert main(["doctor", "--dataset", "cub", "--data_root", str(small_cub)]) == 0
    assert "CUB_200_2011: in order" in capsys.readouterr().out


def test_wrong_counts_are_told_beside_the_published_ones(tmp_path, capsys):
    root = fixtures.write_cub(tmp_path)
    assert main(["doctor", "--dataset", "CUB", "--data_root", str(root)]) == 1
    said = capsys.readouterr().out
    assert "NOT in order" in said
    assert "train has 6 images; published are 5,994" in said
    assert "test has 3 images; published are 5,794" in said
    assert "there are 3 classes; published are 200" in said
    assert "published at https://data.caltech.edu" in said


def test_unreadable_repeated_and_leaked_pictures_are_found(small_cub, capsys):
    images = small_cub / "CUB_200_2011" / "images"
    train = [images / "001.Bird_0" / f"Bird_000{i}.jpg" for i in (1, 2)]
    shutil.copy(train[0], train[1])
    shutil.copy(images / "002.Bird_1/Bird_0004.jpg", images / "003.Bird_2/Bird_0009.jpg")  # 9 is a test picture
    broken = images / "002.Bird_1" / "Bird_0005.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    assert main(["doctor", "--dataset", "CUB", "--data_root", str(small_cub), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["duplicates"] == [[str(path) for path in train]]
    assert found["leaks"] == [[str(images / "002.Bird_1/Bird_0004.jpg"), str(images / "003.Bird_2/Bird_0009.jpg")]]
    assert [path for path, _ in found["unreadable"]] == [str(broken)]
    assert not found["problems"]
    text = render(examine("CUB", small_cub))
    assert "the same image in train and another split: 1" in text
    assert "cannot be read: 1" in text


def test_a_repeated_picture_alone_is_in_order_but_one_in_two_classes_is_not(small_cub):
    images = small_cub / "CUB_200_2011" / "images"
    one, same_class, other_class = (images / f"00{c}.Bird_{c - 1}/Bird_000{i}.jpg" for c, i in ((1, 1), (1, 2), (2, 4)))
    shutil.copy(one, same_class)
    found = examine("CUB", small_cub)
    assert found.ok
    assert found.duplicates == [(str(one), str(same_class))]
    assert "equal files within a class of a split: 1" in render(found)
    shutil.copy(one, other_class)
    found = examine("CUB", small_cub)
    assert not found.ok
    assert found.conflicts == [(str(one), str(same_class), str(other_class))]
    assert "the same image in two classes of a split: 1" in render(found)


def test_every_test_picture_that_was_trained_on_is_a_leak(small_cub):
    images = small_cub / "CUB_200_2011" / "images"
    train, *test = (images / f"00{c}.Bird_{c - 1}/Bird_000{i}.jpg" for c, i in ((1, 1), (1, 3), (2, 6)))
    for path in test:
        shutil.copy(train, path)
    found = examine("CUB", small_cub, threads=2)
    assert found.leaks == [(str(train), str(path)) for path in test]
    assert not found.ok


def test_pictures_are_looked_at_in_order_in_portions(small_cub, monkeypatch):
    monkeypatch.setattr(threads, "AT_ONCE", 4)
    broken = small_cub / "CUB_200_2011" / "images" / "003.Bird_2" / "Bird_0009.jpg"  # the last one
    broken.write_bytes(b"")
    found = examine("CUB", small_cub)
    assert [path for path, _ in found.unreadable] == [str(broken)]
    assert len(found.unreadable[0][1]) > 10


def test_one_split_is_examined_when_the_other_cannot_be_read(tmp_path):
    root = fixtures.write_cars(tmp_path)
    (root / "stanford_cars" / "cars_test_annos_withlabels.mat").unlink()
    (root / "stanford_cars" / "cars_train" / "00001.jpg").write_text("no picture")
    found = examine("car", root)
    assert found.counts == {"train": 6}
    assert "comes separately" in found.problems[0]
    assert len(found.unreadable) == 1


def test_lists_that_cannot_be_read_are_a_finding_not_a_crash(small_cub):
    (small_cub / "CUB_200_2011" / "images.txt").unlink()
    found = examine("CUB", small_cub)
    assert not found.ok
    assert "images.txt must be there" in found.problems[0]
    assert "data_root must hold" in examine("dog", small_cub).problems[0]
    with pytest.raises(ValueError, match="got dataset='partbirds', which is drawn from a seed"):
        examine("partbirds", small_cub)


def test_cifar_is_examined_by_its_sums(tmp_path, monkeypatch):
    root = fixtures.write_cifar(tmp_path, "cifar100", monkeypatch)
    found = examine("cifar100", root)
    assert found.counts == {"train": 6, "test": 3}
    assert "train has 6 images; published are 50,000" in found.problems[0]


def test_an_archive_is_unpacked_first(small_cub, tmp_path, capsys):
    with tarfile.open(tmp_path / "CUB_200_2011.tgz", "w:gz") as tar:
        tar.add(small_cub / "CUB_200_2011", "CUB_200_2011")
    arguments = ["doctor", "--dataset", "CUB", "--data_root", str(tmp_path / "fresh")]
    assert main(arguments) == 1
    assert main([*arguments, "--extract", str(tmp_path / "CUB_200_2011.tgz")]) == 0
    assert main([*arguments, "--extract", str(tmp_path / "CUB_200_2011.tgz")]) == 1  # it is there already
    assert "must not have what" in capsys.readouterr().err


def test_broken_pictures_are_compared_too_and_files_that_do_not_open_are_not(small_cub, tmp_path):
    images = small_cub / "CUB_200_2011" / "images" / "001.Bird_0"
    for number in (1, 3):  # of train and test
        (images / f"Bird_000{number}.jpg").write_text("no picture")
    found = examine("CUB", small_cub)
    assert len(found.unreadable) == 2
    assert found.leaks == [(str(images / "Bird_0001.jpg"), str(images / "Bird_0003.jpg"))]
    look = doctor._look(tmp_path / "gone.jpg")  # after it was listed
    assert look.digest == ""
    assert "gone.jpg" in look.problem


def test_a_users_own_images_are_described_in_one_run(photographs, capsys):
    (photographs / "val").mkdir()
    shutil.copytree(photographs / "test" / "a", photographs / "val" / "a")
    (photographs / "train" / "a" / "phone.heic").touch()
    (photographs / "test" / "d").mkdir()
    (photographs / "train" / "c" / "0.png").write_bytes(b"no image")
    found = examine("imagefolder", photographs)
    assert found.counts == {"train": 15, "test": 4, "val": 2}
    assert found.per_class["test"] == {"a": 2, "b": 0, "c": 2}
    assert found.left_out == {"train": {".heic": 1, ".txt": 1}}
    assert found.untested == ["b"]
    assert found.sizes == {"width": (60, 70, 80), "height": (40, 40, 40)}
    assert "got class 'd'" in found.problems[0]
    assert len(found.unreadable) == 1
    assert main(["doctor", "--dataset", "imagefolder", "--data_root", str(photographs), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["untested"] == ["b"]
    assert "1 classes have no test images: 'b'" in render(found)
    assert "pixels: width 60 to 80, median 70; height 40 to 40, median 40" in render(found)


def test_a_list_with_its_images_elsewhere_is_examined(tmp_path):
    root = fixtures.write_csv(tmp_path / "set")
    (root / "pictures").rename(tmp_path / "pictures")
    assert not examine("csv", root).ok
    assert examine("csv", root, image_root=tmp_path).ok
