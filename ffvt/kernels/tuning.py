"""Block sizes of the Triton kernels, per GPU architecture, element size and head dimension: one literal table.

Every row says what chose it. A launch never searches: its configuration is a function of its arguments, so all processes
agree, and `shipped` can list every configuration for the ahead-of-time report. The number of tokens decides only how
the last few keys or queries are walked (TAIL, two values), so a new N compiles at most once more.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton

NARROW = 16  # width of a narrow tail; the least that the matrix units take
ANY = ()


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled and launched: constexprs, warps and stages, tokens per program, the class split."""

    constants: dict[str, int | bool]
    options: dict[str, int]
    tile: int

    def grid(self, tokens: int, heads: int) -> tuple[int]:
        """Programs for `heads` = B * H heads: the tiles of each, and one for its class token where that is split off."""
        split = self.constants.get("CLASS_SPLIT", False)
        return ((triton.cdiv(tokens - split, self.tile) + split) * heads,)


class Row(NamedTuple):
    """Architectures (ANY: all), bytes per element, largest head dimension that it serves; the choice; its reason."""

    architectures: tuple[str, ...]
    element_size: int
    head_dim: int
    class_split: bool
    block_q: int
    block_k: int
    warps: int
    stages: int
    reason: str


FORWARD = (
    Row(ANY, 2, 64, True, 64, 64, 4, 2, ""),
    Row(ANY, 2, 128, True, 64, 64, 4, 2, ""),
    Row(ANY, 4, 64, True, 32, 32, 4, 1, ""),
    Row(ANY, 4, 128, True, 32, 32, 4, 1, ""),
)
QUERY_GRADIENT = FORWARD
KEY_GRADIENT = FORWARD
TABLES = {"forward": FORWARD, "query_gradient": QUERY_GRADIENT, "key_gradient": KEY_GRADIENT}


def architecture(device: torch.device) -> str:
    """"sm_90", "gfx942", or "interpreter" for a CPU tensor."""
    if device.type == "cpu":
        return "interpreter"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def attention(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, tokens: int) -> Config:
    """The configuration of "forward", "query_gradient" or "key_gradient"."""
    row = find(kernel, architecture(device), dtype.itemsize, head_dim)
    walked = row.block_q if kernel == "key_gradient" else row.block_k
    rest = (tokens - row.class_split) % walked
    return configure(kernel, row, NARROW if rest <= 2 * NARROW else walked)


def find(kernel: str, arch: str, element_size: int, head_dim: int) -> Row:
    """The first row of the kernel's table that holds."""
    for row in TABLES[kernel]:
        if arch in (row.architectures or (arch,)) and row.element_size == element_size and head_dim <= row.head_dim:
            return row
    raise AssertionError(f"tuning: no row for {kernel}, {arch}, {element_size} bytes, D={head_dim}")


@cache
def configure(kernel: str, row: Row, tail: int) -> Config:
    """The configuration of a row with one of its two tails."""
    blocks = {"CLASS_SPLIT": row.class_split, "BLOCK_Q": row.block_q, "BLOCK_K": row.block_k, "TAIL": tail}
    options = {"num_warps": row.warps, "num_stages": row.stages}
    return Config(blocks, options, row.block_k if kernel == "key_gradient" else row.block_q)


def class_logits() -> Config:
    return Config({"BLOCK": 64}, {"num_warps": 4}, 64)


@cache
def select(tokens: int, num_select: int) -> Config:
    """One program per image: all scores in registers, as many heads at a time as keep a line of logits at 4,096."""
    block = max(16, triton.next_power_of_2(tokens))
    heads = max(1, 4096 // block)
    top = min(block, max(2, triton.next_power_of_2(num_select)))
    constants = {"HEADS": min(4, heads), "BLOCK": block, "TOP": top}
    return Config(constants, {"num_warps": 4 if block <= 512 else 8 if block <= 4096 else 16}, 1)


def gather() -> Config:
    return Config({"COLUMNS": 1024}, {"num_warps": 4}, 1)


def scatter() -> Config:
    return Config({"ROWS": 8, "COLUMNS": 256}, {"num_warps": 4}, 8)
