"""dattri: TRAK, influence functions by conjugate gradients, Arnoldi's projection and EK-FAC, and TracIn."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.reference.attribution.method import Method, Scorer, Subject
from vlearn._extras import require

HESSIAN = 1024  # examples whose Hessian conjugate gradients and Arnoldi's iteration multiply with
CHUNK = 128  # examples whose gradients are held at once


def trak(subjects: Sequence[Subject], projection: int = 2048, regularization: float = 0.0) -> Scorer:
    """Park et al., 2023; its ensemble averages its two factors each over the networks."""
    trak = _dattri("algorithm.trak")
    first = subjects[0]
    model = first.own_model()
    task = _task(model, [subject.snapshots[-1] for subject in subjects], _output(model, first), _goal(model, first))
    attributor = trak.TRAKAttributor(
        task,
        correct_probability_func=_right(model, first),
        projector_kwargs={"proj_dim": projection, "proj_max_batch_size": 32, "proj_seed": 0, "device": "cpu"},
        regularization=regularization,
    )
    with _quiet():
        # for each of whose batches the random projection is drawn again
        attributor.cache(_loader(first.x, first.y, 4 * CHUNK))
    return _scorer(lambda x, y: attributor.attribute(_loader(x, y, len(y))))


def conjugate_gradients(subject: Subject, regularization: float = 1e-2, iterations: int = 10) -> Scorer:
    """Koh and Liang, 2017: the Hessian of the loss itself of some of the examples, `regularization` added."""
    functions = _dattri("algorithm.influence_function")
    model = subject.own_model()
    attributor = functions.IFAttributorCG(
        _loss_task(model, subject), max_iter=iterations, regularization=regularization
    )
    # One batch: the products of several would be added up.
    some = torch.randperm(len(subject.y), generator=torch.Generator().manual_seed(0))[:HESSIAN]
    attributor.cache(_loader(subject.x[some], subject.y[some], len(some)))
    return _scorer(partial(_inner_products, attributor, subject, chunk=8))


def arnoldi(subject: Subject, regularization: float = 1e-2, projection: int = 100, iterations: int = 100) -> Scorer:
    """Schioppa et al., 2022: the Hessian's largest eigenvalues alone, of which no negative one may be left."""
    functions = _dattri("algorithm.influence_function")
    model = subject.own_model()
    attributor = functions.IFAttributorArnoldi(
        _loss_task(model, subject), proj_dim=projection, max_iter=iterations, regularization=regularization
    )
    some = torch.randperm(len(subject.y), generator=torch.Generator().manual_seed(0))[:HESSIAN]
    with _quiet(), torch.no_grad():
        attributor.cache(_loader(subject.x[some], subject.y[some], len(some)))
    return _scorer(partial(_inner_products, attributor, subject))


def ekfac_factors(subject: Subject) -> Any:
    """The attributor, whose factors no damping changes."""
    functions = _dattri("algorithm.influence_function")
    attributor = functions.IFAttributorEKFAC(_loss_task(subject.own_model(), subject))
    with _quiet():
        attributor.cache(_loader(subject.x, subject.y))
    return attributor


def ekfac(subject: Subject, attributor: Any, damping: float) -> Scorer:
    """Grosse et al., 2023."""
    attributor.damping = damping
    return _scorer(partial(_inner_products, attributor, subject))


def tracin(subject: Subject) -> Scorer:
    """Pruthi et al., 2020: the gradients themselves, of every snapshot."""
    functions = _dattri("algorithm.tracin")
    model = subject.own_model()
    task = _task(model, list(subject.snapshots), *(2 * [_loss(model, subject)]))
    rates = torch.full((len(subject.snapshots),), subject.lr)
    attributor = functions.TracInAttributor(task, rates, normalized_grad=False)
    attributor.projector_kwargs = None  # else they are projected to 512 dimensions, whatever is asked for
    train = _loader(subject.x, subject.y, 4 * CHUNK)  # for each of whose batches the queries' gradients are made again
    return _scorer(lambda x, y: attributor.attribute(train, _loader(x, y, len(y))))


