"""The command line, on real files: train, evaluate, predict, visualize, info, and what bad input says."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ffvt.cli import main
from ffvt.data.images import load_image
from ffvt.data.transforms import center_crop, normalize
from ffvt.train.checkpoint import load_checkpoint
from ffvt.version import __version__
from tests.helpers import SMALL, flags


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run on folders of pictures."""
    root = tmp_path_factory.mktemp("cli")
    draw = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for name in ("crow", "jay", "kite", "owl", "tit", "wren"):
            (root / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (70, 80, 3), np.uint8)
                Image.fromarray(pixels).save(root / "photos" / split / name / f"{number}.jpg")
    options = {**SMALL, "dataset": "imagefolder", "data_root": root / "photos", "output_dir": root, "name": "run"}
    assert main(["train", *flags({**options, "resize_size": 72})]) == 0
    return root


def test_evaluate_repeats_what_training_found(run, capsys):
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(run / "run" / "last"), "--json", "--per_class"]) == 0
    score = json.loads(capsys.readouterr().out)
    ended = json.loads((run / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert score["count"] == 18
    assert score["top1"] == pytest.approx(ended["last"]["top1"], abs=1e-6)
    assert score["loss"] == pytest.approx(ended["last"]["loss"], rel=1e-5)
    assert list(score["per_class"]) == ["crow", "jay", "kite", "owl", "tit", "wren"]
    assert {found["count"] for found in score["per_class"].values()} == {3}
    assert sum(found["right"] for found in score["per_class"].values()) == round(score["top1"] * 18)


def test_a_runs_folder_stands_for_its_best_checkpoint(run, capsys):
    capsys.readouterr()
    shown = []
    for folder in (run / "run", run / "run" / "best"):
        assert main(["evaluate", "--checkpoint", str(folder), "--json"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]


def test_a_plan_names_its_parts_and_its_assumptions(capsys):
    assert (
        main(["plan", "--model_type", "ViT-B_16", "--img_size", "448", "--num_token", "12", "--memory", "24GiB"]) == 0
    )
    said = capsys.readouterr().out
    assert "largest batch" in said
    assert "plain ViT" in said
    assert "TFLOP/s of matmul (measured here)" in said
    assert main(["plan", "--memory", "24GiB", "--tflops", "600", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert plans["ffvt"]["batch_size"] > plans["plain_vit"]["batch_size"]


def test_predict_gives_the_classes_of_a_trained_model_in_order(run, capsys):
    picture = run / "photos" / "test" / "owl" / "0.jpg"
    assert main(["predict", "--checkpoint", str(run / "run" / "last"), str(picture)]) == 0
    path, *rows = capsys.readouterr().out.splitlines()
    assert path == str(picture)
    checkpoint = load_checkpoint(run / "run" / "last")
    image = center_crop(load_image(picture, 72), 64)
    best = checkpoint.model.eval()(normalize(image[None])).softmax(-1)[0].topk(5)
    names = [checkpoint.facts["classes"][label] for label in best.indices.tolist()]
    assert [row.split() for row in rows] == [[f"{x:.1%}", name] for x, name in zip(best.values.tolist(), names)]


def test_visualize_writes_a_page(run, tmp_path, capsys):
    pictures = [str(run / "photos" / "test" / name / "0.jpg") for name in ("owl", "jay")]
    output = tmp_path / "picks.html"
    assert main(["visualize", "--checkpoint", str(run / "run"), "--output", str(output), *pictures]) == 0
    assert output.read_text().count("<article") == 2


def test_export_writes_a_file_that_says_what_its_images_go_through(run, tmp_path, capsys):
    capsys.readouterr()
    path, checkpoint = tmp_path / "model.pt2", run / "run" / "best"
    asked = ["--with_selection", "--batch_size", "2", "--check", "1"]
    assert main(["export", "--checkpoint", str(checkpoint), "--output", str(path), *asked]) == 0
    said = capsys.readouterr().out
    assert "takes images (2, 3, 64, 64), fp32" in said
    assert "compared on 2 random images: logits within" in said
    assert f"torch.export.load('{path}').module()(images)" in said
    files = {"ffvt": ""}
    program = torch.export.load(path, extra_files=files).module()
    facts = json.loads(files["ffvt"])
    assert facts["classes"] == ["crow", "jay", "kite", "owl", "tit", "wren"]
    assert (facts["resize_size"], facts["image_size"]) == (72, 64)
    pictures = [str(run / "photos" / "test" / name / "0.jpg") for name in ("owl", "jay")]
    images = torch.stack(
        [center_crop(load_image(path, facts["resize_size"]), facts["image_size"]) for path in pictures]
    )
    mean, std = (torch.tensor(facts[name]).view(3, 1, 1) for name in ("mean", "std"))
    logits = program((images / 255 - mean) / std)[0]
    expected = load_checkpoint(checkpoint).model.eval()(normalize(images))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "--checkpoint", "RUN", "--output", "model.bin"], "got path='model.bin'"),
        (["evaluate", "--checkpoint", "nowhere"], "with best/ or last/ in it; got 'nowhere'"),
        (["predict", "--checkpoint", "RUN", "--top", "0", "x.jpg"], "got top=0"),
        (["visualize", "--checkpoint", "RUN", "RUN/log.jsonl"], "an image must be readable; got none"),
        (["train", "--dataset", "partbirds", "--img_size", "64", "--output_dir", "RUN/log.jsonl"], "log.jsonl"),
        (["evaluate", "--checkpoint", "RUN", "--split", "val"], "val"),
        (["train", "--dataset", "imagefolder", "--data_root", "nowhere"], "must be a folder; got data_root='nowhere'"),
        (["train", "--dataset", "CUB"], "CUB: data_root must hold train_test_split.txt, from https://"),
        (["train", "--resume", "nowhere", "--dataset", "partbirds", "--img_size", "64"], "got resume='nowhere'"),
        (["train", "--fsdp", "--dataset", "partbirds", "--img_size", "64"], "fsdp needs torchrun"),
        (["plot", "nowhere"], "log: a run must have a log.jsonl; got"),
        (["plan", "--memory", "a lot"], "got memory='a lot'"),
        (["doctor", "--dataset", "partbirds"], "drawn from a seed"),
    ],
)
def test_bad_input_ends_with_status_one_and_one_line(run, arguments, message, capsys):
    arguments = [argument.replace("RUN/log", str(run / "run" / "log")) for argument in arguments]
    arguments = [str(run / "run" / "last") if argument == "RUN" else argument for argument in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip()
    assert message in error
    assert error.splitlines()[-1].startswith(f"ffvt {arguments[0]}: ")


def test_bad_usage_is_one_line_that_names_the_flag_and_where_to_look(capsys):
    for arguments, said in (
        (
            ["train", "--train_batch_size", "0"],
            "ffvt train: train_batch_size must be at least 1; got train_batch_size=0",
        ),
        (["train", "--img_size", "64px"], "ffvt train: argument --img_size: invalid int value: '64px'"),
        (["train", "--no_such_flag"], "ffvt train: unrecognized arguments: --no_such_flag"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert capsys.readouterr().err == f"{said} (see ffvt train --help)\n"


def test_info_is_json_and_says_what_serves():
    shown = subprocess.run([sys.executable, "-m", "ffvt", "info"], capture_output=True, text=True, check=True).stdout
    info = json.loads(shown)
    assert info["devices"]["cpu"]["serves"] in ("cpp", "torch")
    assert info["devices"]["cpu"]["serves"] == "torch" or info["backends"]["cpp"] == "available"
    assert info["matmul_gflops"]["fp32"] > 0


COMMANDS = ("demo", "train", "evaluate", "predict", "visualize", "export", "plot", "plan", "doctor", "info")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: ffvt {command}" in capsys.readouterr().out


def test_help_and_version_import_no_torch():
    code = f"""if True:
        import sys
        from ffvt.cli import main
        for arguments in (["--help"], ["--version"], *([command, "--help"] for command in {COMMANDS})):
            try:
                main(arguments)
            except SystemExit as stop:
                assert stop.code == 0
        heavy = {{"torch", "torchvision", "numpy", "PIL", "matplotlib", "scipy"}} & set(sys.modules)
        assert not heavy, heavy
    """
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert f"ffvt {__version__}" in shown.stdout


def test_the_module_trains_as_the_command_does(tmp_path):
    arguments = flags({**SMALL, "num_steps": 1, "output_dir": tmp_path, "name": "run"})
    command = [sys.executable, "-m", "ffvt.train", *arguments]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith("last: top-1")
    assert (tmp_path / "run" / "last").is_dir()
