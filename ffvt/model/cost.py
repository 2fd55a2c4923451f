"""What a model costs: operations per image and parameters, counted product by product."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ffvt.criteria import find, psm
from ffvt.model.config import FFVTConfig


@dataclass(frozen=True)
class BlockRows:
    """How many of a block's tokens are used for what.

    Attributes:
        attended: tokens that give keys and values.
        computed: tokens whose query, attention and MLP are computed.
        selects: whether the block picks tokens.
        pruned: whether only the rows that are read later are computed.
        observed: whether its attention leaves q, k, v and statistics behind, for a criterion or token reduction.
        vecmats: vectors times a map, of `attended` tokens each, by which the tokens of this block are scored.
        reduced: tokens, of all that it gives out, that are summed into one behind it; 0 without token reduction there.
        recomputed: whether activation checkpointing computes it again.
    """

    attended: int
    computed: int
    selects: bool
    pruned: bool
    observed: bool = False
    vecmats: int = 0
    reduced: int = 0
    recomputed: bool = True


def block_rows(config: FFVTConfig) -> list[BlockRows]:
    """The tokens of every block, the exact pruning of the last two and token reduction included."""
    before_last = config.depth - 1
    rows = {"vit": _plain_rows, "ffvt": _selecting_rows, "transfg": _part_rows}[config.kind]
    blocks = [rows(config, number, config.tokens_after(number)) for number in range(before_last)]
    last = {
        "vit": config.tokens_after(before_last),
        "ffvt": 1 + before_last * config.num_select,
        "transfg": 1 + config.num_heads,
    }[config.kind]
    pruned = config.prune_dead_rows
    return [*blocks, BlockRows(last, 1 if pruned else last, False, pruned)]


def _plain_rows(config: FFVTConfig, number: int, tokens: int) -> BlockRows:
    reduces = config.reduces(number)
    return BlockRows(tokens, tokens, False, False, observed=reduces, reduced=tokens * reduces)


def _selecting_rows(config: FFVTConfig, number: int, tokens: int) -> BlockRows:
    criterion, reduces = find(config.criterion), config.reduces(number)
    observed = not criterion.is_fused or reduces
    pruned = config.prune_dead_rows and not observed and number == config.depth - 2
    computed = 1 + config.num_select if pruned else tokens
    return BlockRows(tokens, computed, True, pruned, observed, criterion.vecmats(number), tokens * reduces)


def _part_rows(config: FFVTConfig, number: int, tokens: int) -> BlockRows:
    if number < config.depth - 2:
        return BlockRows(tokens, tokens, False, False, observed=True)
    pruned = config.prune_dead_rows
    computed = 1 + config.num_heads if pruned else tokens
    return BlockRows(tokens, computed, True, pruned, not pruned, psm.vecmats(number), recomputed=False)


def flops_per_image(config: FFVTConfig, training: bool = False, recomputation: bool = False) -> int:
    """Operations of one image's matrix products; a multiplication and an addition are two.

    Args:
        config: of the model.
        training: with the backward: two products for each of the forward; one for the patch embedding, whose input
            needs no gradient, and for token reduction, whose weights need none; none for selection, which has no
            gradient.
        recomputation: also what training computes again: the logits in attention's backward, and all blocks with
            gradient checkpointing (without dropout PyTorch can leave out their last product). Without it the share of
            a machine's rate is the usual MFU.

    Selection costs nothing in a block that computes all its tokens, but for a criterion's vectors times maps: it reads
    logits that are there anyway.

    Raises:
        NotImplementedError: the hybrid, whose backbone is not counted.
    """
    refuse_hybrid(config)
    dim = config.embed_dim
    patches = 2 * config.grid_size**2 * 3 * config.patch_size**2 * dim
    head = 2 * dim * config.num_classes
    blocks = block_rows(config)
    products = sum(_block_products(config, rows) for rows in blocks)
    lines = sum(_class_lines(config, rows) for rows in blocks)
    scores = sum(2 * rows.vecmats * rows.attended**2 * dim for rows in blocks)
    reduction = sum(2 * rows.reduced * dim for rows in blocks)
    forward = patches + products + lines + scores + reduction + head
    if not training:
        return forward
    total = forward + patches + 2 * (products + head) + reduction
    if recomputation:
        total += sum(_attention(config, rows) // 2 for rows in blocks)
        again = sum(_block_products(config, rows) + _class_lines(config, rows) for rows in blocks if rows.recomputed)
        total += again * config.gradient_checkpointing
    return total


def _block_products(config: FFVTConfig, rows: BlockRows) -> int:
    dim, hidden = config.embed_dim, config.mlp_dim
    qkv = 2 * rows.attended * dim * 3 * dim
    return qkv + 2 * rows.computed * dim * (dim + 2 * hidden) + _attention(config, rows)  # projection, MLP


def _attention(config: FFVTConfig, rows: BlockRows) -> int:
    return 4 * rows.computed * rows.attended * config.embed_dim  # logits, and probabilities times v


def _class_lines(config: FFVTConfig, rows: BlockRows) -> int:
    """The lines of logits that a pruned block picks by: the class token's row and, but for TransFG, its column."""
    lines = 1 if config.kind == "transfg" else 2
    return lines * 2 * rows.attended * config.embed_dim if rows.selects and rows.pruned else 0


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
