"""The staged pass over a classifier: what each group of linears sees in the half-pruned model, and what the dense model
gave there.

A *stage* is the linears that share one input (for a BERT layer: query, key and value | attention output | intermediate
| output; then pooler | classifier). The pass visits stages in the order of execution. Every batch runs twice, once
dense and once through the linears as they have been changed so far, and each run stops at each stage until all batches
have reached it: two forward passes in all, each linear evaluated once a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from sparsebert.encoders import encoder_layers, layers_skipped
from sparsebert.errors import InputError
from sparsebert.ops.gram import Moments, gram
from sparsebert.pruning.calibration import Batches

# A linear's full name -> the weight of every token, float32 [sequences, length] for each batch; absent: 1 each.
TokenWeights = dict[str, list[torch.Tensor]]
Affine = tuple[torch.Tensor, torch.Tensor | None]  # (weight, bias) of a linear


@dataclass(frozen=True, eq=False)
class Stage:
    """Linears that share one input, and its moments.

    linears: by full name, as they are in the model. dense: what each was in the dense model. moments: of the input x̂
    in the half-pruned model; their y is the outputs of all these linears in the dense model, at `targets`, or (None)
    the dense model's input. examples: behind the encoder, where nothing is pruned, x̂ and y of every text, float32
    [texts, width]; else None.
    """

    linears: dict[str, nn.Linear]
    dense: dict[str, Affine]
    moments: Moments
    targets: dict[str, slice] | None
    examples: tuple[torch.Tensor, torch.Tensor] | None

    @property
    def head(self) -> bool:
        """Whether these linears are behind the encoder."""
        return self.examples is not None

    def cross(self, name: str) -> torch.Tensor:
        """[n_out, n_in] float64, mean of (y - mean_y)(x̂ - mean_x)ᵀ, y the dense model's output of that linear."""
        if self.targets is not None:
            return self.moments.cross[self.targets[name]]
        return self.dense[name][0].double() @ self.moments.cross

    def mean_y(self, name: str) -> torch.Tensor:
        """[n_out] float64, mean of the dense model's output."""
        if self.targets is not None:
            return self.moments.mean_y[self.targets[name]]
        weight, bias = self.dense[name]
        mean = weight.double() @ self.moments.mean_y
        return mean if bias is None else mean + bias.double()


class _Steps(greenlet):
    """The forward pass of a walk."""


class Walk:
    """One batch on its way through a part of the model, standing still at each linear: there `linear` and its input
    `x`, at the end `output`.
    """

    def __init__(self, run: Callable[[], torch.Tensor]):
        self.linear: nn.Linear | None = None
        self.x: torch.Tensor | None = None
        self.output: torch.Tensor | None = None
        self._steps = _Steps(run)
        self._stand(self._steps.switch())

    def go_on(self, y: torch.Tensor) -> None:
        """Lets the linear give `y`."""
        self._stand(self._steps.switch(y))

    def cross_stage(self, affine: dict[nn.Linear, Affine]) -> None:
        """Goes through the linears of one stage, as they are given here."""
        for _ in affine:
            self.go_on(nn.functional.linear(self.x, *affine[self.linear]))

    def _stand(self, reached) -> None:
        if self._steps.dead:
            self.linear, self.x, self.output = None, None, reached
        else:
            self.linear, self.x = reached


