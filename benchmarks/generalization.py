"""Does the training data alone predict the test loss? LOO against test loss over training, on real images.

    python -m benchmarks.generalization [--experiments NAME ...] [--seeds 3] [--epochs E] [--device cpu] [--smoke]

The network is trained by `vlearn.IVON`, whose state is the posterior, and again by SGD with Laplace approximations of
laplace-torch (diagonal and Kronecker). At the recorded epochs every posterior goes through the same equation over all
training examples, LOO = mean ℓ(y_i, f_i + V_i e_i), which is held against the loss on the test set (Nickl et al., 2023,
arXiv:2310.19273, Figs. 1b, 5 and 9). At the end laplace-torch's own functional variance and the form of the paper's
code, which keeps the diagonal of V over the classes, are timed on a part of the data and scaled up.

Every training run saves its state after each epoch under --runs; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn

import vlearn
from benchmarks import laplace, networks, pictures, report, resume, script, supervised
from benchmarks.agreement import spearman
from benchmarks.data import Images
from benchmarks.pictures import Curves
from benchmarks.supervised import Advance
from benchmarks.training import losses
from vlearn.posterior.base import Posterior

IVON, DIAGONAL, KRONECKER = pictures.LOOKS


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a curve depends on but the seed.

    Attributes:
        prior_precision: δ on the scale of the summed loss.
        lr, hess_init, beta2: IVON's; the rate falls to zero along a cosine.
        sgd_lr: first and last rate of SGD with momentum .9, along a cosine.
        recorded: epochs after which IVON's LOO loss is taken; `laplace` those for the fits; `mapped` those after
            which every example's row is kept.
        part: examples that laplace-torch's own route is timed on.
    """

    title: str
    dataset: str
    network: str
    epochs: int
    batch: int
    prior_precision: float
    lr: float
    hess_init: float
    beta2: float
    sgd_lr: tuple[float, float]
    recorded: tuple[int, ...]
    laplace: tuple[int, ...]
    mapped: tuple[int, ...]
    num_data: int | None = None
    num_test: int | None = None
    part: int = 2000

    def cut(self, epochs: int) -> Experiment:
        """The same with another number of epochs, recorded at the same shares of the run."""
        moved = {
            name: tuple(sorted({max(1, round(epoch * epochs / self.epochs)) for epoch in getattr(self, name)}))
            for name in ("recorded", "laplace", "mapped")
        }
        return dataclasses.replace(self, epochs=epochs, **moved)


EPOCHS = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 50, 60, 70, 80, 90, 100)
CIFAR = Experiment(  # Fig. 1b, as published; for an accelerator.
    title="CIFAR-10, ResNet-20-FRN",
    dataset="cifar-10",
    network="resnet20_frn",
    epochs=200,
    batch=50,
    prior_precision=10.0,
    lr=0.2,
    hess_init=0.01,
    beta2=0.99999,
    sgd_lr=(1e-1, 1e-3),
    recorded=(1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 75, 100, 125, 150, 175, 200),
    laplace=(),
    mapped=(),
)
EXPERIMENTS = {
    # Fig. 5: a is IVON as published (90.7% there), b and c the Laplace fits.
    "fashion-mnist": Experiment(
        title="Fashion-MNIST, LeNet-5",
        dataset="fashion-mnist",
        network="lenet5",
        epochs=100,
        batch=256,
        prior_precision=60.0,
        lr=0.1,
        hess_init=0.1,
        beta2=0.99999,
        sgd_lr=(1e-2, 1e-4),
        recorded=EPOCHS,
        laplace=(1, 3, 5, 10, 20, 30, 50, 70, 100),
        mapped=(1, 20, 50, 100),
    ),
    # Fig. 9: does LOO rise with the test loss? A weak prior, few data, and a posterior that follows them.
    "overfit": Experiment(
        title="5,000 of Fashion-MNIST, LeNet-5, overfitting",
        dataset="fashion-mnist",
        network="lenet5",
        epochs=100,
        batch=50,
        prior_precision=1.0,
        lr=0.2,
        hess_init=0.1,
        beta2=0.9999,
        sgd_lr=(5e-2, 5e-4),
        recorded=EPOCHS,
        laplace=(1, 3, 5, 10, 20, 30, 50, 70, 100),
        mapped=(1, 20, 50, 100),
        num_data=5000,
    ),
    "cifar-10": dataclasses.replace(
        CIFAR,
        title="10,000 of CIFAR-10, ResNet-20-FRN",
        epochs=40,
        hess_init=0.05,  # a fifth of the examples: the draws are as wide as the published ones
        recorded=(1, 3, 5, 10, 15, 20, 30, 40),
        num_data=10_000,
    ),
    "cifar-10-published": CIFAR,
}
PUBLISHED = ("cifar-10-published",)  # days on a CPU: they run where they are named
SMOKE = Experiment(
    title="digits, small CNN",
    dataset="digits",
    network="digits_cnn",
    epochs=3,
    batch=50,
    prior_precision=5.0,
    lr=0.2,
    hess_init=0.1,
    beta2=0.999,
    sgd_lr=(2e-1, 2e-3),
    recorded=(1, 2, 3),
    laplace=(1, 3),
    mapped=(1, 3),
    num_data=300,
    num_test=200,
    part=100,
)


