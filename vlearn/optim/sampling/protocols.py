"""What a sampler works with: the structure of the precision, the curvature estimate, and who records passes."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.protocol import Posterior
from vlearn.optim.parameters.parameters import Group
from vlearn.optim.sampling.blocks import ParameterSlice, SliceBlock
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.sampling.noise import Noise
from vlearn.per_example.recorded_pass import RecordedPass

MeanOf = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]  # parameters by name -> a view of their mean by name


@dataclass(frozen=True)
class PosteriorContext:
    """What a view of the optimizer's state has beside the state.

    Attributes:
        mean_of: the mean of some parameters, as a view by name.
        check: raises RuntimeError once the state has changed.
        at_mean: gives a context in which the weights are the mean.
    """

    mean_of: MeanOf
    check: Callable[[], None]
    at_mean: Callable[[], AbstractContextManager[None]]


class Structure(Protocol):
    """How the posterior precision is kept in the optimizer's state, drawn from, and read.

    It has no state of its own; all of it is in the optimizer's.
    """

    def init_states(self) -> None:
        """Give every trainable parameter that has none its state."""
        ...

    def is_whole(self, p: Tensor) -> bool:
        """Whether a parameter is drawn and updated in one piece, never in slices of its rows."""
        ...

    def take_prior(self, prior: Gaussian, named: dict[str, Tensor]) -> dict[Tensor, dict[str, Tensor]]:
        """What a prior puts into the states of parameters, which it knows by these names: all that can be used of it.

        Raises:
            ValueError: if the structure cannot use it.
        """
        ...

    def draw_block(self, block: SliceBlock, noise: Noise) -> None:
        """Write mean + noise into the weights of a block, in which parameters are independent of all others."""
        ...

    def draw_jointly(self, blocks: list[SliceBlock], noise: Noise) -> None:
        """Write mean + noise into the weights of the parameters that `draw_block` left out."""
        ...

    def posterior(self, context: PosteriorContext) -> Posterior:
        """The posterior as a view of the state."""
        ...

    def diagonal_hessian(self) -> dict[Tensor, Tensor]:
        """The diagonal of the Hessian of the mean loss, without the weight decay, by parameter in its shape."""
        ...

    def has_curvature(self, p: Tensor) -> bool:
        """Whether a curvature estimate says anything of a parameter alone; the same in all processes."""
        ...


class PassStructure(Structure, Protocol):
    """A structure that learns from recorded passes."""

    def hessian_rows(self, piece: ParameterSlice) -> Tensor | None:
        """The state tensor whose shape and dtype the curvature estimate of a slice takes; None where it has none."""
        ...

    def pass_sums(self, recorded: RecordedPass, wanted: Container[Tensor]) -> dict[Any, Tensor]:
        """What the curvature of a recorded pass is the mean of, summed over its examples.

        Args:
            recorded: the pass, whose gradients' second moments are the curvature.
            wanted: the parameters that have a gradient.
        Returns:
            By parameter, in its shape and maybe further axes, or by keys of the structure's own.
        """
        ...


class Curvature(Protocol):
    """Where the curvature of a step comes from: what is averaged over draws beside the gradient.

    Attributes:
        needs_pass: whether it comes from the recorded passes under a draw.
    """

    needs_pass: bool

    def of_draw(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor] | None:
        """The estimate of one draw, of each slice; None if this draw has none. May overwrite the noise θ - m."""
        ...


class PassListener(Protocol):
    """What records the passes that are made under the draws: a watch."""

    def collect(self) -> None:
        """Take what the curvature estimate wants from the last pass, before its draw ends."""
        ...

    def forget_calls(self) -> None:
        """Abandon a forward pass that was interrupted."""
        ...

    def forget_pass(self) -> None:
        """The weights of the last pass are gone."""
        ...

    def remove(self) -> None:
        """Take all hooks off the model."""
        ...
