"""What an update rule works from: the slices of one block, with averages over the draws of the step."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from vlearn.optim.parameters.parameters import Group
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.optim.structures.diagonal import DiagonalStructure, momentum_correction, use_foreach
from vlearn.optim.structures.prior import Decay, decay_of

T = TypeVar("T")


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

    def parted(self, parameters: Container[Tensor]) -> tuple[BlockUpdate, BlockUpdate]:
        """(the slices of other parameters, those of these)."""
        inside = [piece.parameter in parameters for piece in self.slices]
        return self._where(inside, False), self._where(inside, True)

    def _where(self, flags: list[bool], wanted: bool) -> BlockUpdate:
        places = [i for i, flag in enumerate(flags) if flag is wanted]
        curvatures = None if self.curvatures is None else [self.curvatures[i] for i in places]
        gradients = [self.gradients[i] for i in places]
        return BlockUpdate(self.group, [self.slices[i] for i in places], gradients, curvatures)


def split_by_step(
    structure: DiagonalStructure, update: BlockUpdate, of_step: Callable[[Group, int], T]
) -> Iterator[tuple[list[list[Tensor]], Decay, Any, T]]:
    """What one call of an update function works on, and with.

    That is (means, momenta, hessians, gradients, curvatures), their weight decay, 1 - β₁ᵗ, and a number.

    The steps are counted. Slices go in one call where multi-tensor operations are wanted and the two numbers agree;
    these differ where parameters had no gradient in some steps. Of a group that is `capturable` the corrections are
    tensors, one of each slice, and the number that of every step.

    Args:
        of_step: the number that a rule takes beside 1 - β₁ᵗ, from the group and a parameter's step t, from 1.
    """
    group, slices = update.group, update.slices
    columns = [
        [piece.exact_mean(structure.parameters) for piece in slices],
        structure.state_of(slices, "momentum"),
        structure.state_of(slices, "hessian"),
        update.gradients,
        update.curvatures or [],
    ]
    if group.get("capturable", False):
        corrections = structure.corrections(group, slices)
        yield columns, decay_of(structure.parameters, group, slices), corrections, of_step(group, 1)
        return
    steps = structure.count_steps(slices)
    of_steps = {step: (momentum_correction(group, step), of_step(group, step)) for step in set(steps)}
    decay = decay_of(structure.parameters, group, slices)
    if use_foreach(group, slices) and len(set(of_steps.values())) == 1:
        yield columns, decay, *of_steps[steps[0]]
        return
    for i, step in enumerate(steps):
        yield [[column[i]] if column else [] for column in columns], decay.of(i), *of_steps[step]