def train(
    experiment: Experiment, data: Images, seed: int, trainer: str, runs: Path, advance: Advance, mapped: bool = True
) -> supervised.Training:
    """One network by "IVON" or "SGD", its curves recorded along the way; goes on from the last epoch that was saved.

    Args:
        mapped: keep IVON's rows of every example, at the epochs that the experiment names.

    Returns:
        The run at its end, with found = {"curves": Curves, "seconds": of training, by epoch}.
    """
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    settings = {**dataclasses.asdict(experiment), "seed": seed, "trainer": trainer}
    training = supervised.Training(
        model,
        *optimizer_of(experiment, model, len(data.y), trainer),
        data,
        batch=experiment.batch,
        epochs=experiment.epochs,
        seed=seed,
        checkpoint=resume.Checkpoint(runs / f"{data.name}-{len(data.y)}-{trainer}-seed{seed}.pt", settings),
        found={"curves": Curves()},
    )
    optimizer, curves = training.optimizer, training.found["curves"]
    with_rows = mapped and trainer == "IVON"
    memory = vlearn.MemoryMap(len(data.y), memory_path(runs, data, seed)) if with_rows else None
    if memory is not None:
        memory.rewind(training.done)
    for epoch in training:
        record(experiment, data, epoch, model, optimizer, curves)
        if memory is not None and epoch in experiment.mapped:
            loader = supervised.batches(data.x, data.y)
            # The map shows single rows, in which a probe's noise would be seen.
            table = vlearn.sweep(
                model, optimizer.posterior(), loader, F.cross_entropy, leverage="exact", progress=False
            )
            memory.record_sweep(epoch, table, test_loss=curves.test_loss[-1])
        advance(f"{data.name}, {trainer}, seed {seed}, epoch {epoch}/{experiment.epochs}")
    training.close()
    return training


def memory_path(runs: Path, data: Images, seed: int) -> Path:
    """Where IVON's rows of every example are, at the mapped epochs."""
    return runs / f"{data.name}-{len(data.y)}-memory-seed{seed}"


def recorded_rows(experiment: Experiment, data: Images, runs: Path, advance: Advance) -> vlearn.MemoryMap:
    """IVON's rows of every example at the mapped epochs of seed 0, after training as far as is missing.

    Raises:
        ValueError: if the run was trained without them.
    """
    train(experiment, data, 0, "IVON", runs, advance)
    path = memory_path(runs, data, 0)
    memory = vlearn.MemoryMap.open(path)
    if missing := sorted(set(experiment.mapped) - set(memory.steps.tolist())):
        raise ValueError(f"{path} has no rows of epochs {missing}: the run went past them; give another --runs folder")
    return memory


