"""Where the curvature of a step comes from: the passes of its draws, or the noise and gradients of the draws alone.

One word chooses it, `curvature=`:

    "ggn"        the Gauss-Newton matrix E[Jᵀu uᵀJ], u = R z a probe of the output with R Rᵀ = ∂²ℓ/∂f², z random signs
    "sampled"    the same with u the residual of labels that are sampled from the model
    "empirical"  second moments of the examples' own gradients; IVON, which records no pass, takes the squared gradient
                 of the minibatch times ess
    "price"      Price's theorem, E[∇²ℓ] = E[∇ℓ (S(θ - m))ᵀ], from the noise of the draw: no recorded pass
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor

from vlearn.capture.pytrees import Selector
from vlearn.losses.likelihood import LIKELIHOODS, Likelihood, probe
from vlearn.losses.residual_checks import LossMakeup
from vlearn.optim.parameters.parameters import Group
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.sampling.noise import Noise
from vlearn.optim.sampling.protocols import PassStructure
from vlearn.optim.structures.dense import DenseStructure
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.per_example.recorded_pass import RecordedPass

CURVATURES = ("ggn", "sampled", "empirical", "price")


def check_curvature(owner: str, curvature: str, allowed: tuple[str, ...], remedy: str = "") -> None:
    """Raise ValueError unless an optimizer has this curvature.

    Args:
        allowed: those that it has, the default first.
        remedy: what to do about one that others have.
    """
    if curvature not in allowed:
        *others, last = map(repr, allowed)
        listed = f"{', '.join(others)} or {last}" if others else last
        remedy = remedy if curvature in CURVATURES and remedy else f"use {allowed[0]!r}"
        raise ValueError(f"curvature={curvature!r}, but for {owner} it must be {listed}: {remedy}.")


def check_likelihood(likelihood: Likelihood) -> None:
    """Raise ValueError unless the curvature of a likelihood is known."""
    if not callable(likelihood) and likelihood not in LIKELIHOODS:
        raise ValueError(
            f"likelihood={likelihood!r}, but it must be 'categorical', 'gaussian', 'bernoulli' or a callable: use a "
            "callable that gives the targets' torch.distributions.Distribution for an output."
        )


class NoiseTimesGradient:
    """(θ - m)∘∇ℓ̄ of a draw: Price's estimate but for the precision, which the update multiplies its average with."""

    needs_pass = False

    def of_draw(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """The products, in the place of the noise."""
        torch._foreach_mul_(noise, gradients)
        return noise


class SquaredGradient:
    """ĝ² of a draw, the squared gradient of the minibatch, as in Adam."""

    needs_pass = False

    def of_draw(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """The squares."""
        return list(torch._foreach_mul(gradients, gradients))


class PriceOrSquares:
    """The curvature that each parameter group names, "price" or "empirical", but for the factor of `ivon_step`."""

    needs_pass = False
    _of = {"price": NoiseTimesGradient(), "empirical": SquaredGradient()}

    def of_draw(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """The estimate of one draw."""
        return self._of[group["curvature"]].of_draw(draw, group, slices, noise, gradients)


class PriceCurvature:
    """Price's theorem in the coordinates of a structure; estimates may be negative.

    Args:
        structure: that of the posterior.
    """

    needs_pass = False

    def __init__(self, structure: DiagonalStructure | DenseStructure):
        self._structure = structure

    def of_draw(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """The estimate of one draw."""
        return self._structure.price_estimate(draw, group, slices, noise, gradients)


class PassCurvature:
    """Second moments of gradients from the recorded passes: of the loss's own, or of a probe's.

    Args:
        structure: that of the posterior, which says what is summed over the examples.
        kind: "ggn", "sampled" or "empirical".
        likelihood: what the loss is the negative logarithm of; not needed for "empirical".
        output: which of several outputs of the model the likelihood is of.
    """

    needs_pass = True

    def __init__(
        self, structure: PassStructure, kind: str, likelihood: Likelihood = "categorical", output: Selector = None
    ):
        self._structure = structure
        self.kind, self.likelihood, self.output = kind, likelihood, output
        self.probes = kind != "empirical"

    def cotangent(self, output: Tensor, residual: Tensor, makeup: LossMakeup, noise: Noise) -> Tensor:
        """See `vlearn.optim.watch.watch.PassConsumer`."""
        generator = noise.of_examples.on(output.device)
        return probe(self.likelihood, self.kind, output, residual, makeup, generator)

    def sums(self, recorded: RecordedPass, wanted: Container[Tensor]) -> dict[Any, Tensor]:
        """See `vlearn.optim.watch.watch.PassConsumer`."""
        return self._structure.pass_sums(recorded.probed() if self.probes else recorded, wanted)

    def of_draw(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor] | None:
        """The mean over the examples of the passes under one draw; None on a step without recorded passes."""
        sums = draw.pass_sums
        if sums is None or not sums.count:
            return None
        rows = map(self._structure.hessian_rows, slices)
        return [
            gradient.new_zeros(()).expand_as(gradient) if like is None else sums.mean(piece, like)
            for piece, like, gradient in zip(slices, rows, gradients, strict=True)
        ]
