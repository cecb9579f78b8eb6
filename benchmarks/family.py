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
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import data as datasets
from benchmarks import (
    family_cost,
    family_pictures,
    laplace,
    logistic_posterior,
    networks,
    pictures,
    regression_predictive,
    report,
    resume,
    tracking,
)
from benchmarks.data import Images
from benchmarks.methods import GRID, METHODS, MOST, Problem, finish, posterior_of, training_step
from benchmarks.scores import at_mean, by_draws, leave_one_out, linearised, scores
from vlearn.posterior import from_laplace
from vlearn.posterior.base import Posterior

RESULTS = Path(__file__).parent / "results" / "family"
LAPLACE = {"SGD + Laplace, diagonal": "diag", "SGD + Laplace, Kronecker": "kron"}
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
Advance = Callable[[str], None]


def train(
    experiment: Experiment, data: Images, method: str, lr: float, seed: int
) -> tuple[nn.Module, Posterior | None, Problem]:
    """A network at the end of its training, with the posterior that the optimizer's state is."""
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    problem = Problem(len(data.y), experiment.prior_precision, seed, experiment.hess_init, experiment.beta2)
    optimizer = METHODS[method].make(model, lr, problem)
    steps = experiment.epochs * -(-len(data.y) // experiment.batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
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
    return model, posterior, problem


def row(model: nn.Module, posterior: Posterior | None, data: Images, draws: int, linear: bool = False) -> Row:
    """What one posterior predicts: at its mean, and by draws of the weights or of the linearised model's output."""
    found = scores(at_mean(model, data.x_test), data.y_test)
    if posterior is None:
        return found
    drawn = (
        linearised(model, posterior, data.x_test, data.y_test, draws)
        if linear
        else by_draws(model, posterior, data.x_test, draws)
    )
    return found | {f"{name}_by_draws": value for name, value in scores(drawn, data.y_test).items()}


def rows_of(experiment: Experiment, data: Images, method: str, lr: float, seed: int) -> dict[str, Row]:
    """Train once and measure: the method's row, and with SGD's those of the Laplace approximations."""
    model, posterior, problem = train(experiment, data, method, lr, seed)
    posteriors = {method: posterior}
    if method == "SGD":
        for name, structure in LAPLACE.items():
            la = laplace.fit(model, data.x, data.y, structure, problem.prior_precision, batch=200)
            posteriors[name] = from_laplace(la)
    train_loss = scores(at_mean(model, data.x), data.y)["nll"]
    rows = {}
    for name, each in posteriors.items():
        found = row(model, each, data, experiment.draws, linear=name in LAPLACE) | {"train_nll": train_loss}
        if each is not None:
            found["loo_loss"] = leave_one_out(model, each, data.x, data.y)
            found["loo_gap"] = found["loo_loss"] - found["nll"]
        rows[name] = found
    return rows


def tune(experiment: Experiment, data: Images, method: str, runs: Path, advance: Advance) -> dict[float, Row]:
    """Scores on held-out training data by learning rate; those of a run that diverged are infinite."""
    kept = round(len(data.y) * (1 - experiment.held_out))
    part = dataclasses.replace(
        data,
        x=data.x[:kept],
        y=data.y[:kept],
        x_test=data.x[kept:],
        y_test=data.y[kept:],
        pictures=data.pictures[:kept],
    )

    def measure(lr: float) -> Row:
        try:
            model, posterior, _ = train(experiment, part, method, lr, seed=0)
        except FloatingPointError:
            return {"nll": math.inf, "nll_by_draws": math.inf}
        return row(model, posterior, part, experiment.draws)

    found: dict[float, Row] = {}
    waiting = [METHODS[method].rate * share for share in GRID]
    while waiting:
        for lr in waiting:
            settings = {**dataclasses.asdict(experiment), "method": method, "lr": lr, "tuning": True}
            found[lr] = once(runs / f"{method}-lr{lr:.3g}-tuning.pt", settings, lambda lr=lr: measure(lr))
            advance(f"{experiment.title}: {method}, learning rate {lr:.3g} tried")
        chosen = best(method, found)
        beyond = {min(found): chosen / 3, max(found): chosen * 3}
        waiting = [beyond[chosen]] if chosen in beyond and len(found) < MOST else []
    return dict(sorted(found.items()))


def once(path: Path, settings: dict[str, Any], make: Callable[[], Any]) -> Any:
    """What `make` gives, kept in a file."""
    checkpoint = resume.Checkpoint(path, settings)
    found = checkpoint.load()
    if found is None:
        found = make()
        checkpoint.save(found)
    return found


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
            found = once(
                path, settings, lambda method=method, lr=lr, seed=seed: rows_of(experiment, data, method, lr, seed)
            )
            for each, numbers in found.items():
                rows.setdefault(each, []).append(numbers)
            advance(f"{experiment.title}: {method}, seed {seed} done")
    steps = experiment.epochs * -(-len(data.y) // experiment.batch)
    return {
        "experiment": dataclasses.asdict(experiment),
        "remaining_weight_of_hess_init": experiment.beta2**steps,
        "learning_rates": {method: {"chosen": chosen[method], "held_out": tried[method]} for method in METHODS},
        "table": {name: report.over_seeds(each) for name, each in in_order(rows).items()},
        "seeds": rows,
    }


def in_order(rows: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Optimizers without a posterior, Laplace approximations, then the others."""
    first = ["SGD", *LAPLACE]
    return {name: rows[name] for name in (*first, *(each for each in rows if each not in first))}


def print_results(found: dict[str, Any]) -> None:
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
        for name, numbers in found["table"].items()
    ]
    rates = ", ".join(f"{method} {each['chosen']:.2g}" for method, each in found["learning_rates"].items())
    notes = [
        f"Means ± standard deviations over {len(next(iter(found['seeds'].values())))} seeds; NLL and leave-one-out "
        "loss (of the training data alone, at the mean) in nats.",
        f"Learning rates: {rates}. hess_init keeps a weight of "
        f"{found['remaining_weight_of_hess_init']:.2f} where it is not said otherwise.",
    ]
    report.print_table(f"The family: {found['experiment']['title']}", header, lines, notes)


def print_figures(found: dict[str, Any]) -> None:
    lines = [
        (name, *(f"{row[quantity]:.2f}" for quantity in ("mean_off_at_data", "width_at_data", "width_between")))
        for name, row in found["regression"].items()
    ]
    header = ("", "mean off\nat data, sd", "width\nat data", "width\nbetween")
    note = "Against Hamiltonian Monte Carlo; widths as multiples of its own. "
    note += f"Largest split R-hat {found['chains']['largest_split_r_hat']:.3f}."
    report.print_table("Predictive of a regression in one dimension", header, lines, [note])
    lines = [
        (name, f"{row['from_truth']:.4f}", f"{row['from_nearest']:.4f}") for name, row in found["logistic"].items()
    ]
    header = ("", "KL to the\ntrue density", "KL to the\nnearest Gaussian")
    report.print_table("Posterior of a logistic regression with two weights, nats", header, lines)


def run_figures(out: Path, runs: Path, smoke: bool, advance: Advance) -> dict[str, Any]:
    """Both small problems, their figures and figures.json."""
    few = {"steps": 20, "chains": 2, "warm_up": 4, "kept": 8} if smoke else {}
    asked = {**few, "methods": list(METHODS)}
    regression = once(runs / "regression.pt", asked, lambda: regression_predictive.compare(**few, advance=advance))
    steps = {"steps": few["steps"]} if smoke else {}
    logistic = once(runs / "logistic.pt", asked, lambda: logistic_posterior.compare(**steps, advance=advance))
    pictures.save(family_pictures.bands(regression), out / "regression.png")
    pictures.save(family_pictures.ellipses(logistic), out / "logistic.png")
    return {
        "regression": regression["distances"],
        "chains": regression["chains"],
        "logistic": logistic["divergence"],
    }


def run_all(arguments: argparse.Namespace, chosen: dict[str, Experiment], out: Path) -> None:
    """Every experiment and the figures, each written and printed when it is done."""
    seeds = 1 if arguments.smoke else arguments.seeds
    settings = {name: dataclasses.asdict(each) for name, each in chosen.items()}
    with tracking.tracked("vlearn-family", arguments.runs, {**settings, "seeds": seeds}) as (run, said):
        for name, experiment in chosen.items():
            with report.progress() as advance:
                found = run_experiment(
                    name, experiment, seeds, arguments.data_root, arguments.runs, arguments.device, advance
                )
            command = f"python -m benchmarks.family --experiments {name} --seeds {seeds}"
            report.write_json(out / f"{name}.json", {**report.provenance(command, 0), **found})
            pictures.save(family_pictures.comparison(found["table"], experiment.title), out / f"{name}.png")
            print_results(found)
            if run:
                run.log({f"figures/{name}": tracking.image(out / f"{name}.png")})
                run.summary.update({name: found["table"]})
        with report.progress() as advance:
            found = run_figures(out, arguments.runs, arguments.smoke, advance)
        report.write_json(
            out / "figures.json", {**report.provenance("python -m benchmarks.family --figures", 0), **found}
        )
        print_figures(found)
        if run:
            run.log({f"figures/{name}": tracking.image(out / f"{name}.png") for name in ("regression", "logistic")})
            run.summary.update(found)
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
    parser.add_argument("--peak", choices=list(METHODS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak:
        family_cost.print_peak(arguments.peak, arguments.device)
        return 0
    out = arguments.out or (arguments.runs / "smoke" if arguments.smoke else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    names = [] if arguments.figures else ["digits"] if arguments.smoke else arguments.experiments
    chosen = {name: SMOKE if arguments.smoke else EXPERIMENTS[name] for name in names}
    if arguments.epochs is not None:
        chosen = {name: dataclasses.replace(each, epochs=arguments.epochs) for name, each in chosen.items()}
    try:
        if arguments.cost:
            family_cost.run(out, arguments.device, arguments.smoke)
        else:
            run_all(arguments, chosen, out)
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on with the first model that is not there.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
