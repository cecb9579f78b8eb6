"""Memory maps: which examples does a network lean on, and which ones does it never learn?

    python -m benchmarks.memory_maps [--experiments epochs complexity measures] [--seeds 1] [--epochs E] [--smoke]

One point an example: prediction error ‖p - y‖/√2 over leverage tr(ΛV), by IVON's own state (Tailor et al., 2024).

- epochs: the 60,000 training images of Fashion-MNIST after 1, 20, 50 and 100 epochs; the rows are those that
  `benchmarks.generalization` records, which trains first where they are missing.
- complexity: LeNet-5 on 5,000 images with too strong a prior, a fitting one, and too weak a one. Does an underfit model
  show a strip at leverage 0, and does leverage grow while former outliers are learned where it overfits?
- measures: the top 1% by four measures circled on one map, and the most extreme images of each; how many they share;
  and, with a twentieth of the labels changed at random, how many of the changed ones each measure finds.

Training is saved after every epoch under --runs; the same command goes on where it was interrupted.
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

import vlearn
from benchmarks.problems.batches import batches
from benchmarks.problems.images import Images
from benchmarks.report import experiments
from benchmarks.report.agreement import spearman
from benchmarks.report.records import over_seeds
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training import recorded_runs
from benchmarks.training.checkpoint import kept
from benchmarks.training.recorded_runs import Experiment, recorded_rows, train
from benchmarks.training.supervised import Training
from vlearn.gaussians.protocol import Posterior
from vlearn.plot.style import GREEN, INK, ORANGE, PURPLE, VERMILLION
from vlearn.sensitivity import measures
from vlearn.sensitivity.table import SensitivityTable

SMALL = recorded_runs.EXPERIMENTS["overfit"]
EXPERIMENTS = {"epochs": recorded_runs.EXPERIMENTS["fashion-mnist"], "complexity": SMALL, "measures": SMALL}
SMOKE = dict.fromkeys(EXPERIMENTS, recorded_runs.SMOKE)
PRIORS = {"underfit": 300.0, "fit": 50.0, "overfit": 1.0}  # δ alone differs
COLUMNS = ("leverage", "prediction_error", "self_influence")
FLIPPED = 0.05  # share of the labels that are changed
TOP = 0.01
SHOWN = 7  # images of each measure
SHOWN_NUMBERS = (
    "train_loss",
    "test_loss",
    "test_accuracy",
    "effective_parameters",
    "median_leverage",
    "median_error",
    "share_with_error_above_half",
)
State = dict[str, np.ndarray]  # COLUMNS of every example
MEASURES = {"influence": VERMILLION, "Cook's distance": GREEN, "gradient norm": ORANGE, "memorization": PURPLE}


def recorded(memory: vlearn.MemoryMap, snapshot: int) -> State:
    """What was recorded while the network was trained."""
    return {name: np.asarray(memory.column(name)[snapshot], dtype=np.float64) for name in COLUMNS}


def posterior_of(training: Training) -> Posterior:
    """IVON's own state at the end of its training."""
    assert isinstance(training.optimizer, vlearn.IVON)
    return training.optimizer.posterior()


def at_the_end(training: Training) -> SensitivityTable:
    """The sweep at the end of training, refined and with exact leverages."""
    loader = batches(training.data.x, training.data.y)
    posterior = posterior_of(training)
    return vlearn.sweep(training.model, posterior, loader, F.cross_entropy, "exact", progress=False, refined=True)


def state_of(table: SensitivityTable) -> State:
    """The columns of a map from a sweep."""
    return {name: getattr(table, name).double().numpy() for name in COLUMNS}


def numbers_of(state: State) -> dict[str, float]:
    """Where the points of one map are."""
    leverage, error = state["leverage"], state["prediction_error"]
    return {
        "effective_parameters": leverage.sum(),
        "median_leverage": np.median(leverage),
        "leverage_held_by_top_1_percent": np.sort(leverage)[-_count(leverage) :].sum() / leverage.sum(),
        "median_error": np.median(error),
        "share_with_error_above_half": (error > 0.5).mean(),
        "spearman_of_leverage_and_error": spearman(leverage, error),
    }


