"""vlearn's attributions: `vlearn.influence` with posteriors of every kind, and TracIn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vlearn
from benchmarks.attribution.segments import segments
from benchmarks.problems.batches import batches
from benchmarks.reference.attribution.method import Method, Scorer, Subject
from vlearn.gaussians.kronecker import Kronecker, KroneckerFactors
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


def over_snapshots(subject: Subject, **setting: Any) -> Scorer:
    """The mean attribution over the snapshots of one training, each with a fit of its own."""
    scorers = []
    for number, snapshot in enumerate(subject.snapshots, 1):
        model = subject.own_model()
        model.load_state_dict(snapshot)
        share = number / len(subject.snapshots)
        earlier = replace(subject, model=model, training_time=share * subject.training_time)
        scorers.append(with_posterior(earlier, fitted, **setting))
    return lambda x, y: torch.stack([scorer(x, y) for scorer in scorers]).mean(0)


def fitted(
    model: nn.Module,
    subject: Subject,
    structure: str,
    damping: float = 0.0,
    relative: float | None = None,
    stopped: bool = False,
) -> Posterior:
    """A fit at the network's weights, whose prior precision is the weight decay of the training.

    Args:
        damping: added to the weight decay, per example.
        relative: in its place, this multiple of each layer's mean eigenvalue.
        stopped: with the time that SGD has trained for.
    """
    num_data = len(subject.y)
    posterior = vlearn.posterior.fit(
        model,
        batches(subject.x, subject.y),
        subject.loss,
        structure,
        prior_precision=num_data * (subject.weight_decay + damping),
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    if relative is not None:
        posterior = _damped_by_layer(posterior, relative)
    return posterior.stopped_at(subject.training_time) if stopped else posterior


def _damped_by_layer(fit: Posterior, multiple: float) -> Kronecker:
    assert isinstance(fit, Kronecker)
    layers = [(tuple(each.pop("names")), KroneckerFactors(**each)) for each in fit.block_state()["factors"]]
    decay = {name: multiple * float(factors.hessian.mean()) for names, factors in layers for name in names}
    return Kronecker(fit.mean, dict(layers), decay, dict.fromkeys(fit.mean, fit.num_data), fit.num_data)


def identity(model: nn.Module, subject: Subject) -> Posterior:
    """Σ = I: the products of the gradients."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return vlearn.posterior.Diagonal.from_precision(
        mean, {name: torch.ones_like(p) for name, p in mean.items()}, num_data=1
    )


def ivon(model: nn.Module, **shared: Any) -> vlearn.IVON:
    """With a rate that trains these networks as fast as SGD does."""
    return vlearn.IVON(model, lr=0.1, hess_init=0.1, **shared)


def kfac_von(model: nn.Module, **shared: Any) -> vlearn.KFACVON:
    """With the rate that its docstring names."""
    return vlearn.KFACVON(model, lr=0.01, **shared)


def own_state(subject: Subject, train: Callable[..., Any]) -> Scorer:
    """The network that a variational optimizer trains from the same first weights, and the Σ that it comes with.

    The preparation is its training. What is predicted is SGD's retraining.
    """
    model, num_data = subject.own_model(), len(subject.y)
    model.load_state_dict(subject.first)
    generator = torch.Generator().manual_seed(subject.seed)
    likelihood = {"likelihood": "gaussian"} if subject.regression and train is kfac_von else {}
    torch.manual_seed(subject.seed)
    optimizer = train(model.train(), ess=num_data, weight_decay=subject.weight_decay, **likelihood)
    steps = subject.epochs * -(-num_data // subject.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(subject.epochs):
        for index in torch.randperm(num_data, generator=generator).split(subject.batch):
            optimizer.zero_grad()
            subject.loss(model(subject.x[index]), subject.y[index]).backward()
            optimizer.step()
            schedule.step()
    posterior = optimizer.posterior().clone()
    optimizer.unwatch()
    model.eval()
    return lambda x, y: influences(model, posterior, subject, x, y)


def tracin(subject: Subject) -> Scorer:
    """Pruthi et al., 2020, over the snapshots."""
    model = subject.own_model()
    train = batches(subject.x, subject.y)
    return lambda x, y: measures.tracin(
        model, subject.snapshots, train, subject.loss, subject.lr, test_loader=batches(x, y)
    )


DAMPING = ({}, {"damping": 1e-3}, {"damping": 1e-2}, {"damping": 1e-1})


def _fits(label: str, structure: str) -> Sequence[Method]:
    """A structure as it comes, with the training time, and with the best of a few dampings."""
    make = partial(with_posterior, fit=fitted, structure=structure)
    best = structure == "eigenvalue-corrected"
    last = {"damping": 1.0} if structure == "diagonal" else {"relative": 0.1}
    return (
        Method(label, "vlearn", make, averaged=best, removed=best),
        Method(f"{label}, stopped", "vlearn", partial(make, stopped=True), removed=best),
        Method(f"{label}, damped", "vlearn", make, [*DAMPING, last]),
    )


METHODS = (
    *_fits("diagonal", "diagonal"),
    *_fits("K-FAC", "kronecker"),
    *_fits("EK-FAC", "eigenvalue-corrected"),
    Method(
        "EK-FAC, over snapshots",
        "vlearn",
        partial(over_snapshots, structure="eigenvalue-corrected", relative=0.1),
        averaged=True,
        removed=True,
    ),
    Method("EK-FAC, three segments", "vlearn", segments),
    Method("IVON, its own state", "vlearn", partial(own_state, train=ivon)),
    Method("KFACVON, its own state", "vlearn", partial(own_state, train=kfac_von)),
    Method("TracIn", "vlearn", tracin, removed=True),
    Method("gradient products", "vlearn", partial(with_posterior, fit=identity)),
)
