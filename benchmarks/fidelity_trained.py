"""What an optimizer's own state says of removals, after training from scratch.

    python -m benchmarks.fidelity_trained [--seeds 3] [--out FILE]

The digits and the network of `benchmarks.fidelity`, but Σ is the optimizer's own. Residuals and Jacobians are those at
its mean, where the mean leave-one-out loss is to predict the test loss, and those at the minimum that L-BFGS in float64
reaches from there, where 80 removals are retrained; see Pearson's correlation with them, and the slope of the truth
over the prediction. The mean is not that minimum: it fits the training examples better the longer it is trained, since
they are fitted under noise. Beside it stands the same structure made from the minimum itself, which bounds what the
state can say there: the diagonal of the Gauss-Newton matrix, its K-FAC, or its EK-FAC, which has the best diagonal that
a Kronecker basis can have.

KFACVON and EVON have their defaults. IVON, whose default `beta2` keeps hess_init for 100,000 steps, has the settings of
`benchmarks.digits`.
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
from benchmarks.problems.digits import Digits, Settings
from benchmarks.problems.networks import mlp
from benchmarks.reference.gauss_newton import gauss_newton, layers_of
from benchmarks.reference.kronecker_factors import ekfac_of, kfac_of
from benchmarks.reference.removals import Retraining
from benchmarks.report import tracking
from benchmarks.report.agreement import agreement
from benchmarks.report.provenance import cores, provenance
from benchmarks.report.records import RESULTS, over_seeds, write_json
from benchmarks.report.terminal import Advance, print_table, progress
from benchmarks.training.digits import epochs, sweep
from benchmarks.training.digits_minimum import PRIOR_PRECISIONS
from benchmarks.training.estimates import change, evenly_ranked
from vlearn.posterior import Diagonal, Kronecker
from vlearn.sensitivity.table import SensitivityTable

SETTINGS = Settings(retrained=80)  # 100 epochs


@dataclasses.dataclass(frozen=True)
class Method:
    """One optimizer.

    Attributes:
        make: (model, and what all have) -> optimizer.
        structure: of Σ at the minimum.
    """

    make: Callable[..., Any]
    structure: str


METHODS = {
    "IVON": Method(
        lambda model, **shared: vlearn.IVON(model, lr=0.2, hess_init=0.1, beta2=0.9995, **shared), "diagonal"
    ),
    "EVON": Method(lambda model, **shared: vlearn.EVON(model, lr=2.0, **shared), "EK-FAC"),
    "K-FAC": Method(lambda model, **shared: vlearn.KFACVON(model, lr=0.01, **shared), "K-FAC"),
    "EK-FAC": Method(
        lambda model, **shared: vlearn.KFACVON(model, lr=0.01, eigenvalue_correction=True, **shared), "EK-FAC"
    ),
}
BOUND = "minimum, Σ made there"
PLACES = ("mean", "minimum", BOUND)
EPOCHS = (100, 300)
NUMBERS = ("train_loss", "test_loss", "loo_loss", "pearson", "slope")


def train(settings: Settings, data: Digits, method: str) -> tuple[nn.Module, Any]:
    """The network at the optimizer's mean, after training with a cosine schedule."""
    torch.manual_seed(settings.seed)
    model = mlp(64, 16, 10)
    optimizer = METHODS[method].make(
        model,
        ess=settings.num_data,
        weight_decay=settings.weight_decay,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    for _ in epochs(model, optimizer, settings, data):
        pass
    optimizer.unwatch()
    return model, optimizer


def compare(settings: Settings, data: Digits, method: str, say: Advance = lambda text: None) -> dict[str, Any]:
    """Train, predict every removal from the state, retrain some."""
    model, optimizer = train(settings, data, method)
    problem = Retraining(model, data.x, data.y, settings.prior_precision)
    minimum = problem.from_weights_of(model)
    tables, losses = {}, {}
    for where in PLACES[:2]:
        if where == "minimum":
            nn.utils.vector_to_parameters(minimum.weights.float(), model.parameters())
        table = vlearn.sweep(model, optimizer.posterior(), [(data.x, data.y)], F.cross_entropy, None, progress=False)
        tables[where] = table
        with torch.no_grad():
            losses[where] = F.cross_entropy(model(data.x_test), data.y_test).item()
    tables[BOUND] = sweep_of_structure(problem.model_at(minimum), data, settings, method)
    losses[BOUND] = losses["minimum"]
    examples = evenly_ranked(tables["minimum"].self_influence.numpy(), settings.retrained)
    truth, unconverged = [], int(not minimum.converged)
    for increase, converged in problem.own_loss_changes(examples.tolist(), minimum, cores()):
        truth.append(increase)
        unconverged += not converged
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
        "seed": settings.seed,
        "method": method,
        "prior_precision": settings.prior_precision,
        "epochs": settings.epochs,
        **rows,
        "unconverged": unconverged,
        "examples": examples,
        "retrained_change": truth,
        "predicted_change": {where: change(table)[examples] for where, table in tables.items()},
    }


