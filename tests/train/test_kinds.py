"""Kinds of plain values: each takes what it should, and names key and value of what it refuses."""

import json

import pytest

from ffvt.train.kinds import (
    LONGEST_FILE,
    Unfit,
    anything,
    array,
    flag,
    integer,
    number,
    only,
    optional,
    read_json,
    record,
    row,
    text,
)

POINT = record({"x": integer(0, 9)}, may={"name": text(5)})


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (integer(0, 9), [0, 9], [-1, 10, 1.0, True, "1", None]),
        (number(0, 1), [0, 1, 0.5], [-0.1, 1.1, float("nan"), True, "0"]),
        (number(), [-1e300, 0], [float("inf"), None]),
        (text(3), ["", "abc"], ["abcd", 3, None, ["a"]]),
        (only("a"), ["a"], ["b", None]),
        (flag, [True, False], [0, 1, "no"]),
        (optional(flag), [None, True], [0]),
        (array(flag, 1, 2), [[True], [True, False]], [[], [True] * 3, [1], "ab", None]),
        (row(flag, text()), [[True, "a"]], [[True], ["a", True], [True, "a", 1], {}]),
        (POINT, [{"x": 1}, {"x": 1, "name": "a"}], [{}, {"x": 1, "y": 2}, {"x": "1"}, [], None]),
        (record({}, others=flag), [{}, {"a": True}], [{"a": 1}]),
        (anything, [None, [{}]], []),
    ],
)
def test_a_kind_takes_its_values_and_no_others(kind, good, bad):
    for value in good:
        kind("key", value)
    for value in bad:
        with pytest.raises(Unfit, match=r"^key.* must be .*; got "):
            kind("key", value)


def test_the_place_of_a_bad_value_is_named_and_the_value_bounded():
    kind = record({"points": array(POINT, 0, 10)})
    with pytest.raises(Unfit, match=r"^points\[1\]\.x must be an integer from 0 to 9; got '-1'$"):
        kind("", {"points": [{"x": 1}, {"x": "-1"}]})
    with pytest.raises(Unfit) as caught:
        kind("", {"points": "\x1b[2J" * 100_000})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_a_json_file_is_read_as_it_is_or_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"x": 3}))
    assert read_json(path, POINT) == {"x": 3}
    with path.open("r+b") as file:
        file.truncate(LONGEST_FILE + 1)
    for name in (path, tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=f"^checkpoint: {name}: must be a file of at most 32 MiB$"):
            read_json(name, POINT)
