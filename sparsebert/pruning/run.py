"""One run of a pruning method: what it reports to, and the finished layers it can go on from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
from torch import nn

from sparsebert.encoders import Progress, encoder_linears, no_progress
from sparsebert.jobs import Job
from sparsebert.pruning.calibration import Batches
from sparsebert.pruning.stages import Stage, stages


class Run:
    """progress: told of every linear done. job: what finished layers are kept for; None: they are not kept."""

    def __init__(self, progress: Progress = no_progress, job: Job | None = None):
        self.progress, self.job = progress, job

    def part(self, what: str) -> Progress:
        """The progress of one part of the run."""
        return lambda done, total: self.progress(done, total, what)

    def stages(self, model, batches: Batches, **options) -> Iterator[Stage]:
        """`stages.stages`, which see, passing the layers that an earlier run of the same key has finished."""
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
        """The JSON document `compute` returns, or returned in an earlier run of the same job."""
        return compute() if self.job is None else self.job.value(name, compute)

    def _save(self, linears: dict[str, nn.Linear]) -> None:
        if self.job is not None:
            tensors = {f"{name}.{part}": p.detach() for name, m in linears.items() for part, p in m.named_parameters()}
            self.job.keep(_layer(linears), tensors)

    def _load(self, linears: dict[str, nn.Linear]) -> dict[str, torch.Tensor] | None:
        kept = None if self.job is None else self.job.kept(_layer(linears))
        return None if kept is None else kept[0]


def _layer(linears: dict[str, nn.Linear]) -> str:
    return os.path.commonpath([name.replace(".", "/") for name in linears]).replace("/", ".")
