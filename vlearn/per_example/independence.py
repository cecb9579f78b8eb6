"""Whether the examples of a batch have gradients of their own, also outside the layers that are recorded.

They lie along dimension 0 of what every layer was given. Its size alone tells, unless another axis has the batch's
size too: a sequence-first layer inside a model looks right where there are as many positions as examples. Then the
model is run once more with one example less, and the axis that shrinks is the one.

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

from typing import Any

import torch
from torch import Tensor, nn

from vlearn.capture.layer_call import LayerCall
from vlearn.capture.model_checks import ModelChecks, remember
from vlearn.capture.pytrees import shapes, tensor_leaves, with_leaves
from vlearn.capture.trace import Trace, is_close
from vlearn.per_example.replay import as_recorded, forward_mode, rerun
from vlearn.per_example.vmap_fallback import per_example_gradients

FEW = 4
VALUES_AGREE = 1e-2  # relative to the largest: an accelerator's TF32 rounds otherwise for another batch size
GRADIENTS_AGREE = 1e-4


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
        with as_recorded(trace), forward_mode(root.modules()):
            rerun(trace, weights, slice(total - 1), modules, leave=note)
    except Exception as error:
        raise RuntimeError(
            f"an axis that may not be the one of the examples is as long as the batch of {total}, and the model does "
            "not run on one example less to tell: use another batch size."
        ) from error
    return shapes_of


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
            part = _values(trace, weights, few, few)
        except Exception:  # a model that needs whole batches
            return None
        whole = _values(trace, weights, trace.num_examples, few)
        differing = _first_difference(whole, part)
        if differing is not None and _first_difference(part, _values(trace, weights, few, few, shift=True)) is not None:
            return None  # it draws random numbers, and others for a part
    return differing


Values = list[tuple[str, list[Tensor | None]]]  # in order: what, and its rows of the few, None where it has none


def _values(trace: Trace, weights: dict[Tensor, Tensor], count: int, few: int, shift: bool = False) -> Values:
    seen: Values = []

    def rows(tree: Any) -> list[Tensor | None]:
        leaves = tensor_leaves(tree)
        return [x[:few].clone() if x.is_floating_point() and x.shape[:1] == (count,) else None for x in leaves]

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append((f"what goes into {trace.paths[module]} ({type(module).__name__})", rows((args, kwargs))))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((f"the output of {trace.paths[module]} ({type(module).__name__})", rows(output)))

    rerun(trace, weights, slice(count), trace.paths, enter, leave, other_random_numbers=shift)
    return seen


def _first_difference(left: Values, right: Values) -> str | None:
    for (what, those), (_, these) in zip(left, right, strict=False):
        for a, b in zip(those, these, strict=False):
            if a is not None and b is not None and a.shape == b.shape and not is_close(a, b, VALUES_AGREE):
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
    probes: list[tuple[LayerCall, Tensor]] = []
    calls_of: dict[tuple[nn.Module, int], list[LayerCall]] = {}
    for call in trace.layer_calls:
        if call.reached and call.parameters and call.consumer is None:
            calls_of.setdefault((call.module, call.number), []).append(call)
    num_calls: dict[nn.Module, int] = {}

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        number = num_calls[module] = num_calls.get(module, -1) + 1
        leaves, moved = tensor_leaves(output), {}
        for call in calls_of.get((module, number), ()):
            for position, shape in zip(call.positions, call.shapes, strict=True):
                leaf = moved.get(position, leaves[position])
                if shape[:1] == (trace.num_examples,) and leaf.shape[:1] == (count,):
                    probe = torch.zeros_like(leaf, requires_grad=True)
                    probes.append((call, probe))
                    moved[position] = leaf + probe
        return with_leaves(output, moved)

    modules = dict.fromkeys(module for module, _ in calls_of)
    outputs = rerun(trace, weights, slice(count), modules, leave=leave)
    ends = [
        outputs[position]
        for position, cotangent in zip(trace.positions, trace.cotangents, strict=True)
        if cotangent is not None and cotangent.shape[:1] == (trace.num_examples,) and outputs[position].requires_grad
    ]
    if not ends or not probes:
        return []
    plain = [torch.arange(1, e.numel() + 1, device=e.device, dtype=e.dtype).cos().reshape(e.shape) for e in ends]
    inputs = [probe for _, probe in probes]
    once, weighted = (
        torch.autograd.grad(ends, inputs, cotangents, retain_graph=True, allow_unused=True)
        for cotangents in (plain, [_by_example(tensor) for tensor in plain])
    )
    return [
        (call, with_factors, _by_example(without))
        for (call, _), without, with_factors in zip(probes, once, weighted, strict=True)
        if without is not None and with_factors is not None
    ]


def _by_example(tensor: Tensor) -> Tensor:
    factors = 2.0 ** (torch.arange(len(tensor), device=tensor.device) % FEW)
    return tensor * factors.to(tensor.dtype).reshape(-1, *[1] * (tensor.dim() - 1))
