"""Training: `python -m ffvt.train`, alone or under torchrun. Start at `engine.py`."""
