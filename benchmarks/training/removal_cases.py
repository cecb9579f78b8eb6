"""Trained networks with a way to retrain each without an example: digits to the minimum, images by SGD going on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.problems import networks
from benchmarks.problems.batches import batches
from benchmarks.problems.digits import Digits, Settings
from benchmarks.problems.images import Images
from benchmarks.reference import newton_step
from benchmarks.reference.gauss_newton import gauss_newton, layers_of
from benchmarks.report.terminal import Advance
from benchmarks.training import estimates, supervised, warm_start
from benchmarks.training.checkpoint import Checkpoint
from benchmarks.training.digits_minimum import minimum_of, moved_to
from benchmarks.training.estimates import Estimate
from benchmarks.training.evaluation import example_losses
from benchmarks.training.supervised import Training
from benchmarks.training.warm_start import Plan
from vlearn.posterior import Full

TRAINED_BY = ("dataset", "network", "prior_precision", "epochs", "batch", "lr")  # what the trained network depends on
SNAPSHOTS = 5  # of the training run, for TracIn


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that the numbers depend on but the seed.

    Attributes:
        prior_precision: δ on the scale of the summed loss.
        lr: first and last rate of the training run, along a cosine; IVON's for digits, else that of SGD.
        held: epochs that the optimizers run at the trained weights to get their state.
        hess_init, beta2: IVON's there.
        retrained: how many examples are left out.
        retraining: epochs, and first and last rate, of SGD without an example; None is L-BFGS to convergence.
    """

    title: str
    dataset: str
    network: str
    num_data: int | None
    prior_precision: float
    epochs: int
    batch: int
    lr: tuple[float, float]
    held: int
    hess_init: float
    beta2: float
    retrained: int
    retraining: tuple[int, tuple[float, float]] | None = None
    num_test: int | None = None

    def cut(self, epochs: int) -> Experiment:
        """The same with another number of epochs of training."""
        return dataclasses.replace(self, epochs=epochs)


