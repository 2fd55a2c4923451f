"""Training runs read back from their log.jsonl."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ffvt.errors import printable
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

    @property
    def splits(self) -> list[str | None]:
        """The splits that were evaluated."""
        found = (line.get("split") for line in self.lines if line["kind"] == "evaluate")
        return list(dict.fromkeys(split for split in found if split is None or isinstance(split, str)))

    @property
    def chosen_on(self) -> str | None:
        """The split that the best model is chosen on: "val" where the run has one. None without evaluations."""
        splits = [line.get("split") for line in self.lines if line["kind"] == "evaluate" and not line.get("model")]
        return "val" if "val" in splits else next(iter(splits), None)

    def during(self, key: str) -> list[tuple[int, float]]:
        """(step, value) of the evaluations during training, of the one split that the best model is chosen on."""
        return self.series("evaluate", key, split=self.chosen_on, model=None)


def value_in(line: Any, key: str) -> Any:
    """The value at a key, "a.b" being b inside of a; None where there is none."""
    for part in key.split("."):
        line = line.get(part) if isinstance(line, dict) else None
    return line


def number_in(line: Any, key: str) -> float | None:
    """The finite number at a key; None where there is none."""
    value = value_in(line, key)
    return value if isinstance(value, (int, float)) and math.isfinite(value) else None


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, each by its name; where names are equal, with its folder below the common one.

    A path may be a run's log, too. A folder that is given twice counts once.

    Raises:
        FileNotFoundError: there is no log.
        ValueError: a log is damaged.
    """
    folders = list(dict.fromkeys(_folder(Path(path).resolve()) for path in paths))
    logs = [read_log(folder) for folder in folders]
    names = [printable(_name(log) or folder.name) for log, folder in zip(logs, folders)]
    labels = [
        f"{name} ({printable(str(folder.relative_to(os.path.commonpath(folders))))})" if names.count(name) > 1 else name
        for name, folder in zip(names, folders)
    ]
    return [Run(label, log) for label, log in zip(labels, logs)]


def _folder(path: Path) -> Path:
    return path.parent if path.name == LOG_FILE and path.is_file() else path


def _name(log: Sequence[dict[str, Any]]) -> str:
    name = value_in(next((line for line in log if line["kind"] == "run"), None), "options.name")
    return name if isinstance(name, str) else ""
