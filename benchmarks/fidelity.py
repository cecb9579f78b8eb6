"""What each structure of Σ buys: predicted against retrained removals, at a minimum of a small network's loss.

    python -m benchmarks.fidelity [--seed 0] [--out FILE]

Digits, 1,000 training examples, MLP 64-16-10. IVON trains it; L-BFGS in float64 goes on to the minimum; there every Σ
is the inverse of a Gauss-Newton matrix of the same loss, whole or cut down to a structure, and predicts what removing
each example would do to its own loss. 80 examples are retrained without.

Rank correlations are no measure: they are above .97 for all of these. See the mean leave-one-out loss against the test
loss, Pearson's correlation with retraining and the slope of the truth over the prediction, which is 1 where the size
is right. The refined form needs the exact Σ: with any other it exaggerates.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.problems.digits import Digits, Settings
from benchmarks.reference import laplace
from benchmarks.reference.gauss_newton import gauss_newton, layers_of
from benchmarks.reference.kronecker_factors import ekfac_of, kfac_of
from benchmarks.report import tracking
from benchmarks.report.agreement import agreement
from benchmarks.report.provenance import cores, provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import Advance, print_table, progress
from benchmarks.training.digits import sweep
from benchmarks.training.digits_minimum import PRIOR_PRECISIONS, minimum_of, moved_to
from benchmarks.training.estimates import change, evenly_ranked
from vlearn.gaussians.protocol import Posterior
from vlearn.posterior import Diagonal, Full, Kronecker, ProductPosterior, from_laplace

SETTINGS = Settings(epochs=300, hess_init=0.1, beta2=0.9995, retrained=80)
BY_LAPLACE = "K-FAC of laplace-torch"
STRUCTURES = ("full", "block-diagonal by layer", "EK-FAC", "K-FAC", BY_LAPLACE, "diagonal", "IVON's state")


def posteriors(model: nn.Module, data: Digits, prior_precision: float, ivon: Diagonal) -> dict[str, Posterior]:
    """The posterior of every structure at the weights of a float64 model."""
    mean = {name: p.detach() for name, p in model.named_parameters()}
    num_data = len(data.y)
    layers = layers_of(model, data.x.double())
    whole = gauss_newton(layers) + prior_precision * torch.eye(sum(p.numel() for p in mean.values())).double()
    sizes = [sum(mean[name].numel() for name in layer.names) for layer in layers]
    decay, ess = dict.fromkeys(mean, prior_precision / num_data), dict.fromkeys(mean, float(num_data))
    by_layer, start = [], 0
    for layer, size in zip(layers, sizes, strict=True):
        block = slice(start, start + size)
        by_layer.append(Full({name: mean[name] for name in layer.names}, whole[block, block], num_data))
        start += size
    entries = whole.diagonal().split([p.numel() for p in mean.values()])
    diagonal = {name: part.reshape(p.shape) for (name, p), part in zip(mean.items(), entries, strict=True)}
    la = laplace.fit(model, data.x.double(), data.y, "kron", prior_precision)
    by_structure = {
        "full": Full(mean, whole, num_data),
        "block-diagonal by layer": ProductPosterior(by_layer),
        "EK-FAC": Kronecker(mean, ekfac_of(layers), decay, ess, num_data),
        "K-FAC": Kronecker(mean, kfac_of(layers), decay, ess, num_data),
        BY_LAPLACE: from_laplace(la),
        "diagonal": Diagonal.from_precision(mean, diagonal, num_data, prior_precision),
        "IVON's state": moved_to(model, ivon),
    }
    return {name: by_structure[name] for name in STRUCTURES}


def compare(settings: Settings, data: Digits, say: Advance = lambda text: None) -> dict[str, Any]:
    """Train, go to the minimum, predict with every structure, retrain."""
    problem, minimum, model, ivon = minimum_of(settings, data)
    say(f"δ = {settings.prior_precision:g}: trained")
    with torch.no_grad():
        train_loss = F.cross_entropy(model(data.x.double()), data.y).item()
        test_loss = F.cross_entropy(model(data.x_test.double()), data.y_test).item()
    tables, refined = {}, {}
    for name, posterior in posteriors(model, data, settings.prior_precision, ivon).items():
        tables[name] = sweep(model, posterior, data, leverage=None)
        refined[name] = sweep(model, posterior, data, leverage=None, refined=True)
    examples = evenly_ranked(tables["full"].self_influence.numpy(), settings.retrained)
    truth, unconverged = [], int(not minimum.converged)
    for increase, converged in problem.own_loss_changes(examples.tolist(), minimum, cores()):
        truth.append(increase)
        unconverged += not converged
        say(f"δ = {settings.prior_precision:g}: {len(truth)} of {len(examples)} retrained")
    rows = {}
    for name in STRUCTURES:
        pearson, slope = agreement(change(tables[name])[examples], np.array(truth))
        refined_pearson, refined_slope = agreement(change(refined[name])[examples], np.array(truth))
        rows[name] = {
            "loo_loss": tables[name].loo_loss.mean().item(),
            "pearson": pearson,
            "slope": slope,
            "refined_loo_loss": refined[name].loo_loss.mean().item(),
            "refined_pearson": refined_pearson,
            "refined_slope": refined_slope,
            "refined_fallbacks": refined[name].num_first_order,
        }
    return {
        "prior_precision": settings.prior_precision,
        "train_loss": train_loss,
        "test_loss": test_loss,
        "unconverged": unconverged,
        "structures": rows,
        "examples": examples,
        "retrained_change": truth,
        "predicted_change": {name: change(table)[examples] for name, table in tables.items()},
    }


def print_results(results: list[dict[str, Any]]) -> None:
    """Print one table for each prior precision."""
    for result in results:
        rows = [
            (
                name,
                f"{row['loo_loss']:.3f}",
                f"{row['pearson']:.3f}",
                f"{row['slope']:.2f}",
                f"{row['refined_loo_loss']:.3f}",
                f"{row['refined_pearson']:.3f}",
                f"{row['refined_slope']:.2f}",
                str(row["refined_fallbacks"]),
            )
            for name, row in result["structures"].items()
        ]
        title = (
            f"δ = {result['prior_precision']:g}: train {result['train_loss']:.3f}, test {result['test_loss']:.3f}; "
            "mean leave-one-out loss, and agreement with retraining"
        )
        header = ("Σ", "LOO", "Pearson", "slope", "refined: LOO", "Pearson", "slope", "fell back")
        print_table(title, header, rows)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "fidelity.json", help="the file of the numbers")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)  # the tensors are small; retraining runs one network to a core
    settings = dataclasses.replace(SETTINGS, seed=arguments.seed)
    data = Digits.load(settings, standardised=False)
    try:
        with progress() as say:
            results = [
                compare(dataclasses.replace(settings, prior_precision=delta), data, say) for delta in PRIOR_PRECISIONS
            ]
    except KeyboardInterrupt:
        return 130
    command = f"python -m benchmarks.fidelity --seed {arguments.seed}"
    write_json(arguments.out, {**provenance(command, arguments.seed), "results": results})
    print_results(results)
    table = {f"δ = {each['prior_precision']:g}": each["structures"] for each in results}
    print(tracking.log_results("fidelity", dataclasses.asdict(settings), table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
