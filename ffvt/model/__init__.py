"""The model, its configuration, its weights. Start at `ffvt.py`."""
