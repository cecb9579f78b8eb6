"""What every structure of the posterior precision does, and what it hands out."""

from __future__ import annotations

from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from vlearn.optim.parameters.parameters import Group
from vlearn.optim.sampling.blocks import Block, ParameterSlice
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.sampling.sampler import MeanOf
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.posterior.protocol import Posterior


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

    def draw_block(self, block: Block, noise: Noise) -> None:
        """Write mean + noise into the weights of a block, in which parameters are independent of all others."""
        ...

    def draw_jointly(self, blocks: list[Block], noise: Noise) -> None:
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

    def hessian_rows(self, piece: ParameterSlice) -> Tensor | None:
        """The part of the state that a curvature estimate of a slice moves; None where there is no such estimate."""
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

    def price_estimate(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """E[∇²ℓ] = E[∇ℓ (ess·S(θ - m))ᵀ] of one draw, by Price's theorem; may overwrite the noise θ - m."""
        ...
