"""The contrastive loss: against its formula pair by pair, alone and over ranks, and in training."""

import pytest
import torch
import torch.multiprocessing as mp

from ffvt.train.contrastive import contrastive_loss, contrastive_loss_of_all
from ffvt.train.distributed import World
from ffvt.train.engine import train
from ffvt.train.options import TrainOptions
from tests import faults
from tests.helpers import SMALL, launch, values
from tests.train.test_distributed import ADAMW, QUIET


def features_and_labels(count=6, seed=0):
    torch.manual_seed(seed)
    base = torch.randn(1, 8)
    return (base + torch.randn(count, 8)), torch.tensor([0, 1, 0, 2, 1, 1])[:count]


def by_pairs(features, labels, margin=0.4):
    """The published formula, in fp64, a pair at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for one, label in zip(features.double(), labels):
        for other, theirs in zip(features.double(), labels):
            cosine = (one @ other) / (one.norm() * other.norm())
            total = total + (1 - cosine if label == theirs else (cosine - margin).clamp(min=0))
    return total / len(labels) ** 2


@pytest.mark.parametrize("margin", [0.4, 0.0, 0.9])
def test_the_loss_and_its_gradient_are_the_formula_s(margin):
    features, labels = features_and_labels()
    mine, theirs = (features.clone().requires_grad_() for _ in range(2))
    loss, expected = contrastive_loss(mine, labels, margin=margin), by_pairs(theirs, labels, margin)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    grad, wanted = (torch.autograd.grad(total, x)[0] for total, x in ((loss, mine), (expected, theirs)))
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_computes_in_fp32_under_autocast_too(dtype):
    features, labels = features_and_labels()
    features = features.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = contrastive_loss(features, labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(by_pairs(features, labels).item(), rel=1e-5)


def test_one_image_alone_has_no_loss():
    assert contrastive_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([7])).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("features", "labels", "margin", "error", "message"),
    [
        (torch.zeros(3), torch.zeros(3).long(), 0.4, ValueError, r"features must be \(B, C\); got features=\(3,\)"),
        (torch.zeros(0, 3), torch.zeros(0).long(), 0.4, ValueError, "features must be"),
        (torch.zeros(2, 3), torch.zeros(3).long(), 0.4, ValueError, r"labels must be \(2,\), one for each image"),
        (torch.zeros(2, 3), torch.zeros(2, 5), 0.4, TypeError, "labels integers; got .*float32 and .*float32"),
        (torch.zeros(2, 3).long(), torch.zeros(2).long(), 0.4, TypeError, "features floating point"),
        (torch.zeros(2, 3), torch.zeros(2).long(), 2, ValueError, r"margin must be in \[-1, 1\]; got margin=2"),
        (torch.zeros(2, 3), torch.zeros(2).long(), float("nan"), ValueError, "margin must be"),
    ],
)
def test_bad_input_is_refused(features, labels, margin, error, message):
    with pytest.raises(error, match=f"contrastive_loss: .*{message}"):
        contrastive_loss(features, labels, margin=margin)


def _grads_of_a_rank(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    features, labels = features_and_labels()
    own = features[3 * rank : 3 * rank + 3].clone().requires_grad_()
    loss = contrastive_loss_of_all(own, labels[3 * rank : 3 * rank + 3], World(rank, 2, torch.device("cpu")))
    loss.backward()
    torch.save((loss.item(), own.grad), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_over_ranks_it_is_the_loss_of_the_whole_batch_and_gradients_average_to_its(tmp_path):
    mp.spawn(_grads_of_a_rank, (str(tmp_path),), nprocs=2)
    features, labels = features_and_labels()
    whole = features.clone().requires_grad_()
    loss = contrastive_loss(whole, labels)
    loss.backward()
    for rank in range(2):
        found, grad = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(loss.item(), rel=1e-6)
        torch.testing.assert_close(grad / 2, whole.grad[3 * rank : 3 * rank + 3], rtol=1e-5, atol=1e-7)


PAIRS = {"contrastive": True, "smoothing_value": 0.1, "learning_rate": 0.1, "num_steps": 8}


@pytest.mark.slow
def test_two_processes_with_the_contrastive_loss_train_as_one_does(tmp_path):
    options = {**SMALL, **PAIRS, "output_dir": str(tmp_path)}
    train(TrainOptions(**options, name="one"))
    ran = launch({**options, "name": "two", "train_batch_size": 4}, tmp_path)
    assert ran.returncode == 0, ran.stderr
    for key in ("loss", "contrastive"):
        assert values(tmp_path / "two", key=key) == pytest.approx(values(tmp_path / "one", key=key), rel=1e-5)
    assert min(values(tmp_path / "one", key="contrastive")) > 0


@pytest.mark.slow
def test_a_sharded_run_with_the_contrastive_loss_trains_as_one_process_does(tmp_path):
    changes = {**QUIET, **ADAMW, "gradient_accumulation_steps": 1, "contrastive": True}
    alone = train(faults.options(tmp_path, "alone", **changes))
    ran = launch(faults.options(tmp_path, "sharded", **changes, train_batch_size=4, fsdp=True), tmp_path)
    assert ran.returncode == 0, ran.stderr
    for key in ("loss", "contrastive"):
        assert values(tmp_path / "sharded", key=key) == pytest.approx(values(alone.folder, key=key), rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{"feature_fusion": False}, {"gradient_accumulation_steps": 2}, {"head": "transfg"}]
)
def test_every_kind_of_model_trains_with_it(changes, tmp_path):
    options = {**SMALL, **PAIRS, "num_steps": 2, "output_dir": str(tmp_path), **changes}
    result = train(TrainOptions(**options))
    losses, parts = values(result.folder), values(result.folder, key="contrastive")
    assert all(0 < part < loss for loss, part in zip(losses, parts))
    assert len(parts) == 2
