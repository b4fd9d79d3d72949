"""Benchmarks, run from the repository: `python -m bench.bench_<op>`."""
