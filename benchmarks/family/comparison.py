"""Training of every method on the same network, prior and minibatches, at a rate chosen on held-out data."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from benchmarks.family.methods import GRID, METHODS, MOST, Problem, posterior_of
from benchmarks.family.scores import at_mean, by_draws, linearised, scores
from benchmarks.problems import images as datasets
from benchmarks.problems import networks
from benchmarks.problems.batches import batches
from benchmarks.problems.images import Images
from benchmarks.reference import laplace
from benchmarks.report.records import over_seeds
from benchmarks.report.terminal import Advance
from benchmarks.training.checkpoint import kept
from benchmarks.training.evaluation import loo_loss
from benchmarks.training.loop import finish, training_step
from benchmarks.training.supervised import steps
from vlearn.gaussians.gaussian import Gaussian
from vlearn.gaussians.protocol import Posterior
from vlearn.gaussians.stopped_training import TrainingTime
from vlearn.posterior import from_laplace

LAPLACE = {"SGD + Laplace, diagonal": "diag", "SGD + Laplace, Kronecker": "kron"}
FIT, STOPPED = "SGD + fit, Kronecker", "SGD + fit, with the training time"
AFTERWARDS = (*LAPLACE, FIT, STOPPED)  # posteriors of SGD's weights, which predict through the linearised network
Row = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a row depends on but method, learning rate and seed.

    Attributes:
        prior_precision: δ on the scale of the summed loss.
        hess_init, beta2: of every variational optimizer.
        held_out: share of the training data that the learning rate is chosen by.
    """

    title: str
    dataset: str
    network: str
    num_data: int
    num_test: int
    epochs: int
    batch: int
    prior_precision: float
    hess_init: float
    beta2: float
    draws: int = 64
    held_out: float = 0.2


EXPERIMENTS = {
    "digits": Experiment("digits, CNN", "digits", "digits_cnn", 1000, 797, 50, 50, 5.0, 0.1, 0.998),
    "fashion-mnist-5k": Experiment(
        "5,000 of Fashion-MNIST, LeNet-5", "fashion-mnist", "lenet5", 5000, 2000, 10, 50, 5.0, 0.1, 0.998
    ),
    "fashion-mnist": Experiment(
        "Fashion-MNIST, LeNet-5", "fashion-mnist", "lenet5", 60_000, 10_000, 30, 256, 60.0, 0.1, 0.9995
    ),
}
SMOKE = Experiment("digits, CNN", "digits", "digits_cnn", 200, 100, 2, 50, 5.0, 0.1, 0.99, draws=4)
DEFAULT = ("digits", "fashion-mnist-5k")


