"""Leave-one-out loss and test loss of networks that were trained for a while, with and without their training time.

    python -m benchmarks.stopped_training [--experiments NAME ...] [--seeds 1] [--smoke]

SGD with momentum .9, Adam or AdamW, with a cosine along the whole run. At some epochs, K-FAC and EK-FAC fits
(`vlearn.posterior.fit`, the Gauss-Newton matrix by one probe) at the prior precision of the training, taken as a
network that was trained to the end and with the training time η so far (`vlearn.posterior.training_time`). Mean losses
in nats; the test loss is that of examples that nothing else has seen. "fashion-mnist-published" has the settings of
`benchmarks.generalization` (Nickl et al., 2023, arXiv:2310.19273, Fig. 5), for which three seeds are meant.

Every run saves its state after each epoch under --runs; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import vlearn
from benchmarks.problems import networks
from benchmarks.problems.batches import batches
from benchmarks.problems.images import Images
from benchmarks.report import experiments, pictures
from benchmarks.report.curves import Curves, losses
from benchmarks.report.records import over_seeds
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training.checkpoint import Checkpoint
from benchmarks.training.evaluation import loo_loss
from benchmarks.training.recorded_runs import note_losses
from benchmarks.training.supervised import Training, steps

STRUCTURES = {"K-FAC": "kronecker", "EK-FAC": "eigenvalue-corrected"}
ENDINGS = ("to the end", "stopped")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A network, its data, and when it is looked at.

    Attributes:
        prior_precision: δ on the scale of the summed loss; None for AdamW's own, of its decoupled decay.
        lr: first and last rate, along a cosine.
        weight_decay: of AdamW.
    """

    title: str
    dataset: str
    num_data: int | None
    prior_precision: float | None
    recorded: tuple[int, ...]
    network: str = "lenet5"
    batch: int = 50
    optimizer: str = "SGD"
    lr: tuple[float, float] = (0.05, 0.0)
    weight_decay: float = 0.01
    num_test: int | None = None

    def cut(self, epochs: int) -> Experiment:
        """The same, of the first epochs."""
        kept = tuple(epoch for epoch in self.recorded if epoch < epochs)
        return dataclasses.replace(self, recorded=(*kept, epochs))

    def optimizer_of(self, model: nn.Module, num_data: int) -> tuple[torch.optim.Optimizer, Any]:
        """The optimizer and its schedule."""
        if self.prior_precision is None:
            optimizer: Any = torch.optim.AdamW(model.parameters(), lr=self.lr[0], weight_decay=self.weight_decay)
        else:
            make: dict[str, Any] = {"SGD": torch.optim.SGD, "Adam": torch.optim.Adam}
            own = {"momentum": 0.9} if self.optimizer == "SGD" else {}
            decay = self.prior_precision / num_data
            optimizer = make[self.optimizer](model.parameters(), lr=self.lr[0], weight_decay=decay, **own)
        total = steps(num_data, self.recorded[-1], self.batch)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total, eta_min=self.lr[1])


FASHION = Experiment("10,000 of Fashion-MNIST, LeNet-5, SGD", "fashion-mnist", 10_000, 10.0, (1, 3, 10, 30))
ADAM = dataclasses.replace(FASHION, title="10,000 of Fashion-MNIST, LeNet-5, Adam", optimizer="Adam", lr=(1e-3, 0.0))
EXPERIMENTS = {
    "digits": Experiment(
        "digits, MLP 64-16-10, SGD", "digits", 1000, 0.1, (5, 20, 50, 100), network="mlp_64_16", lr=(0.1, 0.0)
    ),
    "fashion-mnist": FASHION,
    "fashion-mnist-overfit": dataclasses.replace(
        FASHION,
        title="5,000 of Fashion-MNIST, LeNet-5, SGD, overfitting",
        num_data=5_000,
        prior_precision=1.0,
        recorded=(1, 3, 10, 20, 40, 60),
    ),
    "fashion-mnist-adam": ADAM,
    "fashion-mnist-adamw": dataclasses.replace(
        ADAM, title="10,000 of Fashion-MNIST, LeNet-5, AdamW", optimizer="AdamW", prior_precision=None
    ),
    "fashion-mnist-published": dataclasses.replace(
        FASHION,
        title="Fashion-MNIST, LeNet-5, SGD",
        num_data=None,
        prior_precision=60.0,
        recorded=(1, 3, 5, 10, 20, 30, 50, 70, 100),
        batch=256,
        lr=(1e-2, 1e-4),
    ),
}
SMOKE = Experiment("100 of the digits", "digits", 100, 0.1, (1, 2), network="mlp_64_16", num_test=100)


