"""Weight files: read into flat mappings, never running their pickles; and what a safetensors file says of itself."""

from __future__ import annotations

import re
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ffvt.errors import printable
from ffvt.model.hub import WEIGHTS_FILE

FLOATS = ("F64", "F32", "F16", "BF16")  # dtypes of safetensors that a model's weights may have
FORMATS = ".npz, .safetensors, or a state dict of torch.save"


def existing_file(where: str, path: Path, file: str = WEIGHTS_FILE) -> Path:
    """The regular file at `path`, or called `file` in the folder there.

    Raises:
        FileNotFoundError: there is none; of a folder the message says which of its folders have one.
        ValueError: it is a FIFO, a device or a socket, which are never opened; or no name that a file can have.
    """
    shown = printable(repr(str(path)))
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            folder, path = path, path / file
            if not path.exists():
                inside = sorted(child.parent.name for child in folder.glob(f"*/{file}"))
                hint = f", but {printable(', '.join(inside))} in it have: name one of them" if inside else ""
                raise FileNotFoundError(
                    f"{where}: source must be a folder with {file}; got {shown}, which has none{hint}"
                )
            mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if not error.filename:
            raise
        raise FileNotFoundError(f"{where}: source must be an existing file; got source={shown}") from error
    except (OSError, ValueError) as error:  # a name that is too long, with a NUL, a folder that may not be read
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{where}: source must be a readable weight file; got {shown}: {reason}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, device or socket"
        raise ValueError(f"{where}: source must be a regular file; got {printable(repr(str(path)))}, {kind}")
    return path


def read_weights(where: str, path: Path, limit: int) -> Mapping[str, Any]:
    """The arrays or tensors of a file, recognised by content.

    limit: bytes that it may unpack to.

    Raises:
        ValueError: it is none, damaged, a pickle of more than tensors, or unpacks to more. Pickles are never run.
    """
    try:
        return _read_by_content(path, limit)
    except Exception as error:  # every reader has errors of its own: one kind goes out, with the cause in it
        shown = printable(repr(str(path)))
        raise ValueError(f"{where}: source must be a readable weight file; got {shown}: {_reason(error)}") from error


def read_header(where: str, path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype (as safetensors writes it: "F32") and shape, without reading any tensor.

    Raises:
        ValueError: it is no safetensors file, or a damaged one.
    """
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except Exception as error:
        shown = printable(repr(str(path)))
        raise ValueError(f"{where}: weights must be a safetensors file; got {shown}: {_reason(error)}") from error


def check_header(
    where: str, path: Path, expected: Mapping[str, torch.Tensor], model: str = "its configuration"
) -> None:
    """Compares what a safetensors file holds with the state dict that it is to fill, which may lie on "meta".

    model: what that is of, for the message.

    Raises:
        ValueError: a tensor is missing, unknown, of another shape or no floating-point tensor.
    """
    found = read_header(where, path)
    missing, unknown = (
        [name for name in expected if name not in found],
        [name for name in found if name not in expected],
    )
    common = {name: found[name] for name in expected if name in found}
    shapes = [
        f"{n} {shape}, not {tuple(expected[n].shape)}" for n, (_, shape) in common.items() if shape != expected[n].shape
    ]
    kinds = [f"{name} in {dtype}" for name, (dtype, _) in common.items() if dtype not in FLOATS]
    problems = {
        "it lacks": missing,
        "it has the unknown": unknown,
        "shapes differ,": shapes,
        "no floating point,": kinds,
    }
    told = [f"{problem} {_some(names)}" for problem, names in problems.items() if names]
    if told:
        shown = printable(repr(str(path)))
        raise ValueError(f"{where}: {shown} must hold the weights of {model}; got others: {'; '.join(told)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(printable(name, 80) for name in names[:2]) + more


def _read_by_content(path: Path, limit: int) -> Mapping[str, Any]:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > limit:
            raise ValueError(f"unpacks to {unpacked} bytes, more than {limit}")
        if any(name.endswith(".npy") for name in names):
            with np.load(path, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        return _read_torch(path)
    with path.open("rb") as file:
        head = file.read(9)
    if len(head) == 9 and head[8:] == b"{":
        return load_file(path)
    return _read_torch(path)


def _read_torch(path: Path) -> Mapping[str, Any]:
    """What `torch.save` wrote. Its refusals advise to run the pickle, or tell of opcodes: they are put in our words."""
    try:
        with warnings.catch_warnings():  # of pickle protocols
            warnings.simplefilter("ignore")
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked is None:
            raise ValueError(f"it is no weight file ({FORMATS}), or a damaged one") from error
        remedy = "which is not run; save the state dict alone"
        raise ValueError(f"its pickle asks for {printable(asked[1], 80)}, {remedy}") from error
    return state_dict(loaded)


def state_dict(loaded: Any) -> Mapping[str, Any]:
    """The state dict in what `torch.load` returned: itself, or nested under a usual name."""
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"holds a {type(loaded).__name__}, not a mapping of names to tensors")
    return loaded


def _reason(error: Exception) -> str:
    """What is wrong with a file, in one line."""
    text = str(error)
    if "allow_pickle" in text:
        return "it holds Python objects, which are not read"
    named = text if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {text}"
    return printable(named.partition("\n")[0])
