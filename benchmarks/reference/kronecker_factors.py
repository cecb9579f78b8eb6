"""K-FAC and EK-FAC made at a model's weights from its layers' exact covariances."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from benchmarks.reference.gauss_newton import Layer
from vlearn.posterior import KroneckerFactors


def kfac_of(layers: list[Layer]) -> dict[tuple[str, ...], KroneckerFactors]:
    """K-FAC's factors of every layer."""
    return {layer.names: KroneckerFactors.from_covariances(*covariances(layer)) for layer in layers}


def covariances(layer: Layer) -> tuple[Tensor, Tensor]:
    """K-FAC's A ``[I, I]`` of the inputs and B ``[O, O]`` of the output gradients; both are means over the examples."""
    b = layer.b.flatten(0, 1)
    return layer.a.mT @ layer.a / len(layer.a), b.mT @ b / len(layer.a)


def ekfac_of(layers: list[Layer]) -> dict[tuple[str, ...], KroneckerFactors]:
    """K-FAC's bases of every layer with EK-FAC's eigenvalues."""
    kfac = kfac_of(layers)
    return {layer.names: corrected(layer, kfac[layer.names]) for layer in layers}


def corrected(layer: Layer, factors: KroneckerFactors) -> KroneckerFactors:
    """EK-FAC: s = mean over the examples of (Q_Bᵀ G Q_A)², summed over the cotangents."""
    assert factors.in_basis is not None and factors.out_basis is not None
    a, b = layer.a @ factors.in_basis, layer.b @ factors.out_basis
    return dataclasses.replace(factors, hessian=b.square().sum(1).mT @ a.square() / len(a))
