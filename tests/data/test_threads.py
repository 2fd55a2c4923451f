"""One function over many items, in threads: in order, and over when it is interrupted."""

import itertools
import threading
import time

import pytest

from ffvt.data import threads
from ffvt.data.threads import each, each_ahead


def test_results_come_in_the_order_of_the_items(monkeypatch):
    monkeypatch.setattr(threads, "AT_ONCE", 3)
    assert list(each(lambda item: time.sleep(0.01 * (item % 3)) or item**2, range(10), "", 4)) == [
        i**2 for i in range(10)
    ]
    assert list(each(str, [], "")) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_or_an_interrupt_waits_only_for_what_has_begun(error):
    done, lock = [], threading.Lock()

    def work(item):
        time.sleep(0.01)
        with lock:
            done.append(item)
        return item

    def interrupted():
        for item in each(work, range(2000), "", 2):
            if item == 3:
                raise error

    with pytest.raises(error):
        interrupted()
    assert len(done) < 20


@pytest.mark.parametrize("workers", [0, 2])
def test_items_without_an_end_are_drawn_only_as_far_ahead_as_told(workers):
    drawn = itertools.count()
    found = each_ahead(lambda item: item**2, drawn, workers, ahead=5)
    assert [next(found) for _ in range(4)] == [0, 1, 4, 9]
    found.close()
    assert next(drawn) <= 4 + 5 + 1
