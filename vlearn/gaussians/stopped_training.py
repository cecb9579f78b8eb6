"""How far a network that stopped training has moved along each direction of its curvature.

Σ = H⁻¹ is the response of a network that was trained to the end. Gradient flow on the mean loss, of curvature w in an
eigendirection, has by the time η brought only the share 1 - e^{-ηw} of it: the response to removing an example is
(1 - e^{-ηw})/(N w), that of the precision N w/(1 - e^{-ηw}). This is N w where ηw is large, and N/η where it is
small: what has not been trained cannot be forgotten. For influence it is one segment of SOURCE (Bae et al., 2024,
arXiv:2405.12186); its ridge form w + 1/η is ASTRA's (arXiv:2507.14740).

Along a preconditioned flow θ' = -P∇L the response is P^½ f(P^½ W P^½) P^½, f(w) = (1 - e^{-w})/w, with η in P. A
natural-gradient flow has P = W⁻¹: its share is 1 - e^{-t} in every direction, t the sum of the learning rates. Where
IVON, VON or KFACVON have learned their curvature that is 1 after a few dozen steps, so their states are not corrected.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

TrainingTime = float | Mapping[str, float] | Mapping[Tensor, float]


def stopped(curvature: Tensor, training_time: float | Tensor) -> Tensor:
    """w/(1 - e^{-ηw}) of each eigenvalue w ≥ 0 of the mean loss's curvature, prior included.

    Args:
        curvature: w.
        training_time: η.
    """
    share = -torch.expm1(-training_time * curvature)
    smallest = torch.finfo(curvature.dtype).tiny
    return torch.where(share > smallest, curvature / share.clamp_min(smallest), 1 / training_time)


def times_by_name(given: TrainingTime, parameters: Mapping[str, Tensor | None]) -> dict[str, float]:
    """η of each parameter by name.

    Args:
        given: one for all, or by name or parameter.
        parameters: by name; None where they are not known.
    Raises:
        ValueError: if one is missing, or not positive; infinite ones are not taken beside others.
    """
    if isinstance(given, Mapping):
        by_key: dict[Any, float] = {id(key) if isinstance(key, Tensor) else key: value for key, value in given.items()}
        times: dict[str, float] = {}
        for name, p in parameters.items():
            if name not in by_key and id(p) not in by_key:
                raise ValueError(
                    f"training_time has none for {name!r}: give that of every parameter of the posterior, or freeze "
                    "what was not trained before it is fitted."
                )
            times[name] = by_key[name] if name in by_key else by_key[id(p)]
    else:
        times = dict.fromkeys(parameters, given)
    for time in times.values():
        is_number = isinstance(time, (int, float)) and not isinstance(time, bool)
        if not (is_number and time > 0 and (math.isfinite(time) or not isinstance(given, Mapping))):
            raise ValueError(f"training_time={time!r}, but it must be positive: leave it out.")
    return times


def common_time(times: Sequence[float], sizes: Sequence[int]) -> float:
    """η of several parameters with one curvature: that of their mean √v̂, 1/η being proportional to it."""
    return sum(sizes) / sum(size / time for time, size in zip(times, sizes, strict=True))
