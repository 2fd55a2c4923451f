"""How an argument is refused."""

import numpy as np
import pytest
import torch

from ffvt.errors import as_integer, printable, require


def test_a_refusal_names_place_rule_and_value():
    require(True, "place", "rate", "in [0, 1)", 0.5)
    with pytest.raises(ValueError, match=r"^place: rate must be in \[0, 1\); got rate=1.5$"):
        require(False, "place", "rate", "in [0, 1)", 1.5)
    with pytest.raises(ValueError, match=r"got name='x'$"):
        require(False, "place", "name", "known", "x")


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), torch.tensor(3)], ids=repr)
def test_what_counts_becomes_an_int(value):
    assert as_integer("place", "count", value) == 3
    assert type(as_integer("place", "count", value)) is int


@pytest.mark.parametrize("value", [True, np.True_, 3.0, np.float32(3), "3", None, torch.tensor(3.0)], ids=repr)
def test_what_does_not_count_is_refused_by_name(value):
    with pytest.raises(TypeError, match=r"^place: count must be an integer; got count="):
        as_integer("place", "count", value)


def test_a_refused_integer_is_shown_in_a_bounded_line():
    with pytest.raises(TypeError) as raised:
        as_integer("place", "count", "x" * 10**6)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b é 日本", "a b é 日本"),
        ("\x1b]0;pwned\x07\x1b[2J", r"\x1b]0;pwned\x07\x1b[2J"),
        ("two\nlines\tand\r", r"two\nlines\tand\r"),
        ("right\u202eleft", r"right\u202eleft"),
        ("not utf-8: \udcff", r"not utf-8: \udcff"),
        ("x" * 200, "x" * 200),
        ("x" * 10**6, "x" * 197 + "..."),
    ],
)
def test_what_a_terminal_gets_is_one_short_line_without_control_characters(text, shown):
    assert printable(text) == shown
    assert printable(text).encode()


def test_escapes_count_towards_the_limit():
    assert printable("\x1b" * 10, 20) == "\\x1b" * 4 + "\\..."
