"""Sensitivities from the training step's own forward and backward pass, at its sampled weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlearn._short_repr import ShortRepr
from vlearn.capture.pytrees import Selector, select, tensor_leaves
from vlearn.gaussians.covariance import Covariance
from vlearn.linearized.covariance_products import CovarianceProducts, covariance_products
from vlearn.linearized.output_change import check_deviation, output_deviation
from vlearn.losses.log_probabilities import LogProbabilities
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.per_example.row_sums import came_by
from vlearn.sensitivity.summary import row_norms, summarize


@dataclass(frozen=True, repr=False)
class Sensitivities(ShortRepr):
    """One row per example of a minibatch (Nickl et al., 2023, arXiv:2310.19273).

    Attributes:
        residual: ``[N, C]`` ∂ℓ/∂output of each example's own loss.
        self_influence: ``[N]`` gᵀΣg: first-order increase of the example's own loss, in the loss's units, if it
            were removed from the training data.
        prediction_error: ``[N]`` ‖residual‖/√2, in [0, 1] for hard-label cross-entropy; of log-probabilities with
            `F.nll_loss` that of logits, s‖p - y‖/√2.
        deviation: ``[N, C]`` first-order change of the model's output if the example were removed, Eq. 12; None
            unless asked for.
        step: number of the update that this minibatch makes, from 1.
    """

    residual: Tensor
    self_influence: Tensor
    prediction_error: Tensor
    deviation: Tensor | None
    step: int

    def summary(self, prefix: str = "") -> dict[str, float]:
        """Summarize the minibatch by a few floats, as Lightning's ``log_dict`` or any other logger takes them.

        ===================================  =================================================================
        ``num_examples``                     rows of the minibatch
        ``num_nonfinite``                    rows with a NaN or an infinity in one of the columns below
        ``self_influence_mean``              mean of gᵀΣg over the rows, in the loss's units
        ``self_influence_q50``               its median
        ``self_influence_q95``               its 95% quantile
        ``self_influence_max``               its maximum
        ``prediction_error_mean``            mean of ‖residual‖/√2, in [0, 1] for hard-label cross-entropy
        ``prediction_error_q50``             its median
        ``prediction_error_q95``             its 95% quantile
        ``prediction_error_max``             its maximum
        ``deviation_norm_mean``              mean of ‖deviation‖, in the output's units; these four keys are
                                             there if the deviation was asked for
        ``deviation_norm_q50``               its median
        ``deviation_norm_q95``               its 95% quantile
        ``deviation_norm_max``               its maximum
        ===================================  =================================================================

        Quantiles are linearly interpolated. No row is left out: a statistic that a NaN or an infinity reaches is NaN.

        Args:
            prefix: put before every key, as in ``self.log_dict(s.summary("train/"))``.

        Returns:
            Python floats by key, finite or NaN.
        """
        distributions = {"self_influence": self.self_influence, "prediction_error": self.prediction_error}
        return summarize({}, {**distributions, "deviation_norm": row_norms(self.deviation)}, prefix)


@torch.inference_mode(False)
@torch.no_grad()
def live_sensitivities(
    recorded: RecordedPass,
    covariance: Covariance,
    step: int,
    deviation: bool = False,
    output: Selector = None,
    examples: Any = None,
) -> Sensitivities:
    """Read the sensitivities out of a recorded training step.

    Args:
        recorded: its forward and backward pass.
        covariance: Σ, summed over num_data.
        step: the number of the step.
        deviation: also compute the deviation.
        output: which of several outputs residual and deviation speak of.
        examples: ``[K]`` which of the examples; None for all.
    Raises:
        ValueError: if `output` or `examples` name what is not there.
        RuntimeError: if the output has no row for each example.
    """
    part, trace = recorded, recorded.trace
    of_all = select(trace.as_output(trace.cotangents), output)
    if trace.example_rows and of_all.shape[:1] != (recorded.num_examples,):
        raise RuntimeError(
            f"the loss reads an output of shape {tuple(of_all.shape)} with the rows that example_index tells of, but "
            f"residuals need one row for each of the {recorded.num_examples} examples: let the model return that."
        )
    if examples is not None:
        device = next(iter(recorded.weights.values())).device
        part = recorded.subset(_validate_indices(examples, recorded.num_examples, device))
    gradient = select(part.trace.as_output(part.trace.cotangents), output)
    residual = gradient * part.scale
    values = [tensor_leaves(part.trace.output)[i] for i in trace.positions]
    value = select(part.trace.as_output(values), output)
    axes = trace.output_axes
    first = axes is None or any(
        axis == 0 and each is gradient for axis, each in zip(axes, part.trace.cotangents, strict=True)
    )
    if residual.shape[:1] != (part.num_examples,) or not (first or callable(output)):
        raise RuntimeError(
            f"dimension 0 of the output of shape {tuple(residual.shape)} is not that of the {part.num_examples} "
            "examples: let the model return it with the examples first, as by output.transpose(0, 1), or select a "
            "tensor that has a row for each by output=."
        )
    products = covariance_products(part, covariance, tangents=deviation)
    change = None
    if deviation:
        changes = output_deviation(part, products) if part is recorded else _of_subset(recorded, part, products)
        _check_deviation(recorded, part, products, changes)
        change = select(part.trace.as_output(changes), output) * part.scale
    return Sensitivities(
        residual=residual,
        self_influence=products.self_influence * part.scale**2,
        prediction_error=prediction_error(_of_logits(value, residual)),
        deviation=change,
        step=step,
    )


def _of_logits(output: Tensor, residual: Tensor) -> Tensor:
    """The residual as that of logits, where the output is log-probabilities and the loss their negative sum."""
    is_real = residual.is_floating_point()
    found = LogProbabilities.of(output) if is_real and bool((residual <= 0).all()) else None
    return residual if found is None else found.residual(output, residual)


def _of_subset(whole: RecordedPass, part: RecordedPass, products: CovarianceProducts) -> list[Tensor]:
    """Changes of the outputs of some examples; by a pass over all of them where the model needs those.

    A model that draws random numbers draws others for fewer examples, and a batch whose examples an index gives cannot
    be cut.
    """
    whole.trace.check_unchanged()
    try:
        if not whole.trace.example_rows:
            return output_deviation(part, products)
    except RuntimeError:
        pass
    return [rows[part.trace.examples] for rows in output_deviation(whole, products.within(whole, part))]


def _check_deviation(
    whole: RecordedPass, part: RecordedPass, products: CovarianceProducts, changes: list[Tensor]
) -> None:
    """Raise RuntimeError if the changes contradict the gradients, where these came by a single output beside a loss."""
    cotangents = part.trace.cotangents
    reached = [i for i, each in enumerate(cotangents) if each is not None and each.dim()]
    if len(reached) != 1:  # one may be made of another
        return
    (only,) = reached
    of_output = [each if i == only else None for i, each in enumerate(cotangents)]
    check_deviation(
        part.trace, products.self_influence, changes, of_output, lambda: came_by(whole.trace, whole.weights, only)
    )


def prediction_error(residual: Tensor) -> Tensor:
    """‖residual‖/√2 ``[N]`` from ``[N, ...]``: in [0, 1] for hard-label cross-entropy."""
    return residual.reshape(len(residual), math.prod(residual.shape[1:])).norm(dim=1) / math.sqrt(2)


def _validate_indices(examples: Any, total: int, device: torch.device) -> Tensor:
    """The numbers ``[K]`` of the examples of a batch that were asked for.

    Raises:
        ValueError: if they are not different whole numbers from 0 to the size of the batch.
    """
    if isinstance(examples, slice):
        examples = range(*examples.indices(total))
    try:
        numbers = torch.as_tensor(examples, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"examples={examples!r}, but they must be numbers of examples: use a tensor [K].") from error
    if numbers.dtype == torch.bool and numbers.shape == (total,):
        numbers = numbers.nonzero()[:, 0]
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    if numbers.dim() != 1 or not len(numbers) or not whole:
        raise ValueError(
            f"examples of shape {tuple(numbers.shape)} and {numbers.dtype}, but they must be at least one whole number "
            f"in one dimension, or a mask of the batch's {total} examples."
        )
    if bool((numbers < 0).any()) or bool((numbers >= total).any()) or len(numbers.unique()) < len(numbers):
        raise ValueError(f"examples must be different numbers from 0 to {total - 1}, the minibatch has {total}.")
    return numbers.long()