def optimizer_of(experiment: Experiment, model: nn.Module, num_data: int, trainer: str) -> tuple[Any, Any]:
    """The optimizer of "IVON" or "SGD", and its schedule."""
    total = supervised.steps(num_data, experiment.epochs, experiment.batch)
    delta = experiment.prior_precision
    if trainer == "SGD":
        return supervised.sgd(model, num_data, total, prior_precision=delta, lr=experiment.sgd_lr)
    own = {"lr": experiment.lr, "hess_init": experiment.hess_init, "beta2": experiment.beta2}
    return supervised.ivon(model, num_data, total, prior_precision=delta, **own)


def record(experiment: Experiment, data: Images, epoch: int, model: nn.Module, optimizer: Any, curves: Curves) -> None:
    """Add train, test and LOO losses to the curves, where this epoch is recorded."""
    if isinstance(optimizer, vlearn.IVON):
        posteriors = {IVON: optimizer.posterior} if epoch in experiment.recorded else {}
    elif epoch in experiment.laplace:
        posteriors = {m: lambda m=m: fitted(experiment, data, model, m) for m in (DIAGONAL, KRONECKER)}
    else:
        posteriors = {}
    if not posteriors:
        return
    note_losses(curves, epoch, model, data)
    for method, get in posteriors.items():
        began = time.perf_counter()
        loo = supervised.loo_loss(model, get(), data)
        curves.seconds.setdefault(method, []).append(time.perf_counter() - began)
        curves.loo_loss.setdefault(method, []).append(loo)


def fitted(experiment: Experiment, data: Images, model: nn.Module, method: str) -> Posterior:
    """A Laplace approximation at the model's weights."""
    structure = {DIAGONAL: "diag", KRONECKER: "kron"}[method]
    return supervised.laplace_posterior(model, data, structure, experiment.prior_precision)


def note_losses(curves: Curves, epoch: int, model: nn.Module, data: Images) -> None:
    """Add the mean losses of both halves at the model's weights."""
    losses = supervised.measure(model, data)
    curves.steps.append(epoch)
    curves.train_loss.append(losses.train.mean().item())
    curves.test_loss.append(losses.test.mean().item())
    curves.test_error.append(losses.test_error)
    curves.test_accuracy.append(losses.right.mean().item())


def by_laplace_torch(experiment: Experiment, data: Images, model: nn.Module) -> dict[str, dict[str, float]]:
    """laplace-torch by itself: seconds of a fit, and of V e for all examples, scaled up from a part of them.

    Returns:
        For each structure, with V and with its diagonal over the classes: seconds, and the LOO loss of the part, nats.
    """
    found = {}
    x, y = data.x[: experiment.part], data.y[: experiment.part]
    with torch.no_grad():
        output = model.eval()(x)
    for method, structure in {DIAGONAL: "diag", KRONECKER: "kron"}.items():
        began = time.perf_counter()
        la = laplace.fit(model, data.x, data.y, structure, experiment.prior_precision, batch=256)
        found[method] = {"fit": time.perf_counter() - began, "examples_of_part": len(y)}
        for form, diagonal in {"own": False, "diagonal": True}.items():
            began = time.perf_counter()
            deviation = laplace.deviation(la, x, y, batch=20, diagonal=diagonal)
            seconds = (time.perf_counter() - began) * len(data.y) / len(y)
            loo = F.cross_entropy(output + deviation, y).item()
            found[method] |= {f"{form}_deviation_scaled": seconds, f"{form}_loo_loss_of_part": loo}
    return found


def row(curves: Curves, method: str, seconds: Sequence[float]) -> dict[str, float]:
    """Numbers of one method in one run."""
    loo, test = np.array(curves.loo_loss[method]), np.array(curves.test_loss)
    return losses(curves, method) | {
        "spearman_over_epochs": spearman(loo, test),
        "seconds_of_sensitivities": sum(curves.seconds[method]),
        "seconds_of_sensitivities_each": float(np.median(curves.seconds[method])),
        "seconds_of_training_epoch": float(np.median(seconds)),
    }


