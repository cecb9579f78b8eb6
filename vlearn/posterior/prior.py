"""The prior precision of a fit: given, read from an optimizer's weight decay, or the most likely one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from vlearn.posterior.adaptive_state import decouples_weight_decay, penalises_weights, root_second_moments, unwrapped

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
        if value == 0 and isinstance(given, Optimizer):
            raise ValueError(
                f"{type(given).__name__} has no weight decay for {name!r}, so that its prior precision is 0, but it "
                "must be positive: give prior_precision by name, as {name: value} of every parameter that is fitted."
            )
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"the prior precision of {name!r} is {value:g}, but it must be positive: use 1.0.")
    return prior


def _of_optimizer(optimizer: Optimizer, named: Mapping[str, Tensor], num_data: float) -> dict[str, float]:
    """N times the weight λ of the penalty λ‖θ‖²/2 on the mean loss that its weight decay is.

    A decoupled decay rests where P∇L + λθ = 0, P = 1/(√v̂ + ε): it is the penalty λ(√v̂ + ε), here by its mean over the
    parameters of a module, which one block of a posterior may hold.
    """
    optimizer = unwrapped(optimizer)
    groups: dict[Any, dict[str, Any]] = {p: group for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in named.items() if p not in groups]
    if missing:
        raise ValueError(f"the optimizer does not train {missing[0]!r}: give prior_precision by name.")
    own = [name for name, p in named.items() if "prior_precision" in optimizer.state.get(p, {})]
    if own:
        raise ValueError(
            f"{type(optimizer).__name__} has learned {own[0]!r} from a prior that is no weight decay: take "
            "optimizer.posterior(), or give prior_precision by name."
        )
    penalty = {name: float(groups[p].get("weight_decay", 0.0)) for name, p in named.items()}
    decoupled = [name for name, p in named.items() if decouples_weight_decay(optimizer, groups[p])]
    for name, p in named.items():
        if penalty[name] and name not in decoupled and not penalises_weights(optimizer, groups[p]):
            raise ValueError(
                f"what penalty the weight decay of {type(optimizer).__name__} is cannot be told: it may act on the "
                f"weights alone, as Adafactor's. Give prior_precision as a number, or {MARGINAL_LIKELIHOOD!r}."
            )
    roots = root_second_moments(optimizer) if decoupled else {}
    for name in decoupled:
        if named[name] not in roots:
            raise ValueError(
                f"{type(optimizer).__name__} has taken no step for {name!r}, so its decoupled weight decay has no "
                "scale yet: train first, or give prior_precision as a number."
            )
    by_module: dict[str, list[str]] = {}
    for name in decoupled:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    for names in by_module.values():
        own = [named[name] for name in names]
        mean = sum(float((roots[p] + groups[p]["eps"]).sum()) for p in own) / sum(p.numel() for p in own)
        penalty |= {name: penalty[name] * mean for name in names}
    return {name: num_data * value for name, value in penalty.items()}


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
