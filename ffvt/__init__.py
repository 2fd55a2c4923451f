"""ffvt: Feature Fusion Vision Transformer (FFVT, BMVC 2021) with fused token-selecting attention.

Importing this package does not import torch; the first use of a name below does. Where torch is there already, the
operators are registered with it at once, as `torch.ops.ffvt`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ffvt.version import __version__ as __version__

if TYPE_CHECKING:
    from ffvt.kernels import reference
    from ffvt.kernels.backends import info, use_backend
    from ffvt.kernels.ops import gather_tokens, maws_attention, maws_attention_qkvpacked, maws_select
    from ffvt.model.config import FFVTConfig
    from ffvt.model.ffvt import FFVT, ViT, create_model
    from ffvt.model.layers import MAWSAttention
    from ffvt.model.selection import Selection
    from ffvt.model.timm_adapter import add_feature_fusion
    from ffvt.model.weights import LoadReport, load_weights

__all__ = [
    "FFVT",
    "FFVTConfig",
    "LoadReport",
    "MAWSAttention",
    "Selection",
    "ViT",
    "add_feature_fusion",
    "create_model",
    "gather_tokens",
    "info",
    "load_weights",
    "maws_attention",
    "maws_attention_qkvpacked",
    "maws_select",
    "reference",
    "use_backend",
]

_HOMES = {  # module: the names that are defined there; a module that is public itself has no names
    "ffvt.kernels.reference": (),
    "ffvt.kernels.backends": ("info", "use_backend"),
    "ffvt.kernels.ops": ("gather_tokens", "maws_attention", "maws_attention_qkvpacked", "maws_select"),
    "ffvt.model.config": ("FFVTConfig",),
    "ffvt.model.ffvt": ("FFVT", "ViT", "create_model"),
    "ffvt.model.layers": ("MAWSAttention",),
    "ffvt.model.selection": ("Selection",),
    "ffvt.model.timm_adapter": ("add_feature_fusion",),
    "ffvt.model.weights": ("LoadReport", "load_weights"),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(home), name)
        elif not names and home.endswith(f".{name}"):
            value = import_module(home)
        else:
            continue
        globals()[name] = value  # so that this function is not asked again
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if "torch" in sys.modules:  # who has imported it may call torch.ops.ffvt, or load a graph that does
    import_module("ffvt.kernels.ops")
