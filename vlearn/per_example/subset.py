"""Some of the examples of a recorded pass, as if they alone had been recorded."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vlearn.capture.layer_call import LayerCall
from vlearn.capture.pytrees import rows_along, rows_of, tensor_leaves, versions
from vlearn.capture.trace import Trace
from vlearn.layers.example_axes import axis_of


def subset(trace: Trace, examples: Tensor) -> Trace:
    """The trace of the examples ``[K]`` (numbers within the batch)."""
    part = copy.copy(trace)
    part.examples, part.num_examples = examples, len(examples)
    part.args, part.kwargs = rows_of((trace.args, trace.kwargs), trace.input_axes, examples)
    part.versions = versions((part.args, part.kwargs))

    def rows(tree: Any) -> Any:
        return rows_of(tree, [axis_of(leaf, trace.num_examples) for leaf in tree_leaves(tree)], examples)

    part.output, part.cotangents = rows(trace.output), rows(trace.cotangents)
    outputs = zip(tensor_leaves(trace.output), trace.output_versions, tensor_leaves(part.output), strict=True)
    part.output_versions = [_version(*each) for each in outputs]
    part.layer_calls = [_subset_of_call(call, examples) for call in trace.layer_calls]
    return part


def _subset_of_call(call: LayerCall, examples: Tensor) -> LayerCall:
    args, kwargs = rows_of((call.args, call.kwargs), call.input_axes, examples)
    outputs = zip(call.outputs, call.output_axes, strict=False)  # not all calls keep theirs
    return dataclasses.replace(
        call,
        args=args,
        kwargs=kwargs,
        versions=versions((args, kwargs)),
        shapes=[
            shape if axis is None else (*shape[:axis], len(examples), *shape[axis + 1 :])
            for shape, axis in zip(call.shapes, call.output_axes, strict=True)
        ],
        cotangents=[
            None if each is None else rows_along(each, axis, examples)
            for each, axis in zip(call.cotangents, call.output_axes, strict=True)
        ],
        outputs=[
            (rows := rows_along(out, axis, examples), _version(out, before, rows)) for (out, before), axis in outputs
        ],
        whole=(call, examples),
    )


def _version(tensor: Tensor, recorded: int, rows: Tensor) -> int:
    """The version of the chosen rows; none that they have if the tensor was written since it was recorded."""
    return rows._version if tensor._version == recorded else -1


def validate_indices(examples: Any, total: int, device: torch.device) -> Tensor:
    """The numbers ``[K]`` of the examples of a batch that were asked for.

    Raises:
        ValueError: if they are not different whole numbers from 0 to the size of the batch.
    """
    if isinstance(examples, slice):
        examples = range(*examples.indices(total))
    try:
        numbers = torch.as_tensor(examples, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"examples={examples!r}, but they must be numbers of examples: use a tensor [K].") from error
    if numbers.dtype == torch.bool and numbers.shape == (total,):
        numbers = numbers.nonzero()[:, 0]
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if numbers.dim() != 1 or not len(numbers) or not whole:
        raise ValueError(
            f"examples of shape {tuple(numbers.shape)} and {numbers.dtype}, but they must be at least one whole number "
            f"in one dimension, or a mask of the batch's {total} examples."
        )
    if bool((numbers < 0).any()) or bool((numbers >= total).any()) or len(numbers.unique()) < len(numbers):
        raise ValueError(f"examples must be different numbers from 0 to {total - 1}, the minibatch has {total}.")
    return numbers.long()
