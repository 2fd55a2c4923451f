"""What a model costs: operations per image and parameters, counted product by product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ffvt.model.config import FFVTConfig


@dataclass(frozen=True)
class BlockRows:
    """How many of a block's tokens are used for what.

    Attributes:
        attended: tokens that give keys and values.
        computed: tokens whose query, attention and MLP are computed.
        selects: whether the block picks tokens.
        pruned: whether only the rows that are read later are computed.
    """

    attended: int
    computed: int
    selects: bool
    pruned: bool


def block_rows(config: FFVTConfig) -> list[BlockRows]:
    """The tokens of every block, the exact pruning of the last two included."""
    tokens, depth, pruned = config.num_tokens, config.depth, config.prune_dead_rows
    if not config.feature_fusion:
        full = [BlockRows(tokens, tokens, False, False)] * (depth - 1)
        return [*full, BlockRows(tokens, 1 if pruned else tokens, False, pruned)]
    fused = 1 + (depth - 1) * config.num_select
    full = [BlockRows(tokens, tokens, True, False)] * (depth - 2)
    selecting = BlockRows(tokens, 1 + config.num_select if pruned else tokens, True, pruned)
    return [*full, selecting, BlockRows(fused, 1 if pruned else fused, False, pruned)]


def flops_per_image(config: FFVTConfig, training: bool = False, recomputation: bool = False) -> int:
    """Operations of one image's matrix products; a multiplication and an addition are two.

    Args:
        config: of the model.
        training: with the backward: two products for each of the forward; one for the patch embedding, whose input
            needs no gradient; none for selection, which has no gradient.
        recomputation: also what training computes again: the logits in attention's backward, and all blocks with
            gradient checkpointing (without dropout PyTorch can leave out their last product). Without it the share of
            a machine's rate is the usual MFU.

    Selection costs nothing in a block that computes all its tokens: it reads logits that are there anyway.

    Raises:
        NotImplementedError: the hybrid, whose backbone is not counted.
    """
    refuse_hybrid(config)
    dim, hidden = config.embed_dim, config.mlp_dim
    patches = 2 * config.grid_size**2 * 3 * config.patch_size**2 * dim
    linear = attention = selection = 0
    for rows in block_rows(config):
        linear += 2 * rows.attended * dim * 3 * dim  # q, k, v
        linear += 2 * rows.computed * dim * (dim + 2 * hidden)  # projection, MLP
        attention += 4 * rows.computed * rows.attended * dim  # logits, and probabilities times v
        if rows.selects and rows.pruned:
            selection += 4 * rows.attended * dim  # a row and a column of logits
    head = 2 * dim * config.num_classes
    forward = patches + linear + attention + selection + head
    if not training:
        return forward
    total = forward + patches + 2 * (linear + attention + head)
    if recomputation:
        total += attention // 2
        total += (linear + attention + selection) * config.gradient_checkpointing
    return total


@torch.no_grad()
def count_flops(model: nn.Module, image_size: int) -> int:
    """Operations of the forward of one image, as PyTorch's counter counts them: for a model without a formula.

    model: on the meta device, so that nothing is computed.
    """
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter does not know a CPU's fused attention
    with plain, FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, image_size, image_size, device="meta"))
    return counter.get_total_flops()


def num_parameters(config: FFVTConfig) -> int:
    """How many parameters the model has.

    Raises:
        NotImplementedError: the hybrid.
    """
    refuse_hybrid(config)
    dim = config.embed_dim
    patches = (3 * config.patch_size**2 + 1) * dim
    return patches + (1 + config.num_tokens) * dim + config.depth * block_parameters(config) + head_parameters(config)


def block_parameters(config: FFVTConfig) -> int:
    dim, hidden = config.embed_dim, config.mlp_dim
    biases = dim + hidden + dim + 3 * dim * config.qkv_bias
    scales = 2 * dim * (config.layer_scale is not None)
    return attention_matrices(config) + 2 * dim * hidden + biases + 4 * dim + scales


def head_parameters(config: FFVTConfig) -> int:
    return 2 * config.embed_dim + (config.embed_dim + 1) * config.num_classes


def attention_matrices(config: FFVTConfig) -> int:
    return 4 * config.embed_dim**2


def refuse_hybrid(config: FFVTConfig) -> None:
    if config.backbone is not None:
        raise NotImplementedError(
            f"plan: backbone must be None, its cost is not counted; got backbone={config.backbone!r}"
        )