@dataclasses.dataclass(frozen=True)
class Case:
    """A trained network, what is asked about it, and how it is retrained.

    Attributes:
        y: ``[N]`` classes of the training examples; x the examples, in the model's precision.
        snapshots, rates: weights and learning rates over training, for TracIn.
        exact: estimates of this case alone, by name.
        kept: gives the outputs ``[E, N, C]`` of all examples after each epoch of retraining with all.
        removed: examples -> for each in turn its own outputs ``[E, C]`` after each epoch of retraining without it, and
            whether that converged.
        training_time: Σ_t lr_t/(1 - momentum) of retraining; None where it goes to the end.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    snapshots: Sequence[dict[str, Tensor]]
    rates: Sequence[float]
    exact: dict[str, Callable[[], Estimate]]
    kept: Callable[[], Tensor]
    removed: Callable[[Tensor], Iterator[tuple[Tensor, bool]]]
    numbers: dict[str, float]
    training_time: float | None = None


def digits(experiment: Experiment, seed: int) -> Case:
    """The digits: IVON trains, L-BFGS goes on to the minimum and retrains from there."""
    settings = Settings(
        seed=seed,
        epochs=experiment.epochs,
        batch=experiment.batch,
        num_data=experiment.num_data or 1000,
        prior_precision=experiment.prior_precision,
        lr=experiment.lr[0],
        hess_init=experiment.hess_init,
        beta2=experiment.beta2,
    )
    data = Digits.load(settings, standardised=False)
    snapshots = []

    def keep(epoch: int, model: nn.Module) -> None:
        if epoch in snapshot_epochs(experiment):
            snapshots.append({name: p.double() for name, p in model.state_dict().items()})

    problem, minimum, model, ivon = minimum_of(settings, data, keep)
    x = data.x.double()
    loader = batches(x, data.y)

    def full(refined: bool) -> Estimate:
        mean = {name: p.detach() for name, p in model.named_parameters()}
        precision = gauss_newton(layers_of(model, x))
        precision += experiment.prior_precision * torch.eye(len(precision), dtype=torch.float64)
        return estimates.by_posterior(model, Full(mean, precision, len(x)), loader, refined)

    def removed(examples: Tensor) -> Iterator[tuple[Tensor, bool]]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the tensors are small: one network to a core
        try:
            refits = problem.without(examples.tolist(), minimum, workers=threads)
            for example, refit in zip(examples, refits, strict=True):
                yield problem.outputs(refit, example[None]), refit.converged
        finally:
            torch.set_num_threads(threads)

    return Case(
        model,
        x,
        data.y,
        snapshots,
        rates(experiment),
        {
            "IVON, as trained": lambda: estimates.by_posterior(model, moved_to(model, ivon), loader),
            "full Gauss-Newton": lambda: full(refined=False),
            "full, refined": lambda: full(refined=True),
            "full, own Hessian": lambda: estimates.by_deviation(
                model, newton_step.deviation(model, x, data.y, experiment.prior_precision), loader
            ),
        },
        lambda: problem.outputs(minimum, slice(None))[None],
        removed,
        quality(model, data.x_test.double(), data.y_test),
    )


def images(experiment: Experiment, data: Images, seed: int, runs: Path, advance: Advance) -> Case:
    """A set of images: SGD trains, and goes on without each example."""
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    total = supervised.steps(len(data.y), experiment.epochs, experiment.batch)
    delta = experiment.prior_precision
    settings = {name: getattr(experiment, name) for name in TRAINED_BY} | {"num_data": len(data.y), "seed": seed}
    training = Training(
        model,
        *supervised.sgd(model, len(data.y), total, prior_precision=delta, lr=experiment.lr),
        data,
        batch=experiment.batch,
        epochs=experiment.epochs,
        seed=seed,
        checkpoint=Checkpoint(runs / f"trained-seed{seed}.pt", settings),
        recorded={"snapshots": []},
    )
    for epoch in training:
        if epoch in snapshot_epochs(experiment):
            training.recorded["snapshots"].append({name: p.clone() for name, p in model.state_dict().items()})
        advance(f"{experiment.title}, seed {seed}: epoch {epoch}/{experiment.epochs}")
    assert experiment.retraining is not None
    epochs, lr = experiment.retraining
    plan = Plan(epochs, experiment.batch, lr, delta)

    def removed(examples: Tensor) -> Iterator[tuple[Tensor, bool]]:
        for example in examples:
            shown = example[None]
            yield warm_start.without(int(example), model, data.x, data.y, plan, seed, shown).squeeze(1), True

    return Case(
        model,
        data.x,
        data.y,
        training.recorded["snapshots"],
        rates(experiment),
        {},
        lambda: warm_start.without(None, model, data.x, data.y, plan, seed, torch.arange(len(data.y))),
        removed,
        quality(model, data.x_test, data.y_test),
        warm_start.training_time(len(data.y), plan),
    )


def snapshot_epochs(experiment: Experiment) -> list[int]:
    """The epochs whose weights are kept; they are evenly spaced, and the last is the end of training."""
    shares = (np.arange(SNAPSHOTS) + 1) / SNAPSHOTS
    return sorted({max(1, round(share * experiment.epochs)) for share in shares})


def rates(experiment: Experiment) -> list[float]:
    """Learning rates in the middle of the epochs of the snapshots."""
    first, last = experiment.lr
    shares = [(epoch - 0.5) / experiment.epochs for epoch in snapshot_epochs(experiment)]
    return [last + (first - last) * (1 + np.cos(np.pi * share)) / 2 for share in shares]


def quality(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, float]:
    """The mean loss in nats and the accuracy on test examples."""
    losses, right = example_losses(model, x, y)
    return {"test_loss": losses.mean().item(), "test_accuracy": right.mean().item()}
