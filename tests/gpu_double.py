"""A double of a GPU for machines without one: tensors that say they are on `cuda:0`, and compute on the CPU.

Inside `as_gpu` the device can be used as a real one: factories and `.to` make such tensors, and a plain tensor that
meets one is refused, as torch refuses tensors of two devices. `waits` counts what the host would wait for.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from sparsebert import machine
from sparsebert.kernels import masked_lstsq as lstsq
from sparsebert.ops import masked_matmul as matmul_op
from sparsebert.ops import obs_prune as obs_op

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# Ops whose result's shape, or whose error, depends on the values: the host waits for them.
WAITED = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.unique_dim.default, aten._unique2.default,
    aten.masked_select.default, aten.equal.default, aten._linalg_check_errors.default,
}  # fmt: skip
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
MIXED = {aten.copy_.default, *INDEXING}  # their arguments may be on several devices

waits: Counter[str] = Counter()


class OnGpu(torch.Tensor):
    """A tensor on the double; `own` is what it computes with. To Python it is on `cuda:0`; torch's C++, which may lack
    such a device, is not told.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl
    device, is_cuda, is_cpu = GPU, True, False

    @staticmethod
    def __new__(cls, own: torch.Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, own.shape, strides=own.stride(), storage_offset=own.storage_offset(), dtype=own.dtype
        )
        made.own = own
        return made

    def data_ptr(self) -> int:
        return self.own.data_ptr()

    def __deepcopy__(self, memo) -> OnGpu:
        made = OnGpu(self.own.detach().clone())
        made = torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made
        return memo.setdefault(id(self), made)

    def __repr__(self, **_options) -> str:
        return f"OnGpu({self.own!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if torch.is_inference_mode_enabled():  # in which a view of such a tensor could not be made
            with torch.inference_mode(False), torch.no_grad():
                return func(*args, **kwargs or {})
        if func in INDEXING:  # only the indices may be on the CPU while the others are on a GPU
            array, indices, *values = args[:3]
            on_gpu = isinstance(array, OnGpu)
            others = [part for part in values if isinstance(part, torch.Tensor) and part.ndim]
            if any(isinstance(part, OnGpu) != on_gpu for part in others) or (
                not on_gpu and any(isinstance(part, OnGpu) for part in indices)
            ):
                raise RuntimeError(f"{func}: tensors on cuda:0 and on the CPU")
        given: dict[int, OnGpu] = {}

        def take(value):
            if isinstance(value, OnGpu):
                given[id(value.own)] = value
                return value.own
            if isinstance(value, torch.Tensor) and value.ndim and func not in MIXED:
                raise RuntimeError(f"{func}: tensors on cuda:0 and on the CPU")
            return value

        def give(value):
            if not isinstance(value, torch.Tensor) or isinstance(value, OnGpu):
                return value
            return given[id(value)] if id(value) in given else OnGpu(value)

        own_args, own_kwargs = tree_map(take, (args, kwargs or {}))
        if func is aten.copy_.default and not isinstance(args[0], OnGpu):
            waits["copied to the host"] += 1
            args[0].copy_(own_args[1])
            return args[0]
        by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in WAITED or by_mask:
            waits[str(func)] += 1
        found = func(*own_args, **own_kwargs)
        return found if func is aten._local_scalar_dense.default else tree_map(give, found)


