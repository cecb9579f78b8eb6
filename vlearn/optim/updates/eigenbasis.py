"""A step of IVON in the eigenbasis of a matrix's gradients, and how that basis follows them.

Vyas et al., 2024, "SOAP: Improving and Stabilizing Shampoo using Adam", arXiv:2409.11321; Minut et al., 2026,
"SOAP-Bubbles: Structured Weight Uncertainty for Neural Networks", arXiv:2606.23357.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlearn.gaussians.eigenbasis import eigen, power_iteration, rotate_diagonal, without_ties
from vlearn.optim.parameters.options import beta2_of_step
from vlearn.optim.parameters.parameters import Group
from vlearn.optim.sampling.blocks import ParameterSlice
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.structures.eigenbasis import EigenbasisStructure
from vlearn.optim.structures.prior import Decay
from vlearn.optim.updates.block_update import BlockUpdate, split_by_step
from vlearn.optim.updates.curvature import PriceOrSquares
from vlearn.optim.updates.hessian_noise import add_noise
from vlearn.optim.updates.riemannian import ivon_settings, measures_noise, move_hessians
from vlearn.per_example.kronecker_factors import Layer
from vlearn.sharded.tensors import is_dtensor, part_of, shard, whole

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
                rotation = structure.rotation(layer)
                if coordinates is None or not draw.is_intact(piece.parameter):
                    coordinates = rotation.into_basis(noise[i])
                noise[i] = coordinates.reshape_as(gradients[i])
                gradients[i] = rotation.into_basis(gradients[i]).reshape_as(gradients[i])
        return super().of_draw(draw, group, slices, noise, gradients)


def move_matrices(structure: EigenbasisStructure, update: BlockUpdate) -> None:
    """`ivon_step` of matrices, with Hessian and preconditioner in the basis; then the factors move."""
    group, slices, _, statistics = update
    parameters, layer_of = structure.parameters, structure.layer_of()
    pairs = zip(slices, statistics or [], strict=bool(statistics))
    measured = [(piece, each) for piece, each in pairs if measures_noise(group, [piece], parameters)]
    if measured:
        add_noise(parameters, group, [piece for piece, _ in measured], [each for _, each in measured], group["ess"])
    layers = [layer_of[piece.parameter] for piece in slices]
    for part, decay, correction, beta2 in split_by_step(structure.diagonal, update, beta2_of_step):
        these, layers = layers[: len(part[0])], layers[len(part[0]) :]
        with torch.autocast(part[0][0].device.type, enabled=False):
            _move_matrices(structure, these, group, *part, decay=decay, correction=correction, beta2=beta2)


def _move_matrices(
    structure: EigenbasisStructure,
    layers: list[Layer],
    group: Group,
    means: list[Tensor],
    momenta: list[Tensor],
    hessians: list[Tensor],
    gradients: list[Tensor],
    statistics: list[Tensor],
    *,
    decay: Decay,
    correction: float,
    beta2: float,
) -> None:
    """The update of several matrices, in place, by multi-tensor operations but for the rotations.

    Args:
        means, momenta, gradients: in the shapes of the parameters.
        hessians, statistics: in the basis.
        decay: wd, or a prior in its place, of the parameters' entries.
        correction: 1 - β₁ᵗ.
    """
    settings = ivon_settings(group)
    rate = structure.rates_of(layers)
    move_hessians(
        hessians,
        [statistic.reshape_as(hessian) for statistic, hessian in zip(statistics, hessians, strict=True)],
        beta2=beta2,
        decay=rate,
        **{name: settings[name] for name in ("price", "bounded", "ess")},
    )
    torch._foreach_lerp_(momenta, gradients, 1 - settings["beta1"])
    if isinstance(decay.rate, float):
        directions = torch._foreach_add(momenta, means, alpha=decay.rate * correction)
    else:
        directions = decay.pull(means, correction)
        torch._foreach_add_(directions, momenta)
    rotations = [structure.rotation(layer) for layer in layers]
    coordinates = [rotation.into_basis(d) for rotation, d in zip(rotations, directions, strict=True)]
    torch._foreach_div_(coordinates, torch._foreach_add(hessians, rate))
    if settings["clip_radius"] < math.inf:
        bound = settings["clip_radius"] * correction
        torch._foreach_clamp_max_(coordinates, bound)
        torch._foreach_clamp_min_(coordinates, -bound)
    moves = [rotation.from_basis(each) for rotation, each in zip(rotations, coordinates, strict=True)]
    torch._foreach_sub_(means, moves, alpha=settings["lr"] / correction)
    beta = float(group["beta3"])
    for layer, gradient in zip(layers, gradients, strict=True):
        state, matrix = structure.parameters.state[layer.weight], structure.whole_matrix(layer, gradient)
        for name, side in (("out_factor", matrix), ("in_factor", matrix.mT)):
            if name in state:
                factor = whole(state[name]).addmm_(side, side.mT, beta=beta, alpha=1 - beta)
                if is_dtensor(state[name]):
                    shard(state[name]).copy_(part_of(state[name], factor))


def turned(structure: EigenbasisStructure, layer: Layer, wholly: bool = False) -> list[Tensor] | None:
    """h in a new basis, and that, all whole; None if it fails.

    Args:
        wholly: to the eigenvectors, as at first; else by one power iteration from the last basis.
    """
    state, before = structure.parameters.state[layer.weight], structure.basis(layer)
    factors = [whole(state[name]) if name in state else None for name in ("out_factor", "in_factor")]
    after: list[Tensor | None] = []
    with torch.autocast(layer.weight.device.type, enabled=False):
        for factor, basis in zip(factors, before, strict=True):
            after.append(None if factor is None else _nearer(factor, None if wholly else basis))
        hessian = rotate_diagonal(whole(state["hessian"]), before, (after[0], after[1]))
    if any(factor is not None and basis is None for factor, basis in zip(factors, after, strict=True)):
        return None
    return [hessian, *(basis for basis in after if basis is not None)]


def _nearer(factor: Tensor, basis: Tensor | None) -> Tensor | None:
    """A basis nearer the eigenvectors of a factor than the last; the eigenvectors where that is the identity yet."""
    apart = without_ties(factor, TIES)
    if apart is None:
        return None
    if basis is not None and not torch.equal(basis, torch.eye(len(basis), dtype=basis.dtype, device=basis.device)):
        return power_iteration(apart, basis)
    found = eigen(apart, None)
    return None if found is None else found[1]
