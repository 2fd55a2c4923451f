"""A trained model on disk: a folder with model.safetensors, config.json and training.json."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffvt.model.ffvt import FFVT

FACTS_FILE = "training.json"


@dataclass
class Checkpoint:
    """A model with what is needed to use it: facts["classes"], facts["options"], facts["step"], facts["accuracy"]."""

    model: FFVT
    facts: dict[str, Any]


def save_checkpoint(folder: Path, model: FFVT, facts: dict[str, Any]) -> None:
    """Writes the folder anew beside the old one, then puts it in its place."""
    fresh, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(fresh)
    (fresh / FACTS_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """The model and facts saved by `save_checkpoint`, on the CPU.

    Raises:
        FileNotFoundError: no such checkpoint. ValueError: it is damaged.
    """
    folder = Path(folder)
    if not (folder / FACTS_FILE).exists():
        raise FileNotFoundError(f"checkpoint must be a folder with {FACTS_FILE}; got {str(folder)!r}")
    try:
        facts = json.loads((folder / FACTS_FILE).read_text())
        classes = facts["classes"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: {folder / FACTS_FILE} is damaged: {error!r}") from error
    model = FFVT.from_pretrained(folder)
    if len(classes) != model.config.num_classes:
        raise ValueError(f"checkpoint: {folder} names {len(classes)} classes, its model has {model.config.num_classes}")
    return Checkpoint(model, facts)
