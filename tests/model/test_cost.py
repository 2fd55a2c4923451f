"""The cost formulas against what PyTorch counts."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ffvt.model.config import make_config
from ffvt.model.cost import block_rows, flops_per_image, num_parameters
from ffvt.model.ffvt import from_config
from tests.helpers import MODEL_VARIANTS, named, small_config

ATEN = torch.ops.aten


def counts_of_sdpa():
    """Formulas for PyTorch's attention on a CPU, which its counter does not know."""

    def separate(q, k, factor):
        batch, heads, rows, head_dim = q
        return factor * batch * heads * rows * k[2] * head_dim

    return {
        ATEN._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: separate(q, k, 4),
        ATEN._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, *_, **__: separate(q, k, 10),
    }


def counted_flops(model, batch, training):
    counter = FlopCounterMode(display=False, custom_mapping=counts_of_sdpa())
    images = torch.randn(batch, 3, model.config.image_size, model.config.image_size)
    with counter, nullcontext() if training else torch.no_grad():
        logits = model(images)
        if training:
            F.cross_entropy(logits, torch.zeros(batch, dtype=torch.int64)).backward()
    return counter.get_total_flops()


CRITERIA = [{"criterion": name} for name in ("class_row", "received", "rollout", "psm", "similarity")]
TRANSFG = {"head": "transfg"}
MORE_VARIANTS = [
    *CRITERIA,
    {"criterion": "psm", "gradient_checkpointing": True},
    {"criterion": "received", "prune_dead_rows": False},
    {"patch_stride": 12},
    {"patch_stride": 9, "feature_fusion": False},
    {"keep_rate": 0.7, "locations": (0, 1)},
    {"keep_rate": 0.5, "locations": (1,), "num_select": 5, "prune_dead_rows": False},
    {"keep_rate": 0.6, "locations": (0,), "criterion": "received", "gradient_checkpointing": True},
    {"keep_rate": 0.7, "locations": (0, 2), "feature_fusion": False},
    TRANSFG,
    TRANSFG | {"prune_dead_rows": False},
    TRANSFG | {"patch_stride": 12, "depth": 5},
    TRANSFG | {"gradient_checkpointing": True},
    TRANSFG | {"gradient_checkpointing": True, "prune_dead_rows": False},
    TRANSFG | {"depth": 2, "feature_fusion": False},
]


def uncounted(config):
    """The row of logits by which a pruned TransFG picks is no matrix product, and passes PyTorch's counter by."""
    return 2 * config.num_tokens * config.embed_dim * (config.kind == "transfg" and config.prune_dead_rows)


@pytest.mark.parametrize("changes", [*MODEL_VARIANTS, *MORE_VARIANTS], ids=named)
def test_operations_are_those_that_pytorch_counts(changes):
    model = from_config(small_config(**changes))
    forward = flops_per_image(model.config) - uncounted(model.config)
    assert counted_flops(model, 2, training=False) == 2 * forward
    training = flops_per_image(model.config, training=True, recomputation=True) - uncounted(model.config)
    assert counted_flops(model, 2, training=True) == 2 * training


def test_the_parts_of_transfg_cost_a_vector_times_a_map_for_each_layer_before():
    config = make_config("vit_b16", head="transfg")
    tokens, dim = config.num_tokens, config.embed_dim
    scores = 10 * 2 * tokens**2 * dim + 2 * tokens * dim
    plain = flops_per_image(make_config("vit_b16", feature_fusion=False, depth=11))
    assert block_rows(config)[-2].vecmats == 10
    assert 0.05 < scores / plain < 0.08
    by_criterion = make_config("vit_b16", criterion="psm")
    assert [rows.vecmats for rows in block_rows(by_criterion)] == [*range(11), 0]


def test_token_reduction_costs_less():
    whole, reduced = make_config("vit_b16"), make_config("vit_b16", keep_rate=0.7)
    attended = [rows.attended for rows in block_rows(reduced)]
    assert attended[:11] == [785] * 4 + [551] * 3 + [387] * 3 + [272]
    assert 0.6 < flops_per_image(reduced) / flops_per_image(whole) < 0.75


def test_what_is_computed_twice_counts_only_where_asked():
    config, saving = small_config(), small_config(gradient_checkpointing=True)
    assert flops_per_image(saving, training=True) == flops_per_image(config, training=True)
    assert flops_per_image(saving) == flops_per_image(config)
    once = flops_per_image(config, training=True)
    assert once < flops_per_image(config, training=True, recomputation=True)
    # the blocks' forward, nearly a third of a step
    again = flops_per_image(saving, training=True, recomputation=True)
    assert 1.3 < again / once < 1.4


@pytest.mark.parametrize("changes", [*MODEL_VARIANTS, TRANSFG, TRANSFG | {"patch_stride": 12}], ids=named)
def test_parameters_are_counted_without_making_them(changes):
    config = small_config(**changes)
    assert num_parameters(config) == sum(p.numel() for p in from_config(config).parameters())


@pytest.mark.parametrize("cost", [flops_per_image, num_parameters])
def test_the_hybrid_is_refused(cost):
    with pytest.raises(NotImplementedError, match="backbone must be None.*got backbone='r50'"):
        cost(make_config("r50_vit_b16"))
