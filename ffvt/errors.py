"""How an argument is refused: one sentence that names the place, the rule and the value."""

from __future__ import annotations

import operator


def require(holds: bool, where: str, name: str, must: str, got: object) -> None:
    """Refuses the value of an argument unless `holds`.

    Args:
        holds: whether the value is accepted.
        where: the function or class that was called.
        name: the argument.
        must: what the argument must be: "in [0, 1)", "a positive integer".
        got: its value.

    Raises:
        ValueError: not `holds`; the message is "where: name must be ...; got name=value".
    """
    if not holds:
        raise ValueError(f"{where}: {name} must be {must}; got {name}={got!r}")


def as_integer(where: str, name: str, value: object) -> int:
    """An integer argument as an int; NumPy's integers are taken, True and 3.0 are not.

    Raises:
        TypeError: `value` is no integer; the message is "where: name must be an integer; got name=value".
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{where}: {name} must be an integer; got {name}={value!r}")
