"""Whether a loss is that of a likelihood, by its gradient in the output and its value, and what weight each row has.

    softmax cross-entropy     s (p - y) for each row, p the softmax of its scores; it sums to zero over the classes
    the same of log p         -s y
    binary cross-entropy      s (p - y) for each entry, p the sigmoid of its logit

y is the label and s the row's factor in the loss: 1/D of a mean over D rows, w_y/Σw with class weights, less for the
easy examples of a focal loss. The graph of the loss is gone when its gradient has come, so that its curvature cannot be
asked for. What tells is:

    hard labels      r/p is s off the label, for as many classes as there are. Where the rows have one s, or one for
                     each label, the gradient says all. Otherwise s may be the weight of an example or, of a loss of
                     another form, a function of p: the value of the loss must be Σ s (-log p_y)
    soft labels      with the s that is told y = p - r/s; the value must be Σ s Σ_k -y_k log p_k, or less by the
                     entropy of the labels, as that of a Kullback-Leibler divergence is
    smoothed, mixed  of such a y all entries but two are alike; then there may be other terms in the value

A loss that is neither is refused. Of hard labels a few hundred rows are looked at, so that this costs far less than a
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlearn._wide import widened
from vlearn.losses.hard_labels import DOUBT, SAMPLE, RowFactors, counted_rows, rounding, row_factors

ENTRIES, FEW_ENTRIES = 4096, 8  # of binary losses: looked at at most, and too few to know one by
CERTAIN = 1e-3  # 1 - p of rows whose gradient is lost in rounding, if they are right
UNTOLD = 16.0  # no weight, but a gradient scaler's factor
UNMOVED = 1e-2  # differences of p between the rows below which a gradient does not tell one loss from another
MOST_SMOOTHED, FEWEST_ALIKE = 0.4, 4  # share of the labels that is spread over all classes, entries that show it
LOSSES = {
    "categorical": "softmax cross-entropy along any axis",
    "bernoulli": "binary cross-entropy with logits",
    "gaussian": "squared error",
}
CHOICES = (
    "choose likelihood='categorical' (softmax cross-entropy), 'bernoulli' (binary cross-entropy of logits), 'gaussian' "
    "(squared error) or a callable output -> torch.distributions.Distribution, which is taken at its word and has no "
    "weights, for instance lambda f: Categorical(logits=f) of soft labels in a loss with other terms, or "
    "Categorical(logits=f / 2) of a temperature; tell watch(model, loss_scale=...) what the loss is multiplied with; "
    "weigh classes or examples without soft or smoothed labels; or use curvature='empirical' or the optimizer IVON, "
    "which need no likelihood"
)


@dataclass(frozen=True)
class LossMakeup:
    """What is told of how the loss is made up of the examples' own.

    Attributes:
        weight_of: number of rows in the loss -> what an example's own loss multiplies each of its rows with.
        scale: the gradient of an example's own loss over the one that came.
        value: gives the value of the loss whose gradient came, None where it is not known.
    """

    weight_of: Callable[[int], float]
    scale: float = 1.0
    value: Callable[[], float | None] = lambda: None

    def told(self, count: int) -> float:
        """The factor s of each of so many rows in the loss whose gradient came, by what was told."""
        return self.weight_of(max(count, 1)) / self.scale

    def factors_of(self, *counts: int) -> list[float]:
        """The same of several numbers of rows: those without gradient may be fitted or not in the loss."""
        return [self.told(count) for count in dict.fromkeys(counts)]

    def is_told(self, factor: float, counted: Tensor) -> bool:
        """Whether a row's factor is that which was told, whether or not rows without gradient are in the loss."""
        low, high = self.told(counted.numel()), self.told(int(counted.sum()))
        return low / 1.01 <= factor <= high * 1.01

    def has_value(self, expected: Tensor, error: Tensor) -> bool:
        """Whether the value of the loss is this, but for an error."""
        value = self.value()
        return value is not None and bool((widened(expected) - value).abs() <= widened(error))

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
    `F.cross_entropy` divides by. Others, of weighted examples, count as the loss has them, with the scale that was
    told.

    Args:
        output: scores or log-probabilities, ``[N, ..., C]`` or ``[N, C, ...]``.
        residual: the loss's gradient with respect to them.
    Raises:
        ValueError: if along no axis the loss is seen to be a softmax cross-entropy.
    """
    axis, factors, of_log_probabilities = _evidence(output, residual, makeup)
    counted = residual.ne(0).any(axis, keepdim=True)
    if factors is None:
        return axis, counted.to(output.dtype) * makeup.shared_weight(None, counted)
    every = -residual.sum(axis, keepdim=True) if of_log_probabilities else _row_factors(output, residual, axis)
    if factors.is_one:
        return axis, counted.to(output.dtype) * makeup.shared_weight(float(factors.factor.median()), counted)
    if factors.goes_by_label:
        number = int(counted.sum())
        return axis, every / every.sum() * (number * makeup.weight_of(number))
    return axis, makeup.own_weights(every)


def _evidence(output: Tensor, residual: Tensor, makeup: LossMakeup) -> _Evidence:
    soft: _Evidence | None = None
    silent: _Evidence | None = None  # where all rows are fitted
    is_narrow = _is_narrow(output, residual)
    sums_to_zero, agree = (2e-2, 5e-2) if is_narrow else (1e-3, 1e-3)
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
            factors = RowFactors(-rows.sum(-1), rows.argmin(-1), agree, axis)
            if factors.is_one or factors.goes_by_label or _is_linear(output, residual, axis, makeup):
                return _Evidence(axis, factors, True)
            continue
        p = scores.softmax(-1)
        beside = rows.scatter(-1, p.argmax(-1, keepdim=True), 0.0)
        telling = (p.amax(-1) < 1 - CERTAIN) | beside.lt(0).any(-1)
        if not bool(telling.any()):
            silent = silent or _Evidence(axis, None)
            continue
        upward = rows[telling] > 0
        up, p_up = (each[telling].where(upward, 0.0).sum(-1) for each in (rows, p))
        excess = (rows[telling].sum(-1).abs() - (up / p_up).nan_to_num(0.0) * error[telling]).clamp_min(0)
        if float(excess.sum()) > sums_to_zero * float(rows[telling].abs().sum()):
            continue
        factors = row_factors(output, residual, axis=axis)
        if factors is not None and (factors.is_one or factors.goes_by_label):
            has_moved = float((p.amax(0) - p.amin(0)).max()) > UNMOVED
            is_as_told = factors.is_one and makeup.is_told(float(factors.factor.median()), counted)
            if has_moved or is_as_told:
                return _Evidence(axis, factors)
        # Low precision takes smoothed labels for hard ones.
        if soft is None and _has_soft_labels(output, residual, axis, p, rows, makeup):
            soft = _Evidence(axis, None)
        elif factors is not None and _has_hard_labels(output, residual, axis, makeup):
            return _Evidence(axis, factors)
    if soft is not None or silent is not None:
        return soft or silent  # pyright: ignore[reportReturnType]
    raise refusal("categorical", output, residual)


def _has_hard_labels(output: Tensor, residual: Tensor, axis: int, makeup: LossMakeup) -> bool:
    """Whether the value of the loss is Σ s (-log p_y), with the s of each row."""
    agree, log_p = _agreement(output, residual), _log_softmax(output, axis)
    label = residual.argmin(axis, keepdim=True)
    factors = _row_factors(output, residual, axis)
    losses, rounded = -log_p.gather(axis, label), _rounding(output, axis)
    return makeup.has_value((factors * losses).sum(), (factors * (agree * losses + rounded)).sum())


def _has_soft_labels(output: Tensor, residual: Tensor, axis: int, p: Tensor, rows: Tensor, makeup: LossMakeup) -> bool:
    """Whether labels y = p - r/s make this the gradient of the loss, by its value or by what they look like.

    Args:
        p, rows: ``[K, C]`` of some of the rows in the loss, and their gradients.
    """
    log_p, rounded = _log_softmax(output, axis), _rounding(output, axis)
    agree, least = _agreement(output, residual), _least(residual)
    residual, counted = residual.to(log_p), residual.ne(0).any(axis, keepdim=True)
    everywhere = log_p.exp()
    factors = makeup.factors_of(*counted_rows(output, residual, axis), counted.numel())
    for s in factors:
        y = everywhere - residual / s
        if bool((y >= -(agree + rounded) * (everywhere + residual.abs() / s) - least / s).all()):
            each, labels = -(y * log_p).where(counted, 0.0), y.clamp_min(0).where(counted, 0.0)
            cross_entropy, entropy = s * each.sum(), -s * torch.xlogy(labels, labels).sum()
            error = agree * cross_entropy.abs() + s * rounded.where(counted, 0.0).sum()
            if makeup.has_value(cross_entropy, error) or makeup.has_value(cross_entropy - entropy, error):
                return True
    # Of Σ s Σ_k -y_k log p_k = s Σ H(p) + ⟨r, log p⟩ the value shows s.
    value, entropy = makeup.value(), float(-(everywhere * log_p).where(counted, 0.0).sum())
    if value is not None and entropy > 0:
        factors.append((value - float((residual * log_p).sum())) / entropy)
    agree += float(rounded.max())
    errors = {s: agree * (p + rows.abs() / s) + least / s for s in factors if s > 0}
    return any(_are_made_of_hard_labels(p - rows / s, error) for s, error in errors.items())


def _are_made_of_hard_labels(y: Tensor, error: Tensor) -> bool:
    """Whether labels ``[K, C]``, known but for an error, are hard ones that were smoothed and mixed in pairs."""
    if y.shape[-1] == 2:
        return _take_two_values(y.amin(-1), error.amax(-1))
    beside = torch.ones_like(y, dtype=torch.bool).scatter(-1, y.topk(2).indices, False)
    floor = y[beside].median()
    alike = bool(((y - floor).abs() <= 2 * error)[beside].all() & (y >= -error).all())
    return alike and int(beside.sum()) >= FEWEST_ALIKE and float(floor) * y.shape[-1] <= MOST_SMOOTHED


def _take_two_values(y: Tensor, error: Tensor) -> bool:
    """Whether shares ``[K]`` of the lesser label are one of smoothed labels, or this and another of those mixed."""
    low, largest = y.min(), error.max()
    mixed = y[y > low + 2 * largest]
    alike = not len(mixed) or bool(mixed.max() <= mixed.min() + 2 * largest)
    return alike and len(y) >= FEWEST_ALIKE + 1 and -float(largest) <= float(low) <= MOST_SMOOTHED / 2


def _is_linear(output: Tensor, residual: Tensor, axis: int, makeup: LossMakeup) -> bool:
    """Whether the value is that of a loss linear in the output, or less by the entropy of its labels."""
    output, agree = output.to(torch.promote_types(output.dtype, torch.float32)), _agreement(output, residual)
    share = -residual.to(output)
    s = share.sum(axis, keepdim=True)
    y = (share / s).nan_to_num(0.0)
    cross_entropy, entropy = -(share * output).where(share > 0, 0.0).sum(), -(s * torch.xlogy(y, y)).sum()
    error = agree * cross_entropy
    return makeup.has_value(cross_entropy, error) or makeup.has_value(cross_entropy - entropy, error)


def _log_softmax(output: Tensor, axis: int) -> Tensor:
    """In float32 at least, and finite: classes that an example cannot have count nowhere."""
    log_p = output.to(torch.promote_types(output.dtype, torch.float32)).log_softmax(axis)
    return log_p.clamp_min(torch.finfo(log_p.dtype).min / 2)


def _rounding(output: Tensor, axis: int) -> Tensor:
    """See `rounding`: ``[..., 1, ...]``."""
    return rounding(output.movedim(axis, -1)).unsqueeze(axis)


def _least(residual: Tensor) -> float:
    """Some times the smallest number of its type."""
    return 8 * torch.finfo(residual.dtype).tiny * torch.finfo(residual.dtype).eps


def _agreement(output: Tensor, residual: Tensor) -> float:
    """The relative error of a value."""
    return {16: 2e-2, 32: 2e-5, 64: 1e-6}[min(torch.finfo(each.dtype).bits for each in (output, residual))]


def _row_factors(output: Tensor, residual: Tensor, axis: int) -> Tensor:
    """s of every row ``[..., 1, ...]`` with a hard label, by the classes beside it: Σ r over Σ p."""
    output = output.to(torch.promote_types(output.dtype, torch.float32))
    p = output.softmax(axis).scatter(axis, residual.argmin(axis, keepdim=True), 0.0)
    factors = residual.to(output).clamp_min(0).sum(axis, keepdim=True) / p.sum(axis, keepdim=True)
    return factors.nan_to_num(0.0, 0.0, 0.0)


def binary_weights(output: Tensor, residual: Tensor, makeup: LossMakeup) -> Tensor:
    """The weight of each entry of a binary cross-entropy of logits, in the output's shape; 0 where it has no gradient.

    Weights of the entries (`pos_weight`, `weight`) count with the scale that was told.

    Args:
        output: logits, ``[N, ...]``.
        residual: the loss's gradient with respect to them.
    Raises:
        ValueError: if the loss is not seen to be a binary cross-entropy.
    """
    counted = residual.ne(0)
    factor, places, is_up = _binary_factors(output, residual)
    if not bool(factor.isfinite().all()):  # an overflow under a gradient scaler
        return torch.zeros_like(output)
    if not len(factor):
        return counted.to(output.dtype) * makeup.shared_weight(None, counted)
    every = residual.abs() / torch.where(residual > 0, output.sigmoid(), (-output).sigmoid())
    every = every.nan_to_num(0.0, 0.0, 0.0)
    agree, common = 5e-2 if _is_narrow(output, residual) else 1e-3, float(factor.median())
    is_one = _is_one(factor, agree)
    columns = [torch.zeros_like(places[0]), *places[1:]]
    in_groups = any(_is_one_in_groups(factor, 2 * column + is_up, agree) for column in columns)
    if not (is_one and makeup.is_told(common, counted)):
        known = (is_one or in_groups) and _has_moved(output)
        if not (known or _is_of_yes_and_no(output, residual, every, makeup)):
            if _is_of_soft_answers(output, residual, makeup):
                return counted.to(output.dtype) * makeup.shared_weight(None, counted)
            raise refusal("bernoulli", output, residual)
    if is_one:
        return counted.to(output.dtype) * makeup.shared_weight(common, counted)
    return makeup.own_weights(every)


def _has_moved(logits: Tensor) -> bool:
    """Whether some logit differs between examples."""
    p = logits.sigmoid()
    return float((p.amax(0) - p.amin(0)).max()) > UNMOVED


def _is_of_yes_and_no(output: Tensor, residual: Tensor, factors: Tensor, makeup: LossMakeup) -> bool:
    """Whether the value of the loss is Σ s (-log p_y) with the s of each entry as hard labels have it."""
    logits = output.to(torch.promote_types(output.dtype, torch.float32))
    value = (factors.to(logits) * F.softplus(torch.where(residual > 0, logits, -logits))).sum()
    return makeup.has_value(value, _agreement(output, residual) * value)


def _is_of_soft_answers(output: Tensor, residual: Tensor, makeup: LossMakeup) -> bool:
    """As `_has_soft_labels`, for labels y = p - r/s of each entry."""
    agree, least, counted = _agreement(output, residual), _least(residual), residual.ne(0)
    logits = output[counted].to(torch.promote_types(output.dtype, torch.float32))
    rows, p = residual[counted].to(logits), logits.sigmoid()
    factors = makeup.factors_of(len(rows), residual.numel())
    for s in factors:
        y, error = p - rows / s, agree * (p + rows.abs() / s) + least / s
        if bool(((y >= -error) & (y <= 1 + error)).all()):
            cross_entropy = s * (F.softplus(logits) - y * logits).sum()
            either = torch.stack([y, 1 - y]).clamp_min(0)
            entropy, allowed = -s * torch.xlogy(either, either).sum(), agree * cross_entropy.abs()
            if makeup.has_value(cross_entropy, allowed) or makeup.has_value(cross_entropy - entropy, allowed):
                return True
    # Of Σ s (H(p) + (p - y) f) the value shows s.
    value, entropy = makeup.value(), float((F.softplus(logits) - p * logits).sum())
    if value is not None and entropy > 0:
        factors.append((value - float((rows * logits).sum())) / entropy)

    def lesser(s: float) -> Tensor:
        return torch.minimum(p - rows / s, 1 - p + rows / s)

    errors = {s: agree * (p + rows.abs() / s) + least / s for s in factors if s > 0}
    return any(_take_two_values(lesser(s), error) for s, error in errors.items())


def check_squared_error(output: Tensor, residual: Tensor, makeup: LossMakeup) -> None:
    """Raise ValueError unless the loss is the mean of (f - y)² with the factor that was told.

    Its gradient is r = 2c(f - y), of whatever targets y, and its value c Σ(f - y)² = Σr²/4c.
    """
    if shown_likelihood(output, residual) is not None:
        raise refusal("gaussian", output, residual)
    squares, told = widened(residual).square().sum() / 4, makeup.told(output.numel())
    expected, agree = squares / told, _agreement(output, residual)
    if 0 < float(squares) < math.inf and not makeup.has_value(expected, agree * expected):
        value = makeup.value()
        ratio = float(squares / value) / told if value else 0.0
        scaled = (
            f"if it is {ratio:.4g} times that, tell watch(model, loss_scale={ratio:.4g}) where it was divided for "
            "accumulation or multiplied by a gradient scaler; "
        )
        raise ValueError(
            "likelihood='gaussian' is that of F.mse_loss, the mean of (f - y)² over all entries, but the gradient of "
            f"the loss and its value are not those of it: {scaled if ratio > 0 else ''}where the loss has another "
            "factor or other terms, or is another, give its likelihood, which is taken at its word and averaged: "
            "lambda f: Normal(f, 1.0) of (f - y)²/2, in Independent(..., 1) of the sum over the last axis."
        )


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
