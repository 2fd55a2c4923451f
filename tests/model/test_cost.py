"""The cost formulas against what PyTorch counts."""

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from ffvt.model.config import make_config
from ffvt.model.cost import flops_per_image, num_parameters
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


@pytest.mark.parametrize("changes", MODEL_VARIANTS, ids=named)
def test_operations_are_those_that_pytorch_counts(changes):
    model = from_config(small_config(**changes))
    assert counted_flops(model, 2, training=False) == 2 * flops_per_image(model.config)
    training = 2 * flops_per_image(model.config, training=True, recomputation=True)
    assert counted_flops(model, 2, training=True) == training


def test_what_is_computed_twice_counts_only_where_asked():
    config, saving = small_config(), small_config(gradient_checkpointing=True)
    assert flops_per_image(saving, training=True) == flops_per_image(config, training=True)
    assert flops_per_image(saving) == flops_per_image(config)
    once = flops_per_image(config, training=True)
    assert once < flops_per_image(config, training=True, recomputation=True)
    # the blocks' forward, nearly a third of a step
    again = flops_per_image(saving, training=True, recomputation=True)
    assert 1.3 < again / once < 1.4


@pytest.mark.parametrize("changes", MODEL_VARIANTS, ids=named)
def test_parameters_are_counted_without_making_them(changes):
    config = small_config(**changes)
    assert num_parameters(config) == sum(p.numel() for p in from_config(config).parameters())


@pytest.mark.parametrize("cost", [flops_per_image, num_parameters])
def test_the_hybrid_is_refused(cost):
    with pytest.raises(NotImplementedError, match="backbone must be None.*got backbone='r50'"):
        cost(make_config("r50_vit_b16"))
