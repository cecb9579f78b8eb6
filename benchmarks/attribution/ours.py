"""vlearn's attributions: `vlearn.influence` with posteriors of every kind, and TracIn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vlearn
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


def fitted(
    model: nn.Module,
    subject: Subject,
    structure: str,
    damping: float = 0.0,
    stopped: bool = False,
    draws: int = 1,
) -> Posterior:
    """A fit at the network's weights, whose prior precision is the weight decay of the training.

    Args:
        damping: added to the weight decay, per example.
        stopped: with the time that SGD has trained for.
    """
    num_data = len(subject.y)
    posterior = vlearn.posterior.fit(
        model,
        batches(subject.x, subject.y),
        subject.loss,
        structure,
        prior_precision=num_data * (subject.weight_decay + damping),
        draws=draws,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    return posterior.stopped_at(subject.training_time) if stopped else posterior


def identity(model: nn.Module, subject: Subject) -> Posterior:
    """Σ = I: the products of the gradients."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    return vlearn.posterior.Diagonal.from_precision(
        mean, {name: torch.ones_like(p) for name, p in mean.items()}, num_data=1
    )


def tracin(subject: Subject) -> Scorer:
    """Pruthi et al., 2020, over the snapshots."""
    model = subject.own_model()
    train = batches(subject.x, subject.y)
    return lambda x, y: measures.tracin(
        model, subject.snapshots, train, subject.loss, subject.lr, test_loader=batches(x, y)
    )


DAMPING = (0.0, 1e-3, 1e-2, 1e-1, 1.0)


def _fits(label: str, structure: str) -> Sequence[Method]:
    """A structure as it comes, with the training time, and with the best of a few dampings."""
    make = partial(with_posterior, fit=fitted, structure=structure)
    return (
        Method(label, "vlearn", make),
        Method(f"{label}, stopped", "vlearn", partial(make, stopped=True)),
        Method(f"{label}, damped", "vlearn", make, [{"damping": value} for value in DAMPING]),
    )


METHODS = (
    *_fits("diagonal", "diagonal"),
    *_fits("K-FAC", "kronecker"),
    *_fits("EK-FAC", "eigenvalue-corrected"),
    Method("TracIn", "vlearn", tracin),
    Method("gradient products", "vlearn", partial(with_posterior, fit=identity)),
)
