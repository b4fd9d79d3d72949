"""Builds the compiled core, and the CUDA kernels where nvcc is found; everything else about the package is in
pyproject.toml.
"""

import os
import shutil
import sysconfig
from pathlib import Path

import pybind11
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

ROOT = Path(__file__).parent


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


# One binary for every CPU, so there is no -march here: each kernel sets its instruction set by a target pragma and is
# chosen at run time. A build in place keeps the symbol table: tests/test_build.py needs it to see which function
# holds which instructions.
core = Pybind11Extension(
    "sparsebert._C",
    sources("csrc/bind/*.cpp", "csrc/cpu/*.cpp"),
    depends=sources("csrc/*.h", "csrc/bind/*.h", "csrc/cpu/**/*.h", "csrc/cpu/**/*.inl"),
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

# Code for A100 and H100/H200, and PTX for what comes after them. The runtime is linked in (nvcc's default), so that the
# module can be imported without a GPU. Stripped and compressed, as it counts in the install without torch.
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-Xlinker=-s",
    "-Xfatbin=-compress-all",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-unknown-pragmas",
]


def nvcc() -> str | None:
    """The CUDA compiler: the variable NVCC (empty for none), else the one on the PATH or in /usr/local/cuda."""
    named = os.environ.get("NVCC")
    return shutil.which(named if named is not None else "nvcc") or (
        shutil.which("/usr/local/cuda/bin/nvcc") if named is None else None
    )


class Build(build_ext):
    """Builds `sparsebert._cuda` by nvcc alone; the bindings, which hold no kernels, for size, which saves 190 kB; and
    wheels without the names of functions, which are 200 kB.
    """

    def build_extension(self, extension: Extension) -> None:
        if extension.name != "sparsebert._cuda":
            if not (self.inplace or self.editable_mode):
                extension.extra_link_args = [*extension.extra_link_args, "-s"]
            compiled = self.compiler._compile

            def _compile(to, source, suffix, arguments, flags, *rest):
                smaller = ["-Os"] if "csrc/bind/" in source else []
                return compiled(to, source, suffix, arguments, [*flags, *smaller], *rest)

            self.compiler._compile = _compile
            super().build_extension(extension)
            return
        target = Path(self.get_ext_fullpath(extension.name))
        if self.force or newer_group([*extension.sources, *extension.depends], str(target), "newer"):
            target.parent.mkdir(parents=True, exist_ok=True)
            include = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
            self.spawn(
                [nvcc(), *CUDA_FLAGS, *include, "--shared", "--threads=0", "-o", str(target), *extension.sources]
            )


# optional: if it does not compile, that is a warning, and `sparsebert doctor` says that it is missing.
cuda = Extension(
    "sparsebert._cuda",
    sources("csrc/cuda/*.cpp", "csrc/cuda/*.cu"),
    depends=sources("csrc/ops.h", "csrc/cuda/*.h"),
    optional=True,
)

if __name__ == "__main__":
    ParallelCompile(default=0).install()
    setup(ext_modules=[core, cuda] if nvcc() else [core], cmdclass={"build_ext": Build})
