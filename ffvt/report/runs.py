"""Training runs read back from their log.jsonl."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOG_FILE = "log.jsonl"


@dataclass(frozen=True)
class Run:
    """A run's label and the lines of its log."""

    name: str
    lines: list[dict[str, Any]]

    def series(self, kind: str, key: str, **equal: Any) -> list[tuple[int, float]]:
        """(step, value) of every line of a kind that has a value for the key; "a.b" is b inside of a."""
        found = []
        for line in self.lines:
            if line["kind"] == kind and all(line.get(name) == value for name, value in equal.items()):
                value: Any = line
                for part in key.split("."):
                    value = value.get(part) if isinstance(value, dict) else None
                if value is not None:
                    found.append((line["step"], value))
        return found


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without those that a resumed run made again.

    path: the run's folder, or the file. A last line that was cut off by a kill is passed over.

    Raises:
        FileNotFoundError: there is no log. ValueError: another line is damaged.
    """
    path = Path(path)
    path = path / LOG_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"plot: a run must have a {LOG_FILE}; got {str(path)!r}")
    lines: list[dict[str, Any]] = []
    texts = path.read_text(encoding="utf-8").split("\n")
    for number, text in enumerate(texts, start=1):
        if not text:
            continue
        try:
            line = json.loads(text)
            kind = line["kind"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(texts):
                break
            raise ValueError(f"plot: every line must be a JSON object with a kind; got {path}:{number}") from error
        if kind == "resume":
            lines = [earlier for earlier in lines if earlier.get("step", 0) <= line["step"]]
        lines.append(line)
    return lines


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """The runs in these folders, each by its name, or by its folder where two have one name.

    Raises:
        FileNotFoundError, ValueError: as `read_log`.
    """
    logs = [read_log(path) for path in paths]
    names = [next((line["options"]["name"] for line in log if line["kind"] == "run"), "") for log in logs]
    often = Counter(names)
    return [Run(name if name and often[name] == 1 else str(path), log) for name, path, log in zip(names, paths, logs)]