def train(
    experiment: Experiment, data: Images, method: str, lr: float, seed: int
) -> tuple[nn.Module, Posterior | None, Problem, TrainingTime]:
    """Train a network; it, the posterior of the optimizer's state, what it was given, and the time that SGD had."""
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    problem = Problem(len(data.y), experiment.prior_precision, seed, experiment.hess_init, experiment.beta2)
    optimizer = METHODS[method].make(model, lr, problem)
    total = steps(len(data.y), experiment.epochs, experiment.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    order = torch.Generator().manual_seed(seed)
    for _ in range(experiment.epochs):
        for index in torch.randperm(len(data.y), generator=order).split(experiment.batch):
            x, y = data.x[index.to(data.x.device)], data.y[index.to(data.y.device)]
            training_step(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
            schedule.step()
    posterior = posterior_of(optimizer, model, problem)
    if posterior is not None:
        posterior = posterior.clone()
    finish(optimizer)
    time = vlearn.posterior.training_time(optimizer, total, schedule) if method == "SGD" else math.inf
    return model, posterior, problem, time


def row(model: nn.Module, posterior: Posterior | None, data: Images, draws: int, linear: bool = False) -> Row:
    """What one posterior predicts: at its mean, and by draws of the weights or of the linearised model's output."""
    values = scores(at_mean(model, data.x_test), data.y_test)
    if posterior is None:
        return values
    drawn = (
        linearised(model, posterior, data.x_test, data.y_test, draws)
        if linear
        else by_draws(model, posterior, data.x_test, draws)
    )
    return values | {f"{name}_by_draws": value for name, value in scores(drawn, data.y_test).items()}


def rows_of(experiment: Experiment, data: Images, method: str, lr: float, seed: int) -> dict[str, Row]:
    """Train once and measure: the method's row, and with SGD's those of the posteriors of its weights."""
    model, posterior, problem, time = train(experiment, data, method, lr, seed)
    posteriors: dict[str, Posterior | None] = {method: posterior}
    if method == "SGD":
        for name, structure in LAPLACE.items():
            la = laplace.fit(model, data.x, data.y, structure, problem.prior_precision, batch=200)
            posteriors[name] = from_laplace(la)
        posteriors[FIT] = fit = fitted(model, data, problem.prior_precision)
        posteriors[STOPPED] = fit.stopped_at(time)
    train_loss = scores(at_mean(model, data.x), data.y)["nll"]
    rows = {}
    for name, each in posteriors.items():
        values = row(model, each, data, experiment.draws, linear=name in AFTERWARDS) | {"train_nll": train_loss}
        if each is not None:
            values["loo_loss"] = loo_loss(model, each, data)
            values["loo_gap"] = values["loo_loss"] - values["nll"]
        rows[name] = values
    return rows


def fitted(model: nn.Module, data: Images, prior_precision: float) -> Gaussian:
    """This library's K-FAC at the model's weights."""
    generator = torch.Generator(data.x.device).manual_seed(0)
    return vlearn.posterior.fit(
        model,
        batches(data.x, data.y),
        F.cross_entropy,
        prior_precision=prior_precision,
        generator=generator,
        progress=False,
    )


def tune(experiment: Experiment, data: Images, method: str, runs: Path, advance: Advance) -> dict[float, Row]:
    """Scores on held-out training data by learning rate; those of a run that diverged are infinite."""
    count = round(len(data.y) * (1 - experiment.held_out))
    part = dataclasses.replace(
        data,
        x=data.x[:count],
        y=data.y[:count],
        x_test=data.x[count:],
        y_test=data.y[count:],
        pictures=data.pictures[:count],
    )

    def measure(lr: float) -> Row:
        try:
            model, posterior, _, _ = train(experiment, part, method, lr, seed=0)
        except FloatingPointError:
            return {"nll": math.inf, "nll_by_draws": math.inf}
        return row(model, posterior, part, experiment.draws)

    tried: dict[float, Row] = {}
    waiting = [METHODS[method].rate * share for share in GRID]
    while waiting:
        for lr in waiting:
            settings = {**dataclasses.asdict(experiment), "method": method, "lr": lr, "tuning": True}
            tried[lr] = kept(runs / f"{method}-lr{lr:.3g}-tuning.pt", settings, lambda lr=lr: measure(lr))
            advance(f"{experiment.title}: {method}, learning rate {lr:.3g} tried")
        chosen = best(method, tried)
        beyond = {min(tried): chosen / 3, max(tried): chosen * 3}
        waiting = [beyond[chosen]] if chosen in beyond and len(tried) < MOST else []
    return dict(sorted(tried.items()))


def best(method: str, tried: dict[float, Row]) -> float:
    """The learning rate whose prediction has the smallest loss: by draws where the state is a posterior."""
    quantity = "nll_by_draws" if METHODS[method].is_posterior else "nll"
    return min(tried, key=lambda lr: tried[lr][quantity] if math.isfinite(tried[lr][quantity]) else math.inf)


def run_experiment(
    name: str, experiment: Experiment, seeds: int, root: Path | None, runs: Path, device: str, advance: Advance
) -> dict[str, Any]:
    """Tune and train every method."""
    data = datasets.load(experiment.dataset, root).first(experiment.num_data, experiment.num_test).to(device)
    tried, chosen = {}, {}
    rows: dict[str, list[Row]] = {}
    for method in METHODS:
        tried[method] = tune(experiment, data, method, runs / name, advance)
        lr = chosen[method] = best(method, tried[method])
        for seed in range(seeds):
            settings = {**dataclasses.asdict(experiment), "method": method, "lr": lr, "seed": seed}
            path = runs / name / f"{method}-lr{lr:.3g}-seed{seed}.pt"
            trained = kept(
                path, settings, lambda method=method, lr=lr, seed=seed: rows_of(experiment, data, method, lr, seed)
            )
            for each, numbers in trained.items():
                rows.setdefault(each, []).append(numbers)
            advance(f"{experiment.title}: {method}, seed {seed} done")
    total = steps(len(data.y), experiment.epochs, experiment.batch)
    return {
        "experiment": dataclasses.asdict(experiment),
        "remaining_weight_of_hess_init": experiment.beta2**total,
        "learning_rates": {method: {"chosen": chosen[method], "held_out": tried[method]} for method in METHODS},
        "table": {name: over_seeds(each) for name, each in in_order(rows).items()},
        "seeds": rows,
    }


def in_order(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """The rows in the order of the table: SGD, the posteriors of its weights, then the others."""
    first = ["SGD", *(name for name in AFTERWARDS if name in rows)]
    return {name: rows[name] for name in (*first, *(each for each in rows if each not in first))}
