"""Predicted against true change when an example is removed: every estimate held against retraining without it.

    python -m benchmarks.retraining [--experiments NAME ...] [--seeds 1] [--retrained K] [--num-data N] [--smoke]

Digits, an MLP at the minimum of its loss: 500 examples, spread evenly over the estimated sensitivity, are left out in
turn and the network is retrained to convergence by L-BFGS in float64; beside the refined form of the full posterior
stands one Newton step with the loss's own Hessian. MNIST with an MLP and Fashion-MNIST with LeNet-5 (Nickl et al.,
2023, arXiv:2310.19273, Fig. 2): SGD trains, 100 examples are left out in turn and SGD trains on; the training run
with all examples goes on beside it over the same minibatches, and the truth is the difference of the two. By default
on the first 10,000 training images; `--published` takes all 60,000, 1,000 examples, and the paper's epochs and
learning rates, which are days on one core.

All methods are asked about the same network, on |Δp|₁, the change of the example's probabilities, and on the change of
its own loss. See Pearson's correlation and the slope of the truth over the prediction, which is 1 where the size is
right; rank correlation is near 1 for most of them, since any measure tells easy examples from hard ones. The tables are
sorted by Pearson's correlation: where a cheaper measure wins, it stands first.

Every retraining is saved under --runs as it ends; the same command goes on where it was interrupted.
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
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.problems.batches import batches
from benchmarks.problems.images import Images
from benchmarks.report import experiments, pictures
from benchmarks.report.agreement import agreement, with_intervals
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training import estimates
from benchmarks.training.checkpoint import Checkpoint
from benchmarks.training.estimates import Estimate, Held
from benchmarks.training.removal_cases import Case, Experiment, digits, images

RANKED_BY = "Laplace, Kronecker"  # the published estimate, whose quantiles the examples are
TARGETS = {"probabilities": "|Δp|₁", "own_loss": "increase of own loss, nats"}


DIGITS = Experiment(
    title="digits, MLP 64-16-10, δ = 1",
    dataset="digits",
    network="mlp_64_16",
    num_data=1000,
    prior_precision=1.0,
    epochs=300,
    batch=50,
    lr=(0.2, 0.0),
    held=300,
    hess_init=0.1,
    beta2=0.9995,
    retrained=500,
)
FASHION = Experiment(
    title="Fashion-MNIST, LeNet-5, δ = 100",
    dataset="fashion-mnist",
    network="lenet5",
    num_data=10_000,
    prior_precision=100.0,
    epochs=60,
    batch=256,
    lr=(1e-1, 1e-3),
    held=15,
    hess_init=0.1,
    beta2=0.995,
    retrained=100,
    retraining=(8, (3e-2, 1e-3)),
)
MNIST = dataclasses.replace(FASHION, title="MNIST, MLP 500-300, δ = 100", dataset="mnist", network="mlp_500_300")
EXPERIMENTS = {
    "digits": DIGITS,
    "digits-strong-prior": dataclasses.replace(DIGITS, title="digits, MLP 64-16-10, δ = 5", prior_precision=5.0),
    "mnist": MNIST,
    "fashion-mnist": FASHION,
}
PUBLISHED = {
    "mnist": dataclasses.replace(
        MNIST, num_data=None, epochs=500, lr=(1e-2, 1e-3), retrained=1000, retraining=(300, (1e-3, 1e-4))
    ),
    "fashion-mnist": dataclasses.replace(
        FASHION, num_data=None, epochs=300, retrained=1000, retraining=(200, (1e-3, 1e-4))
    ),
}
SMOKE = {
    "digits": dataclasses.replace(DIGITS, num_data=60, prior_precision=5.0, epochs=5, held=5, beta2=0.9, retrained=6),
    "digits-warm-start": dataclasses.replace(
        FASHION,
        title="digits, small CNN",
        dataset="digits",
        network="digits_cnn",
        num_data=100,
        prior_precision=5.0,
        epochs=5,
        batch=50,
        held=5,
        beta2=0.9,
        retrained=4,
        retraining=(3, (3e-2, 1e-3)),
    ),
}


def estimate(case: Case, experiment: Experiment, seed: int, checkpoint: Checkpoint, advance: Advance) -> dict[str, Any]:
    """Every method's estimates of all examples; each is saved when it is there."""
    loader = batches(case.x, case.y)
    held = Held(
        experiment.held,
        experiment.batch,
        experiment.prior_precision,
        experiment.hess_init,
        experiment.beta2,
        seed,
        case.training_time,
    )
    makers: dict[str, Callable[[], Estimate]] = {
        name: lambda make=make: estimates.by_posterior(case.model, make(), loader)
        for name, make in estimates.posteriors(case.model, case.x, case.y, held).items()
    }
    estimated = checkpoint.load() or {}
    for name, make in (makers | case.exact).items():
        if name not in estimated:
            estimated[name] = make()
            checkpoint.save(estimated)
            advance(f"{experiment.title}: estimated by {name}")
    if not any(each.score for each in estimated.values()):
        estimated |= estimates.scores(case.model, loader, case.snapshots, case.rates)
        checkpoint.save(estimated)
    return estimated


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """Examples at evenly spread quantiles of the values; fewer of them are the first of more (van der Corput)."""
    quantiles = [sum(int(bit) / 2 ** (k + 1) for k, bit in enumerate(f"{i:b}"[::-1])) for i in range(4 * count)]
    places = dict.fromkeys(int(quantile * len(values)) for quantile in quantiles)
    return np.argsort(-values, kind="stable")[list(places)[:count]]


