"""Whether predicted probabilities are as often right as they say."""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 15


def calibration_error(confidence: Tensor, right: Tensor, bins: int = BINS) -> float:
    """Σ_b |B_b|/N · |accuracy(B_b) - confidence(B_b)| over bins of equal width (Guo et al., 2017, arXiv:1706.04599)."""
    place = (confidence * bins).long().clamp(max=bins - 1)
    difference = right.double() - confidence.double()
    return torch.zeros(bins).double().index_add(0, place.cpu(), difference.cpu()).abs().sum().item() / len(right)
