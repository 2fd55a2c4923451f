"""`ffvt evaluate`: the table, JSON and files say what was found, and nothing that is not a number."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ffvt.cli import main
from ffvt.report.scores import (
    class_table,
    confused_pairs,
    confusion_csv,
    confusion_figure,
    predictions_csv,
    score_json,
    score_table,
)
from ffvt.scoring import Evaluation
from ffvt.train.evaluate import Score, SelectionStatistics
from tests.helpers import write_checkpoint

PICKS = SelectionStatistics(0.125, 0.25, None, None)


def evaluation(classes, true, predicted, loss=1.23456789, selection=PICKS):
    counted = [(a, b) for a, b in zip(true, predicted) if b >= 0]
    per_class = [(sum(a == b == c for a, b in counted), sum(a == c for a, _ in counted)) for c in range(len(classes))]
    right, count = sum(a == b for a, b in counted), len(counted)
    seen = [a / b for a, b in per_class if b]
    score = Score(count, right / count, 1.0, loss, sum(seen) / len(seen), tuple(per_class), selection)
    images = SimpleNamespace(classes=classes, labels=true, paths=[f"photos/{i}.jpg" for i in range(len(true))])
    return Evaluation(score, images, torch.tensor(true), torch.tensor(predicted), torch.full((len(true),), 0.25))


FOUND = evaluation(["crow", "jay", "kite", "owl"], [0, 0, 0, 1, 1, 3], [0, 1, 1, 1, 1, -1])


def test_the_table_names_rates_picks_worst_classes_and_confused_pairs():
    table = score_table(FOUND, "run on test")
    lines = [line.split() for line in table.splitlines()]
    assert table.startswith("run on test\n")
    assert ["top-1", "60.00%", "3", "of", "5", "images"] in lines
    assert ["mean", "over", "classes", "66.67%", "2", "of", "4", "classes", "have", "images"] in lines
    assert ["loss", "1.2346"] in lines
    assert ["layers", "that", "pick", "the", "class", "token", "12.50%"] in lines
    assert ["crow", "1", "of", "3", "33.33%"] in lines
    assert ["crow", "jay", "2"] in lines
    assert "1 images could not be read" in table
    assert "on the object" not in table  # nobody knows


def test_a_perfect_score_has_no_worst_class():
    table = score_table(evaluation(["a", "b"], [0, 1], [0, 1], selection=None), "x")
    assert "worst" not in table
    assert "confused" not in table


def test_the_class_table_shows_a_dash_for_what_nobody_knows_and_means_over_classes_with_images():
    rows = [line.split() for line in class_table(FOUND.class_scores()).splitlines()]
    assert rows[0] == ["class", "precision", "recall", "F1", "support"]
    assert rows[1] == ["crow", "100.00%", "33.33%", "50.00%", "3"]
    assert rows[2] == ["jay", "50.00%", "100.00%", "66.67%", "2"]
    assert rows[3] == ["kite", "-", "-", "-", "0"]
    assert rows[-1] == ["mean", "over", "classes", "75.00%", "66.67%", "58.33%", "5"]


def test_json_is_rounded_and_has_no_nan():
    shown = score_json(evaluation(["a", "b"], [0, 0, 0], [0, 0, 1], loss=math.nan), per_class=True)
    assert shown["loss"] is None
    assert shown["top1"] == 0.666667
    assert shown["per_class"]["b"] == {"right": 0, "count": 0, "precision": 0.0, "recall": None, "f1": 0.0}
    assert list(shown) == ["count", "top1", "top5", "loss", "mean_class_top1", "selection", "per_class"]
    json.dumps(shown, allow_nan=False)


def test_confused_pairs_come_most_frequent_first():
    found = evaluation("abc", [0, 0, 0, 1, 2, 2], [1, 2, 2, 0, 2, 2])
    assert confused_pairs(found) == [(2, "a", "c"), (1, "a", "b"), (1, "b", "a")]


def test_the_files_have_every_class_and_every_image():
    header, *rows = csv.reader(confusion_csv(FOUND).splitlines())
    assert header[1:] == ["crow", "jay", "kite", "owl"]
    assert rows[0] == ["crow", "1", "2", "0", "0"]
    header, *rows = csv.reader(predictions_csv(FOUND).splitlines())
    assert header == ["path", "true", "predicted", "probability", "correct"]
    assert rows[1] == ["photos/1.jpg", "crow", "jay", "0.250000", "0"]
    assert rows[5] == ["photos/5.jpg", "owl", "", "", ""]


def test_the_confusion_figure_has_names_and_counts_only_where_they_fit():
    axes = confusion_figure(FOUND).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["crow", "jay", "kite", "owl"]
    assert sorted(text.get_text() for text in axes.texts) == ["1", "2", "2"]
    many = confusion_figure(evaluation([f"class {i}" for i in range(101)], [0, 1], [0, 2])).axes[0]
    assert not many.texts
    assert "class 5" not in [text.get_text() for text in many.get_yticklabels()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("scores")
    for split in ("train", "test"):
        for name in ("$x^2$", "jay"):
            (root / "photos" / split / name).mkdir(parents=True)
            Image.effect_noise((20, 20), 80).save(root / "photos" / split / name / "0.png")
    write_checkpoint(root / "run", ["$x^2$", "jay"], data_root=str(root / "photos"))
    return root


def evaluate(run, *arguments):
    return main(["evaluate", "--checkpoint", str(run / "run"), "--device", "cpu", *map(str, arguments)])


def test_everything_is_written_from_the_command_line(run, tmp_path, capsys):
    files = {name: tmp_path / name for name in ("c.png", "c.csv", "p.csv")}
    assert evaluate(run, "--per_class", "--confusion", files["c.png"], "--predictions", files["p.csv"]) == 0
    out = capsys.readouterr().out
    assert "top-1" in out
    assert "$x^2$" in out
    with Image.open(files["c.png"]) as image:
        assert image.width > 300
    assert len(files["p.csv"].read_text().splitlines()) == 3
    assert evaluate(run, "--json", "--per_class", "--confusion", files["c.csv"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert list(json.loads(line)["per_class"]) == ["$x^2$", "jay"]
    assert files["c.csv"].read_text().count("\n") == 3


def test_files_that_could_not_be_written_are_refused_before_the_work(run, tmp_path, capsys):
    for arguments, message in (
        (["--confusion", tmp_path / "c.xyz"], "c.xyz"),
        (["--confusion", tmp_path / "missing" / "c.csv"], "folder of confusion"),
        (["--predictions", tmp_path / "p.txt"], "predictions must be a file that ends in .csv"),
        (["--predictions", tmp_path / "missing" / "p.csv"], "folder of predictions"),
        (["--workers", "-1"], "got workers=-1"),
        (["--batch_size", "0"], "got batch_size=0"),
    ):
        assert evaluate(run, *arguments) == 1
        out, err = capsys.readouterr()
        assert not out
        assert message in err
