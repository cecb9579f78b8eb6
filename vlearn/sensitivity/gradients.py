"""Gradients of each example's own loss, formed for as many examples at a time as memory allows."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from vlearn.capture.examples import checked_uses, dense_gradients
from vlearn.capture.replay import as_recorded
from vlearn.capture.separate import check_separate
from vlearn.sensitivity.linearize import Linearization

GRADIENT_ENTRIES = 2**24  # entries of the gradients of one chunk, 64 MiB of float32


def example_gradients(at: Linearization, limit: int | None = None) -> Iterator[tuple[slice, dict[Tensor, Tensor]]]:
    """g_n by parameter ``[n, *shape]``, a chunk of the batch's examples at a time.

    Args:
        limit: largest number of examples at a time; those of `GRADIENT_ENTRIES` by default.
    """
    at.pull_back_residuals(last=True)
    uses_of = checked_uses(at.trace, at.weights, at.weights)
    check_separate(at.trace, at.weights)
    if limit is None:
        limit = max(1, GRADIENT_ENTRIES // sum(p.numel() for p in at.weights))
    for start in range(0, len(at.batch.index), limit):
        examples = slice(start, min(start + limit, len(at.batch.index)))
        with as_recorded(at.trace):
            gradients = dense_gradients(uses_of, examples, at.weights, at.trace.tolerance)
        yield examples, gradients
