"""The kinds of models that are trained, saved and loaded: ours by size, and timm's by name.

A kind is told by its model type (`timm:NAME`) before there is a model, by the type of its configuration, and by the
fields of config.json. Nothing else in the package has to know both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ffvt.errors import printable
from ffvt.model.config import FFVTConfig, make_config
from ffvt.model.config_files import read_fields
from ffvt.model.cost import count_flops, flops_per_image
from ffvt.model.ffvt import FFVT, from_config
from ffvt.model.hub import CONFIG_FILE, WEIGHTS_FILE, locate
from ffvt.model.timm_base import OfTimm
from ffvt.model.weight_files import check_header, existing_file, read_header
from ffvt.model.weights import LoadReport, load_own_weights

NAME = "load_pretrained"


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


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Any], last_block: str = "random") -> LoadReport:
    """Loads weights into a model of `ffvt.create_model`, or a fused one of timm, in place; on errors it is unchanged.

    Args:
        model: the model; also compiled, or wrapped in DistributedDataParallel.
        source: a file; a folder with model.safetensors, as `save_pretrained` and transformers write it; a name,
            "timm:NAME", "hf:ORG/NAME" or plain "ORG/NAME" (`ffvt.model.hub.locate`); or a mapping of names to arrays.
            Its layout is recognised by content. A model of ours takes many (`ffvt.model.weights.load_own_weights`); one
            of timm takes the layouts that timm reads for its architecture, and ours of such a model. Partial mappings
            are fine, the rest stays as it is. Positions of another size are interpolated. The head is loaded where its
            shape fits, else it stays. Values are cast to the parameters' dtype.
        last_block: "random" leaves the fusion block and the final norm as they are, as the authors do, unless the
            source has a fusion block of its own; "pretrained" takes both from the source's last block and norm.
            A model without feature fusion always takes them; a TransFG always takes the norm, as its authors do, and
            its part layer counts as the fusion block.

    Returns:
        LoadReport: loaded, resized, left, ignored, cast.

    Raises:
        FileNotFoundError: no such path, repository or file of a repository.
        ConnectionError: a name that is not in the Hub's cache, and the Hub cannot be reached; the message says what to
            download. ImportError: a name without huggingface_hub (or timm).
        TypeError: model is no such model.
        ValueError: an unreadable, truncated, unrecognised or pickled source, a size or shape that does not fit, or an
            unknown `last_block`. Pickles are never run, and only regular files are opened.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    model = model.module if isinstance(model, DistributedDataParallel) else model
    if not isinstance(model, OfTimm):
        return load_own_weights(model, source, last_block)
    from ffvt.model.timm_weights import load_timm_weights

    return load_timm_weights(model, source, last_block)


def load_pretrained(source: str | Path, **download: Any) -> nn.Module:
    """The model that `save_pretrained` wrote, of either kind, on the CPU and in evaluation mode: as config.json says.

    Args:
        source: its folder, for which the network is never used; or a repository of the Hugging Face Hub, "ORG/NAME".
        download: arguments of huggingface_hub.hf_hub_download (revision, token, cache_dir, ...).

    Returns:
        An `FFVT` or `ViT`; or a fused or plain timm ViT, where config.json has "timm".

    Raises:
        FileNotFoundError: no config.json or model.safetensors there, or no such repository.
        ConnectionError: the Hub cannot be reached, and its cache lacks the repository.
        ValueError: one of the files does not fit. Nothing is made before the shapes in the file fit the configuration.
        ImportError: it is a timm model, and timm is missing.
    """
    folder = locate(NAME, source, **download)
    fields = read_fields(NAME, folder)
    return _load_timm(folder, fields) if "timm" in fields else FFVT.from_pretrained(folder)


def _load_timm(folder: Path, fields: dict[str, Any]) -> nn.Module:
    from ffvt.model.timm_models import TimmConfig, make_timm_model, outline

    weights = existing_file(NAME, folder)
    shown = printable(repr(str(folder)))
    try:
        config = TimmConfig(**fields)
    except TypeError as error:
        raise ValueError(f"{NAME}: {CONFIG_FILE} of {shown} is no configuration: {printable(str(error))}") from error
    if (config.depth or 0) > len(read_header(NAME, weights)):  # before they are made, if only in outline
        raise ValueError(f"{NAME}: {WEIGHTS_FILE} of {shown} must hold {config.depth} blocks; got fewer tensors")
    check_header(NAME, weights, outline(config).state_dict(), config.timm)
    model = make_timm_model(config)
    model.load_state_dict(load_file(weights))
    return model.eval()


def image_statistics(model_type: str, weights: str = "") -> tuple[tuple[float, ...], ...]:
    """Mean and deviation per channel of the images that weights of timm were trained on, in [0, 1].

    Args:
        model_type: the model.
        weights: what it starts from; where that is a name of timm, its statistics come first.

    Returns:
        Nothing, (), where neither is a name of timm: the data set's hold.

    Raises:
        ValueError: timm knows no such model. ImportError: timm is missing.
    """
    names = [name.removeprefix("timm:") for name in (weights, model_type) if is_timm(name)]
    if not names:
        return ()
    from ffvt.model.timm_models import check_name

    name = names[0]
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
