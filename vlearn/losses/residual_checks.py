"""Whether the gradient of the output is that of a likelihood's loss, and what weight each of its rows has.

    softmax cross-entropy     s (p - y) for each row, p the softmax of its scores; it sums to zero over the classes
    the same of log p         -s y
    binary cross-entropy      s (p - y) for each entry, p the sigmoid of its logit

y is the label and s the row's factor in the loss: 1/D of a mean over D rows, w_y/Σw with class weights, less for the
easy examples of a focal loss. Hard labels show s. Soft ones show only that it is at least r/p, and are taken to have
the same everywhere. A few hundred rows are looked at, so that this costs far less than a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vlearn.losses.hard_labels import DOUBT, SAMPLE, RowFactors, rounding, row_factors

ENTRIES, FEW_ENTRIES = 4096, 8  # of binary losses: looked at at most, and too few to refuse
SLACK = 3.0  # with class weights and smoothed labels the weights of a minibatch do not quite add up to 1
CERTAIN = 1e-3  # 1 - p of rows whose gradient is lost in rounding, if they are right
UNTOLD = 16.0  # no weight, but a gradient scaler's factor
LOSSES = {
    "categorical": "softmax cross-entropy along any axis",
    "bernoulli": "binary cross-entropy with logits",
    "gaussian": "squared error",
}
CHOICES = (
    "choose likelihood='categorical' (softmax cross-entropy), 'bernoulli' (binary cross-entropy of logits), 'gaussian' "
    "(squared error) or a callable output -> torch.distributions.Distribution, or use curvature='empirical' or the "
    "optimizer IVON, which need none"
)


@dataclass(frozen=True)
class LossMakeup:
    """What is told of how the loss is made up of the examples' own.

    Attributes:
        weight_of: number of rows in the loss -> what an example's own loss multiplies each of its rows with.
        scale: the gradient of an example's own loss over the one that came.
    """

    weight_of: Callable[[int], float]
    scale: float = 1.0

    def shared_weight(self, factor: float | None, counted: Tensor) -> float:
        """The weight of rows that all count alike.

        Args:
            factor: their s, where it is known. It says whether rows without gradient are fitted or not in the loss, and
                no more than that: the loss may be multiplied by what was not told.
            counted: which rows have a gradient.
        """
        low, high = self.weight_of(max(counted.numel(), 1)), self.weight_of(max(int(counted.sum()), 1))
        own = high if factor is None else factor * self.scale
        return max(low, min(own, high)) if low / 1.01 <= own <= high * 1.01 else high

    def own_weights(self, factors: Tensor) -> Tensor:
        """The weights of rows that do not count alike, by the scale that was told.

        Raises:
            ValueError: if it cannot be the scale of the loss.
        """
        weights = factors * self.scale
        counted = weights[weights > 0]
        if counted.numel() and float(counted.median()) > UNTOLD * self.weight_of(counted.numel()):
            raise ValueError(
                "the loss weighs its rows and is multiplied by a factor that was not told, so that their weights are "
                "not known: use watch(model, loss_scale=...), for instance scaler.get_scale."
            )
        return weights


class _Evidence(NamedTuple):
    """The loss is softmax cross-entropy along an axis, with these factors of its rows if the labels are hard."""

    axis: int
    factors: RowFactors | None
    of_log_probabilities: bool = False


def categorical_weights(output: Tensor, residual: Tensor, makeup: LossMakeup) -> tuple[int, Tensor]:
    """(axis of the classes, weight of each row: of size 1 along it, 0 where it is not in the loss).

    Weights that go by label are class weights, and count relative to their mean over the minibatch, which
    `F.cross_entropy` divides by. Others, of a focal loss or of weighted examples, count as the loss has them, with the
    scale that was told; what a focal loss curves beyond s (diag p - p pᵀ) is left out.

    Args:
        output: scores or log-probabilities, ``[N, ..., C]`` or ``[N, C, ...]``.
        residual: the loss's gradient with respect to them.
    Raises:
        ValueError: if along no axis this is the gradient of a softmax cross-entropy.
    """
    axis, factors, of_log_probabilities = _evidence(output, residual, makeup)
    counted = residual.ne(0).any(axis, keepdim=True)
    if factors is None or factors.is_one:
        factor = None if factors is None else float(factors.factor.median())
        return axis, counted.to(output.dtype) * makeup.shared_weight(factor, counted)
    every = -residual.sum(axis, keepdim=True) if of_log_probabilities else _row_factors(output, residual, axis)
    if factors.goes_by_label:
        number = int(counted.sum())
        return axis, every / every.sum() * (number * makeup.weight_of(number))
    return axis, makeup.own_weights(every)


def _evidence(output: Tensor, residual: Tensor, makeup: LossMakeup) -> _Evidence:
    soft: _Evidence | None = None
    silent: _Evidence | None = None  # where all rows are fitted
    sums_to_zero, agree = (2e-2, 5e-2) if _is_narrow(output, residual) else (1e-3, 1e-3)
    for axis in dict.fromkeys([output.dim() - 1, *range(1, output.dim())]):
        if axis < 1 or output.shape[axis] < 2:
            continue
        counted = residual.ne(0).any(axis)
        places = torch.unravel_index(_spread(counted, SAMPLE), counted.shape)
        scores, rows = (each.movedim(axis, -1)[places] for each in (output, residual))
        error, wide = rounding(scores), torch.promote_types(output.dtype, torch.float32)
        scores, rows = scores.to(wide), rows.to(wide)
        if not len(rows) or not bool(rows.isfinite().all()):  # of nothing, or an overflow under a gradient scaler
            return _Evidence(axis, None)
        if bool(rows.le(0).all()) and bool((scores.logsumexp(-1).abs() <= agree).all()):
            return _Evidence(axis, RowFactors(-rows.sum(-1), rows.argmin(-1), agree, axis), True)
        p = scores.softmax(-1)
        beside = rows.scatter(-1, p.argmax(-1, keepdim=True), 0.0)
        telling = (p.amax(-1) < 1 - CERTAIN) | beside.lt(0).any(-1)
        if not bool(telling.any()):
            silent = silent or _Evidence(axis, None)
            continue
        p, rows = p[telling], rows[telling]
        upward = rows > 0
        s = (rows.where(upward, 0.0).sum(-1) / p.where(upward, 0.0).sum(-1)).nan_to_num(0.0)
        excess = (rows.sum(-1).abs() - s * error[telling]).clamp_min(0)
        if float(excess.sum()) > sums_to_zero * float(rows.abs().sum()):
            continue
        factors = row_factors(output, residual, axis=axis)
        if factors is not None and not _may_be_smoothed(factors, output, residual):
            return _Evidence(axis, factors)
        if soft is None and (factors is not None or _may_have_soft_labels(p, rows, int(counted.sum()), makeup)):
            soft = _Evidence(axis, None)
    if soft is not None or silent is not None:
        return soft or silent  # pyright: ignore[reportReturnType]
    raise refusal("categorical", output, residual)


def _may_be_smoothed(factors: RowFactors, output: Tensor, residual: Tensor) -> bool:
    """Whether factors that differ little may be those of smoothed labels, which low precision takes for hard ones."""
    smallest, largest = float(factors.factor.min()), float(factors.factor.max())
    differ_little = largest <= 2 * smallest and not (factors.is_one or factors.goes_by_label)
    return differ_little and _is_narrow(output, residual)


def _may_have_soft_labels(p: Tensor, rows: Tensor, number: int, makeup: LossMakeup) -> bool:
    """Whether y = p - r/s is nowhere negative, with the s that is told, on average over the rows.

    Where the loss is multiplied by what was not told, nothing can be said.
    """
    told = makeup.weight_of(number) / makeup.scale
    upward = rows > 0
    if float(rows[upward].sum()) > UNTOLD * told * float(p[upward].sum()):
        return True
    least = (rows / p).masked_fill(p < (1e-3 if _is_narrow(p, rows) else 1e-6), 0).amax(-1)
    return float(least.mean()) <= SLACK * told


def _row_factors(output: Tensor, residual: Tensor, axis: int) -> Tensor:
    """s of every row ``[..., 1, ...]`` with a hard label, by the classes beside it: Σ r over Σ p."""
    p = output.softmax(axis).scatter(axis, residual.argmin(axis, keepdim=True), 0.0)
    factors = residual.clamp_min(0).sum(axis, keepdim=True) / p.sum(axis, keepdim=True)
    return factors.nan_to_num(0.0, 0.0, 0.0)


def binary_weights(output: Tensor, residual: Tensor, makeup: LossMakeup) -> Tensor:
    """The weight of each entry of a binary cross-entropy of logits, in the output's shape; 0 where it has no gradient.

    Weights of the entries (`pos_weight`, `weight`) count with the scale that was told.

    Args:
        output: logits, ``[N, ...]``.
        residual: the loss's gradient with respect to them.
    Raises:
        ValueError: if this is not the gradient of a binary cross-entropy.
    """
    counted = residual.ne(0)
    factor, places, is_up = _binary_factors(output, residual)
    if not bool(factor.isfinite().all()):  # an overflow under a gradient scaler
        return torch.zeros_like(output)
    agree = 5e-2 if _is_narrow(output, residual) else 1e-3
    if not len(factor) or _is_one(factor, agree):
        return counted.to(output.dtype) * makeup.shared_weight(float(factor.median()) if len(factor) else None, counted)
    columns = [torch.zeros_like(places[0]), *places[1:]]
    told = makeup.weight_of(int(counted.sum())) / makeup.scale
    may_be_soft = bool((factor <= (1 + agree) * told).all())
    too_few_to_tell = len(factor) < FEW_ENTRIES and not may_be_soft
    if too_few_to_tell or any(_is_one_in_groups(factor, 2 * column + is_up, agree) for column in columns):
        every = residual.abs() / torch.where(residual > 0, output.sigmoid(), (-output).sigmoid())
        return makeup.own_weights(every.nan_to_num(0.0, 0.0, 0.0))
    if float(factor.mean()) <= SLACK * told and not _is_categorical(output, residual):
        return counted.to(output.dtype) * makeup.shared_weight(None, counted)
    raise refusal("bernoulli", output, residual)


def shown_likelihood(output: Tensor, residual: Tensor) -> str | None:
    """The likelihood whose gradient with hard labels this is beyond doubt, if there is one."""
    if _is_categorical(output, residual):
        return "categorical"
    return "bernoulli" if _is_binary(output, residual) else None


def refusal(likelihood: str, output: Tensor, residual: Tensor) -> ValueError:
    """What is to be raised where the gradient is not that of a likelihood."""
    shown = shown_likelihood(output, residual)
    remedy = f"it is that of another: use likelihood={shown!r}" if shown not in (None, likelihood) else CHOICES
    return ValueError(
        f"likelihood={likelihood!r}, but the loss's gradient with respect to the output of shape {tuple(output.shape)} "
        f"is not that of {LOSSES[likelihood]}, at the scale that is told by watch(model, loss_scale=...): {remedy}."
    )


def _is_binary(output: Tensor, residual: Tensor) -> bool:
    """Whether a gradient can be nothing else than that of a binary cross-entropy with hard labels."""
    factor, places, _ = _binary_factors(output, residual)
    if len(factor) < FEW_ENTRIES or not bool(factor.isfinite().all()):
        return False
    spread = output[places].sigmoid().std()
    return bool(spread > 1e-2) and _is_one(factor, 2e-2 if _is_narrow(output, residual) else 1e-4)


def _is_categorical(output: Tensor, residual: Tensor) -> bool:
    """Whether a gradient can be nothing else than that of a softmax cross-entropy with hard labels."""
    factors = row_factors(output, residual)
    return factors is not None and len(factors.factor) >= 4 and factors.is_one


def _binary_factors(output: Tensor, residual: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """(s of some entries as hard labels would have it, where they are, whether their gradient is positive)."""
    chosen = _spread(residual.ne(0), ENTRIES)
    logits, gradients = (each.reshape(-1)[chosen] for each in (output, residual))
    share = torch.where(gradients > 0, logits.sigmoid(), (-logits).sigmoid())
    telling = share > DOUBT
    places = torch.unravel_index(chosen[telling], output.shape)
    return gradients[telling].abs() / share[telling], tuple(places), gradients[telling] > 0


def _is_one(factor: Tensor, agree: float) -> bool:
    return float(factor.max() - factor.min()) <= agree * float(factor.max())


def _is_one_in_groups(factor: Tensor, group: Tensor, agree: float) -> bool:
    """Whether the factors of each group are one, and some group has several."""
    groups, number = group.unique(return_inverse=True)
    if len(groups) == len(factor):
        return False
    largest, smallest = (
        factor.new_zeros(len(groups)).scatter_reduce(0, number, factor, how, include_self=False)
        for how in ("amax", "amin")
    )
    return bool((largest - smallest <= agree * largest).all())


def _spread(mask: Tensor, most: int) -> Tensor:
    """Places in a flattened mask where it is true, `most` at most and evenly spread."""
    places = mask.reshape(-1).nonzero().squeeze(1)
    if len(places) <= most:
        return places
    return places[torch.linspace(0, len(places) - 1, most, device=places.device).long()]


def _is_narrow(*tensors: Tensor) -> bool:
    return min(torch.finfo(each.dtype).bits for each in tensors) < 32
