"""What an update rule works from: the slices of one block, with averages over the draws of the step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from vlearn.optim.parameters.parameters import Group
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.optim.structures.diagonal import DiagonalStructure, use_foreach


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


def split_by_step(structure: DiagonalStructure, update: BlockUpdate) -> Iterator[tuple[list[list[Tensor]], float, int]]:
    """What one call of an update function works on: (means, momenta, hessians, gradients, curvatures), 1 - β₁ᵗ, t.

    The steps are counted. Slices go in one call where multi-tensor operations are wanted and the numbers t of their
    steps agree; these differ where parameters had no gradient in some steps.
    """
    group, slices = update.group, update.slices
    corrections = [structure.count_step(group, piece) for piece in slices]
    steps = [int(structure.parameters.state[piece.parameter]["step"]) for piece in slices]
    together = use_foreach(group, slices) and len(set(steps)) == 1
    for places in [range(len(slices))] if together else [[i] for i in range(len(slices))]:
        part = [slices[i] for i in places]
        columns = [
            [piece.exact_mean(structure.parameters) for piece in part],
            structure.state_of(part, "momentum"),
            structure.state_of(part, "hessian"),
            [update.gradients[i] for i in places],
            [] if update.curvatures is None else [update.curvatures[i] for i in places],
        ]
        yield columns, corrections[places[0]], steps[places[0]]
