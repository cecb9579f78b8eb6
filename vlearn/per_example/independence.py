"""Whether the examples of a batch have gradients of their own, also outside the layers that are recorded.

They must not see one another. `h - h.mean(0)` between two layers, attention over the batch, a batch sorted on the way:
each layer's examples look right, but the gradients that come back are sums over several examples. So for every kind of
pass a few examples are run through the model, twice over:

    values      alone, and the next few among copies of one of them, they must give what they give within the batch; not
                asked of a model that draws random numbers
    gradients   with c_n on the output of example n, what comes back must be c_n times what came with 1; powers of two,
                so that rounding makes no difference

A kind that passed is looked at again whenever its passes have doubled in number, since a gate between examples may open
in training, or a clipping of the batch begin. Whether rows were taken in their own order makes another kind.

What neither shows: examples that meet only in a model that draws random numbers, and without a gradient; and those that
come to meet in some passes of a kind that are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from vlearn._wide import wide_dtype
from vlearn.capture.layer_call import LayerCall
from vlearn.capture.model_checks import ModelChecks, remember
from vlearn.capture.pytrees import rows_along, tensor_leaves, with_leaves
from vlearn.capture.trace import Trace, is_close
from vlearn.layers.example_axes import axis_of
from vlearn.per_example.measured_axes import VALUES_AGREE
from vlearn.per_example.replay import as_recorded, rerun, rerun_with
from vlearn.per_example.vmap_fallback import per_example_gradients

FEW = 4
GRADIENTS_AGREE = 1e-4


def check_independent(trace: Trace, weights: dict[Tensor, Tensor]) -> None:
    """Raise RuntimeError if an example's output depends on the other examples of the batch.

    Args:
        trace: a recorded forward and backward pass.
        weights: the value of each parameter during the pass.
    """
    total, root = trace.num_examples, trace.root
    assert root is not None
    _check_outputs_have_examples(trace)
    few = min(total - 1, FEW)
    if few < 1:
        return
    calls = tuple((call.path, call.number) for call in trace.layer_calls)
    in_order = tuple(map(_is_in_order, trace.orders))
    kind = (calls, few, trace.paths_in_train_mode, trace.graph_structure, in_order)
    passes = ModelChecks.of(root).independent
    number = passes.get(kind, 0) + 1
    if number & (number - 1):  # no power of two
        passes[kind] = number
        return
    with as_recorded(trace):
        dependent = _interact_in_values(trace, weights) or _interact_in_gradients(trace, weights, few)
        for call in trace.layer_calls if dependent is not None else ():
            if call.reached and call.parameters and call.rule is None:  # it may say more clearly why not
                per_example_gradients(call, slice(0, 2 * FEW), weights, trace.tolerance)
    if dependent is not None:
        raise RuntimeError(
            f"{dependent} depends on the other examples of the batch, so no example has a gradient of its own: let the "
            "model treat dimension 0 as examples, in their order and without statistics over them (GroupNorm, "
            "LayerNorm or filter response normalisation instead of the batch's)."
        )
    remember(passes, kind, number)


def _is_in_order(order: Tensor) -> bool:
    """Whether all rows are taken, one after the other."""
    if order.dtype == torch.bool:
        return bool(order.all())
    return order.dim() == 1 and torch.equal(order, torch.arange(len(order), device=order.device, dtype=order.dtype))


def _check_outputs_have_examples(trace: Trace) -> None:
    """Raise RuntimeError if the loss depends on an output whose rows can be no examples' and no positions of theirs."""
    for cotangent in trace.cotangents:
        if cotangent is None or not cotangent.dim() or trace.num_examples in cotangent.shape:
            continue
        if not trace.num_examples or len(cotangent) % trace.num_examples:
            raise RuntimeError(
                f"the loss depends on an output of shape {tuple(cotangent.shape)}, of which no axis is that of the "
                f"batch's {trace.num_examples} examples, so no example has a gradient of its own: let the model take "
                f"inputs and return outputs with the examples along dimension 0.{trace.hint_at_index()}"
            )


