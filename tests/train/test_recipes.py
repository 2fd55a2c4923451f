"""The authors' four commands and the recipes: on their layouts, alone, on two processes and on two nodes."""

import json
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ffvt.cli import main
from ffvt.model.registry import config_of
from ffvt.report.demo import RECIPE
from ffvt.train.flags import parse_training_flags
from ffvt.train.recipes import RECIPES
from ffvt.train.runlog import read_log
from tests.data.layout_fixtures import LAYOUT_WRITERS
from tests.helpers import AUTHORS_COMMANDS, NARROW, flags, torchrun

FOLDER = Path(__file__).parents[2] / "recipes"
SETS = {"cotton": "cotton", "soyloc": "soyloc", "CUB": "CUB", "dogs": "CUB"}  # what the commands name, as printed
# Only what makes a step quick changes: a narrow, shallow model, one image a batch, the small fixtures.
QUICK = flags({**NARROW, "num_steps": 20, "eval_every": 10, "train_batch_size": 2, "log_every": 5})


def quick(name, data_root, folder):
    """An authors' command, unchanged but for its weights file, with what makes it quick behind it."""
    command = AUTHORS_COMMANDS[name].replace("--pretrained_dir P ", "").split()
    return ["train", *command, *QUICK, "--data_root", str(data_root), "--output_dir", str(folder)]


def check(folder):
    lines = read_log(folder / "N")
    assert [line["step"] for line in lines if line["kind"] == "train"] == [5, 10, 15, 20]
    assert all(line["loss"] > 0 for line in lines if line["kind"] == "train")
    assert lines[-1]["kind"] == "end"
    assert lines[-1]["last"]["count"] == 3
    assert lines[-1]["last"]["selection"]["class_token_rate"] >= 0
    return lines[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "CUB" else pytest.mark.slow) for name in AUTHORS_COMMANDS]
)
def test_the_authors_commands_train_alone(name, tmp_path):
    data_root = LAYOUT_WRITERS[SETS[name]](tmp_path / "data")
    assert main(quick(name, data_root, tmp_path)) == 0
    facts = check(tmp_path)
    assert facts["options"]["fp16"]
    assert facts["classes"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTHORS_COMMANDS)
def test_the_authors_commands_train_on_two_processes(name, tmp_path):
    data_root = LAYOUT_WRITERS[SETS[name]](tmp_path / "data")
    command = torchrun(2, quick(name, data_root, tmp_path)[1:])
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert check(tmp_path)["world_size"] == 2


@pytest.mark.slow
def test_two_nodes_meet_through_torchruns_rendezvous(tmp_path):
    data_root = LAYOUT_WRITERS["cotton"](tmp_path / "data")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    nodes = []
    for node in range(2):
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(node)]
        launcher += ["--nproc_per_node", "1", "--master_addr", "localhost", "--master_port", port]
        command = [*launcher, "-m", "ffvt.train", *quick("cotton", data_root, tmp_path)[1:]]
        nodes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert check(tmp_path)["world_size"] == 2
    assert ["last: top-1" in out for out, _ in said] == [True, False]  # the main rank speaks


@pytest.mark.parametrize("name", ["cub", "dogs", "cotton", "soyloc"])
def test_recipes_are_the_authors_commands(name):
    ours = parse_training_flags(["--recipe", name])
    theirs = parse_training_flags(AUTHORS_COMMANDS["CUB" if name == "cub" else name].split())
    free = {"name": name, "pretrained_dir": "", "cache_dir": "cache", "fp16": False, "precision": "fp16"}
    if name == "dogs":
        free["dataset"] = "dog"  # printed as CUB
    assert ours == replace(theirs, **free)
    assert "Accuracy:" in (FOLDER / f"{name}.py").read_text()


