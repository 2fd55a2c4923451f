"""What a run sees: its splits, its batches."""

import itertools
from contextlib import ExitStack

import pytest
import torch

from ffvt.train import data as data_module
from ffvt.train.data import open_data
from ffvt.train.distributed import World
from ffvt.train.options import TrainOptions
from tests.helpers import SMALL

ALONE = World(0, 1, torch.device("cpu"))


def test_without_a_validation_split_the_test_images_choose():
    data = open_data(TrainOptions(**SMALL))
    assert data.validation is data.test
    assert data.validation_split == "test"
    assert data.test.grid_size == 4
    assert (len(data.classes), data.resize_size) == (9, 64)


def test_validation_images_come_out_of_the_training_ones_and_are_seen_as_the_test_ones_are():
    whole, data = open_data(TrainOptions(**SMALL)), open_data(TrainOptions(**SMALL, val_split=0.1))
    assert data.validation_split == "val"
    assert len(data.validation) > 0
    assert sorted([*data.train.images.indices, *data.validation.images.indices]) == list(range(len(whole.train)))
    assert data.validation.grid_size == data.test.grid_size == 4
    assert data.validation[0].has_box


def test_batches_resume_where_a_run_was_stopped():
    options = TrainOptions(**SMALL)
    data = open_data(options)
    with data.batches(options, ALONE, 0, 0) as batches:
        every = list(batches)
    with data.batches(options, ALONE, 4, 32) as batches:
        rest = list(batches)
    assert (len(every), len(rest)) == (6, 2)
    for (image, label, *_), (same_image, same_label, *_) in zip(every[4:], rest):
        assert torch.equal(image, same_image)
        assert torch.equal(label, same_label)


def test_batches_of_two_ranks_are_those_of_one_side_by_side():
    options = TrainOptions(**{**SMALL, "train_batch_size": 4})
    data = open_data(options)
    worlds = [World(rank, 2, torch.device("cpu")) for rank in range(2)]
    with ExitStack() as stack:
        ranks = [stack.enter_context(data.batches(options, world, 0, 0)) for world in worlds]
        alone = stack.enter_context(data.batches(TrainOptions(**SMALL), ALONE, 0, 0))
        for one, both in itertools.islice(zip(alone, zip(*ranks)), 3):
            assert torch.equal(one.index, torch.cat([batch.index for batch in both]))


def test_a_runs_own_statistics_serve_training_and_evaluation_and_only_training_is_augmented():
    options = TrainOptions(**SMALL, mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3), augment="rand", random_erasing=1.0)
    data, plain = open_data(options), open_data(TrainOptions(**SMALL))
    for view in (data.train, data.test):
        assert (view.recipe.mean, view.recipe.std) == (options.mean, options.std)
    assert torch.equal(data.test[3].image, plain.test[3].image)
    with data.batches(options, ALONE, 0, 0) as own, plain.batches(options, ALONE, 0, 0) as others:
        batch, other = next(own), next(others)
    assert torch.equal(batch.index, other.index)
    assert not torch.equal(batch.image, other.image)
    assert batch.erased.any(1).all()
    assert not other.erased.any()


def test_classes_are_weighted_or_balanced_by_the_training_images_left():
    options = TrainOptions(**SMALL, val_split=0.5, class_weights="inverse")
    data = open_data(options)
    counts = torch.bincount(torch.tensor(data.train.images.labels), minlength=9)
    torch.testing.assert_close(data.class_weights(options, ALONE.device), counts.sum() / (9 * counts))
    assert data.class_weights(TrainOptions(), ALONE.device) is None
    balanced = TrainOptions(**{**SMALL, "train_batch_size": 9}, balanced_sampling=True)
    with open_data(balanced).batches(balanced, ALONE, 0, 0) as batches:
        assert [sorted(batch.label.tolist()) for batch in batches] == [list(range(9))] * 6


def test_a_training_part_that_lacks_a_class_cannot_be_balanced(monkeypatch):
    def without_class_0(labels, *given):
        return [i for i, label in enumerate(labels) if label], [i for i, label in enumerate(labels) if not label]

    monkeypatch.setattr(data_module, "split_off", without_class_0)
    with pytest.raises(ValueError, match="balanced_sampling needs training images of every class; got none of 'amber-"):
        open_data(TrainOptions(**SMALL, val_split=0.1, balanced_sampling=True))
    options = TrainOptions(**SMALL, val_split=0.1, class_weights="sqrt")
    with pytest.raises(ValueError, match="class_weights needs training images of every class; got none of 'amber-"):
        open_data(options)
