"""Several processes: the same training as in one, sharded or not, and errors of one rank among them."""

import pytest
import torch

from ffvt.train.checkpoint import load_checkpoint, load_state
from ffvt.train.distributed import World
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from ffvt.train.runlog import read_log
from tests import faults
from tests.helpers import SMALL, launch, values

QUIET = {"dropout": 0.0, "ema_decay": 0.0, "num_steps": 8, "eval_every": 4, "resume": ""}


ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3, "gradient_accumulation_steps": 2}


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, ADAMW], ids=["sgd", "adamw"])
def test_a_sharded_run_trains_saves_and_resumes_as_one_process_does(changes, tmp_path):
    alone = train(faults.options(tmp_path, "alone", **{**QUIET, **changes}))
    sharded = faults.options(tmp_path, "sharded", **{**QUIET, **changes}, train_batch_size=4, fsdp=True, save_every=5)
    ran = launch(sharded, tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert values(tmp_path / "sharded") == pytest.approx(values(alone.folder), rel=1e-4)
    assert values(tmp_path / "sharded", "evaluate") == pytest.approx(values(alone.folder, "evaluate"), rel=1e-4)
    model = load_checkpoint(tmp_path / "sharded" / "last").model.state_dict()
    expected = load_checkpoint(alone.folder / "last").model.state_dict()
    torch.testing.assert_close(model, expected, rtol=1e-3, atol=1e-5)
    _, state, _ = load_state(tmp_path / "sharded" / "last")
    _, whole, _ = load_state(alone.folder / "last")
    optimizer = [name for name in whole if name.startswith("optimizer/")]
    assert optimizer
    torch.testing.assert_close({n: state[n] for n in optimizer}, {n: whole[n] for n in optimizer}, rtol=1e-2, atol=1e-4)
    again = faults.options(
        tmp_path,
        "again",
        **{**QUIET, **changes, "resume": str(tmp_path / "sharded" / "step-00000005")},
        train_batch_size=4,
        fsdp=True,
    )
    assert (tmp_path / "sharded" / "step-00000005").exists()
    assert launch(again, tmp_path).returncode == 0
    ends = [(tmp_path / name / "last" / "model.safetensors").read_bytes() for name in ("sharded", "again")]
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_an_image_that_only_another_rank_cannot_read_is_named_and_left_out(tmp_path, photographs):
    broken = sorted((photographs / "test").rglob("*.png"))[1]  # of rank 1
    broken.write_bytes(broken.read_bytes()[:50])
    changes = {**QUIET, "dataset": "imagefolder", "data_root": str(photographs), "resize_size": 80, "num_steps": 1}
    ran = launch(faults.options(tmp_path, "run", **changes), tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count(f"cannot be read and is not counted: {broken}") == 1
    assert values(tmp_path / "run", "evaluate", "count") == [3]
    assert str(broken) in values(tmp_path / "run", "unreadable", "problem")[0]


def test_an_error_of_one_rank_is_raised_on_all(monkeypatch):
    """Two worlds of two ranks that think in turn."""
    worlds = [World(rank, 2, torch.device("cpu")) for rank in range(2)]
    monkeypatch.setattr(World, "any", lambda self, *flags: (True,))
    monkeypatch.setattr(World, "gather", lambda self, value: [None, KeyError("lost")])
    with pytest.raises(KeyError, match="lost") as raised:
        worlds[0].on_all(lambda: "fine")
    assert raised.value.of_rank == 1
    with pytest.raises(KeyError, match="own"):
        worlds[1].on_all(lambda: {}["own"])


def test_two_processes_train_as_one_does_and_count_every_image_once(tmp_path):
    """gloo, fp32: the losses of 2 ranks with batch 4 are those of 1 rank with batch 8, to 1e-5."""
    options = {**SMALL, "output_dir": tmp_path, "num_steps": 8, "learning_rate": 0.1}
    ran = launch({**options, "name": "two", "train_batch_size": 4, "eval_batch_size": 7}, tmp_path)
    assert ran.returncode == 0, ran.stderr
    train(TrainOptions(**{**options, "name": "one", "output_dir": str(tmp_path)}))
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert two[0]["world_size"] == 2
    for kind in ("train", "evaluate"):
        expected = [line["loss"] for line in one if line["kind"] == kind]
        assert [line["loss"] for line in two if line["kind"] == kind] == pytest.approx(expected, rel=1e-5)
    assert [line["count"] for line in two if line["kind"] == "evaluate"] == [300, 300]
    assert "last: top-1" in ran.stdout
    assert ran.stdout.count("last: top-1") == 1
