"""Loading in processes of their own gives the batches, and the errors, of loading in this one."""

import multiprocessing
import pickle

import pytest
import torch
from torch.utils.data import default_collate

from ffvt.exits import explain
from ffvt.train.loading import _receive, loading


class Odd(Exception):
    """Cannot be made again from what pickle keeps."""

    def __init__(self, one, two):
        super().__init__(f"odd {one} {two}")


class Numbers:
    def __init__(self, error=None):
        self.error = error

    def __len__(self):
        return 6

    def __getitem__(self, index):
        if index == 4 and self.error is not None:
            raise self.error
        return torch.full((3,), float(index))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_batches_come_in_order(workers):
    with loading(Numbers(), default_collate, workers, batch_size=2) as batches:
        assert [batch[:, 0].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_is_the_same_with_and_without_processes(workers):
    error = FileNotFoundError(2, "No such file or directory", "gone.png")
    with (
        pytest.raises(FileNotFoundError, match=r"^\[Errno 2\] No such file or directory: 'gone.png'$"),
        loading(Numbers(error), default_collate, workers, batch_size=2) as batches,
    ):
        list(batches)
    assert not multiprocessing.active_children()


def test_an_error_that_cannot_be_sent_says_what_it_said():
    with (
        pytest.raises(RuntimeError, match="^Odd: odd 1 2$") as raised,
        loading(Numbers(Odd(1, 2)), default_collate, 1, batch_size=2) as batches,
    ):
        list(batches)
    assert "in __getitem__" in str(raised.value.__cause__)


def test_the_processes_end_with_the_block():
    with loading(Numbers(), default_collate, 2, batch_size=2) as batches:
        next(batches)
        assert len(multiprocessing.active_children()) == 2
    assert not multiprocessing.active_children()


def raise_reset():
    raise ConnectionResetError(104, "Connection reset by peer")


class Reset:
    """Meets a dead process when it is unpickled."""

    def __reduce__(self):
        return raise_reset, ()


def test_a_process_that_dies_with_its_batch_is_said_to_have_died():
    failure = _receive(pickle.dumps(Reset()))
    assert "loading process exited" in str(failure.error)
    assert "--workers 0" in explain(failure.error)