@torch.no_grad()
def stages(
    model,
    batches: Batches,
    *,
    weights: TokenWeights | None = None,
    sparse_inputs: bool = True,
    heads: bool = False,
    padding: bool = False,
    finished: Callable[[dict[str, nn.Linear]], bool] = lambda linears: False,
) -> Iterator[Stage]:
    """Yields the stages of the encoder, then those of the head where `heads`. The caller may change the linears'
    weights before it goes on. Linears of one stage whose tokens are weighted differently come as stages of their own.

    batches: token batches without padding. The model must be in eval mode.
    sparse_inputs: False measures the dense model's inputs (x̂ = x), whatever the caller changes.
    padding: True counts padding as tokens and runs the half-pruned model under the last batch's attention mask, as the
    released code of Li et al. 2023 does. finished: asked with the linears of each layer before its stages; it may give
    them their weights and return True, and the layer is passed without stages.
    Memory: both runs' hidden states and the half-pruned run's widest input, float32, for all calibration tokens.
    Raises InputError for padded batches, and naming the linears for inputs that are not finite.
    """
    if not padding and any("attention_mask" in batch and not batch["attention_mask"].all() for batch in batches):
        raise InputError("calibration batches must have no padding", fix="make them with sparsebert.pruning.draw")
    names = {module: name for name, module in model.named_modules()}
    layers = encoder_layers(model)
    calls = [_first_layer_call(model, layers[0], batch) for batch in batches]
    arguments = [rest for _, rest in calls]
    dense = [hidden for hidden, _ in calls]
    runs = Runs(dense, list(dense) if sparse_inputs else None)
    for layer in layers:
        linears = {names[m]: m for m in layer.modules() if isinstance(m, nn.Linear)}

        def run(hidden, i, layer=layer):
            return _run(layer, hidden, arguments[i])

        def run_sparse(hidden, i, run=run):
            return run(hidden, -1 if padding else i)

        dense_affine = {module: _affine(module) for module in linears.values()}
        if finished(linears):
            if runs.sparse is not None:
                runs.sparse = [run_sparse(hidden, i) for i, hidden in enumerate(runs.sparse)]
            sparse_affine = {module: _affine(module) for module in linears.values()}
            _set(dense_affine)
            runs.dense = [run(hidden, i) for i, hidden in enumerate(runs.dense)]
            _set(sparse_affine)
        else:
            yield from _walk(linears, run, run_sparse, runs, weights or {}, head=False)
    if heads:
        inside = {module for layer in layers for module in layer.modules()}
        linears = {name: m for m, name in names.items() if isinstance(m, nn.Linear) and m not in inside}
        encoded = [None]

        def run_head(hidden, i):
            encoded[0] = hidden
            return model(**batches[i]).logits

        # A walk is past the encoder when it first stands still, so the skipping ends with the starts.
        start = layers_skipped(layers, encoded)
        yield from _walk(linears, run_head, run_head, runs, weights or {}, head=True, starting=start)


@dataclass
class Runs:
    """The hidden states of every batch, of the dense run and of the half-pruned one (None: there is only one run)."""

    dense: list[torch.Tensor]
    sparse: list[torch.Tensor] | None


def _walk(
    linears: dict[str, nn.Linear], run, run_sparse, runs: Runs, weights: TokenWeights, *, head: bool, starting=None
) -> Iterator[Stage]:
    """Takes both runs through one part of the model, stage by stage."""
    names = {module: name for name, module in linears.items()}

    def start(run, hidden: list[torch.Tensor]) -> list[Walk]:
        walks = [Walk(lambda h=h, i=i: run(h, i)) for i, h in enumerate(hidden)]
        hidden.clear()
        return walks

    with _standing_still(linears.values()):
        with starting or nullcontext():
            order = _order(Walk(lambda: run(runs.dense[-1], -1)))
            dense = start(run, runs.dense)
            sparse = None if runs.sparse is None else start(run_sparse, runs.sparse)
        behind: dict[nn.Linear, Affine] = {}  # the stage that the dense run has yet to cross
        crossed: dict[nn.Linear, Affine] = {}  # and the half-pruned one
        for modules in order:
            affine = {module: _affine(module) for module in modules}
            # The cross moments need the outputs; where these are wider than the inputs, the inputs do: C = W S.
            narrow = head or sum(m.out_features for m in modules) < modules[0].in_features
            classes: dict[int, list[nn.Linear]] = {}
            for module in modules:
                classes.setdefault(id(weights.get(names[module])), []).append(module)
            moments: dict[int, Moments] = {}
            examples: list[tuple[torch.Tensor, torch.Tensor]] = []
            for i, walk in enumerate(dense):
                if behind:
                    walk.cross_stage(behind)
                if sparse is not None and crossed:
                    sparse[i].cross_stage(crossed)
                x = walk.x if sparse is None else sparse[i].x
                y = torch.cat([nn.functional.linear(walk.x, *affine[m]) for m in modules], -1) if narrow else walk.x
                for key, members in classes.items():
                    token_weights = weights.get(names[members[0]])
                    moments[key] = _add(
                        moments.get(key), x, y, None if token_weights is None else token_weights[i],
                        [names[m] for m in members],
                    )  # fmt: skip
                if head:
                    examples.append((x.flatten(0, -2), y.flatten(0, -2)))
                if narrow:  # the outputs are there already, and the wide inputs need not wait
                    for part in y.split([m.out_features for m in modules], -1):
                        walk.go_on(part)
            ends = torch.tensor([0, *(m.out_features for m in modules)]).cumsum(0).tolist()
            slices = {names[m]: slice(*ends[i : i + 2]) for i, m in enumerate(modules)}
            for key, members in classes.items():
                yield Stage(
                    linears={names[m]: m for m in members},
                    dense={names[m]: affine[m] for m in members},
                    moments=moments.pop(key),
                    targets=slices if narrow else None,
                    examples=tuple(map(torch.cat, zip(*examples, strict=True))) if head else None,
                )
            behind = {} if narrow else affine
            crossed = {module: _affine(module, copy=False) for module in modules}
        for walk in dense:
            if behind:
                walk.cross_stage(behind)
            runs.dense.append(walk.output)
        for walk in sparse or ():
            walk.cross_stage(crossed)
            runs.sparse.append(walk.output)


