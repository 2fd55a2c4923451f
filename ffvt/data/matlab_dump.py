"""Run as a program: a MATLAB file on standard input, variables named as arguments, as JSON on standard output.

A process of its own, as damaged files make SciPy's reader crash, and as it can be kept from taking all memory.
"""

from __future__ import annotations

import io
import json
import math
import resource
import sys
from typing import Any

MAX_MEMORY = 4 << 30  # bytes
MAX_CELLS = 10_000_000  # of one array


def main(names: list[str]) -> str:
    """The variables as plain lists. Exits with a message where they cannot be had."""
    import numpy as np
    from scipy.io import loadmat, whosmat

    def plain(value: Any) -> Any:
        if isinstance(value, np.void):
            return {name: plain(value[name]) for name in value.dtype.names}
        if not isinstance(value, np.ndarray):
            return value
        if value.dtype.names or value.dtype == object:
            return [plain(one) for one in value.ravel()]
        return value.ravel().tolist()

    content = io.BytesIO(sys.stdin.buffer.read())
    try:
        shapes = {name: shape for name, shape, _ in whosmat(content)}
        for name in names:
            if name not in shapes:
                sys.exit(f"must hold {name}; got {', '.join(shapes) or 'nothing'}")
            if math.prod(shapes[name]) > MAX_CELLS:
                sys.exit(f"must have at most {MAX_CELLS} entries in {name}; got {shapes[name]}")
        content.seek(0)
        found = loadmat(content, variable_names=names)
        return json.dumps({name: plain(found[name]) for name in names})
    except Exception as error:  # SciPy has many
        sys.exit(f"must be a MATLAB file; got {str(error) or type(error).__name__}")


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    print(main(sys.argv[1:]))
