"""Checkpoints: whole or refused, kept and deleted as they should be, and never pickles."""

import json
import subprocess

import pytest
import torch

from ffvt.train.checkpoint import checkpoints, load_checkpoint, load_state, newest_whole, save_checkpoint
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from tests import faults
from tests.helpers import tiny_model

FACTS = {"classes": list("abcde"), "resize_size": 64, "options": TrainOptions().to_dict()}


def save(run, step, is_best=False, facts=FACTS, **state):
    tensors = {"values": torch.full((3,), float(step))}
    model = tiny_model()
    return save_checkpoint(run, step, model.save_pretrained, {**facts, "step": step}, tensors, state, is_best)


@pytest.mark.slow
def test_kills_while_saving_leave_the_newest_checkpoint_whole(tmp_path):
    loadable, interrupted = faults.killed_while_saving(tmp_path, 6)
    assert loadable == 6
    assert interrupted > 0  # or nothing was tested


def test_any_changed_byte_is_noticed_and_the_previous_checkpoint_is_taken(tmp_path):
    assert faults.flipped_bytes(tmp_path, 12) == 12


def test_the_two_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step, is_best=step == 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000005", "step-00000004", "step-00000002"]
    assert load_checkpoint(tmp_path / "best").facts["step"] == 2
    assert load_checkpoint(tmp_path / "last").facts["step"] == 5
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("step-")) == ["best", "last"]
    sums = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path / "last", capture_output=True
    )
    assert sums.returncode == 0
    assert sums.stdout.count(b": OK") == 5


def test_a_checkpoint_is_refused_where_it_is_none_or_does_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"training\.json"):
        load_checkpoint(tmp_path)
    assert newest_whole(tmp_path) is None
    save(tmp_path, 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, 2, facts={**FACTS, "loss": float("nan")})
    assert load_checkpoint(tmp_path / "last").facts["step"] == 1
    assert [path.name for path in checkpoints(tmp_path)] == ["step-00000001"]
    save(tmp_path, 3, facts={**FACTS, "classes": ["a"]})
    with pytest.raises(ValueError, match="names 1 classes, its model has 5"):
        load_checkpoint(tmp_path / "last")
    for extra in ("", "0" * 64 + "  model.safetensors\n"):
        sums = (tmp_path / "last" / "SHA256SUMS").read_text()
        (tmp_path / "last" / "SHA256SUMS").write_text(extra + sums.replace("model", "other"))
        with pytest.raises(ValueError, match="step-00000003 is damaged"):
            load_checkpoint(tmp_path / "last")


def test_nothing_in_a_checkpoint_is_a_pickle(tmp_path):
    result = train(faults.options(tmp_path, "run", num_steps=4))
    for path in (result.folder / "last").iterdir():
        content = path.read_bytes()
        if path.suffix == ".json":
            json.loads(content)
        elif path.suffix == ".safetensors":
            assert content[8:9] == b"{"
        else:
            assert path.name == "SHA256SUMS"
    model, tensors, state = load_state(result.folder / "last")
    assert state["samples"] == 4 * 8
    assert set(model) == {name.removeprefix("model/") for name in tensors if name.startswith("model/")}
