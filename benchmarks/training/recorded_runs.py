"""Image classifiers whose leave-one-out and test losses, and every example's row, are recorded while they train."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from benchmarks.problems import networks
from benchmarks.problems.batches import batches
from benchmarks.problems.images import Images
from benchmarks.report.curves import Curves
from benchmarks.report.pictures import DIAGONAL, IVON, KRONECKER
from benchmarks.report.terminal import Advance
from benchmarks.training import supervised
from benchmarks.training.checkpoint import Checkpoint
from benchmarks.training.evaluation import STRUCTURES, laplace_posterior, loo_loss, measure
from benchmarks.training.supervised import Training
from vlearn.gaussians.protocol import Posterior


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a curve depends on but the seed.

    Attributes:
        prior_precision: δ on the scale of the summed loss.
        lr, hess_init, beta2, beta2_warmup: IVON's; the rate falls to zero along a cosine.
        sgd_lr: first and last rate of SGD with momentum .9, along a cosine.
        recorded: epochs after which IVON's LOO loss is taken; `laplace` those for the fits; `mapped` those after
            which every example's row is kept.
        part: examples that laplace-torch's own route is timed on, in `benchmarks.generalization`.
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
    beta2_warmup: float | None = None

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
) -> Training:
    """Train one network by "IVON" or "SGD" from the last epoch that was saved, and record its curves along the way.

    Args:
        mapped: keep IVON's rows of every example, at the epochs that the experiment names.

    Returns:
        The run at its end, with recorded = {"curves": Curves, "seconds": of training, by epoch}.
    """
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    settings = {**dataclasses.asdict(experiment), "seed": seed, "trainer": trainer}
    training = Training(
        model,
        *optimizer_of(experiment, model, len(data.y), trainer),
        data,
        batch=experiment.batch,
        epochs=experiment.epochs,
        seed=seed,
        checkpoint=Checkpoint(runs / f"{data.name}-{len(data.y)}-{trainer}-seed{seed}.pt", settings),
        recorded={"curves": Curves()},
    )
    optimizer, curves = training.optimizer, training.recorded["curves"]
    with_rows = mapped and trainer == "IVON"
    memory = vlearn.MemoryMap(len(data.y), memory_path(runs, data, seed)) if with_rows else None
    if memory is not None:
        memory.rewind(training.done)
    for epoch in training:
        record(experiment, data, epoch, model, optimizer, curves)
        if memory is not None and epoch in experiment.mapped:
            loader = batches(data.x, data.y)
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
    names = ("lr", "hess_init", "beta2", "beta2_warmup")
    own = {name: getattr(experiment, name) for name in names}
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
        loss = loo_loss(model, get(), data)
        curves.seconds.setdefault(method, []).append(time.perf_counter() - began)
        curves.loo_loss.setdefault(method, []).append(loss)


def fitted(experiment: Experiment, data: Images, model: nn.Module, method: str) -> Posterior:
    """A Laplace approximation at the model's weights."""
    return laplace_posterior(model, data, STRUCTURES[method], experiment.prior_precision)


def note_losses(curves: Curves, epoch: int, model: nn.Module, data: Images) -> None:
    """Add the mean losses of both halves at the model's weights."""
    losses = measure(model, data)
    curves.steps.append(epoch)
    curves.train_loss.append(losses.train.mean().item())
    curves.test_loss.append(losses.test.mean().item())
    curves.test_error.append(losses.test_error)
    curves.test_accuracy.append(losses.right.mean().item())
