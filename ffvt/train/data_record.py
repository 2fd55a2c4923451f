"""What a checkpoint keeps of the data it was trained on, and what has changed since: counts, names, labels, sizes.

File contents are not read, except where a cache has hashed them anyway. Where the data set lies does not matter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ffvt.data.datasets import ImageSet

Record = dict[str, dict[str, Any]]  # of each split: "count", "files" (a digest), and "contents" where there is a cache


def record_of(splits: Mapping[str, ImageSet]) -> Record:
    """The record of a data set's splits, by name."""
    return {name: _record(images) for name, images in splits.items()}


def _record(images: ImageSet) -> dict[str, Any]:
    found = {"count": len(images), "files": _digest(getattr(images, "paths", None), images.labels)}
    key = getattr(getattr(images, "pixels", None), "key", None)
    return {**found, "contents": key} if key else found


def _digest(paths: Sequence[Path] | None, labels: Sequence[int]) -> str:
    digest = hashlib.sha256(f"{list(map(int, labels))}".encode())
    if paths:
        names = [os.path.abspath(path) for path in paths]
        common = os.path.commonpath([os.path.dirname(name) for name in names])
        for name in names:
            digest.update(os.fsencode(f"{os.path.relpath(name, common)}\0{_size(name)}\n"))
    return digest.hexdigest()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # what cannot be read is told of when it is drawn
        return -1


def changes(before: Record, now: Record) -> list[str]:
    """What differs in the splits that both records have, in words; a record of an earlier version has none."""
    return [f"{name}: {change}" for name in now if name in before and (change := _change(before[name], now[name]))]


def _change(before: dict[str, Any], now: dict[str, Any]) -> str:
    if before["count"] != now["count"]:
        return f"{before['count']} -> {now['count']} images"
    if before["files"] != now["files"]:
        return f"{now['count']} images as before, but other files, sizes or labels"
    if before.get("contents", now.get("contents")) != now.get("contents", before.get("contents")):
        return f"{now['count']} images of the same names and sizes, but other contents"
    return ""
