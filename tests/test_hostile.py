"""Hostile inputs and faults: each refused in one clear line, or survived."""

import pickle

import pytest

from tests.hostile import all_cases
from tests.hostile.basics import Touch
from tests.hostile.case import CannotBeTried, outcome


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{case.group}-{case.name}", marks=[pytest.mark.slow] if case.slow else [])
        for case in all_cases()
    ],
)
def test_it_holds(case, tmp_path):
    (tmp_path / "own").mkdir()
    try:
        problem = outcome(case, tmp_path / "own")
    except CannotBeTried as reason:
        pytest.skip(str(reason))
    assert problem == ""


def test_the_pickles_would_do_something(tmp_path):
    pickle.loads(pickle.dumps(Touch(tmp_path / "escaped.txt")))
    assert (tmp_path / "escaped.txt").exists()
