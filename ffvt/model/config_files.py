"""config.json: ours, written and read strictly; and what another library's says against loading its weights."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from ffvt.errors import printable
from ffvt.model.config import FFVTConfig
from ffvt.model.hub import CONFIG_FILE
from ffvt.model.weight_files import existing_file

LARGEST_FILE = 1 << 20  # bytes; ours has 500
# Fields without which a saved configuration means nothing. Those that came later are absent from older files, and take
# their defaults, which change nothing.
REQUIRED = (
    *("image_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads", "mlp_dim"),
    *("num_select", "feature_fusion"),
)


def write_config(folder: Path, config: FFVTConfig) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(asdict(config), indent=2) + "\n")


def read_config(where: str, folder: Path) -> FFVTConfig:
    """The configuration that `write_config` wrote into a folder.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, another library's, or a value does not hold.
    """
    found = read_fields(where, folder)
    known = [declared.name for declared in fields(FFVTConfig)]
    missing, unknown = [name for name in REQUIRED if name not in found], [name for name in found if name not in known]
    shown = printable(repr(str(folder / CONFIG_FILE)))
    if "timm" in found:
        raise ValueError(f"{where}: {shown} must be a configuration of FFVT; got one of timm (ffvt.load_pretrained)")
    if "model_type" in found or "architecture" in found:
        kind = found.get("model_type", found.get("architecture"))
        hint = "ffvt.load_weights takes the weights of such a model into one of ffvt.create_model"
        raise ValueError(
            f"{where}: {shown} must be a configuration of FFVT; got one of {printable(repr(kind))} ({hint})"
        )
    if missing or unknown:
        lacks = f"lacks {', '.join(missing)}" if missing else ""
        has = f"has the unknown {printable(', '.join(unknown))}" if unknown else ""
        raise ValueError(f"{where}: {shown} is no configuration of FFVT: it {' and '.join(filter(None, (lacks, has)))}")
    try:
        return FFVTConfig(**found)
    except ValueError as error:
        raise ValueError(f"{where}: {shown} is no configuration of FFVT: {error}") from error


def read_fields(where: str, folder: Path) -> dict[str, Any]:
    """What a folder's config.json says, whoever wrote it.

    Raises:
        FileNotFoundError: there is none. ValueError: it is damaged, or no regular file.
    """
    path = existing_file(where, folder, CONFIG_FILE)
    if path == folder:
        raise ValueError(
            f"{where}: source must be a folder with {CONFIG_FILE}; got a file, {printable(repr(str(path)))}"
        )
    return read_json(where, path)


def read_json(where: str, path: Path) -> dict[str, Any]:
    """The object in a small JSON file.

    Raises:
        ValueError: it is none, or damaged, deeply nested or large.
    """
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise ValueError(f"it has more than {LARGEST_FILE} bytes")
        found = json.loads(content.decode())
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not an object")
    except (OSError, ValueError, RecursionError) as error:
        shown, reason = printable(repr(str(path))), printable(str(error).partition("\n")[0])
        raise ValueError(f"{where}: {shown} is no configuration: {reason}") from error
    return found


def check_foreign_config(where: str, folder: Path, config: FFVTConfig) -> None:
    """Compares what cannot be seen in the weights of a folder, from the config.json beside them, if there is one.

    Raises:
        ValueError: the source has another number of heads, or another activation than GELU.
    """
    path = folder / CONFIG_FILE
    if not path.is_file():
        return
    found = {name: value for name, value in read_json(where, path).items() if value is not None}  # null: left open
    heads = found.get("num_attention_heads", found.get("num_heads", config.num_heads))
    if heads != config.num_heads:
        raise ValueError(
            f"{where}: num_heads must be {printable(repr(heads))}, as {printable(repr(str(path)))} says; "
            f"got num_heads={config.num_heads}"
        )
    activation = found.get("hidden_act", "gelu")
    if activation != "gelu":
        shown = printable(repr(activation))
        raise ValueError(f"{where}: hidden_act of {printable(repr(str(path)))} must be 'gelu', as FFVT's; got {shown}")
