"""Benchmarks: `python -m pytest bench --benchmark-only`; their stored rows: `python -m bench.report`."""
