"""How far a network that stopped training has moved along each direction of its curvature.

Σ = H⁻¹ is the response of a network that was trained to the end. Gradient flow on the mean loss, of curvature w in an
eigendirection, has by the time η brought only the share 1 - e^{-ηw} of it: the response to removing an example is
(1 - e^{-ηw})/(N w), that of the precision N w/(1 - e^{-ηw}). This is N w where ηw is large, and N/η where it is
small: what has not been trained cannot be forgotten. For influence it is one segment of SOURCE (Bae et al., 2024,
arXiv:2405.12186); its ridge form w + 1/η is ASTRA's (arXiv:2507.14740).
"""

from __future__ import annotations

import torch
from torch import Tensor


def stopped(curvature: Tensor, training_time: float) -> Tensor:
    """w/(1 - e^{-ηw}) of each eigenvalue w ≥ 0 of the mean loss's curvature, prior included.

    Args:
        curvature: w.
        training_time: η.
    """
    share = -torch.expm1(-training_time * curvature)
    smallest = torch.finfo(curvature.dtype).tiny
    return torch.where(share > smallest, curvature / share.clamp_min(smallest), 1 / training_time)
