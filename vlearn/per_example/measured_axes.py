"""Along which axis of what goes into a layer, and of what comes out, the examples lie, as one more pass shows.

Dimension 0 for a rule. Sizes may mislead: a sequence-first layer inside a model looks right where there are as many
positions as examples, and so does a table of that length. So for every kind of pass the model is run once more with one
example less, and the axis that shrinks is the one.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vlearn.capture.layer_call import LayerCall
from vlearn.capture.model_checks import ModelChecks, remember
from vlearn.capture.pytrees import tensor_leaves
from vlearn.capture.trace import Trace, is_close
from vlearn.layers.example_axes import Axes
from vlearn.per_example.module_call import run_again
from vlearn.per_example.replay import as_recorded, forward_mode, rerun

VALUES_AGREE = 1e-2  # relative to the largest: an accelerator's TF32 rounds otherwise for another batch size
MOST_TRIES = 8  # ways to tell the model's own inputs that have examples from those that are as long by chance


class _Axes(NamedTuple):
    """Along which axes the examples lie, as `LayerCall` and `Trace` have them; by call, None where nothing was learned.

    Attributes:
        root: of the model's own inputs; outputs: of its outputs that require grad.
        calls: of the inputs and of the outputs of each call.
    """

    root: Axes
    outputs: Axes
    calls: list[tuple[Axes, Axes] | None]


class _Shapes(NamedTuple):
    """What a module was given and gave in one call: the shape of each leaf, () of what is no tensor."""

    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]


def find_example_axes(trace: Trace, weights: dict[Tensor, Tensor]) -> None:
    """Find along which axes of what goes into the recorded calls, and comes out, the examples lie.

    Args:
        trace: a recorded forward and backward pass; its axes and those of its calls, so far by size, are set.
        weights: the value of each parameter during the pass.
    Raises:
        RuntimeError: if a call has them along several axes or none, or that cannot be told.
    """
    total, root = trace.num_examples, trace.root
    assert root is not None
    calls = [call for call in trace.layer_calls if call.reached and (call.parameters or call.inside)]
    if total < 2 or not any(call.parameters for call in calls):
        return
    kind = tuple((call.path, call.number) for call in calls), trace.kind
    checks = ModelChecks.of(root)
    known = checks.example_axes
    unclear = [call for call in calls if call.parameters and _sizes_may_mislead(call, total)]
    if kind not in known or (known[kind] is None and unclear):
        remember(known, kind, _axes_with_one_less(trace, weights, calls, bool(unclear)))
    found: _Axes | None = known[kind]
    if found is None:
        return
    trace.input_axes[:], trace.output_axes = found.root, found.outputs
    for call, axes in zip(calls, found.calls, strict=True):
        if axes is not None:
            call.input_axes[:], call.output_axes[:] = axes
        elif call in unclear:
            raise _no_axis(call, total)
        if call.rule is not None and call.input_axes == [0]:
            checks.with_examples[call.path, call.number] = None
    for number, call in enumerate(trace.layer_calls):
        if call.rule is None or call.input_axes == call.output_axes == [0]:
            continue
        for part in (trace,) if trace.probed is None else (trace, trace.probed):
            if call.input_axes == [None]:
                hand_over(part.layer_calls, number)
            else:
                _without_rule(part.layer_calls[number], trace, weights)


def _sizes_may_mislead(call: LayerCall, total: int) -> bool:
    axes = zip(tree_leaves((call.args, call.kwargs)), call.input_axes, strict=True)
    return call.input_may_not_depend_on_examples or any(
        axis is not None and (axis > 0 or total in leaf.shape[1:]) for leaf, axis in axes
    )


def _axes_with_one_less(
    trace: Trace, weights: dict[Tensor, Tensor], calls: list[LayerCall], unclear: bool
) -> _Axes | None:
    """The axes that shrink in a pass without the last example; None if it cannot be made and sizes tell."""
    total = trace.num_examples
    of_call = [call.consumer or (call.module, call.number, None) for call in calls]
    wanted = {(module, number) for module, number, _ in of_call}
    guess, shapes_of, error = list(trace.input_axes), None, None
    outputs_after: list[Tensor] = []
    for axes in _candidates(trace):
        trace.input_axes[:] = axes
        try:
            seen, outputs = _shapes_with_one_less(trace, weights, wanted)
        except Exception as other:
            error = error or other
            continue
        agrees = _agree(outputs, trace)
        if shapes_of is None or agrees:
            shapes_of, guess, outputs_after = seen, axes, outputs
        if agrees:
            break
    trace.input_axes[:] = guess
    if shapes_of is None:
        if not unclear:
            return None
        raise RuntimeError(
            f"an axis that may not be the one of the examples is as long as the batch of {total}, and the model does "
            f"not run on one example less to tell: use another batch size.{trace.hint_at_index()}"
        ) from error
    found = []
    for call, (module, number, place) in zip(calls, of_call, strict=True):
        after = shapes_of.get((module, number))
        found.append(None if after is None else _axes_of(call, after, total, place))
    leaves = tensor_leaves(trace.output)
    of_outputs = [_shrunk(tuple(leaves[at].shape), tuple(outputs_after[at].shape), total) for at in trace.positions]
    return _Axes(guess, [axes[0] if len(axes) == 1 else None for axes in of_outputs], found)


def _candidates(trace: Trace) -> Iterator[Axes]:
    """Ways to read the model's own inputs: the first has the examples, others may be as long by chance."""
    total, is_first = trace.num_examples, True
    choices: list[Axes] = []
    for leaf, axis in zip(tree_leaves((trace.args, trace.kwargs)), trace.input_axes, strict=True):
        others = [1, None] if axis == 0 and leaf.dim() > 2 and leaf.shape[1] == total else [None]
        choices.append([axis] if axis is None or is_first else [axis, *others])
        is_first = is_first and axis is None
    return map(list, islice(product(*choices), MOST_TRIES))


