"""The staged pass over a classifier: for each stage, the inputs in the half-pruned model, and the outputs in the dense
model.

A *stage* is the linears that share one input (for a BERT layer: query, key and value | attention output | intermediate
| output; then pooler | classifier). The pass visits stages in the order of execution. Every batch goes through the
dense model once and through the half-pruned model once. It waits at each stage until all batches have arrived. There
are two forward passes in total, and each linear is evaluated once per pass.

A batch waits in the middle of the model's own forward function, with its residuals and masks in local variables there.
Each batch therefore runs in a greenlet, which stops inside the call of a linear and goes on later. Hooks alone would
have to run a layer from its start for each of its four stages. Threads could wait in the same way, but there would be
one for every batch, and only one of them may run at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from greenlet import getcurrent, greenlet
from torch import nn

from sparsebert.encoders import encoder_layers, forwards_replaced, head_linears, layers_skipped, moved
from sparsebert.errors import InputError
from sparsebert.ops.gram import Moments, gram
from sparsebert.pruning.calibration import Batches

# A linear's full name -> the weight of every token, float32 [sequences, length] for each batch, on the CPU; absent: 1
# each.
TokenWeights = dict[str, list[torch.Tensor]]
Affine = tuple[torch.Tensor, torch.Tensor | None]  # (weight, bias) of a linear
Rounding = Callable[[nn.Linear, torch.Tensor], torch.Tensor]  # a linear and its input -> what it is multiplied with


@dataclass(frozen=True, eq=False)
class Stage:
    """Linears that share one input, and its moments.

    linears: the model's modules, by full name. dense: the weight and bias of each in the dense model. moments: of the
    input x̂ in the half-pruned model, together with y. y: the outputs of all these linears in the dense model;
    `targets` has the slice of each linear. If targets is None, y is their input in the dense model. examples: for the
    head, where nothing is pruned, x̂ and y of every text, float32 [texts, width]; else None. sample: x̂ of some tokens,
    spread over all texts, float32 [tokens, n_in]; None if none were asked for.
    """

    linears: dict[str, nn.Linear]
    dense: dict[str, Affine]
    moments: Moments
    targets: dict[str, slice] | None
    examples: tuple[torch.Tensor, torch.Tensor] | None
    sample: torch.Tensor | None

    @property
    def head(self) -> bool:
        """Whether these linears belong to the head."""
        return self.examples is not None

    def cross(self, name: str) -> torch.Tensor:
        """Mean of (y - mean_y)(x̂ - mean_x)ᵀ, y the output of that linear in the dense model: float64 [n_out, n_in]."""
        if self.targets is not None:
            return self.moments.cross[self.targets[name]]
        return self.dense[name][0].double() @ self.moments.cross

    def mean_y(self, name: str) -> torch.Tensor:
        """Mean output of that linear in the dense model: float64 [n_out]."""
        if self.targets is not None:
            return self.moments.mean_y[self.targets[name]]
        weight, bias = self.dense[name]
        mean = weight.double() @ self.moments.mean_y
        return mean if bias is None else mean + bias.double()


class _ForwardPass(greenlet):
    """The greenlet that a batch runs in."""


class Walk:
    """One batch on its way through a part of the model. It waits at each linear: `linear` is that linear and `x` its
    input. At the end `linear` is None and `output` is the result.
    """

    def __init__(self, forward: Callable[[], torch.Tensor]):
        self.linear: nn.Linear | None = None
        self.x: torch.Tensor | None = None
        self.output: torch.Tensor | None = None
        self._forward = _ForwardPass(forward)
        self._wait(self._forward.switch())

    def go_on(self, y: torch.Tensor) -> None:
        """Goes on to the next linear, with `y` as the output of this one."""
        self._wait(self._forward.switch(y))

    def cross(self, affine: dict[nn.Linear, Affine], rounded: Rounding | None = None) -> None:
        """Goes through the given linears, with the given weights, and their inputs rounded if it is given."""
        for _ in affine:
            x = self.x if rounded is None else rounded(self.linear, self.x)
            self.go_on(nn.functional.linear(x, *affine[self.linear]))

    def _wait(self, reached) -> None:
        if self._forward.dead:
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
    sample: int = 0,
    rounded: Rounding | None = None,
    finished: Callable[[dict[str, nn.Linear]], bool] = lambda linears: False,
) -> Iterator[Stage]:
    """Yields the stages of the encoder, then those of the head if `heads`. The caller may change the linears' weights
    before it asks for the next stage. Linears of one stage whose tokens have different weights come as separate stages.

    batches: token batches without padding. The model must be in eval mode; all happens on its device.
    sparse_inputs: False measures the dense model's inputs (x̂ = x), whatever the caller changes.
    padding: True counts padding as tokens and runs the half-pruned model under the last batch's attention mask, as the
    released code of Li et al. 2023 does. sample: about how many tokens a stage's sample has. rounded: rounds the inputs
    of linears that the half-pruned model has gone through. finished: called with the linears of each layer before its
    stages. If it sets their weights and returns True, the layer is passed without stages.
    Memory: for all calibration tokens, in float32, the hidden states of both passes and the widest input of the
    half-pruned one.
    Raises InputError for padded batches, and for inputs that are not finite, naming their linears.
    """
    if not padding and any("attention_mask" in batch and not batch["attention_mask"].all() for batch in batches):
        raise InputError("calibration batches must have no padding", fix="make them with sparsebert.pruning.draw")
    names = {module: name for name, module in model.named_modules()}
    layers = encoder_layers(model)
    batches = [moved(batch, model.device) for batch in batches]
    calls = [_first_layer_call(model, layers[0], batch) for batch in batches]
    arguments = [rest for _, rest in calls]
    dense = [hidden for hidden, _ in calls]
    every = max(1, sum(hidden[..., 0].numel() for hidden in dense) // sample) if sample else 0
    measure = every, rounded
    hidden_states = HiddenStates(dense, list(dense) if sparse_inputs else None)
    for layer in layers:
        linears = {names[m]: m for m in layer.modules() if isinstance(m, nn.Linear)}

        def run(hidden, i, layer=layer):
            return _run(layer, hidden, arguments[i])

        def run_sparse(hidden, i, run=run):
            return run(hidden, -1 if padding else i)

        dense_affine = {module: _affine(module) for module in linears.values()}
        if finished(linears):
            if hidden_states.sparse is not None:
                hidden_states.sparse = [run_sparse(hidden, i) for i, hidden in enumerate(hidden_states.sparse)]
            sparse_affine = {module: _affine(module) for module in linears.values()}
            _set(dense_affine)
            hidden_states.dense = [run(hidden, i) for i, hidden in enumerate(hidden_states.dense)]
            _set(sparse_affine)
        else:
            yield from _walk(linears, run, run_sparse, hidden_states, weights or {}, measure, head=False)
    if heads:
        linears = head_linears(model)
        encoded = [None]

        def run_head(hidden, i):
            encoded[0] = hidden
            return model(**batches[i]).logits

        # A walk is past the encoder when it first waits, so the skipping ends when all have started.
        start = layers_skipped(layers, encoded)
        yield from _walk(linears, run_head, run_head, hidden_states, weights or {}, measure, head=True, starting=start)


@dataclass
class HiddenStates:
    """The hidden states of every batch between two layers, in the dense model and in the half-pruned one (None: only
    the dense model is run).
    """

    dense: list[torch.Tensor]
    sparse: list[torch.Tensor] | None


def _walk(
    linears: dict[str, nn.Linear], run, run_sparse, states: HiddenStates, weights: TokenWeights,
    measure: tuple[int, Rounding | None], *, head: bool, starting=None,
) -> Iterator[Stage]:  # fmt: skip
    """Takes both passes through one part of the model, stage by stage. measure: the distance of the sample's tokens (0:
    no sample), and `rounded`. starting: a context to start the walks in.
    """
    names = {module: name for name, module in linears.items()}
    with _waiting(linears.values()):
        with starting or nullcontext():
            order = _order(Walk(lambda: run(states.dense[-1], -1)))
            sparse = None if states.sparse is None else _started(run_sparse, states.sparse)
            passes = _Passes(_started(run, states.dense), sparse, measure[1])
        for modules in order:
            measured = _Measured({module: names[module] for module in modules}, weights, head, measure[0])
            for i in range(len(passes.dense)):
                x = passes.arrive(i)
                outputs = measured.add(i, x, passes.dense[i].x)
                for y in outputs:  # already computed; going on now frees the wide inputs
                    passes.dense[i].go_on(y)
            yield from measured.stages()
            passes.ahead_dense = {} if measured.narrow else measured.affine
            passes.ahead_sparse = {module: _affine(module, copy=False) for module in modules}
        passes.finish(states)


def _started(run, hidden: list[torch.Tensor]) -> list[Walk]:
    """A walk of each batch. The list is emptied: the walks hold its tensors for as long as they need them."""
    walks = [Walk(lambda h=h, i=i: run(h, i)) for i, h in enumerate(hidden)]
    hidden.clear()
    return walks


@dataclass
class _Passes:
    """The walks of all batches in the dense model, and in the half-pruned one (None: only the dense model is run).

    ahead_*: the weights of the linears that the walks wait at and have not gone through yet.
    """

    dense: list[Walk]
    sparse: list[Walk] | None
    rounded: Rounding | None
    ahead_dense: dict[nn.Linear, Affine] = field(default_factory=dict)
    ahead_sparse: dict[nn.Linear, Affine] = field(default_factory=dict)

    def arrive(self, i: int) -> torch.Tensor:
        """Takes batch i to the next stage and returns its input there, in the half-pruned model if that is run."""
        self.dense[i].cross(self.ahead_dense)
        if self.sparse is None:
            return self.dense[i].x
        self.sparse[i].cross(self.ahead_sparse, self.rounded)
        return self.sparse[i].x

    def finish(self, states: HiddenStates) -> None:
        """Takes all batches to the end."""
        for walk in self.dense:
            walk.cross(self.ahead_dense)
            states.dense.append(walk.output)
        for walk in self.sparse or ():
            walk.cross(self.ahead_sparse, self.rounded)
            states.sparse.append(walk.output)


class _Measured:
    """The moments of one stage's linears, summed up batch by batch.

    narrow: whether y is the dense model's outputs, which the cross moments C are made of. If the linears' outputs are
    together at least as wide as the input, y is the dense model's input instead, and C = W S follows from its cross
    moments S. The head is always narrow.
    """

    def __init__(self, names: dict[nn.Linear, str], weights: TokenWeights, head: bool, every: int):
        self.names, self.head, self.every = names, head, every
        self.sample: list[torch.Tensor] = []
        self.affine = {module: _affine(module) for module in names}
        self.narrow = head or sum(m.out_features for m in names) < next(iter(names)).in_features
        self.weights: dict[int, list[torch.Tensor] | None] = {}  # token weights, by their id()
        self.alike: dict[int, list[nn.Linear]] = {}  # the linears with these token weights
        for module, name in names.items():
            token_weights = weights.get(name)
            self.weights[id(token_weights)] = token_weights
            self.alike.setdefault(id(token_weights), []).append(module)
        self.moments: dict[int, Moments | None] = {}
        self.examples: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, i: int, x: torch.Tensor, x_dense: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Adds batch i, and returns the dense outputs of the linears if they were computed."""
        outputs = tuple(nn.functional.linear(x_dense, *self.affine[m]) for m in self.names) if self.narrow else ()
        y = torch.cat(outputs, -1) if self.narrow else x_dense
        for key, members in self.alike.items():
            token_weights = self.weights[key]
            of_batch = None if token_weights is None else token_weights[i]
            self.moments[key] = _add(self.moments.get(key), x, y, of_batch, [self.names[m] for m in members])
        if self.every:
            self.sample.append(x.flatten(0, -2)[:: self.every].clone())
        if self.head:
            self.examples.append((x.flatten(0, -2), y.flatten(0, -2)))
        return outputs

    def stages(self) -> Iterator[Stage]:
        """Yields one stage for each set of token weights."""
        ends = torch.tensor([0, *(m.out_features for m in self.names)]).cumsum(0).tolist()
        slices = {name: slice(*ends[i : i + 2]) for i, name in enumerate(self.names.values())}
        for key, members in self.alike.items():
            yield Stage(
                linears={self.names[m]: m for m in members},
                dense={self.names[m]: self.affine[m] for m in members},
                moments=self.moments.pop(key),
                targets=slices if self.narrow else None,
                examples=tuple(map(torch.cat, zip(*self.examples, strict=True))) if self.head else None,
                sample=torch.cat(self.sample) if self.every else None,
            )


