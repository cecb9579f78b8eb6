"""The change of the model's output if an example were removed: Δf_n = J_n Σ g_n, without any Jacobian.

It is a Jacobian-vector product along a direction of each example's own. One forward-mode pass gives it, in which each
call of a layer adds to the tangents of its outputs what moving its parameters by Σg_n does to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks

from vlearn._torch_internals import set_versions
from vlearn.capture.layer_call import LayerCall
from vlearn.capture.model_checks import ModelChecks, remember
from vlearn.capture.pytrees import tensor_leaves, with_leaves
from vlearn.capture.trace import Trace
from vlearn.layers.example_axes import axis_of
from vlearn.linearized.covariance_products import CovarianceProducts
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.per_example.replay import as_recorded, forward_mode, rerun_with, tangents_in_reverse
from vlearn.per_example.row_sums import agreement

AGREE_IN_DOUBLE = 1e-5  # relative; some layers compute in float32 whatever they are given
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


def check_deviation(
    trace: Trace,
    self_influence: Tensor,
    deviation: list[Tensor],
    cotangents: list[Tensor | None],
    must_agree: Callable[[], bool] = lambda: True,
) -> None:
    """Raise RuntimeError unless ⟨e_n, Δf_n⟩ = g_nᵀΣg_n, looked at once for each kind of pass.

    Not where the loss depends on an output that has no examples.

    Args:
        trace: of the pass.
        self_influence: ``[N]`` g_nᵀΣg_n.
        deviation: Δf of each output.
        cotangents: e of each output, None for one that the loss does not depend on.
        must_agree: whether all of g came by these e, asked where the two differ.
    """
    assert trace.root is not None
    checks = ModelChecks.of(trace.root)
    if trace.kind in checks.deviations:
        return
    products: list[Tensor] = []
    for change, e, axis in zip(deviation, cotangents, trace.output_axes or [0] * len(deviation), strict=True):
        if e is None:
            continue
        if axis is None or change.is_complex() or change.numel() != e.numel():
            return
        product = (change * e.reshape(change.shape)).movedim(axis, 0)
        if product.shape[:1] != self_influence.shape:
            return
        products.append(product.reshape(len(product), math.prod(product.shape[1:])))
    found = torch.cat(products, 1).to(self_influence.dtype)
    size = found.abs().sum(1).max()
    if not bool(size.isfinite() & (size > 0)):
        return
    difference = (found.sum(1) - self_influence).abs().max()
    is_wide = all(each.dtype == torch.float64 for each in (self_influence, *deviation))
    if bool(difference > (AGREE_IN_DOUBLE if is_wide else agreement(trace)) * size) and must_agree():
        raise RuntimeError(
            "the deviation does not agree with the examples' gradients, so it is not that of the recorded pass. A "
            "module may leave in an attribute what it has made of its output, for another one to read: return it with "
            "the output and read it there. Or a hook or a function of autograd changes gradients: leave it out, or "
            "read sensitivities() without the deviation."
        )
    remember(checks.deviations, trace.kind)


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
    if call.rule is None:
        moved = {position: _in_place(leaves[position], to) for position, to in moved.items()}
    return with_leaves(output, moved)


def _in_place(leaf: Tensor, moved: Tensor) -> Tensor:
    """The tensor itself, moved as another of the same value: its module may have kept it, for others to read.

    That other where autograd lets nobody write the tensor, as a part that `chunk` gives.
    """
    version = leaf._version
    try:
        leaf.copy_(moved)
    except RuntimeError:
        return moved
    set_versions({leaf: version})
    return leaf