def side_by_side(maps: dict[str, State], circled_by: str) -> Figure:
    """One map for each title on common axes; the most influential examples of one of them are circled on all."""
    import matplotlib.pyplot as plt

    size = (3.7 * len(maps), 3.7)
    figure, axes = plt.subplots(1, len(maps), figsize=size, sharex=True, sharey=True, layout="constrained")
    axes = np.atleast_1d(axes)
    for ax, (title, state) in zip(axes, maps.items(), strict=True):
        vlearn.plot.memory_map(**{**state, "self_influence": maps[circled_by]["self_influence"]}, ax=ax)
        ax.set_title(title, fontsize=12, loc="left", color=INK, fontweight="bold")
    leverage = np.concatenate([state["leverage"] for state in maps.values()])
    axes[0].set_xlim(max(1e-5 * leverage.max(), np.quantile(leverage, 0.01)), 1.5 * leverage.max())
    axes[0].set_ylim(-0.03, 1.03)
    for ax in axes[1:]:
        ax.set_ylabel("")
    return figure


def over_epochs(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> Found:
    """The map at every recorded epoch of the training run with seed 0."""
    memory = recorded_rows(experiment, data, runs / experiment.dataset, advance)
    states = {f"epoch {step}": recorded(memory, i) for i, step in enumerate(memory.steps.tolist())}
    table = {title: numbers_of(state) for title, state in states.items()}
    return {"table": table}, side_by_side(states, list(states)[-1])


def by_complexity(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> Found:
    """The same network and data under three priors."""
    states, table = {}, {}
    for name, delta in PRIORS.items():
        training = train(with_prior(experiment, delta), data, 0, "IVON", runs / name, advance)
        state = states[f"{name}, δ = {delta:g}"] = state_of(at_the_end(training))
        curves = training.recorded["curves"]
        losses = {"train_loss": curves.train_loss[-1], "test_loss": curves.test_loss[-1]}
        table[name] = {**losses, "test_accuracy": curves.test_accuracy[-1], **numbers_of(state)}
    _, fit, overfit = states.values()
    outliers = fit["prediction_error"] > 0.5
    former = {
        "outliers_of_the_fit_model": int(outliers.sum()),
        "share_still_outliers_where_it_overfits": (overfit["prediction_error"][outliers] > 0.5).mean(),
        "their_leverage_over_that_before": np.median(overfit["leverage"][outliers] / fit["leverage"][outliers]),
    }
    return {"prior_precisions": PRIORS, "table": table, "former_outliers": former}, side_by_side(
        states, list(states)[1]
    )


def by_measure(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> Found:
    """Four measures on one map, and what each finds where labels were changed."""
    experiment = with_prior(experiment, PRIORS["fit"])
    clean = measured(experiment, data, 0, runs / "fit", advance)
    tops = {name: top(clean[name]) for name in MEASURES}
    shared = {a: {b: len(np.intersect1d(tops[a], tops[b])) / len(tops[a]) for b in tops} for a in tops}
    in_all = set.intersection(*(set(each.tolist()) for each in tops.values()))
    in_any = set.union(*(set(each.tolist()) for each in tops.values()))
    rows = []
    for seed in range(seeds):
        flipped, noisy = with_changed_labels(data, seed)
        values = measured(experiment, noisy, seed, runs / "changed-labels", advance)
        rows.append({name: recovered(values[name], flipped) for name in (*MEASURES, "prediction error", "leverage")})
    numbers = {
        "circled": len(tops["influence"]),
        "shared_of_top_1_percent": shared,
        "in_the_top_of_all_four": len(in_all),
        "in_the_top_of_any": len(in_any),
        "fell_back_from_cooks_distance": int(clean["fell back"].sum()),
        "spearman_with_influence": {name: spearman(clean[name], clean["influence"]) for name in MEASURES},
        "share_of_changed_labels": FLIPPED,
        "table": {name: over_seeds([row[name] for row in rows]) for name in rows[0]},
        "most_extreme": {name: each[:SHOWN] for name, each in tops.items()},
    }
    return numbers, draw_measures(clean, tops, data)


def measured(experiment: Experiment, data: Images, seed: int, runs: Path, advance: Advance) -> dict[str, np.ndarray]:
    """Every measure of every training example at the end of training; they are kept beside the run."""
    settings = {**dataclasses.asdict(experiment), "seed": seed}
    path = runs / f"{data.name}-{len(data.y)}-measures-seed{seed}.pt"
    return kept(path, settings, lambda: measure(experiment, data, seed, runs, advance))


def measure(experiment: Experiment, data: Images, seed: int, runs: Path, advance: Advance) -> dict[str, np.ndarray]:
    """The values ``[N]`` of each measure after a run of training, and where Cook's distance is of first order."""
    training = train(experiment, data, seed, "IVON", runs, advance)
    model, posterior, table = training.model, posterior_of(training), at_the_end(training)
    state = state_of(table)
    assert table.used_first_order is not None
    loader = batches(data.x, data.y)
    by_measure = {
        "Cook's distance": measures.cooks_distance(model, posterior, loader, F.cross_entropy),
        "gradient norm": measures.gradient_norm(model, loader, F.cross_entropy),
        "memorization": measures.memorization(model, posterior, loader, F.cross_entropy),
    }
    values = {"influence": state["self_influence"]}
    values |= {name: each.double().numpy() for name, each in by_measure.items()}
    values |= {"prediction error": state["prediction_error"], "leverage": state["leverage"]}
    values["fell back"] = table.used_first_order.numpy()
    advance(f"{experiment.title}, seed {seed}: measured")
    return values


def with_changed_labels(data: Images, seed: int) -> tuple[np.ndarray, Images]:
    """Which labels were changed ``[N]``, and the data with each of them another class, all equally likely."""
    generator = np.random.default_rng(seed)
    count = len(data.y)
    changed = np.zeros(count, dtype=bool)
    changed[generator.choice(count, round(FLIPPED * count), replace=False)] = True
    shift = np.where(changed, generator.integers(1, len(data.classes), count), 0)
    y = (data.y + torch.from_numpy(shift).to(data.y.device)) % len(data.classes)
    return changed, dataclasses.replace(data, y=y)


def recovered(values: np.ndarray, changed: np.ndarray) -> dict[str, float]:
    """Share of changed labels among the top 1%, and of all changed labels among as many at the top."""
    order = np.argsort(-values, kind="stable")
    return {
        "share_of_top_1_percent": changed[order[: _count(values)]].mean(),
        "share_found": changed[order[: changed.sum()]].mean(),
    }


def top(values: np.ndarray) -> np.ndarray:
    """The 1% with the largest values, the largest first."""
    return np.argsort(-values, kind="stable")[: _count(values)]


def _count(values: np.ndarray) -> int:
    return max(1, round(TOP * len(values)))


def draw_measures(values: dict[str, np.ndarray], tops: dict[str, np.ndarray], data: Images) -> Figure:
    """The map with every measure's top 1% circled, larger where more agree; beside it the most extreme images."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(13.5, 5.2), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    ax = left.subplots()
    vlearn.plot.memory_map(leverage=values["leverage"], prediction_error=values["prediction error"], ax=ax)
    floor = ax.collections[0].get_offsets()[:, 0].min()
    for place, (name, chosen) in enumerate(tops.items()):
        x, y = np.maximum(values["leverage"][chosen], floor), values["prediction error"][chosen]
        look = {"facecolors": "none", "edgecolors": MEASURES[name], "linewidths": 1.2, "label": name}
        ax.scatter(x, y, s=26 + 34 * place, **look)
    left.legend(frameon=False, fontsize=10, labelcolor=INK, loc="outside lower center", ncols=2, title="top 1% by")
    axes = right.subplots(len(tops), SHOWN, squeeze=False)
    for row, (name, chosen) in zip(axes, tops.items(), strict=True):
        pictures = vlearn.plot.thumbnails(data.pictures, chosen[:SHOWN])
        _draw_row(row, pictures, [data.classes[data.y[i]] for i in chosen[:SHOWN].tolist()], MEASURES[name])
        row[0].set_ylabel(name, fontsize=10, color=MEASURES[name], fontweight="bold")
    return figure


def _draw_row(axes: np.ndarray, pictures: np.ndarray, labels: list[str], color: str) -> None:
    for ax in axes:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for ax, picture, label in zip(axes, pictures, labels, strict=False):
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        ax.set_xlabel(label, fontsize=9, color=INK, labelpad=2)
        ax.spines[:].set(visible=True, color=color, linewidth=1.2)


def with_prior(experiment: Experiment, prior_precision: float) -> Experiment:
    """The same experiment with another δ."""
    return dataclasses.replace(experiment, prior_precision=prior_precision)


Found = tuple[dict[str, Any], Figure]
PARTS: dict[str, Callable[[Experiment, Images, int, Path, Advance], Found]] = {
    "epochs": over_epochs,
    "complexity": by_complexity,
    "measures": by_measure,
}


def print_results(part: str, record: dict[str, Any]) -> None:
    """Print the table of one part."""
    if part == "measures":
        header = ("", "of the top 1%", "found", *(f"shares with\n{name}" for name in MEASURES))
        lines = []
        for name, row in record["table"].items():
            shared = record["shared_of_top_1_percent"].get(name, {})
            cells = [f"{row['mean'][each]:.0%}" for each in ("share_of_top_1_percent", "share_found")]
            lines.append((name, *cells, *(f"{shared[each]:.0%}" if shared else "-" for each in MEASURES)))
        title = f"{record['share_of_changed_labels']:.0%} of the labels changed: changed ones among the examples on top"
        notes = [
            "Found: of all changed labels, among as many examples on top. Shares with: the top 1% of two measures, "
            f"labels as they are; {record['in_the_top_of_all_four']} of {record['circled']} are in the top of all "
            f"four. Cook's distance is its first order for {record['fell_back_from_cooks_distance']} examples, whose "
            "VΛ has an eigenvalue above .95 under IVON's diagonal posterior."
        ]
    else:
        names = [name for name in SHOWN_NUMBERS if name in next(iter(record["table"].values()))]
        header = ("", *(name.replace("_", " ") for name in names))
        lines = [(title, *(f"{row[name]:.3g}" for name in names)) for title, row in record["table"].items()]
        title = {"epochs": "Memory maps over training", "complexity": "Memory maps of three models"}[part]
        notes = []
        if former := record.get("former_outliers"):
            notes.append(
                f"Of {former['outliers_of_the_fit_model']} examples with an error above .5 in the fit model, "
                f"{former['share_still_outliers_where_it_overfits']:.0%} have one in the model that overfits; their "
                f"median leverage there is {former['their_leverage_over_that_before']:.2g} times as large."
            )
    print_table(title, header, lines, notes)


def run_part(part: str, experiment: Experiment, arguments: argparse.Namespace) -> int:
    """One figure with its numbers; all parts share the folder of the training runs."""
    drawn: list[Figure] = []

    def work(experiment: Experiment, data: Images, seeds: int, folder: Path, advance: Advance) -> dict[str, Any]:
        numbers, figure = PARTS[part](experiment, data, seeds, arguments.runs, advance)
        drawn.append(figure)
        return numbers

    def show(record: dict[str, Any]) -> None:
        print_results(part, record)

    return experiments.run("memory_maps", arguments, {part: experiment}, work, lambda record: drawn[0], show)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    parser = experiments.parser("memory_maps", __doc__, EXPERIMENTS, seeds=1)
    parser.set_defaults(runs=Path("runs/generalization"))  # where the rows are
    arguments = parser.parse_args(argv)
    for part, experiment in experiments.chosen(arguments, EXPERIMENTS, SMOKE).items():
        if code := run_part(part, experiment, arguments):
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
