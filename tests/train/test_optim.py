"""The optimisers' groups and the learning-rate schedules."""

import pytest
import torch

from ffvt.train.optim import CURVES, make_optimizer, make_scheduler
from ffvt.train.options import DECAYS
from tests.helpers import tiny_model


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_rates_warm_up_from_zero_and_end_at_zero(decay):
    optimizer = make_optimizer("sgd", torch.nn.Linear(1, 1), 2.0, 0.0)
    scheduler = make_scheduler(optimizer, decay, 4, 12)
    rates = []
    for step in range(13):
        rates.append(scheduler.get_last_lr()[0])
        resumed = make_scheduler(make_optimizer("sgd", torch.nn.Linear(1, 1), 2.0, 0.0), decay, 4, 12, done=step)
        assert resumed.get_last_lr() == scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    assert rates[:5] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert rates[8] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0, abs=1e-9)
    with pytest.raises(ValueError, match="got decay_type='step'"):
        make_scheduler(optimizer, "step", 1, 2)
    with pytest.raises(ValueError, match="got optimizer='lamb'"):
        make_optimizer("lamb", torch.nn.Linear(1, 1), 1.0, 0.0)


def test_adamw_decays_matrices_only():
    model = tiny_model()
    groups = make_optimizer("adamw", model, 1e-3, 0.05).param_groups
    decayed, plain = sorted(groups, key=lambda group: -group["weight_decay"])
    assert decayed["weight_decay"] == 0.05
    assert plain["weight_decay"] == 0.0
    assert all(p.ndim == 1 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
    assert all(group["weight_decay"] == 0.05 for group in make_optimizer("sgd", model, 1e-3, 0.05).param_groups)


def test_layer_decay_lowers_the_rate_block_by_block():
    model = tiny_model()  # 3 selecting blocks and the last one
    rates = {}
    for group in make_optimizer("adamw", model, 1.0, 0.05, layer_decay=0.5).param_groups:
        rates |= dict.fromkeys(group["params"], group["lr"])
    names = {name: rates[parameter] for name, parameter in model.named_parameters()}
    assert names["head.weight"] == names["norm.bias"] == 1.0
    assert names["last_block.mlp.fc1.weight"] == 0.5
    assert [names[f"blocks.{i}.attn.qkv.weight"] for i in range(3)] == [1 / 16, 1 / 8, 1 / 4]
    assert names["patch_embed.proj.weight"] == names["cls_token"] == names["pos_embed"] == 1 / 32


def test_every_decay_has_a_curve():
    assert tuple(CURVES) == DECAYS
