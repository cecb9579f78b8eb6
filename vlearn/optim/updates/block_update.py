"""What an update rule works from: the slices of one block, with averages over the draws of the step."""

from __future__ import annotations

from typing import NamedTuple

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
