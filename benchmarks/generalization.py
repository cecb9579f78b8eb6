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

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import vlearn
from benchmarks import data as datasets
from benchmarks import laplace, networks, pictures, report, resume, tracking
from benchmarks.data import Images
from benchmarks.pictures import Curves
from benchmarks.training import losses

RESULTS = Path(__file__).parent / "results" / "generalization"
IVON, DIAGONAL, KRONECKER = pictures.LOOKS
CHUNK = 500  # examples of a pass that only reads


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a curve depends on but the seed.

    Attributes:
        prior_precision: δ on the scale of the summed loss.
        lr, hess_init, beta2: IVON's; the rate falls to zero along a cosine.
        sgd_lr: first and last rate of SGD with momentum .9, along a cosine.
        recorded: epochs after which IVON's LOO loss is taken; `laplace` those for the fits; `mapped` those after
            which every example's row is kept, by IVON.
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
    # Fig. 1b on the first 10,000 images.
    "cifar-10": Experiment(
        title="10,000 of CIFAR-10, ResNet-20-FRN",
        dataset="cifar-10",
        network="resnet20_frn",
        epochs=40,
        batch=50,
        prior_precision=10.0,
        lr=0.2,
        hess_init=0.01,
        beta2=0.99999,
        sgd_lr=(1e-1, 1e-3),
        recorded=(1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 35, 40),
        laplace=(),
        mapped=(1, 10, 20, 40),
        num_data=10_000,
    ),
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
Advance = Callable[[str], None]


def train(
    experiment: Experiment, data: Images, seed: int, trainer: str, runs: Path, advance: Advance
) -> tuple[nn.Module, dict[str, Any]]:
    """One network by "IVON" or "SGD", its curves recorded along the way; goes on from the last epoch that was saved.

    Returns:
        The model at the end, and {"curves": Curves, "seconds": of training, by epoch}.
    """
    torch.manual_seed(seed)
    model = networks.build(experiment.network).to(data.x.device)
    steps = experiment.epochs * -(-len(data.y) // experiment.batch)
    optimizer, schedule = (ivon if trainer == "IVON" else sgd)(experiment, model, len(data.y), steps, seed)
    settings = {**dataclasses.asdict(experiment), "seed": seed, "trainer": trainer}
    checkpoint = resume.Checkpoint(runs / f"{data.name}-{len(data.y)}-{trainer}-seed{seed}.pt", settings)
    memory = vlearn.MemoryMap(len(data.y), memory_path(runs, data, seed)) if trainer == "IVON" else None
    found: dict[str, Any] = {"curves": Curves(), "seconds": []}
    order = torch.Generator().manual_seed(seed)
    done = 0
    if (saved := checkpoint.load()) is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        resume.set_random_state(saved["random"])
        order.set_state(saved["order"])
        found, done = saved["found"], saved["done"]
    if memory is not None:
        memory.rewind(done)
    for epoch in range(done + 1, experiment.epochs + 1):
        began = time.perf_counter()
        for index in torch.randperm(len(data.y), generator=order).split(experiment.batch):
            index = index.to(data.x.device)
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[index]), data.y[index]).backward()
            optimizer.step()
            schedule.step()
        found["seconds"].append(time.perf_counter() - began)
        record(experiment, data, epoch, model, optimizer, found["curves"])
        if memory is not None and epoch in experiment.mapped:
            table = vlearn.sweep(model, optimizer.posterior(), batches(data), F.cross_entropy, progress=False)
            memory.record_sweep(epoch, table, test_loss=found["curves"].test_loss[-1])
        checkpoint.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "random": resume.random_state(),
                "order": order.get_state(),
                "found": found,
                "done": epoch,
            }
        )
        advance(f"{data.name}, {trainer}, seed {seed}, epoch {epoch}/{experiment.epochs}")
    if isinstance(optimizer, vlearn.IVON):
        optimizer.unwatch()
    return model, found


def memory_path(runs: Path, data: Images, seed: int) -> Path:
    """Where IVON's rows of every example are, at the mapped epochs."""
    return runs / f"{data.name}-{len(data.y)}-memory-seed{seed}"


