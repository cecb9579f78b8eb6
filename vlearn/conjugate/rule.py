"""The Bayesian learning rule and the memory-perturbation equation on natural parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from vlearn.conjugate.checks import numbers
from vlearn.conjugate.data import Data
from vlearn.conjugate.families import Family

Posterior = TypeVar("Posterior", bound=Family)


def natural_gradient(data: Data, index: int | Sequence[int] | Tensor | None = None) -> Tensor:
    """g̃_j = ∇_μ E_q[-log p(y_j | θ)] = -φ_j: the sensitivity of λ to each example.

    Removing example j adds g̃_j to λ; weighting it by 1 - ε instead has ∂λ/∂ε = ρ g̃_j.

    Args:
        data: the examples.
        index: some of them; default all.
    Returns:
        ``[n, K]``, in λ's units.
    Raises:
        ValueError: if an index is out of range, or comes twice.
    """
    return -data.statistics(_rows(data, index))


def blr_step(
    posterior: Posterior, prior: Posterior, data: Data, rho: float = 1.0, weights: Tensor | None = None
) -> Posterior:
    """One step of the Bayesian learning rule, λ_t = (1 - ρ)λ_{t-1} - ρ Σ_{j=0}^N g̃_j.

    Khan and Rue, 2023, arXiv:2107.04562. With ρ = 1 it is Bayes' rule from any start; with ρ < 1 what is
    left of the start shrinks by 1 - ρ.

    Args:
        posterior: λ_{t-1}, where to start.
        prior: λ_0 = -g̃_0.
        data: the examples.
        rho: learning rate in (0, 1].
        weights: ``[N]`` weight of each example's likelihood, 1 - ε_j in the paper; default 1.
    Raises:
        TypeError: if the prior is not conjugate to the data.
        ValueError: if an argument breaks its rule.
    """
    _check_conjugate("posterior", posterior, data)
    _check_conjugate("prior", prior, data)
    _check_rho(rho)
    weights = data.y.new_ones(len(data)) if weights is None else numbers("weights", weights)
    if weights.shape != data.y.shape:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}, but it must be [{len(data)}]: give one for each example."
        )
    return type(posterior)((1 - rho) * posterior.natural + rho * (prior.natural + data.summed_statistics(weights)))


def remove(posterior: Posterior, data: Data, index: int | Sequence[int] | Tensor, rho: float = 1.0) -> Posterior:
    """The posterior without some examples, λ + ρ Σ_{j∈M} g̃_j; with ρ = 1 that of a refit.

    Nickl et al., 2023, arXiv:2310.19273, Eq. 6 and Theorem 1: the posterior divided by the examples' likelihoods.

    Args:
        posterior: one that holds the examples.
        data: the examples.
        index: which of them to remove.
        rho: that of the step which made the posterior.
    Raises:
        TypeError: if the posterior is not conjugate to the data.
        ValueError: if an index is out of range or comes twice, or what is left is no distribution.
    """
    _check_conjugate("posterior", posterior, data)
    _check_rho(rho)
    return type(posterior)(posterior.natural + rho * natural_gradient(data, index).sum(0))


def add(posterior: Posterior, data: Data, index: int | Sequence[int] | Tensor, rho: float = 1.0) -> Posterior:
    """The posterior with some more examples, λ - ρ Σ_{j∈M} g̃_j: the inverse of `remove`, with the same arguments."""
    _check_conjugate("posterior", posterior, data)
    _check_rho(rho)
    return type(posterior)(posterior.natural - rho * natural_gradient(data, index).sum(0))


def leave_one_out(posterior: Posterior, data: Data) -> Posterior:
    """All N posteriors without one example each, a batch λ + g̃_j ``[N, K]``.

    Examples:
        >>> from vlearn.conjugate import Gamma, Poisson
        >>> data, prior = Poisson(torch.tensor([3, 5, 40])), Gamma.from_standard(shape=1, rate=0.1)
        >>> posterior = blr_step(prior, prior, data)
        >>> [round(float(mean), 2) for mean in leave_one_out(posterior, data).mean]
        [21.9, 20.95, 4.29]
        >>> predictive_loss(leave_one_out(posterior, data), data).argmax()
        tensor(2)
    """
    _check_conjugate("posterior", posterior, data)
    return type(posterior)(posterior.natural + natural_gradient(data))


def predictive_loss(posterior: Family, data: Data) -> Tensor:
    """-log E_q[p(y_j | θ)] of every example, ``[N]`` nats.

    Args:
        posterior: one for all examples, or a batch with one for each: that of `leave_one_out` gives the exact
            leave-one-out losses.
        data: the examples, those of the posterior or others.
    Raises:
        TypeError: if the posterior is not conjugate to the data.
        ValueError: if it is a batch of another size.
    """
    _check_conjugate("posterior", posterior, data, batched=True)
    return -data.log_predictive(posterior)


def _check_conjugate(name: str, family: Family, data: Data, batched: bool = False) -> None:
    kind = type(data).__name__
    if type(family) is not data.family:
        raise TypeError(
            f"{name} is a {type(family).__name__}, but {kind} data need a {data.family.__name__}: use "
            f"{data.family.__name__}.from_standard(...)."
        )
    if family.natural.shape[-1] != data.width:
        raise ValueError(
            f"{name} has {family.natural.shape[-1]} natural parameters, but these {kind} data need {data.width}: make "
            "it for the same number of classes or features."
        )
    allowed = ((), (len(data),)) if batched else ((),)
    if family.natural.shape[:-1] not in allowed:
        raise ValueError(
            f"{name} is a batch of shape {tuple(family.natural.shape[:-1])}, but it must be one distribution"
            + (f" or one for each of the {len(data)} examples." if batched else ": take one of the batch.")
        )


def _check_rho(rho: float) -> None:
    if not 0 < rho <= 1:
        raise ValueError(f"rho={rho!r}, but it must be in (0, 1]: use 1 for exact Bayes.")


def _rows(data: Data, index: int | Sequence[int] | Tensor | None) -> Tensor:
    """``[n]`` example numbers."""
    if index is None:
        return torch.arange(len(data), device=data.y.device)
    rows = torch.as_tensor(index, device=data.y.device).flatten()
    if rows.numel() == 0:
        return rows.long()
    if rows.is_floating_point() or rows.dtype == torch.bool:
        raise ValueError(f"index has dtype {rows.dtype}, but it must hold example numbers: use mask.nonzero().")
    rows = rows.long()
    outside = rows[(rows < 0) | (rows >= len(data))]
    if len(outside):
        raise ValueError(f"index holds {int(outside[0])}, but it must be in 0 to {len(data) - 1}: there are no others.")
    values, counts = rows.unique(return_counts=True)
    if bool((counts > 1).any()):
        raise ValueError(f"index holds {int(values[counts > 1][0])} twice, but an example goes once: use unique().")
    return rows
