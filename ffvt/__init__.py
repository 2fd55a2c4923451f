"""ffvt: Feature Fusion Vision Transformer (FFVT, BMVC 2021) with fused token-selecting attention.

Importing this package does not import torch; the first use of a name below does. As soon as torch is imported, before
or after this package, the operators are registered with it, as `torch.ops.ffvt`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ffvt.version import __version__ as __version__

if TYPE_CHECKING:
    from ffvt import criteria
    from ffvt.export import export_model
    from ffvt.inference import Classifier, load
    from ffvt.integrations.fusion import add_feature_fusion
    from ffvt.kernels import reference
    from ffvt.kernels.backends import info, use_backend
    from ffvt.kernels.decompositions import decompositions
    from ffvt.kernels.ops import (
        AttentionStats,
        attention_stats,
        attention_vecmat,
        gather_tokens,
        maws_attention,
        maws_attention_qkvpacked,
        maws_select,
    )
    from ffvt.model.config import FFVTConfig
    from ffvt.model.ffvt import FFVT, ViT, create_model
    from ffvt.model.layers import MAWSAttention
    from ffvt.model.registry import load_pretrained, load_weights
    from ffvt.model.selection import Selection
    from ffvt.model.timm_record import record_attention
    from ffvt.model.transfg import TransFG
    from ffvt.model.weights import LoadReport
    from ffvt.train.contrastive import contrastive_loss

__all__ = [
    "FFVT",
    "AttentionStats",
    "Classifier",
    "FFVTConfig",
    "LoadReport",
    "MAWSAttention",
    "Selection",
    "TransFG",
    "ViT",
    "add_feature_fusion",
    "attention_stats",
    "attention_vecmat",
    "contrastive_loss",
    "create_model",
    "criteria",
    "decompositions",
    "export_model",
    "gather_tokens",
    "info",
    "load",
    "load_pretrained",
    "load_weights",
    "maws_attention",
    "maws_attention_qkvpacked",
    "maws_select",
    "record_attention",
    "reference",
    "use_backend",
]

_PACKAGES = ("data", "integrations", "kernels", "model", "report", "train")
_HOMES = {  # module: the names that are defined there; a module that is public itself has no names
    "ffvt.inference": ("Classifier", "load"),
    "ffvt.export": ("export_model",),
    "ffvt.integrations.fusion": ("add_feature_fusion",),
    "ffvt.kernels.reference": (),
    "ffvt.kernels.backends": ("info", "use_backend"),
    "ffvt.kernels.decompositions": ("decompositions",),
    "ffvt.criteria": (),
    "ffvt.kernels.ops": (
        *("AttentionStats", "attention_stats", "attention_vecmat"),
        *("gather_tokens", "maws_attention", "maws_attention_qkvpacked", "maws_select"),
    ),
    "ffvt.model.config": ("FFVTConfig",),
    "ffvt.model.ffvt": ("FFVT", "ViT", "create_model"),
    "ffvt.model.registry": ("load_pretrained", "load_weights"),
    "ffvt.model.layers": ("MAWSAttention",),
    "ffvt.model.selection": ("Selection",),
    "ffvt.model.timm_record": ("record_attention",),
    "ffvt.model.transfg": ("TransFG",),
    "ffvt.model.weights": ("LoadReport",),
    "ffvt.train.contrastive": ("contrastive_loss",),
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
    if name in _PACKAGES:
        return import_module(f"ffvt.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _RegisterAfterTorch(MetaPathFinder):
    """Registers the operators as soon as torch is imported: who has it may load a graph that calls them."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = find_spec("torch")
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                import_module("ffvt.kernels.ops")

            spec.loader.exec_module = exec_module
        return spec


if "torch" in sys.modules:
    import_module("ffvt.kernels.ops")
else:
    sys.meta_path.insert(0, _RegisterAfterTorch())
