"""What an optimizer's own state says of LeNet-5's removals, after ordinary training: many examples at once.

    python -m benchmarks.group_removal [--seeds 2] [--data-root ROOT]
    python -m benchmarks.group_removal --smoke    # a few seconds on digits

Each optimizer trains on 5,000 images of Fashion-MNIST. Its mean leave-one-out loss is held against the test loss. Then
three groups of 3% of the images are left out, each group at once (`vlearn.check_removals`): from the trained mean, with
the same minibatches, by SGD whose rate falls to zero over eight epochs. It is SGD for all of them, since an optimizer
that draws moves the losses by more than a removal does, even with the same random numbers. The rise of each one's own
loss is held against three predictions: of the optimizer's own state, for training on to the end and for as long as SGD
did (`stopped_at`), and of an EK-FAC fit at the same weights, which says what a state could know: 450 truths for five
times eight epochs.

Removing an example now and training on asks for the curvature of the loss where the network is; the leave-one-out loss
of a network that overfits asks what it would be had it never seen the example, and that depends on all of its training
(`benchmarks.stopped_training`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor, nn

import vlearn
from benchmarks.problems import networks
from benchmarks.problems.batches import batches
from benchmarks.problems.images import Images
from benchmarks.report import experiments
from benchmarks.report.records import over_seeds
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training.checkpoint import Checkpoint, kept
from benchmarks.training.supervised import Training, steps

RATE, MOMENTUM = 0.03, 0.9  # of SGD at first, where training goes on
STATE, STOPPED, FIT = "its state", "its state, stopped", "EK-FAC made there, stopped"


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One network and its training.

    Attributes:
        remaining: weight of hess_init at the end, of IVON, whose default keeps nearly all.
        groups, share: how many groups are left out, and what part of the examples each is.
        more_epochs: of training without them.
    """

    title: str = "5,000 of Fashion-MNIST, LeNet-5"
    dataset: str = "fashion-mnist"
    num_data: int = 5_000
    num_test: int | None = None
    network: str = "lenet5"
    prior_precision: float = 1.0
    epochs: int = 40
    batch: int = 50
    remaining: float = 0.14
    groups: int = 3
    share: float = 0.03
    more_epochs: int = 8

    def cut(self, epochs: int) -> Experiment:
        """The same, shorter."""
        return dataclasses.replace(self, epochs=epochs)


EXPERIMENTS = {"fashion-mnist-5k": Experiment()}
SMOKE = Experiment(
    "400 of the digits", "digits", 400, 200, network="mlp_64_16", epochs=2, groups=2, more_epochs=1, batch=20
)

METHODS: dict[str, tuple[float, Callable[..., Any]]] = {
    "IVON": (0.1, vlearn.IVON),
    "EVON": (2.0, vlearn.EVON),
    "KFACVON": (0.01, vlearn.KFACVON),
    "KFACVON, EK-FAC": (0.01, vlearn.KFACVON),
}


def optimizer_of(method: str, model: nn.Module, experiment: Experiment) -> Any:
    """A method's optimizer; but for IVON's Hessian its settings are the defaults."""
    rate, make = METHODS[method]
    own: dict[str, Any] = {"eigenvalue_correction": True} if method.endswith("EK-FAC") else {}
    if method == "IVON":
        total = steps(experiment.num_data, experiment.epochs, experiment.batch)
        own = {"hess_init": 0.1, "beta2": experiment.remaining ** (1 / total)}
    decay = experiment.prior_precision / experiment.num_data
    return make(model, lr=rate, ess=experiment.num_data, weight_decay=decay, **own)


