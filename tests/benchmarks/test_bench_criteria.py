"""The comparison of criteria: what is recorded is not run again, and its table; a screen learns from what was picked."""

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import bench_criteria, criteria_screen
from benchmarks.bench_criteria import PLAIN, missing, read_records, render
from benchmarks.criteria_screen import make_model, prepare
from tests.helpers import write_image


def record(name, seed, accuracy=0.5, hit_rate=None, parameters="tiny"):
    return {"parameters": parameters, "criterion": name, "seed": seed, "accuracy": accuracy, "hit_rate": hit_rate}


def test_what_is_recorded_is_not_run_again():
    made = [record("maws", 0), record("vote", 1), record("vote", 0, parameters="other")]
    assert missing(made, ["maws", "vote"], [0, 1], "tiny") == [("vote", 0), ("maws", 1)]


def test_the_table_has_a_row_per_criterion_the_best_first():
    lines = render([record("maws", 0, 0.5, 0.2), record("maws", 1, 0.7, 0.4), record(PLAIN, 0, 0.8)]).splitlines()
    assert lines[0] == "**tiny.**"
    assert lines[4] == "| plain ViT | 0.800 | 0.800 to 0.800 | - | 1 |"
    assert lines[5] == "| maws | 0.600 | 0.500 to 0.700 | 0.300 | 2 |"


def test_a_run_appends_its_record_and_is_not_made_twice(tmp_path, capsys, monkeypatch):
    out = tmp_path / "criteria.jsonl"
    monkeypatch.setattr(bench_criteria.BirdsSetting, "run", lambda self, name, seed: {"accuracy": 0.25, "seconds": 1.0})
    monkeypatch.setattr(bench_criteria, "ProcessPoolExecutor", InThisProcess)
    for _ in range(2):
        bench_criteria.main(["--steps", "3", "--seeds", "4", "--criteria", "vote", PLAIN, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["criterion"], line["seed"]) for line in lines] == [("vote", 4), (PLAIN, 4)]
    assert "3 steps of 32" in lines[0]["parameters"]


class InThisProcess:
    """An executor that runs at once."""

    def __init__(self, *arguments, **named):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def submit(self, function, *arguments):
        future = bench_criteria.Future()
        future.set_result(function(*arguments))
        return future


@pytest.fixture
def photographs(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for name in ("apple", "pear"):
            for number in range(count):
                write_image(tmp_path / "photos" / split / name / f"{number}.jpg", (150, 140))
    return tmp_path / "photos"


def test_the_screen_sees_what_the_model_itself_picks(tmp_path, photographs, monkeypatch):
    small = {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_dim": 48}
    create = criteria_screen.ffvt.create_model
    monkeypatch.setattr(
        criteria_screen.ffvt, "create_model", lambda name, **fields: create(name, **{**fields, **small})
    )
    torch.manual_seed(0)
    model = create("vit_s14", image_size=112, num_classes=2, first_candidate=1, dropout=0.0, **small)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    screen = prepare(photographs, tmp_path / "weights.safetensors", tmp_path / "cache", ["vote", PLAIN], 2)
    assert (screen.images, screen.num_classes) == ((6, 2), 2)
    model = make_model(screen.weights, 2).eval()
    inputs, labels = screen._inputs("val", "vote")
    assert inputs.shape == (2, 1 + 2 * 12, 24) and labels.tolist() == [0, 1]
    assert screen._inputs("val", PLAIN)[0].shape == (2, 65, 24)
    result = screen.run("vote", 0)
    assert result["images"] == 2 and result["accuracy"] in (0.0, 0.5, 1.0)
    assert read_records(tmp_path / "none.jsonl") == []
