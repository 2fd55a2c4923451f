"""The operands of the C++ kernels' products in bf16, which a run keeps, as they decide the rounding."""

from __future__ import annotations

import logging

from ffvt.kernels.backends import cpu_products, set_cpu_products
from ffvt.train.distributed import World

log = logging.getLogger("ffvt")


def products_of(precision: str, world: World) -> str | None:
    """ "bf16" or "fp32"; None for a run without such products."""
    return cpu_products() if precision == "bf16" and world.device.type == "cpu" else None


def agree_on_products(precision: str, world: World) -> None:
    """Has all ranks take the operands of the main one, which a timing has chosen. All ranks must call it."""
    if world.size > 1:
        keep_products(world.gather(products_of(precision, world))[0], precision, world)


def keep_products(wanted: str | None, precision: str, world: World) -> None:
    """Takes these operands, of a checkpoint or of the main rank, or says that others are used. None: any."""
    own = products_of(precision, world)
    if wanted is None or own is None or wanted == own:
        return
    set_cpu_products(wanted)
    if products_of(precision, world) != wanted:
        log.warning(
            "bf16 was multiplied with %s operands before and is now with %s (FFVT_CPU_PRODUCTS or the CPU): results "
            "differ by rounding",
            wanted,
            own,
        )
