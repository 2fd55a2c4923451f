"""Evaluation: exact counts at any number of ranks, classes, picks, and pictures that cannot be read."""

import json
from itertools import pairwise

import pytest
import torch

from ffvt.data.partbirds import PartBirds
from ffvt.data.sampling import EvaluationView
from ffvt.report.selection import hit_rate, random_hit_rate, study_selection
from ffvt.train.distributed import World
from ffvt.train.evaluate import Score, evaluate
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
    assert "image 1 cannot be read and is not counted" in caplog.text
    with pytest.raises(ValueError, match="readable images; got 0"):
        evaluate(Counted(), EvaluationView(Labelled([1], broken=(0,)), 2, skip_bad=True), ALONE, 2)


def test_the_statistics_of_the_picks_are_those_of_a_slow_count():
    model, birds = tiny_model(num_classes=9), PartBirds("test", "easy", size=11)
    score = evaluate(model, EvaluationView(birds, 64, grid_size=4), ALONE, 4)
    study = study_selection(model, birds, 11)
    picks = study.index.tolist()
    rate = sum(0 in layer for image in picks for layer in image) / (11 * 3)
    overlap = sum(len(set(a) & set(b)) / 3 for image in picks for a, b in pairwise(image)) / (11 * 2)
    assert score.selection.class_token_rate == pytest.approx(rate)
    assert score.selection.layer_overlap == pytest.approx(overlap)
    assert score.selection.hit_rate == pytest.approx(hit_rate(study.index, study.on_mark).mean().item())
    assert score.selection.random_hit_rate == pytest.approx(random_hit_rate(study.on_mark, 1))
    right = sum(int(study.predictions[i]) == birds.labels[i] for i in range(11))
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
    study = study_selection(model, PartBirds("test", "easy", size=9), 9)
    assert found.count == 8
    assert found.selection.hit_rate == pytest.approx(hit_rate(study.index[::2], study.on_mark[::2]).mean().item())


def test_without_boxes_there_is_no_hit_rate_and_without_fusion_no_picks():
    images = PartBirds("test", "easy", size=4)
    view = EvaluationView(images, 64)  # no grid: nothing is known of the boxes
    selection = evaluate(tiny_model(num_classes=9), view, ALONE, 4).selection
    assert selection.hit_rate is selection.random_hit_rate is None
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


def test_a_score_survives_json():
    model, birds = tiny_model(num_classes=9), PartBirds("test", "easy", size=5)
    score = evaluate(model, EvaluationView(birds, 64, grid_size=4), ALONE, 4)
    again = Score.from_summary(json.loads(json.dumps(score.summary())))
    assert again.selection == score.selection
    assert again.top1 == score.top1
