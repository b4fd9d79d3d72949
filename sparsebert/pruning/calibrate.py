"""The staged pass over an encoder: what each group of linears sees in the half-pruned model, and what the dense model
gave there.

A *stage* is the linears of a layer that share one input (for BERT: query, key and value | attention output |
intermediate | output). The pass visits stages in the order of execution; each is handed over with the moments of its
inputs in the model whose earlier stages are already sparse, and of the dense model's outputs, both over real tokens
only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from sparsebert.encoders import encoder_layers


@dataclass(frozen=True)
class Moments:
    """Centred second moments of one stage over n tokens, float64.

    gram: [n_in, n_in], mean of (x̂ - mean_x)(x̂ - mean_x)ᵀ with x̂ the input in the half-pruned model.
    cross: [n_out, n_in] a linear, mean of (y - mean_y)(x̂ - mean_x)ᵀ with y the dense model's output. mean_x: [n_in];
    mean_y: [n_out] a linear.
    """

    n: int
    gram: torch.Tensor
    mean_x: torch.Tensor
    cross: dict[str, torch.Tensor]
    mean_y: dict[str, torch.Tensor]


class Stopped(Exception):
    """Raised inside a forward pass that has shown what it was run for."""


@torch.inference_mode()
def stages(model, batches: list[dict[str, torch.Tensor]]) -> Iterator[tuple[dict[str, nn.Linear], Moments]]:
    """Yields (linears by full name, moments) of every stage of every layer. The caller may change the linears' weights
    before it goes on.

    batches: padded token batches with their attention_mask, int64 [sequences, length]. The model must be in eval mode.
    Memory: the hidden states of both models and one layer's dense outputs, float32, for all calibration tokens.
    """
    masks = [batch["attention_mask"].bool() for batch in batches]
    layers = encoder_layers(model)
    names = {id(module): name for name, module in model.named_modules()}
    calls = [_first_layer_call(model, layers[0], batch) for batch in batches]
    dense = [hidden for hidden, _ in calls]
    sparse = list(dense)
    arguments = [rest for _, rest in calls]
    for layer in layers:
        linears = {names[id(m)]: m for m in layer.modules() if isinstance(m, nn.Linear)}
        order, targets = _dense_outputs(layer, linears, dense, arguments, masks)
        for stage in order:
            group = {name: linears[name] for name in stage}
            yield group, _moments(layer, group, sparse, arguments, masks, {name: targets.pop(name) for name in stage})
        sparse = [_run(layer, hidden, rest) for hidden, rest in zip(sparse, arguments, strict=True)]


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


def _dense_outputs(layer, linears, hidden, arguments, masks):
    """The stages of a layer in order of execution, and each linear's outputs on real tokens, a list over batches.
    Advances `hidden`.
    """
    order: list[list[str]] = []
    inputs: list[int] = []
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in linears}
    mask = masks[0]

    def record(name):
        def hook(_module, args, out):
            outputs[name].append(out[mask])
            if len(outputs[name]) == 1:  # the first batch shows which linears share an input
                if args[0].data_ptr() in inputs:
                    order[inputs.index(args[0].data_ptr())].append(name)
                else:
                    inputs.append(args[0].data_ptr())
                    order.append([name])
                    alive.append(args[0])  # so that no later tensor gets this one's address

        return hook

    alive: list[torch.Tensor] = []
    handles = [module.register_forward_hook(record(name)) for name, module in linears.items()]
    try:
        for i, rest in enumerate(arguments):
            mask = masks[i]
            hidden[i] = _run(layer, hidden[i], rest)
    finally:
        for handle in handles:
            handle.remove()
    return order, outputs


def _moments(layer, group, hidden, arguments, masks, targets) -> Moments:
    """Moments of one stage; float32 products of centred tiles, float64 sums across batches.

    The tiles are centred by the first batch's means (products of centred values lose no digits), and the sums by the
    rest at the end.
    """
    first = next(iter(group.values()))
    seen: list[torch.Tensor] = []

    def catch(_module, args):
        seen.append(args[0])
        raise Stopped

    handle = first.register_forward_pre_hook(catch)
    n, sum_x, gram, shift_x = 0, 0.0, 0.0, None
    sum_y, cross, shift_y = dict.fromkeys(group, 0.0), dict.fromkeys(group, 0.0), {}
    try:
        for i, rest in enumerate(arguments):
            seen.clear()
            try:
                _run(layer, hidden[i], rest)
            except Stopped:
                pass
            x = seen[0][masks[i]]
            if shift_x is None:
                shift_x = x.mean(0)
                shift_y = {name: targets[name][0].mean(0) for name in group}
            x = x - shift_x
            n += len(x)
            sum_x = sum_x + x.sum(0, dtype=torch.float64)
            gram = gram + (x.T @ x).double()
            for name in group:
                y = targets[name][i] - shift_y[name]
                sum_y[name] = sum_y[name] + y.sum(0, dtype=torch.float64)
                cross[name] = cross[name] + (y.T @ x).double()
    finally:
        handle.remove()
    mean_x = sum_x / n
    gram = gram / n - torch.outer(mean_x, mean_x)
    means = {name: sum_y[name] / n for name in group}
    return Moments(
        n=n,
        gram=gram,
        mean_x=mean_x + shift_x,
        cross={name: cross[name] / n - torch.outer(means[name], mean_x) for name in group},
        mean_y={name: means[name] + shift_y[name] for name in group},
    )
