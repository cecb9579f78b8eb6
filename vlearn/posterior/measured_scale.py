"""By how much a posterior's sensitivities are too large or too small, measured on a few examples without retraining."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlearn._short_repr import ShortRepr
from vlearn.gaussians.protocol import Posterior
from vlearn.linearized.batches import Batch, batches, with_progress_bar
from vlearn.linearized.gauss_newton import GaussNewton, check_steps
from vlearn.linearized.inner_products import Directions, joined
from vlearn.linearized.linearization import at_mean, linearize
from vlearn.linearized.solver import dot
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.per_example.measured_rows import ExampleIndex

GRADIENT_ENTRIES = 2**25  # entries of the gradients that are solved for at once; as many vectors again take part


@dataclass(frozen=True, repr=False)
class MeasuredScale(ShortRepr):
    """Self-influences by a posterior's Σ beside those by H⁻¹, on the CPU.

    Attributes:
        scale: α = Σ gᵀH⁻¹g / Σ gᵀΣg over the examples: 1 where Σ has the right size for them, below it where Σ
            overstates.
        index: ``[n]`` numbers of the examples.
        near_exact: ``[n]`` gᵀH⁻¹g, from below: it rises with the steps.
        self_influence: ``[n]`` gᵀΣg, as `vlearn.sweep` has it.
        residual: ``[n]`` √(rᵀΣr) of r = g - Hx over √(gᵀΣg), of the solution x; NaN where H was seen not to be positive
            definite: such an example does not count.
    """

    scale: float
    index: Tensor
    near_exact: Tensor
    self_influence: Tensor
    residual: Tensor


@torch.inference_mode(False)
@torch.no_grad()
def measured_scale(
    model: nn.Module,
    posterior: Posterior,
    loader: Iterable[Any],
    loss_fn: LossFunction,
    *,
    examples: int = 100,
    steps: int = 20,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    example_index: ExampleIndex | None = None,
) -> MeasuredScale:
    """Compare a posterior's self-influences with near-exact ones on random examples of the training data.

        α = Σ_i e_iᵀV_i*e_i / Σ_i e_iᵀV_ie_i,  V_i = J_iΣJ_iᵀ,  V_i* = J_iH⁻¹J_iᵀ,  H = N·GGN + δ

    H⁻¹ is that of the curvature of the loader's examples at the posterior mean, by conjugate gradients that Σ
    preconditions: each step goes through the loader once. A diagnostic: α says how far Σ is from H⁻¹ as far as these
    examples see it, not how far H⁻¹ is from a network that is trained again. Where leverages come near 1, the first
    order itself is too short, and a Σ that overstates (α < 1) may be nearer to retraining than H⁻¹.

    Args:
        model: the network that was trained; run in eval mode, left as it was.
        posterior: Σ over its parameters, without training time and of known prior precision.
        loader: the training data, or as many of them as are to give H, N times their mean; the same each time it is
            iterated.
        loss_fn: the training loss, as for `vlearn.sweep`.
        examples: how many of them, drawn at random without replacement.
        steps: of conjugate gradients.
        generator: of the draw, on the CPU.
        progress: show a progress bar; default where standard error is a terminal and tqdm is installed.
        example_index: which example each row of concatenated inputs is of, as for `vlearn.sweep`.
    Returns:
        The scale, with the examples' self-influences by Σ and by H⁻¹.
    Raises:
        TypeError: if an argument is of another kind, as an optimizer in place of its posterior.
        ValueError: if an argument breaks its rule, or the posterior has no H of its own.
        RuntimeError: if the examples of a batch have no gradient of their own.
    """
    if isinstance(examples, bool) or not isinstance(examples, int) or examples < 1:
        raise ValueError(f"examples={examples!r}, but it must be a positive whole number: use 100.")
    check_steps("steps", steps)
    GaussNewton.check(posterior)
    losses = ExampleLoss(loss_fn)
    with at_mean(model, posterior) as covariance:

        def training_data() -> Iterator[Batch]:
            given = batches(loader, model, example_index)
            yield from with_progress_bar(given, loader, progress, "measured_scale")

        numbers = [batch.index for batch in batches(loader, model, example_index)]
        if not numbers:
            raise ValueError("the loader gave no batch: pass one that can be iterated again.")
        everyone = torch.cat(numbers)
        chosen = everyone[torch.randperm(len(everyone), generator=generator, device="cpu")[:examples]]
        curvature = GaussNewton(model, posterior, covariance, training_data, losses)

        def gradients() -> Iterator[Directions]:
            for batch in batches(loader, model, example_index):
                rows = torch.isin(batch.index, chosen).nonzero().squeeze(1)
                if not len(rows):
                    continue
                for part, of_part in linearize(model, covariance, batch, losses).example_gradients(members=rows):
                    yield Directions(batch.index[rows[part]], of_part)

        columns: list[tuple[Tensor, ...]] = []
        for part in _together(gradients()):
            g, solution = part.dense, curvature.solve(part.dense, steps)
            residual = torch.where(solution.indefinite, torch.nan, solution.residual)
            near_exact, approximate = dot(g, solution.x), dot(g, covariance.multiply_only(g))
            columns.append((part.index, near_exact.cpu(), approximate.cpu(), residual.cpu()))
    if sum(len(column[0]) for column in columns) < len(chosen):
        raise ValueError("the loader gave other examples when it was iterated again: pass a loader, not an iterator.")
    index, near_exact, approximate, residual = (torch.cat(column) for column in zip(*columns, strict=True))
    counts = ~residual.isnan()
    scale = float(near_exact[counts].double().sum() / approximate[counts].double().sum())
    return MeasuredScale(scale, index, near_exact, approximate, residual)


def _together(given: Iterator[Directions]) -> Iterator[Directions]:
    """The same in parts of as many examples as are to be solved for at once."""
    held: list[Directions] = []
    for part in given:
        if held and sum(each.entries for each in held) + part.entries > GRADIENT_ENTRIES:
            yield joined(held)
            held = []
        held.append(part)
    if held:
        yield joined(held)
