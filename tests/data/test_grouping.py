"""The sampler of groups: its batches, its stream over ranks and resumes, and what it refuses."""

from collections import Counter

import pytest

from ffvt.data.grouping import GroupSampler

LABELS = [0] * 11 + [1] * 4 + [2] * 2 + [3] * 5 + [4] * 3


def test_every_batch_holds_different_classes_with_as_many_images_each_side_by_side():
    batches = list(GroupSampler(LABELS, "abcde", 3, 6, 200, seed=5))
    drawn = Counter()
    for batch in batches:
        labels = [LABELS[index] for _, index in batch]
        assert labels[:3] == labels[:1] * 3 and labels[3:] == labels[3:4] * 3  # noqa: PT018
        assert labels[0] != labels[3]
        for group in (batch[:3], batch[3:]):
            label = LABELS[group[0][1]]
            assert len({index for _, index in group}) == min(3, LABELS.count(label))
        drawn.update(labels[::3])
    assert sum(drawn.values()) == 400
    assert min(drawn.values()) > 60  # 80 each in the long run: one class of five sits each permutation out
    keys = [key for batch in batches for key in batch]
    assert len(set(keys)) == len(keys)  # so that an image never comes with the same crop twice
    assert {index for _, index in keys} == set(range(len(LABELS)))
    assert batches != list(GroupSampler(LABELS, "abcde", 3, 6, 200, seed=6))


def test_a_class_goes_through_its_images_before_one_comes_again():
    keys = [key for batch in GroupSampler(LABELS, "abcde", 2, 10, 10, seed=0) for key in batch]  # all classes each time
    drawn = [index for _, index in keys if LABELS[index] == 1]
    assert all(sorted(drawn[start : start + 4]) == [11, 12, 13, 14] for start in range(0, 20, 4))
    assert len({tuple(drawn[start : start + 4]) for start in range(0, 20, 4)}) > 1


def test_the_stream_of_groups_does_not_depend_on_ranks_and_resumes():
    whole = list(GroupSampler(LABELS, "abcde", 2, 4, 12, seed=5))
    ranks = [list(GroupSampler(LABELS, "abcde", 2, 4, 4, 5, rank, 2, start=16)) for rank in range(2)]
    assert [batch for pair in zip(*ranks) for batch in pair] == whole[4:]
    assert list(GroupSampler(LABELS, "abcde", 2, 4, 9, 5, start=12)) == whole[3:]


@pytest.mark.parametrize(
    ("classes", "size", "message"),
    [
        ("abcdef", 4, "images_per_class needs training images of every class; got none of 'f'"),
        ("abcde", 12, r"images_per_class must be at least train_batch_size / classes = 2\.4; got images_per_class=2"),
    ],
)
def test_labels_of_which_no_batch_can_be_made_are_refused(classes, size, message):
    with pytest.raises(ValueError, match=message):
        GroupSampler(LABELS, classes, 2, size, 3, seed=0)
