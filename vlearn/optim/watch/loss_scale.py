"""How the loss of a watched model is made up of the examples' own losses: what it divides by and is multiplied with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlearn._warnings import warn_user
from vlearn.capture.pytrees import tensor_leaves
from vlearn.capture.trace import Trace
from vlearn.losses.hard_labels import counted_rows, row_factors, smoothed_row_factors
from vlearn.per_example.measured_rows import ExampleIndex, check_example_index


@dataclass(frozen=True)
class WatchOptions:
    """How the loss of a watched model reduces the examples' own losses, and how passes are recorded.

    Attributes:
        loss_reduction, loss_scale, every, batch_norm, example_index: see `VariationalOptimizer.watch`.
    """

    loss_reduction: str | Callable[[], float] = "mean"
    loss_scale: float | Callable[[], float] | None = None
    every: int = 1
    batch_norm: str = "refuse"
    example_index: ExampleIndex | None = None

    def __post_init__(self) -> None:
        reduction, scale, every = self.loss_reduction, self.loss_scale, self.every
        if not callable(reduction) and reduction not in ("mean", "sum"):
            raise ValueError(
                f"loss_reduction={reduction!r}, but it must be 'mean', 'sum' or a callable: use a callable that "
                "returns the denominator of the loss."
            )
        if not (callable(scale) or scale is None or (math.isfinite(scale) and scale != 0)):
            raise ValueError(f"loss_scale={scale!r}, but it must be finite and not zero: use 1.0.")
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}, but it must be a positive whole number: use 1 for every step.")
        check_batch_norm(self.batch_norm)
        check_example_index(self.example_index)


def check_batch_norm(batch_norm: Any) -> None:
    """Raise ValueError unless it is a way to treat batch statistics."""
    if batch_norm not in ("refuse", "constant"):
        raise ValueError(f"batch_norm={batch_norm!r}, but it must be 'refuse' or 'constant': use 'refuse'.")


class LossScale:
    """The gradient of an example's own loss over the one that a backward pass brings: denominator / loss scale.

    Args:
        options: what the user has told. Where that is nothing, some losses show it.

    Attributes:
        told: the scale as it was told, by the user or by Hugging Face's Trainer, for the last backward pass.
    """

    def __init__(self, options: WatchOptions):
        self._options = options
        self.told = 1.0
        self._has_warned = False

    def read(self, trace: Trace) -> None:
        """A backward pass begins: take what is told for it."""
        reduction, scale = self._options.loss_reduction, self._options.loss_scale
        if callable(reduction):
            denominator = float(reduction())
        elif reduction == "sum":
            denominator = 1.0
        else:  # Hugging Face's Trainer tells its models what to divide the summed loss by: all tokens of the step
            items = trace.kwargs.get("num_items_in_batch")
            denominator = float(trace.num_examples if items is None else items)
        self.told = denominator / (1.0 if scale is None else float(scale() if callable(scale) else scale))

    def of_own_loss(self, trace: Trace) -> float:
        """The scale for the examples of a pass whose backward pass has come.

        Where the loss is softmax cross-entropy with hard or smoothed labels, or a mean of the output itself, and no
        more than loss_reduction="mean" or "sum" was told, the scale is what the gradient shows: ignored targets do not
        count, and a model of Hugging Face's that is told `num_items_in_batch` may or may not divide by it.
        """
        reduction, scale = self._options.loss_reduction, self._options.loss_scale
        shown = None if callable(reduction) or scale is not None else self._shown(trace)
        return self.told if shown is None else shown

    def _shown(self, trace: Trace) -> float | None:
        """The scale that the gradient of the output shows, None where it shows none; a warning where it is unclear."""
        leaves = tensor_leaves(trace.output)
        reached = [
            (leaves[at], cotangent)
            for at, cotangent, version in zip(trace.positions, trace.cotangents, _versions(trace), strict=True)
            if cotangent is not None
            and leaves[at].dim() > 0
            and leaves[at].is_floating_point()
            and leaves[at]._version == version
        ]
        with_classes = [pair for pair in reached if pair[0].dim() > 1]
        factors = None
        if len(with_classes) == 1:
            factors = row_factors(*with_classes[0], trace.is_narrow)
            factors = factors or smoothed_row_factors(*with_classes[0], trace.is_narrow)
        if factors is None:
            return self._shown_by_sum(*reached[0], trace) if len(reached) == 1 else None
        (output, residual), reduction = with_classes[0], self._options.loss_reduction
        if not factors.is_one:
            if factors.goes_by_label and reduction == "mean":
                self._warn(
                    "the loss weighs the classes, and what it divides by is not shown. If that is the sum of the "
                    "weights, as of F.cross_entropy(weight=), tell watch(model, loss_reduction=lambda: "
                    "float(weight[targets].sum())), and loss_scale=1.0 if it is the number of examples, as assumed."
                )
            return None
        denominator = 1 / float(factors.factor.median())
        if trace.kwargs.get("num_items_in_batch") is not None:
            return denominator
        rows = output.numel() // output.shape[factors.axis]
        margin = 1 + 2 * factors.tolerance
        if reduction == "sum":
            if not 1 / margin < denominator < margin:
                self._warn_of_scale(1 / denominator, "summed cross-entropy")
            return None
        fewest = most = rows
        if not rows / margin < denominator < rows * margin:
            fewest, most = counted_rows(output, residual, factors.axis)
        if not fewest / margin < denominator < most * margin:
            self._warn_of_scale(fewest / denominator, "mean cross-entropy")
            return None
        # Of a sequence, an example's own loss is the mean over its positions, in which ignored ones count as zeros.
        return min(max(denominator, fewest), most) * trace.num_examples / rows

    def _shown_by_sum(self, output: Tensor, residual: Tensor, trace: Trace) -> float | None:
        """As `_shown`, where the loss is a multiple of the sum of the output's entries, or of some of them.

        As of a model that gives the losses of its examples or the log-probabilities of their labels: entries of one
        sign, which differ, with one gradient. Those that are zero do not count, as those of padding.
        """
        has_gradient = residual.ne(0)
        factors, losses = residual[has_gradient], (output * residual.sign())[has_gradient]
        tolerance = 5e-2 if trace.is_narrow or torch.finfo(residual.dtype).bits < 32 else 1e-3
        factor = abs(float(factors[0])) if factors.numel() else 0.0
        if not 0 < factor < math.inf or not bool(((factors / factors[0] - 1).abs() <= tolerance).all()):
            return None
        counted = losses[losses.ne(0)]
        if bool((losses < 0).any()) or not counted.numel() or bool(counted.max() <= counted.min() * (1 + tolerance)):
            return None
        if trace.kwargs.get("num_items_in_batch") is not None:
            return 1 / factor

        def divides_by(count: int) -> bool:
            return abs(factor * count - 1) < 2 * tolerance

        if self._options.loss_reduction == "sum":
            if not divides_by(1):
                self._warn_of_scale(factor, "sum of the output")
        elif divides_by(residual.numel()) or divides_by(trace.num_examples):
            pass
        elif divides_by(factors.numel()) or divides_by(counted.numel()):
            return trace.num_examples / (factor * residual.numel())
        else:
            self._warn_of_scale(factor * counted.numel(), "mean of the output")
        return None

    def _warn_of_scale(self, factor: float, kind: str) -> None:
        self._warn(
            f"the loss is {factor:.4g} times the {kind} of the batch, and the sensitivities are those of the loss as "
            f"it is: tell watch(model, loss_scale={factor:.4g}) if it was divided for accumulation or multiplied by a "
            "gradient scaler (scaler.get_scale), and loss_scale=1.0 if it is meant."
        )

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warn_user(message)


def _versions(trace: Trace) -> list[int]:
    return [trace.output_versions[at] for at in trace.positions]
