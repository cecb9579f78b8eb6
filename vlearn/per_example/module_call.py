"""Running the module of a recorded call again, for what no rule covers, and whether it gives what it gave.

To be called, as all of this file, inside `vlearn.per_example.replay.as_recorded`.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from vlearn.capture.layer_call import LayerCall
from vlearn.capture.pytrees import tensor_leaves
from vlearn.capture.random_state import random_numbers_from
from vlearn.capture.trace import Trace, is_close
from vlearn.per_example.replay import as_recorded, call_with, direct_cotangents

Weights = Mapping[Tensor, Tensor]


class RefusedError(RuntimeError):
    """A call whose examples have no gradients of their own, or none that can be found.

    Args:
        call: the call.
        reason: why not.
    """

    def __init__(self, call: LayerCall, reason: str):
        super().__init__(
            f"{call}: {reason}, so its per-example gradients are not defined. "
            "Use a module that treats its examples each alone, and repeats what it did."
        )


def run_again(call: LayerCall, weights: Weights, args: Any, kwargs: Any) -> list[Tensor]:
    """What the module's forward gives for these arguments, of the outputs that required grad.

    Hooks of the user on this very module have changed the recorded arguments already, and change the output after it
    was recorded: those that compute weights do so again, what they make of arguments and output is left aside.
    """
    given: list[Any] = []
    waiting = [(args, kwargs)]
    handles = [
        call.module.register_forward_pre_hook(
            lambda module, a, k: waiting.pop() if waiting else (a, k), with_kwargs=True
        ),
        call.module.register_forward_hook(lambda module, a, output: given.append(output), prepend=True),
    ]
    try:
        call_with(call.module, weights, args, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    leaves = tensor_leaves(given[-1])  # the module may have called itself
    return [leaves[position] for position in call.positions]


@torch.enable_grad()
def separate_outputs(trace: Trace, weights: Weights) -> None:
    """Let the cotangents of every recorded call be the loss's gradients with respect to its outputs as separate values.

    Args:
        trace: with the gradients of its backward pass, whose calls are changed.
    """
    for call in trace.layer_calls:
        if not (call.is_nested and call.parameters and sum(each is not None for each in call.cotangents) > 1):
            continue
        live = {p: value.detach().requires_grad_(p.requires_grad) for p, value in weights.items()}
        with as_recorded(trace), same_random_numbers_in(call):
            leaves, structure = leaves_of(call, weights)
            outputs = run_again(call, live, *tree_unflatten(leaves, structure))
            # One that is an input, or made of inputs alone, brings the parameters nothing, whatever its cotangent.
            moving = [i for i, each in enumerate(call.cotangents) if each is not None and outputs[i].requires_grad]
            direct = direct_cotangents([(outputs[i], call.cotangents[i]) for i in moving])  # pyright: ignore
        for i, (_, cotangent) in zip(moving, direct, strict=True):
            call.cotangents[i] = cotangent
        call.is_nested = False


def same_random_numbers_in(call: LayerCall) -> AbstractContextManager[None]:
    """Inside, the call draws the random numbers that it drew in the recorded pass, if it drew any."""
    return nullcontext() if call.random_state is None else random_numbers_from(call.random_state)


def leaves_of(call: LayerCall, weights: Weights) -> tuple[list[Any], Any]:
    """(The leaves of the call's arguments, their structure)."""
    leaves, structure = tree_flatten((call.args, call.kwargs))
    dtype = weights[call.parameters[0]].dtype  # autocast may have handed the module narrower inputs
    return [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in leaves], structure


def names_of(call: LayerCall, moving: Any) -> dict[str, Tensor]:
    """The call's parameters by name, of those that move."""
    moving = set(moving)
    return {name: p for name, p in call.module.named_parameters() if p in moving}


def restore_outputs(call: LayerCall, weights: Weights) -> None:
    """Compute the batch's outputs again where a later in-place operation has overwritten them."""
    if all(output._version == version for output, version in call.outputs):
        return
    with torch.no_grad(), same_random_numbers_in(call):
        outputs = run_again(call, weights, call.args, call.kwargs)
    call.outputs = [(output, output._version) for output in outputs]


def examples_first(call: LayerCall, outputs: list[Tensor]) -> list[Tensor | None]:
    """The outputs of a call with the axis of their examples first, None for one that has no such axis."""
    return [None if axis is None else out.movedim(axis, 0) for out, axis in zip(outputs, call.output_axes, strict=True)]


def check_outputs(call: LayerCall, outputs: list[Tensor | None], examples: slice, tolerance: float) -> None:
    """Raise RefusedError if outputs ``[n, ...]``, examples first, are not the recorded ones of these examples."""
    for output, recorded in zip(outputs, examples_first(call, [out for out, _ in call.outputs]), strict=True):
        if output is not None and recorded is not None and not is_close(output, recorded[examples], tolerance):
            if call.random_state is not None:
                raise RefusedError(
                    call, "repeated with the random numbers of torch's generators it gives other outputs"
                )
            raise RefusedError(call, "run on one example at a time it gives other outputs than on the batch")


def check_axes(call: LayerCall) -> None:
    """Raise RefusedError if the loss depends on an output along no axis of which the examples lie."""
    for cotangent, shape, axis in zip(call.cotangents, call.shapes, call.output_axes, strict=True):
        if cotangent is not None and axis is None:
            raise RefusedError(call, f"its output of shape {shape}, which the loss depends on, has no examples in it")
