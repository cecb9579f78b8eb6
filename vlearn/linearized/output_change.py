"""The change of the model's output if an example were removed: Δf_n = J_n Σ g_n, without any Jacobian.

It is a Jacobian-vector product along a direction of each example's own. One forward-mode pass gives it, in which each
call of a layer adds to the tangents of its outputs what moving its parameters by Σg_n does to them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks

from vlearn.capture.layer_call import LayerCall
from vlearn.capture.pytrees import tensor_leaves, with_leaves
from vlearn.capture.trace import Trace
from vlearn.layers.example_axes import axis_of
from vlearn.linearized.covariance_products import CovarianceProducts
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.per_example.replay import as_recorded, forward_mode, rerun_with, tangents_in_reverse

_CHECKPOINTED = (
    "no deviation through checkpoint() (or other hooks on saved tensors) where an operation of the model has no "
    "forward derivative, as checkpoint() itself before torch 2.12: leave the deviation out, or do not checkpoint."
)


def output_deviation(recorded: RecordedPass, products: CovarianceProducts) -> list[Tensor]:
    """J_n Σ g_n of every example by one forward-mode pass, for each output tensor that required grad.

    Each call adds its tangents to those of its outputs. The pass repeats the recorded forward: same inputs, weights,
    modes and random numbers. Buffers stay as they are. Where an operation has no forward derivative, two backward
    passes take its place.

    Args:
        recorded: the pass.
        products: those of its gradients with Σ, with their tangents.
    Raises:
        RuntimeError: if those backward passes would have to recompute a checkpoint.
    """
    trace, root = recorded.trace, recorded.trace.root
    assert products.tangents is not None and root is not None
    trace.check_unchanged()
    with as_recorded(trace):
        try:
            with forward_mode(root.modules()), forward_ad.dual_level():
                outputs = _replay(recorded, products.tangents, None)
                pairs = [forward_ad.unpack_dual(output) for output in outputs]
                return [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs]
        except NotImplementedError:
            size = torch.zeros_like(products.self_influence, requires_grad=True)
            # A checkpoint would recompute only after the replay: with other weights, and not moved by `size`.
            with disable_saved_tensors_hooks(_CHECKPOINTED):
                outputs = _replay(recorded, products.tangents, size)
            axes = [axis_of(output, trace.num_examples) for output in outputs]
            with_examples = [
                output.movedim(axis, 0) for output, axis in zip(outputs, axes, strict=True) if axis is not None
            ]
            found = iter(tangents_in_reverse(with_examples, [size], [torch.ones_like(size)]))
            return [
                torch.zeros_like(output) if axis is None else next(found).movedim(0, axis)
                for output, axis in zip(outputs, axes, strict=True)
            ]


def _replay(
    recorded: RecordedPass,
    tangents: dict[LayerCall, list[Tensor]],
    size: Tensor | None,
) -> list[Tensor]:
    """Outputs of the recorded pass, those of each call moved along its tangents: by `size`, or as dual numbers."""
    trace, weights = recorded.trace, recorded.weights
    dtype = next(iter(weights.values())).dtype
    with _known_outputs(trace, dtype) if size is None else nullcontext():
        leaves = rerun_with(
            trace, weights, tangents, lambda call, output: _moved_along(output, call, tangents[call], size)
        )
    outputs = [leaves[position] for position in trace.positions]
    trace.check_replayed(outputs)
    return outputs


@contextmanager
def _known_outputs(trace: Trace, dtype: torch.dtype) -> Iterator[None]:
    """Layers whose outputs were kept carry tangents alone, which is half of the forward-mode pass."""
    calls_of: dict[nn.Module, list[LayerCall]] = {}
    for call in trace.layer_calls:
        calls_of.setdefault(call.module, []).append(call)

    def is_known(call: LayerCall) -> bool:
        output = call.intact_output if call.rule is not None and call.rule.linear is not None else None
        return output is not None and output.dtype == dtype and call.input_axes == [0]

    known = {
        m: calls for m, calls in calls_of.items() if len(calls) == trace.num_calls[m] and all(map(is_known, calls))
    }
    called: list[nn.Module] = []
    handles = [module.register_forward_pre_hook(lambda m, args: called.append(m)) for module in known]
    try:
        for module, calls in known.items():
            module.forward = partial(_carry_tangent, trace, module, iter(calls), called)  # pyright: ignore
        yield
    finally:
        for module, handle in zip(known, handles, strict=True):
            handle.remove()
            module.__dict__.pop("forward", None)  # a layer with a rule has none of its own


def _carry_tangent(
    trace: Trace, module: nn.Module, calls: Iterator[LayerCall], called: list[nn.Module], x: Tensor
) -> Tensor:
    """Forward of a layer with a rule: the recorded output, and the linear image of the input's tangent."""
    if not called:  # by module.forward(x), which no hook has recorded
        return type(module).forward(module, x)
    called.pop()
    call = next(calls)
    assert call.rule is not None and call.rule.linear is not None and call.intact_output is not None
    primal, tangent = forward_ad.unpack_dual(x)
    trace.check_repeats(primal, call.input)
    if tangent is None:
        return call.intact_output
    return forward_ad.make_dual(call.intact_output, call.rule.linear(call.module, tangent))


def _moved_along(output: Any, call: LayerCall, tangents: list[Tensor], size: Tensor | None) -> Any:
    """The same output of a call with its tensors moved, see `_replay`."""
    leaves, moved = tensor_leaves(output), {}
    rows_of = call.output_rows or [None] * len(tangents)
    for position, axis, rows, extra in zip(call.positions, call.output_axes, rows_of, tangents, strict=True):
        if axis is None:
            continue
        leaf = leaves[position]
        extra = extra.to(leaf.dtype)
        if size is not None:
            of_rows = size if rows is None else size[rows.index]
            moved[position] = leaf + of_rows.reshape(-1, *[1] * (extra.dim() - 1 - axis)) * extra
        else:
            if leaf.shape != extra.shape or 0 in leaf.stride():  # of a call that all examples share, or expanded
                leaf = leaf.expand(extra.shape).clone()
            primal, tangent = forward_ad.unpack_dual(leaf)
            moved[position] = forward_ad.make_dual(primal, extra if tangent is None else tangent + extra)
    return with_leaves(output, moved)
