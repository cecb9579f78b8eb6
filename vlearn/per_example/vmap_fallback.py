"""Exact per-example gradients of a module that no rule covers: slower, never approximate.

The module is run again on one example at a time, vectorised by `torch.func.vmap`, or one by one where
that cannot be done. The recomputed outputs must equal the recorded ones; a module that mixes examples
(batch statistics, another axis first) or draws random numbers does not pass, and is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import jvp, vjp, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from vlearn.capture.layer_call import LayerCall
from vlearn.capture.pytrees import is_per_example, tensor_leaves
from vlearn.capture.trace import is_close
from vlearn.per_example.replay import call_with, forward_mode, tangents_in_reverse

Weights = dict[Tensor, Tensor]


class _RefusedError(RuntimeError):
    def __init__(self, call: LayerCall, reason: str):
        super().__init__(
            f"{call}: {reason}, so its per-example gradients are not defined. "
            "Use a module that treats dimension 0 as examples, each alone, and is deterministic."
        )


@torch.enable_grad()
def per_example_gradients(call: LayerCall, examples: slice, weights: Weights, tolerance: float) -> Weights:
    """Gradient of each example's own loss with respect to the parameters of one call.

    To be called, as all of this file, inside `vlearn.per_example.replay.as_recorded`.

    Args:
        call: a call whose backward pass has come.
        examples: which examples.
        weights: the value of each parameter of the call during the recorded pass.
        tolerance: relative difference allowed between the recorded and the recomputed outputs.
    Returns:
        By parameter ``[n, *shape]``, on the scale of the recorded backward pass.
    Raises:
        RuntimeError: if the module does not treat examples one by one, or is not deterministic.
    """
    names, run_example, batched = _example_call(call, examples, weights, call.parameters)
    values = {name: weights[p] for name, p in names.items()}
    cotangents = [
        torch.zeros(shape, device=out.device, dtype=out.dtype)[examples] if c is None else c[examples]
        for c, shape, (out, _) in zip(call.cotangents, call.shapes, call.outputs, strict=True)
    ]

    def gradient(leaves: list[Tensor], cotangent: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        outputs, pullback = vjp(lambda v: run_example(v, leaves), values)[:2]
        return pullback([c.unsqueeze(0).to(o.dtype) for c, o in zip(cotangent, outputs, strict=True)])[0], outputs

    def gradient_of_one(leaves: list[Tensor], cotangent: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        live = {name: value.detach().requires_grad_() for name, value in values.items()}
        outputs = run_example(live, leaves)
        pulled = [(o, c.unsqueeze(0).to(o.dtype)) for c, o in zip(cotangent, outputs, strict=True) if o.requires_grad]
        grads: Any = [None] * len(live)
        if pulled:
            grads = torch.autograd.grad(
                [o for o, _ in pulled], list(live.values()), [c for _, c in pulled], allow_unused=True
            )
        pairs = zip(live.items(), grads, strict=True)
        return {n: torch.zeros_like(v) if g is None else g for (n, v), g in pairs}, [o.detach() for o in outputs]

    gradients, outputs = _each_example(call, gradient, gradient_of_one, batched, cotangents)
    _restore_outputs(call, weights)
    _check_outputs(call, outputs, examples, tolerance)
    return {p: gradients[name].detach() for name, p in names.items()}


def output_tangents(call: LayerCall, examples: slice, weights: Weights, directions: Weights) -> list[Tensor]:
    """Change of the module's outputs when example n's parameters move along its own direction.

    Args:
        call, examples, weights: as for `per_example_gradients`.
        directions: by parameter ``[n, *shape]``; a parameter without one stays.
    Returns:
        For each output ``[n, ...]``, first order.
    """
    names, run_example, batched = _example_call(call, examples, weights, directions)
    values = {name: weights[p] for name, p in names.items()}
    moves = {name: directions[p] for name, p in names.items()}

    def tangent(leaves: list[Tensor], move: dict[str, Tensor]) -> list[Tensor]:
        return jvp(lambda v: run_example(v, leaves), (values,), (move,))[1]

    def tangent_of_one(leaves: list[Tensor], move: dict[str, Tensor]) -> list[Tensor]:
        try:
            with forward_ad.dual_level():
                outputs = run_example({n: forward_ad.make_dual(v, move[n]) for n, v in values.items()}, leaves)
                pairs = [forward_ad.unpack_dual(output) for output in outputs]
                return [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in pairs]
        except NotImplementedError:
            live = {name: value.detach().requires_grad_() for name, value in values.items()}
            return tangents_in_reverse(run_example(live, leaves), list(live.values()), list(move.values()))

    with forward_mode(call.module.modules()):
        tangents = _each_example(call, tangent, tangent_of_one, batched, moves)
    return [tangent.squeeze(1).detach() for tangent in tangents]


def _example_call(
    call: LayerCall, examples: slice, weights: Weights, moving: Iterable[Tensor]
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor], list[Tensor]], list[Tensor]], list[Tensor]]:
    """(parameters by name, call(parameters, one example's leaves) -> outputs [1, ...], batched leaves)."""
    call.check_unchanged()
    moving = set(moving)
    names: dict[str, Tensor] = {name: p for name, p in call.module.named_parameters() if p in moving}
    leaves, structure = tree_flatten((call.args, call.kwargs))
    dtype = weights[call.parameters[0]].dtype  # autocast may have handed the module narrower inputs
    leaves = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves]
    is_batched = call.has_example_axis or [is_per_example(x, call.shapes[0][0]) for x in leaves]
    batched = [x[examples] for x, flag in zip(leaves, is_batched, strict=True) if flag]

    def run_example(values: dict[str, Tensor], example: list[Tensor]) -> list[Tensor]:
        rows = iter(example)
        filled = [next(rows).unsqueeze(0) if flag else x for x, flag in zip(leaves, is_batched, strict=True)]
        args, kwargs = tree_unflatten(filled, structure)
        now = {**weights, **{p: values[name] for name, p in names.items()}}
        output = call_with(call.module, now, args, kwargs)
        outputs = [tensor_leaves(output)[position] for position in call.positions]
        if any(o.shape != (1, *shape[1:]) for o, shape in zip(outputs, call.shapes, strict=True)):
            raise _RefusedError(call, "run on one example at a time it gives outputs of another shape")
        return outputs

    return names, run_example, batched


def _each_example(call: LayerCall, vectorised: Callable, single: Callable, batched: list[Tensor], others: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # of vmap over one operation: still exact
        try:
            return vmap(vectorised, randomness="error")(batched, others)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            if "randomness" in str(error):
                raise _RefusedError(call, "it draws random numbers itself") from error
        before = torch.get_rng_state()
        leaves, structure = tree_flatten(others)
        try:
            rows = [
                single([b[n] for b in batched], tree_unflatten([leaf[n] for leaf in leaves], structure))
                for n in range(batched[0].shape[0])
            ]
        except _RefusedError:
            raise
        except Exception as error:
            raise _RefusedError(call, f"it does not run on one example at a time ({error})") from error
        if not torch.equal(before, torch.get_rng_state()):
            torch.set_rng_state(before)
            raise _RefusedError(call, "it draws random numbers itself")
        flat = [tree_flatten(row) for row in rows]
        return tree_unflatten([torch.stack(column) for column in zip(*(f[0] for f in flat), strict=True)], flat[0][1])


def _restore_outputs(call: LayerCall, weights: Weights) -> None:
    """Compute the batch's outputs again where a later in-place operation has overwritten them."""
    if all(output._version == version for output, version in call.outputs):
        return
    with torch.no_grad():
        leaves = tensor_leaves(call_with(call.module, weights, call.args, call.kwargs))
    call.outputs = [(leaves[position], leaves[position]._version) for position in call.positions]


def _check_outputs(call: LayerCall, outputs: list[Tensor], examples: slice, tolerance: float) -> None:
    for output, (recorded, _) in zip(outputs, call.outputs, strict=True):
        if not is_close(output.squeeze(1), recorded[examples], tolerance):
            reason = "run on one example at a time it gives other outputs than on the batch"
            raise _RefusedError(call, reason)
