"""Exact per-example gradients of a module that no rule covers: slower, never approximate.

The module is run again on one example at a time, vectorised by `torch.func.vmap`, or one by one where
that cannot be done. The recomputed outputs must equal the recorded ones; a module that mixes examples
(batch statistics, another axis first) does not pass, and is refused. One that draws random numbers, and one of a batch
whose examples an index gives, is run on the whole batch instead (`vlearn.per_example.whole_batch_fallback`).
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
from vlearn.capture.random_state import has_drawn, random_state, set_random_state
from vlearn.per_example import whole_batch_fallback
from vlearn.per_example.module_call import (
    RefusedError,
    check_axes,
    check_outputs,
    leaves_of,
    names_of,
    restore_outputs,
    run_again,
)
from vlearn.per_example.replay import forward_mode, tangents_in_reverse

Weights = dict[Tensor, Tensor]


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
        RuntimeError: if the module does not treat examples one by one, or draws random numbers that are not torch's
            default ones.
    """
    check_axes(call)
    if call.random_state is not None or call.output_rows:
        return whole_batch_fallback.per_example_gradients(call, examples, weights, tolerance)
    names, run_example, batched = _example_call(call, examples, weights, call.parameters)
    values = {name: weights[p] for name, p in names.items()}
    of_outputs = zip(call.cotangents, call.shapes, call.output_axes, call.outputs, strict=True)
    cotangents = [
        (torch.zeros(shape, device=out.device, dtype=out.dtype) if c is None else c).movedim(axis, 0)[examples]
        for c, shape, axis, (out, _) in of_outputs
        if axis is not None
    ]
    axes = [axis for axis in call.output_axes if axis is not None]

    def back(cotangent: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
        """The cotangents of one example in the outputs' shapes."""
        return [c.unsqueeze(axis).to(o.dtype) for c, axis, o in zip(cotangent, axes, outputs, strict=True)]

    def gradient(leaves: list[Tensor], cotangent: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        outputs, pullback = vjp(lambda v: run_example(v, leaves), values)[:2]
        return pullback(back(cotangent, outputs))[0], outputs

    def gradient_of_one(leaves: list[Tensor], cotangent: list[Tensor]) -> tuple[dict[str, Tensor], list[Tensor]]:
        live = {name: value.detach().requires_grad_() for name, value in values.items()}
        outputs = run_example(live, leaves)
        pulled = [(o, c) for o, c in zip(outputs, back(cotangent, outputs), strict=True) if o.requires_grad]
        grads: Any = [None] * len(live)
        if pulled:
            grads = torch.autograd.grad(
                [o for o, _ in pulled], list(live.values()), [c for _, c in pulled], allow_unused=True
            )
        pairs = zip(live.items(), grads, strict=True)
        return {n: torch.zeros_like(v) if g is None else g for (n, v), g in pairs}, [o.detach() for o in outputs]

    gradients, outputs = _each_example(call, gradient, gradient_of_one, batched, cotangents)
    restore_outputs(call, weights)
    check_outputs(call, _stacked(call, outputs), examples, tolerance)
    return {p: gradients[name].detach() for name, p in names.items()}


def output_tangents(call: LayerCall, examples: slice, weights: Weights, directions: Weights) -> list[Tensor | None]:
    """Change of the module's outputs when example n's parameters move along its own direction.

    Args:
        call, examples, weights: as for `per_example_gradients`.
        directions: by parameter ``[n, *shape]``; a parameter without one stays.
    Returns:
        For each output ``[n, ...]``, the examples first, to first order; None for an output that has none.
    """
    if call.random_state is not None or call.output_rows:
        return whole_batch_fallback.output_tangents(call, examples, weights, directions)
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
    return [None if rows is None else rows.detach() for rows in _stacked(call, tangents)]


def _example_call(
    call: LayerCall, examples: slice, weights: Weights, moving: Iterable[Tensor]
) -> tuple[dict[str, Tensor], Callable[[dict[str, Tensor], list[Tensor]], list[Tensor]], list[Tensor]]:
    """(parameters by name, call(parameters, one example's leaves) -> its outputs, leaves with the examples first)."""
    call.check_unchanged()
    names = names_of(call, moving)
    leaves, structure = leaves_of(call, weights)
    # Contiguous: torch crashes in some derivatives of other layouts (group_norm's).
    batched = [
        x.movedim(axis, 0)[examples].contiguous()
        for x, axis in zip(leaves, call.input_axes, strict=True)
        if axis is not None
    ]

    def run_example(values: dict[str, Tensor], example: list[Tensor]) -> list[Tensor]:
        rows = iter(example)
        filled = [
            x if axis is None else next(rows).unsqueeze(axis) for x, axis in zip(leaves, call.input_axes, strict=True)
        ]
        now = {**weights, **{p: values[name] for name, p in names.items()}}
        outputs = []
        for output, shape, axis in zip(
            run_again(call, now, *tree_unflatten(filled, structure)), call.shapes, call.output_axes, strict=True
        ):
            if axis is None:
                continue
            if output.shape != (*shape[:axis], 1, *shape[axis + 1 :]):
                raise RefusedError(call, "run on one example at a time it gives outputs of another shape")
            outputs.append(output)
        return outputs

    return names, run_example, batched


def _stacked(call: LayerCall, outputs: list[Tensor]) -> list[Tensor | None]:
    """``[n, ...]`` for each output of the call, from its stacked outputs of one example; None where it has no axis."""
    given = iter(outputs)
    return [None if axis is None else next(given).squeeze(axis + 1) for axis in call.output_axes]


def _each_example(call: LayerCall, vectorised: Callable, single: Callable, batched: list[Tensor], others: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # of vmap over one operation: still exact
        try:
            return vmap(vectorised, randomness="error")(batched, others)
        except Exception as error:  # of torch, or of the module where it looks into its inputs
            if "randomness" in str(error):
                raise _draws(call) from error
        before = random_state(batched)
        leaves, structure = tree_flatten(others)
        try:
            rows = [
                single([b[n] for b in batched], tree_unflatten([leaf[n] for leaf in leaves], structure))
                for n in range(batched[0].shape[0])
            ]
        except RefusedError:
            raise
        except Exception as error:
            raise RefusedError(call, f"it does not run on one example at a time ({error})") from error
        if has_drawn(before):
            set_random_state(before)
            raise _draws(call)
        flat = [tree_flatten(row) for row in rows]
        return tree_unflatten([torch.stack(column) for column in zip(*(f[0] for f in flat), strict=True)], flat[0][1])


def _draws(call: LayerCall) -> RefusedError:
    return RefusedError(call, "it draws random numbers that are not those of torch's default generators")
