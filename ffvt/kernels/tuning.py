"""Block sizes of the Triton kernels, per GPU architecture, element size and head dimension: one literal table.

Every row says what chose it. A launch never searches: its configuration is a function of its arguments, so all
processes agree, and the ahead-of-time report compiles every row. The number of tokens plays no part in attention: a
new N compiles nothing where D is a multiple of 16 (selection: only from one power of two to the next).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton

# Rows of the masked steps that end a walk after the whole blocks, by element size; fp32 spills at 32.
TAIL = {2: 32, 4: 16}


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled and launched.

    Attributes:
        constants: The kernel's constexpr arguments that the table decides.
        options: Warps and stages.
        tile: Patch tokens per program; 0 for a kernel whose grid does not go by tiles of patches.
    """

    constants: dict[str, int]
    options: dict[str, int]
    tile: int = 0

    def grid(self, num_tokens: int, num_heads: int) -> tuple[int]:
        """Programs for that many heads of all images: the tiles of patches of each, and one for its class token."""
        return ((triton.cdiv(num_tokens - 1, self.tile) + 1) * num_heads,)


class Tiling(NamedTuple):
    """One row of a table: for which GPUs and inputs it holds, the choice, and its reason.

    Attributes:
        architectures: The GPUs that it holds for, separated by blanks; ANY for all.
        element_size: Bytes per element.
        head_dim: The largest head dimension that it holds for.
        block_m: Queries of a tile.
        block_n: Keys of a tile.
        warps: Warps per program.
        stages: Loads in flight.
        reason: What chose the row.
    """

    architectures: str
    element_size: int
    head_dim: int
    block_m: int
    block_n: int
    warps: int
    stages: int
    reason: str


# The reasons name the report of the compiler (results/static-triton-*.json: registers, spills, programs per
# multiprocessor) or a count of bytes. None is a timing yet: no row has been measured on a GPU.
L2 = "128 queries a program: at 64 the keys and values would come out of L2 at 26 bytes a clock per multiprocessor"
FITS = "largest tile of those tried (16x64 to 128x64) without a spill, two programs a multiprocessor if any"
SCALAR = "fp32 runs on scalar units: larger tiles spill"
L2_QUERIES = "128 keys a program: at 64 the queries would come out of L2 at D / 2 bytes a clock per multiprocessor"
WARPS = "no fewer warps a multiprocessor than at 64x128, which spills on gfx942"
TILES = "the interpreter's time goes by the number of tiles"

ANY = "any"

# fmt: off
TABLES = {
    "forward": (
        #      architectures     bytes    D  BLOCK_M  BLOCK_N  warps  stages  reason
        Tiling("interpreter",       4, 128,      64,      64,     4,      1, TILES),
        Tiling("sm_90 sm_100",      2,  64,     128,      64,     8,      3, L2),
        Tiling("sm_90 sm_100",      2,  96,      64,      64,     4,      2, FITS),
        Tiling("sm_90 sm_100",      2, 128,     128,      64,     8,      2, L2),
        Tiling("gfx942",            2, 128,      64,      64,     4,      2, FITS),
        Tiling(ANY,                 2,  64,      64,      64,     4,      3, FITS),
        Tiling(ANY,                 2,  96,      64,      64,     4,      2, FITS),
        Tiling("sm_80",             2, 128,      64,      64,     4,      2, FITS),
        Tiling(ANY,                 2, 128,     128,      64,     8,      2, FITS),
        Tiling(ANY,                 4,  64,      32,      32,     8,      1, SCALAR),
        Tiling("gfx942",            4, 128,      32,      32,     4,      1, SCALAR),
        Tiling(ANY,                 4, 128,      32,      32,     8,      1, SCALAR),
    ),
    "query_gradient": (
        Tiling("interpreter",       4, 128,      64,      64,     4,      1, TILES),
        Tiling("sm_90 sm_100",      2,  64,     128,      64,     8,      2, L2),
        Tiling("sm_90 sm_100",      2,  96,      64,      64,     4,      2, FITS),
        Tiling("sm_90 sm_100",      2, 128,     128,      64,     8,      2, L2),
        Tiling(ANY,                 2,  64,      64,      64,     4,      2, FITS),
        Tiling(ANY,                 2,  96,      64,      32,     4,      2, FITS),
        Tiling("gfx942",            2, 128,      64,      64,     4,      1, FITS),
        Tiling(ANY,                 2, 128,      64,      64,     8,      2, FITS),
        Tiling(ANY,                 4,  64,      32,      32,     4,      1, SCALAR),
        Tiling("gfx942",            4, 128,      32,      32,     4,      1, SCALAR),
        Tiling(ANY,                 4, 128,      32,      32,     8,      1, SCALAR),
    ),
    "key_gradient": (
        Tiling("interpreter",       4, 128,      64,      64,     4,      1, TILES),
        Tiling(ANY,                 2,  64,      64,      64,     4,      2, FITS),
        Tiling("sm_80",             2,  96,      32,      64,     8,      2, FITS),
        Tiling("sm_86 sm_89",       2,  80,      32,      64,     8,      2, FITS),
        Tiling("sm_86 sm_89",       2,  96,      16,      64,     8,      2, FITS),
        Tiling(ANY,                 2,  96,      32,      64,     4,      2, FITS),
        Tiling("gfx942",            2, 128,      64,      64,     4,      1, FITS),
        Tiling(ANY,                 2, 128,      64,      64,     8,      2, FITS),
        Tiling("sm_80 sm_86 sm_89", 4,  32,      32,      32,     8,      1, SCALAR),
        Tiling("sm_80 sm_86 sm_89", 4,  64,      32,      16,     4,      1, SCALAR),
        Tiling(ANY,                 4,  64,      32,      32,     4,      1, SCALAR),
        Tiling("gfx942",            4, 128,      32,      32,     4,      1, SCALAR),
        Tiling(ANY,                 4, 128,      32,      32,     8,      1, SCALAR),
    ),
    "vecmat": (
        Tiling("interpreter",       4, 128,      64,      64,     4,      1, TILES),
        Tiling("sm_90 sm_100",      2, 128,      64,     128,     8,      2, L2_QUERIES),
        Tiling(ANY,                 2, 128,      64,      64,     4,      2, WARPS),
        Tiling("sm_80 sm_86 sm_89", 4,  64,      32,      32,     4,      1, SCALAR),
        Tiling("sm_80 sm_86 sm_89", 4,  96,      32,      16,     4,      1, SCALAR),
        Tiling("sm_100",            4, 128,      32,      32,     8,      1, SCALAR),
        Tiling(ANY,                 4, 128,      32,      32,     4,      1, SCALAR),
    ),
}
# the forward kernel without values
TABLES["log_sum_exp"] = (Tiling("sm_90", 4, 96, 32, 32, 4, 1, SCALAR), *TABLES["forward"])
KEYS_OWNED = ("key_gradient", "vecmat")  # whose programs own keys; those of the others own queries
# fmt: on


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


