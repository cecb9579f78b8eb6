"""The prior precision of a fit: given, read from an optimizer's weight decay, or the most likely one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import AdamW, Optimizer

MARGINAL_LIKELIHOOD = "marginal-likelihood"
LOWEST, HIGHEST = 1e-12, 1e12
PriorPrecision = float | Mapping[str, float] | Optimizer | str


def given_prior_precision(given: PriorPrecision, named: Mapping[str, Tensor], num_data: float) -> dict[str, float]:
    """δ of each parameter by name; 1 for now where the most likely one is wanted.

    Args:
        given: see `fit`.
        named: the parameters.
        num_data: number of training examples N.
    Raises:
        ValueError: if it is none, or not of these parameters.
    """
    if given == MARGINAL_LIKELIHOOD:
        return dict.fromkeys(named, 1.0)
    if isinstance(given, Optimizer):
        prior = _of_optimizer(given, named, num_data)
    elif isinstance(given, Mapping):
        missing = [name for name in named if name not in given]
        if missing:
            raise ValueError(f"prior_precision has no {missing[0]!r}: give that of every parameter that is fitted.")
        prior = {name: float(given[name]) for name in named}
    elif isinstance(given, (int, float)) and not isinstance(given, bool):
        prior = dict.fromkeys(named, float(given))
    else:
        raise ValueError(
            f"prior_precision={given!r}, but it must be a number, numbers by name, a torch optimizer or "
            f"{MARGINAL_LIKELIHOOD!r}: use 1.0."
        )
    for name, value in prior.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"the prior precision of {name!r} is {value:g}, but it must be positive: use 1.0.")
    return prior


def _of_optimizer(optimizer: Optimizer, named: Mapping[str, Tensor], num_data: float) -> dict[str, float]:
    """An L2 penalty λ‖θ‖²/2 on the mean loss is the prior N(0, 1/(Nλ))."""
    if isinstance(optimizer, AdamW):
        raise ValueError(
            "the decoupled weight decay of AdamW is no prior of its loss: give prior_precision as a number, or "
            f"{MARGINAL_LIKELIHOOD!r}."
        )
    decay: dict[Any, float] = {
        p: num_data * float(group.get("weight_decay", 0.0)) for group in optimizer.param_groups for p in group["params"]
    }
    missing = [name for name, p in named.items() if p not in decay]
    if missing:
        raise ValueError(f"the optimizer does not train {missing[0]!r}: give prior_precision by name.")
    return {name: decay[p] for name, p in named.items()}


def most_likely_precision(eigenvalues: Tensor, squared_norm: float) -> float:
    """The δ that maximises the Laplace approximation of the marginal likelihood.

        log p(D | δ) = const + ½ [P log δ - δ‖θ‖² - Σ_j log(λ_j + δ)]

    where Σ_j λ_j/(λ_j + δ) = δ‖θ‖²; the left side falls with δ and the right rises (MacKay, 1992).

    Args:
        eigenvalues: λ ``[P]`` of the curvature of the summed loss.
        squared_norm: ‖θ‖² of the parameters.
    """

    def excess(log_delta: float) -> float:
        delta = math.exp(log_delta)
        return float((eigenvalues / (eigenvalues + delta)).sum()) - delta * squared_norm

    low, high = math.log(LOWEST), math.log(HIGHEST)
    for _ in range(200):
        middle = (low + high) / 2
        if excess(middle) > 0:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)
