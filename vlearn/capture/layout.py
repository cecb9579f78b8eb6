"""Whether dimension 0 of what a module was given is the axis of the examples.

Its size alone tells, unless another axis has the batch's size too: a sequence-first layer inside a model looks
right where there are as many positions as examples. Then the model is run once more with one example less, and
the axis that shrinks is the one.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from vlearn.capture.replay import as_recorded, call_with, forward_mode, same_random_numbers
from vlearn.capture.trace import Trace
from vlearn.capture.tree import rows_of, shapes
from vlearn.capture.use import Use

Shapes = tuple[tuple[int, ...], ...]

_known: WeakKeyDictionary[nn.Module, set[Any]] = WeakKeyDictionary()  # what was found right, by root


def check_layout(trace: Trace, weights: dict[Tensor, Tensor]) -> None:
    """Raise RuntimeError if a recorded use does not have the examples along dimension 0."""
    total, root = trace.num_examples, trace.root
    assert root is not None
    unclear: dict[tuple[nn.Module, int], tuple[Use, Shapes]] = {}
    for use in trace.uses:
        module, call, before = use.seen_by or (use.module, use.call, shapes((use.args, use.kwargs)))
        if use.reached and use.parameters and (use.of_constants or any(total in shape[1:] for shape in before)):
            unclear[module, call] = use, before
    calls = tuple((use.path, call, before) for (_, call), (use, before) in unclear.items())
    key = (calls, trace.paths_in_train_mode, trace.graph_structure)
    if trace.examples is not None or total < 2 or not unclear or key in _known.setdefault(root, set()):
        return
    seen = _shapes_with_one_less(trace, weights, {module for module, _ in unclear})
    for (module, call), (use, before) in unclear.items():
        calls = seen.get(module, [])
        after = calls[call] if call < len(calls) else ()
        shrunk = len(before) == len(after) and all(
            new[:1] == (total - 1,) for old, new in zip(before, after, strict=True) if old[:1] == (total,)
        )
        if not shrunk:
            raise RuntimeError(
                f"{use.path} ({type(use.module).__name__}): {_described(before, total)}, and dimension 0 is not the "
                "one of the examples: use a layer with the examples first (batch_first=True), or another batch size."
            )
    _known[root].add(key)


def _described(before: Shapes, total: int) -> str:
    several = [shape for shape in before if total in shape[1:]]
    if several:
        return f"an input of shape {several[0]} has several axes as long as the batch of {total}"
    return f"an input of shape {before[0]} is as long as the batch of {total}"


def _shapes_with_one_less(
    trace: Trace, weights: dict[Tensor, Tensor], modules: set[nn.Module]
) -> dict[nn.Module, list[Shapes]]:
    """Input shapes of each call of the modules, in a forward pass without the last example."""
    seen: dict[nn.Module, list[Shapes]] = {}
    total, root = trace.num_examples, trace.root
    assert root is not None

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.setdefault(module, []).append(shapes((args, kwargs)))

    handles = [module.register_forward_hook(note, with_kwargs=True, prepend=True) for module in modules]
    try:
        with as_recorded(trace), same_random_numbers(trace), forward_mode(root.modules()):
            call_with(root, weights, *rows_of((trace.args, trace.kwargs), total, slice(-1)))
    except Exception as error:
        raise RuntimeError(
            f"an axis that may not be the one of the examples is as long as the batch of {total}, and the model does "
            "not run on one example less to tell: use another batch size."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen
