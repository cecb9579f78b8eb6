"""Whether the examples of a batch have gradients of their own, also outside the layers that are recorded.

They lie along one axis of what a layer was given, dimension 0 for a rule. Sizes may mislead: a sequence-first layer
inside a model looks right where there are as many positions as examples, and so does a table of that length. So for
every kind of pass the model is run once more with one example less, and the axis that shrinks is the one.

And they do not see one another. `h - h.mean(0)` between two layers, attention over the batch, a batch sorted on the
way: each layer's examples look right, but the gradients that come back are sums over several examples. So for every
kind of pass a few examples are run through the model once, twice over:

    values      alone they must give what they give within the batch; not asked of a model that draws random numbers
    gradients   with c_n on the output of example n, what comes back must be c_n times what came with 1; powers of two,
                so that rounding makes no difference

What neither shows: examples that meet only in a model that draws random numbers, and without a gradient; and a model
that passed, and then comes to let them meet without a gradient and without another operation in its graph.
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
from vlearn.capture.pytrees import tensor_leaves, with_leaves
from vlearn.capture.trace import Trace, is_close
from vlearn.layers.example_axes import Axes, axis_of
from vlearn.per_example.module_call import run_again
from vlearn.per_example.replay import as_recorded, forward_mode, rerun
from vlearn.per_example.vmap_fallback import per_example_gradients

FEW = 4
VALUES_AGREE = 1e-2  # relative to the largest: an accelerator's TF32 rounds otherwise for another batch size
GRADIENTS_AGREE = 1e-4


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
                _hand_over(part.layer_calls, number)
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
            "not run on one example less to tell: use another batch size."
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


def _hand_over(calls: list[LayerCall], number: int) -> None:
    """The parameters of a call that has no examples go to the call around it, and from all calls inside that."""
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


def check_independent(trace: Trace, weights: dict[Tensor, Tensor]) -> None:
    """Raise RuntimeError if an example's output depends on the other examples of the batch.

    Args:
        trace: a recorded forward and backward pass.
        weights: the value of each parameter during the pass.
    """
    total, root = trace.num_examples, trace.root
    assert root is not None
    few = min(total - 1, FEW)
    calls = tuple((call.path, call.number) for call in trace.layer_calls)
    kind = (calls, few, trace.paths_in_train_mode, trace.graph_structure)
    right = ModelChecks.of(root).independent
    if few < 1 or kind in right:
        return
    with as_recorded(trace):
        dependent = _interact_in_values(trace, weights, few) or _interact_in_gradients(trace, weights, few)
        for call in trace.layer_calls if dependent is not None else ():
            if call.reached and call.parameters and call.rule is None:  # it may say more clearly why not
                per_example_gradients(call, slice(0, 2 * FEW), weights, trace.tolerance)
    if dependent is not None:
        raise RuntimeError(
            f"{dependent} depends on the other examples of the batch, so no example has a gradient of its own: let the "
            "model treat dimension 0 as examples, in their order and without statistics over them (GroupNorm, "
            "LayerNorm or filter response normalisation instead of the batch's)."
        )
    remember(right, kind)


def _interact_in_values(trace: Trace, weights: dict[Tensor, Tensor], few: int) -> str | None:
    """What a module is given or gives that is not the same without the rest of the batch."""
    with torch.no_grad():
        try:
            part = _values(trace, weights, few)
        except Exception:  # a model that needs whole batches
            return None
        differing = _first_difference(_values(trace, weights, trace.num_examples, (few, part)), part)
        if differing is not None and _first_difference(part, _values(trace, weights, few, shift=True)) is not None:
            return None  # it draws random numbers, and others for a part
    return differing


Values = list[tuple[str, list[Tensor | None]]]  # in order: what, and its tensors, None for one without examples


def _values(
    trace: Trace, weights: dict[Tensor, Tensor], count: int, part: tuple[int, Values] | None = None, shift: bool = False
) -> Values:
    """What goes into the modules and comes out, of the first examples.

    Args:
        count: how many of them.
        part: of how many of them only to keep what is along one axis, and what a pass with only those gave.
        shift: draw other random numbers.
    """
    seen: Values = []

    def keep(what: str, tree: Any) -> None:
        leaves = tensor_leaves(tree)
        if part is None:
            seen.append((what, [leaf.clone() for leaf in leaves]))
            return
        few, values = part
        fewer = values[len(seen)][1] if len(seen) < len(values) else []
        cut = [
            b if b is None else _of_first(a, count, few, tuple(b.shape)) for a, b in zip(leaves, fewer, strict=False)
        ]
        seen.append((what, cut))

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        keep(f"what goes into {trace.paths[module]} ({type(module).__name__})", (args, kwargs))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        keep(f"the output of {trace.paths[module]} ({type(module).__name__})", output)

    rerun(trace, weights, slice(count), trace.paths, enter, leave, other_random_numbers=shift)
    return seen


def _of_first(tensor: Tensor, count: int, few: int, shape: tuple[int, ...]) -> Tensor | None:
    """A copy of the first few examples along the one axis whose length is their number; None if there is none such.

    Args:
        shape: of the same tensor in a pass with those few.
    """
    if tensor.dim() != len(shape):
        return None
    differing = [axis for axis, (m, n) in enumerate(zip(tensor.shape, shape, strict=True)) if m != n]
    if len(differing) != 1 or (tensor.shape[differing[0]], shape[differing[0]]) != (count, few):
        return None
    return tensor.narrow(differing[0], 0, few).clone()


def _first_difference(left: Values, right: Values) -> str | None:
    for (what, those), (_, these) in zip(left, right, strict=False):
        for a, b in zip(those, these, strict=False):
            if a is None or b is None or not (a.is_floating_point() or a.is_complex()):
                continue
            if a.shape == b.shape and not is_close(a, b, VALUES_AGREE):
                return what
    return None


def _interact_in_gradients(trace: Trace, weights: dict[Tensor, Tensor], few: int) -> str | None:
    """The last recorded output whose gradients are not those of single examples."""
    try:
        gradients = _gradients(trace, weights, few)
    except Exception:
        try:
            gradients = _gradients(trace, weights, trace.num_examples)
        except Exception:  # it cannot be repeated at all, which the deviation says
            return None
    for call, gradient, expected in reversed(gradients):
        if not is_close(gradient, expected, GRADIENTS_AGREE):
            name = f"{call.path} ({type(call.module).__name__})"
            return f"what the model makes of the output of {name}"
    return None


def _gradients(trace: Trace, weights: dict[Tensor, Tensor], count: int) -> list[tuple[LayerCall, Tensor, Tensor]]:
    """For each use: gradients of outputs weighted by c_n, and c_n times those of outputs weighted by 1."""
    if count < 2:
        return []
    probes: list[tuple[LayerCall, Tensor, int]] = []
    calls_of: dict[tuple[nn.Module, int], list[LayerCall]] = {}
    for call in trace.layer_calls:
        if call.reached and call.parameters and call.consumer is None:
            calls_of.setdefault((call.module, call.number), []).append(call)
    num_calls: dict[nn.Module, int] = {}

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        number = num_calls[module] = num_calls.get(module, -1) + 1
        leaves, moved = tensor_leaves(output), {}
        for call in calls_of.get((module, number), ()):
            for position, axis in zip(call.positions, call.output_axes, strict=True):
                leaf = moved.get(position, leaves[position])
                if axis is not None and leaf.dim() > axis and leaf.shape[axis] == count:
                    probe = torch.zeros_like(leaf, requires_grad=True)
                    probes.append((call, probe, axis))
                    moved[position] = leaf + probe
        return with_leaves(output, moved)

    modules = dict.fromkeys(module for module, _ in calls_of)
    outputs = rerun(trace, weights, slice(count), modules, leave=leave)
    reached = zip(trace.positions, trace.cotangents, strict=True)
    with_axes = [(outputs[position], axis_of(c, trace.num_examples)) for position, c in reached if c is not None]
    ends = [
        (output, axis)
        for output, axis in with_axes
        if axis is not None and output.shape[axis : axis + 1] == (count,) and output.requires_grad
    ]
    if not ends or not probes:
        return []
    plain = [torch.arange(1, e.numel() + 1, device=e.device, dtype=e.dtype).cos().reshape(e.shape) for e, _ in ends]
    by_example = [_by_example(tensor, axis) for tensor, (_, axis) in zip(plain, ends, strict=True)]
    inputs = [probe for _, probe, _ in probes]
    once, weighted = (
        torch.autograd.grad([end for end, _ in ends], inputs, cotangents, retain_graph=True, allow_unused=True)
        for cotangents in (plain, by_example)
    )
    return [
        (call, with_factors, _by_example(without, axis))
        for (call, _, axis), without, with_factors in zip(probes, once, weighted, strict=True)
        if without is not None and with_factors is not None
    ]


def _by_example(tensor: Tensor, axis: int) -> Tensor:
    factors = 2.0 ** (torch.arange(tensor.shape[axis], device=tensor.device) % FEW)
    return tensor * factors.to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1 - axis))
