"""What would the model lose on a class that it had never seen? Estimates without training, against retraining.

    python -m benchmarks.class_removal [--experiments mlp-10000 lenet5-5000] [--seeds 1] [--smoke]

Each class of Fashion-MNIST is left out in turn (Nickl et al., 2023, arXiv:2310.19273, Fig. 3a). Estimates of the mean
loss on its examples, from the model trained on all of them:

- published: ℓ(y_i, f_i + V_i e_i) averaged over the class, each example as if it alone were removed;
- joint: Δf_M = J_M Σ J_Mᵀ e_M, with every example's effect on every other (Eq. 14);
- refined: Δf_M = (I - V_MΛ_M)⁻¹ V_M e_M, which needs the eigenvalues of V_MΛ_M below 1; else the joint one.

- Gauss-Newton: the refined form with the Gauss-Newton matrix itself in place of a structured Σ⁻¹, solved for each
  class: what of the errors is due to the structure.

Σ is a Kronecker Laplace approximation of laplace-torch after SGD, as published, and IVON's own state after IVON. The
truth is the same trainer going on without the class, from the model's weights, with the summed loss and δ as they were:
its mean loss on the removed examples and on the test examples of the class.

Every training run saves its state after each epoch under --runs; the same command goes on where it was interrupted. As
published LeNet-5 takes days on a CPU; those with fewer examples take minutes on one core.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import vlearn
from benchmarks.problems import networks
from benchmarks.problems.batches import batches
from benchmarks.problems.images import Images
from benchmarks.reference import group_newton_step
from benchmarks.reference.published import leave_class_out
from benchmarks.report import experiments
from benchmarks.report.agreement import agreement
from benchmarks.report.pictures import IVON, KRONECKER
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training.checkpoint import Checkpoint
from benchmarks.training.evaluation import example_losses, measure, posterior_after
from benchmarks.training.supervised import TRAINERS, Recipe, Training
from vlearn.gaussians.protocol import Posterior
from vlearn.plot.style import BLUE, GREEN, GREY, INK, ORANGE, PURPLE, tidy

ESTIMATES = ("published", "joint", "refined")
REFINED: dict[str, Any] = {"refined": True, "tolerance": 1e-2, "max_iterations": 30}
NEWTON = "Gauss-Newton"
LOOKS = {"published": (ORANGE, "o"), "joint": (BLUE, "s"), "refined": (GREEN, "^"), NEWTON: (PURPLE, "v")}
TRUTHS = {"removed": "its training examples", "test": "its test examples"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Recipe):
    """A recipe, and how a class is left out.

    Attributes:
        prior_precision: δ on the scale of the summed loss.
        retrained_epochs: of going on without the class.
        newton_iterations: largest number of products with the Gauss-Newton matrix for each class; 0 leaves that
            estimate out, which costs more than all others.
    """

    prior_precision: float
    retrained_epochs: int
    newton_iterations: int = 100

    def cut(self, epochs: int) -> Experiment:
        """The same with another number of epochs, before and after the removal."""
        retrained = max(1, round(self.retrained_epochs * epochs / self.epochs))
        return dataclasses.replace(self, epochs=epochs, retrained_epochs=retrained)


MLP = Experiment(  # SGD as for the warm starts of Fig. 2b, IVON as for Fig. 3b.
    title="Fashion-MNIST, MLP(32, 16)",
    dataset="fashion-mnist",
    network="mlp_32_16",
    epochs=300,
    batch=256,
    prior_precision=100.0,
    lr=0.1,
    hess_init=0.1,
    remaining=0.8,
    sgd_lr=(1e-1, 1e-3),
    retrained_epochs=150,
)
LENET5 = dataclasses.replace(MLP, title="Fashion-MNIST, LeNet-5", network="lenet5")
# With about the published weight decay, not the published δ. IVON averages the gradients that momentum sums: at ten
# times SGD's first rate its steps are the same; at the published .1 a short retraining would stop far from its end.
EXPERIMENTS = {
    "mlp-10000": dataclasses.replace(
        MLP,
        title="10,000 of Fashion-MNIST, MLP(32, 16)",
        num_data=10_000,
        prior_precision=20.0,
        epochs=60,
        retrained_epochs=30,
        batch=100,
        lr=1.0,
    ),
    "lenet5-5000": dataclasses.replace(
        LENET5,
        title="5,000 of Fashion-MNIST, LeNet-5",
        num_data=5_000,
        prior_precision=10.0,
        epochs=40,
        retrained_epochs=20,
        batch=100,
        lr=1.0,
        newton_iterations=0,
    ),
    "mlp": MLP,
    "lenet5": LENET5,
}
PUBLISHED = ("mlp", "lenet5")  # days on a CPU: they run where they are named
SMOKE = Experiment(
    title="digits, small CNN",
    dataset="digits",
    network="digits_cnn",
    epochs=5,
    batch=20,
    prior_precision=5.0,
    lr=0.5,
    hess_init=0.1,
    remaining=0.01,
    sgd_lr=(1e-1, 1e-3),
    num_data=200,
    num_test=200,
    retrained_epochs=4,
)


def trained(
    experiment: Experiment, data: Images, trainer: str, seed: int, runs: Path, advance: Advance
) -> tuple[Training, dict[str, Any]]:
    """The network with every class, and the estimates of the loss without each: ``[K]`` nats by name."""
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    training = experiment.training(
        trainer,
        model,
        data,
        prior_precision=experiment.prior_precision,
        seed=seed,
        file=runs / f"{trainer}-all-seed{seed}.pt",
    )
    for epoch in training:
        advance(f"{experiment.title}, {trainer}, seed {seed}, epoch {epoch}/{experiment.epochs}")
    settings = {**training.checkpoint.settings, "refined": REFINED}
    checkpoint = Checkpoint(runs / f"{trainer}-estimates-seed{seed}.pt", settings)
    estimates = checkpoint.load() or before(model, data)
    missing = [name for name in ESTIMATES if name not in estimates]
    label = len(estimates.setdefault(NEWTON, {"loss": [], "iterations": []})["loss"])
    if missing or (label < len(data.classes) and experiment.newton_iterations):
        posterior = posterior_after(training, experiment.prior_precision)
        for name in missing:
            estimates[name] = estimate(name, model, posterior, data)
            checkpoint.save(estimates)
            advance(f"{experiment.title}, {trainer}, seed {seed}, {name} estimates")
        for k in range(label, len(data.classes) if experiment.newton_iterations else 0):
            step = group_newton_step.leave_out(
                model,
                posterior,
                data.x,
                data.y,
                data.y == k,
                experiment.prior_precision,
                max_iterations=experiment.newton_iterations,
            )
            estimates[NEWTON]["loss"].append(step.left_out_loss)
            estimates[NEWTON]["iterations"].append(step.iterations)
            checkpoint.save(estimates)
            advance(f"{experiment.title}, {trainer}, seed {seed}, Gauss-Newton step without {data.classes[k]}")
    return training, estimates


def estimate(name: str, model: nn.Module, posterior: Posterior, data: Images) -> dict[str, Any]:
    """The loss ``[K]`` in nats without each class, and for how many classes the refined form fell back."""
    loader, labels = batches(data.x, data.y), data.y.cpu()
    if name == "published":
        rows = vlearn.sweep(model, posterior, loader, F.cross_entropy, None, progress=False)
        return {"loss": leave_class_out(rows, labels).numpy(), "fallbacks": 0}
    options = REFINED if name == "refined" else {}
    table = vlearn.leave_group_out(model, posterior, loader, labels, F.cross_entropy, progress=False, **options)
    return {"loss": table.left_out_loss.numpy(), "fallbacks": table.num_first_order or 0}


def before(model: nn.Module, data: Images) -> dict[str, Any]:
    """Mean losses by class of the model that has seen them all."""
    losses = measure(model, data)
    return {
        "accuracy": losses.right.mean().item(),
        "trained": {
            "removed": np.array([losses.train[data.y == k].mean().item() for k in range(len(data.classes))]),
            "test": np.array([losses.test[data.y_test == k].mean().item() for k in range(len(data.classes))]),
        },
    }


def retrain(
    experiment: Experiment,
    data: Images,
    full: Training,
    trainer: str,
    label: int,
    seed: int,
    runs: Path,
    advance: Advance,
) -> dict[str, list[float]]:
    """Mean losses on the removed class, after each epoch of going on without it."""
    torch.manual_seed(seed)
    model = copy.deepcopy(full.model)  # without the hooks of its optimizer, at the mean
    training = experiment.training(
        trainer,
        model,
        without(data, label),
        prior_precision=experiment.prior_precision,
        seed=seed,
        file=runs / f"{trainer}-without{label}-seed{seed}.pt",
        epochs=experiment.retrained_epochs,
    )
    training.recorded.setdefault("removed", [])
    training.recorded.setdefault("test", [])
    gone, gone_test = data.y == label, data.y_test == label
    for epoch in training:
        for name, x, y in (
            ("removed", data.x[gone], data.y[gone]),
            ("test", data.x_test[gone_test], data.y_test[gone_test]),
        ):
            training.recorded[name].append(example_losses(model, x, y)[0].mean().item())
        advance(
            f"{experiment.title}, {trainer}, seed {seed}, without {data.classes[label]}, "
            f"epoch {epoch}/{experiment.retrained_epochs}"
        )
    training.close()
    return {name: training.recorded[name] for name in TRUTHS}


def without(data: Images, label: int) -> Images:
    """The data set without the training examples of a class."""
    kept = data.y != label
    return dataclasses.replace(data, x=data.x[kept], y=data.y[kept], pictures=data.pictures[kept.cpu()])


def run_experiment(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """Leave out every class with both trainers."""
    table, by_class = {}, {}
    for trainer, method in TRAINERS.items():
        estimates, retrained, accuracies, fallbacks = [], [], [], 0
        for seed in range(seeds):
            full, numbers = trained(experiment, data, trainer, seed, runs, advance)
            full.close()
            names = [*ESTIMATES, *([NEWTON] if experiment.newton_iterations else [])]
            estimates.append({"trained": numbers["trained"]["removed"], **{k: numbers[k]["loss"] for k in names}})
            accuracies.append(numbers["accuracy"])
            fallbacks += numbers["refined"]["fallbacks"]
            retrained.append(
                [
                    retrain(experiment, data, full, trainer, label, seed, runs, advance)
                    for label in range(len(data.classes))
                ]
            )
        truth = {
            t: np.array([[each[t] for each in classes] for classes in retrained]).mean(0) for t in TRUTHS
        }  # [K, T]
        estimate = {name: np.mean([each[name] for each in estimates], axis=0) for name in estimates[0]}  # [K]
        table[method] = {name: compare(values, truth) for name, values in estimate.items()}
        table[method]["refined"]["fallbacks"] = fallbacks
        by_class[method] = {
            "accuracy": float(np.mean(accuracies)),
            "estimated": estimate,
            "retrained": {t: values[:, -1] for t, values in truth.items()},
            "retrained_by_epoch": truth,
        }
    return {"num_data": len(data.y), "classes": data.classes, "table": table, "by_class": by_class}


def compare(estimate: np.ndarray, truth: dict[str, np.ndarray]) -> dict[str, Any]:
    """An estimate ``[K]`` against the losses after retraining ``[K, T]``, over the classes."""
    against_truth: dict[str, Any] = {"mean": estimate.mean()}
    for name, by_epoch in truth.items():
        pearson, slope = agreement(estimate, by_epoch[:, -1])
        log_pearson, _ = agreement(np.log(estimate), np.log(by_epoch[:, -1]))
        against_truth[name] = {
            "mean": by_epoch[:, -1].mean(),
            "mean_absolute_gap": np.abs(estimate - by_epoch[:, -1]).mean(),
            "pearson": pearson,
            "pearson_of_logarithms": log_pearson,
            "slope": slope,
        }
    return against_truth


def draw(record: dict[str, Any]) -> Figure:
    """Losses on each class in the order of the retrained ones, with one panel for each posterior."""
    titles = {IVON: "IVON: its own state", KRONECKER: "SGD: Kronecker Laplace"}
    figure, axes = plt.subplots(1, len(titles), figsize=(11.0, 4.6), sharey=True, layout="constrained")
    for ax, (method, by_class) in zip(axes, record["by_class"].items(), strict=True):
        order = np.argsort(by_class["retrained"]["removed"])
        places = np.arange(len(order))
        for name, fill, shift in (("removed", INK, -0.12), ("test", "none", 0.12)):
            values = np.array(by_class["retrained"][name])[order]
            label = f"retrained without it: {TRUTHS[name]}"
            ax.plot(
                places + shift, values, "D", color=INK, markerfacecolor=fill, markersize=6, linestyle="", label=label
            )
        for name, (color, marker) in LOOKS.items():
            if name not in by_class["estimated"]:
                continue
            values = np.array(by_class["estimated"][name])[order]
            ax.plot(places, values, marker=marker, color=color, markersize=6, linewidth=1.4, label=f"estimate: {name}")
        values = np.array(by_class["estimated"]["trained"])[order]
        ax.plot(places, values, color=GREY, linestyle=(0, (4, 2)), label="trained with it")
        ax.set_yscale("log")
        tidy(ax, "", "mean loss on the class, nats")
        ax.set_xticks(places, [record["classes"][k] for k in order], rotation=45, ha="right")
        ax.set_title(titles[method], fontsize=13, color=INK, loc="left", fontweight="bold")
    axes[1].set_ylabel("")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"A class left out: {record['experiment']['title']}", fontsize=12)
    return figure


def print_results(record: dict[str, Any]) -> None:
    """Print every estimate against retraining."""
    columns = ("gap", "Pearson", "slope")
    header = ("", "estimate", "retrained,\nremoved", *columns, "retrained,\ntest", *columns)
    lines = []
    for method, rows in record["table"].items():
        for name, row in rows.items():
            numbers = [
                f"{row[truth][number]:.{digits}f}"
                for truth in TRUTHS
                for number, digits in (("mean", 2), ("mean_absolute_gap", 2), ("pearson", 3), ("slope", 2))
            ]
            lines.append((f"{method}: {name}", f"{row['mean']:.3f}", *numbers))
    notes = [
        f"{record['num_data']:,} training examples. Mean loss on the removed class in nats, over the classes; "
        "absolute gap, correlation and slope of the retrained over the estimated losses, on the removed and on the "
        "test examples. trained: the class's loss while it was there."
    ]
    for method, rows in record["table"].items():
        by_class = record["by_class"][method]
        curve = np.mean(by_class["retrained_by_epoch"]["removed"], axis=0)
        half = curve[(len(curve) - 1) // 2]
        notes.append(
            f"{method}: accuracy {by_class['accuracy']:.2%} with every class; {rows['refined']['fallbacks']} refined "
            f"estimates fell back to joint; halfway through the retraining the mean loss was {half:.2f}."
        )
    print_table(f"A class left out: {record['experiment']['title']}", header, lines, notes)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = experiments.parser("class_removal", __doc__, EXPERIMENTS, seeds=1, without=PUBLISHED).parse_args(argv)
    chosen = experiments.chosen(arguments, EXPERIMENTS, SMOKE)
    return experiments.run("class_removal", arguments, chosen, run_experiment, draw, print_results)


if __name__ == "__main__":
    sys.exit(main())
