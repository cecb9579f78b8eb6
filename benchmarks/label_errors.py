"""Which score finds wrong labels, and at what cost.

    python -m benchmarks.label_errors [--experiments cifar-10n-random1 ...] [--seeds 3] [--data-root ROOT]
    python -m benchmarks.label_errors --smoke    # a few seconds on digits

Each network is trained on labels of which some are wrong, by SGD, AdamW, IVON and EVON, and `vlearn.Recorder` watches
it: each example's loss and margin averaged over the training steps themselves (the margin's average is the area under
the margin, Pleiss et al., 2020), and the score that `vlearn.label_issues` takes by default, the average loss times the
average probability of the most probable other class. At the end a sweep gives the loss at the mean, the leave-one-out
loss and the self-influence, from the optimizer's own posterior or, after SGD and AdamW, from an EK-FAC fit. Beside them
is the recipe of cleanlab: five networks by SGD, each on four fifths of the examples, and the quality of every label by
the probabilities of the network that has not seen it. Times are the processor's, over all threads, so that other work
does not count.

The labels: CIFAR-10N's human ones of the first 10,000 images (`--data-root` with cifar-10n/cifar10n_labels.npz), and
drawn ones of Fashion-MNIST and of the digits, any other class or one that the class is taken for.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import vlearn
from benchmarks.problems import networks
from benchmarks.problems.batches import batches
from benchmarks.problems.images import Images
from benchmarks.problems.noisy_labels import given_labels
from benchmarks.report import experiments
from benchmarks.report.records import over_seeds
from benchmarks.report.terminal import Advance, print_table
from benchmarks.training.checkpoint import Checkpoint, kept, set_training_state, training_state
from benchmarks.training.supervised import steps
from vlearn.plot.style import BLUE, GREEN, GREY, INK, VERMILLION, tidy

FOLDS = "SGD, five folds"
MEASURES = ("average_precision", "auroc", "precision_at_count")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """One network, its training, and its labels.

    Attributes:
        noise, share: see `given_labels`.
    """

    title: str
    dataset: str
    noise: str
    network: str
    epochs: int
    share: float = 0.2
    num_data: int | None = 10_000
    num_test: int | None = None
    batch: int = 100
    prior_precision: float = 1.0
    folds: int = 5

    def cut(self, epochs: int) -> Experiment:
        """The same, shorter."""
        return dataclasses.replace(self, epochs=epochs)


def _human(name: str, label: str) -> Experiment:
    return Experiment(f"CIFAR-10N, {name}", "cifar-10", label, "cifar_cnn", 25, share=0.0)


def _fashion(name: str, noise: str) -> Experiment:
    return Experiment(f"Fashion-MNIST, {name}", "fashion-mnist", noise, "lenet5", 25)


def _digits(name: str, noise: str) -> Experiment:
    return Experiment(f"digits, {name}", "digits", noise, "digits_cnn", 40, num_data=1000, batch=50)


EXPERIMENTS = {
    "digits-symmetric": _digits("20% any other class", "symmetric"),
    "digits-pairs": _digits("20% of similar classes", "pairs"),
    "fashion-mnist-symmetric": _fashion("20% any other class", "symmetric"),
    "fashion-mnist-pairs": _fashion("20% of similar classes", "pairs"),
    "cifar-10n-aggregate": _human("majority of three", "aggre_label"),
    "cifar-10n-random1": _human("first annotator", "random_label1"),
    "cifar-10n-random2": _human("second annotator", "random_label2"),
    "cifar-10n-random3": _human("third annotator", "random_label3"),
    "cifar-10n-worst": _human("worst of three", "worse_label"),
}
SMOKE = Experiment("400 of the digits", "digits", "symmetric", "digits_cnn", 3, num_data=400, batch=50, folds=2)


METHODS: dict[str, Callable[[nn.Module, Experiment, int], Any]] = {
    "SGD": lambda model, experiment, count: torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=experiment.prior_precision / count
    ),
    "AdamW": lambda model, experiment, count: torch.optim.AdamW(model.parameters(), lr=2e-3),
    "IVON": lambda model, experiment, count: vlearn.IVON(
        model, lr=0.1, ess=count, weight_decay=experiment.prior_precision / count
    ),
    "EVON": lambda model, experiment, count: vlearn.EVON(
        model, lr=2.0, ess=count, weight_decay=experiment.prior_precision / count
    ),
}


class Run:
    """One network in training on a part of the examples, which goes on from the last epoch that was saved.

    Args:
        places: ``[n]`` which examples.
        name: of its files in the folder.
        recorded: whether it is watched.
    """

    def __init__(
        self,
        experiment: Experiment,
        method: str,
        data: TensorDataset,
        places: Tensor,
        seed: int,
        folder: Path,
        name: str,
        recorded: bool = True,
    ):
        torch.manual_seed(seed)
        self.model = networks.build(experiment.network).to(data.tensors[0].device)
        total = steps(len(places), experiment.epochs, experiment.batch)
        self.optimizer = METHODS[method](self.model, experiment, len(places))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, total)
        self.order = torch.Generator().manual_seed(seed)
        part = Subset(data, places.tolist())
        self.loader = DataLoader(part, experiment.batch, shuffle=True, generator=self.order)
        self.epochs, self.seconds = experiment.epochs, []
        settings = {**dataclasses.asdict(experiment), "method": method, "seed": seed, "places": places.tolist()}
        self.checkpoint = Checkpoint(folder / f"{name}.pt", settings)
        saved = self.checkpoint.load()
        self.recorder = None
        if recorded:
            path = folder / f"{name}-record"
            self.recorder = vlearn.Recorder(path, self.model, dataset=data, overwrite=saved is None)
        if saved is not None:
            set_training_state(saved, self.model, self.optimizer, self.schedule, self.order)
            self.seconds = saved["seconds"]
            if self.recorder is not None:
                self.recorder.load_state_dict(saved["recorder"])

    def train(self, advance: Callable[[int], None]) -> None:
        """Train what is left of the epochs."""
        for epoch in range(len(self.seconds) + 1, self.epochs + 1):
            began = time.process_time()
            self.epoch(self.loader if self.recorder is None else self.recorder.follow(self.loader))
            self.seconds.append(time.process_time() - began)
            self.checkpoint.save(
                {
                    **training_state(self.model, self.optimizer, self.schedule, self.order),
                    "seconds": self.seconds,
                    "recorder": None if self.recorder is None else self.recorder.state_dict(),
                }
            )
            advance(epoch)
        if hasattr(self.optimizer, "unwatch"):
            self.optimizer.unwatch()
        self.model.eval()

    def epoch(self, loader: Any) -> None:
        """Train one epoch."""
        self.model.train()
        for x, y in loader:
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.schedule.step()


def measure(
    experiment: Experiment, method: str, images: Images, root: Path | None, seed: int, runs: Path, advance: Advance
) -> dict[str, Any]:
    """Scores of one training run: each one's measures, and what the run took."""
    given = given_labels(images, experiment.noise, experiment.share, seed, root).to(images.y.device)
    wrong = (given != images.y).cpu().numpy()
    data = TensorDataset(images.x, given)
    if method == FOLDS:
        return _measure_folds(experiment, data, wrong, seed, runs, advance)
    everything = torch.arange(len(given))
    run = Run(experiment, method, data, everything, seed, runs, f"{method}-{seed}")
    run.train(lambda epoch: advance(f"{experiment.title}: {method}, seed {seed}, epoch {epoch}/{experiment.epochs}"))
    assert run.recorder is not None
    record = run.recorder.record
    began = time.process_time()
    loader = batches(images.x, given)
    own = getattr(run.optimizer, "posterior", None)
    prior = experiment.prior_precision
    fit = partial(vlearn.posterior.fit, structure="eigenvalue-corrected", prior_precision=prior, progress=False)
    posterior = fit(run.model, loader, F.cross_entropy) if own is None else own()
    table = vlearn.sweep(run.model, posterior, loader, F.cross_entropy, None, progress=False)
    swept = time.process_time() - began
    issues = vlearn.label_issues(record)
    contested = np.empty(len(given))
    contested[issues.numbers] = issues.score
    scores = {
        "contested loss, live": contested,
        "loss, live": record.column("loss"),
        "margin, live (AUM)": -record.column("margin"),
        "loss, at the end": table.loss.numpy(),
        "leave-one-out loss": table.loo_loss.numpy(),
        "self-influence": table.self_influence.numpy(),
    }
    trained = float(np.sum(run.seconds))
    seconds = {name: trained + (0 if "live" in name else swept) for name in scores}
    with torch.no_grad():
        output = torch.cat([run.model(x) for x in images.x_test.split(500)])
    true, is_wrong = images.y.cpu().numpy()[issues.numbers], wrong[issues.numbers]
    return {
        "scores": {name: _measures(score, wrong, seconds[name]) for name, score in scores.items()},
        "run": {
            "test_loss": float(F.cross_entropy(output, images.y_test)),
            "accuracy": float((output.argmax(1) == images.y_test).float().mean()),
            "wrong": float(wrong.sum()),
            "wrong_share": float(wrong.mean()),
            "expected": float("nan") if issues.count is None else float(issues.count),
            "right_suggestions": float(np.mean(issues.suggested[is_wrong] == true[is_wrong])),
        },
    }


