"""The state of a run: captured and restored whole, or refused."""

import random

import numpy as np
import pytest
import torch

from ffvt.data.transforms import PLAIN
from ffvt.train.distributed import World
from ffvt.train.options import TrainOptions
from ffvt.train.state import TrainState
from ffvt.train.step import Preparation, training_step
from tests.helpers import SMALL, batch_of

ALONE = World(0, 1, torch.device("cpu"))
KINDS = {"sgd": {"momentum_buffer"}, "adamw": {"step", "exp_avg", "exp_avg_sq"}}


def made(steps=0, **changes):
    """A state after some steps."""
    state = TrainState(TrainOptions(**{**SMALL, "warmup_steps": 0, "dropout": 0.1, **changes}), ALONE, 9)
    for _ in range(steps):
        step(state)
    return state


def step(state):
    images = torch.randint(0, 256, (8, 3, 64, 64), dtype=torch.uint8)  # drawn from the state's own generator
    return training_step(state, batch_of(images, torch.arange(8)), Preparation(PLAIN))


def copied(captured):
    model, tensors, plain = captured
    return {n: t.clone() for n, t in model.items()}, {n: t.clone() for n, t in tensors.items()}, plain


def same(first, second):
    """Whether two captured states are equal to the bit."""
    return first[2] == second[2] and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(first[:2], second)
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"weight_decay": 0.1},
        {"ema_decay": 0.9},
        {"optimizer": "adamw", "layer_decay": 0.5, "weight_decay": 0.1},
        {"precision": "fp16"},
    ],
    ids=["sgd", "average", "adamw", "fp16"],
)
def test_a_restored_state_is_the_captured_one_and_trains_alike(changes):
    state = made(3, **changes)
    captured = copied(state.capture())
    losses = [step(state).loss for _ in range(2)]
    expected = copied(state.capture())
    other = made(**changes, seed=7)
    other.restore(*copied(captured))
    assert same(other.capture(), captured)
    other.restore(*copied(captured))
    assert [step(other).loss for _ in range(2)] == losses
    assert same(other.capture(), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_optimisers_tensors_go_by_the_parameters_names(optimizer):
    state = made(1, optimizer=optimizer)
    _, tensors, _ = state.capture()
    expected = {f"optimizer/{name}/{kind}" for name, _ in state.model.named_parameters() for kind in KINDS[optimizer]}
    assert {name for name in tensors if name.startswith("optimizer/")} == expected


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_state_before_the_first_good_step_has_no_optimiser_state_and_starts_as_a_new_one(optimizer):
    changes = {"optimizer": optimizer, "weight_decay": 0.1}
    new = made(**changes)
    captured = copied(new.capture())
    assert not [name for name in captured[1] if name.startswith("optimizer/")]
    assert not new.optimizer.state
    other = made(**changes, seed=7)
    other.restore(*copied(captured))
    assert not other.optimizer.state
    step(other)
    assert same(other.capture(), made(1, **changes).capture())


def test_the_generators_are_taken_back_to_where_they_were_captured():
    captured = copied(made(1).capture())
    drawn = random.random(), np.random.rand(), torch.rand(1)
    made(seed=7).restore(*captured)
    assert (random.random(), np.random.rand(), torch.rand(1)) == drawn


def test_another_model_and_another_optimiser_are_refused_by_name():
    captured = made(1).capture()
    with pytest.raises(ValueError, match=r"^resume: the model must be the checkpoint's; it differs in .*mlp"):
        made(mlp_dim=48).restore(*captured)
    for name, value in (("head.bias", torch.zeros(9, dtype=torch.int32)), ("head.bias", torch.zeros(5))):
        forged = {**captured[0], name: value}
        with pytest.raises(
            ValueError, match=r"^resume: the model .* head\.bias of model\.safetensors: .* there, float32"
        ):
            made().restore(forged, *captured[1:])
    with pytest.raises(ValueError, match="^resume: optimizer must be the checkpoint's; got optimizer='adamw'$"):
        made(optimizer="adamw").restore(*captured)


def test_the_weights_to_start_from_are_not_read_where_a_checkpoint_replaces_them(tmp_path):
    options = TrainOptions(**{**SMALL, "pretrained_dir": str(tmp_path / "gone.npz")})
    with pytest.raises(FileNotFoundError, match="gone"):
        TrainState(options, ALONE, 9)
    captured = copied(made(1).capture())
    state = TrainState(options, ALONE, 9, is_resumed=True)
    state.restore(*captured)
    assert same(state.capture(), captured)


def test_the_sums_of_an_older_version_are_taken_on():
    state = made()
    state.meter.add(torch.tensor(2.0), torch.tensor(3), 4, torch.tensor(5.0), torch.tensor(0.5))
    model, tensors, plain = state.capture()
    assert plain["meter"] == [2.0, 3.0, 4.0, 5.0, 1.0, 0.5]
    other = made()
    other.restore(model, tensors, {**plain, "meter": plain["meter"][:5]})
    assert other.meter.steps == 1
    assert other.meter.take(ALONE) == (2.0, 0.75, 5.0, 0.0)
