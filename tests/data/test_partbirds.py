"""PartBirds: what the images promise, checked on the pixels."""

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from ffvt.data.partbirds import PRESETS, PartBirds
from ffvt.data.partbirds_drawing import MARKS, PartBirdsConfig, _mark

FIRST_SIXTEEN = "a7cccd92cdc74cd85d21f67c29916a782dfdd0b42663c2526d45b7ff67daf248"


def inside(box, size):
    """Bool (size, size), True in the box."""
    x0, y0, x1, y1 = box
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[y0:y1, x0:x1] = True
    return mask


def test_first_sixteen_images_have_the_same_bytes_everywhere():
    images, _ = PartBirds(size=16).materialize()
    assert hashlib.sha256(images.numpy().tobytes()).hexdigest() == FIRST_SIXTEEN


@pytest.mark.parametrize("preset", PRESETS)
def test_images_are_uint8_and_labels_match_the_config(preset):
    birds = PartBirds("test", preset, size=3)
    side, classes = birds.config.image_size, birds.families * birds.varieties
    images, labels = birds.materialize()
    assert (images.shape, images.dtype) == ((3, 3, side, side), torch.uint8)
    assert (labels.tolist(), labels.dtype) == (birds.labels, torch.int64)
    assert len(set(birds.classes)) == classes
    assert all(0 <= label < classes for label in birds.labels)


def test_labels_are_family_times_varieties_plus_variety():
    birds = PartBirds(size=1, families=2, varieties=3)
    assert birds.classes == ["amber-ring", "amber-bars", "amber-cross", "teal-ring", "teal-bars", "teal-cross"]
    assert [birds.family(label) for label in range(6)] == [0, 0, 0, 1, 1, 1]
    assert birds.coarse_only_ceiling == pytest.approx(1 / 3)
    assert birds.bag_of_marks_ceiling == pytest.approx(1 / 3)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_are_balanced_and_shuffled(preset, split):
    birds = PartBirds(split, preset)
    counts = Counter(birds.labels)
    assert len(counts) == len(birds.classes)
    assert max(counts.values()) - min(counts.values()) <= (len(birds) % len(birds.classes) > 0)
    assert birds.labels[: len(counts)] != birds.labels[len(counts) : 2 * len(counts)]


@pytest.mark.parametrize("side", [8, 10, 12, 14, 16, 20])
def test_marks_have_equal_ink(side):
    marks = [_mark(variety, side) for variety in range(len(MARKS))]
    pixels = [np.sort(mark.reshape(3, -1)).tolist() for mark in marks]
    assert all(pixels[0] == other for other in pixels)


@pytest.mark.parametrize("side", [10, 12, 14, 16, 20])
def test_marks_differ_from_one_another_and_from_mirror_images(side):
    figures = [_mark(variety, side)[0] for variety in range(len(MARKS))]
    ink = np.sum(figures[0] == figures[0].min())
    for a, first in enumerate(figures):
        assert np.array_equal(first, first[:, ::-1])
        for second in figures[:a]:
            assert np.sum(first != second) >= 0.4 * ink


@pytest.mark.parametrize("preset", PRESETS)
def test_the_variety_changes_pixels_inside_the_box_only(preset):
    birds = PartBirds("train", preset, size=12)
    for index in range(len(birds)):
        drawn = [birds.render(index, variety) for variety in range(birds.varieties)]
        outside = ~inside(birds.box(index), birds.config.image_size)
        for other in drawn[1:]:
            changed = (drawn[0] != other).any(0)
            assert changed.any()
            assert not (changed & outside).any()
            assert torch.equal(drawn[0].flatten(1).sort().values, other.flatten(1).sort().values)
        assert torch.equal(drawn[birds.labels[index] % birds.varieties], birds[index][0])


def test_the_family_changes_nothing_but_colour():
    one, two = (PartBirds(size=8, families=families, varieties=2, distractors=1) for families in (1, 2))
    pairs = [(i, one.labels[i] % 2 == two.labels[i] % 2) for i in range(8)]
    assert any(same for _, same in pairs)
    for index, same in pairs:
        assert one.box(index) == two.box(index)
        if same:
            assert one.distractors(index) == two.distractors(index)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_mark_is_on_the_bird_and_distractors_are_clear_of_it(preset):
    birds = PartBirds("test", preset, size=60)
    side = birds.config.image_size
    for index, label in enumerate(birds.labels):
        scene, true = birds._scene(index), inside(birds.box(index), side)
        bird = torch.from_numpy(scene.bird)
        assert true.sum() == birds.config.mark_size**2
        assert (bird & true).sum() >= 0.98 * true.sum()
        strays = birds.distractors(index)
        taken = bird | true
        for box, _ in strays:
            x0, y0, x1, y1 = box
            assert x1 - x0 == y1 - y0 == birds.config.mark_size
            assert inside(box, side).sum() == birds.config.mark_size**2
            around = inside((x0 - 1, y0 - 1, x1 + 1, y1 + 1), side)
            assert not (taken & around).any()
            taken |= inside(box, side)
        varieties = [variety for _, variety in strays] + [label % birds.varieties]
        assert len(set(varieties)) == birds.config.distractors + 1


def test_distractors_wear_the_marks_they_are_listed_with():
    birds = PartBirds("train", "hard", size=4)
    for index in range(4):
        for (x0, y0, x1, y1), variety in birds.distractors(index):
            inner = birds[index][0][:, y0 + 1 : y1 - 1, x0 + 1 : x1 - 1]
            assert np.array_equal(inner.numpy(), _mark(variety, x1 - x0)[:, 1:-1, 1:-1])


