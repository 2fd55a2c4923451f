"""The published layouts: what is read of each, and what a list that does not fit is told."""

import pickle

import numpy as np
import pytest
import torch
from scipy.io import loadmat, savemat
from torchvision import datasets

from ffvt.data.datasets import open_split, recipe_for, recipe_of
from ffvt.data.layouts import DATASETS, LAYOUTS, canonical_name, find_layout, find_root, read_listing
from tests.data import layout_fixtures as fixtures
from tests.data.layout_fixtures import CLASSES, LAYOUT_WRITERS, TEST, TRAIN

NAMES = {
    "CUB": "001.Bird_0",
    "dog": "Breed_0",
    "cotton": "1",
    "soyloc": "1",
    "car": "Maker Model 0",
    "air": "707-200 ER",
    "nabirds": "Warbler (Adult, 295)",  # classes go by their numbers
    "inat2017": "Genus species0",
    "imagefolder": "class 0",
    "csv": "class 0",
}


@pytest.mark.parametrize("name", LAYOUT_WRITERS)
def test_every_layout_gives_its_pictures_labels_and_classes(name, tmp_path):
    root = LAYOUT_WRITERS[name](tmp_path / "data")
    train, test = (read_listing(name, split, root) for split in ("train", "test"))
    assert (len(train.paths), len(test.paths)) == (CLASSES * TRAIN, CLASSES * TEST)
    assert train.classes[0] == NAMES[name]
    assert list(train.classes) == list(test.classes)
    ranks = [2, 2, 1, 1, 0, 0] if name == "nabirds" else [0, 0, 1, 1, 2, 2]
    assert list(train.labels) == ranks
    assert not {path.resolve() for path in train.paths} & {path.resolve() for path in test.paths}
    image, label = open_split(name, "train", 32, 32, str(root))[5]
    assert image.shape == (3, 32, 32)
    assert label == ranks[5]


@pytest.mark.parametrize("name", ["CUB", "dog", "car", "air", "nabirds"])
def test_boxes_are_shares_of_the_picture(name, tmp_path):
    images = open_split(name, "train", 32, 32, str(LAYOUT_WRITERS[name](tmp_path / "data")))
    assert images.relative_box(3) == pytest.approx((10 / 50, 5 / 40, 30 / 50, 35 / 40))


@pytest.mark.parametrize("name", ["cotton", "inat2017", "imagefolder"])
def test_sets_without_boxes_have_none(name, tmp_path):
    images = open_split(name, "train", 32, 32, str(LAYOUT_WRITERS[name](tmp_path / "data")))
    assert images.relative_box(0) is None


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_by_torchvision_after_its_sums_are_checked(name, tmp_path, monkeypatch):
    root = fixtures.write_cifar(tmp_path / "data", name, monkeypatch)
    train = open_split(name, "train", 48, 64, str(root))
    assert len(train) == len(datasets.CIFAR10.train_list if name == "cifar10" else [0]) * CLASSES * TRAIN
    assert train[0][0].shape == (3, 32, 32)
    assert train.classes[2] == "class 2"
    victim = next((root / LAYOUTS[name].marker).iterdir())
    victim.write_bytes(victim.read_bytes() + b"\0")
    with pytest.raises(ValueError, match=f"hold an undamaged {LAYOUTS[name].marker}"):
        open_split(name, "train", 48, 64, str(root))


def test_a_damaged_pickle_of_cifar_is_not_run(tmp_path, monkeypatch):
    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "ran"), "w")

    root = fixtures.write_cifar(tmp_path / "data", "cifar10", monkeypatch)
    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="undamaged"):
        open_split("cifar10", "train", 48, 64, str(root))
    assert not (tmp_path / "ran").exists()


def test_lists_are_joined_by_their_keys_not_by_their_order(tmp_path):
    root = fixtures.write_cub(tmp_path)
    before = read_listing("CUB", "train", root)
    for name in ("image_class_labels", "train_test_split", "bounding_boxes"):
        path = root / "CUB_200_2011" / f"{name}.txt"
        path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert read_listing("CUB", "train", root) == before