def _interact_in_values(trace: Trace, weights: dict[Tensor, Tensor]) -> str | None:
    """What a module is given or gives that is not the same without the rest of the batch."""
    total = trace.num_examples
    few = min(total // 2, FEW)
    first, next_ones = slice(few), slice(few, 2 * few)
    with torch.no_grad():
        try:
            alone = _values(trace, weights, first)
        except Exception:  # a model that needs whole batches
            return None
        # Each in its own place, but without the first: what one example sets for all, as the largest entry of the
        # batch, is missing here or among the first alone.
        try:
            among_copies = _values(trace, weights, [few] * few + list(range(few, 2 * few)))
        except Exception:  # a model that refuses an example twice
            among_copies = []
        parts, differing = zip_longest(alone, among_copies, fillvalue=("", [])), []

        def compare(what: str, leaves: list[Tensor]) -> None:
            (_, those), (_, these) = next(parts, (("", []), ("", [])))
            for place, (a, b) in enumerate(zip(leaves, those, strict=False)):
                axis = _axis_between(a, b, total, few)
                if axis is None or differing:
                    continue
                pairs = [(rows_along(a, axis, first), b)]
                pairs += [tuple(rows_along(x, axis, next_ones) for x in (a, c)) for c in these[place : place + 1]]
                if any(_differ(*pair) for pair in pairs):
                    differing.append(what)

        _rerun_shown(trace, weights, slice(total), compare)
        if not differing:
            return None
        others = _values(trace, weights, first, other_random_numbers=True)
    pairs = zip(alone, others, strict=False)
    if any(_differ(a, b) for (_, those), (_, these) in pairs for a, b in zip(those, these, strict=False)):
        return None  # it draws random numbers, and others for a part
    return differing[0]


def _values(
    trace: Trace, weights: dict[Tensor, Tensor], examples: slice | list[int], other_random_numbers: bool = False
) -> list[tuple[str, list[Tensor]]]:
    """What goes into the modules and comes out, of some of the examples, in order: what, and its tensors."""
    seen: list[tuple[str, list[Tensor]]] = []

    def keep(what: str, leaves: list[Tensor]) -> None:
        seen.append((what, [leaf.clone() for leaf in leaves]))

    _rerun_shown(trace, weights, examples, keep, other_random_numbers)
    return seen


def _rerun_shown(
    trace: Trace,
    weights: dict[Tensor, Tensor],
    examples: slice | list[int],
    show: Callable[[str, list[Tensor]], None],
    other_random_numbers: bool = False,
) -> None:
    """As `rerun`, and show what goes into each module and comes out: what, and its tensors."""

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        show(f"what goes into {trace.paths[module]} ({type(module).__name__})", tensor_leaves((args, kwargs)))

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        show(f"the output of {trace.paths[module]} ({type(module).__name__})", tensor_leaves(output))

    rerun(trace, weights, examples, trace.paths, enter, leave, other_random_numbers)


def _axis_between(whole: Tensor, part: Tensor, total: int, few: int) -> int | None:
    """The one axis that is as long as the batch, and in a pass with a few examples as those; None if there is none."""
    if whole.dim() != part.dim():
        return None
    differing = [axis for axis, (m, n) in enumerate(zip(whole.shape, part.shape, strict=True)) if m != n]
    is_theirs = len(differing) == 1 and (whole.shape[differing[0]], part.shape[differing[0]]) == (total, few)
    return differing[0] if is_theirs else None


def _differ(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of the same numbers have others."""
    is_number = a.is_floating_point() or a.is_complex()
    return is_number and a.shape == b.shape and not is_close(a, b, VALUES_AGREE)


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
    calls = [call for call in trace.layer_calls if call.reached and call.parameters and call.consumer is None]

    def add_probes(call: LayerCall, output: Any) -> Any:
        leaves, moved = tensor_leaves(output), {}
        for position, axis in zip(call.positions, call.output_axes, strict=True):
            leaf = leaves[position]
            if axis is not None and leaf.dim() > axis and leaf.shape[axis] == count:
                probe = torch.zeros_like(leaf, requires_grad=True)
                probes.append((call, probe, axis))
                moved[position] = leaf + probe
        return with_leaves(output, moved)

    outputs = rerun_with(trace, weights, calls, add_probes, slice(count))
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


def powers_of_two(count: int, device: torch.device) -> Tensor:
    """Factors ``[count]`` from 1 to 128 without a period: no two examples at a fixed distance share them throughout."""
    golden_ratio = 0.6180339887498949
    steps = torch.arange(count, dtype=torch.float64, device="cpu") * golden_ratio
    return (2.0 ** (steps.frac() * 8).floor()).to(device, wide_dtype(device))


def _by_example(tensor: Tensor, axis: int) -> Tensor:
    factors = powers_of_two(tensor.shape[axis], tensor.device).to(tensor.dtype)
    return tensor * factors.reshape(-1, *[1] * (tensor.dim() - 1 - axis))