def attention_config(kernel: str, arch: str, element_size: int, head_dim: int) -> Config:
    """The configuration of a kernel of `TABLES` for elements of that many bytes."""
    return tiling_config(kernel, find_tiling(kernel, arch, element_size, head_dim))


@contextmanager
def override(kernel: str, tiling: Tiling) -> Iterator[None]:
    """Inside, `tiling` alone is the table of the kernel: for tests and for measuring one row against another."""
    saved = TABLES[kernel]
    TABLES[kernel] = (tiling,)
    try:
        yield
    finally:
        TABLES[kernel] = saved


def find_tiling(kernel: str, arch: str, element_size: int, head_dim: int) -> Tiling:
    """The first row of the kernel's table that holds."""
    for tiling in TABLES[kernel]:
        served = tiling.architectures == ANY or arch in tiling.architectures.split()
        if served and tiling.element_size == element_size and head_dim <= tiling.head_dim:
            return tiling
    raise AssertionError(f"tuning: no row for {kernel}, {arch}, {element_size} bytes, D={head_dim}")


@cache
def tiling_config(kernel: str, tiling: Tiling) -> Config:
    """The configuration of a row of a kernel's table."""
    constants = {"BLOCK_M": tiling.block_m, "BLOCK_N": tiling.block_n, "TAIL": TAIL[tiling.element_size]}
    options = {"num_warps": tiling.warps, "num_stages": tiling.stages}
    return Config(constants, options, tiling.block_n if kernel in KEYS_OWNED else tiling.block_m)


# Padded number of tokens: heads at a time, warps.
SELECT = {512: (2, 4), 1024: (2, 8), 2048: (1, 8), 4096: (1, 16), 8192: (1, 32)}
MAX_TOKENS = max(SELECT)


@cache
def select_config(arch: str, num_tokens: int, num_select: int) -> Config:
    """One program per image holds all its scores and as many heads' logits as registers allow."""
    block = max(16, triton.next_power_of_2(num_tokens))
    heads, warps = SELECT[max(512, block)]
    if arch.startswith("gfx"):
        warps = min(warps, 16)  # of 64 threads
    top = min(block, max(2, triton.next_power_of_2(num_select)))
    return Config({"HEADS": heads, "BLOCK": block, "TOP": top}, {"num_warps": warps})


@cache
def lines_config(num_tokens: int) -> Config:
    """One program per head holds both lines of its class token, 8 elements of each a thread; 16 past 4,096 tokens."""
    block = max(16, triton.next_power_of_2(num_tokens))
    return Config({"BLOCK": block}, {"num_warps": min(16, max(1, block // 256))})


CLASS_LOGITS = Config({"BLOCK": 64}, {"num_warps": 4})
GATHER = Config({"COLUMNS": 1024}, {"num_warps": 4})
SCATTER = Config({"ROWS": 8, "COLUMNS": 256}, {"num_warps": 4})
