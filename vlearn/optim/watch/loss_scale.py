"""How the loss of a watched model is made up of the examples' own losses: what it divides by and is multiplied with."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

from vlearn.capture.pytrees import tensor_leaves
from vlearn.capture.trace import Trace
from vlearn.losses.hard_labels import counted_rows, row_factors
from vlearn.per_example.measured_rows import ExampleIndex, check_example_index


@dataclass(frozen=True)
class WatchOptions:
    """How the loss of a watched model reduces the examples' own losses, and how often passes are recorded.

    Attributes:
        loss_reduction, loss_scale, every, example_index: see `VariationalOptimizer.watch`.
    """

    loss_reduction: str | Callable[[], float] = "mean"
    loss_scale: float | Callable[[], float] | None = None
    every: int = 1
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
        check_example_index(self.example_index)


class LossScale:
    """The gradient of an example's own loss over the one that a backward pass brings: denominator / loss scale.

    Args:
        options: what the user has told. Where that is nothing, a softmax cross-entropy with hard labels shows it.

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

        Where the loss is softmax cross-entropy with hard labels and no more than loss_reduction="mean" or "sum" was
        told, the scale is what the gradient shows: ignored targets do not count, and a model of Hugging Face's that is
        told `num_items_in_batch` may or may not divide by it.
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
            if cotangent is not None and leaves[at].dim() > 1 and leaves[at]._version == version
        ]
        factors = row_factors(*reached[0], trace.is_narrow) if len(reached) == 1 else None
        if factors is None:
            return None
        (output, residual), reduction = reached[0], self._options.loss_reduction
        if not factors.is_one:
            if factors.goes_by_label and reduction == "mean":
                self._warn(
                    "the loss weighs the classes, so that its denominator is the sum of the weights and not the number "
                    "of examples: tell it by watch(model, loss_reduction=lambda: float(weight[targets].sum()))."
                )
            return None
        denominator = 1 / float(factors.factor.median())
        if trace.kwargs.get("num_items_in_batch") is not None:
            return denominator
        rows = output.numel() // output.shape[factors.axis]
        margin = 1 + 2 * factors.tolerance
        if reduction == "sum":
            if not 1 / margin < denominator < margin:
                self._warn_of_scale(1 / denominator, "summed")
            return None
        fewest = most = rows
        if not rows / margin < denominator < rows * margin:
            fewest, most = counted_rows(output, residual, factors.axis)
        if not fewest / margin < denominator < most * margin:
            self._warn_of_scale(fewest / denominator, "mean")
            return None
        # Of a sequence, an example's own loss is the mean over its positions, in which ignored ones count as zeros.
        return min(max(denominator, fewest), most) * trace.num_examples / rows

    def _warn_of_scale(self, factor: float, kind: str) -> None:
        self._warn(
            f"the loss is {factor:.4g} times the {kind} cross-entropy of the batch, and the sensitivities are those of "
            f"the loss as it is: tell watch(model, loss_scale={factor:.4g}) if it was divided for accumulation or "
            "multiplied by a gradient scaler (scaler.get_scale), and loss_scale=1.0 if it is meant."
        )

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(message, stacklevel=2)


def _versions(trace: Trace) -> list[int]:
    return [trace.output_versions[at] for at in trace.positions]