def _measure_folds(
    experiment: Experiment, data: TensorDataset, wrong: np.ndarray, seed: int, runs: Path, advance: Advance
) -> dict[str, Any]:
    """cleanlab's recipe: label quality by networks that have not seen the example."""
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    x, given = data.tensors
    parts = torch.randperm(len(given), generator=torch.Generator().manual_seed(seed)).chunk(experiment.folds)
    probabilities = torch.zeros(len(given), int(given.max()) + 1)
    seconds = 0.0
    for fold, part in enumerate(parts):
        rest = torch.cat([other for other in parts if other is not part])
        name = f"{FOLDS}-{seed}-{fold}"
        run = Run(experiment, "SGD", data, rest, seed, runs, name, recorded=False)
        said = f"{experiment.title}: fold {fold + 1}/{experiment.folds}, seed {seed}, epoch "
        run.train(lambda epoch, said=said: advance(f"{said}{epoch}/{experiment.epochs}"))
        seconds += float(np.sum(run.seconds))
        with torch.no_grad():
            for rows in part.split(500):
                probabilities[rows] = run.model(x[rows.to(x.device)]).softmax(1).cpu()
    labels, of_all = given.cpu().numpy(), probabilities.double().numpy()
    of_all /= of_all.sum(1, keepdims=True)
    quality = get_label_quality_scores(labels, of_all)
    issues = find_label_issues(labels, of_all, n_jobs=1)
    return {
        "scores": {"cleanlab's label quality": _measures(-quality, wrong, seconds)},
        "run": {"wrong": float(wrong.sum()), "expected": float(np.sum(issues))},
    }


