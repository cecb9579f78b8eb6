"""Exact per-example gradients of a module that no rule covers and that cannot be run on one example.

Because it draws random numbers, such as dropout's masks, and would draw others for one example; or because an index
gives the examples, and what else belongs to one, as the edges of a graph, is not known. So it is run again on the whole
batch with the random numbers of the recorded pass, and sent back through it is the cotangent of one example at a time,
zero for all others: one backward pass of the module for each example, and one forward pass more for each where the
deviation is wanted. That the examples do not meet inside shows twice: the gradient of the inputs is that of the
example's own, and where the other examples are exchanged its output stays. Where an index gives the examples,
`vlearn.per_example.measured_rows` has seen that they meet nowhere in the model.
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
from vlearn.per_example.module_call import (
    RefusedError,
    check_outputs,
    examples_first,
    leaves_of,
    names_of,
    restore_outputs,
    run_again,
    same_random_numbers_in,
)
from vlearn.per_example.replay import forward_mode, tangents_in_reverse

Weights = dict[Tensor, Tensor]
ALL = slice(None)
REPEATS = 1e-2  # relative: whether a pass with other kernels drew the same random numbers


def per_example_gradients(call: LayerCall, examples: slice, weights: Weights, tolerance: float) -> Weights:
    """As `vlearn.per_example.vmap_fallback.per_example_gradients`, which see."""
    whole, numbers = _whole(call)
    whole.check_unchanged()
    names = names_of(whole, call.parameters)
    live = {name: weights[p].detach().requires_grad_() for name, p in names.items()}
    leaves, structure = leaves_of(whole, weights)
    inputs: dict[int, Tensor] = {}
    for place, (leaf, axis) in enumerate(zip(leaves, whole.input_axes, strict=True)):
        if axis is not None and (leaf.is_floating_point() or leaf.is_complex()):
            inputs[place] = leaf.detach().contiguous().requires_grad_()
            leaves[place] = inputs[place].clone()  # the module may write it in place
    outputs = _run(whole, {**weights, **{p: live[name] for name, p in names.items()}}, leaves, structure)
    restore_outputs(whole, weights)
    check_outputs(whole, examples_first(whole, outputs), ALL, tolerance)
    if examples.start == 0:
        _check_apart(whole, weights, tolerance)
    pulled = [
        (place, output, cotangent.to(output.dtype))
        for place, (output, cotangent) in enumerate(zip(outputs, whole.cotangents, strict=True))
        if whole.output_axes[place] is not None and cotangent is not None and output.requires_grad
    ]
    rows: list[list[Tensor]] = []
    for n in numbers[examples].tolist():
        gradients: Any = [None] * (len(live) + len(inputs))
        if pulled:
            gradients = torch.autograd.grad(
                [output for _, output, _ in pulled],
                [*live.values(), *inputs.values()],
                [_of_one(cotangent, _own(whole, place, n)) for place, _, cotangent in pulled],
                retain_graph=True,
                allow_unused=True,
            )
        for place, gradient in zip(inputs, gradients[len(live) :], strict=True):
            axis = whole.input_axes[place]
            if gradient is not None and axis is not None and _reaches_others(gradient, axis, n):
                raise RefusedError(whole, "the output of an example depends on other examples")
        own = zip(live.values(), gradients[: len(live)], strict=True)
        rows.append([torch.zeros_like(value) if gradient is None else gradient for value, gradient in own])
    return {p: torch.stack(column) for p, column in zip(names.values(), zip(*rows, strict=True), strict=True)}


def output_tangents(call: LayerCall, examples: slice, weights: Weights, directions: Weights) -> list[Tensor | None]:
    """As `vlearn.per_example.vmap_fallback.output_tangents`, which see; all rows of an example where it has several."""
    whole, numbers = _whole(call)
    names = names_of(whole, directions)
    values = {name: weights[p] for name, p in names.items()}
    leaves, structure = leaves_of(whole, weights)
    chosen = numbers[examples].tolist()

    def run(values: dict[str, Tensor]) -> list[Tensor]:
        return _run(whole, {**weights, **{p: values[name] for name, p in names.items()}}, leaves, structure)

    def forward(k: int, n: int) -> list[Tensor | None]:
        with forward_ad.dual_level():
            moved = {name: forward_ad.make_dual(values[name], directions[p][k]) for name, p in names.items()}
            pairs = [forward_ad.unpack_dual(output) for output in run(moved)]
            if k == 0:
                check_outputs(whole, examples_first(whole, [pair.primal for pair in pairs]), ALL, REPEATS)
            tangents = [torch.zeros_like(pair.primal) if pair.tangent is None else pair.tangent for pair in pairs]
            return _rows_of_one(whole, tangents, n)

    def in_reverse() -> list[list[Tensor | None]]:
        live = {name: value.detach().requires_grad_() for name, value in values.items()}
        outputs = run(live)
        check_outputs(whole, examples_first(whole, outputs), ALL, REPEATS)
        rows = []
        for k, n in enumerate(chosen):
            own = _rows_of_one(whole, outputs, n)
            ends = [each.unsqueeze(0) for each in own if each is not None and len(each)]
            moves = [directions[p][k] for p in names.values()]
            tangents = iter(tangents_in_reverse(ends, list(live.values()), moves))
            rows.append([each if each is None or not len(each) else next(tangents).squeeze(0) for each in own])
        return rows

    with forward_mode(whole.module.modules()):
        try:
            rows = [forward(k, n) for k, n in enumerate(chosen)]
        except NotImplementedError:
            rows = in_reverse()
    return [None if column[0] is None else torch.cat(column).detach() for column in zip(*rows, strict=True)]


def _whole(call: LayerCall) -> tuple[LayerCall, Tensor]:
    """(The call of all examples, which of them the given one has)."""
    if call.whole is not None:
        return call.whole
    place, axis = next((place, axis) for place, axis in enumerate(call.output_axes) if axis is not None)
    rows = call.output_rows[place] if call.output_rows else None
    return call, torch.arange(call.shapes[place][axis] if rows is None else rows.num_examples, device="cpu")


def _run(call: LayerCall, weights: Weights, leaves: list[Any], structure: Any) -> list[Tensor]:
    with same_random_numbers_in(call):
        return run_again(call, weights, *tree_unflatten(leaves, structure))


def _own(call: LayerCall, place: int, n: int) -> tuple[Any, ...]:
    """Where an example lies in an output of the call, to index it with."""
    axis, rows = call.output_axes[place], call.output_rows[place] if call.output_rows else None
    assert axis is not None
    return *[slice(None)] * axis, slice(n, n + 1) if rows is None else rows.of([n]).rows


def _of_one(tensor: Tensor, own: tuple[Any, ...]) -> Tensor:
    """Zero but for one example."""
    alone = torch.zeros_like(tensor)
    alone[own] = tensor[own]
    return alone


def _rows_of_one(call: LayerCall, outputs: list[Tensor], n: int) -> list[Tensor | None]:
    """An example's rows of each output, which come first; None for an output that has no examples."""
    return [
        None if axis is None else output[_own(call, place, n)].movedim(axis, 0)
        for place, (output, axis) in enumerate(zip(outputs, call.output_axes, strict=True))
    ]


