"""`python -m ffvt.train <flags>`, alone or as `torchrun ... -m ffvt.train <flags>`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from ffvt.train.engine import TrainResult, train
from ffvt.train.options import parse_training_flags

# What bad input, missing extras, a full disk or a diverged run raise; anything else is our mistake and shows its trace.
USAGE_ERRORS = (ValueError, OSError, ImportError, FloatingPointError)


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ffvt.train") -> int:
    """Trains by the flags given; exit status 0, or 1 with a message on bad input."""
    options = parse_training_flags(arguments, prog)
    is_main = os.environ.get("RANK", "0") == "0"  # the other ranks that torchrun started stay silent
    logging.basicConfig(level=logging.INFO if is_main else logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        result = train(options)
    except USAGE_ERRORS as error:
        if is_main:
            print(f"{prog}: {error}", file=sys.stderr)
        elif not getattr(error, "told_by_main", False):
            print(f"{prog}, rank {os.environ['RANK']}: {error}", file=sys.stderr)
        return 1
    if is_main:
        print(summary(result))
    return 0


def summary(result: TrainResult) -> str:
    """What a run ended with, for a reader."""
    end = f"{result.seconds:.0f} s; {result.folder}"
    if result.stopped is not None:
        return f"stopped at step {result.stopped}, --resume auto goes on; {end}"
    last, best = result.last, result.best
    return (
        f"last: top-1 {last.top1:.4f}, top-5 {last.top5:.4f}, loss {last.loss:.4f} on {last.count} images; "
        f"best (chosen on {result.chosen_on}): top-1 {best.top1:.4f}; {end}"
    )


if __name__ == "__main__":
    sys.exit(main())
