"""The operands of the C++ kernels' products in bf16, which a run keeps, as they decide the rounding."""

from __future__ import annotations

import logging

from ffvt.kernels.backends import cpu_products, set_cpu_products
from ffvt.train.distributed import World

log = logging.getLogger("ffvt")


def products_of(precision: str, world: World) -> str | None:
    """The operands in use, "bf16" or "fp32"; None for a run without such products."""
    return cpu_products() if precision == "bf16" and world.device.type == "cpu" else None


def choose_products(precision: str, world: World) -> None:
    """Takes the operands that are faster here, whatever an earlier run in this process took, and those of the main rank
    on all ranks, all of which must call it."""
    if products_of(precision, world) is not None:
        set_cpu_products("auto")
    if world.size > 1:
        keep_products(world.gather(products_of(precision, world))[0], precision, world)


def keep_products(wanted: str | None, precision: str, world: World) -> None:
    """Takes these operands, of a checkpoint or of the main rank, or says that others are used. None: any."""
    if wanted is None or precision != "bf16" or world.device.type != "cpu":
        return
    if products_of(precision, world) not in (None, wanted):
        set_cpu_products(wanted)
    own = products_of(precision, world)
    if own is None:
        log.warning("the C++ kernels served before and do not now (`ffvt info` says why): results and masks differ")
    elif own != wanted:
        log.warning(
            "bf16 was multiplied with %s operands before and is now with %s (FFVT_CPU_PRODUCTS or the CPU): results "
            "differ by rounding",
            wanted,
            own,
        )
