"""ffvt: Feature Fusion Vision Transformer (FFVT, BMVC 2021) with fused token-selecting attention."""

from ffvt.kernels import reference
from ffvt.kernels.backends import info, use_backend
from ffvt.kernels.ops import gather_tokens, maws_attention, maws_attention_qkvpacked, maws_select
from ffvt.model.config import FFVTConfig
from ffvt.model.ffvt import FFVT, ViT, create_model
from ffvt.model.layers import MAWSAttention
from ffvt.model.selection import Selection
from ffvt.model.timm_adapter import add_feature_fusion
from ffvt.model.weights import LoadReport, load_weights
from ffvt.version import __version__ as __version__

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