def _shapes_with_one_less(
    trace: Trace, weights: dict[Tensor, Tensor], wanted: set[tuple[nn.Module, int]]
) -> tuple[dict[tuple[nn.Module, int], _Shapes], list[Tensor]]:
    """(What the wanted calls of modules have in a forward pass without the last example, its outputs)."""
    shapes_of: dict[tuple[nn.Module, int], _Shapes] = {}
    num_calls: dict[nn.Module, int] = {}
    root = trace.root
    assert root is not None

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        number = num_calls[module] = num_calls.get(module, -1) + 1
        if (module, number) in wanted:
            outputs = [tuple(leaf.shape) for leaf in tensor_leaves(output)]
            shapes_of[module, number] = _Shapes(_shapes(tree_leaves((args, kwargs))), outputs)

    with as_recorded(trace), forward_mode(root.modules()):
        outputs = rerun(trace, weights, slice(trace.num_examples - 1), {module for module, _ in wanted}, leave=note)
    return shapes_of, outputs


def _agree(outputs: list[Tensor], trace: Trace) -> bool:
    """Whether the outputs without the last example are those of the pass."""
    whole = tensor_leaves(trace.output)
    axes = [_shrunk(tuple(a.shape), tuple(b.shape), trace.num_examples) for a, b in zip(whole, outputs, strict=False)]
    return len(whole) == len(outputs) and all(
        len(axis) == 1 and is_close(b, a.narrow(axis[0], 0, b.shape[axis[0]]), VALUES_AGREE)
        for a, b, axis in zip(whole, outputs, axes, strict=True)
        if a.is_floating_point() and a.dim()
    )


def _axes_of(call: LayerCall, after: _Shapes, total: int, place: int | None) -> tuple[Axes, Axes] | None:
    """The axes of a call's inputs and outputs.

    Args:
        after: with one example less, of the call or of its `consumer`, whose tensor at `place` is the call's output.
    Raises:
        RuntimeError: if they are not such as the call can be served.
    """
    if place is not None:
        if place < len(after.inputs) and _shrunk(call.shapes[0], after.inputs[place], total) == [0]:
            return [0], [0]
        raise _no_axis(call, total)
    before = _shapes(tree_leaves((call.args, call.kwargs)))
    outputs = [after.outputs[position] for position in call.positions if position < len(after.outputs)]
    if len(before) != len(after.inputs) or len(outputs) != len(call.shapes):
        return None
    inputs = [_shrunk(old, new, total) for old, new in zip(before, after.inputs, strict=True)]
    of_outputs = [_shrunk(old, new, total) for old, new in zip(call.shapes, outputs, strict=True)]
    if call.rule is not None and not any(inputs) and call.stand_in is not None:
        return [None], [None]
    served = call.rule is None or all(of_outputs)
    if any(len(axes) > 1 for axes in (*inputs, *of_outputs)) or not any(inputs) or not served:
        if not call.parameters:
            return None
        raise _no_axis(call, total)
    return [axes[0] if axes else None for axes in inputs], [axes[0] if axes else None for axes in of_outputs]


def hand_over(calls: list[LayerCall], number: int) -> None:
    """Give the parameters of a call that has no examples to the call around it, from all calls inside that."""
    place, moved = calls[number].stand_in, calls[number].parameters
    assert place is not None
    unit = calls[place]
    for inner in (calls[each] for each in unit.inside):
        inner.parameters = [p for p in inner.parameters if all(p is not q for q in moved)]
    unit.parameters = [*unit.parameters, *moved]


def _without_rule(call: LayerCall, trace: Trace, weights: dict[Tensor, Tensor]) -> None:
    """Rules have the examples first; of a call that has them elsewhere each is run on its own."""
    call.rule = None
    with as_recorded(trace), torch.no_grad():
        outputs = run_again(call, weights, call.args, call.kwargs)
    call.outputs = [(output, output._version) for output in outputs]


def _shapes(leaves: list[Any]) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) if isinstance(leaf, Tensor) else () for leaf in leaves]


def _shrunk(before: tuple[int, ...], after: tuple[int, ...], total: int) -> list[int]:
    """The axes that were as long as the batch, and are one shorter without the last example."""
    if len(before) != len(after):
        return []
    return [axis for axis, (old, new) in enumerate(zip(before, after, strict=True)) if (old, new) == (total, total - 1)]


def _no_axis(call: LayerCall, total: int) -> RuntimeError:
    shapes = _shapes(tree_leaves((call.args, call.kwargs))) if call.consumer is None else call.shapes
    several = [shape for shape in shapes if shape.count(total) > 1]
    if several:
        found = f"an input of shape {several[0]} has several axes as long as the batch of {total}"
    else:
        shape = next((shape for shape in shapes if total in shape), shapes[0])
        found = f"an input of shape {shape} is as long as the batch of {total}"
    return RuntimeError(
        f"{call}: {found}, and dimension 0 is not the one of the examples: use a layer with the examples first "
        "(batch_first=True), or another batch size."
    )
