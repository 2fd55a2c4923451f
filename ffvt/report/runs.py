"""Training runs read back from their log.jsonl."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffvt.train.runlog import LOG_FILE, read_log


@dataclass(frozen=True)
class Run:
    """A run's label and the lines of its log."""

    name: str
    lines: list[dict[str, Any]]

    def series(self, kind: str, key: str, **equal: Any) -> list[tuple[int, float]]:
        """(step, value) of every line of a kind that has a finite number for the key; "a.b" is b inside of a."""
        found = []
        for line in self.lines:
            if line["kind"] == kind and all(line.get(name) == value for name, value in equal.items()):
                step, value = line.get("step"), number_in(line, key)
                if isinstance(step, int) and value is not None:
                    found.append((step, value))
        return found

    def steps(self, kind: str) -> list[int]:
        """The steps of the lines of a kind."""
        return [step for step, _ in self.series(kind, "step")]

    @property
    def chosen_on(self) -> str | None:
        """The split that the best model is chosen on: "val" where the run has one. None without evaluations."""
        splits = [line.get("split") for line in self.lines if line["kind"] == "evaluate" and not line.get("model")]
        return "val" if "val" in splits else next(iter(splits), None)

    def during(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the evaluations during training, of the one split that the best model is chosen on."""
        return self.series("evaluate", key, split=self.chosen_on, model=None)


def number_in(line: Any, key: str) -> float | None:
    """The finite number at a key, "a.b" being b inside of a; None where there is none."""
    for part in key.split("."):
        line = line.get(part) if isinstance(line, dict) else None
    return line if isinstance(line, (int, float)) and math.isfinite(line) else None


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, each by its name, with its folder where two have one name.

    A folder that is given twice counts once.

    Raises:
        FileNotFoundError, ValueError: as `read_log`.
    """
    folders = list({folder.resolve(): folder for folder in reversed([_folder(path) for path in paths])}.values())[::-1]
    logs = [read_log(folder) for folder in folders]
    names = [_name(log) or folder.name for log, folder in zip(logs, folders)]
    return [Run(label, log) for label, log in zip(_labels(names, folders), logs)]


def _folder(path: str | Path) -> Path:
    """Of a run, absolute; a log of another name stands for itself."""
    path = Path(os.path.abspath(path))
    return path.parent if path.name == LOG_FILE and path.is_file() else path


def _name(log: Sequence[dict[str, Any]]) -> str:
    options = next((line.get("options") for line in log if line["kind"] == "run"), None)
    name = options.get("name") if isinstance(options, dict) else None
    return name if isinstance(name, str) else ""


def _labels(names: Sequence[str], folders: Sequence[Path]) -> list[str]:
    """Names; those that are not alone with as many last parts of their folder as tell them apart."""
    labels = list(names)
    for depth in range(1, max(len(folder.parts) for folder in folders) + 1 if folders else 0):
        often = Counter(labels)
        for i, label in enumerate(labels):
            if often[label] > 1:
                labels[i] = f"{names[i]} ({Path(*folders[i].parts[-depth:])})"
    return labels