def look(experiment: Experiment, training: Training, epoch: int, advance: Advance) -> None:
    """Add the losses of one epoch to what is recorded."""
    model, data = training.model, training.data
    curves, times = training.recorded["curves"], training.recorded["times"]
    note_losses(curves, epoch, model, data)
    num_data = len(data.y)
    time = vlearn.posterior.training_time(
        training.optimizer, steps(num_data, epoch, experiment.batch), training.schedule
    )
    times.append(time if isinstance(time, float) else sum(time.values()) / len(time))
    for label, structure in STRUCTURES.items():
        advance(f"{experiment.title}, epoch {epoch}: {label}")
        posterior = vlearn.posterior.fit(
            model,
            batches(data.x, data.y),
            F.cross_entropy,
            structure,
            prior_precision=training.optimizer if experiment.prior_precision is None else experiment.prior_precision,
            generator=torch.Generator(data.x.device).manual_seed(0),
            progress=False,
        )
        for ending, each in zip(ENDINGS, (posterior, posterior.stopped_at(time)), strict=True):
            curves.loo_loss.setdefault(f"{label}, {ending}", []).append(loo_loss(model, each, data))


def train(experiment: Experiment, data: Images, seed: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """The losses of one run, and its training times; it goes on from the last epoch that was saved."""
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    training = Training(
        model,
        *experiment.optimizer_of(model, len(data.y)),
        data,
        batch=experiment.batch,
        epochs=experiment.recorded[-1],
        seed=seed,
        checkpoint=Checkpoint(runs / f"seed{seed}.pt", {**dataclasses.asdict(experiment), "seed": seed}),
        recorded={"curves": Curves(), "times": []},
    )
    for epoch in training:
        if epoch in experiment.recorded:
            look(experiment, training, epoch, advance)
        advance(f"{experiment.title}, seed {seed}, epoch {epoch}/{training.epochs}")
    return training.recorded


def run_experiment(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """Run every seed of one experiment; the rows are those of the first."""
    recorded = [train(experiment, data, seed, runs, advance) for seed in range(seeds)]
    curves: list[Curves] = [each["curves"] for each in recorded]
    first = curves[0]
    rows = [
        {
            "epoch": epoch,
            "training time": recorded[0]["times"][i],
            "train": first.train_loss[i],
            "test": first.test_loss[i],
            **{method: loo[i] for method, loo in first.loo_loss.items()},
        }
        for i, epoch in enumerate(first.steps)
    ]
    table = {method: over_seeds([losses(each, method) for each in curves]) for method in first.loo_loss}
    return {"rows": rows, "table": table, "curves": [dataclasses.asdict(each) for each in curves]}


def draw(record: dict[str, Any]) -> Figure:
    """The first seed's curves."""
    figure = pictures.generalization({"": Curves(**record["curves"][0])})
    figure.axes[0].set_xlabel("epoch")
    figure.suptitle(record["experiment"]["title"], fontsize=12)
    return figure


def print_results(record: dict[str, Any]) -> None:
    """Print every epoch that was looked at, and the mean gap of each method."""
    rows, gaps = record["rows"], []
    for method, numbers in record["table"].items():
        mean, deviation = (numbers[what]["mean_absolute_gap"] for what in ("mean", "deviation"))
        gaps.append(f"{method}: mean gap {mean:.3f} ± {deviation:.3f} nats.")
    title = f"Leave-one-out against test loss: {record['experiment']['title']}"
    print_table(title, list(rows[0]), [[f"{value:.4g}" for value in row.values()] for row in rows], gaps)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = experiments.parser("stopped_training", __doc__, EXPERIMENTS, seeds=1).parse_args(argv)
    chosen = experiments.chosen(arguments, EXPERIMENTS, SMOKE)
    return experiments.run("stopped_training", arguments, chosen, run_experiment, draw, print_results)


if __name__ == "__main__":
    sys.exit(main())
