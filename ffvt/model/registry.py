"""The kinds of models that are trained, saved and loaded: ours by size, and timm's by name.

A kind is told by its model type (`timm:NAME`) before there is a model, by the type of its configuration, and by the
fields of config.json. Nothing else in the package has to know both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ffvt.errors import printable
from ffvt.model.config import FFVTConfig, make_config
from ffvt.model.cost import count_flops, flops_per_image
from ffvt.model.ffvt import FFVT, from_config
from ffvt.model.hub import CONFIG_FILE, WEIGHTS_FILE
from ffvt.model.weights import LoadReport, load_weights

MAX_CONFIG = 1 << 20  # bytes of a config.json


def is_timm(model_type: str) -> bool:
    """Whether a model type names a model of timm."""
    return model_type.startswith("timm:")


def config_of(model_type: str, **fields: Any) -> Any:
    """The configuration of a model type, with fields replaced: an `FFVTConfig`, or a `TimmConfig` for "timm:NAME".

    Raises:
        ValueError: an unknown name or field, or a value that does not hold. ImportError: timm is needed and missing.
    """
    if not is_timm(model_type):
        return make_config(model_type, **fields)
    from ffvt.model.timm_models import timm_config

    return timm_config(model_type.removeprefix("timm:"), **fields)


def model_of(config: Any) -> nn.Module:
    """A new model of a configuration, with initial weights."""
    if isinstance(config, FFVTConfig):
        return from_config(config)
    from ffvt.model.timm_models import make_timm_model

    return make_timm_model(config)


def load_any_weights(
    model: nn.Module, source: str | Path | Mapping[str, Any], last_block: str = "random"
) -> LoadReport:
    """`ffvt.load_weights` for a model of either kind."""
    if isinstance(model.config, FFVTConfig):
        return load_weights(model, source, last_block)
    from ffvt.model.timm_weights import load_timm_weights

    return load_timm_weights(model, source, last_block)


def load_pretrained(folder: str | Path) -> nn.Module:
    """The model that `save_pretrained` wrote, of either kind, on the CPU: as config.json says. Never uses the network.

    A model of timm comes in evaluation mode.

    Returns:
        An `FFVT` or `ViT`; or a fused or plain timm ViT, where config.json has "timm".

    Raises:
        FileNotFoundError: no config.json or model.safetensors there.
        ValueError: one of them does not fit. Nothing is made before the shapes in the file fit the configuration.
        ImportError: it is a timm model, and timm is missing.
    """
    folder = Path(folder)
    fields = _read_fields(folder / CONFIG_FILE)
    return _load_timm(folder, fields) if "timm" in fields else FFVT.from_pretrained(folder)


def _load_timm(folder: Path, fields: dict[str, Any]) -> nn.Module:
    from ffvt.model.timm_models import TimmConfig, make_timm_model, outline

    weights = folder / WEIGHTS_FILE
    try:
        config = TimmConfig(**fields)
    except TypeError as error:
        raise ValueError(f"load_pretrained: {folder / CONFIG_FILE} is no configuration: {error}") from error
    if not weights.exists():
        raise FileNotFoundError(f"load_pretrained: folder must have {WEIGHTS_FILE}; got {str(folder)!r}")
    given = _shapes(weights)
    blocks = config.depth or 0
    wrong = [f"{blocks} blocks"] if blocks > len(given) else []  # before they are made, if only in outline
    if not wrong:
        expected = {name: tuple(tensor.shape) for name, tensor in outline(config).state_dict().items()}
        wrong = [name for name in expected | given if expected.get(name) != given.get(name)]
    if wrong:
        shown = printable(", ".join(wrong[:3]))
        raise ValueError(f"load_pretrained: {weights} must hold the weights of {config.timm}; it differs in {shown}")
    model = make_timm_model(config)
    model.load_state_dict(load_file(weights))
    return model.eval()


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a safetensors file, whose numbers must be floating-point, without reading them."""
    try:
        with safe_open(weights, "pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            kinds = {part.get_dtype() for part in parts.values()}
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
    except Exception as error:
        raise ValueError(f"load_pretrained: {weights} must be a safetensors file: {printable(str(error))}") from error
    if not kinds <= {"F64", "F32", "F16", "BF16"}:
        found = printable(", ".join(sorted(kinds)))
        raise ValueError(f"load_pretrained: {weights} must hold floating-point numbers; got {found}")
    return shapes


def _read_fields(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise FileNotFoundError(f"load_pretrained: folder must have {CONFIG_FILE}; got {str(path.parent)!r}")
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG + 1)
        if len(text) > MAX_CONFIG:
            raise ValueError(f"it has more than {MAX_CONFIG} bytes")
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"load_pretrained: {path} must be a model's configuration: {printable(str(error))}") from error
    return fields


def image_statistics(model_type: str) -> tuple[tuple[float, ...], ...]:
    """Mean and deviation per channel of the images that a timm model's weights were trained on, in [0, 1]; nothing, (),
    for a model of ours, which goes by its data set's.

    Raises:
        ValueError: timm knows no such model. ImportError: timm is missing.
    """
    if not is_timm(model_type):
        return ()
    from ffvt.model.timm_models import check_name

    name = model_type.removeprefix("timm:")
    check_name(name)
    from timm.models import get_pretrained_cfg

    facts = get_pretrained_cfg(name)
    return tuple(facts.mean), tuple(facts.std)


def training_flops(model: nn.Module) -> float:
    """Operations of one image's training, nothing computed twice; NaN for the hybrid, which is not counted.

    Of ours by formula. Of timm's three times those of the forward, which PyTorch counts; the patch embedding, whose
    input needs no gradient, makes that a little too much.
    """
    config = model.config
    if not isinstance(config, FFVTConfig):
        from ffvt.model.timm_models import outline

        return 3 * count_flops(outline(config), config.image_size)
    return float("nan") if config.backbone else flops_per_image(config, training=True)
