"""What an update rule works from: the slices of one block, with averages over the draws of the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from vlearn.optim.parameters.parameters import Group
from vlearn.optim.sampling.blocks import ParameterSlice


class BlockUpdate(NamedTuple):
    """Parameter slices that received a gradient.

    Attributes:
        group: their parameter group.
        slices: the slices.
        gradients: of the mean loss, averaged over the step's draws.
        curvatures: the curvature estimates, averaged likewise; None if this step has none, so that the Hessian stays.
    """

    group: Group
    slices: list[ParameterSlice]
    gradients: list[Tensor]
    curvatures: list[Tensor] | None


def foreach_parts(
    columns: list[list[Any]], corrections: list[float], together: bool
) -> Iterator[tuple[list[list[Any]], float]]:
    """The tensors that one call of an update function works on, with the correction 1 - β₁ᵗ of their momentum.

    Args:
        columns: means, states and gradients, each one tensor for each slice.
        corrections: of each slice; they differ where parameters had no gradient in some steps.
        together: all slices in one call, if their corrections allow it; else each by itself.
    """
    if together and len(set(corrections)) == 1:
        yield columns, corrections[0]
        return
    for i, correction in enumerate(corrections):
        yield [[column[i]] if column else [] for column in columns], correction
