"""The memory of a training step, counted tensor by tensor."""

from __future__ import annotations

from dataclasses import dataclass

from ffvt.criteria import find
from ffvt.kernels.backends import cpp_serves
from ffvt.model.config import FFVTConfig
from ffvt.model.cost import (
    BlockRows,
    attention_matrices,
    block_parameters,
    block_rows,
    head_parameters,
    num_parameters,
    refuse_hybrid,
)
from ffvt.precision import BYTES

FP32 = 4  # bytes
OPTIMIZER_TENSORS = {"sgd": 1, "adamw": 2}  # fp32, of a parameter's size: momentum; two moments
MASK_ON_CUDA = 1  # bytes of a dropout mask's element; on a CPU it has the type of what it masks
SEED = 8  # bytes that the C++ kernels keep instead of a mask


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step holds at its peak, by what holds them.

    activations: what is kept for the backward, with the input and autocast's copies of the weights; gradients: those
    of the weights. At the peak each may be less than all there ever is: the one shrinks while the other grows.
    temporary: what is in flight beside them.
    """

    weights: int
    gradients: int
    optimizer_state: int
    ema: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """The peak."""
        lasting = self.weights + self.optimizer_state + self.ema
        return lasting + self.gradients + self.activations + self.temporary


def training_memory(
    config: FFVTConfig,
    batch_size: int,
    optimizer: str = "sgd",
    precision: str = "fp32",
    ema: bool = False,
    device: str = "cpu",
) -> Memory:
    """The memory of one training step, as `ffvt.train` makes it, on one device.

    Args:
        batch_size: images at a time. optimizer: sgd (with momentum) or adamw. precision: fp32, bf16 or fp16, by
            autocast; weights, gradients and optimiser state are fp32 always. ema: a moving average of the weights is
            kept. device: cpu or cuda.

    Counted are tensors of eager mode: scratch inside kernels, the loss, and biases' gradients in flight are not; nor
    the buckets in which several devices exchange gradients. The CPU's part is measured in the tests, CUDA's (masks of
    one byte, AdamW on all weights at once) is read off PyTorch's code.

    Raises:
        ValueError: an argument is none of these. NotImplementedError: the hybrid.
    """
    _check(config, batch_size, precision, device)
    if optimizer not in OPTIMIZER_TENSORS:
        raise ValueError(f"plan: optimizer must be one of {', '.join(OPTIMIZER_TENSORS)}; got optimizer={optimizer!r}")
    weights = FP32 * num_parameters(config)
    moments = _backward_moments(config, batch_size, BYTES[precision], device)
    moments.append(_update_moment(config, batch_size, weights, optimizer, device))
    activations, gradients, temporary = max(moments, key=sum)
    state = OPTIMIZER_TENSORS[optimizer] * weights
    return Memory(weights, gradients, state, weights if ema else 0, activations, temporary)


def saved_activations(
    config: FFVTConfig, batch_size: int, precision: str = "fp32", device: str = "cpu"
) -> dict[str, int]:
    """Bytes of every tensor that a forward keeps for its backward, by name; weights themselves are left out.

    batch_size, precision, device: as for `training_memory`.

    Raises:
        ValueError, NotImplementedError: as `training_memory`.
    """
    _check(config, batch_size, precision, device)
    element, blocks = BYTES[precision], block_rows(config)
    found = _embedding_tensors(config, element, device)
    casts = {"patch_embed.weight cast": 3 * config.patch_size**2 * config.embed_dim}
    for number, rows in enumerate(blocks):
        if config.gradient_checkpointing and rows.recomputed:
            kept = {"input": FP32 * rows.attended * config.embed_dim}
        else:
            kept = _attention_tensors(config, rows, element) | _mlp_tensors(config, rows, element, device)
            casts[f"block {number} weight casts"] = attention_matrices(config) + _mlp_matrices(config)
        kept |= _outside_tensors(config, blocks, number, element)
        found |= {f"block {number} {name}": size for name, size in kept.items()}
    found |= _head_tensors(config, blocks[-1], element)
    casts["head.weight cast"] = config.embed_dim * config.num_classes
    saved = {name: batch_size * size for name, size in found.items()}
    if config.dropout and _keeps_seeds(device):
        recomputed = sum(rows.recomputed for rows in blocks) if config.gradient_checkpointing else 0
        saved["dropout seeds"] = SEED * (1 + 2 * (len(blocks) - recomputed))
    return saved if element == FP32 else saved | {name: element * count for name, count in casts.items()}


# One image's tensors, in the order in which they are made.


def _embedding_tensors(config: FFVTConfig, element: int, device: str) -> dict[str, int]:
    tensors = {"pixels": element * 3 * config.image_size**2}
    if config.dropout and not _keeps_seeds(device):
        tensors["embedding mask"] = _mask(FP32, device) * config.num_tokens * config.embed_dim
    return tensors


def _attention_tensors(config: FFVTConfig, rows: BlockRows, element: int) -> dict[str, int]:
    dim, attended, computed = config.embed_dim, rows.attended, rows.computed
    tensors = {
        "norm1 input": FP32 * attended * dim,
        "norm1 mean and deviation": 2 * FP32 * attended,
        "norm1 output": element * attended * dim,
        "qkv": element * attended * 3 * dim,
        "out": element * computed * dim,  # of attention; the projection's input is the same memory
        "lse": FP32 * computed * config.num_heads,
    }
    if (rows.selects or rows.observed) and not rows.pruned:  # of our own operator; the others' attention is PyTorch's
        tensors["row_max"] = FP32 * computed * config.num_heads
    if rows.selects and config.kind == "transfg":
        tensors["index"] = 8 * (1 + config.num_heads) * (1 + rows.pruned)  # of the queries, and of the tokens
    elif rows.selects and not rows.observed:
        tensors["index"] = 8 * (computed if rows.pruned else config.num_select)
    if rows.selects and rows.pruned:
        tensors["gathered queries"] = element * computed * dim
    if config.layer_scale is not None:
        tensors["attention before its scale"] = element * computed * dim
    return tensors


def _outside_tensors(config: FFVTConfig, blocks: list[BlockRows], number: int, element: int) -> dict[str, int]:
    """What is kept behind a block, which activation checkpointing does not compute again."""
    rows, tensors = blocks[number], {}
    if rows.selects and rows.observed and config.kind == "ffvt":
        tensors["index"] = 8 * config.num_select
    if rows.reduced:
        tensors["index of what stays"] = 8 * (config.tokens_after(number + 1) - 1)
        tensors["weights of the rest"] = element * rows.reduced
    return tensors


def _mlp_tensors(config: FFVTConfig, rows: BlockRows, element: int, device: str) -> dict[str, int]:
    dim, hidden, computed = config.embed_dim, config.mlp_dim, rows.computed
    tensors = {
        "norm2 input": FP32 * computed * dim,
        "norm2 mean and deviation": 2 * FP32 * computed,
        "norm2 output": element * computed * dim,
        "gelu input": element * computed * hidden,
        "fc2 input": element * computed * hidden,
    }
    if config.dropout and not _keeps_seeds(device):
        tensors["hidden mask"] = _mask(element, device) * computed * hidden
        tensors["output mask"] = _mask(element, device) * computed * dim
    if config.layer_scale is not None:
        tensors["mlp before its scale"] = element * computed * dim
    return tensors


def _head_tensors(config: FFVTConfig, last: BlockRows, element: int) -> dict[str, int]:
    dim = config.embed_dim  # the norm reads one row, but what it is a row of is kept whole
    return {
        "norm input": FP32 * last.computed * dim,
        "norm mean and deviation": 2 * FP32,
        "norm output": element * dim,
    }


def _keeps_seeds(device: str) -> bool:
    """Whether dropout makes its masks again in the backward."""
    return device == "cpu" and cpp_serves()


def _mask(element: int, device: str) -> int:
    return MASK_ON_CUDA if device == "cuda" else element


def _mlp_matrices(config: FFVTConfig) -> int:
    return 2 * config.embed_dim * config.mlp_dim


# (activations, gradients, temporary) in bytes at the moments of a step that can be its peak.


def _backward_moments(config: FFVTConfig, batch_size: int, element: int, device: str) -> list[tuple[int, int, int]]:
    """Two for each block, from the last one down: in its MLP and in its attention."""
    dim, blocks = config.embed_dim, block_rows(config)
    cast = 0 if element == FP32 else element  # of a weight's element
    attention = [batch_size * sum(_attention_tensors(config, rows, element).values()) for rows in blocks]
    attention = [size + cast * attention_matrices(config) for size in attention]
    mlp = [batch_size * sum(_mlp_tensors(config, rows, element, device).values()) for rows in blocks]
    mlp = [size + cast * _mlp_matrices(config) for size in mlp]
    outside = [sum(_outside_tensors(config, blocks, number, element).values()) for number in range(len(blocks))]
    kept = [
        batch_size * FP32 * rows.attended * dim  # by checkpointing: the block's input
        if config.gradient_checkpointing and rows.recomputed
        else attention[number] + mlp[number]
        for number, rows in enumerate(blocks)
    ]
    kept = [size + batch_size * more for size, more in zip(kept, outside)]
    embedding = _held_pixels(config, batch_size) + cast * 3 * config.patch_size**2 * dim
    embedding += batch_size * sum(_embedding_tensors(config, element if cast else 0, device).values())
    gradients, moments = FP32 * head_parameters(config), []
    moments.append((embedding + sum(kept), 0, batch_size * _history(config, blocks, element)))
    for number in reversed(range(len(blocks))):
        rows, below = blocks[number], embedding + sum(kept[:number])
        in_mlp, in_attention = _mlp_temporary(config, rows, element), _attention_temporary(config, rows, element)
        fc2 = element * _mlp_matrices(config) // 2  # its gradient, as it comes out of the product
        moments.append((below + attention[number] + mlp[number], gradients, batch_size * in_mlp + fc2))
        gradients += FP32 * _mlp_matrices(config)
        moments.append((below + attention[number], gradients, batch_size * in_attention))
        gradients += FP32 * (block_parameters(config) - _mlp_matrices(config))
    return moments


def _history(config: FFVTConfig, blocks: list[BlockRows], element: int) -> int:
    """Bytes of one image that the blocks leave behind until the last of them has picked: the lines of statistics, and
    with checkpointing copies of q and k, which nothing else keeps then.
    """
    if not (config.kind == "transfg" or (config.kind == "ffvt" and find(config.criterion).needs_history)):
        return 0
    projected = 2 * element * config.embed_dim * config.gradient_checkpointing
    lines = 3 * FP32 * config.num_heads  # row, column, lse
    return sum(rows.attended * (projected + lines) for rows in blocks if rows.observed)


def _mlp_temporary(config: FFVTConfig, rows: BlockRows, element: int) -> int:
    """Bytes of one image in flight in the backward of fc2: the gradients of the residual stream, of fc2's output where
    that is another tensor, and of its input. Where there is a mask of the output it has just gone, but is counted among
    the activations."""
    dim = config.embed_dim
    own = element * dim if element != FP32 or config.dropout else 0
    return rows.computed * (FP32 * dim + own + element * config.mlp_dim)


def _attention_temporary(config: FFVTConfig, rows: BlockRows, element: int) -> int:
    """Bytes of one image in flight in the backward of attention: the gradients of the residual stream, of attention's
    output, and of q, k, v. Where PyTorch's own backward gives three tensors, what packs them comes when q, k, v have
    gone."""
    stream = rows.computed if rows.pruned and not rows.selects else rows.attended
    return config.embed_dim * (FP32 * stream + element * (rows.computed + 3 * rows.attended))


def _update_moment(
    config: FFVTConfig, batch_size: int, weights: int, optimizer: str, device: str
) -> tuple[int, int, int]:
    """In the optimiser: AdamW takes a root of every second moment and scales it; on CUDA in place, of all at once."""
    largest = max(_mlp_matrices(config) // 2, 3 * config.embed_dim**2, config.num_tokens * config.embed_dim) * FP32
    roots = weights if device == "cuda" else 2 * largest
    return _held_pixels(config, batch_size), weights, roots if optimizer == "adamw" else 0


def _held_pixels(config: FFVTConfig, batch_size: int) -> int:
    """The batch as it comes, uint8, and normalised, fp32: held through the whole step."""
    return batch_size * 3 * config.image_size**2 * (1 + FP32)


def _check(config: FFVTConfig, batch_size: int, precision: str, device: str) -> None:
    refuse_hybrid(config)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"plan: batch_size must be a positive integer; got batch_size={batch_size!r}")
    if precision not in BYTES:
        raise ValueError(f"plan: precision must be one of {', '.join(BYTES)}; got precision={precision!r}")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"plan: device must be cpu or cuda; got device={device!r}")
