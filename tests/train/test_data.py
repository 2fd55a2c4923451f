"""What a run sees: its splits, its batches."""

import itertools
from contextlib import ExitStack

import torch

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
