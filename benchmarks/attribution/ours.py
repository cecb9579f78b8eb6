"""vlearn's attributions: `vlearn.influence` with posteriors of every kind, and TracIn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks.attribution.segments import segments
from benchmarks.problems.batches import batches
from benchmarks.reference.attribution.method import Method, Scorer, Subject
from vlearn.gaussians.protocol import Posterior
from vlearn.sensitivity import measures

Fit = Callable[..., Posterior]


def with_posterior(subject: Subject, fit: Fit, **setting: Any) -> Scorer:
    """g_jᵀΣg_i with whatever Σ ``fit(model, subject, **setting)`` gives."""
    model = subject.own_model()
    posterior = fit(model, subject, **setting)
    return lambda x, y: influences(model, posterior, subject, x, y)


def influences(model: nn.Module, posterior: Posterior, subject: Subject, x: Tensor, y: Tensor) -> Tensor:
    """`vlearn.influence` of all training examples on the queries, ``[N, Q]``."""
    return vlearn.influence(
        model, posterior, batches(subject.x, subject.y), batches(x, y), subject.loss, progress=False
    ).values


def over_snapshots(subject: Subject, alike: bool = False, **setting: Any) -> Scorer:
    """The mean attribution over the snapshots of one training, each with a fit of its own.

    Args:
        alike: a query's attributions have norm one at each snapshot. Its gradient, and all of them, shrink as it is
            learned, so that without this the early snapshots decide.
        setting: of `fitted`.
    """
    scorers = []
    for number, snapshot in enumerate(subject.snapshots, 1):
        model = subject.own_model()
        model.load_state_dict(snapshot)
        share = number / len(subject.snapshots)
        earlier = replace(subject, model=model, training_time=share * subject.training_time)
        scorers.append(with_posterior(earlier, fitted, **setting))

    def score(x: Tensor, y: Tensor) -> Tensor:
        each = torch.stack([scorer(x, y) for scorer in scorers])
        return (F.normalize(each, dim=1) if alike else each).mean(0)

    return score


def fitted(
    model: nn.Module,
    subject: Subject,
    structure: str,
    damping: float = 0.0,
    decay: float = 1.0,
    relative: float | None = None,
    stopped: bool = False,
) -> Posterior:
    """A fit at the network's weights, whose prior precision is the weight decay of the training.

    Args:
        damping: added to the weight decay, per example.
        decay: this share of the weight decay alone.
        relative: in its place, this multiple of each layer's mean eigenvalue.
        stopped: with the time that SGD has trained for.
    """
    num_data = len(subject.y)
    posterior = vlearn.posterior.fit(
        model,
        batches(subject.x, subject.y),
        subject.loss,
        structure,
        prior_precision=num_data * (decay * subject.weight_decay + damping),
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    if relative is not None:
        posterior = posterior.damped(relative)
    return posterior.stopped_at(subject.training_time) if stopped else posterior


def over_draws(subject: Subject, width: float, count: int = 6, **setting: Any) -> Scorer:
    """The mean attribution over weights drawn around the last ones, each with a fit of its own.

    Args:
        width: of the draws, as a multiple of that of the posterior of the stopped training.
        setting: of `fitted`.
    """
    around = fitted(subject.own_model(), subject, "eigenvalue-corrected", stopped=True)
    generator, scorers = torch.Generator().manual_seed(0), []
    for _ in range(count):
        model, drawn = subject.own_model(), around.sample(generator)
        model.load_state_dict({name: mean + width * (drawn[name] - mean) for name, mean in around.mean.items()})
        scorers.append(
            with_posterior(replace(subject, model=model), fitted, structure="eigenvalue-corrected", **setting)
        )
    return lambda x, y: torch.stack([scorer(x, y) for scorer in scorers]).mean(0)


def identity(model: nn.Module, subject: Subject) -> Posterior:
    """Σ = I: the products of the gradients."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return vlearn.posterior.Diagonal.from_precision(
        mean, {name: torch.ones_like(p) for name, p in mean.items()}, num_data=1
    )


