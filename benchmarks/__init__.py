"""Benchmarks of ffvt against its rivals. Start at `bench_model.py`; `report.py` puts the results into docs/*.md."""
