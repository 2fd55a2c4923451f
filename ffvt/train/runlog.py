"""What a run reports while it runs: log.jsonl always, a bar on a terminal, TensorBoard where asked for."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger("ffvt")

LOG_FILE, BOARD_FOLDER = "log.jsonl", "tensorboard"
ENDS = ("end", "stop")  # kinds of the last line


class RunLog:
    """One JSON object per line, on the main rank only. A number that is not finite is written as null.

    A log that cannot be written (a full disk) costs a warning, not the run.

    Args:
        folder: of the run; made if missing.
        name, num_steps, start: the run, its steps and the step it starts after, for the bar.
        append: append to the log there is; else it starts anew.
        enabled: False on all ranks but the main one: nothing is written.
        tensorboard: write TensorBoard's event files too.

    Raises:
        OSError: the log cannot be opened. ImportError: TensorBoard is asked for and not installed.
    """

    def __init__(
        self, folder: Path, name: str, num_steps: int, start: int, append: bool, enabled: bool, tensorboard: bool
    ) -> None:
        self.file = self.board = None
        self.failed = False
        if enabled:
            folder.mkdir(parents=True, exist_ok=True)
            if append:
                _drop_unfinished_line(folder / LOG_FILE)
            self.file = (folder / LOG_FILE).open("a" if append else "w")
            self.board = _summary_writer(folder) if tensorboard else None
        self.has_bar = enabled and sys.stderr.isatty()
        self.progress = tqdm(total=num_steps, initial=start, desc=name, disable=not self.has_bar)

    def write(self, kind: str, **values: Any) -> None:
        """One line of a kind."""
        if not self.file:
            return
        line = json.dumps({"kind": kind, **_finite(values)}, allow_nan=False)
        try:
            print(line, file=self.file, flush=True)
            if self.board and "step" in values:
                _add_scalars(self.board, kind, values, values["step"])
        except OSError as error:
            if not self.failed:
                log.warning("the log cannot be written, training continues without it: %s", error)
            self.failed = True

    def advance(self) -> None:
        """One step done."""
        self.progress.update()

    def show(self, **values: str) -> None:
        """Short figures beside the bar."""
        self.progress.set_postfix(**values)

    def close(self) -> None:
        """Ends the bar and the files."""
        self.progress.close()
        try:
            for stream in (self.file, self.board):
                if stream:
                    stream.close()
        except OSError as error:
            log.warning("the log could not be finished: %s", error)


def _drop_unfinished_line(path: Path) -> None:
    """A killed run may have left half a line at the end of its log."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def _finite(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _finite(value) for key, value in values.items()}
    return None if isinstance(values, float) and not math.isfinite(values) else values


def _summary_writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--tensorboard needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(folder / BOARD_FOLDER))


def _add_scalars(board: Any, prefix: str, values: dict[str, Any], step: int) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _add_scalars(board, f"{prefix}/{name}", value, step)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            board.add_scalar(f"{prefix}/{name}", value, step)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's log, without those that a resumed run made again.

    path: the run's folder, or the file. A last line that was cut off by a kill is passed over.

    Raises:
        FileNotFoundError: there is no log. ValueError: another line is damaged.
    """
    path = Path(path)
    path = path / LOG_FILE if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"log: a run must have a {LOG_FILE}; got {str(path)!r}")
    lines: list[dict[str, Any]] = []
    texts = path.read_bytes().split(b"\n")  # bytes: one line that is not UTF-8 must not hide which one it is
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            continue
        try:
            line = _parse(text)
        except ValueError as error:
            if number == len(texts):
                break
            raise ValueError(f"log: every line must be {error}; got {path}:{number}") from error
        if line["kind"] == "resume":
            lines = [earlier for earlier in lines if not _is_superseded(earlier, line["step"])]
        lines.append(line)
    return lines


def _parse(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError("a JSON object with a kind") from error
    if not isinstance(line, dict) or not isinstance(line.get("kind"), str):
        raise ValueError("a JSON object with a kind")
    if line["kind"] == "resume" and not isinstance(line.get("step"), int):
        raise ValueError("a JSON object, with a step where its kind is resume")
    return line


def _is_superseded(line: dict[str, Any], resumed_at: int) -> bool:
    """Whether a run that resumed at a step makes this earlier line again; an end is one no more in any case."""
    return line["kind"] in ENDS or (isinstance(line.get("step"), int) and line["step"] > resumed_at)
