"""Benchmarks, run from the repository: `python -m bench.bench_<op>`."""

from importlib.util import find_spec
from pathlib import Path

import sparsebert
from sparsebert import environment

environment.cap_rivals()  # before anything imports torch
if find_spec("sparsebert.kernels") is None:  # a checkout that is not installed: the folder lies beside the package
    sparsebert.__path__.append(str(Path(__file__).resolve().parent.parent))
