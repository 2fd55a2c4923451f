"""Images per second of a run."""

import time

from ffvt.train.throughput import Throughput


def test_images_are_counted_against_the_clock_and_forgotten(monkeypatch):
    clock = iter([10.0, 12.0, 12.0, 20.0, 24.0, 24.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    throughput = Throughput()  # at 10
    throughput.count(3)
    throughput.count(5)
    assert throughput.take() == 8 / 2  # at 12
    throughput.count(7)
    throughput.restart()  # at 20: what came before does not count
    throughput.count(6)
    assert throughput.take() == 6 / 4
