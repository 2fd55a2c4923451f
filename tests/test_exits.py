"""Exit statuses, and the one line that says why."""

import errno
import os
import sys

import pytest

from ffvt.exits import explain, run_to_exit
from ffvt.train.signals import Terminated


def raising(error):
    def command():
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("train: seed must be known; got seed=1"), 1, "ffvt train: seed must be known; got seed=1"),
        (FileNotFoundError(2, "No such file", "a\x1b.jpg"), 1, r"ffvt train: [Errno 2] No such file: 'a\x1b.jpg'"),
        (OSError(errno.EMFILE, "Too many open files"), 1, "ffvt train: too many open files: raise the limit (ulimit"),
        (MemoryError(), 1, "ffvt train: out of memory: a smaller batch"),
        (RuntimeError("[enforce fail] can't allocate memory: 9 bytes\nframe"), 1, "ffvt train: out of memory"),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2_3>"),
            1,
            "ffvt train: no shared memory",
        ),
        (RuntimeError("[gloo] Connection closed by peer [::1]:9"), 1, "ffvt train: another rank has ended"),
        (ValueError("x" * 10**6), 1, "ffvt train: xxx"),
        (TypeError("export_model: model must be fp32; got torch.half"), 1, "ffvt train: export_model: model must be"),
        (KeyboardInterrupt(), 130, "ffvt train: interrupted"),
        (Terminated(), 143, "ffvt train: terminated"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_ends_with_its_status_and_one_line(error, status, said, capsys):
    assert run_to_exit(raising(error), "ffvt train") == status
    line = capsys.readouterr().err
    assert line.startswith(said)
    assert line.count("\n") == 1
    assert line.rstrip("\n").isprintable()
    assert len(line) < 500


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), RuntimeError("shapes differ"), TypeError("f() has no x"), AssertionError()],
    ids=repr,
)
def test_a_mistake_of_ours_keeps_its_trace(error):
    assert explain(error) is None
    with pytest.raises(type(error)):
        run_to_exit(raising(error), "ffvt train")


@pytest.mark.parametrize(
    ("rank", "of_rank", "said"),
    [
        ("0", None, "ffvt train: odd\n"),
        ("1", None, "ffvt train, rank 1: odd\n"),
        ("0", 1, "ffvt train, rank 1: odd\n"),  # every rank raises it, the main one tells
        ("1", 1, ""),
        ("1", 0, ""),
    ],
)
def test_an_error_of_all_ranks_is_told_once(rank, of_rank, said, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    error = ValueError("odd")
    if of_rank is not None:
        error.of_rank = of_rank
    assert run_to_exit(raising(error), "ffvt train") == 1
    assert capsys.readouterr().err == said


def test_a_pipe_that_nobody_reads_is_left_quietly_after_a_flush_too(monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert run_to_exit(lambda: print("a line", flush=True), "ffvt predict") == 141
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
