"""Memory that a hostile input may take."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ALLOWED = 768 << 20  # bytes beside what the process has; the bombs ask for gigabytes


@contextmanager
def frugal(allowed: int = ALLOWED) -> Iterator[None]:
    """Inside, the process gets no more than `allowed` bytes of new address space: what asks for more fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + allowed, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
