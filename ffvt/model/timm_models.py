"""timm's ViTs by name: what is written of one in config.json, and how it is made, as FFVT or as it is."""

from __future__ import annotations

import functools
import math
import re
import warnings
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from ffvt.criteria import find
from ffvt.errors import printable, require
from ffvt.model.config import as_declared
from ffvt.model.timm_adapter import add_feature_fusion
from ffvt.model.timm_base import EXTRA, OfTimm, TimmViT, check_is_vit

MODULES = ("vision_transformer", "deit", "eva", "vision_transformer_hybrid")  # of timm
SIZES = ("image_size", "num_classes", "num_select")
OWN_SIZES = ("embed_dim", "depth", "num_heads", "mlp_dim", "patch_size")  # None for what the name says
LARGEST, DEEPEST = 1 << 16, 1024  # sizes beyond these come from a damaged file


@dataclass(frozen=True)
class TimmConfig:
    """A timm ViT by name, and what FFVT adds to it. The attributes named as those of `FFVTConfig` mean the same.

    Attributes:
        timm: name of the model as timm lists it, with or without the tag of its weights.
        image_size: side of the square input image, pixels.
        dropout: rate after the embeddings and after the projections of attention and MLP (timm's pos_drop_rate and
            proj_drop_rate).
        keep_rate: 1 without feature fusion, where every token stays.
        embed_dim, depth, num_heads, mlp_dim, patch_size: replace the named model's own value; None keeps it.
    """

    timm: str
    image_size: int
    num_classes: int = 200
    num_select: int = 12
    feature_fusion: bool = True
    first_candidate: int = 0
    dropout: float = 0.0
    gradient_checkpointing: bool = False
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    mlp_dim: int | None = None
    patch_size: int | None = None
    criterion: str = "maws"
    keep_rate: float = 1.0
    locations: tuple[int, ...] = (3, 6, 9)

    def __post_init__(self) -> None:
        self._check("timm", isinstance(self.timm, str), "a timm model's name")
        for name in (*SIZES, *OWN_SIZES):
            value, largest = getattr(self, name), DEEPEST if name == "depth" else LARGEST
            holds = _is_integer(value) and 1 <= value <= largest
            self._check(name, holds or (value is None and name in OWN_SIZES), f"an integer in [1, {largest}]")
        self._check("first_candidate", _is_integer(self.first_candidate), "an integer")
        for name in ("feature_fusion", "gradient_checkpointing"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")
        rate = self.dropout
        is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool) and math.isfinite(rate)
        self._check("dropout", is_number and 0 <= rate < 1, "in [0, 1)")
        for name in ("criterion", "keep_rate", "locations"):
            object.__setattr__(self, name, as_declared("TimmConfig", name, getattr(self, name)))
        find(self.criterion)
        self._check("keep_rate", self.feature_fusion or self.keep_rate == 1, "1 without feature fusion")

    def _check(self, name: str, holds: bool, must: str) -> None:
        require(holds, "TimmConfig", name, must, getattr(self, name))

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return outline(self).vit.patch_embed.grid_size[0]

    @property
    def num_prefix_tokens(self) -> int:
        """P, tokens before the patches: the class token, a distillation token, registers."""
        return outline(self).num_prefix_tokens

    @property
    def num_tokens(self) -> int:
        """N, the prefix and the patches."""
        return self.num_prefix_tokens + self.grid_size**2


@functools.lru_cache(maxsize=4)
def outline(config: TimmConfig) -> OfTimm:
    """The model of a configuration without memory for its weights (on the meta device), for its shapes."""
    with torch.device("meta"):
        return make_timm_model(config).requires_grad_(False)


