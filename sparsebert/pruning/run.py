"""One run of a pruning method: what it reports to, and the finished layers it can go on from."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from sparsebert.encoders import Progress, encoder_linears, no_progress
from sparsebert.errors import OutputError
from sparsebert.pruning.calibrate import Stage, stages
from sparsebert.pruning.calibration import Batches


class Run:
    """progress: told of every linear done. directory: where finished layers are kept (None: nowhere), each file marked
    with `key`; files of another key are written over.
    """

    def __init__(self, progress: Progress = no_progress, directory: Path | None = None, key: str = ""):
        self.progress, self.directory, self.key = progress, directory, key
        self._kept: set[Path] = set()  # this run's files, whoever else has some beside them

    def part(self, what: str) -> Progress:
        """The progress of one part of the run."""
        return lambda done, total: self.progress(done, total, what)

    def stages(self, model, batches: Batches, **options) -> Iterator[Stage]:
        """`calibrate.stages`, which see, passing the layers that an earlier run of the same key has finished."""
        progress = self.part("reconstruct")
        total, done = len(encoder_linears(model)), 0
        open_layer: list[dict[str, nn.Linear]] = []

        def close() -> None:
            if open_layer:
                self._save(open_layer.pop())

        def finished(linears: dict[str, nn.Linear]) -> bool:
            nonlocal done
            close()
            stored = self._load(linears)
            if stored is None:
                open_layer.append(linears)
                return False
            for name, module in linears.items():
                for part, tensor in module.named_parameters():
                    tensor.copy_(stored[f"{name}.{part}"])
            done += len(linears)
            progress(done, total)
            return True

        for stage in stages(model, batches, finished=finished, **options):
            if stage.head:
                close()
            yield stage
            if not stage.head:
                done += len(stage.linears)
                progress(done, total)
        close()

    def once(self, name: str, compute: Callable[[], dict]) -> dict:
        """The JSON document `compute` returns, or returned in an earlier run of the same key."""
        if self.directory is None:
            return compute()
        path = self.directory / f"{name}.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            if stored["key"] == self.key:
                self._kept.add(path)
                return stored["value"]
        except (OSError, ValueError, KeyError):
            pass  # not there yet, or cut short by a power loss
        value = compute()
        self._write(path, lambda fresh: fresh.write_text(json.dumps({"key": self.key, "value": value})))
        return value

    def discard(self) -> None:
        """Removes what is kept: the finished model has taken its place."""
        for path in self._kept:
            path.unlink(missing_ok=True)
        if self._kept:
            try:
                self.directory.rmdir()
            except OSError:
                pass  # not empty: files that are not ours

    def _path(self, linears: dict[str, nn.Linear]) -> Path:
        layer = os.path.commonpath([name.replace(".", "/") for name in linears])
        return self.directory / f"{layer.replace('/', '.')}.safetensors"

    def _save(self, linears: dict[str, nn.Linear]) -> None:
        if self.directory is None:
            return
        from safetensors.torch import save_file

        tensors = {
            f"{name}.{part}": tensor.detach() for name, m in linears.items() for part, tensor in m.named_parameters()
        }
        self._write(self._path(linears), lambda fresh: save_file(tensors, fresh, metadata={"key": self.key}))

    def _load(self, linears: dict[str, nn.Linear]) -> dict[str, torch.Tensor] | None:
        if self.directory is None:
            return None
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(linears), framework="pt") as stored:
                if (stored.metadata() or {}).get("key") != self.key:
                    return None
                self._kept.add(self._path(linears))
                return {name: stored.get_tensor(name) for name in stored.keys()}
        except (OSError, SafetensorError):
            return None  # not there yet, or cut short by a power loss: the layer is pruned again

    def _write(self, path: Path, write: Callable[[Path], object]) -> None:
        from safetensors import SafetensorError

        fresh = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(fresh)
            os.replace(fresh, path)
            self._kept.add(path)
        except (OSError, SafetensorError) as error:
            raise OutputError(f"finished layer {path} cannot be kept: {error}", fix="free space") from error
        finally:
            fresh.unlink(missing_ok=True)
