"""Kinds of plain values, to check JSON of unknown origin against: integers in a range, lists, records of keys.

A kind is a function (key, value) that raises `Unfit` where the value is not of that kind.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ffvt.errors import printable

Kind = Callable[[str, Any], None]
LONGEST_FILE = 32 << 20  # bytes; the plain state of a thousand ranks has 15 MB


class Unfit(ValueError):
    """A value that is not of its kind; the message is "key must be ...; got value"."""

    def __init__(self, key: str, must: str, value: Any) -> None:
        super().__init__(f"{printable(key)} must be {must}; got {printable(reprlib.repr(value))}")


def integer(low: int = 0, high: int = 2**53) -> Kind:
    """An integer in [low, high]; True is none."""

    def check(key: str, value: Any) -> None:
        if type(value) is not int or not low <= value <= high:
            raise Unfit(key, f"an integer from {low} to {high}", value)

    return check


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    """A finite number in [low, high]."""

    def check(key: str, value: Any) -> None:
        if type(value) not in (int, float) or not math.isfinite(value) or not low <= value <= high:
            raise Unfit(key, "a finite number" if low == -math.inf else f"a number from {low} to {high}", value)

    return check


def text(longest: int = 1000) -> Kind:
    """A string of at most `longest` letters."""

    def check(key: str, value: Any) -> None:
        if not isinstance(value, str) or len(value) > longest:
            raise Unfit(key, f"a text of at most {longest} letters", value)

    return check


def only(*expected: str) -> Kind:
    """One of some texts."""

    def check(key: str, value: Any) -> None:
        if value not in expected:
            raise Unfit(key, " or ".join(map(repr, expected)), value)

    return check


def flag(key: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise Unfit(key, "true or false", value)


def anything(key: str, value: Any) -> None:
    """Whatever JSON holds."""


def optional(kind: Kind) -> Kind:
    """Of a kind, or None."""

    def check(key: str, value: Any) -> None:
        if value is not None:
            kind(key, value)

    return check


def array(kind: Kind, shortest: int, longest: int) -> Kind:
    """A list of values of one kind."""

    def check(key: str, value: Any) -> None:
        if not isinstance(value, list) or not shortest <= len(value) <= longest:
            length = shortest if shortest == longest else f"{shortest} to {longest}"
            raise Unfit(key, f"a list of {length} values", value)
        for number, item in enumerate(value):
            kind(f"{key}[{number}]", item)

    return check


def row(*kinds: Kind) -> Kind:
    """A list with a kind for every place."""

    def check(key: str, value: Any) -> None:
        if not isinstance(value, list) or len(value) != len(kinds):
            raise Unfit(key, f"a list of {len(kinds)} values", value)
        for number, (kind, item) in enumerate(zip(kinds, value)):
            kind(f"{key}[{number}]", item)

    return check


def record(must: Mapping[str, Kind], may: Mapping[str, Kind] | None = None, others: Kind | None = None) -> Kind:
    """A mapping that has the keys of `must` and perhaps those of `may`; any other key only with a kind of `others`."""
    known = {**must, **(may or {})}

    def check(key: str, value: Any) -> None:
        if not isinstance(value, dict):
            raise Unfit(key or "the whole", "a record of keys", value)
        for name in must:
            if name not in value:
                raise Unfit(f"{key}.{name}" if key else name, "there", "no such key")
        for name, item in value.items():
            place = f"{key}.{name}" if key else name
            kind = known.get(name, others)
            if kind is None:
                raise Unfit(place, "a key that this version knows", item)
            kind(place, item)

    return check


def read_json(path: Path, kind: Kind) -> Any:
    """The JSON value of a kind in a file.

    Raises:
        ValueError: the file is no JSON, too long or nested too deeply, or the value is not of that kind; the message
            names file and key. OSError: it cannot be read.
    """
    try:
        if not path.is_file() or path.stat().st_size > LONGEST_FILE:
            raise ValueError(f"must be a file of at most {LONGEST_FILE >> 20} MiB")
        content = path.read_bytes().decode()
        value = json.loads(content, parse_constant=_no_number, object_pairs_hook=_without_repeats)
        kind("", value)
    except RecursionError as error:
        raise ValueError(f"checkpoint: {path}: values must not be nested so deeply") from error
    except ValueError as error:  # also what is no UTF-8 or no JSON
        raise ValueError(f"checkpoint: {path}: {printable(str(error), 500)}") from error
    return value


def _no_number(constant: str) -> None:
    raise ValueError(f"numbers must be finite; got {constant}")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"keys must differ; got {next(name for name in names if names.count(name) > 1)!r} twice")
    return value
