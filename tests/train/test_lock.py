"""The lock of a run."""

import errno
import fcntl

import pytest

from ffvt.train.lock import only_writer


def test_a_lock_is_held_in_the_block_and_free_after_it_also_after_an_error(tmp_path):
    for _ in range(2):
        another = pytest.raises(ValueError, match=r"\.run\.lock must be free; another thread of this process")
        with only_writer(tmp_path / "run"), another:
            only_writer(tmp_path / "run").__enter__()
        with pytest.raises(KeyError), only_writer(tmp_path / "run"):
            raise KeyError
    assert (tmp_path / ".run.lock").read_bytes() == b""


def test_a_file_system_without_locks_is_no_other_process(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with pytest.raises(OSError, match=r"\.run\.lock cannot be locked: No locks available"):
        only_writer(tmp_path / "run").__enter__()
    monkeypatch.undo()
    with only_writer(tmp_path / "run"):  # the failed attempt left nothing
        pass
