"""The random generators of a process: seeded, captured, restored."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ffvt.errors import printable, require


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_states(device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """States of Python's and NumPy's generators in plain types, and of PyTorch's as tensors."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    plain = {
        "python": [version, list(words), gauss],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
    }
    tensors = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    return plain, tensors


def check_generators(plain: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Tries states out on generators of its own.

    Raises:
        ValueError: they are not what `generator_states` gave on such a device.
    """
    missing = {"cpu"} - tensors.keys()
    require(not missing, "resume", "generators", "whole", f"no state of {', '.join(missing)}")
    try:
        version, words, gauss = plain["python"]
        random.Random().setstate((version, tuple(words), gauss))
        name, keys, position, has_gauss, cached = plain["numpy"]
        np.random.RandomState().set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
        for kind, state in tensors.items():
            if kind == "cpu" or device.type == "cuda":
                torch.Generator(kind if kind == "cpu" else device).set_state(state)
    except (ValueError, TypeError, OverflowError, RuntimeError) as error:
        raise ValueError(f"resume: generators must take the checkpoint's states; {printable(str(error))}") from error


def set_generators(plain: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> None:
    """Takes on what `generator_states` gave."""
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["cpu"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