def _reaches_others(gradient: Tensor, axis: int, n: int) -> bool:
    others = gradient.clone()
    others.select(axis, n).zero_()
    return bool((others != 0).any())


@torch.no_grad()
def _check_apart(call: LayerCall, weights: Weights, tolerance: float) -> None:
    """Raise RefusedError if the outputs of either half of the examples change where the other half is exchanged."""
    numbers = _whole(call)[1]
    with_examples = [place for place, axis in enumerate(call.input_axes) if axis is not None]
    if len(numbers) < 2 or not with_examples:
        return
    leaves, structure = leaves_of(call, weights)
    # Not the lengths of sequences, by which a packed one says which random number is whose.
    values = [place for place in with_examples if leaves[place].is_floating_point() or leaves[place].dim() > 1]
    half = len(numbers) // 2
    for kept in (slice(None, half), slice(half, None)):
        others = numbers.roll(1)
        others[kept] = numbers[kept]
        exchanged = list(leaves)
        for place in values or with_examples:
            leaf = leaves[place]
            exchanged[place] = rows_along(leaf, call.input_axes[place], others.to(leaf.device))
        outputs = examples_first(call, _run(call, weights, exchanged, structure))
        for rows, (recorded, _), axis in zip(outputs, call.outputs, call.output_axes, strict=True):
            if rows is None or axis is None:
                continue
            if not is_close(rows[kept], recorded.movedim(axis, 0)[kept], tolerance):
                raise RefusedError(call, "the output of an example depends on other examples")
