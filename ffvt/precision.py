"""The precisions of training and inference by name: dtypes, bytes, autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = tuple(DTYPES)
BYTES = {name: dtype.itemsize for name, dtype in DTYPES.items()}  # of an element computed under autocast


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """torch.autocast in bf16 or fp16; nothing for fp32."""
    with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32"):
        yield
