"""A step of IVON in the eigenbasis of a matrix's gradients, and how that basis follows them.

Vyas et al., 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321; Minut et al., 2026,
"SOAP-Bubbles: Structured Weight Uncertainty for Neural Networks", arXiv:2606.23357.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vlearn.gaussians.eigenbasis import eigen, power_iteration, rotate_diagonal, without_ties
from vlearn.optim.parameters.options import beta2_of_step
from vlearn.optim.parameters.parameters import Group
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.structures.diagonal import momentum_correction
from vlearn.optim.structures.eigenbasis import EigenbasisStructure
from vlearn.optim.structures.prior import decay_of
from vlearn.optim.updates.block_update import BlockUpdate
from vlearn.optim.updates.curvature import PriceOrSquares
from vlearn.optim.updates.hessian_noise import add_noise
from vlearn.optim.updates.riemannian import ivon_settings, measures_noise, move_hessians
from vlearn.per_example.kronecker_factors import Layer

TIES = 1e-3  # of the mean eigenvalue: directions with less keep near the entries' own axes


class EigenbasisCurvature(PriceOrSquares):
    """As `PriceOrSquares`, with noise and gradient of a matrix in the basis in which the noise was made.

    Args:
        structure: that of the posterior.
    """

    def __init__(self, structure: EigenbasisStructure):
        self._structure = structure

    def of_draw(
        self, draw: Draw, group: Group, slices: list[ParameterSlice], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """The estimate of one draw; a matrix's is of its coordinates, in its shape."""
        structure, layer_of = self._structure, self._structure.layer_of()
        noise, gradients = list(noise), list(gradients)
        for i, piece in enumerate(slices):
            layer = layer_of.get(piece.parameter)
            if layer is not None:
                coordinates, piece.coordinates = piece.coordinates, None
                if coordinates is None or not draw.is_intact(piece.parameter):
                    coordinates = structure.into_basis(layer, noise[i])
                noise[i] = coordinates.reshape_as(gradients[i])
                gradients[i] = structure.into_basis(layer, gradients[i]).reshape_as(gradients[i])
        return super().of_draw(draw, group, slices, noise, gradients)


def move_matrices(structure: EigenbasisStructure, update: BlockUpdate) -> None:
    """`ivon_step` of matrices, with Hessian and preconditioner in the basis; then the factors move."""
    layer_of, settings = structure.layer_of(), ivon_settings(update.group)
    for piece, gradient, statistic in zip(update.slices, update.gradients, update.curvatures or [], strict=True):
        with torch.autocast(gradient.device.type, enabled=False):
            _move_matrix(structure, layer_of[piece.parameter], update.group, piece, gradient, statistic, settings)


def _move_matrix(
    structure: EigenbasisStructure,
    layer: Layer,
    group: Group,
    piece: ParameterSlice,
    gradient: Tensor,
    statistic: Tensor,
    settings: dict[str, Any],
) -> None:
    state = structure.parameters.state[layer.weight]
    if measures_noise(group, [piece], structure.parameters):
        add_noise(structure.parameters, group, [piece], [statistic], group["ess"])
    state["step"] += 1
    hessian, momentum, rate = state["hessian"], state["momentum"], structure.rate_of(layer)
    move_hessians(
        [hessian],
        [statistic.reshape_as(hessian)],
        beta2=beta2_of_step(group, int(state["step"])),
        decay=[rate] if isinstance(rate, Tensor) else rate,
        **{name: settings[name] for name in ("price", "bounded", "ess")},
    )
    momentum.lerp_(gradient, 1 - settings["beta1"])
    correction = momentum_correction(group, state["step"])
    mean = piece.exact_mean(structure.parameters)
    decay = decay_of(structure.parameters, group, [piece])
    if isinstance(decay.rate, float):
        direction = momentum.add(mean, alpha=decay.rate * correction)
    else:
        direction = decay.pull([mean], correction)[0].add_(momentum)
    coordinates = structure.into_basis(layer, direction).div_(hessian + rate)
    if settings["clip_radius"] < math.inf:
        bound = settings["clip_radius"] * correction
        coordinates.clamp_(-bound, bound)
    mean.sub_(structure.from_basis(layer, coordinates), alpha=settings["lr"] / correction)
    matrix, beta = gradient.reshape(hessian.shape), float(group["beta3"])
    for name, side in (("out_factor", matrix), ("in_factor", matrix.mT)):
        if name in state:
            state[name].addmm_(side, side.mT, beta=beta, alpha=1 - beta)


def turned(structure: EigenbasisStructure, layer: Layer, wholly: bool = False) -> list[Tensor] | None:
    """h in a new basis, and that; None if it fails.

    Args:
        wholly: to the eigenvectors, as at first; else by one power iteration from the last basis.
    """
    state, before = structure.parameters.state[layer.weight], structure.basis(layer)
    after: list[Tensor | None] = []
    with torch.autocast(layer.weight.device.type, enabled=False):
        for name, basis in zip(("out_factor", "in_factor"), before, strict=True):
            after.append(_nearer(state[name], None if wholly else basis) if name in state else None)
            if name in state and after[-1] is None:
                return None
        hessian = rotate_diagonal(state["hessian"], before, (after[0], after[1]))
    return [hessian, *(basis for basis in after if basis is not None)]


def _nearer(factor: Tensor, basis: Tensor | None) -> Tensor | None:
    """A basis nearer the eigenvectors of a factor than the last; the eigenvectors where there is none."""
    apart = without_ties(factor, TIES)
    if apart is None:
        return None
    if basis is not None:
        return power_iteration(apart, basis)
    found = eigen(apart, None)
    return None if found is None else found[1]
