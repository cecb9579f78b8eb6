"""Some of the examples of a recorded pass, as if they alone had been recorded."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vlearn.capture.trace import Trace
from vlearn.capture.tree import is_per_example, rows_of, tensor_leaves, versions
from vlearn.capture.use import Use


def part_of(trace: Trace, examples: Tensor) -> Trace:
    """The trace of the examples ``[K]`` (numbers within the batch).

    It is not checked again: `check_layout` and `check_separate` want the whole batch.
    """
    total = trace.num_examples
    part = copy.copy(trace)
    part.examples, part.num_examples = examples, len(examples)
    part.args, part.kwargs, part.output = rows_of((trace.args, trace.kwargs, trace.output), total, examples)
    part.versions = versions((part.args, part.kwargs))
    outputs = zip(tensor_leaves(trace.output), trace.output_versions, tensor_leaves(part.output), strict=True)
    part.output_versions = [_version(*each) for each in outputs]
    part.cotangents = rows_of(trace.cotangents, total, examples)
    part.uses = [_part_of_use(use, total, examples) for use in trace.uses]
    return part


def _part_of_use(use: Use, total: int, examples: Tensor) -> Use:
    args, kwargs = rows_of((use.args, use.kwargs), total, examples)
    outputs = [(chosen := rows_of(out, total, examples), _version(out, before, chosen)) for out, before in use.outputs]
    return dataclasses.replace(
        use,
        args=args,
        kwargs=kwargs,
        versions=versions((args, kwargs)),
        shapes=[(len(examples), *shape[1:]) if shape[:1] == (total,) else shape for shape in use.shapes],
        cotangents=rows_of(use.cotangents, total, examples),
        outputs=outputs,
        per_example=[is_per_example(leaf, total) for leaf in tree_leaves((use.args, use.kwargs))],
    )


def _version(tensor: Tensor, recorded: int, chosen: Tensor) -> int:
    """The version of the chosen rows; none that they have if the tensor was written since it was recorded."""
    return chosen._version if tensor._version == recorded else -1


def numbers_of(examples: Any, total: int, device: torch.device) -> Tensor:
    """The numbers ``[K]`` of the examples of a batch that were asked for.

    Raises:
        ValueError: if they are not different whole numbers from 0 to the size of the batch.
    """
    if isinstance(examples, slice):
        examples = range(*examples.indices(total))
    try:
        found = torch.as_tensor(examples, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"examples={examples!r}, but they must be numbers of examples: use a tensor [K].") from error
    if found.dtype == torch.bool and found.shape == (total,):
        found = found.nonzero()[:, 0]
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.dim() != 1 or not len(found) or not whole:
        raise ValueError(
            f"examples of shape {tuple(found.shape)} and {found.dtype}, but they must be at least one whole number in "
            f"one dimension, or a mask of the batch's {total} examples."
        )
    if bool((found < 0).any()) or bool((found >= total).any()) or len(found.unique()) < len(found):
        raise ValueError(f"examples must be different numbers from 0 to {total - 1}, the minibatch has {total}.")
    return found.long()