def own_state(subject: Subject, optimizer: type[Any], narrow: float = 1.0, **setting: Any) -> Scorer:
    """The network that a variational optimizer trains from the same first weights, and the Σ that it comes with.

    The preparation is its training. What is predicted is SGD's retraining.

    Args:
        narrow: times the effective sample size, by which the draws in training are narrower than the posterior.
        setting: of the optimizer.
    """
    model, num_data = subject.own_model().train(), len(subject.y)
    model.load_state_dict(subject.first)
    order = torch.Generator().manual_seed(subject.seed)
    likelihood = {"likelihood": "gaussian"} if subject.regression and optimizer is vlearn.KFACVON else {}
    made = optimizer(
        model,
        ess=narrow * num_data,
        num_data=num_data,
        weight_decay=subject.weight_decay,
        generator=torch.Generator().manual_seed(subject.seed),
        **likelihood,
        **setting,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(made, subject.epochs * -(-num_data // subject.batch))
    for _ in range(subject.epochs):
        for index in torch.randperm(num_data, generator=order).split(subject.batch):
            made.zero_grad()
            subject.loss(model(subject.x[index]), subject.y[index]).backward()
            made.step()
            schedule.step()
    posterior = made.posterior().clone()
    made.unwatch()
    return lambda x, y: influences(model.eval(), posterior, subject, x, y)


def tracin(subject: Subject) -> Scorer:
    """Pruthi et al., 2020, over the snapshots."""
    model = subject.own_model()
    train = batches(subject.x, subject.y)
    return lambda x, y: measures.tracin(
        model, subject.snapshots, train, subject.loss, subject.lr, test_loader=batches(x, y)
    )


DAMPING = ({}, {"damping": 1e-3}, {"damping": 1e-2}, {"damping": 1e-1})
LESS = ({"decay": 0.3}, {"decay": 0.1})
RELATIVE = ({"relative": 0.1}, {"relative": 1.0}, {"relative": 10.0})
KRONECKER = (*DAMPING, *RELATIVE, *LESS)


def _fits(label: str, structure: str) -> Sequence[Method]:
    """A structure as it comes, with the training time, and with the best of a few dampings."""
    make = partial(with_posterior, fit=fitted, structure=structure)
    best = structure == "eigenvalue-corrected"
    dampings = [*DAMPING, {"damping": 1.0}] if structure == "diagonal" else KRONECKER
    return (
        Method(label, "vlearn", make, removed=best),
        Method(f"{label}, stopped", "vlearn", partial(make, stopped=True), removed=best),
        Method(f"{label}, damped", "vlearn", make, dampings, averaged=best, removed=best),
    )


def _over_snapshots(label: str, structure: str, alike: bool = False) -> Method:
    make = partial(over_snapshots, structure=structure, alike=alike)
    return Method(label, "vlearn", make, [*KRONECKER, {"stopped": True}], averaged=True, removed=True)


METHODS = (
    *_fits("diagonal", "diagonal"),
    *_fits("K-FAC", "kronecker"),
    *_fits("EK-FAC", "eigenvalue-corrected"),
    _over_snapshots("EK-FAC, over snapshots", "eigenvalue-corrected"),
    _over_snapshots("EK-FAC, over snapshots alike", "eigenvalue-corrected", alike=True),
    _over_snapshots("K-FAC, over snapshots alike", "kronecker", alike=True),
    Method("EK-FAC, three segments", "vlearn", segments),
    Method(
        "EK-FAC, over draws",
        "vlearn",
        over_draws,
        [{"width": width, **damped} for width in (0.1, 0.05, 0.2) for damped in (*RELATIVE[:2], *DAMPING[2:], LESS[1])],
    ),
    Method(
        "IVON, its own state",
        "vlearn",
        partial(own_state, optimizer=vlearn.IVON),
        [
            {"lr": lr, "hess_init": hess_init, "narrow": narrow}
            for lr, hess_init, narrow in ((0.1, 0.1, 1), (0.1, 1.0, 1), (0.3, 1.0, 1), (0.1, 1.0, 100), (0.3, 1.0, 100))
        ],
    ),
    Method(
        "KFACVON, its own state",
        "vlearn",
        partial(own_state, optimizer=vlearn.KFACVON),
        [
            {"lr": lr, "narrow": narrow}
            for lr, narrow in ((0.01, 1), (0.003, 100), (0.01, 100), (0.03, 100), (0.03, 10_000))
        ],
    ),
    Method("TracIn", "vlearn", tracin, removed=True),
    Method("gradient products", "vlearn", partial(with_posterior, fit=identity)),
)