def test_names_and_folders_are_found_as_they_are_spelled():
    for spelling, name in (("cub", "CUB"), ("CUB_200_2011", "CUB"), ("dogs", "dog"), ("Cotton80", "cotton")):
        assert canonical_name(spelling) == name
    assert canonical_name("PartBirds") == "partbirds"
    assert {"cifar10", "cifar100", "soyloc", "cotton", "CUB", "dog", "car", "air"} <= set(DATASETS)
    with pytest.raises(ValueError, match="must be one of CUB, dog.*got dataset='imagenet'"):
        find_layout("imagenet")


@pytest.mark.parametrize("below", ["", "CUB_200_2011", "CUB"])
def test_the_set_may_be_the_root_or_lie_below_it(below, tmp_path):
    (tmp_path / below).mkdir(exist_ok=True)
    (tmp_path / below / "train_test_split.txt").touch()
    assert find_root(LAYOUTS["CUB"], tmp_path) == tmp_path / below


def test_the_authors_colour_jitter_and_policies_are_kept():
    assert recipe_of("cub").jitter == recipe_of("dog").jitter == recipe_of("air").jitter == 0.4
    assert recipe_of("cotton").jitter == recipe_of("imagefolder").jitter == 0.0
    assert recipe_of("car").policy
    assert recipe_of("cifar100").resized_crop
    assert recipe_of("cifar10").mean == (0.5, 0.5, 0.5)


def edit(path, change):
    path.write_text(change(path.read_text()))


def missing_picture(root):
    (root / "CUB_200_2011" / "images" / "002.Bird_1" / "Bird_0004.jpg").unlink()


def label_out_of_range(root):
    edit(root / "CUB_200_2011" / "image_class_labels.txt", lambda text: text.replace("4 2\n", "4 17\n"))


def empty_class(root):
    edit(root / "CUB_200_2011" / "classes.txt", lambda text: text + "4 004.Bird_3\n")


def escaping_entry(root):
    fixtures.picture(root / "stolen.jpg")
    edit(
        root / "CUB_200_2011" / "images.txt", lambda text: text.replace("001.Bird_0/Bird_0001.jpg", "../../stolen.jpg")
    )


def no_training_picture(root):
    edit(root / "CUB_200_2011" / "train_test_split.txt", lambda text: text.replace(" 1\n", " 0\n"))


def missing_list(root):
    (root / "CUB_200_2011" / "image_class_labels.txt").unlink()


def lacking_key(root):
    edit(root / "CUB_200_2011" / "image_class_labels.txt", lambda text: text.replace("4 2\n", ""))


def no_number(root):
    edit(root / "CUB_200_2011" / "image_class_labels.txt", lambda text: text.replace("4 2\n", "4 two\n"))


def short_box(root):
    edit(root / "CUB_200_2011" / "bounding_boxes.txt", lambda text: text.replace(" 20.0 30.0", "", 1))


def absolute_entry(root):
    fixtures.picture(root / "stolen.jpg")
    stolen = str(root / "stolen.jpg")
    edit(root / "CUB_200_2011" / "images.txt", lambda text: text.replace("001.Bird_0/Bird_0001.jpg", stolen))


