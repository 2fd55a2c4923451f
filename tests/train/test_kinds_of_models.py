"""Every kind of model through the whole command line: train, stop and resume, evaluate, predict, visualize."""

import json
import re

import pytest
import torch
from PIL import Image

import ffvt
from ffvt.cli import main
from ffvt.data.partbirds import PartBirds
from ffvt.train.checkpoint import load_checkpoint
from tests.helpers import SMALL, flags, values

RUNS = {
    "criterion": {"criterion": "vote:3", "first_candidate": 1},
    "history": {"criterion": "psm", "contrastive": True, "images_per_class": 2, "train_batch_size": 6},
    "transfg": {"head": "transfg", "patch_stride": 12, "contrastive": True, "smoothing_value": 0.1},
    "reduced": {"keep_rate": 0.5, "locations": (0,), "num_token": 2, "first_candidate": 1},
    "reduced plain": {"keep_rate": 0.5, "locations": (0, 1), "feature_fusion": False},
}


@pytest.fixture
def bird(tmp_path):
    path = tmp_path / "bird.png"
    Image.fromarray(PartBirds("test", "easy", 42)[0][0].permute(1, 2, 0).numpy()).save(path)
    return str(path)


def train(folder, changes, *more):
    changes = {**SMALL, "num_steps": 4, "save_every": 2, **changes, "output_dir": str(folder)}
    assert main(["train", *flags({name: value for name, value in changes.items() if value is not False}), *more]) == 0


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ("criterion", "transfg") else pytest.mark.slow) for name in RUNS]
)
def test_it_trains_resumes_evaluates_predicts_and_shows(name, tmp_path, bird, capsys):
    changes = RUNS[name]
    train(tmp_path, {**changes, "name": "whole"})
    train(tmp_path, {**changes, "name": "again"}, "--resume", str(tmp_path / "whole" / "step-00000002"), "--strict")
    ends = [load_checkpoint(tmp_path / run / "last").model.state_dict() for run in ("whole", "again")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    checkpoint = str(tmp_path / "whole")
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", checkpoint, "--json"]) == 0
    score = json.loads(capsys.readouterr().out)
    assert score["top1"] == values(tmp_path / "whole", "end", "best")[0]["top1"]
    assert main(["evaluate", "--checkpoint", checkpoint]) == 0
    shown = capsys.readouterr().out
    picks = score["selection"]
    if changes.get("feature_fusion", True) or "head" in changes:
        assert len(picks["layer_hit_rates"]) == 2  # heads, or layers but the last
        assert 0 < picks["random_hit_rate"] < 1
        assert ("picks that the next layer picks too" in shown) == (name != "transfg")  # heads have no order
    else:
        assert picks is None
    assert main(["predict", "--checkpoint", checkpoint, bird, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"]
    for output in ("page.html", "figure.png"):
        arguments = ["visualize", "--checkpoint", checkpoint, bird, "--output", str(tmp_path / output)]
        assert main(arguments) == (1 if picks is None else 0)
    if picks is not None:
        page = (tmp_path / "page.html").read_text()
        words = {"criterion": "votes of the heads", "transfg": "the product of the attention of all layers"}
        assert words.get(name, "by ") in page
        assert ("mutual attention weight" in page) == (name == "reduced")


def test_visualize_picks_by_another_criterion_on_the_same_weights(tmp_path, bird, capsys):
    train(tmp_path, {"name": "run", "first_candidate": 1})
    pages = {}
    for criterion in ("", "random", "random:7", "class_row"):
        output = tmp_path / f"page{len(pages)}.html"
        command = ["visualize", "--checkpoint", str(tmp_path / "run"), bird, "--output", str(output)]
        assert main([*command, *(["--criterion", criterion] if criterion else [])]) == 0
        pages[criterion] = output.read_text()
    assert len(set(pages.values())) == 4
    assert "by mutual attention weight" in pages[""]
    assert "by chance" in pages["random"]
    assert "by the class token's attention" in pages["class_row"]
    classifier = ffvt.load(tmp_path / "run", device="cpu")
    before = {name: tensor.clone() for name, tensor in classifier.model.state_dict().items()}
    classifier.pick_by("class_row")
    assert classifier.model.config.criterion == "class_row"
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.model.state_dict().items())
    assert main([*command, "--criterion", "best"]) == 1
    assert "criterion must be one of maws, class_row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"head": "transfg"}, "left out for a model that is no FFVT"), ({"feature_fusion": False}, "that is no FFVT")],
)
def test_only_an_ffvt_has_another_criterion(changes, message, tmp_path, bird, capsys):
    train(tmp_path, {"name": "run", "num_steps": 1, **changes})
    command = ["visualize", "--checkpoint", str(tmp_path / "run"), bird, "--output", str(tmp_path / "page.html")]
    assert main([*command, "--criterion", "vote"]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criterion": "best"}, "criterion must be one of maws, class_row"),
        ({"locations": (5,), "keep_rate": 0.5}, r"locations must be in rising order, in \[0, 1\)"),
        ({"patch_stride": 17}, "patch_stride must be at most patch_size=16"),
        ({"num_steps": 1, "images_per_class": 1, "train_batch_size": 10}, "images_per_class must be at least"),
    ],
)
def test_what_does_not_hold_is_refused_before_anything_is_made(changes, message, tmp_path, capsys):
    changes = {**SMALL, "output_dir": str(tmp_path), **changes}
    assert main(["train", *flags(changes)]) == 1
    found = capsys.readouterr().err
    assert re.search(message, found), found


def test_a_model_of_timm_refuses_by_name_what_it_has_not(tmp_path, capsys):
    pytest.importorskip("timm")
    changes = {**SMALL, "output_dir": str(tmp_path), "model_type": "timm:vit_tiny_patch16_224", "head": "transfg"}
    for name in ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size"):
        del changes[name]
    assert main(["train", *flags(changes)]) == 1
    assert "head" in capsys.readouterr().err
