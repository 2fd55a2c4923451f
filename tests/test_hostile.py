"""Hostile inputs: refused by name, without side effects."""

import pytest

from tests.hostile import HOSTILE, Touch, refused


@pytest.mark.parametrize("name", HOSTILE)
def test_it_is_refused(name, tmp_path):
    (tmp_path / "own").mkdir()
    assert refused(name, tmp_path / "own")


def test_the_pickles_would_do_something(tmp_path):
    import pickle

    pickle.loads(pickle.dumps(Touch(tmp_path / "escaped.txt")))
    assert (tmp_path / "escaped.txt").exists()
