"""A checkpoint on a data set: every image's answer in order, at any number of ranks, and what follows from them."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import ffvt
from ffvt.data.sampling import split_off
from ffvt.scoring import ClassScore, Evaluation, evaluate_checkpoint, open_images
from ffvt.train.distributed import World
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from tests.helpers import SMALL, write_checkpoint

ALONE = World(0, 1, torch.device("cpu"))


def evaluation(classes, true, predicted):
    images = SimpleNamespace(classes=classes, labels=true)
    return Evaluation(None, images, torch.tensor(true), torch.tensor(predicted), torch.full((len(true),), 0.5))


def test_evaluating_a_checkpoint_repeats_the_score_of_its_training(photographs, tmp_path):
    options = {**SMALL, "dataset": "imagefolder", "data_root": str(photographs), "resize_size": 72, "num_steps": 2}
    result = train(TrainOptions(**options, output_dir=str(tmp_path)))
    found = evaluate_checkpoint(ffvt.load(result.folder), ALONE)
    assert found.score.per_class == result.best.per_class
    assert found.score.loss == pytest.approx(result.best.loss, rel=1e-5)
    assert tuple((one.right, one.support) for one in found.class_scores()) == found.score.per_class


def test_answers_are_those_of_the_classifier_in_the_order_of_the_data_set(photographs, tmp_path):
    classifier = ffvt.load(write_checkpoint(tmp_path / "run", data_root=str(photographs)), batch_size=3)
    found = evaluate_checkpoint(classifier, ALONE)
    paths = sorted((photographs / "test").rglob("*.png"))
    assert [found.name(index) for index in range(4)] == list(map(str, paths))
    expected = [classifier(path, top=1)[0] for path in paths]
    assert [found.classes[label] for label in found.predicted.tolist()] == [name for name, _ in expected]
    assert found.probability.tolist() == pytest.approx([probability for _, probability in expected], abs=1e-5)
    assert found.true.tolist() == [0, 0, 2, 2]


def test_precision_recall_and_f1_are_those_of_a_hand_count():
    a, b, c, d, e = evaluation("abcde", [0, 0, 0, 1, 1, 3], [0, 0, 1, 1, 0, 2]).class_scores()
    assert (a.precision, a.recall, a.f1) == (2 / 3, 2 / 3, 2 / 3)
    assert (b.precision, b.recall, b.f1) == (1 / 2, 1 / 2, 1 / 2)
    assert (c.precision, c.recall, c.f1) == (0, None, 0)  # no images, predicted once
    assert (d.precision, d.recall, d.f1) == (None, 0, 0)  # an image, never predicted
    assert (e.precision, e.recall, e.f1) == (None, None, None)
    assert a == ClassScore("a", right=2, support=3, predicted=3)


def test_the_confusion_matrix_counts_true_rows_and_predicted_columns():
    found = evaluation("abc", [0, 0, 1, 2, 2], [1, 0, 1, 0, -1])
    assert found.confusion().tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    assert found.unread == 1


def test_an_unreadable_image_is_no_answer(photographs, tmp_path):
    (photographs / "test" / "a" / "1.png").write_bytes(b"no picture")
    classifier = ffvt.load(write_checkpoint(tmp_path / "run", data_root=str(photographs)))
    found = evaluate_checkpoint(classifier, ALONE, skip_bad_images=True)
    assert (found.predicted[1], found.unread, found.score.count) == (-1, 1, 3)
    assert found.confusion().sum() == 3


def test_val_is_what_the_training_split_off(photographs, tmp_path):
    run = write_checkpoint(tmp_path / "run", data_root=str(photographs), val_split=0.4, seed=3)
    images = open_images(ffvt.load(run), "val")
    train_images = open_images(ffvt.load(run), "train")
    off = split_off(train_images.labels, 0.4, 3)[1]
    assert list(images.paths) == [train_images.paths[index] for index in off]
    assert len(off) == 6
    with pytest.raises(ValueError, match="val"):
        open_images(ffvt.load(write_checkpoint(tmp_path / "whole", data_root=str(photographs))), "val")


def test_a_data_root_that_was_told_from_elsewhere_asks_for_the_flag(tmp_path):
    classifier = ffvt.load(write_checkpoint(tmp_path / "run", data_root="photos"))
    with pytest.raises(ValueError, match="got 'photos'.*--data_root"):
        evaluate_checkpoint(classifier, ALONE)


def test_a_model_that_sees_images_whole_takes_smaller_ones(photographs, tmp_path):
    classifier = ffvt.load(write_checkpoint(tmp_path / "run", data_root=str(photographs)))
    classifier.facts["resize_size"] = 32
    with pytest.raises(ValueError, match="resize_size must be at least img_size=64; got resize_size=32"):
        open_images(classifier)
    classifier.recipe = replace(classifier.recipe, whole=True)
    assert evaluate_checkpoint(classifier, ALONE).score.count == 4


def test_the_image_root_of_a_list_is_none_of_a_folder(photographs, tmp_path):
    run = write_checkpoint(tmp_path / "run", dataset="csv", data_root=str(photographs), image_root="pictures")
    assert len(open_images(ffvt.load(run), dataset="imagefolder")) == 4


def test_other_classes_are_refused(photographs, tmp_path):
    classifier = ffvt.load(write_checkpoint(tmp_path / "run", data_root=str(photographs)))
    for split in ("train", "test"):
        (tmp_path / "other" / split / "z").mkdir(parents=True)
        Image.new("RGB", (80, 80)).save(tmp_path / "other" / split / "z" / "0.png")
    with pytest.raises(ValueError, match="z"):
        evaluate_checkpoint(classifier, ALONE, data_root=str(tmp_path / "other"))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_answers_of_ranks_are_put_back_in_order(size, monkeypatch, photographs, tmp_path):
    classifier = ffvt.load(write_checkpoint(tmp_path / "run", data_root=str(photographs)), batch_size=1)
    whole = evaluate_checkpoint(classifier, ALONE)
    parts = []
    monkeypatch.setattr(World, "gather", lambda self, value: parts.append(value) or [] if value else [])
    for method in ("on_main", "on_all"):
        monkeypatch.setattr(World, method, lambda self, function: function())
    monkeypatch.setattr(World, "sum", lambda self, values: values + 1)  # so that a rank without images has a score
    for rank in range(size):
        evaluate_checkpoint(classifier, World(rank, size, torch.device("cpu")))
    monkeypatch.setattr(World, "gather", lambda self, value: parts if value else [])
    found = evaluate_checkpoint(classifier, World(0, size, torch.device("cpu")))
    assert torch.equal(found.predicted, whole.predicted)
    torch.testing.assert_close(found.probability, whole.probability)


@pytest.mark.slow
def test_two_ranks_print_one_table_and_write_every_image(photographs, tmp_path):
    run = write_checkpoint(tmp_path / "run", data_root=str(photographs))
    arguments = ["evaluate", "--checkpoint", str(run), "--device", "cpu", "--batch_size", "1", "--predictions"]
    alone = subprocess.run(
        [sys.executable, "-m", "ffvt", *arguments, "a.csv"], capture_output=True, text=True, cwd=tmp_path
    )
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launcher += ["--rdzv_endpoint", "localhost:0", "-m", "ffvt", *arguments, "b.csv"]
    shared = subprocess.run([sys.executable, *launcher], capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert shared.returncode == 0, shared.stderr
    assert shared.stdout == alone.stdout
    assert (tmp_path / "a.csv").read_text() == (tmp_path / "b.csv").read_text()