def falling(optimizer: Any, total: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The rate falls to zero along a cosine."""
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)


def train(experiment: Experiment, method: str, data: Images, seed: int, runs: Path, advance: Advance) -> Training:
    """The trained network, with its optimizer."""
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    optimizer = optimizer_of(method, model, experiment)
    training = Training(
        model,
        optimizer,
        falling(optimizer, steps(experiment.num_data, experiment.epochs, experiment.batch)),
        data,
        batch=experiment.batch,
        epochs=experiment.epochs,
        seed=seed,
        checkpoint=Checkpoint(
            runs / f"{method}-{seed}.pt", {**dataclasses.asdict(experiment), "method": method, "seed": seed}
        ),
    )
    for epoch in training:
        advance(f"{experiment.title}: {method}, seed {seed}, epoch {epoch}/{experiment.epochs}")
    optimizer.unwatch()
    return training


def measure(experiment: Experiment, method: str, data: Images, seed: int, runs: Path, advance: Advance) -> Any:
    """Losses at the mean, and what leaving out groups does beside what is predicted."""
    training = train(experiment, method, data, seed, runs, advance)
    model, optimizer = training.model, training.optimizer
    assert isinstance(optimizer, (vlearn.IVON, vlearn.EVON, vlearn.KFACVON))
    loader, total = batches(data.x, data.y), steps(len(data.y), experiment.more_epochs, experiment.batch)

    def train_on(network: nn.Module, keep: Tensor) -> None:
        decay = experiment.prior_precision / experiment.num_data
        own = torch.optim.SGD(network.train().parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=decay)
        schedule = falling(own, total)
        for epoch in range(experiment.more_epochs):
            for index in torch.randperm(len(data.y)).split(experiment.batch):
                own.zero_grad()
                losses = F.cross_entropy(network(data.x[index]), data.y[index], reduction="none")
                (losses * keep[index]).mean().backward()
                own.step()
                schedule.step()
            advance(f"{experiment.title}: {method}, seed {seed}, on without a group: {epoch + 1}")

    posterior, time = optimizer.posterior(), 0.5 * RATE * (total + 1) / (1 - MOMENTUM)  # Σ lr/(1 - momentum)
    fit = vlearn.posterior.fit(
        model,
        loader,
        F.cross_entropy,
        structure="eigenvalue-corrected",
        prior_precision=experiment.prior_precision,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
    )
    posteriors = {STATE: posterior, STOPPED: posterior.stopped_at(time), FIT: fit.stopped_at(time)}
    tables = {
        name: vlearn.sweep(model, each, loader, F.cross_entropy, None, progress=False)
        for name, each in posteriors.items()
    }
    table = tables[STATE]
    check = vlearn.check_removals(
        model,
        table,
        train_on,
        loader,
        F.cross_entropy,
        groups=experiment.groups,
        share=experiment.share,
        seed=seed,
        progress=False,
    )
    model.eval()
    with torch.no_grad():
        test_loss = float(F.cross_entropy(model(data.x_test), data.y_test))
    numbers = {
        "train_loss": float(table.loss.mean()),
        "loo_loss": float(table.loo_loss.mean()),
        "test_loss": test_loss,
        "highest_pearson": check.highest_pearson,
    }
    for name, each in tables.items():
        own = dataclasses.replace(check, predicted=(each.loo_loss.double() - each.loss.double())[check.index])
        numbers |= {f"{quantity}: {name}": getattr(own, quantity)[0] for quantity in ("pearson", "slope")}
    return {"numbers": numbers, "predicted": check.predicted.numpy(), "retrained": check.retrained.numpy()}


def run_experiment(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """Every method and seed."""
    found: dict[str, list[Any]] = {}
    for method in METHODS:
        for seed in range(seeds):
            settings = {**dataclasses.asdict(experiment), "method": method, "seed": seed}
            file = runs / f"{method}-{seed}-removals.pt"
            work = partial(measure, experiment, method, data, seed, runs, advance)
            found.setdefault(method, []).append(kept(file, settings, work))
    return {
        "table": {method: over_seeds([each["numbers"] for each in rows]) for method, rows in found.items()},
        "removals": {
            method: {key: rows[0][key] for key in ("predicted", "retrained")} for method, rows in found.items()
        },
    }


def draw(record: dict[str, Any]) -> Figure:
    """The first seed's removals, a panel for each method."""
    figure, panels = pyplot.subplots(1, len(record["removals"]), figsize=(4.4 * len(record["removals"]), 4.2))
    for panel, (method, each) in zip(np.atleast_1d(panels), record["removals"].items(), strict=True):
        vlearn.plot.removals(predicted=each["predicted"], retrained=each["retrained"], ax=panel)
        panel.set_title(method, fontsize=12)
    figure.suptitle(record["experiment"]["title"], fontsize=12)
    figure.tight_layout()
    return figure


def print_results(record: dict[str, Any]) -> None:
    """Print the means over the seeds."""
    names = ["train_loss", "loo_loss", "test_loss", "highest_pearson"]
    names += [f"{quantity}: {name}" for name in (STATE, STOPPED, FIT) for quantity in ("pearson", "slope")]
    rows = [(method, *(f"{row['mean'][name]:.2f}" for name in names)) for method, row in record["table"].items()]
    header = ["", "train", "LOO", "test", "highest\nPearson"]
    header += [f"{quantity}\n{name}" for name in ("state", "stopped", "EK-FAC") for quantity in ("Pearson", "slope")]
    print_table(f"Groups left out: {record['experiment']['title']}", header, rows)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = experiments.parser("group_removal", __doc__, EXPERIMENTS, seeds=2).parse_args(argv)
    chosen = experiments.chosen(arguments, EXPERIMENTS, SMOKE)
    return experiments.run("group_removal", arguments, chosen, run_experiment, draw, print_results)


if __name__ == "__main__":
    sys.exit(main())
