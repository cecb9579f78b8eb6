"""What KFACVON's own state says of removals, after training from scratch at its defaults.

    python -m benchmarks.fidelity_trained [--seed 0] [--out FILE]

The digits and the network of `benchmarks.fidelity`, but Σ is the optimizer's own. Residuals and Jacobians are those at
its mean, where the mean leave-one-out loss is to predict the test loss, and those at the minimum that L-BFGS in float64
reaches from there, where 80 removals are retrained; see the slope of the truth over the prediction. The mean is not
that minimum: it fits the training examples better the longer it is trained, since they are fitted under noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from benchmarks import fidelity, report
from benchmarks.agreement import agreement
from benchmarks.digits import change
from benchmarks.removals import Retraining
from benchmarks.training import Digits, Settings

RESULTS = Path(__file__).parent / "results" / "fidelity_trained.json"
SETTINGS = Settings(lr=0.01, retrained=80)  # 100 epochs
METHODS = {"K-FAC": False, "EK-FAC": True}
PLACES = ("mean", "minimum")
EPOCHS = (100, 300)


def train(settings: Settings, data: Digits, eigenvalue_correction: bool) -> tuple[nn.Module, vlearn.KFACVON]:
    """The network at KFACVON's mean, after training at its defaults with a cosine schedule."""
    torch.manual_seed(settings.seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    optimizer = vlearn.KFACVON(
        model,
        lr=settings.lr,
        ess=settings.num_data,
        weight_decay=settings.weight_decay,
        eigenvalue_correction=eigenvalue_correction,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for minibatches in data.minibatches(settings):
        for index in minibatches:
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[index]), data.y[index]).backward()
            optimizer.step()
            schedule.step()
    optimizer.unwatch()
    return model, optimizer


def compare(
    settings: Settings, data: Digits, method: str, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Train, predict every removal from the state, retrain some."""
    model, optimizer = train(settings, data, METHODS[method])
    problem = Retraining(model, data.x, data.y, settings.prior_precision)
    minimum = problem.from_weights_of(model)
    tables, losses = {}, {}
    for where in PLACES:
        if where == "minimum":
            nn.utils.vector_to_parameters(minimum.weights.float(), model.parameters())
        table = vlearn.sweep(model, optimizer.posterior(), [(data.x, data.y)], F.cross_entropy, None, progress=False)
        tables[where] = table
        with torch.no_grad():
            losses[where] = F.cross_entropy(model(data.x_test), data.y_test).item()
    ranks = np.argsort(tables["minimum"].self_influence.numpy(), kind="stable")
    examples = ranks[np.linspace(0, settings.num_data - 1, settings.retrained).round().astype(int)]
    truth, unconverged = [], int(not minimum.converged)
    for example, refit in zip(examples, problem.without(examples, minimum, report.cores()), strict=True):
        truth.append(problem.loss(refit, example) - problem.loss(minimum, example))
        unconverged += not refit.converged
        say(f"{method}, δ = {settings.prior_precision:g}: {len(truth)} of {len(examples)} retrained")
    rows = {}
    for where, table in tables.items():
        pearson, slope = agreement(change(table)[examples], np.array(truth))
        rows[where] = {
            "train_loss": table.loss.mean().item(),
            "test_loss": losses[where],
            "loo_loss": table.loo_loss.mean().item(),
            "pearson": pearson,
            "slope": slope,
        }
    return {
        "method": method,
        "prior_precision": settings.prior_precision,
        "epochs": settings.epochs,
        **rows,
        "unconverged": unconverged,
        "examples": examples,
        "retrained_change": truth,
        "predicted_change": {where: change(table)[examples] for where, table in tables.items()},
    }


def print_results(results: list[dict[str, Any]]) -> None:
    numbers = ("train_loss", "test_loss", "loo_loss", "pearson", "slope")
    rows = [
        (
            f"{row['method']}, {row['epochs']} epochs, δ = {row['prior_precision']:g}, at the {where}",
            *(f"{row[where][number]:.3f}" for number in numbers),
        )
        for row in results
        for where in PLACES
    ]
    report.print_table("KFACVON trained from scratch", ("", "train", "test", "LOO", "Pearson", "slope"), rows)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="numbers; default results/fidelity_trained.json")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are small; retraining runs one network to a core
    settings = dataclasses.replace(SETTINGS, seed=arguments.seed)
    data = Digits.load(settings, standardised=False)
    try:
        with report.progress() as say:
            results = [
                compare(dataclasses.replace(settings, epochs=epochs, prior_precision=delta), data, method, say)
                for epochs in EPOCHS
                for method in METHODS
                for delta in fidelity.PRIOR_PRECISIONS
            ]
    except KeyboardInterrupt:
        return 130
    command = f"python -m benchmarks.fidelity_trained --seed {arguments.seed}"
    report.write_json(arguments.out, {**report.provenance(command, arguments.seed), "results": results})
    print_results(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
