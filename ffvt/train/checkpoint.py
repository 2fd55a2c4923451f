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
    """A model and its facts: "classes", "resize_size", "options", "step", and the score: "top1", "top5", "loss"."""

    model: FFVT
    facts: dict[str, Any]


def save_checkpoint(folder: Path, model: FFVT, facts: dict[str, Any]) -> None:
    """Writes the folder anew beside the old one, then puts it in its place. At no time is there no whole one."""
    fresh, old = folder.with_name(folder.name + ".new"), _spare(folder)
    if old.exists() and not folder.exists():  # an earlier save was cut off between its two renames
        os.replace(old, folder)
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(fresh)
    (fresh / FACTS_FILE).write_text(json.dumps(facts, indent=2, allow_nan=False) + "\n")
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def _spare(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """The model and facts saved by `save_checkpoint`, on the CPU.

    Raises:
        FileNotFoundError: no such checkpoint. ValueError: it is damaged.
    """
    folder = Path(folder)
    if not folder.exists() and _spare(folder).exists():
        folder = _spare(folder)
    if not (folder / FACTS_FILE).exists():
        raise FileNotFoundError(f"checkpoint must be a folder with {FACTS_FILE}; got {str(folder)!r}")
    try:
        facts = json.loads((folder / FACTS_FILE).read_text())
        classes, _, _ = facts["classes"], facts["resize_size"], facts["options"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: {folder / FACTS_FILE} is damaged: {error!r}") from error
    model = FFVT.from_pretrained(folder)
    if len(classes) != model.config.num_classes:
        raise ValueError(f"checkpoint: {folder} names {len(classes)} classes, its model has {model.config.num_classes}")
    return Checkpoint(model, facts)
