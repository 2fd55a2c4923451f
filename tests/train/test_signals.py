"""Signals: noted while a run is in its steps, raised elsewhere, heeded by loading processes only from their parent."""

import os
import signal
import time

import pytest

from ffvt.train import signals
from ffvt.train.signals import Terminated, sigterm_raises, stop_on_signals
from tests.hostile.exits import ended, images, photographs, spoil, training
from tests.hostile.signals import in_training
from tests.processes import run


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_repeats_of_it_are_not_a_second_one(number):
    before = signal.getsignal(number)
    with stop_on_signals() as asked:
        assert not asked
        send(number, number)
        assert asked
        assert asked.signal == number
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)], ids=["SIGINT", "SIGTERM"]
)
def test_a_second_signal_ends_it_at_once(number, raised, monkeypatch):
    monkeypatch.setattr(signals, "SECOND", 0.01)
    with stop_on_signals() as asked:
        send(signal.SIGTERM)
        time.sleep(0.02)
        with pytest.raises(raised):
            send(number)
    assert asked.signal == signal.SIGTERM


def test_an_ignored_signal_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals() as asked:
            send(signal.SIGINT)
            assert not asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_raises_where_it_is_asked_for():
    with pytest.raises(Terminated), sigterm_raises():
        send(signal.SIGTERM)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_saves_and_ends_it(number, tmp_path):
    in_training(number, 1, True, tmp_path)


def test_loading_processes_end_with_an_error_of_the_run(tmp_path):
    photographs(tmp_path / "photos")
    spoil(*images(tmp_path, "train"))
    ended(run(training(tmp_path, workers=2), tmp_path), 1, "ffvt train: pictures must be readable; 10 in a row")
