"""Laplace approximations of a trained network, by the captures that sensitivities are made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlearn._warnings import warn_user
from vlearn._wide import widened
from vlearn.capture.hooks import weights_at_mean
from vlearn.capture.names import named_parameters
from vlearn.capture.pytrees import Selector
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.stopped_training import TrainingTime, times_by_name
from vlearn.linearized.batches import Batch, batches, with_progress_bar
from vlearn.linearized.linearization import Linearization, linearize
from vlearn.linearized.processes import whole_network
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.losses.likelihood import LIKELIHOODS, Likelihood
from vlearn.per_example.kronecker_factors import CONVENTIONS
from vlearn.per_example.measured_rows import ExampleIndex
from vlearn.per_example.replay import eval_mode, native_recurrence
from vlearn.posterior.curvature_passes import CURVATURES, CurvaturePasses
from vlearn.posterior.prior import MARGINAL_LIKELIHOOD, PriorPrecision, given_prior_precision, most_likely_precision
from vlearn.posterior.processes import FitProcesses, Share
from vlearn.posterior.statistics import DenseStatistics, DiagonalStatistics, KroneckerStatistics, Scale, Statistics

STRUCTURES = ("diagonal", "kronecker", "eigenvalue-corrected", "full", "last-layer", "last-layer-kronecker")
NOT_ROUNDING = 1e-5  # of an eigenvalue relative to the largest
SIGNED = ("diagonal", "full", "last-layer")  # which can take curvature away
LARGEST_DENSE = 2**13  # parameters: their products take 512 MiB in float64
_FLAT = (
    "the loss has no curvature in the output of any example, as absolute errors, margins and a model's own loss have "
    "none, so that the posterior would be the prior alone: use curvature='empirical', or let the model return what its "
    "loss is computed from, as logits."
)


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
    sync: bool = False,
) -> Gaussian:
    """Fit a Gaussian posterior N(θ, Σ) at the present weights of a trained network: a Laplace approximation.

        Σ⁻¹ = N·H + δ,  H = (1/N) Σᵢ JᵢᵀΛᵢJᵢ the curvature of the mean loss, δ the precision of the prior

    Only `eval` mode is used, so BatchNorm is no problem; the model is left as it was, also where an optimizer that
    watches it has a draw in its weights. Each batch costs a forward pass, `draws` backward passes without weight
    gradients, and products of the size of a layer. Parameters that are frozen stay; those of layers without a Kronecker
    form (see `vlearn.per_example.kronecker_factors`) get a diagonal one.

    Args:
        model: the trained network.
        loader: the training data, see `sweep`.
        loss_fn: the training loss, with a `reduction` argument, or a callable (output, target) -> ``[N]``: the negative
            log-likelihood of an example, in regression (f - y)²/(2σ²).
        structure: "diagonal"; "kronecker", K-FAC's factors of every layer; "eigenvalue-corrected", EK-FAC, which goes
            through the data twice; "full", a dense matrix of all parameters, of small models; "last-layer" and
            "last-layer-kronecker", of the last layer that is called alone.
        prior_precision: δ of the prior N(0, 1/δ) on the scale of the summed loss: a number, numbers by name, the torch
            optimizer that trained the model, whose weight decay is an L2 penalty (N·weight_decay) or that of AdamW, or
            "marginal-likelihood", the most likely number.
        curvature: "ggn", the Gauss-Newton matrix by `draws` random probes of each example; "ggn-exact" by one backward
            pass for each output; "sampled" by labels sampled from the model; "empirical" by the training labels. Where
            the loss is not convex in the output, as of a model that predicts a variance too, "ggn-exact" counts what
            curves downwards in dense and diagonal structures; "ggn" and Kronecker factors leave it out, and warn.
        draws: number of probes for each example.
        num_data: number of training examples N; default as many as the loader gives.
        convention: "expand" or "reduce", for layers that act at several positions.
        likelihood: of curvature="sampled": "categorical", "bernoulli", "gaussian" or output -> distribution.
        output: which of several outputs the loss's curvature is taken of.
        generator: of the probes; with sync each process takes a seed of its own from it. Default torch's global one,
            which goes on, as in every pass through a DataLoader: a training after the fit draws other numbers.
        progress: show a progress bar; default where standard error is a terminal and tqdm is installed.
        example_index: of batches whose examples are concatenated, see `sweep`.
        training_time: η of a network that was not trained to the end, a number or numbers by name or parameter, see
            `Gaussian.stopped_at` and `vlearn.posterior.training_time`.
        sync: fit the data of all processes of torch.distributed, where the loader of each gives its own share, as by a
            DistributedSampler; of the processes of a DistributedDataParallel model where that is given. All must call
            it, and all get the same posterior: that of one process with all the data, up to its random probes. Some
            may have fewer batches, or none. What a sampler repeats to make shares equal counts as often as it comes, in
            num_data too; an UnrepeatedDistributedSampler repeats nothing. Not by default, since a fit in one
            process alone, as by the first after training, would wait for the others for ever.
    Returns:
        A posterior that `sweep`, `influence`, `leave_group_out` and `predict` take. It is a copy: later training does
        not change it.
    Raises:
        TypeError: if an argument is of another kind, as a dataset in place of its loader.
        ValueError: if an argument breaks its rule, nothing can be fitted, the curvature and the prior are not positive
            definite, or the processes have different networks.
        RuntimeError: if the examples have no gradients of their own, or the fit failed in another process.
    """
    model, _ = whole_network(model)
    processes = FitProcesses(model, sync)
    model = processes.model
    named: dict[str, Tensor] = {name: p for name, p in named_parameters(model) if p.requires_grad and p.numel()}

    def checked() -> dict[str, Any]:
        _check(structure, curvature, draws, num_data, convention, likelihood)
        if not named:
            raise ValueError("the model has no parameter that requires grad: unfreeze what is to be fitted.")
        # Of the last layer the names come with the first batch.
        last = structure.startswith("last-layer")
        prior_of, times_of = (
            {} if last and isinstance(it, Mapping) else named for it in (prior_precision, training_time)
        )
        return {"structure": structure, "curvature": curvature, "draws": draws, "num_data": num_data} | {
            "convention": convention,
            "prior_precision": given_prior_precision(prior_precision, prior_of, num_data or 1.0),
            "training_time": times_by_name(training_time, times_of),
        }

    with weights_at_mean(model), processes.alike(checked), eval_mode(model), native_recurrence(model.modules()):
        passes = CurvaturePasses(
            curvature,
            structure in SIGNED,
            draws,
            likelihood,
            processes.own_generator(generator, next(iter(named.values())).device),
        )
        fitting = _Fitting(model, ExampleLoss(loss_fn), passes, structure, convention, output, prior_precision, named)
        rounds = count = 0
        progress = progress if progress is not None or processes.rank == 0 else False
        while rounds == 0 or rounds < fitting.rounds:
            rounds += 1
            given = batches(loader, model, example_index)
            shown = with_progress_bar(given, loader, progress, f"fit, round {rounds}")
            shares = processes.each(partial(fitting.go_through, shown))
            fitting.end_round(shares, processes)
            count = sum(share.count for share in shares)
        named = fitting.named
        mean = {name: p.detach().clone() for name, p in named.items()}
    _warn_of_clipping(passes, fitting.seen)
    scale = Scale(
        names={p: name for name, p in named.items()},
        mean=mean,
        num_data=float(num_data or count),
        prior_precision=given_prior_precision(prior_precision, named, float(num_data or count)),
    )
    statistics = fitting.statistics
    assert statistics is not None
    if prior_precision == MARGINAL_LIKELIHOOD:
        norm = sum(float(widened(m).square().sum()) for m in scale.mean.values())
        eigenvalues = scale.num_data * statistics.eigenvalues()
        if float(eigenvalues.min()) < -NOT_ROUNDING * float(eigenvalues.abs().max()):
            raise ValueError(
                f"prior_precision={MARGINAL_LIKELIHOOD!r} of a curvature with negative eigenvalues, the least of which "
                f"is {float(eigenvalues.min()):.3g}: give a number, or use curvature='ggn', which leaves them out."
            )
        # The first process's: others may round otherwise.
        likeliest = processes.each(partial(most_likely_precision, eigenvalues, norm))[0]
        scale = replace(scale, prior_precision=dict.fromkeys(named, likeliest))
    posterior = statistics.posterior(scale)
    posterior.belong_to(named)
    return posterior if training_time == math.inf else posterior.stopped_at(training_time)


@dataclass
class _Fitting:
    """What is to be fitted, and what has been summed up so far.

    Attributes:
        named: the parameters, of the last layer alone once a batch has shown which it is.
        statistics: None where only a batch would tell of what.
        counts: of the examples of each process in the first round.
        seen: number of the examples of this process, once for each time.
    """

    model: nn.Module
    losses: ExampleLoss
    passes: CurvaturePasses
    structure: str
    convention: str
    output: Selector
    prior_precision: PriorPrecision
    named: dict[str, Tensor]
    statistics: Statistics | None = None
    counts: list[int] = field(default_factory=list)
    seen: int = 0

    @property
    def rounds(self) -> int:
        """How often it must go through the data."""
        return 1 if self.statistics is None else self.statistics.rounds

    def go_through(self, given: Iterable[Batch]) -> Share:
        """A round through the batches of this process."""
        count = 0
        if not self.structure.startswith("last-layer"):
            self._begin(self.named)
        for batch in given:
            if self.statistics is None:
                everything = Covariance.unknown(self.named.values())
                lin = linearize(self.model, everything, batch, self.losses, self.output)
                self._begin(_of_last_layer(lin, self.named))
            moving = Covariance.unknown(self.named.values())
            lin = linearize(self.model, moving, batch, self.losses, self.output, self.passes.second_order)
            count += len(batch.index)
            self.seen += len(batch.index)
            assert self.statistics is not None
            for recorded, weight in self.passes.of(lin):
                self.statistics.add(recorded, weight)
            del lin  # its graph goes before the next batch comes
        if self.statistics is None:
            return Share(count, None, {}, False)
        sums = {key: (total.shape, total.dtype) for key, total in self.statistics.sums().items()}
        return Share(count, tuple(self.named), sums, any(self.passes.curved) or not self.passes.second_order)

    def end_round(self, shares: list[Share], processes: FitProcesses) -> None:
        """All processes have gone through their batches.

        Raises:
            ValueError: if they had none, or not in this round, or no curvature, or do not fit the same parameters.
        """
        counts = [share.count for share in shares]
        self.counts = self.counts or counts
        if not sum(counts) or any(first and not now for first, now in zip(self.counts, counts, strict=True)):
            raise ValueError("the loader gave no batch: pass one that can be iterated again.")
        if not any(share.curves for share in shares):
            raise ValueError(_FLAT)
        found = list(dict.fromkeys(share.names for share in shares if share.names is not None))
        if len(found) > 1:
            raise ValueError(
                f"the last layer is that of {found[0][0]!r} in some processes and of {found[1][0]!r} in others: give "
                "all of them batches that go through the same layers."
            )
        self._begin({name: self.named[name] for name in found[0]})
        assert self.statistics is not None
        device = next(iter(self.named.values())).device
        sums = processes.summed(self.statistics.sums(), shares, device)
        self.statistics.end_round(sums, sum(counts), processes.group)

    def _begin(self, named: dict[str, Tensor]) -> None:
        """Make the statistics of these parameters, where there are none yet."""
        if self.statistics is None:
            prior = given_prior_precision(self.prior_precision, named, 1.0)
            self.named, self.statistics = named, _statistics(self.structure, self.convention, named, prior)


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


def _warn_of_clipping(passes: CurvaturePasses, seen: int) -> None:
    """Say of how many examples a part of the curvature was left out."""
    by_probes = passes.curvature == "ggn"
    clipped = sum(passes.clipped) / (passes.draws if by_probes else 1)
    if clipped:
        warn_user(
            f"the loss curves downwards in the output of {clipped / seen:.0%} of the examples, which "
            f"{'probes' if by_probes else 'Kronecker factors'} cannot hold: that was left out, so that Σ⁻¹ is larger "
            "than the Gauss-Newton matrix and the prior. curvature='ggn-exact' with structure='full', 'last-layer' or "
            "'diagonal' counts it."
        )


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
