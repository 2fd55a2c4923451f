"""The operators and their backends. Start at `ops.py`."""

import torch  # noqa: F401  before any module here: importing it registers the operators, see ffvt/__init__.py