class _Places(TorchFunctionMode):
    """Puts tensors on the double, and takes them from it, where torch's functions are asked to."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        on_gpu = bool(args) and isinstance(args[0], OnGpu)
        if on_gpu and func in (torch.Tensor.tolist, torch.Tensor.cpu):
            waits["copied to the host"] += 1
            own = to_cpu(args[0])
            return own.tolist() if func is torch.Tensor.tolist else own
        if on_gpu and func is torch.Tensor.__format__:
            return format(args[0].item(), args[1])
        if func is torch.Tensor.to:
            tensor, *rest = [*args, *kwargs.values()]
            where = [part for part in rest if isinstance(part, (str, torch.device))]
            for dtype in (part for part in rest if isinstance(part, torch.dtype)):
                tensor = tensor.to(dtype)
            if where and on_gpu and torch.device(where[0]).type == "cpu":
                waits["copied to the host"] += 1
                return to_cpu(tensor)
            return to_gpu(tensor.detach()) if where and not on_gpu and torch.device(where[0]) == GPU else tensor
        if kwargs.get("device") is not None and torch.device(kwargs["device"]) == GPU:
            made = func(*args, **kwargs | {"device": "cpu"})
            return made if isinstance(made, OnGpu) else OnGpu(made)
        return func(*args, **kwargs)


@contextmanager
def as_gpu() -> Iterator[Counter[str]]:
    """A context in which the double can be used, and is the GPU that `machine.require_device` finds. In place of the
    kernels in Triton and CUDA, which do not run on it, the ops compute on the CPU. Yields `waits`, which it empties.
    """
    waits.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "require_device", lambda: GPU)
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "double")
        patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1))
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
        patch.setattr(lstsq, "cuda_core", lambda: _Core)
        patch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "device_of", lambda tensor: nullcontext())
        patch.setattr(obs_op, "_kernel", lambda: _OfObs)
        patch.setattr(matmul_op, "_kernel", lambda: _OfMatmul)
        # nn.Module.to makes new parameters: those of one kind of tensor do not become those of the other.
        patch.setattr(torch, "_has_compatible_shallow_copy_type", lambda before, after: False)
        with _Places():
            yield waits


@contextmanager
def as_real_gpu() -> Iterator[Counter[str]]:
    """A context in which `to_gpu` puts tensors on a real GPU. What it yields stays empty: nothing is counted there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(_REAL, "gpu", True)
        yield Counter()


_REAL = {"gpu": False}


def to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cuda() if _REAL["gpu"] else OnGpu(tensor.clone())


def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, which is not counted."""
    return tensor.own.detach().clone() if isinstance(tensor, OnGpu) else tensor.cpu()


class _Core:
    """The compiled CUDA kernels: takes the addresses that they are given, and checks the groups."""

    @staticmethod
    def masked_lstsq_work(k, g, count):
        return 1

    @staticmethod
    def masked_lstsq(*, target, h, n_in, mask, row_ptr, rows, count, complement, k, g, work, v, failed, stream):
        row_ptr = _at(row_ptr, np.int64, count + 1)
        rows = _at(rows, np.int32, row_ptr[-1])
        size = int(rows.max()) + 1
        target, v = (_at(part, np.float64, size, n_in) for part in (target, v))
        h, mask, failed = _at(h, np.float64, n_in, n_in), _at(mask, np.bool_, size, n_in), _at(failed, np.int64, count)
        if not complement:
            h = np.triu(h) + np.triu(h, 1).T
        for group in range(count):
            own = rows[row_ptr[group] : row_ptr[group + 1]]
            kept = mask[own[0]]
            solved = ~kept if complement else kept
            assert (mask[own] == kept).all() and len(own) <= g and solved.sum() <= k
            system = torch.from_numpy(h[np.ix_(solved, solved)])
            factor, info = torch.linalg.cholesky_ex(system)
            failed[group] = int(info) - 1
            if info:
                continue
            found = torch.cholesky_solve(torch.from_numpy(target[own][:, solved].T.copy()), factor).numpy().T
            if complement:
                v[own] = np.where(kept, target[own] - found @ h[solved], 0.0)
            else:
                v[np.ix_(own, np.flatnonzero(kept))] = found


def _at(address: int, dtype, *shape: int) -> np.ndarray:
    count = int(np.prod(shape))
    memory = (ctypes.c_char * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(memory, dtype, count).reshape(shape)


class _OfObs:
    @staticmethod
    def removals(*arguments):
        from sparsebert.kernels.obs_prune import removals  # imports Triton

        return removals(*arguments)

    @staticmethod
    def obs_sweep(weight, u, pattern, sparsity, block):
        return OnGpu(obs_op._sweep(weight.own, u.own, pattern, sparsity, block, threads=1, isa="scalar"))


class _OfMatmul:
    @staticmethod
    def masked_matmul(x, *others):
        assert x.ndim == 2 and x.is_contiguous()
        return OnGpu(matmul_op._forward(*_own(x, *others), "", 0))

    @staticmethod
    def masked_matmul_backward(dy, x, weight, scores, threshold, needed):
        assert dy.is_contiguous() and x.is_contiguous() and isinstance(needed, tuple)
        found = matmul_op._backward(*_own(dy, x, weight, scores, threshold), list(needed), "", 0)
        return [OnGpu(part) for part in found]


def _own(*tensors):
    return [None if tensor is None else tensor.own.detach() for tensor in tensors]
