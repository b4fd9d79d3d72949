"""One run of a pruning method: its progress callback, and the finished layers that it can continue from."""

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
    """One run. progress: called after every linear. job: keeps the finished layers; None: they are not kept."""

    def __init__(self, progress: Progress = no_progress, job: Job | None = None):
        self.progress, self.job = progress, job

    def part(self, what: str) -> Progress:
        """The progress callback of one part of the run."""
        return lambda done, total: self.progress(done, total, what)

    def stages(self, model, batches: Batches, **options) -> Iterator[Stage]:
        """Yields the stages of `stages.stages`; the options are explained there. Layers that are kept in the job are
        already finished: they get their stored weights and are passed without stages.
        """
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
        """The JSON document that `compute` returns; if the job has already kept it, it is not computed again."""
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
