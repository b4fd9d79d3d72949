"""Safetensors files: their header, their tensors in memory or mapped, and their content hash."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sparsebert.checkpoint.files import MIB, REBUILD, parse_json
from sparsebert.errors import CheckpointError, UnsupportedError, shown

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
    "BOOL": np.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One tensor's entry in a file's header. start: offset of its first byte, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(_DTYPES[self.dtype]).itemsize

    def array(self, data: np.ndarray) -> np.ndarray:
        """The tensor as a view of `data`, the bytes after the header, without a copy; bfloat16 as the stored uint16."""
        return data[self.start : self.start + self.bytes].view(_DTYPES[self.dtype]).reshape(self.shape)


class TensorFile:
    """An open safetensors file. Its header is checked against its length: every byte belongs to one tensor."""

    def __init__(self, file: BinaryIO, path: Path):
        self.path, self._file = path, file
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if not 2 <= length <= min(size - 8, 100 * MIB):
            self._fail("it ends within its header")
        header = parse_json(file.read(length), path)
        if not isinstance(header, dict):
            self._fail("its header must be an object")
        self._begin, self._size = 8 + length, size - 8 - length
        header.pop("__metadata__", None)
        self.entries = {name: self._entry(name, header[name]) for name in sorted(header)}
        at = 0
        for entry in sorted(self.entries.values(), key=lambda e: (e.start, e.bytes)):
            if entry.start != at:
                self._fail(f"tensors must be contiguous, one begins at {entry.start}, not {at}")
            at += entry.bytes
        if at != self._size:
            self._fail(f"its tensors have {at} bytes, it has {self._size}")

    def __del__(self):
        self._file.close()

    def _entry(self, name: str, found: object) -> Entry:
        try:
            dtype, shape, (start, end) = found["dtype"], found["shape"], found["data_offsets"]
            numbers = [*shape, start, end]
            if not isinstance(dtype, str) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
                raise TypeError
        except (TypeError, KeyError, ValueError):
            self._fail(f"its header says of tensor {shown(name)}: {shown(found)}")
        if dtype not in _DTYPES:
            raise UnsupportedError(
                f"{self.path}: tensor {name} must have a dtype of {', '.join(_DTYPES)}, has {shown(dtype)}",
                fix="save the model in float32",
            )
        entry = Entry(dtype, tuple(shape), start)
        if end - start != entry.bytes:
            self._fail(f"tensor {name} {dtype} {shape} must have {entry.bytes} bytes, has {end - start}")
        return entry

    def _fail(self, why: str) -> None:
        raise CheckpointError(f"{self.path} must be a whole safetensors file: {why}", fix=REBUILD)

    def read(self) -> np.ndarray:
        """All bytes after the header, uint8, in memory, so that the bytes that were checked are the bytes that are
        used.
        """
        data = np.empty(self._size, np.uint8)
        self._file.seek(self._begin)
        done = 0
        while done < self._size:
            count = self._file.readinto(memoryview(data)[done:])
            if not count:
                self._fail("it became shorter while it was read")
            done += count
        return data


def mapped_arrays(path: Path) -> dict[str, np.ndarray]:
    """The tensors of any safetensors file as read-only memory-mapped arrays; bfloat16 is converted to float32, in
    memory. Raises CheckpointError if the file is incomplete.
    """
    with open(path, "rb", buffering=0) as file:
        opened = TensorFile(file, path)
        mapped = (
            np.memmap(file, dtype=np.uint8, mode="r", offset=0)[opened._begin :]
            if opened._size
            else np.empty(0, np.uint8)
        )
    return {name: as_float(entry, mapped) for name, entry in opened.entries.items()}


def as_float(entry: Entry, data: np.ndarray) -> np.ndarray:
    """The tensor; bfloat16 is converted to float32, any other dtype is left unchanged, without a copy."""
    array = entry.array(data)
    return (array.astype(np.uint32) << 16).view(np.float32) if entry.dtype == "BF16" else array


def table_of(file: TensorFile, data: np.ndarray) -> dict[str, dict]:
    """Name -> dtype, shape, non-zeros and sha256 of every tensor, as in a manifest."""
    return {
        name: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "nnz": int(np.count_nonzero(as_float(entry, data))),
            "sha256": sha256_of(entry, data),
        }
        for name, entry in file.entries.items()
    }


def sha256_of(entry: Entry, data: np.ndarray) -> str:
    return hashlib.sha256(data[entry.start : entry.start + entry.bytes]).hexdigest()


def content_sha256(table: dict[str, dict]) -> str:
    """Content hash over every tensor's name, dtype, shape and bytes; independent of the files' layout."""
    lines = [f"{name} {t['dtype']} {list(t['shape'])} {t['sha256']}\n" for name, t in sorted(table.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