def make_timm_model(config: TimmConfig) -> OfTimm:
    """The model that a configuration names, with initial weights: a `FeatureFusion`, or the plain `TimmViT`.

    The network is never used.

    Raises:
        ValueError: timm has no such ViT, it cannot have these sizes, or it is of a kind that `add_feature_fusion`
            refuses.
        ImportError: timm is missing.
    """
    vit = _make_vit(config)
    (rows, columns), patch = vit.patch_embed.grid_size, vit.patch_embed.feat_ratio()
    whole = rows == columns and rows * patch == config.image_size
    require(whole, "timm", "image_size", f"a multiple of the patch of {config.timm}, {patch}", config.image_size)
    if not config.feature_fusion:
        model: OfTimm = TimmViT(vit)
    else:
        selection = (config.criterion, config.keep_rate, config.locations)
        model = add_feature_fusion(vit, config.num_select, config.num_classes, config.first_candidate, *selection)
    model.config = config
    model.set_grad_checkpointing(config.gradient_checkpointing)
    return model


def _make_vit(config: TimmConfig) -> nn.Module:
    check_name(config.timm)
    import timm

    sizes = {name: getattr(config, name) for name in OWN_SIZES if getattr(config, name) is not None}
    hidden = sizes.pop("mlp_dim", None)
    if hidden is not None:
        require(config.embed_dim is not None, "timm", "mlp_dim", "given together with embed_dim", hidden)
        sizes["mlp_ratio"] = hidden / config.embed_dim
    if config.dropout:
        sizes |= {"pos_drop_rate": config.dropout, "proj_drop_rate": config.dropout}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of initial weights without memory
            vit = timm.create_model(
                config.timm, pretrained=False, img_size=config.image_size, num_classes=config.num_classes, **sizes
            )
    except Exception as error:  # of any of timm's many constructors: one kind goes out, with the cause in it
        raise ValueError(
            f"timm: {config.timm} must be makeable with image_size={config.image_size} and {sizes}; got "
            f"{type(error).__name__}: {printable(str(error))}"
        ) from error
    check_is_vit("timm", config.timm, vit)
    return vit


@functools.cache
def _known_names() -> frozenset[str]:
    """timm's models of the modules that are served."""
    try:
        import timm
    except ImportError as error:
        raise ImportError(f"timm's models need timm: {EXTRA}") from error
    return frozenset(name for module in MODULES for name in timm.list_models(module=module))


def check_name(name: str) -> None:
    """Refuses what is no timm ViT's name, with near ones; addresses of other places among them.

    Raises:
        ValueError: timm knows no such ViT, or no such weights of it. ImportError: timm is missing.
    """
    known = _known_names()
    from timm import list_pretrained

    model, _, tag = name.partition(".")
    is_name = re.fullmatch(r"[a-z0-9_]+(\.\w+)*", name) is not None
    if is_name and model in known and (not tag or name in list_pretrained(f"{model}.*")):
        return
    choices = list_pretrained(f"{model}.*") if is_name and model in known else known
    near = get_close_matches(name, choices, 3, cutoff=0.4)
    hint = f" (near: {', '.join(near)})" if near else ""
    raise ValueError(f"timm: the model must be one of timm's plain ViTs; got {printable(repr(name))}{hint}")


def timm_config(name: str, **given: Any) -> TimmConfig:
    """The configuration of timm's model `name`, as `ffvt.model.config.make_config` makes those of ours.

    A first_candidate of 1 or more leaves out all tokens that are no patch (class token, distillation token,
    registers), whatever their number; 0 leaves out none, as the authors.

    Raises:
        ValueError: an unknown name or field, or a value that does not hold.
    """
    for field in ("head", "patch_stride"):
        require(field not in given, "create_model", field, "left out with a model of timm", given.get(field))
    unknown = sorted(set(given) - {declared.name for declared in fields(TimmConfig)})
    require(not unknown, "create_model", "overrides", "fields of TimmConfig", unknown)
    check_name(name)
    config = TimmConfig(timm=name, **given)
    if config.feature_fusion and 1 <= config.first_candidate < config.num_prefix_tokens:
        return TimmConfig(timm=name, **{**given, "first_candidate": config.num_prefix_tokens})
    return config


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
