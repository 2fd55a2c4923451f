"""The precisions of training and inference by name: bytes, dtypes, autocast. The names alone do not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
PRECISIONS = tuple(TORCH_NAMES)
AUTO = "auto"  # in the place of one: what trains fastest on the machine, see rates.py
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}  # of an element computed under autocast


def dtype_of(precision: str) -> torch.dtype:
    """The dtype that a precision computes in."""
    import torch

    return getattr(torch, TORCH_NAMES[precision])


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """torch.autocast in bf16 or fp16; nothing for fp32."""
    import torch

    with torch.autocast(device.type, dtype=dtype_of(precision), enabled=precision != "fp32"):
        yield
