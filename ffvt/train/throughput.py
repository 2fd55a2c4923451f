"""Images per second of a run."""

from __future__ import annotations

import time


class Throughput:
    """Counts images against the clock."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted: the time that evaluations take is not the trainer's."""
        self.since, self.images = time.perf_counter(), 0

    def count(self, images: int) -> None:
        """Adds images, of all ranks together."""
        self.images += images

    def take(self) -> float:
        """Images per second since the last restart; restarts."""
        rate = self.images / (time.perf_counter() - self.since)
        self.restart()
        return rate
