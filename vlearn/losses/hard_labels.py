"""What the gradient of a softmax cross-entropy with hard labels gives away: what the loss divides by, and its weights.

Its rows are s_n (p_n - 1[c = y_n]), p the softmax of the output, so that each row shows its label and its factor s_n:
1/D of a mean over D rows, w_y/Σw of a mean with class weights, k times that of a loss that is multiplied by k.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE = 256  # rows that are looked at
DOUBT = 0.05  # 1 - p_y below which a row says too little


class RowFactors(NamedTuple):
    """Of some rows whose label the model does not know by heart.

    Attributes:
        factor: ``[K]`` s.
        label: ``[K]`` y.
        tolerance: the relative error of a factor.
        axis: of the output, along which the classes are.
    """

    factor: Tensor
    label: Tensor
    tolerance: float
    axis: int

    @property
    def is_one(self) -> bool:
        """Whether all rows have the same factor."""
        return float(self.factor.max() - self.factor.min()) <= 2 * self.tolerance * float(self.factor.max())

    @property
    def goes_by_label(self) -> bool:
        """Whether rows of one label have one factor, as class weights give; seen on at least one label of two rows."""
        repeated = False
        for label in self.label.unique():
            of_label = self.factor[self.label == label]
            repeated = repeated or len(of_label) > 1
            if float(of_label.max() - of_label.min()) > 2 * self.tolerance * float(of_label.max()):
                return False
        return repeated


def row_factors(
    output: Tensor, residual: Tensor, is_narrow: bool = False, axis: int | None = None
) -> RowFactors | None:
    """The factors of a sample of rows; None where the gradient is not that of softmax cross-entropy with hard labels.

    Args:
        output: the model's, ``[N, ..., C]`` or ``[N, C, ...]``.
        residual: the loss's gradient with respect to it.
        is_narrow: they may have passed through a type of low precision.
        axis: of the classes; None for the last or the one after the examples, whichever fits.
    """
    for each in dict.fromkeys((output.dim() - 1, 1)) if axis is None else (axis,):
        if 0 < each < output.dim() and output.shape[each] > 1:
            factors = _along(output, residual, each, is_narrow)
            if factors is not None:
                return factors
    return None


def rounding(scores: Tensor) -> Tensor:
    """The error of log-probabilities ``[...]`` that a loss computes from scores ``[..., C]`` in their own type.

    `log_softmax` may round Σ exp and its logarithm to that type: by .016 in bfloat16 where the logarithm is 3, so that
    the gradient of a label with p = .99 is off by its own size.
    """
    return torch.finfo(scores.dtype).eps * (1 + scores.detach().float().logsumexp(-1).abs()) / 2


def counted_rows(output: Tensor, residual: Tensor, axis: int) -> tuple[int, int]:
    """(rows with a gradient, these and those whose label the model is certain of): between them is what a mean counts.

    Args:
        output, residual: as for `row_factors`.
        axis: of the classes.
    """
    has_gradient = residual.ne(0).any(axis)
    is_certain = output.detach().float().softmax(axis).amax(axis) > 1 - 1e-6
    return int(has_gradient.sum()), int((has_gradient | is_certain).sum())


def _along(output: Tensor, residual: Tensor, axis: int, is_narrow: bool) -> RowFactors | None:
    """The factors if the classes are along this axis."""
    lead = [size for i, size in enumerate(output.shape) if i != axis]
    count = torch.Size(lead).numel()
    chosen = torch.linspace(0, count - 1, min(count, SAMPLE), device=output.device).long()
    places = torch.unravel_index(chosen, lead)
    wide = torch.promote_types(output.dtype, torch.float32)
    scores, rows = (tensor.detach().movedim(axis, -1)[places] for tensor in (output, residual))
    is_narrow = is_narrow or min(torch.finfo(each.dtype).bits for each in (output, residual)) < 32
    tolerance, rows = 5e-2 if is_narrow else 1e-3, rows.to(wide)
    p = scores.to(wide).softmax(-1)
    label = rows.argmin(-1).where(rows.lt(0).any(-1), p.argmax(-1))  # rounding takes a sure label's gradient to 0
    doubt = 1 - p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    telling = rows.ne(0).any(-1) & (doubt > (rounding(scores) / tolerance).clamp_min(DOUBT))
    if not bool(telling.any()):
        return None
    p, label, rows, doubt = p[telling], label[telling], rows[telling], doubt[telling]
    factor = -rows.amin(-1) / doubt
    expected = factor.unsqueeze(-1) * (p - F.one_hot(label, p.shape[-1]).to(wide))
    fits = (rows - expected).abs().amax(-1) <= (2e-2 if is_narrow else 1e-5) * factor
    if not (bool(fits.all()) and bool((factor > 0).all())):
        return None
    return RowFactors(factor, label, tolerance, axis)