@pytest.mark.parametrize(
    ("name", "dataset", "rate", "side", "augment"),
    [
        ("transfg_cub", "CUB", 0.03, 448, "crop"),
        ("transfg_cars", "car", 0.03, 448, ""),  # the data set's own: AutoAugment
        ("transfg_dogs", "dog", 0.003, 448, "crop"),
        ("transfg_nabirds", "nabirds", 0.03, 448, "crop"),
        ("transfg_inat2017", "inat2017", 0.01, 304, ""),
    ],
)
def test_the_recipes_of_transfg_are_its_authors_settings(name, dataset, rate, side, augment):
    options = parse_training_flags(["--recipe", name])
    assert (options.name, options.dataset, options.learning_rate, options.img_size) == (name, dataset, rate, side)
    assert (options.augment, options.resize_size) == (augment, {448: 600, 304: 400}[side])
    config = config_of(options.model_type, **options.model_fields(7))
    assert (config.kind, config.patch_stride, config.grid_size) == ("transfg", 12, {448: 37, 304: 25}[side])
    assert options.contrastive
    schedule = (options.train_batch_size, options.num_steps, options.warmup_steps, options.decay_type)
    assert schedule == (16, 10000, 500, "cosine")
    assert "Accuracy:" in (FOLDER / f"{name}.py").read_text()
    assert RECIPES[name].known.split(", ")[1].split(" %")[0] in (FOLDER / f"{name}.py").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CUB", "car", "dog", "nabirds", "inat2017"])
def test_transfg_trains_on_every_set_of_its_recipes(name, tmp_path):
    data_root = LAYOUT_WRITERS[name](tmp_path / "data")
    recipe = {"CUB": "cub", "car": "cars", "dog": "dogs"}.get(name, name)
    small = flags({**NARROW, "num_steps": 2, "img_size": 64, "resize_size": 80, "train_batch_size": 2})
    command = ["train", "--recipe", f"transfg_{recipe}", *small, "--data_root", str(data_root)]
    assert main([*command, "--output_dir", str(tmp_path), "--cache_dir", str(tmp_path / "cache")]) == 0
    log = read_log(tmp_path / f"transfg_{recipe}")
    assert log[-1]["kind"] == "end"
    assert log[-1]["last"]["count"] > 0


def test_the_partbirds_recipe_is_the_demo():
    assert parse_training_flags(["--recipe", "partbirds"]) == replace(RECIPE, name="partbirds")


def test_flags_beside_a_recipe_override_it_wherever_they_stand():
    for arguments in (["--recipe", "cub", "--num_steps", "7"], ["--num_steps", "7", "--recipe", "cub"]):
        options = parse_training_flags(arguments)
        assert (options.name, options.num_steps, options.eval_every, options.precision) == ("cub", 7, 200, "fp16")


def test_what_a_recipe_switches_on_can_be_switched_off():
    options = parse_training_flags(["--recipe", "cub", "--no-feature_fusion", "--precision", "bf16"])
    assert not options.feature_fusion
    assert options.autocast_precision == "bf16"


def test_every_recipe_has_a_file_and_every_file_a_recipe():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(RECIPES)


def test_an_unknown_recipe_is_refused_and_the_known_ones_are_named(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--recipe", "cars"])
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert "'cars'" in shown
    assert all(name in shown for name in RECIPES)


@pytest.mark.slow
def test_a_recipe_runs_with_flags_behind_it(tmp_path):
    data_root = LAYOUT_WRITERS["dog"](tmp_path / "data")
    more = [*QUICK, "--img_size", "64", "--resize_size", "80", "--num_token", "3", "--precision", "fp16"]
    command = [sys.executable, str(FOLDER / "dogs.py"), *more, "--data_root", str(data_root)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert ran.returncode == 0, ran.stderr
    log = (tmp_path / "output" / "dogs" / "log.jsonl").read_text().splitlines()
    end = json.loads(log[-1])
    assert end["last"]["count"] == 3
    assert 0 <= end["last"]["selection"]["hit_rate"] <= 1  # of the annotations' boxes
    assert any(path.is_dir() for path in (tmp_path / "cache").iterdir())
