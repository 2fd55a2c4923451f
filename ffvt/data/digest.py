"""The SHA-256 of a file: what caches, checkpoints and the doctor know contents by."""

from __future__ import annotations

import hashlib
from pathlib import Path

BLOCK = 1 << 20  # bytes read at once


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's contents, 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
