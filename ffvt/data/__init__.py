"""Images in: data sets (`datasets.py`), transforms, and PartBirds, a set made from a seed."""