def sweep_of_structure(model: nn.Module, data: Digits, settings: Settings, method: str) -> SensitivityTable:
    """All examples by the structure of the float64 model's own Gauss-Newton matrix."""
    layers, structure = layers_of(model, data.x.double()), METHODS[method].structure
    mean = {name: p.detach() for name, p in model.named_parameters()}
    if structure == "diagonal":
        entries = (
            gauss_newton(layers).diagonal().add(settings.prior_precision).split([p.numel() for p in mean.values()])
        )
        precision = {name: part.reshape(p.shape) for (name, p), part in zip(mean.items(), entries, strict=True)}
        posterior = Diagonal.from_precision(mean, precision, settings.num_data, settings.prior_precision)
        return sweep(model, posterior, data, leverage=None)
    factors = ekfac_of(layers) if structure == "EK-FAC" else kfac_of(layers)
    decay, ess = dict.fromkeys(mean, settings.weight_decay), dict.fromkeys(mean, float(settings.num_data))
    return sweep(model, Kronecker(mean, factors, decay, ess, settings.num_data), data, leverage=None)


def table_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds of each method's numbers, at each place."""
    groups: dict[str, list[dict[str, float]]] = {}
    for r in results:
        for where in PLACES:
            title = f"{r['method']}, {r['epochs']} epochs, δ = {r['prior_precision']:g}, {where}"
            groups.setdefault(title, []).append(r[where])
    return {title: over_seeds(rows) for title, rows in groups.items()}


def print_results(table: dict[str, Any]) -> None:
    """Print the means and deviations over the seeds."""
    rows = [
        (
            title,
            *(f"{row['mean'][name]:.3f}" for name in NUMBERS[:2]),
            *(f"{row['mean'][name]:.3f}±{row['deviation'][name]:.3f}" for name in NUMBERS[2:]),
        )
        for title, row in table.items()
    ]
    print_table("Trained from scratch", ("", "train", "test", "LOO", "Pearson", "slope"), rows)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many; each trains and retrains anew")
    parser.add_argument("--out", type=Path, default=RESULTS / "fidelity_trained.json", help="the file of the numbers")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are small; retraining runs one network to a core
    data = Digits.load(SETTINGS, standardised=False)
    try:
        with progress() as say:
            results = [
                compare(
                    dataclasses.replace(SETTINGS, seed=seed, epochs=number, prior_precision=delta), data, method, say
                )
                for seed in range(arguments.seeds)
                for number in EPOCHS
                for method in METHODS
                for delta in PRIOR_PRECISIONS
            ]
    except KeyboardInterrupt:
        return 130
    command = f"python -m benchmarks.fidelity_trained --seeds {arguments.seeds}"
    table = table_of(results)
    write_json(arguments.out, {**provenance(command, 0), "table": table, "results": results})
    print_results(table)
    print(tracking.log_results("fidelity_trained", dataclasses.asdict(SETTINGS), table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
