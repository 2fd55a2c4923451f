"""The operators and their backends. Start at `ops.py`."""
