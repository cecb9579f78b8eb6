"""Laplace approximations of a trained network, by the captures that sensitivities are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.capture.names import named_parameters
from vlearn.capture.pytrees import Selector
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.stopped_training import TrainingTime, times_by_name
from vlearn.linearized.batches import batches, with_progress_bar
from vlearn.linearized.linearization import Linearization, linearize
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.losses.likelihood import LIKELIHOODS, Likelihood
from vlearn.per_example.kronecker_factors import CONVENTIONS
from vlearn.per_example.measured_rows import ExampleIndex
from vlearn.per_example.replay import eval_mode, native_recurrence
from vlearn.posterior.curvature_passes import CURVATURES, CurvaturePasses
from vlearn.posterior.prior import MARGINAL_LIKELIHOOD, PriorPrecision, given_prior_precision, most_likely_precision
from vlearn.posterior.statistics import DenseStatistics, DiagonalStatistics, KroneckerStatistics, Scale, Statistics

STRUCTURES = ("diagonal", "kronecker", "eigenvalue-corrected", "full", "last-layer", "last-layer-kronecker")
LARGEST_DENSE = 2**13  # parameters: their products take 512 MiB in float64


@torch.inference_mode(False)
@torch.no_grad()
def fit(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFunction,
    structure: str = "kronecker",
    *,
    prior_precision: PriorPrecision = 1.0,
    curvature: str = "ggn",
    draws: int = 1,
    num_data: float | None = None,
    convention: str = "expand",
    likelihood: Likelihood = "categorical",
    output: Selector = None,
    generator: torch.Generator | None = None,
    progress: bool | None = None,
    example_index: ExampleIndex | None = None,
    training_time: TrainingTime = math.inf,
) -> Gaussian:
    """Fit a Gaussian posterior N(θ, Σ) at the present weights of a trained network: a Laplace approximation.

        Σ⁻¹ = N·H + δ,  H the curvature of the mean loss per example, δ the precision of the prior

    Only `eval` mode is used, so BatchNorm is no problem; the model is left as it was. Each batch costs a forward pass,
    `draws` backward passes without weight gradients, and products of the size of a layer. Parameters that are frozen
    stay; those of layers without a Kronecker form (see `vlearn.per_example.kronecker_factors`) get a diagonal one.

    Args:
        model: the trained network.
        loader: the training data, see `sweep`.
        loss_fn: the training loss, with a `reduction` argument, or a callable (output, target) -> ``[N]``: the negative
            log-likelihood of an example, in regression (f - y)²/(2σ²).
        structure: "diagonal"; "kronecker", K-FAC's factors of every layer; "eigenvalue-corrected", EK-FAC, which goes
            through the data twice; "full", a dense matrix of all parameters, of small models; "last-layer" and
            "last-layer-kronecker", of the last layer that is called alone.
        prior_precision: δ of the prior N(0, 1/δ) on the scale of the summed loss: a number, numbers by name, the torch
            optimizer that trained the model with an L2 penalty (N·weight_decay), or "marginal-likelihood", the most
            likely number.
        curvature: "ggn", the Gauss-Newton matrix by `draws` random probes of each example; "ggn-exact" by one backward
            pass for each output; "sampled" by labels sampled from the model; "empirical" by the training labels.
        draws: number of probes for each example.
        num_data: number of training examples N; default as many as the loader gives.
        convention: "expand" or "reduce", for layers that act at several positions.
        likelihood: of curvature="sampled": "categorical", "bernoulli", "gaussian" or output -> distribution.
        output: which of several outputs the loss's curvature is taken of.
        generator: of the probes.
        progress: show a progress bar; default where standard error is a terminal and tqdm is installed.
        example_index: of batches whose examples are concatenated, see `sweep`.
        training_time: η of a network that was not trained to the end, a number or numbers by name or parameter, see
            `Gaussian.stopped_at` and `vlearn.posterior.training_time`.
    Returns:
        A posterior that `sweep`, `influence`, `leave_group_out` and `predict` take. It is a copy: later training does
        not change it.
    Raises:
        ValueError: if an argument breaks its rule, or nothing can be fitted.
        RuntimeError: if the examples have no gradients of their own.
    """
    _check(structure, curvature, draws, num_data, convention, likelihood)
    passes = CurvaturePasses(curvature, draws, likelihood, generator)
    losses = ExampleLoss(loss_fn)
    named: dict[str, Tensor] = {name: p for name, p in named_parameters(model) if p.requires_grad and p.numel()}
    if not named:
        raise ValueError("the model has no parameter that requires grad: unfreeze what is to be fitted.")
    last_layer = structure.startswith("last-layer")
    # A bad one is told before long work; of the last layer the names come with the first batch.
    given_prior_precision(prior_precision, {} if last_layer and isinstance(prior_precision, Mapping) else named, 1.0)
    times_by_name(training_time, {} if last_layer and isinstance(training_time, Mapping) else named)
    statistics: Statistics | None = None
    rounds = count = 0
    with eval_mode(model), native_recurrence(model.modules()):
        while statistics is None or rounds < statistics.rounds:
            rounds, count = rounds + 1, 0
            given = batches(loader, model, example_index)
            for batch in with_progress_bar(given, loader, progress, f"fit, round {rounds}"):
                if statistics is None:
                    if last_layer:
                        everything = Covariance.unknown(named.values())
                        named = _of_last_layer(linearize(model, everything, batch, losses, output), named)
                    prior = given_prior_precision(prior_precision, named, num_data or 1.0)
                    statistics = _statistics(structure, convention, named, prior)
                moving = Covariance.unknown(named.values())
                lin = linearize(model, moving, batch, losses, output, passes.second_order)
                count += len(batch.index)
                for recorded, weight in passes.of(lin):
                    statistics.add(recorded, weight)
                del lin  # its graph goes before the next batch comes
            if statistics is None or not count:
                raise ValueError("the loader gave no batch: pass one that can be iterated again.")
            statistics.end_round(count)
    scale = Scale(
        names={p: name for name, p in named.items()},
        mean={name: p.detach().clone() for name, p in named.items()},
        num_data=float(num_data or count),
        prior_precision=given_prior_precision(prior_precision, named, float(num_data or count)),
    )
    if prior_precision == MARGINAL_LIKELIHOOD:
        norm = sum(float(m.double().square().sum()) for m in scale.mean.values())
        likeliest = most_likely_precision(scale.num_data * statistics.eigenvalues(), norm)
        scale = replace(scale, prior_precision=dict.fromkeys(named, likeliest))
    posterior = statistics.posterior(scale)
    posterior.belong_to(named)
    return posterior if training_time == math.inf else posterior.stopped_at(training_time)


def _check(
    structure: str,
    curvature: str,
    draws: int,
    num_data: float | None,
    convention: str,
    likelihood: Likelihood,
) -> None:
    for name, value, allowed in (
        ("structure", structure, STRUCTURES),
        ("curvature", curvature, CURVATURES),
        ("convention", convention, CONVENTIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}, but it must be one of {', '.join(map(repr, allowed))}.")
    if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
        raise ValueError(f"draws={draws!r}, but it must be a positive whole number: use 1.")
    if num_data is not None and not num_data > 0:
        raise ValueError(f"num_data={num_data!r}, but it must be positive: use the number of training examples.")
    if not callable(likelihood) and likelihood not in LIKELIHOODS:
        raise ValueError(f"likelihood={likelihood!r}, but it must be one of {', '.join(map(repr, LIKELIHOODS))}.")


def _statistics(structure: str, convention: str, named: Mapping[str, Tensor], prior: Mapping[str, float]) -> Statistics:
    names, wanted = {p: name for name, p in named.items()}, list(named.values())
    if structure == "diagonal":
        return DiagonalStatistics(wanted)
    if structure in ("full", "last-layer"):
        count = sum(p.numel() for p in wanted)
        if count > LARGEST_DENSE:
            raise ValueError(
                f"structure={structure!r} of {count} parameters needs a matrix of {count} x {count}: use 'kronecker'"
                f"{', or last-layer-kronecker' if structure == 'last-layer' else ''}."
            )
        return DenseStatistics(wanted)

    def may_join(weight: Tensor, bias: Tensor) -> bool:
        return prior[names[weight]] == prior[names[bias]]

    return KroneckerStatistics(wanted, convention, structure == "eigenvalue-corrected", may_join)


def _of_last_layer(lin: Linearization, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of the layer that was called last."""
    last = lin.trace.layer_calls[-1]
    if last.rule is None:
        raise ValueError(
            f"the last layer, {last}, is not one that is called alone: use structure='kronecker', or freeze all other "
            "parameters and use 'full'."
        )
    return {name: p for name, p in named.items() if any(p is own for own in last.parameters)}