def _add(moments: Moments | None, x, y, weights, names) -> Moments | None:
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if weights is not None:
        weights = weights.reshape(-1)
        if len(weights) != len(x):  # behind the encoder only the first token of each sequence is left
            raise InputError(f"weights of {names} must be one a token, got {len(weights)} of {len(x)}", fix="drop them")
        some = weights > 0
        if not some.all():
            x, y, weights = x[some], y[some], weights[some]
        if not len(x):
            return moments
    try:
        return gram(x.contiguous(), y.contiguous(), weights, into=moments)
    except InputError as error:
        raise InputError(
            f"calibration inputs of {', '.join(names)}: {error.problem}", fix="check the model's weights"
        ) from error


def _order(walk: Walk) -> list[list[nn.Linear]]:
    """The linears in the order they are reached, those that are given the same tensor together."""
    order, x = [], None
    while walk.linear is not None:
        if walk.x is not x:
            order.append([])
            x = walk.x
        order[-1].append(walk.linear)
        walk.go_on(nn.functional.linear(walk.x, walk.linear.weight, walk.linear.bias))
    return order


@contextmanager
def _standing_still(linears) -> Iterator[None]:
    """While it lasts, each linear that a walk reaches hands its input to the walk's owner and takes its output from
    there. Outside walks they work as ever: the caller of `stages` may run the model.
    """

    def stand(module):
        def forward(x):
            here = getcurrent()
            if isinstance(here, _Steps):
                return here.parent.switch((module, x))
            return nn.functional.linear(x, module.weight, module.bias)

        return forward

    for module in linears:
        module.forward = stand(module)
    try:
        yield
    finally:
        for module in linears:
            del module.forward


def _affine(module: nn.Linear, *, copy: bool = True) -> Affine:
    parts = (module.weight.detach(), None if module.bias is None else module.bias.detach())
    return tuple(None if part is None else part.clone() for part in parts) if copy else parts


def _set(affine: dict[nn.Linear, Affine]) -> None:
    for module, (weight, bias) in affine.items():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)


class Stopped(Exception):
    """Raised inside a forward pass that has shown what it was run for."""


def _first_layer_call(model, layer: nn.Module, batch: dict[str, torch.Tensor]):
    """(hidden states, the other arguments) with which the model calls its first layer."""
    caught = []

    def catch(_module, args, kwargs):
        caught.append((args[0], (args[1:], kwargs)))
        raise Stopped

    handle = layer.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        model(**batch)
    except Stopped:
        pass
    finally:
        handle.remove()
    return caught[0]


def _run(layer: nn.Module, hidden: torch.Tensor, rest) -> torch.Tensor:
    args, kwargs = rest
    out = layer(hidden, *args, **kwargs)
    return out[0] if isinstance(out, tuple) else out
