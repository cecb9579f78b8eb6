"""Leave-one-out loss and test loss of networks that SGD has trained for a while, with and without their training time.

    python -m benchmarks.stopped_training [--experiments digits fashion-mnist fashion-mnist-overfit] [--smoke]

SGD with momentum .9 and a cosine along the whole run. At some epochs, K-FAC and EK-FAC fits (`vlearn.posterior.fit`,
the Gauss-Newton matrix by one probe) at the prior precision of the training, taken as a network that was trained to the
end and with the training time η of SGD so far (`posterior.stopped_at`). Mean losses in nats; the test loss is that of
examples that nothing else has seen.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from benchmarks.problems.images import Images, load
from benchmarks.problems.networks import lenet5, mlp
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import Advance, print_table, progress

STRUCTURES = {"K-FAC": "kronecker", "EK-FAC": "eigenvalue-corrected"}
Row = dict[str, float]


@dataclass(frozen=True)
class Experiment:
    """A network, its data, and when it is looked at."""

    dataset: str
    num_data: int
    prior_precision: float
    epochs: tuple[int, ...]
    batch: int = 50
    lr: float = 0.05

    def network(self) -> nn.Sequential:
        torch.manual_seed(0)
        return mlp(64, 16, 10) if self.dataset == "digits" else lenet5()


EXPERIMENTS = {
    "digits": Experiment("digits", 1000, 0.1, (5, 20, 50, 100), lr=0.1),
    "fashion-mnist": Experiment("fashion-mnist", 10_000, 10.0, (1, 3, 10, 30)),
    "fashion-mnist-overfit": Experiment("fashion-mnist", 5_000, 1.0, (1, 3, 10, 20, 40, 60)),
}


def training(experiment: Experiment, data: Images) -> Iterator[tuple[int, nn.Module, float]]:
    """(Epoch, the network, its training time) at each epoch that is looked at."""
    model, steps = experiment.network(), -(-experiment.num_data // experiment.batch)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=experiment.lr,
        momentum=0.9,
        weight_decay=experiment.prior_precision / experiment.num_data,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, experiment.epochs[-1] * steps)
    order = torch.Generator().manual_seed(0)
    for epoch in range(1, experiment.epochs[-1] + 1):
        for index in torch.randperm(experiment.num_data, generator=order).split(experiment.batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[index]), data.y[index]).backward()
            optimizer.step()
            schedule.step()
        if epoch in experiment.epochs:
            yield epoch, model, vlearn.posterior.training_time(optimizer, epoch * steps, schedule)


def mean_loss(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """In eval mode, in nats."""
    model.eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(a), b, reduction="sum") for a, b in zip(x.split(500), y.split(500), strict=True)
        ]
    model.train()
    return float(sum(losses)) / len(y)


def looked_at(experiment: Experiment, data: Images, said: Advance) -> list[Row]:
    """A row for each epoch that is looked at."""
    batches = list(zip(data.x.split(250), data.y.split(250), strict=True))
    rows: list[Row] = []
    for epoch, model, time in training(experiment, data):
        row: Row = {"epoch": epoch, "training time": time}
        row["train"] = mean_loss(model, data.x, data.y)
        row["test"] = mean_loss(model, data.x_test, data.y_test)
        for label, structure in STRUCTURES.items():
            said(f"{experiment.dataset}, epoch {epoch}: {label}")
            posterior = vlearn.posterior.fit(
                model,
                batches,
                F.cross_entropy,
                structure,
                prior_precision=experiment.prior_precision,
                generator=torch.Generator().manual_seed(0),
                progress=False,
            )
            for ending, each in (("to the end", posterior), ("stopped", posterior.stopped_at(time))):
                table = vlearn.sweep(model, each, batches, F.cross_entropy, leverage=None, progress=False)
                row[f"{label}, {ending}"] = float(table.loo_loss.double().mean())
        rows.append(row)
    return rows


def of(name: str, smoke: bool) -> tuple[Experiment, Images]:
    """An experiment and its data."""
    experiment = EXPERIMENTS[name]
    if smoke:
        experiment = replace(experiment, num_data=100, epochs=(1, 2))
    return experiment, load(experiment.dataset).first(experiment.num_data)


def main(argv: list[str] | None = None, folder: Path = RESULTS) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=["digits"])
    parser.add_argument("--smoke", action="store_true", help="two epochs of 100 examples; nothing is written")
    arguments = parser.parse_args(argv)
    for name in arguments.experiments:
        experiment, data = of(name, arguments.smoke)
        with progress() as said:
            rows = looked_at(experiment, data, said)
        print_table(name, list(rows[0]), [[f"{value:.4g}" for value in row.values()] for row in rows])
        if not arguments.smoke:
            command = f"python -m benchmarks.stopped_training --experiments {name}"
            content: dict[str, Any] = {**provenance(command, 0), "experiment": vars(experiment), "rows": rows}
            write_json(folder / "stopped_training" / f"{name}.json", content)


if __name__ == "__main__":
    main()