DAMAGE = {
    short_box: r"bounding_boxes\.txt: a box must be four numbers; got '10\.0 5\.0'",
    absolute_entry: r"images must lie in .*; the list of train names .*stolen\.jpg",
    missing_picture: "every listed image must be there; 1 of train are missing: .*Bird_0004.jpg",
    label_out_of_range: r"labels of train must be in 0\.\.2; got 16",
    empty_class: r"every class of train must have images; got none in '004\.Bird_3'",
    escaping_entry: r"images must lie in .*; the list of train names .*stolen\.jpg",
    no_training_picture: "train must have images; got none",
    missing_list: r"image_class_labels\.txt must be there; got no such file",
    lacking_key: r"image_class_labels\.txt must have what other lists name; got no '4'",
    no_number: r"image_class_labels\.txt: a class must be a number from 1 on; got 'two'",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_a_list_that_does_not_fit_is_refused_by_name(damage, tmp_path):
    root = fixtures.write_cub(tmp_path)
    damage(root)
    with pytest.raises(ValueError, match=DAMAGE[damage]):
        read_listing("CUB", "train", root)


def test_a_set_that_is_not_there_names_where_it_was_sought_and_published(tmp_path):
    with pytest.raises(ValueError, match=r"CUB: data_root must hold train_test_split\.txt, from https://data\.caltech"):
        read_listing("CUB", "train", tmp_path)
    fixtures.write_dogs(tmp_path / "dogs")
    with pytest.raises(ValueError, match="looks like Stanford Dogs.*use --dataset dog"):
        read_listing("CUB", "train", tmp_path)
    with pytest.raises(ValueError, match="split must be train or test; got split='val'"):
        read_listing("dog", "val", tmp_path)


def test_the_labels_of_cars_test_pictures_come_separately(tmp_path):
    root = fixtures.write_cars(tmp_path)
    (root / "stanford_cars" / "cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(ValueError, match="the devkit's test list has no labels, this one comes separately"):
        read_listing("car", "test", root)
    fixtures.write_cars(tmp_path / "other")
    labels = "cars_test_annos_withlabels.mat"
    (tmp_path / "other/stanford_cars" / labels).rename(root / "stanford_cars/devkit" / labels)  # where some have it
    assert list(read_listing("car", "test", root).labels) == [0, 1, 2]
    bare = root / "stanford_cars"  # the authors' layout: data_root is the folder itself
    assert len(read_listing("car", "train", bare).paths) == CLASSES * TRAIN


def test_what_is_no_matlab_file_is_named(tmp_path):
    root = fixtures.write_dogs(tmp_path)
    (root / "train_list.mat").write_bytes(b"no MATLAB")
    with pytest.raises(ValueError, match=r"train_list\.mat must be a MATLAB file"):
        read_listing("dog", "train", root)
    savemat(root / "train_list.mat", {"labels": np.ones((1, 1))})
    with pytest.raises(ValueError, match=r"train_list\.mat must hold file_list; got labels"):
        read_listing("dog", "train", root)


def test_lists_of_two_lengths_are_refused(tmp_path):
    root = fixtures.write_dogs(tmp_path)
    found = loadmat(root / "train_list.mat")
    savemat(root / "train_list.mat", {"file_list": found["file_list"], "labels": found["labels"][:4]})
    with pytest.raises(ValueError, match="lists of train must be of one length; got 6 images, 4 labels, 6 boxes"):
        read_listing("dog", "train", root)


@pytest.mark.parametrize("text", ["<annotation>", "<annotation/>"])
def test_a_broken_annotation_is_named_and_a_missing_one_gives_no_box(text, tmp_path):
    boxes = read_listing("dog", "train", fixtures.write_dogs(tmp_path)).boxes
    boxes.files[0].write_text(text)
    boxes.files[1].unlink()
    with pytest.raises(ValueError, match="n02085620_1 must hold an object's bndbox"):
        boxes[0]
    assert boxes[1] is None
    assert boxes[2] == (10, 5, 30, 35)


@pytest.mark.parametrize("name", ["dog", "CUB"])
def test_listings_can_be_sent_to_workers(name, tmp_path):
    listing = read_listing(name, "train", LAYOUT_WRITERS[name](tmp_path / "data"))
    sent = pickle.loads(pickle.dumps(listing))
    assert (list(sent.paths), list(sent.boxes)) == (list(listing.paths), list(listing.boxes))


def test_the_lists_of_dogs_may_lie_apart(tmp_path):
    root = fixtures.write_dogs(tmp_path / "dogs")
    (root / "lists").mkdir()
    for split in ("train", "test"):
        (root / f"{split}_list.mat").rename(root / "lists" / f"{split}_list.mat")
    assert list(read_listing("dog", "test", root).labels) == [0, 1, 2]


def test_json_that_does_not_read_is_told_with_its_set(tmp_path):
    root = fixtures.write_inat2017(tmp_path)
    edit(root / "train2017.json", lambda text: text[:-30])
    with pytest.raises(ValueError, match=r"train2017\.json must be JSON; got .* line 1"):
        read_listing("inat2017", "train", root)


def test_the_folder_of_aircraft_may_be_the_working_folder(tmp_path, monkeypatch):
    root = fixtures.write_aircraft(tmp_path)
    monkeypatch.chdir(root / "fgvc-aircraft-2013b")
    assert list(read_listing("air", "train", ".").labels) == [0, 0, 1, 1, 2, 2]
    (root / "fgvc-aircraft-2013b").rename(root / "aircraft")
    with pytest.raises(ValueError, match="the folder must be called fgvc-aircraft-2013b"):
        read_listing("air", "train", root)


def test_csv_rows_must_be_whole_and_may_follow_a_byte_order_mark(tmp_path):
    root = fixtures.write_csv(tmp_path)
    edit(root / "train.csv", lambda text: "\ufeff" + text)
    assert len(read_listing("csv", "train", root).paths) == CLASSES * TRAIN
    edit(root / "train.csv", lambda text: text + "pictures/1.png\n")
    with pytest.raises(ValueError, match=r"train\.csv must have an image and a label in every.*without in line 8"):
        read_listing("csv", "train", root)


def test_csv_and_ufg_lists_are_checked(tmp_path):
    root = fixtures.write_csv(tmp_path / "csv")
    edit(root / "test.csv", lambda text: text.replace("class 1", "class 9"))
    with pytest.raises(ValueError, match="must have only the classes of training; got label 'class 9'"):
        read_listing("csv", "test", root)
    edit(root / "test.csv", lambda text: text.replace("label", "name"))
    with pytest.raises(ValueError, match="must have the columns image and label .*; got image, name"):
        read_listing("csv", "test", root)
    root = fixtures.write_ufg(tmp_path / "ufg")
    edit(root / "anno" / "test.txt", lambda text: text.replace("png 2", "png 0"))
    with pytest.raises(ValueError, match=r"labels of test must be in 0\.\.2; got -1"):
        read_listing("cotton", "test", root)
    edit(root / "anno" / "test.txt", lambda text: text.replace("png 0", "png one"))
    with pytest.raises(ValueError, match="a class must be a number from 1 on; got 'one'"):
        read_listing("cotton", "test", root)
    assert torch.is_tensor(open_split("cotton", "train", 32, 32, str(root))[0][0])


def test_a_runs_options_come_before_the_models_and_those_before_the_data_sets():
    assert recipe_for({"dataset": "CUB"}) == recipe_of("CUB")  # of a checkpoint from before these options
    given = recipe_for({"dataset": "CUB", "augment": "", "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}, (0.5,) * 3)
    assert (given.mean, given.std, given.jitter) == ((0.1, 0.2, 0.3), (1, 1, 1), 0.4)
    models = recipe_for({"dataset": "imagefolder", "mean": [], "std": []}, [0.5] * 3, [0.4] * 3)
    assert (models.mean, models.std) == ((0.5,) * 3, (0.4,) * 3)
    assert recipe_for({"dataset": "csv", "augment": "jitter"}) == recipe_of("CUB")
    erased = recipe_for({"dataset": "cifar10", "random_erasing": 0.25, "resized_crop": 0.5})
    assert (erased.erasing, erased.resized_crop, erased.whole, erased.flip) == (0.25, 0.5, True, False)
    with pytest.raises(ValueError, match="std must be three finite numbers above 0.0001"):
        recipe_for({"dataset": "CUB", "mean": [0.5] * 3, "std": [0.0] * 3})