def _add(moments: Moments | None, x, y, weights, names) -> Moments | None:
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    if weights is not None:
        weights = weights.reshape(-1)
        if len(weights) != len(x):  # in the head only the first token of each sequence is left
            raise InputError(
                f"weights of {names} must be one per token, got {len(weights)} for {len(x)}", fix="drop them"
            )
        some = weights.nonzero()[:, 0]
        if not len(some):
            return moments
        if len(some) < len(x):
            rows = some.to(x.device)
            x, y, weights = x[rows], y[rows], weights[some]
        weights = weights.to(x.device)
    try:
        return gram(x.contiguous(), y.contiguous(), weights, into=moments)
    except InputError as error:
        raise InputError(
            f"calibration inputs of {', '.join(names)}: {error.problem}", fix="check the model's weights"
        ) from error


def _order(walk: Walk) -> list[list[nn.Linear]]:
    """The linears in the order in which they are reached; those that get the same tensor are together."""
    order, x = [], None
    while walk.linear is not None:
        if walk.x is not x:
            order.append([])
            x = walk.x
        order[-1].append(walk.linear)
        walk.go_on(nn.functional.linear(walk.x, walk.linear.weight, walk.linear.bias))
    return order


def _waiting(linears):
    """A context in which a linear that a walk reaches hands its input to the walk's owner and waits for its output.
    Outside walks linears work as usual: the caller of `stages` may run the model.
    """

    def forward_of(module):
        def forward(x):
            # Not kept in a variable: a greenlet that its own waiting frame refers to is never freed.
            if isinstance(getcurrent(), _ForwardPass):
                return getcurrent().parent.switch((module, x))
            return nn.functional.linear(x, module.weight, module.bias)

        return forward

    return forwards_replaced(linears, forward_of)


def _affine(module: nn.Linear, *, copy: bool = True) -> Affine:
    parts = (module.weight.detach(), None if module.bias is None else module.bias.detach())
    return tuple(None if part is None else part.clone() for part in parts) if copy else parts


def _set(affine: dict[nn.Linear, Affine]) -> None:
    for module, (weight, bias) in affine.items():
        module.weight.copy_(weight)
        if bias is not None:
            module.bias.copy_(bias)


class Stopped(Exception):
    """Raised to stop a forward pass that has reached the first layer."""


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
