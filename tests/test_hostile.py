"""Hostile inputs and faults: each refused in one clear line, or survived."""

import pickle

import pytest

from tests.hostile import all_cases
from tests.hostile.basics import Touch
from tests.hostile.case import CannotBeTried, outcome

STRIDES = {  # of large groups, and of those whose cases each train, the quick tests run each so-manyth
    **dict.fromkeys(("run", "disk", "permissions", "concurrency", "report", "signals", "exits"), 4),
    **dict.fromkeys(("checkpoint", "resume"), 3),
    **dict.fromkeys(("lists", "pictures", "archives", "flags", "weights", "model"), 2),
}


def parameters():
    """Every case, and whether it is slow."""
    seen: dict[str, int] = {}
    for case in all_cases():
        number = seen[case.group] = seen.get(case.group, -1) + 1
        is_slow = case.slow or number % STRIDES.get(case.group, 1) != 0
        yield pytest.param(case, id=f"{case.group}-{case.name}", marks=[pytest.mark.slow] if is_slow else [])


@pytest.mark.parametrize("case", parameters())
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
