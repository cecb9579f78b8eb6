"""SOURCE (Bae et al., 2024, arXiv:2405.12186): the network's response along its training, segment by segment.

Training is cut into L segments, in each of which gradients and curvature are held fixed. Removing example i kicks the
weights in segment l by its gradient there, and the kick decays through the later ones:

    Σ_l  v_lᵀ (1 - e^{-η_l H_l}) H_l⁻¹ g_i(l) / N,   v_L = g_j,   v_{l-1} = e^{-η_l H_l} v_l

Both factors are functions of H_l, diagonal in the basis of a Kronecker fit. One segment with the gradients at the end
is `stopped_at`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

import vlearn
from benchmarks.problems.batches import Batches, batches
from benchmarks.reference.attribution.method import Scorer, Subject
from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.kronecker import Kronecker, KroneckerFactors
from vlearn.linearized.batches import batches as numbered
from vlearn.linearized.linearization import at_mean, linearize
from vlearn.losses.example_loss import ExampleLoss

Vectors = dict[str, Tensor]  # by parameter ``[n, *shape]``
CHUNK = 50  # queries whose vectors are held at once


def segments(subject: Subject, count: int = 3, structure: str = "eigenvalue-corrected") -> Scorer:
    """Attributions by segments of equal length: each has the fit at its last snapshot, and its mean gradients."""
    time = subject.training_time / count
    parts = torch.arange(len(subject.snapshots)).tensor_split(count)
    model = subject.own_model()
    fits = []
    for part in parts:
        model.load_state_dict(subject.snapshots[int(part[-1])])
        fits.append(_fit(model, subject, structure))

    def score(x: Tensor, y: Tensor) -> Tensor:
        columns: list[Tensor] = []
        for queries in batches(x, y, CHUNK):
            model.load_state_dict(subject.snapshots[-1])
            vector = _joined(_gradients(model, subject, [queries]))
            found: list[Tensor] = []
            for fit, part in reversed(list(zip(fits, parts, strict=True))):
                moved = _multiply(model, fit.stopped_at(time), vector)
                vector = _multiply(model, _decay(fit, time), vector)
                for snapshot in part.tolist():
                    model.load_state_dict(subject.snapshots[snapshot])
                    found.append(_inner(model, subject, moved) / len(part))
            columns.append(torch.stack(found).sum(0))
        return torch.cat(columns, 1)

    return score


def _fit(model: nn.Module, subject: Subject, structure: str) -> Gaussian:
    return vlearn.posterior.fit(
        model,
        batches(subject.x, subject.y),
        subject.loss,
        structure,
        prior_precision=len(subject.y) * subject.weight_decay,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )


def _decay(fit: Gaussian, time: float) -> Kronecker:
    """e^{-ηH} as the covariance of a Gaussian."""
    assert isinstance(fit, Kronecker)
    factors = {}
    for each in fit.block_state()["factors"]:
        names = tuple(each["names"])
        curvature = each["hessian"] + fit.prior_precision[names[0]] / fit.num_data
        largest = math.log(torch.finfo(curvature.dtype).max)
        precision = (time * curvature).clamp_max(largest).exp()
        factors[names] = KroneckerFactors(each["out_basis"], each["in_basis"], precision)
    nothing, one = dict.fromkeys(fit.mean, 0.0), dict.fromkeys(fit.mean, 1.0)
    return Kronecker(fit.mean, factors, nothing, one, num_data=1)


@torch.no_grad()
def _multiply(model: nn.Module, posterior: Gaussian, vector: Vectors) -> Vectors:
    """Σ times each of some vectors."""
    parameters = dict(model.named_parameters())
    moved = posterior.covariance(parameters).multiply({parameters[name]: v for name, v in vector.items()})
    return {name: moved[parameters[name]] for name in vector}


@torch.no_grad()
def _gradients(model: nn.Module, subject: Subject, given: Batches) -> Iterator[Vectors]:
    """Every example's gradient at the model's weights, a chunk at a time."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    identity = vlearn.posterior.Diagonal.from_precision(
        {name: p.detach() for p, name in names.items()},
        {name: torch.ones_like(p) for p, name in names.items()},
        num_data=1,
    )
    with at_mean(model, identity) as covariance:
        for batch in numbered(given, model):
            for _, gradients in linearize(model, covariance, batch, ExampleLoss(subject.loss)).example_gradients():
                yield {names[p]: g for p, g in gradients.items()}


def _joined(parts: Iterable[Vectors]) -> Vectors:
    held = list(parts)
    return {name: torch.cat([each[name] for each in held]) for name in held[0]}


def _inner(model: nn.Module, subject: Subject, directions: Mapping[str, Tensor]) -> Tensor:
    """The inner products of every training example's gradient with some directions, ``[N, Q]``."""
    rows = []
    for gradients in _gradients(model, subject, batches(subject.x, subject.y)):
        products = [gradients[name].flatten(1) @ directions[name].flatten(1).mT for name in gradients]
        rows.append(torch.stack(products).sum(0))
    return torch.cat(rows)