# Its eigenvalues are of the gradients of the minibatch's mean loss: CHUNK² times smaller than those of the examples'.
DAMPING = [10.0**-power / CHUNK**2 for power in (1, 2, 3, 4, 0)]
METHODS = (
    Method(
        "TRAK",
        "dattri",
        trak,
        [
            {"projection": projection, "regularization": regularization}
            for projection, regularization in (
                (2048, 0.0),
                (512, 0.0),
                (512, 1e-3),
                (2048, 1e-3),
                (2048, 1e-2),
                (2048, 1e-1),
                (2048, 1.0),
            )
        ],
        own_ensemble=True,
        averaged=True,
        removed=True,
    ),
    Method(
        "influence, CG",
        "dattri",
        conjugate_gradients,
        [{"regularization": value} for value in (1e-2, 1e-1, 1.0, 10.0, 1e-3, 1e-4)],
    ),
    Method(
        "influence, Arnoldi",
        "dattri",
        arnoldi,
        [
            {"regularization": regularization, "projection": projection}
            for regularization, projection in ((1e-2, 100), (1e-1, 100), (1.0, 100), (1e-2, 20), (1e-3, 10))
        ],
    ),
    Method("influence, EK-FAC", "dattri", ekfac, [{"damping": value} for value in DAMPING], ekfac_factors),
    Method("TracIn", "dattri", tracin),
)


def _dattri(module: str) -> Any:
    return require(f"dattri.{module}", "attribution", "benchmarks.attribution")


def _task(model: nn.Module, weights: list[Any], loss: Callable[..., Tensor], goal: Callable[..., Tensor]) -> Any:
    return _dattri("task").AttributionTask(loss_func=loss, model=model, checkpoints=weights, target_func=goal)


def _loss_task(model: nn.Module, subject: Subject) -> Any:
    return _task(model, [subject.snapshots[-1]], *(2 * [_loss(model, subject)]))


def _loss(model: nn.Module, subject: Subject) -> Callable[..., Tensor]:
    """The mean loss of a batch, or of a single example."""
    if subject.regression:  # written out: the Hessian products of F.mse_loss end in tensors of zeros that are immutable
        return lambda weights, batch: (functional_call(model, weights, (batch[0],)) - batch[1]).square().mean()
    return lambda weights, batch: subject.loss(functional_call(model, weights, (batch[0],)), batch[1])


def _output(model: nn.Module, subject: Subject) -> Callable[..., Tensor]:
    """TRAK's output function of a single example: the margin, or the value in regression."""

    def margin(weights: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        log_p = functional_call(model, weights, (batch[0],)).log_softmax(-1)
        own = log_p.gather(-1, batch[1].unsqueeze(-1)).squeeze(-1)
        return own - torch.log1p(-own.exp().clamp_max(1 - 1e-6))

    def value(weights: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return functional_call(model, weights, (batch[0],)).sum()

    return value if subject.regression else margin


def _goal(model: nn.Module, subject: Subject) -> Callable[..., Tensor]:
    """What TRAK attributes: the margin, or minus the loss in regression."""
    if not subject.regression:
        return _output(model, subject)
    loss = _loss(model, subject)
    return lambda weights, batch: -loss(weights, batch)


def _right(model: nn.Module, subject: Subject) -> Callable[..., Tensor]:
    """1 less the derivative of the loss by the output function: the label's probability."""

    def probability(weights: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        output = functional_call(model, weights, (batch[0],))
        if subject.regression:
            return 1 + (output - batch[1]).sum()
        return output.softmax(-1).gather(-1, batch[1].unsqueeze(-1))

    return probability


def _loader(x: Tensor, y: Tensor, size: int = CHUNK) -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, y), batch_size=size, shuffle=False)


def _inner_products(attributor: Any, subject: Subject, x: Tensor, y: Tensor, chunk: int = CHUNK) -> Tensor:
    """Its `attribute`, which would transform the queries' gradients anew for every batch of training examples."""

    def parts(x: Tensor, y: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for a, b in zip(x.split(size), y.split(size), strict=True):
            yield a.unsqueeze(0), b.unsqueeze(0)

    queries = torch.cat(
        [attributor.transform_test_rep(0, attributor.generate_test_rep(0, part)) for part in parts(x, y, chunk)]
    )
    rows = [
        attributor.transform_train_rep(0, attributor.generate_train_rep(0, part)) @ queries.T
        for part in parts(subject.x, subject.y, CHUNK // 4)  # twice as fast as CHUNK
    ]
    return torch.cat(rows)


def _scorer(attribute: Callable[[Tensor, Tensor], Tensor]) -> Scorer:
    def score(x: Tensor, y: Tensor) -> Tensor:
        with _quiet(), torch.no_grad():  # else the graphs of all iterations are kept
            return attribute(x, y)

    return score


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without dattri's progress bars."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield
