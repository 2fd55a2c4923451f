"""How an argument is refused: one sentence that names the place, the rule and the value. Errors on their way."""

from __future__ import annotations

import operator
import pickle


def require(holds: bool, where: str, name: str, must: str, got: object) -> None:
    """Refuses the value of an argument unless `holds`.

    Args:
        holds: whether the value is accepted.
        where: the function or class that was called.
        name: the argument.
        must: what the argument must be: "in [0, 1)", "a positive integer".
        got: its value, of which at most 200 letters are shown.

    Raises:
        ValueError: not `holds`; the message is "where: name must be ...; got name=value".
    """
    if not holds:
        raise ValueError(f"{where}: {name} must be {must}; got {name}={printable(repr(got))}")


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
    raise TypeError(f"{where}: {name} must be an integer; got {name}={printable(repr(value))}")


def printable(text: str, limit: int = 200) -> str:
    r"""Text of unknown origin, such as a file's or a class's name, in one line that a terminal may get.

    Args:
        text: the text.
        limit: how many characters it may have; what is longer ends with "...".

    Returns:
        The text with its control, formatting and surrogate characters escaped, as in "\x1b[2J".
    """
    shown = "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text[: limit + 1]
    )
    return shown if len(shown) <= limit else f"{shown[: limit - 3]}..."


def portable(error: Exception) -> Exception:
    """The error itself, or what it says where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its parts raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
