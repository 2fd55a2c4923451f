"""How far something is: a bar on a terminal, elsewhere a line now and then, both on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

SECONDS = 30  # between two lines


class Progress:
    """Counts to `total`.

    Args:
        total: how much there is; None where nobody knows.
        what: what is done, in a word.
        enabled: False on all ranks but the main one.
        unit: what is counted.
    """

    def __init__(self, total: int | None, what: str, enabled: bool = True, unit: str = "images") -> None:
        self.total, self.what, self.enabled, self.unit = total, what, enabled, unit
        self.done, self.start = 0, time.monotonic()
        self.said = self.start
        shown = enabled and sys.stderr.isatty()
        self.bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False, disable=not shown, file=sys.stderr)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.close()

    def advance(self, count: int = 1) -> None:
        """`count` more are done."""
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.enabled and self.bar.disable and now - self.said >= SECONDS:
            self.said = now
            of = "" if self.total is None else f" of {self.total}"
            rate = self.done / (now - self.start)
            print(f"{self.what}: {self.done}{of} {self.unit}, {rate:.3g} a second", file=sys.stderr, flush=True)