def _measures(score: np.ndarray, wrong: np.ndarray, seconds: float) -> dict[str, float]:
    """How well a score, high where a label is likely wrong, finds the wrong ones."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    score = np.nan_to_num(score.astype(np.float64), nan=-np.inf, posinf=np.finfo(np.float64).max)
    score = np.maximum(score, np.finfo(np.float64).min)
    first = np.argsort(-score, kind="stable")[: wrong.sum()]
    return {
        "average_precision": float(average_precision_score(wrong, score)),
        "auroc": float(roc_auc_score(wrong, score)),
        "precision_at_count": float(wrong[first].mean()),
        "seconds": seconds,
    }


def cost(experiment: Experiment, images: Images, runs: Path) -> float:
    """How many times as long an epoch by SGD takes that is recorded: the least of three each, by turns."""
    data, everything = TensorDataset(images.x, images.y), torch.arange(len(images.y))
    times: dict[bool, list[float]] = {False: [], True: []}
    made = {
        recorded: Run(experiment, "SGD", data, everything, 0, runs, f"cost-{recorded}", recorded) for recorded in times
    }
    for _ in range(3):
        for recorded, run in made.items():
            began = time.process_time()
            run.epoch(run.loader if run.recorder is None else run.recorder.follow(run.loader))
            times[recorded].append(time.process_time() - began)
    return min(times[True]) / min(times[False])


def run_experiment(
    root: Path | None, experiment: Experiment, data: Images, seeds: int, runs: Path, advance: Advance
) -> dict[str, Any]:
    """Every method and seed."""
    table: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for method in (*METHODS, FOLDS):
        found = []
        for seed in range(seeds):
            settings = {**dataclasses.asdict(experiment), "method": method, "seed": seed}
            work = partial(measure, experiment, method, data, root, seed, runs, advance)
            found.append(kept(runs / f"{method}-{seed}-scores.pt", settings, work))
        table[method] = {score: over_seeds([each["scores"][score] for each in found]) for score in found[0]["scores"]}
        about[method] = over_seeds([each["run"] for each in found])
    settings = dataclasses.asdict(experiment)
    return {
        "table": table,
        "runs": about,
        "record_cost": kept(runs / "cost.pt", settings, lambda: cost(experiment, data, runs)),
    }


def draw(record: dict[str, Any]) -> Figure:
    """Average precision of each score, by the optimizer that trained."""
    looks = {
        "SGD": (GREY, "s"),
        "AdamW": (GREEN, "^"),
        "IVON": (BLUE, "o"),
        "EVON": (INK, "D"),
        FOLDS: (VERMILLION, "v"),
    }
    scores = list(dict.fromkeys(score for rows in record["table"].values() for score in rows))
    figure, panel = pyplot.subplots(figsize=(7.2, 3.6))
    for place, (method, rows) in enumerate(record["table"].items()):
        color, marker = looks[method]
        heights = [scores.index(score) + 0.12 * (place - 1.5) * (method != FOLDS) for score in rows]
        means = [row["mean"]["average_precision"] for row in rows.values()]
        errors = [row["deviation"]["average_precision"] for row in rows.values()]
        panel.errorbar(means, heights, xerr=errors, fmt=marker, color=color, label=method, capsize=2, markersize=6)
    by_chance = record["runs"]["SGD"]["mean"]["wrong_share"]
    panel.axvline(by_chance, color=GREY, linewidth=1, linestyle=":")
    panel.set_yticks(range(len(scores)), scores)
    panel.invert_yaxis()
    tidy(panel, "average precision", "")
    panel.legend(frameon=False, fontsize=9)
    panel.set_title(record["experiment"]["title"], fontsize=12)
    figure.tight_layout()
    return figure


def print_results(record: dict[str, Any]) -> None:
    """Print the means and deviations over the seeds."""
    rows = []
    for method, scores in record["table"].items():
        about = record["runs"][method]["mean"]
        for place, (score, row) in enumerate(scores.items()):
            expected = "?" if math.isnan(about["expected"]) else f"{about['expected']:.0f}"
            counted = f"{expected} of {about['wrong']:.0f}" if place == 0 else ""
            numbers = [f"{row['mean'][name]:.3f}" for name in MEASURES]
            numbers[0] += f" ± {row['deviation'][MEASURES[0]]:.3f}"
            accuracy = f"{about['accuracy']:.1%}" if place == 0 and "accuracy" in about else ""
            rows.append((f"{method}: {score}", *numbers, f"{row['mean']['seconds']:.0f}", counted, accuracy))
    measures = ("average\nprecision", "AUROC", "precision\nat count", "processor\nseconds")
    header = ("", *measures, "wrong,\ncounted", "accuracy")
    notes = [f"An epoch by SGD that is recorded takes {record['record_cost']:.2f} times as long."]
    print_table(f"Wrong labels: {record['experiment']['title']}", header, rows, notes)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 when everything was written, 130 when interrupted."""
    arguments = experiments.parser("label_errors", __doc__, EXPERIMENTS, seeds=3).parse_args(argv)
    chosen = experiments.chosen(arguments, EXPERIMENTS, SMOKE)
    work = partial(run_experiment, arguments.data_root)
    return experiments.run("label_errors", arguments, chosen, work, draw, print_results)


if __name__ == "__main__":
    sys.exit(main())