def run_experiment(experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance) -> dict[str, Any]:
    """Every seed of one experiment."""
    trainers = ["IVON", *(["SGD"] if experiment.laplace else [])]
    curves: dict[str, list[Curves]] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    own: dict[str, Any] = {}
    for seed in range(seeds):
        for trainer in trainers:
            training = train(experiment, data, seed, trainer, runs, advance, mapped=not seed)
            found = training.found
            curves.setdefault(trainer, []).append(found["curves"])
            for each in found["curves"].loo_loss:
                rows.setdefault(each, []).append(row(found["curves"], each, found["seconds"]))
            if trainer == "SGD" and not seed:
                own = timed(experiment, data, training.model, seed, runs)
    return {
        "remaining_weight_of_hess_init": experiment.beta2
        ** supervised.steps(len(data.y), experiment.epochs, experiment.batch),
        "table": {method: report.over_seeds(each) for method, each in rows.items()},
        "laplace_torch": own,
        "curves": {trainer: [dataclasses.asdict(each) for each in found] for trainer, found in curves.items()},
    }


def timed(experiment: Experiment, data: Images, model: nn.Module, seed: int, runs: Path) -> dict[str, Any]:
    """`by_laplace_torch`, once for the settings."""
    checkpoint = resume.Checkpoint(runs / "laplace-torch.pt", {**dataclasses.asdict(experiment), "seed": seed})
    found = checkpoint.load()
    if found is None:
        found = by_laplace_torch(experiment, data, model)
        checkpoint.save(found)
    return found


def draw(found: dict[str, Any]) -> Figure:
    """The first seed's curves, one panel for each training run."""
    titles = {"IVON": "IVON: its own state", "SGD": "SGD: Laplace fits"}
    figure = pictures.generalization({titles[trainer]: Curves(**each[0]) for trainer, each in found["curves"].items()})
    for ax in figure.axes:
        ax.set_xlabel("epoch")
    figure.suptitle(found["experiment"]["title"], fontsize=12)
    return figure


def print_results(found: dict[str, Any]) -> None:
    header = ("", "|LOO-test|", "Pearson", "Spearman", "train", "LOO", "test", "accuracy", "seconds\na sweep")
    lines = []
    for method, numbers in found["table"].items():
        mean, deviation = numbers["mean"], numbers["deviation"]
        lines.append(
            (
                method,
                f"{mean['mean_absolute_gap']:.3f} ± {deviation['mean_absolute_gap']:.3f}",
                f"{mean['pearson_over_epochs']:.4f}",
                f"{mean['spearman_over_epochs']:.3f}",
                *(f"{mean[f'{which}_loss']:.3f}" for which in ("train", "loo", "test")),
                f"{mean['test_accuracy']:.2%}",
                f"{mean['seconds_of_sensitivities_each']:.1f}",
            )
        )
    notes = [
        "Losses in nats at the last epoch; gap and correlations over the recorded epochs; means over the seeds. "
        "Seconds: one sweep over the training set, with the Laplace fit. hess_init keeps a weight of "
        f"{found['remaining_weight_of_hess_init']:.2f}."
    ]
    for method, own in found["laplace_torch"].items():
        notes.append(
            f"{method}, laplace-torch's own functional variance in place of the sweep: "
            f"{own['own_deviation_scaled']:.0f} s (scaled up), after a fit of {own['fit']:.0f} s; "
            "the diagonal of V over the classes alone, as in the paper's code: "
            f"{own['diagonal_deviation_scaled']:.0f} s, and a LOO loss of {own['diagonal_loo_loss_of_part']:.3f} "
            f"for {own['own_loo_loss_of_part']:.3f} on {own['examples_of_part']:,} examples."
        )
    report.print_table(f"Leave-one-out against test loss: {found['experiment']['title']}", header, lines, notes)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = script.parser("generalization", __doc__, EXPERIMENTS, seeds=3, without=PUBLISHED).parse_args(argv)
    chosen = script.chosen(arguments, EXPERIMENTS, SMOKE)
    return script.run("generalization", arguments, chosen, run_experiment, draw, print_results)


if __name__ == "__main__":
    sys.exit(main())
