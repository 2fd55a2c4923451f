"""Figures as files: in the format that the file's name says, whole or not at all, never in place of other things."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from ffvt.files import write_whole

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".pdf": "pdf", ".svg": "svg"}
BEGINNINGS = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF", b"%PDF-", b"<?xml", b"<svg")  # of files in these formats


def figure_format(path: str | Path, command: str) -> str:
    """The format in which a figure is written to `path`; asked before the work, so that nothing is lost by a bad name.

    Raises:
        ValueError: the name ends in no known format, or the file is there and is no picture.
        FileNotFoundError: the folder is missing.
    """
    path = Path(path)
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        raise ValueError(f"{command}: output must end in {', '.join(FORMATS)}; got output={str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{command}: the folder of output must exist; got output={str(path)!r}")
    if path.exists() and not _may_be_replaced(path):
        raise ValueError(f"{command}: output must be a picture or new, other files stay; got output={str(path)!r}")
    return found


def _may_be_replaced(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(16)
    return not start or start.startswith(BEGINNINGS)


def write_figure(figure: Figure, path: str | Path, command: str, dpi: int = 130) -> None:
    """Writes a figure to a file.

    Raises:
        ValueError, OSError: as `figure_format`, or it cannot be written; an older picture is then still there.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format=figure_format(path, command), dpi=dpi)
    write_whole(path, buffer.getvalue())
