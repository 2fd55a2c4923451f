"""Block sizes of the Triton kernels, per GPU architecture, element size and head dimension: one literal table.

Every row says what chose it. A launch never searches: its configuration is a function of its arguments, so all
processes agree, and the ahead-of-time report compiles every row. The number of tokens plays no part in attention: a
new N or K compiles nothing (selection: only from one power of two to the next).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton

TAIL = {
    2: 32,
    4: 16,
}  # rows of the masked steps that end a walk after the whole blocks, by element size; fp32 spills at 32
ANY = ()


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled and launched: constexprs, warps and stages, tokens per program, the class split."""

    constants: dict[str, int | bool]
    options: dict[str, int]
    tile: int

    def grid(self, tokens: int, heads: int) -> tuple[int]:
        """Programs for `heads` = B * H heads: the tiles of each, and one for a class token that is split off."""
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


# The reasons name the report of the compiler (results/static-triton-*.json: registers, spills, programs per
# multiprocessor) or a count of bytes. None is a timing yet: no row has been measured on a GPU.
L2 = "128 queries a program: at 64 the keys and values would come out of L2 at 26 bytes a clock per multiprocessor"
FITS = "largest tile of those tried (16x64 to 128x64) without a spill, two programs a multiprocessor if any"
SCALAR = "fp32 runs on scalar units: larger tiles spill"
TILES = "the interpreter's time goes by the number of tiles"

FORWARD = (
    Row(("interpreter",), 4, 128, True, 64, 64, 4, 1, TILES),
    Row(("sm_90", "sm_100"), 2, 64, True, 128, 64, 8, 3, L2),
    Row(("sm_90", "sm_100"), 2, 96, True, 64, 64, 4, 2, FITS),
    Row(("sm_90", "sm_100"), 2, 128, True, 128, 64, 8, 2, L2),
    Row(("gfx942",), 2, 128, True, 64, 64, 4, 2, FITS),
    Row(ANY, 2, 64, True, 64, 64, 4, 3, FITS),
    Row(ANY, 2, 96, True, 64, 64, 4, 2, FITS),
    Row(("sm_80",), 2, 128, True, 64, 64, 4, 2, FITS),
    Row(ANY, 2, 128, True, 128, 64, 8, 2, FITS),
    Row(ANY, 4, 64, True, 32, 32, 8, 1, SCALAR),
    Row(("gfx942",), 4, 128, True, 32, 32, 4, 1, SCALAR),
    Row(ANY, 4, 128, True, 32, 32, 8, 1, SCALAR),
)
QUERY_GRADIENT = (
    Row(("interpreter",), 4, 128, True, 64, 64, 4, 1, TILES),
    Row(("sm_90", "sm_100"), 2, 64, True, 128, 64, 8, 2, L2),
    Row(("sm_90", "sm_100"), 2, 96, True, 64, 64, 4, 2, FITS),
    Row(("sm_90", "sm_100"), 2, 128, True, 128, 64, 8, 2, L2),
    Row(ANY, 2, 64, True, 64, 64, 4, 2, FITS),
    Row(ANY, 2, 96, True, 64, 32, 4, 2, FITS),
    Row(("gfx942",), 2, 128, True, 64, 64, 4, 1, FITS),
    Row(ANY, 2, 128, True, 64, 64, 8, 2, FITS),
    Row(ANY, 4, 64, True, 32, 32, 4, 1, SCALAR),
    Row(("gfx942",), 4, 128, True, 32, 32, 4, 1, SCALAR),
    Row(ANY, 4, 128, True, 32, 32, 8, 1, SCALAR),
)
KEY_GRADIENT = (
    Row(("interpreter",), 4, 128, True, 64, 64, 4, 1, TILES),
    Row(ANY, 2, 64, True, 64, 64, 4, 2, FITS),
    Row(("sm_80",), 2, 96, True, 32, 64, 8, 2, FITS),
    Row(("sm_86", "sm_89"), 2, 80, True, 32, 64, 8, 2, FITS),
    Row(("sm_86", "sm_89"), 2, 96, True, 16, 64, 8, 2, FITS),
    Row(ANY, 2, 96, True, 32, 64, 4, 2, FITS),
    Row(("gfx942",), 2, 128, True, 64, 64, 4, 1, FITS),
    Row(ANY, 2, 128, True, 64, 64, 8, 2, FITS),
    Row(("sm_80", "sm_86", "sm_89"), 4, 32, True, 32, 32, 8, 1, SCALAR),
    Row(("sm_80", "sm_86", "sm_89"), 4, 64, True, 32, 16, 4, 1, SCALAR),
    Row(ANY, 4, 64, True, 32, 32, 4, 1, SCALAR),
    Row(("gfx942",), 4, 128, True, 32, 32, 4, 1, SCALAR),
    Row(ANY, 4, 128, True, 32, 32, 8, 1, SCALAR),
)
TABLES = {"forward": FORWARD, "query_gradient": QUERY_GRADIENT, "key_gradient": KEY_GRADIENT}


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", or "interpreter" for a CPU tensor."""
    if device.type == "cpu":
        return "interpreter"
    return _architecture(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def attention(kernel: str, arch: str, element_size: int, head_dim: int) -> Config:
    """The configuration of "forward", "query_gradient" or "key_gradient" for elements of that many bytes."""
    return configure(kernel, find(kernel, arch, element_size, head_dim))


@contextmanager
def override(kernel: str, row: Row) -> Iterator[None]:
    """Inside, `row` alone is the table of the kernel: for tests and for measuring one row against another."""
    saved = TABLES[kernel]
    TABLES[kernel] = (row,)
    try:
        yield
    finally:
        TABLES[kernel] = saved


def find(kernel: str, arch: str, element_size: int, head_dim: int) -> Row:
    """The first row of the kernel's table that holds."""
    for row in TABLES[kernel]:
        if arch in (row.architectures or (arch,)) and row.element_size == element_size and head_dim <= row.head_dim:
            return row
    raise AssertionError(f"tuning: no row for {kernel}, {arch}, {element_size} bytes, D={head_dim}")


@cache
def configure(kernel: str, row: Row) -> Config:
    """The configuration of a row."""
    blocks = {
        "CLASS_SPLIT": row.class_split,
        "BLOCK_Q": row.block_q,
        "BLOCK_K": row.block_k,
        "TAIL": TAIL[row.element_size],
    }
    options = {"num_warps": row.warps, "num_stages": row.stages}
    return Config(blocks, options, row.block_k if kernel == "key_gradient" else row.block_q)


def class_logits() -> Config:
    return Config({"BLOCK": 64}, {"num_warps": 4}, 64)


SELECT = {  # block of tokens: heads at a time, warps
    512: (2, 4),
    1024: (2, 8),
    2048: (1, 8),
    4096: (1, 16),
    8192: (1, 32),
}
MAX_TOKENS = max(SELECT)


@cache
def select(arch: str, tokens: int, num_select: int) -> Config:
    """One program per image holds all its scores and as many heads' logits as registers allow."""
    block = max(16, triton.next_power_of_2(tokens))
    heads, warps = SELECT[max(512, block)]
    if arch.startswith("gfx"):
        warps = min(warps, 16)  # of 64 threads
    top = min(block, max(2, triton.next_power_of_2(num_select)))
    return Config({"HEADS": heads, "BLOCK": block, "TOP": top}, {"num_warps": warps}, 1)


def gather() -> Config:
    return Config({"COLUMNS": 1024}, {"num_warps": 4}, 1)


def scatter() -> Config:
    return Config({"ROWS": 8, "COLUMNS": 256}, {"num_warps": 4}, 8)