def retrain(
    case: Case, experiment: Experiment, examples: Tensor, checkpoint: Checkpoint, advance: Advance
) -> dict[str, Any]:
    """Outputs of all after retraining with all, "kept", and of each without it, "removed"; saved one by one."""
    outputs = checkpoint.load()
    if outputs is None:
        outputs = {"kept": case.kept(), "removed": {}, "unconverged": 0}
        checkpoint.save(outputs)
    missing = [example for example in examples.tolist() if example not in outputs["removed"]]
    for example, (output, converged) in zip(missing, case.removed(torch.tensor(missing)), strict=True):
        outputs["removed"][example] = output
        outputs["unconverged"] += not converged
        checkpoint.save(outputs)
        advance(f"{experiment.title}: retrained without {len(outputs['removed'])} of {len(examples)}")
    return outputs


def truths(outputs: dict[str, Any], examples: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """True changes ``[E, K]`` after each epoch of retraining, and own losses ``[K]`` at the end, with and without."""
    kept = outputs["kept"][:, examples].double()
    removed = torch.stack([outputs["removed"][example] for example in examples.tolist()], 1).double()
    labels = y.cpu()[examples].expand(len(kept), -1)
    losses = [F.cross_entropy(each.flatten(0, 1), labels.flatten(), reduction="none") for each in (kept, removed)]
    before, after = (each.view(labels.shape).numpy() for each in losses)
    return {
        "probabilities": (removed.softmax(2) - kept.softmax(2)).abs().sum(2).numpy(),
        "own_loss": after - before,
        "before": before[-1],
        "after": after[-1],
        "moved_anyway": (kept.softmax(2) - kept[:1].softmax(2)).abs().sum(2).numpy(),
    }


def compare(estimated: dict[str, Estimate], truth: dict[str, np.ndarray], examples: np.ndarray) -> dict[str, Any]:
    """Correlations, slopes and their intervals, by target and method, the highest correlation first."""
    table: dict[str, Any] = {}
    for target in TARGETS:
        rows = {}
        for method, each in estimated.items():
            predicted, true = getattr(each, target)[examples], truth[target][-1]
            row: dict[str, Any] = with_intervals(predicted, true)
            if each.score:
                del row["slope"]
            else:
                row["mean_over_true_mean"] = float(predicted.mean() / true.mean())
                if target == "own_loss":
                    row["loo_loss"] = float((truth["before"] + predicted).mean())
            rows[method] = row
        table[target] = dict(sorted(rows.items(), key=lambda row: -row[1]["pearson"][0]))
    return table


def run_experiment(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """Run every seed; the table is that of the first one."""
    by_seed = [run_seed(experiment, data, seed, runs, advance) for seed in range(seeds)]
    return {"table": by_seed[0]["table"], "seeds": by_seed}


def run_seed(experiment: Experiment, data: Images, seed: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """Train, estimate, retrain, compare."""
    if experiment.retraining is None:
        case = digits(experiment, seed)
    else:
        case = images(experiment, data, seed, runs, advance)
    settings = {**dataclasses.asdict(experiment), "seed": seed}
    del settings["retrained"]  # more examples may be asked for later
    checkpoints = [Checkpoint(runs / f"{what}-seed{seed}.pt", settings) for what in ("estimates", "removals")]
    estimated = estimate(case, experiment, seed, checkpoints[0], advance)
    examples = spread(estimated[RANKED_BY].probabilities, experiment.retrained)
    chosen = torch.from_numpy(examples)
    outputs = retrain(case, experiment, chosen, checkpoints[1], advance)
    truth = truths(outputs, chosen, case.y)
    return {
        "seed": seed,
        **case.numbers,
        "unconverged": outputs["unconverged"],
        "loo_loss_retrained": truth["after"].mean(),
        "by_epoch": {
            "true_probabilities": truth["probabilities"].mean(1),
            "true_own_loss": truth["own_loss"].mean(1),
            "pearson_with_the_end": [agreement(each, truth["own_loss"][-1])[0] for each in truth["own_loss"]],
            "control_moved": truth["moved_anyway"].mean(1),
        },
        "table": compare(estimated, truth, examples),
        "examples": examples,
        "retrained": {target: truth[target][-1] for target in TARGETS},
        "predicted": {
            method: {target: getattr(each, target)[examples] for target in TARGETS}
            for method, each in estimated.items()
        },
        "scores": [method for method, each in estimated.items() if each.score],
    }


def draw(record: dict[str, Any]) -> dict[str, Figure]:
    """The first seed's figures, with one panel for each method in the table's order."""
    first, figures = record["seeds"][0], {}
    for target, quantity in TARGETS.items():
        methods = list(first["table"][target])
        truth = dict.fromkeys(methods, first["retrained"][target])
        predicted = {method: first["predicted"][method][target] for method in methods}
        figures[target.replace("_", "-")] = pictures.retraining(predicted, truth, quantity, first["scores"])
    return figures


def print_results(record: dict[str, Any]) -> None:
    """Print the tables of every seed."""
    for run in record["seeds"]:
        print_seed(record["experiment"]["title"], run)


def print_seed(title: str, run: dict[str, Any]) -> None:
    """Print the table of each target, and whether the truth has settled."""
    notes = [f"In brackets 95% bootstrap intervals over the examples. Test accuracy {run['test_accuracy']:.2%}."]
    if run["unconverged"]:
        notes.append(f"{run['unconverged']} of the retrainings stopped before they converged.")
    changes = run["by_epoch"]["true_own_loss"]
    if len(changes) > 1:
        half = (len(changes) - 1) // 2
        notes.append(
            f"Is the truth settled? After {half + 1} of {len(changes)} epochs of retraining the mean change of the own "
            f"loss is {changes[half] / changes[-1]:.0%} of that at the end, with a Pearson correlation of "
            f"{run['by_epoch']['pearson_with_the_end'][half]:.3f} between the two."
        )
    notes.append(f"LOO: mean loss of these examples without them; {run['loo_loss_retrained']:.4f} after retraining.")
    for target, quantity in TARGETS.items():
        header, lines = ["", "Pearson", "slope", "Spearman", "predicted\n/ true"], []
        header += ["LOO"] * (target == "own_loss")
        for method, row in run["table"][target].items():
            means = [f"{row['mean_over_true_mean']:.2f}" if "slope" in row else "-"]
            if target == "own_loss":
                means.append(f"{row['loo_loss']:.4f}" if "slope" in row else "-")
            cells = [_shown(row.get(name), digits) for name, digits in (("pearson", 3), ("slope", 2), ("spearman", 3))]
            lines.append((method, *cells, *means))
        about = f"{title}: predicted against true {quantity}, {len(run['examples'])} examples"
        print_table(about, header, lines, notes if target == "own_loss" else ())


def _shown(numbers: list[float] | None, digits: int) -> str:
    if numbers is None:
        return "-"
    value, low, high = (f"{number:.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options."""
    parser = experiments.parser("retraining", __doc__, EXPERIMENTS, seeds=1)
    parser.add_argument("--retrained", type=int, help="how many examples are left out in turn")
    parser.add_argument("--retraining-epochs", type=int, help="of SGD without an example")
    parser.add_argument("--published", action="store_true", help="all images, 1,000 examples, the paper's schedules")
    return parser.parse_args(argv)


def chosen(arguments: argparse.Namespace) -> dict[str, Experiment]:
    """The experiments with the changes that were asked for."""
    asked = experiments.chosen(arguments, EXPERIMENTS | (PUBLISHED if arguments.published else {}), SMOKE)
    if arguments.retrained is not None:
        asked = {name: dataclasses.replace(each, retrained=arguments.retrained) for name, each in asked.items()}
    if arguments.retraining_epochs is not None:
        for name, each in asked.items():
            if each.retraining is not None:
                changed = (arguments.retraining_epochs, each.retraining[1])
                asked[name] = dataclasses.replace(each, retraining=changed)
    return asked


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = parse(argv)
    return experiments.run("retraining", arguments, chosen(arguments), run_experiment, draw, print_results)


if __name__ == "__main__":
    sys.exit(main())
