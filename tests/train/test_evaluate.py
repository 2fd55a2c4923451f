"""Evaluation: exact counts at any number of ranks, classes, picks, and pictures that cannot be read."""

import json
from itertools import pairwise

import pytest
import torch

from ffvt.data.partbirds import PartBirds
from ffvt.data.sampling import EvaluationView
from ffvt.data.transforms import normalize
from ffvt.train.distributed import World
from ffvt.train.evaluate import Score, evaluate, hit_rates, random_hit_rates
from tests.helpers import tiny_model

ALONE = World(0, 1, torch.device("cpu"))


class Counted(torch.nn.Module):
    """Predicts class 1 whatever it sees."""

    def forward(self, images):
        return torch.tensor([0.0, 3.0, 1.0, 0.5, 0.4, 0.3, 0.2]).repeat(len(images), 1)


class Labelled:
    """Black images with the given labels; those of `broken` cannot be read."""

    classes, side = [f"class {i}" for i in range(7)], 2

    def __init__(self, labels, broken=()):
        self.labels, self.broken = labels, broken

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        if index in self.broken:
            raise ValueError("truncated")
        return torch.zeros(3, 2, 2, dtype=torch.uint8), self.labels[index]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_equals_a_hand_count_at_any_number_of_ranks(size, monkeypatch):
    labels = [1, 0, 1, 2, 3, 6, 1, 5, 0, 1, 4]
    view = EvaluationView(Labelled(labels), 2)
    parts = []
    monkeypatch.setattr(World, "sum", lambda self, values: parts.append(values.clone()) or values)
    monkeypatch.setattr(World, "any", lambda self, *flags: flags)
    monkeypatch.setattr(World, "gather", lambda self, value: [value])
    for rank in range(size):
        evaluate(Counted(), view, World(rank, size, torch.device("cpu")), 2)
    monkeypatch.undo()
    totals = [sum(parts[kind::3]) for kind in range(3)]  # per class, top-5 and loss, picks: three sums a rank
    waiting = iter(totals)
    monkeypatch.setattr(World, "sum", lambda self, values: next(waiting))
    score = evaluate(Counted(), view, ALONE, 2)
    assert score.count == 11
    assert (score.top1, score.top5) == (4 / 11, 8 / 11)  # classes 0 and 6 are not among the first five
    assert score.per_class == ((0, 2), (4, 4), (0, 1), (0, 1), (0, 1), (0, 1), (0, 1))
    assert score.mean_class_top1 == pytest.approx(1 / 7)
    expected = torch.nn.functional.cross_entropy(Counted()(labels), torch.tensor(labels))
    assert score.loss == pytest.approx(expected.item())
    assert score.selection is None


def test_an_empty_evaluation_is_refused():
    with pytest.raises(ValueError, match="must have images; got 0"):
        evaluate(Counted(), EvaluationView(Labelled([]), 2), ALONE, 2)


def test_a_picture_that_cannot_be_read_stops_the_evaluation_unless_it_is_to_be_left_out(caplog):
    images = Labelled([1, 1, 0], broken=(1,))
    with pytest.raises(ValueError, match="image 1 cannot be read: truncated"):
        evaluate(Counted(), EvaluationView(images, 2), ALONE, 2)
    score = evaluate(Counted(), EvaluationView(images, 2, skip_bad=True), ALONE, 2)
    assert (score.count, score.top1) == (2, 0.5)
    assert "cannot be read and is not counted: image 1: truncated" in caplog.text
    assert score.problems == ("image 1: truncated",)
    with pytest.raises(ValueError, match="readable images; got 0"):
        evaluate(Counted(), EvaluationView(Labelled([1], broken=(0,)), 2, skip_bad=True), ALONE, 2)


def test_hit_rates_are_the_fractions_of_picks_on_the_object():
    on_object = torch.tensor([[False, True, True, False, False], [False, False, False, False, True]])
    index = torch.tensor([[[1, 2], [0, 3]], [[4, 1], [2, 3]]])  # 2 images, 2 layers, 2 picks
    assert hit_rates(index, on_object).tolist() == [[1.0, 0.0], [0.5, 0.0]]


def test_the_random_hit_rate_is_that_of_the_candidates():
    on_object = torch.tensor([[False, True, True, False, False], [False, False, False, False, True]])
    assert random_hit_rates(on_object, 0).tolist() == [0.4, 0.2]  # the class token is a candidate and never on it
    assert random_hit_rates(on_object, 1).tolist() == [0.5, 0.25]


def test_random_picks_reach_the_random_rate():
    birds = PartBirds("test", "easy", size=40)
    on_mark = torch.nn.functional.pad(torch.stack([birds.mark_tokens(i, 8) for i in range(40)]), (1, 0))
    index = torch.stack([torch.stack([1 + torch.randperm(64)[:8] for _ in range(50)]) for _ in range(40)])
    assert hit_rates(index, on_mark).mean().item() == pytest.approx(
        random_hit_rates(on_mark, 1).mean().item(), abs=0.01
    )