@pytest.mark.parametrize("preset", ["easy", "default"])
def test_mean_colour_gives_the_family_but_not_the_variety(preset):
    train, test = (PartBirds(split, preset, size=720) for split in ("train", "test"))

    def middle_colours(birds):
        images, labels = birds.materialize()
        quarter = birds.config.image_size // 4
        means = images[:, :, quarter:-quarter, quarter:-quarter].double().mean((2, 3)) / 255
        return torch.cat([means, torch.ones(len(means), 1, dtype=torch.double)], 1), labels

    (seen, known), (unseen, wanted) = middle_colours(train), middle_colours(test)
    classes, ceiling = len(test.classes), test.coarse_only_ceiling
    slack = 3 * (ceiling * (1 - ceiling) / len(wanted)) ** 0.5  # three standard errors of guessing the variety
    linear = torch.linalg.lstsq(seen, torch.eye(classes, dtype=torch.double)[known]).solution
    centroids = torch.stack([seen[known == label].mean(0) for label in range(classes)])
    for guess in ((unseen @ linear).argmax(1), torch.cdist(unseen, centroids).argmin(1)):
        families = (guess // test.varieties == wanted // test.varieties).double().mean()
        assert families > 0.9
        assert (guess == wanted).double().mean() < ceiling + slack


def test_an_image_depends_on_neither_size_nor_order():
    small, large = PartBirds(size=10), PartBirds(size=40)
    backwards = {index: large[index] for index in reversed(range(10))}
    for index in range(10):
        image, label = small[index]
        assert torch.equal(image, backwards[index][0])
        assert label == backwards[index][1]
        assert small.box(index) == large.box(index)
    assert torch.equal(small.materialize()[0], PartBirds(size=10, test_size=7).materialize()[0])


def test_splits_and_seeds_share_no_image():
    sets = [PartBirds("train", size=40), PartBirds("test", size=40), PartBirds("train", seed=1, size=40)]
    images = [image.numpy().tobytes() for birds in sets for image in birds.materialize()[0]]
    boxes = [[birds.box(index) for index in range(40)] for birds in sets]
    assert len(set(images)) == 120
    assert boxes[0] != boxes[1] != boxes[2] != boxes[0]
    assert sets[0].labels != sets[1].labels


def test_birds_face_both_ways_and_move_about():
    birds = PartBirds(size=60)
    boxes = torch.tensor([birds.box(index) for index in range(60)])
    assert (boxes[:, :2].amax(0) - boxes[:, :2].amin(0) > 6).all()


def test_indices_behave_like_those_of_a_list():
    birds = PartBirds("test", "easy", size=5)
    assert len(birds) == 5 == len(list(birds))
    assert torch.equal(birds[-1][0], birds[4][0])
    assert birds.box(-5) == birds.box(0)
    for index in (5, -6):
        for call in (birds.__getitem__, birds.box, birds.render, birds.distractors):
            with pytest.raises(IndexError, match=str(index)):
                call(index)


def test_changing_an_image_leaves_the_set_alone():
    birds = PartBirds("test", "easy", size=1)
    before = birds[0][0].clone()
    birds[0][0].zero_()
    assert torch.equal(birds[0][0], before)


@pytest.mark.parametrize("patch", [4, 8, 16, 64])
def test_mark_tokens_are_the_patches_the_box_overlaps(patch):
    birds = PartBirds(size=6)
    for index in range(6):
        patches = inside(birds.box(index), 64).unfold(0, patch, patch).unfold(1, patch, patch)
        tokens = birds.mark_tokens(index, patch)
        assert tokens.dtype == torch.bool
        assert torch.equal(tokens, patches.flatten(2).any(2).flatten())


@pytest.mark.parametrize(
    ("box", "expected"),
    [((8, 16, 16, 24), [17]), ((7, 16, 16, 24), [16, 17]), ((8, 16, 17, 25), [17, 18, 25, 26]), ((0, 0, 1, 1), [0])],
)
def test_mark_tokens_take_the_box_as_half_open(monkeypatch, box, expected):
    birds = PartBirds(size=1)
    monkeypatch.setattr(birds, "box", lambda index: box)
    assert birds.mark_tokens(0, 8).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("patch", [0, -8, 7, 128])
def test_mark_tokens_refuse_a_patch_that_does_not_divide_the_image(patch):
    with pytest.raises(ValueError, match=str(patch)):
        PartBirds(size=1).mark_tokens(0, patch)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"split": "val"}, "'val'"),
        ({"preset": "medium"}, "'medium'"),
        ({"colour": 3, "size": 1}, "colour"),
        ({"seed": -1}, "-1"),
        ({"seed": 0.5}, "0.5"),
        ({"size": 0}, "0"),
        ({"size": True}, "True"),
        ({"families": 99}, "99"),
        ({"varieties": 0}, "0"),
        ({"distractors": 4}, "4"),
        ({"clutter": 1.5}, "1.5"),
        ({"clutter": float("nan")}, "nan"),
        ({"image_size": "64"}, "'64'"),
        ({"mark_size": 11}, "11"),
        ({"mark_size": 30}, "30"),
    ],
)
def test_bad_settings_raise_value_error_naming_the_value(arguments, named):
    with pytest.raises(ValueError, match=named):
        PartBirds(**arguments)


def test_labels_and_varieties_out_of_range_are_refused():
    birds = PartBirds(size=1)
    for call in (lambda: birds.family(16), lambda: birds.family(-1), lambda: birds.render(0, 4)):
        with pytest.raises(ValueError, match="must be in"):
            call()


def test_distractors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no room beside the bird for 7 distractors"):
        PartBirds(varieties=8, distractors=7, bird=0.55, size=40).materialize()


def test_presets_are_valid_and_config_is_frozen():
    assert PRESETS["default"] == PartBirdsConfig()
    with pytest.raises(AttributeError):
        PRESETS["easy"].families = 2
