"""ffvt inside other libraries. `ffvt.integrations.transformers` needs transformers and is imported when it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "transformers":
        return import_module(f"{__name__}.transformers")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
