"""Posteriors from fitted laplace-torch objects (Daxberger et al., 2021, arXiv:2106.14806), by attributes alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlearn.capture.names import uncompiled_name
from vlearn.gaussians.diagonal import Diagonal
from vlearn.gaussians.full import Full
from vlearn.gaussians.gaussian import weights_at
from vlearn.gaussians.kronecker import Kronecker, KroneckerFactors

STRUCTURES = ("DiagLaplace", "KronLaplace", "FullLaplace")


def from_laplace(la: Any) -> Diagonal | Kronecker | Full:
    """The posterior of a fitted laplace-torch object: diagonal, Kronecker or full, of all weights or the last layer.

    Its precision is `la.posterior_precision`, prior included and, in regression, with the 1/σ² that `la.H` lacks;
    so the loss of a sweep is the negative log-likelihood, (f - y)²/(2σ²) in regression. laplace-torch keeps a bias
    as a block of its own. With a last-layer approximation all other parameters stay.

    It is a view of the object's factors and a copy of its mean.

    Args:
        la: fitted with `hessian_structure` "diag", "kron" or "full" and `subset_of_weights` "all" or "last_layer",
            at temperature 1.
    Returns:
        A posterior that `sweep` and `predict` take, with the model that was fitted or a copy of it.
    Raises:
        TypeError: for another kind of object.
        RuntimeError: if it has not been fitted.
        ValueError: if it is tempered, or its factors are not those of its parameters.
    """
    classes = {each.__name__ for each in type(la).__mro__}
    structure = next((name for name in STRUCTURES if name in classes), None)
    if structure is None or "SubnetLaplace" in classes:
        raise TypeError(
            f"{type(la).__name__} is not supported: pass laplace-torch's diag, kron or full, over all weights or the "
            "last layer."
        )
    if not getattr(la, "n_data", 0):
        raise RuntimeError(f"this {type(la).__name__} has not been fitted: call la.fit(loader) first.")
    if float(la.temperature) != 1:
        raise ValueError(
            f"temperature={float(la.temperature):g}, but sensitivities are those of the untempered posterior: set "
            "la.temperature = 1."
        )
    parameters, belong = _parameters(la, "LLLaplace" in classes)
    shapes = {name: p.shape for name, p in parameters.items()}
    mean = _by_name(la.mean.detach().clone(), shapes)
    prior = prior_precision(la.prior_precision.detach(), shapes)
    num_data = float(la.n_data)
    of_model: dict[str, Any] = {}
    if belong:
        of_model = {"parameters": parameters, "at_mean": lambda: weights_at(parameters, mean)}
    precision = la.posterior_precision
    posterior: Diagonal | Kronecker | Full
    if structure == "FullLaplace":
        posterior = Full(mean, precision.detach(), num_data, prior_precision=prior, **of_model)
    else:
        decay: dict[str, Any] = {name: value / num_data for name, value in prior.items()}
        ess = dict.fromkeys(mean, num_data)
        if structure == "DiagLaplace":
            if not bool((precision > 0).all()):
                raise ValueError("la.posterior_precision is not positive: raise the prior precision.")
            hessian = _by_name((la.H * la._H_factor).detach() / num_data, shapes)
            posterior = Diagonal(mean, hessian, decay, ess, num_data, **of_model)
        else:
            posterior = Kronecker(mean, _factors(precision, shapes, num_data), decay, ess, num_data, **of_model)
    if bool((la.prior_mean != 0).any()):
        posterior.prior_mean = _by_name(la.prior_mean.detach().expand(la.mean.shape).clone(), shapes)
    return posterior


def _parameters(la: Any, last_layer: bool) -> tuple[dict[str, Tensor], bool]:
    """The parameters by their names in the user's model, and whether they are its own, not those of a copy."""
    if not last_layer:
        names = {p: uncompiled_name(name) for name, p in la.model.named_parameters()}
        return {names[p]: p for p in la.params}, True
    # laplace-torch wraps a copy of the model, which has the layer under the same name.
    names = {p: uncompiled_name(name) for name, p in la.model.model.named_parameters()}
    return {names[p]: p for p in la.model.last_layer.parameters()}, False


def _by_name(vector: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    parts = vector.split([shape.numel() for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def prior_precision(given: Tensor, shapes: dict[str, torch.Size]) -> dict[str, float | Tensor]:
    """δ by name: laplace-torch has one number, one for each parameter tensor, or one for each entry."""
    if given.numel() == 1:
        return dict.fromkeys(shapes, float(given))
    if given.numel() == len(shapes):
        return dict(zip(shapes, given.tolist(), strict=True))
    return dict(_by_name(given, shapes))


def _factors(precision: Any, shapes: dict[str, torch.Size], num_data: float) -> dict[tuple[str, ...], KroneckerFactors]:
    """laplace-torch's eigendecompositions, one for each parameter: (Q_B, Q_A) of a weight, Q of a bias."""
    blocks = list(zip(precision.eigenvectors, precision.eigenvalues, precision.deltas.detach(), strict=True))
    if len(blocks) != len(shapes):
        raise ValueError(f"the Kronecker factors have {len(blocks)} blocks, but there are {len(shapes)} parameters.")
    factors = {}
    for name, (bases, values, delta) in zip(shapes, blocks, strict=True):
        if len(bases) == 1:
            out_basis, in_basis = bases[0].detach(), None
            hessian = values[0].detach().unsqueeze(1)
        else:
            out_basis, in_basis = (basis.detach() for basis in bases)
            if precision.damping:  # (d_B + √δ)(d_A + √δ) in place of d_B d_A + δ
                hessian = torch.outer(values[0] + delta.sqrt(), values[1] + delta.sqrt()).detach() - delta
            else:
                hessian = torch.outer(*values).detach()
        factors[(name,)] = KroneckerFactors(out_basis, in_basis, hessian / num_data)
    return factors