def ivon(experiment: Experiment, model: nn.Module, num_data: int, steps: int, seed: int) -> tuple[Any, Any]:
    optimizer = vlearn.IVON(
        model,
        lr=experiment.lr,
        ess=num_data,
        hess_init=experiment.hess_init,
        beta2=experiment.beta2,
        weight_decay=experiment.prior_precision / num_data,
    )
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)


def sgd(experiment: Experiment, model: nn.Module, num_data: int, steps: int, seed: int) -> tuple[Any, Any]:
    first, last = experiment.sgd_lr
    decay = experiment.prior_precision / num_data
    optimizer = torch.optim.SGD(model.parameters(), lr=first, momentum=0.9, weight_decay=decay)
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=last)


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
        table = vlearn.sweep(model, get(), batches(data), F.cross_entropy, leverage=None, progress=False)
        curves.seconds.setdefault(method, []).append(time.perf_counter() - began)
        curves.loo_loss.setdefault(method, []).append(table.loo_loss.double().mean().item())


def fitted(experiment: Experiment, data: Images, model: nn.Module, method: str) -> Any:
    """A Laplace approximation at the model's weights."""
    structure = {DIAGONAL: "diag", KRONECKER: "kron"}[method]
    la = laplace.fit(model, data.x, data.y, structure, experiment.prior_precision, batch=256)
    return vlearn.posterior.from_laplace(la)


def batches(data: Images, part: slice = slice(None)) -> list[tuple[Tensor, Tensor]]:
    return list(zip(data.x[part].split(CHUNK), data.y[part].split(CHUNK), strict=True))


@torch.no_grad()
def note_losses(curves: Curves, epoch: int, model: nn.Module, data: Images) -> None:
    """Add the mean losses of both halves at the model's weights."""
    model.eval()
    halves = []
    for x, y in ((data.x, data.y), (data.x_test, data.y_test)):
        output = torch.cat([model(rows) for rows in x.split(CHUNK)])
        halves.append((F.cross_entropy(output, y, reduction="none").double(), (output.argmax(1) == y).double()))
    model.train()
    (train_losses, _), (test_losses, right) = halves
    curves.steps.append(epoch)
    curves.train_loss.append(train_losses.mean().item())
    curves.test_loss.append(test_losses.mean().item())
    curves.test_error.append((test_losses.std() / len(test_losses) ** 0.5).item())
    curves.test_accuracy.append(right.mean().item())


def time_laplace(experiment: Experiment, data: Images, model: nn.Module) -> dict[str, dict[str, float]]:
    """Seconds of a fit, and of V e by laplace-torch itself for all examples, scaled up from a part of them."""
    seconds = {}
    part = slice(experiment.part)
    for method, structure in {DIAGONAL: "diag", KRONECKER: "kron"}.items():
        marks = [time.perf_counter()]
        la = laplace.fit(model, data.x, data.y, structure, experiment.prior_precision, batch=256)
        marks.append(time.perf_counter())
        laplace.deviation(la, data.x[part], data.y[part], batch=20)
        marks.append(time.perf_counter())
        fit, own = np.diff(marks)
        seconds[method] = {"fit": fit, "own_deviation_scaled": own * len(data.y) / min(experiment.part, len(data.y))}
    return seconds


def row(curves: Curves, method: str, seconds: Sequence[float]) -> dict[str, float]:
    """Numbers of one method in one run."""
    loo, test = np.array(curves.loo_loss[method]), np.array(curves.test_loss)
    return losses(curves, method) | {
        "spearman_over_epochs": float(np.corrcoef(np.argsort(np.argsort(loo)), np.argsort(np.argsort(test)))[0, 1]),
        "seconds_of_sensitivities": sum(curves.seconds[method]),
        "seconds_of_sensitivities_each": float(np.median(curves.seconds[method])),
        "seconds_of_training_epoch": float(np.median(seconds)),
    }


