"""Which optimizer of the family to pick: how well each predicts, knows what it does not know, and what a step costs.

    python -m benchmarks.family [--experiments NAME ...] [--seeds 3] [--epochs E] [--device cpu] [--smoke]
    python -m benchmarks.family --figures    # predictive of a 1-D regression, posterior of a 2-D logistic regression
    python -m benchmarks.family --cost       # time and memory of a step; wants a machine that does nothing else

Every method trains the same network with the same prior, minibatches and number of epochs, its rate falling to zero
along a cosine. The rate is the best of three (up to five, where that is at an end), by the loss of its prediction on a
held-out fifth of the training data with one seed; then it trains on all of it. Laplace approximations are
laplace-torch's at SGD's weights; they predict through the linearised model, as they are meant to. AdamW's row reads its
second moments as a posterior.

"fashion-mnist-5k", on 5,000 images, takes about 20 minutes on one core; "fashion-mnist" some hours, or --device cuda.
Every trained model's numbers are kept under --runs; the same command goes on with the first that is not there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from benchmarks.family import cost, logistic_posterior, regression_predictive
from benchmarks.family import pictures as family_pictures
from benchmarks.family.comparison import DEFAULT, EXPERIMENTS, SMOKE, Experiment, Row, run_experiment
from benchmarks.family.methods import METHODS
from benchmarks.report import pictures, tracking
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import Advance, print_table, progress
from benchmarks.training.checkpoint import kept


def print_results(record: dict[str, Any]) -> None:
    """Print the row of every method, and the learning rates."""
    header = ("", "accuracy\nmean", "\ndraws", "NLL\nmean", "\ndraws", "ECE\nmean", "\ndraws", "LOO", "LOO - test")

    def cell(numbers: dict[str, Row], quantity: str, form: str, spread: bool = False) -> str:
        if quantity not in numbers["mean"]:
            return ""
        said = format(numbers["mean"][quantity], form)
        return f"{said} ± {numbers['deviation'][quantity]:.3f}" if spread else said

    lines = [
        (
            name,
            *(cell(numbers, quantity, ".1%") for quantity in ("accuracy", "accuracy_by_draws")),
            *(cell(numbers, quantity, ".3f", spread=True) for quantity in ("nll", "nll_by_draws")),
            *(cell(numbers, quantity, ".1%") for quantity in ("ece", "ece_by_draws")),
            cell(numbers, "loo_loss", ".3f"),
            cell(numbers, "loo_gap", "+.3f", spread=True),
        )
        for name, numbers in record["table"].items()
    ]
    rates = ", ".join(f"{method} {each['chosen']:.2g}" for method, each in record["learning_rates"].items())
    notes = [
        f"Means ± standard deviations over {len(next(iter(record['seeds'].values())))} seeds; NLL and leave-one-out "
        "loss (of the training data alone, at the mean) in nats.",
        f"Learning rates: {rates}. hess_init keeps a weight of "
        f"{record['remaining_weight_of_hess_init']:.2f} where it is not said otherwise.",
    ]
    print_table(f"The family: {record['experiment']['title']}", header, lines, notes)


def print_figures(record: dict[str, Any]) -> None:
    """Print the distances of both small problems."""
    lines = [
        (name, *(f"{row[quantity]:.2f}" for quantity in ("mean_off_at_data", "width_at_data", "width_between")))
        for name, row in record["regression"].items()
    ]
    header = ("", "mean off\nat data, sd", "width\nat data", "width\nbetween")
    note = "Against Hamiltonian Monte Carlo; widths as multiples of its own. "
    note += f"Largest split R-hat {record['chains']['largest_split_r_hat']:.3f}."
    print_table("Predictive of a regression in one dimension", header, lines, [note])
    lines = [
        (name, f"{row['from_truth']:.4f}", f"{row['from_nearest']:.4f}") for name, row in record["logistic"].items()
    ]
    header = ("", "KL to the\ntrue density", "KL to the\nnearest Gaussian")
    print_table("Posterior of a logistic regression with two weights, nats", header, lines)


def run_figures(out: Path, runs: Path, smoke: bool, advance: Advance) -> dict[str, Any]:
    """Run both small problems, draw them, and return the numbers of figures.json."""
    few = {"steps": 20, "chains": 2, "warm_up": 4, "kept": 8} if smoke else {}
    asked = {**few, "methods": list(METHODS)}
    regression = kept(runs / "regression.pt", asked, lambda: regression_predictive.compare(**few, advance=advance))
    steps = {"steps": few["steps"]} if smoke else {}
    logistic = kept(runs / "logistic.pt", asked, lambda: logistic_posterior.compare(**steps, advance=advance))
    pictures.save(family_pictures.bands(regression), out / "regression.png")
    pictures.save(family_pictures.ellipses(logistic), out / "logistic.png")
    return {
        "regression": regression["distances"],
        "chains": regression["chains"],
        "logistic": logistic["divergence"],
    }


def run_all(arguments: argparse.Namespace, chosen: dict[str, Experiment], out: Path) -> None:
    """Run every experiment and the figures; each is written and printed when it is done."""
    seeds = 1 if arguments.smoke else arguments.seeds
    settings = {name: dataclasses.asdict(each) for name, each in chosen.items()}
    with tracking.tracked("vlearn-family", arguments.runs, {**settings, "seeds": seeds}) as (run, said):
        for name, experiment in chosen.items():
            with progress() as advance:
                record = run_experiment(
                    name, experiment, seeds, arguments.data_root, arguments.runs, arguments.device, advance
                )
            command = f"python -m benchmarks.family --experiments {name} --seeds {seeds}"
            write_json(out / f"{name}.json", {**provenance(command, 0), **record})
            pictures.save(family_pictures.comparison(record["table"], experiment.title), out / f"{name}.png")
            print_results(record)
            if run:
                run.log({f"figures/{name}": tracking.image(out / f"{name}.png")})
                run.summary.update({name: record["table"]})
        with progress() as advance:
            record = run_figures(out, arguments.runs, arguments.smoke, advance)
        write_json(out / "figures.json", {**provenance("python -m benchmarks.family --figures", 0), **record})
        print_figures(record)
        if run:
            run.log({f"figures/{name}": tracking.image(out / f"{name}.png") for name in ("regression", "logistic")})
            run.summary.update(record)
        print(said)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(DEFAULT))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of each experiment's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/family"), help="what is needed to go on")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a few seconds on digits, not written to results/")
    parser.add_argument("--figures", action="store_true", help="the two figures of small problems alone")
    parser.add_argument("--cost", action="store_true", help="time and memory of a step alone")
    arguments = parser.parse_args(argv)
    out = arguments.out or (arguments.runs / "smoke" if arguments.smoke else RESULTS / "family")
    out.mkdir(parents=True, exist_ok=True)
    names = [] if arguments.figures else ["digits"] if arguments.smoke else arguments.experiments
    chosen = {name: SMOKE if arguments.smoke else EXPERIMENTS[name] for name in names}
    if arguments.epochs is not None:
        chosen = {name: dataclasses.replace(each, epochs=arguments.epochs) for name, each in chosen.items()}
    try:
        if arguments.cost:
            cost.run(out, arguments.device, arguments.smoke)
        else:
            run_all(arguments, chosen, out)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on with the first model that is not there.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
