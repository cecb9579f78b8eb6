"""Whether dimension 0 of what a module was given is the axis of the examples.

Its size alone tells, unless another axis has the batch's size too: a sequence-first layer inside a model looks
right where there are as many positions as examples. Then the model is run once more with one example less, and
the axis that shrinks is the one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vlearn.capture.hooks import hooked
from vlearn.capture.layer_call import LayerCall
from vlearn.capture.model_checks import ModelChecks, remember
from vlearn.capture.pytrees import rows_of, shapes
from vlearn.capture.trace import Trace
from vlearn.per_example.replay import as_recorded, call_with, forward_mode, same_random_numbers

Shapes = tuple[tuple[int, ...], ...]


def check_example_axis(trace: Trace, weights: dict[Tensor, Tensor]) -> None:
    """Raise RuntimeError if a recorded call does not have the examples along dimension 0.

    Args:
        trace: a recorded forward and backward pass.
        weights: the value of each parameter during the pass.
    """
    total, root = trace.num_examples, trace.root
    assert root is not None
    unclear: dict[tuple[nn.Module, int], tuple[LayerCall, Shapes]] = {}
    for call in trace.layer_calls:
        module, number, before = call.consumer or (call.module, call.number, shapes((call.args, call.kwargs)))
        may_differ = call.input_may_not_depend_on_examples or any(total in shape[1:] for shape in before)
        if call.reached and call.parameters and may_differ:
            unclear[module, number] = call, before
    calls = tuple((call.path, number, before) for (_, number), (call, before) in unclear.items())
    kind = (calls, trace.paths_in_train_mode, trace.graph_structure)
    right = ModelChecks.of(root).example_axis
    if total < 2 or not unclear or kind in right:
        return
    shapes_of = _shapes_with_one_less(trace, weights, {module for module, _ in unclear})
    for (module, number), (call, before) in unclear.items():
        of_calls = shapes_of.get(module, [])
        after = of_calls[number] if number < len(of_calls) else ()
        shrunk = len(before) == len(after) and all(
            new[:1] == (total - 1,) for old, new in zip(before, after, strict=True) if old[:1] == (total,)
        )
        if not shrunk:
            raise RuntimeError(
                f"{call}: {_described(before, total)}, and dimension 0 is not the one of the examples: use a layer "
                "with the examples first (batch_first=True), or another batch size."
            )
    remember(right, kind)


def _described(before: Shapes, total: int) -> str:
    several = [shape for shape in before if total in shape[1:]]
    if several:
        return f"an input of shape {several[0]} has several axes as long as the batch of {total}"
    return f"an input of shape {before[0]} is as long as the batch of {total}"


def _shapes_with_one_less(
    trace: Trace, weights: dict[Tensor, Tensor], modules: set[nn.Module]
) -> dict[nn.Module, list[Shapes]]:
    """Input shapes of each call of the modules, in a forward pass without the last example."""
    shapes_of: dict[nn.Module, list[Shapes]] = {}
    total, root = trace.num_examples, trace.root
    assert root is not None

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        shapes_of.setdefault(module, []).append(shapes((args, kwargs)))

    try:
        with hooked(modules, leave=note), as_recorded(trace), same_random_numbers(trace), forward_mode(root.modules()):
            call_with(root, weights, *rows_of((trace.args, trace.kwargs), total, slice(-1)))
    except Exception as error:
        raise RuntimeError(
            f"an axis that may not be the one of the examples is as long as the batch of {total}, and the model does "
            "not run on one example less to tell: use another batch size."
        ) from error
    return shapes_of
