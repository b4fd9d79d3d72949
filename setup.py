"""Builds the compiled core; everything else about the package is in pyproject.toml."""

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

ROOT = Path(__file__).parent


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


# One binary for every CPU, so there is no -march here: each kernel sets its instruction set by a target pragma and is
# chosen at run time. The symbol table is kept (no -s): tests/test_build.py needs it to see which function holds which
# instructions.
core = Pybind11Extension(
    "sparsebert._C",
    sources("csrc/*/*.cpp"),
    depends=sources("csrc/**/*.h", "csrc/**/*.inl"),
    cxx_std=17,
    # Contraction turns a * b + c into one fused multiply-add; GCC's default depends on the language standard. psabi
    # warns about wide vectors passed by value; after inlining there are none.
    extra_compile_args=[
        "-O3",
        "-fvisibility=hidden",
        "-ffp-contract=fast",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-pthread",
    ],
    extra_link_args=["-pthread"],
)

ParallelCompile(default=0).install()
setup(ext_modules=[core])