def picks_and_marks(model, birds):
    """Of every bird: the picks of every layer, the tokens that overlap its mark, and the predicted class."""
    images = torch.stack([birds[i][0] for i in range(len(birds))])
    with torch.no_grad():
        logits, selection = model.eval().forward_with_selection(normalize(images))
    marks = [{1 + int(patch) for patch in birds.mark_tokens(i, 16).nonzero()} for i in range(len(birds))]
    return selection.index.tolist(), marks, logits.argmax(1).tolist()


def slow_hit_rates(picks, marks):
    """Of every layer."""
    layers = zip(*picks)
    return [
        sum(pick in mark for chosen, mark in zip(layer, marks) for pick in chosen) / (len(marks) * len(picks[0][0]))
        for layer in layers
    ]


@pytest.mark.parametrize("first_candidate", [0, 1])
def test_the_statistics_of_the_picks_are_those_of_a_slow_count(first_candidate):
    model, birds = tiny_model(num_classes=9, first_candidate=first_candidate), PartBirds("test", "easy", size=11)
    score = evaluate(model, EvaluationView(birds, 64, grid_size=4), ALONE, 4)
    picks, marks, predictions = picks_and_marks(model, birds)
    rate = sum(0 in layer for image in picks for layer in image) / (11 * 3)
    overlap = sum(len(set(a) & set(b)) / 3 for image in picks for a, b in pairwise(image)) / (11 * 2)
    assert score.selection.class_token_rate == pytest.approx(rate)
    assert score.selection.layer_overlap == pytest.approx(overlap)
    by_layer = slow_hit_rates(picks, marks)
    assert score.selection.layer_hit_rates == pytest.approx(by_layer)
    assert score.selection.hit_rate == pytest.approx(sum(by_layer) / 3)
    chance = sum(map(len, marks)) / (11 * (17 - first_candidate))
    assert score.selection.random_hit_rate == pytest.approx(chance)
    right = sum(label == true for label, true in zip(predictions, birds.labels))
    assert score.top1 == right / 11


def test_images_without_a_box_and_unreadable_ones_are_left_out_of_the_hit_rate():
    class Some(PartBirds):
        def __getitem__(self, index):
            if index == 3:
                raise ValueError("truncated")
            return super().__getitem__(index)

        def relative_box(self, index):
            return None if index % 2 else super().relative_box(index)

    some, model = Some("test", "easy", size=9), tiny_model(num_classes=9)
    found = evaluate(model, EvaluationView(some, 64, grid_size=4, skip_bad=True), ALONE, 4)
    picks, marks, _ = picks_and_marks(model, PartBirds("test", "easy", size=9))
    assert found.count == 8
    assert found.selection.layer_hit_rates == pytest.approx(slow_hit_rates(picks[::2], marks[::2]))


def test_without_boxes_there_is_no_hit_rate_and_without_fusion_no_picks():
    images = PartBirds("test", "easy", size=4)
    view = EvaluationView(images, 64)  # no grid: nothing is known of the boxes
    selection = evaluate(tiny_model(num_classes=9), view, ALONE, 4).selection
    assert selection.hit_rate is selection.random_hit_rate is selection.layer_hit_rates is None
    assert evaluate(tiny_model(num_classes=9, feature_fusion=False), view, ALONE, 4).selection is None
    assert evaluate(tiny_model(num_classes=9, depth=2), view, ALONE, 4).selection.layer_overlap is None


def test_a_box_is_found_in_the_middle_crop():
    class Boxed(Labelled):
        side = 96

        def __getitem__(self, index):
            return torch.zeros(3, 96, 96, dtype=torch.uint8), 0

        def relative_box(self, index):
            return (0.5, 16 / 96, 0.51, 40 / 96)  # pixels 48-49 by 16-40 of 96; minus 16: 32-33 by 0-24 of 64

    sample = EvaluationView(Boxed([0]), 64, grid_size=4)[0]
    assert sample.on_object.nonzero().flatten().tolist() == [1 + 2, 1 + 4 + 2]  # third column, rows 0 and 1
    sample = EvaluationView(Boxed([0]), 64, grid_size=5, overlap=(16, 12))[0]  # the third from 24 to 40
    assert sample.on_object.nonzero().flatten().tolist() == [1 + 2, 1 + 5 + 2]


def test_a_score_survives_json():
    model, birds = tiny_model(num_classes=9), PartBirds("test", "easy", size=5)
    score = evaluate(model, EvaluationView(birds, 64, grid_size=4), ALONE, 4)
    again = Score.from_summary(json.loads(json.dumps(score.summary())))
    assert again.selection == score.selection
    assert again.top1 == score.top1


def test_a_score_of_before_there_were_rates_per_layer_is_read():
    model, birds = tiny_model(num_classes=9), PartBirds("test", "easy", size=3)
    old = evaluate(model, EvaluationView(birds, 64, grid_size=4), ALONE, 4).summary()
    del old["selection"]["layer_hit_rates"]
    assert Score.from_summary(old).selection.layer_hit_rates is None
    assert Score.from_summary(old).selection.hit_rate == old["selection"]["hit_rate"]
