"""Benchmarks, run from the repository: `python -m bench.bench_<op>`."""

from sparsebert import environment

environment.cap_rivals()  # before anything imports torch
