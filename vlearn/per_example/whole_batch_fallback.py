"""Exact per-example gradients of a module that no rule covers and that draws random numbers, such as dropout's masks.

Run on one example it would draw others. So it is run again on the whole batch with the random numbers of the recorded
pass, and sent back through it is the cotangent of one example at a time, zero for all others: one backward pass of the
module for each example, and one forward pass more for each where the deviation is wanted. That the examples do not meet
inside shows twice: the gradient of the inputs is that of the example's own, and where the other examples are exchanged
its output stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_unflatten

from vlearn.capture.layer_call import LayerCall
from vlearn.capture.pytrees import rows_along
from vlearn.capture.trace import is_close
from vlearn.per_example.module_call import RefusedError, check_outputs, leaves_of, names_of, restore_outputs, run_again
from vlearn.per_example.replay import forward_mode, random_numbers_from, tangents_in_reverse

Weights = dict[Tensor, Tensor]
ALL = slice(None)


def per_example_gradients(call: LayerCall, examples: slice, weights: Weights, tolerance: float) -> Weights:
    """As `vlearn.per_example.vmap_fallback.per_example_gradients`, which see."""
    whole, numbers = _whole(call)
    whole.check_unchanged()
    if examples.start == 0:
        _check_apart(whole, weights, tolerance)
    names = names_of(whole, call.parameters)
    live = {name: weights[p].detach().requires_grad_() for name, p in names.items()}
    leaves, structure = leaves_of(whole, weights)
    inputs: dict[int, Tensor] = {}
    for place, (leaf, axis) in enumerate(zip(leaves, whole.input_axes, strict=True)):
        if axis is not None and (leaf.is_floating_point() or leaf.is_complex()):
            leaves[place] = inputs[place] = leaf.detach().contiguous().requires_grad_()
    outputs = _run(whole, {**weights, **{p: live[name] for name, p in names.items()}}, leaves, structure)
    restore_outputs(whole, weights)
    check_outputs(whole, _examples_first(whole, outputs), ALL, tolerance)
    pulled = [
        (output, axis, torch.zeros_like(output), cotangent)
        for output, axis, cotangent in zip(outputs, whole.output_axes, whole.cotangents, strict=True)
        if axis is not None and cotangent is not None and output.requires_grad
    ]
    rows: list[list[Tensor]] = []
    for n in numbers[examples].tolist():
        for _, axis, alone, cotangent in pulled:
            alone.zero_().select(axis, n).copy_(cotangent.select(axis, n))
        gradients: Any = [None] * (len(live) + len(inputs))
        if pulled:
            gradients = torch.autograd.grad(
                [output for output, *_ in pulled],
                [*live.values(), *inputs.values()],
                [alone for _, _, alone, _ in pulled],
                retain_graph=True,
                allow_unused=True,
            )
        for place, gradient in zip(inputs, gradients[len(live) :], strict=True):
            _check_own(whole, gradient, whole.input_axes[place], n)
        own = zip(live.values(), gradients[: len(live)], strict=True)
        rows.append([torch.zeros_like(value) if gradient is None else gradient for value, gradient in own])
    return {p: torch.stack(column) for p, column in zip(names.values(), zip(*rows, strict=True), strict=True)}


def output_tangents(call: LayerCall, examples: slice, weights: Weights, directions: Weights) -> list[Tensor | None]:
    """As `vlearn.per_example.vmap_fallback.output_tangents`, which see."""
    whole, numbers = _whole(call)
    names = names_of(whole, directions)
    values = {name: weights[p] for name, p in names.items()}
    leaves, structure = leaves_of(whole, weights)
    chosen = numbers[examples].tolist()

    def run(values: dict[str, Tensor]) -> list[Tensor]:
        return _run(whole, {**weights, **{p: values[name] for name, p in names.items()}}, leaves, structure)

    def forward(k: int, n: int) -> list[Tensor]:
        with forward_ad.dual_level():
            moved = {name: forward_ad.make_dual(values[name], directions[p][k]) for name, p in names.items()}
            pairs = [forward_ad.unpack_dual(output) for output in _examples_first(whole, run(moved))]
            if k == 0:
                _check_repeats(whole, [pair.primal for pair in pairs])
            return [(torch.zeros_like(p.primal) if p.tangent is None else p.tangent)[n] for p in pairs]

    with forward_mode(whole.module.modules()):
        try:
            rows = [forward(k, n) for k, n in enumerate(chosen)]
        except NotImplementedError:
            live = {name: value.detach().requires_grad_() for name, value in values.items()}
            outputs = _examples_first(whole, run(live))
            _check_repeats(whole, outputs)
            moves = [directions[p] for p in names.values()]
            rows = [
                [
                    tangent.squeeze(0)
                    for tangent in tangents_in_reverse(
                        [output[n : n + 1] for output in outputs], list(live.values()), [move[k] for move in moves]
                    )
                ]
                for k, n in enumerate(chosen)
            ]
    columns = iter([torch.stack(column).detach() for column in zip(*rows, strict=True)])
    return [None if axis is None else next(columns) for axis in whole.output_axes]
