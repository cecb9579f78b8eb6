"""Scores of classes, of an output that has them, or that has probabilities, as of a model that ends in softmax."""

from __future__ import annotations

import torch
from torch import Tensor

from vlearn._wide import upcast

TOLERANCE = 1e-3  # of Σ p, where nothing rounds more


def class_scores(output: Tensor, moved: Tensor | None = None) -> Tensor:
    """Scores ``[N, C]`` whose softmax is the output's probability of each class.

    An output none of which is negative, and all of whose rows sum to one, has the probabilities p, and log p serves as
    its scores: softmax(log p) = p. Any other has scores already. Nothing is asked of an accelerator for it.

    Args:
        output: f ``[N, C]``.
        moved: f + Δf likewise, whose scores are wanted instead; a probability that has become negative counts as none.

    Returns:
        float32 or wider.
    """
    rounded = max(TOLERANCE, 4 * torch.finfo(output.dtype).eps)
    output, of = (upcast(each) for each in (output, output if moved is None else moved))
    # A row that is NaN tells nothing.
    is_other = (output < 0) | ((output.sum(1, keepdim=True) - 1).abs() > rounded)
    return torch.where(is_other.any(), of, of.clamp(min=torch.finfo(of.dtype).tiny).log())
