"""Many items, one function, several threads: results in order, and soon over when it is interrupted."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

AT_ONCE = 4096  # items given to the threads at once, so that little waits in memory
DELAY = 2.0  # seconds before progress is shown

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Sequence[Item], title: str, threads: int = 0) -> Iterator[Result]:
    """function(item) of every item, in their order, computed by `threads` threads (0: one per CPU).

    On a terminal a progress bar called `title` appears after two seconds. An error of `function`, or whatever ends the
    loop early, waits for the items at hand only.
    """
    pool = ThreadPoolExecutor(threads or os.cpu_count())
    try:
        with tqdm(items, desc=title, unit="image", delay=DELAY, disable=not sys.stderr.isatty()) as progress:
            for start in range(0, len(items), AT_ONCE):
                for result in pool.map(function, items[start : start + AT_ONCE]):
                    progress.update()
                    yield result
    finally:
        pool.shutdown(cancel_futures=True)


def each_ahead(function: Callable[[Item], Result], items: Iterable[Item], threads: int, ahead: int) -> Iterator[Result]:
    """function(item) of every item, in their order, computed by `threads` threads (0: each when it is asked for).

    Items are drawn as they are needed: at most `ahead` + 1 of them wait or are computed, so there may be any number.
    A loop that ends early waits for the items at hand only.
    """
    if not threads:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(threads)
    waiting: deque[Future] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
