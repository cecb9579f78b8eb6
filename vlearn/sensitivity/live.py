"""Sensitivities from the training step's own forward and backward pass, at its sampled weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from vlearn.capture.examples import checked_uses
from vlearn.capture.fallback import Weights
from vlearn.capture.part import numbers_of, part_of
from vlearn.capture.separate import check_separate
from vlearn.capture.trace import Trace
from vlearn.capture.tree import tensor_leaves
from vlearn.posterior.covariance import Covariance
from vlearn.sensitivity.ghost import Moved, moved, output_deviation
from vlearn.sensitivity.summary import row_norms, summarize

Selector = str | int | Callable[[Any], Tensor] | None


@dataclass(frozen=True)
class Sensitivities:
    """One row per example of a minibatch (Nickl et al., 2023, arXiv:2310.19273).

    Attributes:
        residual: ``[N, C]`` ∂ℓ/∂output of each example's own loss.
        self_influence: ``[N]`` gᵀΣg: first-order increase of the example's own loss, in the loss's units, if it
            were removed from the training data.
        prediction_error: ``[N]`` ‖residual‖/√2, in [0, 1] for hard-label cross-entropy.
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
    trace: Trace,
    covariance: Covariance,
    weights: Weights,
    scale: float,
    step: int,
    deviation: bool = False,
    output: Selector = None,
    examples: Any = None,
) -> Sensitivities:
    """Read the sensitivities out of a recorded training step.

    Args:
        trace: its forward and backward pass.
        covariance: Σ, summed over num_data.
        weights: the parameters' values during the pass.
        scale: the gradient of an example's own loss over the gradient that the backward pass brought: the
            denominator of the mean.
        step: number of the step.
        deviation: also compute the deviation.
        output: which of several outputs residual and deviation speak of.
        examples: ``[K]`` which of the examples; None for all.
    Raises:
        RuntimeError: if examples have no gradient of their own, or none has come.
        ValueError: if `output` or `examples` name what is not there.
    """
    if trace.problems:
        raise RuntimeError(f"sensitivities are not defined for this step: {trace.problems[0]}")
    if not trace.received:
        raise RuntimeError("sensitivities() before backward(): no gradient has reached the model's output yet.")
    part = trace
    if examples is not None:
        chosen = numbers_of(examples, trace.num_examples, next(iter(weights.values())).device)
        checked_uses(trace, covariance, weights)
        check_separate(trace, weights)
        part = part_of(trace, chosen)
    residual = select(as_output(part, part.cotangents), output) * scale
    moves = moved(part, covariance, weights, deviation)
    change = None
    if deviation:
        found = output_deviation(trace, moves, weights) if part is trace else _of_part(trace, part, moves, weights)
        change = select(as_output(part, found), output) * scale
    return Sensitivities(
        residual=residual,
        self_influence=moves.self_influence * scale**2,
        prediction_error=prediction_error(residual),
        deviation=change,
        step=step,
    )


def _of_part(whole: Trace, part: Trace, moves: Moved, weights: Weights) -> list[Tensor]:
    """Changes of the outputs of some examples; by a pass over all of them where the model needs those.

    A model that draws random numbers draws others for fewer examples.
    """
    whole.check_unchanged()
    try:
        return output_deviation(part, moves, weights)
    except RuntimeError:
        return [tensor[part.examples] for tensor in output_deviation(whole, moves.within(whole, part), weights)]


def prediction_error(residual: Tensor) -> Tensor:
    """‖residual‖/√2 ``[N]`` from ``[N, ...]``: in [0, 1] for hard-label cross-entropy."""
    return residual.reshape(len(residual), math.prod(residual.shape[1:])).norm(dim=1) / math.sqrt(2)


def as_output(trace: Trace, tensors: Sequence[Tensor | None]) -> Any:
    """Tensors, one for each output that required grad, in the output's structure; None where no gradient came."""
    leaves, structure = tree_flatten(trace.output)
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    reached = zip(trace.positions, trace.cotangents, tensors, strict=True)
    found = {where[position]: tensor for position, cotangent, tensor in reached if cotangent is not None}
    return tree_unflatten([found.get(i) for i in range(len(leaves))], structure)


def select(tree: Any, output: Selector) -> Tensor:
    """The tensor that `output` names in a model's output; None: the only one with rows, a loss beside it has none.

    Raises:
        ValueError: if it names none, or several are there and it is None.
    """
    if output is None:
        found = [leaf for leaf in tensor_leaves(tree) if leaf.dim() > 0]
        if not found:
            raise ValueError(
                "the loss depends on no tensor in the model's output: return tensors, or tuples or dicts of them, and "
                "do not write them in place."
            )
        if len(found) > 1:
            raise ValueError(
                f"the model gives {len(found)} outputs that the loss depends on: select the one that residual and "
                "deviation speak of with output=<key, index or callable>."
            )
        return found[0]
    if callable(output):
        chosen = output(tree)
    elif isinstance(tree, Tensor):  # an index would name an example
        chosen = None
    elif isinstance(output, str) and not isinstance(tree, dict):
        chosen = getattr(tree, output, None)
    else:
        try:
            chosen = tree[output]
        except (LookupError, TypeError):
            chosen = None
    if not isinstance(chosen, Tensor):
        raise ValueError(f"output={output!r} selects no tensor that the loss depends on.")
    return chosen
