"""The order of samples and what is drawn of each: any picture, any number of ranks."""

import pytest
import torch

from ffvt.data.sampling import (
    BalancedSampler,
    EvaluationView,
    StepSampler,
    TrainingView,
    class_counts,
    class_weights,
    split_off,
)
from ffvt.data.transforms import PLAIN, RECIPES, Recipe
from tests.data.layout_fixtures import folder_images, spoil


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_global_batches_do_not_depend_on_the_number_of_ranks(world_size):
    together = [set(batch) for batch in StepSampler(17, 6, 10, seed=5)]
    parts = [list(StepSampler(17, 6 // world_size, 10, 5, rank, world_size)) for rank in range(world_size)]
    assert [set().union(*(part[step] for part in parts)) for step in range(10)] == together


def test_every_epoch_holds_every_sample_once_in_another_order():
    keys = [key for batch in StepSampler(17, 5, 17 * 3 // 5, seed=5) for key in batch]
    orders = [[index for epoch, index in keys if epoch == number] for number in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(17))
    assert orders[0] != orders[1]
    assert keys[:17] != [key for batch in StepSampler(17, 17, 1, seed=6) for key in batch]


@pytest.mark.parametrize(
    "recipe", [PLAIN, *(RECIPES[name] for name in ("CUB", "car", "cifar10")), Recipe(policy="rand", erasing=0.5)]
)
def test_a_sample_is_decided_by_seed_epoch_and_index_alone(photographs, recipe):
    images = folder_images(photographs, "train", 48)
    one, other = (TrainingView(images, 32, seed=1, recipe=recipe) for _ in range(2))
    state = torch.get_rng_state()
    first = [one[0, index] for index in range(15)]
    torch.manual_seed(99)
    for index in reversed(range(15)):
        again = other[0, index]
        assert torch.equal(again.image, first[index].image)
        assert torch.equal(again.jitter, first[index].jitter)
        assert torch.equal(again.erased, first[index].erased)
        assert (again.label, again.index, again.problem) == (images.labels[index], index, "")
    assert not torch.equal(one[1, 3].image, first[3].image)
    assert not torch.equal(TrainingView(images, 32, seed=2, recipe=recipe)[0, 3].image, first[3].image)
    torch.set_rng_state(state)
    one[0, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_splitting_off_takes_its_share_of_every_class_and_never_the_last_image():
    labels = [0] * 20 + [1] * 10 + [2]
    kept, off = split_off(labels, 0.2, seed=1)
    assert sorted(kept + off) == list(range(31))
    assert [sum(labels[i] == label for i in off) for label in range(3)] == [4, 2, 0]
    assert split_off(labels, 0.2, seed=1) == (kept, off)
    assert split_off(labels, 0.2, seed=2)[1] != off
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"got val_split={share}"):
            split_off(labels, share, 0)
    with pytest.raises(ValueError, match="at least one of 31 images"):
        split_off(labels, 0.001, 0)


def test_a_resumed_sampler_goes_on_where_it_stopped_at_any_number_of_ranks():
    whole = [key for batch in StepSampler(17, 6, 10, seed=5) for key in batch]
    again = [key for batch in StepSampler(17, 6, 6, seed=5, start=24) for key in batch]
    assert again == whole[24:]
    ranks = [list(StepSampler(17, 3, 6, 5, rank, 2, start=24)) for rank in range(2)]
    assert [key for step in range(6) for rank in ranks for key in rank[step]] == whole[24:]


def test_a_picture_that_cannot_be_read_is_replaced_by_one_that_its_key_decides(photographs):
    spoil(photographs / "train" / "b" / "1.png")  # index 6
    one, other = (TrainingView(folder_images(photographs, "train", 48), 32, seed=4) for _ in range(2))
    sample = one[0, 6]
    assert sample.index != 6
    assert "1.png" in sample.problem
    assert sample.label == one.images.labels[sample.index]
    assert torch.equal(other[0, 6].image, sample.image)
    assert len({one[epoch, 6].index for epoch in range(10)}) > 3  # not always the same one
    assert one[0, 5].problem == ""
    with pytest.raises(ValueError, match=r"1\.png cannot be read"):
        EvaluationView(one.images, 32)[6]
    for path in (photographs / "train").rglob("*.png"):
        spoil(path)
    with pytest.raises(ValueError, match="10 in a row are not, the first .*png"):
        one[0, 6]


LABELS = [0] * 11 + [1] * 4 + [2] * 2


def test_the_balanced_stream_holds_every_class_equally_often_and_every_image_of_a_class():
    keys = [key for batch in BalancedSampler(LABELS, "abc", 6, 44, seed=5) for key in batch]  # 88 rounds
    labels = [LABELS[index] for _, index in keys]
    rounds = [labels[start : start + 3] for start in range(0, len(labels), 3)]
    assert all(sorted(one) == [0, 1, 2] for one in rounds)
    assert len({tuple(one) for one in rounds}) == 6  # in every order
    for label, images in ((0, range(11)), (1, range(11, 15)), (2, range(15, 17))):
        drawn = [index for _, index in keys if LABELS[index] == label]
        passes = [tuple(drawn[start : start + len(images)]) for start in range(0, len(drawn), len(images))]
        assert all(sorted(one) == list(images) for one in passes)
        assert len(set(passes)) > 1
    assert len(set(keys)) == len(keys)  # so that an image never comes with the same crop twice
    assert keys != [key for batch in BalancedSampler(LABELS, "abc", 6, 44, seed=6) for key in batch]


def test_the_balanced_stream_does_not_depend_on_ranks_and_resumes():
    whole = [key for batch in BalancedSampler(LABELS, "abc", 6, 10, seed=5) for key in batch]
    ranks = [list(BalancedSampler(LABELS, "abc", 3, 6, 5, rank, 2, start=24)) for rank in range(2)]
    assert [key for step in range(6) for rank in ranks for key in rank[step]] == whole[24:]


def test_class_weights_are_one_over_the_counts_and_keep_the_size_of_the_loss():
    counts = class_counts(LABELS, "abc", "class_weights")
    assert counts.tolist() == [11, 4, 2]
    inverse, root = (class_weights(kind, counts) for kind in ("inverse", "sqrt"))
    torch.testing.assert_close(inverse, 17 / (3 * counts))
    torch.testing.assert_close(root / root[0], (11 / counts) ** 0.5)
    for weights in (inverse, root):
        assert (weights * counts).sum() / 17 == pytest.approx(1)
    assert class_weights("inverse", torch.tensor([7])).tolist() == [1.0]


def test_a_class_without_images_cannot_be_balanced():
    with pytest.raises(ValueError, match="balanced_sampling needs training images of every class; got none of 'd'"):
        BalancedSampler(LABELS, "abcd", 6, 10, seed=5)
