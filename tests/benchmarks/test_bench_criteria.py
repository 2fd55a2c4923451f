"""The comparison of criteria: what is recorded is not run again, and its table; a screen sees what a model picks."""

import json

import pytest
import torch
from safetensors.torch import save_file

import ffvt
from benchmarks import bench_criteria, criteria_screen
from benchmarks.bench_criteria import PLAIN, missing
from benchmarks.criteria_screen import prepare
from benchmarks.outcome_tables import render_criteria
from ffvt.data.datasets import open_split
from ffvt.data.sampling import EvaluationView
from ffvt.data.transforms import normalize
from tests.data.layout_fixtures import picture


def record(name, seed, accuracy=0.5, hit_rate=None, parameters="tiny"):
    cpu = {"device": "cpu", "cpu_name": "a chip", "cpu_flags": [], "cpu_capability": "AVX2"}
    where = {**cpu, "torch": "2", "commit": "abc"}
    scores = {"accuracy": accuracy, "hit_rate": hit_rate}
    return {"environment": where, "parameters": parameters, "criterion": name, "seed": seed, **scores}


def test_what_is_recorded_is_not_run_again():
    made = [record("maws", 0), record("vote", 1), record("vote", 0, parameters="other")]
    assert missing(made, ["maws", "vote"], [0, 1], "tiny") == [("vote", 0), ("maws", 1)]


def test_the_table_has_a_row_per_criterion_the_best_first():
    runs = [record("maws", 0, 0.5, 0.2), record("maws", 1, 0.7, 0.4), record(PLAIN, 0, 0.8)]
    lines = render_criteria(runs).splitlines()
    assert lines[0] == "**tiny.** a chip (AVX2, no AMX), torch 2, commit abc."
    assert lines[4] == "| plain ViT | 0.800 | - | 0.800 to 0.800 | - | 1 |"
    assert lines[5] == "| maws | 0.600 | 0.141 | 0.500 to 0.700 | 0.300 | 2 |"


def test_a_run_appends_its_record_and_is_not_made_twice(tmp_path, capsys, monkeypatch):
    out = tmp_path / "criteria.jsonl"
    scores = {"accuracy": 0.25, "hit_rate": None, "seconds": 1.0}
    monkeypatch.setattr(bench_criteria.BirdsSetting, "run", lambda *_: scores)
    monkeypatch.setattr(bench_criteria, "ProcessPoolExecutor", InThisProcess)
    for _ in range(2):
        bench_criteria.main(["--steps", "3", "--seeds", "4", "--criteria", "vote", PLAIN, "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sorted((line["criterion"], line["seed"]) for line in lines) == [(PLAIN, 4), ("vote", 4)]
    assert "3 steps of 48" in lines[0]["parameters"]


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
                picture(tmp_path / "photos" / split / name / f"{number}.jpg", 10 * count + number, (150, 140))
    return tmp_path / "photos"


def test_the_screen_sees_what_the_model_itself_picks(tmp_path, photographs, monkeypatch):
    small = {"embed_dim": 24, "depth": 3, "num_heads": 2, "mlp_dim": 48}
    create = ffvt.create_model
    monkeypatch.setattr(ffvt, "create_model", lambda name, **fields: create(name, **{**fields, **small}))
    torch.manual_seed(0)
    fields = {"image_size": 112, "num_classes": 2, "first_candidate": 1, "dropout": 0.0}
    model = ffvt.create_model("vit_s14", criterion="vote", **fields).eval()
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    screen = prepare(photographs, tmp_path / "weights.safetensors", tmp_path / "cache", ["vote", PLAIN], 2)
    assert (screen.images, screen.num_classes) == ((6, 2), 2)
    inputs, labels = screen._inputs("val", "vote")
    assert labels.tolist() == [0, 1]
    assert screen._inputs("val", PLAIN)[0].shape == (2, 65, 24)
    view = EvaluationView(open_split("imagefolder", "val", 112, 128, data_root=str(photographs), fit="crop"), 112)
    with torch.no_grad():
        expected = model.forward_features(normalize(torch.stack([sample.image for sample in view])))
        found = model.norm(model.last_block(inputs.float())[:, 0])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # the tokens are kept in fp16
    assert screen.run("vote", 0)["accuracy"] in (0.0, 0.5, 1.0)


def test_the_screen_keeps_what_it_has_computed(tmp_path, photographs, monkeypatch):
    monkeypatch.setattr(criteria_screen, "make_model", lambda weights, num_classes: torch.nn.Identity())
    calls = []
    monkeypatch.setattr(criteria_screen, "observe", lambda model, images, names: calls.append(len(images)) or {})
    for names in (["maws", "vote"], ["ats", PLAIN], ["vote:3"]):
        prepare(photographs, tmp_path / "weights", tmp_path / "cache", names, None)
    assert calls == [6, 2, 6, 2]
