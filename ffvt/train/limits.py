"""What the values of options must keep: kinds, and limits with their words. Nothing here imports torch."""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any


def as_tuple(value: Any) -> Any:
    """A list, as JSON and a command line give it, as the tuple that a field holds."""
    return tuple(value) if isinstance(value, list) else value


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def are_numbers(value: Any, count: int) -> bool:
    if not isinstance(value, tuple) or len(value) not in (0, count):
        return False
    return all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in value)


def keeps_limit(kind: str, limit: Any, value: Any) -> tuple[bool, str]:
    """Whether a value keeps a limit of `option`, and what the limit says."""
    if kind == "choices":
        return value in limit, f"one of {', '.join(filter(None, limit))}"
    if kind == "model":  # timm knows its names; it is asked when the data is opened, not for --help
        near = get_close_matches(value, limit, 1)
        hint = f" (near: {near[0]})" if near else ""
        is_timm = re.fullmatch(r"timm:\S+", value) is not None
        return value in limit or is_timm, f"one of {', '.join(limit)}, timm:NAME{hint}"
    if kind == "at_least":
        return value >= limit, f"at least {limit}"
    if kind == "above":
        return value > limit, "positive" if limit == 0 else f"above {limit}"
    low, high = (float(end) for end in limit[1:-1].split(","))  # within
    from_low = value >= low if limit[0] == "[" else value > low
    to_high = value <= high if limit[-1] == "]" else value < high
    return from_low and to_high, f"in {limit}"