def over_seeds(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of every number over the seeds."""
    deviation = {name: float(np.std([r[name] for r in rows], ddof=1)) if len(rows) > 1 else 0.0 for name in rows[0]}
    return {"mean": {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}, "deviation": deviation}


def run_experiment(
    name: str, experiment: Experiment, seeds: int, root: Path | None, runs: Path, device: str, advance: Advance
) -> dict[str, Any]:
    """Every seed of one experiment."""
    data = datasets.load(experiment.dataset, root).first(experiment.num_data, experiment.num_test).to(device)
    trainers = ["IVON", *(["SGD"] if experiment.laplace else [])]
    curves: dict[str, list[Curves]] = {}
    rows: dict[str, list[dict[str, float]]] = {}
    own: dict[str, Any] = {}
    for seed in range(seeds):
        for trainer in trainers:
            model, found = train(experiment, data, seed, trainer, runs / name, advance)
            curves.setdefault(trainer, []).append(found["curves"])
            for each in found["curves"].loo_loss:
                rows.setdefault(each, []).append(row(found["curves"], each, found["seconds"]))
            if trainer == "SGD" and not seed:
                own = timed(experiment, data, model, seed, runs / name)
    return {
        "experiment": dataclasses.asdict(experiment),
        "remaining_weight_of_hess_init": experiment.beta2 ** (experiment.epochs * -(-len(data.y) // experiment.batch)),
        "table": {method: over_seeds(each) for method, each in rows.items()},
        "laplace_seconds": own,
        "curves": {trainer: [dataclasses.asdict(each) for each in found] for trainer, found in curves.items()},
    }


def timed(experiment: Experiment, data: Images, model: nn.Module, seed: int, runs: Path) -> dict[str, Any]:
    """`time_laplace`, once for the settings."""
    checkpoint = resume.Checkpoint(runs / "laplace-seconds.pt", {**dataclasses.asdict(experiment), "seed": seed})
    found = checkpoint.load()
    if found is None:
        found = time_laplace(experiment, data, model)
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
    for method, seconds in found["laplace_seconds"].items():
        notes.append(
            f"{method}, laplace-torch's own functional variance in place of the sweep: "
            f"{seconds['own_deviation_scaled']:.0f} s (scaled up), after a fit of {seconds['fit']:.0f} s."
        )
    report.print_table(f"Leave-one-out against test loss: {found['experiment']['title']}", header, lines, notes)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", nargs="+", choices=list(EXPERIMENTS), default=list(EXPERIMENTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="instead of each experiment's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs/generalization"), help="what is needed to go on")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="a few seconds on digits, not written to results/")
    arguments = parser.parse_args(argv)
    chosen = {"digits": SMOKE} if arguments.smoke else {name: EXPERIMENTS[name] for name in arguments.experiments}
    if arguments.epochs is not None:
        chosen = {name: experiment.cut(arguments.epochs) for name, experiment in chosen.items()}
    out = arguments.out or (arguments.runs / "smoke" if arguments.smoke else RESULTS)
    seeds = 1 if arguments.smoke else arguments.seeds
    for name, experiment in chosen.items():
        settings = {**dataclasses.asdict(experiment), "seeds": seeds}
        with tracking.tracked("vlearn-generalization", arguments.runs, settings) as (run, said):
            try:
                with report.progress() as advance:
                    found = run_experiment(
                        name, experiment, seeds, arguments.data_root, arguments.runs, arguments.device, advance
                    )
            except KeyboardInterrupt:
                print("\nInterrupted: the same command goes on after the last whole epoch.", file=sys.stderr)
                return 130
            command = f"python -m benchmarks.generalization --experiments {name} --seeds {seeds}"
            out.mkdir(parents=True, exist_ok=True)
            report.write_json(out / f"{name}.json", {**report.provenance(command, 0), **found})
            draw(found).savefig(out / f"{name}.png", dpi=144)
            print_results(found)
            print(said)
            if run:
                run.log({f"figures/{name}": tracking.image(out / f"{name}.png")})
                run.summary.update({"table": found["table"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
