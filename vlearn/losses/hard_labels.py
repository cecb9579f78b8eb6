"""What the gradient of a softmax cross-entropy with hard labels gives away: what the loss divides by, and its weights.

Its rows are s_n (p_n - 1[c = y_n]), p the softmax of the output, so that each row shows its label and its factor s_n:
1/D of a mean over D rows, w_y/Σw of a mean with class weights, k times that of a loss that is multiplied by k. With
labels that are smoothed by ε, a row is s_n (p_n - ε/C) off the label, whose slope over p is s_n.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SAMPLE = 256  # rows that are looked at
DOUBT = 0.05  # 1 - p_y below which a row says too little
SURE = 0.75  # largest p from which on the lowest gradient need not be that of a smoothed label


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


def smoothed_row_factors(output: Tensor, residual: Tensor, is_narrow: bool = False) -> RowFactors | None:
    """As `row_factors`, of labels that are smoothed, all alike, of three classes or more."""
    for axis in dict.fromkeys((output.dim() - 1, 1)):
        if 0 < axis < output.dim() and output.shape[axis] > 2:
            factors = _along_smoothed(output, residual, axis, is_narrow)
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


class _Rows(NamedTuple):
    """Some rows of an output along an axis: scores, probabilities and gradients ``[K, C]``."""

    scores: Tensor
    p: Tensor
    gradients: Tensor
    is_narrow: bool

    @classmethod
    def of(cls, output: Tensor, residual: Tensor, axis: int, is_narrow: bool) -> _Rows:
        lead = [size for i, size in enumerate(output.shape) if i != axis]
        count = torch.Size(lead).numel()
        chosen = torch.linspace(0, count - 1, min(count, SAMPLE), device=output.device).long()
        places = torch.unravel_index(chosen, lead)
        wide = torch.promote_types(output.dtype, torch.float32)
        scores, rows = (tensor.detach().movedim(axis, -1)[places] for tensor in (output, residual))
        is_narrow = is_narrow or min(torch.finfo(each.dtype).bits for each in (output, residual)) < 32
        return cls(scores, scores.to(wide).softmax(-1), rows.to(wide), is_narrow)

    @property
    def tolerance(self) -> float:
        """The relative error of a factor."""
        return 5e-2 if self.is_narrow else 1e-3

    def match(self, expected: Tensor, factor: Tensor) -> bool:
        """Whether the gradients are these ``[K, C]``, to rounding, with positive factors ``[K]``."""
        fits = (self.gradients - expected).abs().amax(-1) <= (2e-2 if self.is_narrow else 1e-5) * factor
        return bool(fits.all()) and bool((factor > 0).all())

    def only(self, chosen: Tensor) -> _Rows:
        return self._replace(scores=self.scores[chosen], p=self.p[chosen], gradients=self.gradients[chosen])


def _along(output: Tensor, residual: Tensor, axis: int, is_narrow: bool) -> RowFactors | None:
    """The factors if the classes are along this axis."""
    rows = _Rows.of(output, residual, axis, is_narrow)
    # Rounding takes a sure label's gradient to 0.
    label = rows.gradients.argmin(-1).where(rows.gradients.lt(0).any(-1), rows.p.argmax(-1))
    doubt = 1 - rows.p.gather(-1, label.unsqueeze(-1)).squeeze(-1)
    telling = rows.gradients.ne(0).any(-1) & (doubt > (rounding(rows.scores) / rows.tolerance).clamp_min(DOUBT))
    if not bool(telling.any()):
        return None
    rows, label, doubt = rows.only(telling), label[telling], doubt[telling]
    factor = -rows.gradients.amin(-1) / doubt
    expected = factor.unsqueeze(-1) * (rows.p - F.one_hot(label, rows.p.shape[-1]).to(rows.p))
    return RowFactors(factor, label, rows.tolerance, axis) if rows.match(expected, factor) else None


def _along_smoothed(output: Tensor, residual: Tensor, axis: int, is_narrow: bool) -> RowFactors | None:
    """The factors of smoothed labels: the slope of the gradient between two classes off the label."""
    rows, classes = _Rows.of(output, residual, axis, is_narrow), output.shape[axis]
    label = rows.gradients.argmin(-1, keepdim=True)
    most = rows.p.scatter(-1, label, -1.0).argmax(-1, keepdim=True)  # the label aside
    least = rows.p.scatter(-1, label, 2.0).argmin(-1, keepdim=True)
    rise, gap = (each.gather(-1, most) - each.gather(-1, least) for each in (rows.gradients, rows.p))
    smallest_gap = 4 * DOUBT if rows.is_narrow else DOUBT
    telling = rows.gradients.ne(0).any(-1) & (rows.p.amax(-1) < SURE) & (gap.squeeze(-1) > smallest_gap)
    if int(telling.sum()) < 2:
        return None
    rows, label, most, factor = rows.only(telling), label[telling].squeeze(1), most[telling], (rise / gap)[telling]
    smoothing = float((classes * (rows.p.gather(-1, most) - rows.gradients.gather(-1, most) / factor)).median())
    smoothed = F.one_hot(label, classes).to(rows.p) * (1 - smoothing) + smoothing / classes
    factor, expected = factor.squeeze(1), factor * (rows.p - smoothed)
    fits = 0 < smoothing < 1 and rows.match(expected, factor)
    return RowFactors(factor, label, rows.tolerance, axis) if fits else None
