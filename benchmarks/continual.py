"""What prior=posterior and merge are worth: split digits, one task after the other, and sites that do not share data.

    python -m benchmarks.continual [--smoke]

Five tasks, 0 against 1 to 8 against 9, of 1,000 of scikit-learn's digits; a network of one hidden layer of six units
with two outputs for all tasks (even or odd), or with two for each, the task being told. Each optimizer learns them one
after the other, with its posterior as the next task's prior and without, and all at once; SGD, which has none, as the
reference. Sites: ten classes; IVON learns 200 digits, then two sites go on from that posterior as prior with 400 each,
of the classes 0 to 4 and 5 to 9; the average of their means and their merged posterior, beside all 800 at once. Test
accuracy of the mean, over the tasks; standard errors over three seeds. The settings are the same everywhere.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks.problems.digits import shuffled_digits
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table

TASKS, BATCH = 5, 50
# The Hessian must forget hess_init within a task: a prior of it would hold weights that no task has used.
DIAGONAL = {"lr": 0.1, "hess_init": 0.1, "beta2": 0.9999, "beta2_warmup": 10}
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "IVON": lambda model, count, prior: vlearn.IVON(model, ess=count, weight_decay=1 / count, prior=prior, **DIAGONAL),
    "VAdamW": lambda model, count, prior: vlearn.VAdamW(model, lr=3e-3, weight_decay=0, num_data=count, prior=prior),
    "EVON": lambda model, count, prior: vlearn.EVON(model, lr=5.0, ess=count, weight_decay=1 / count, prior=prior),
    "KFACVON": lambda model, count, prior: vlearn.KFACVON(
        model, lr=0.05, ess=count, weight_decay=1 / count, hess_init=0.1, beta2_warmup=5, beta2=0.999, prior=prior
    ),
    "FullVON": lambda model, count, prior: vlearn.FullVON(
        model, lr=0.1, ess=count, weight_decay=1 / count, hess_init=0.1, beta2_warmup=5, prior=prior
    ),
    "SGD": lambda model, count, prior: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
}


class Network(nn.Module):
    """One hidden layer, and two outputs, or two for each task."""

    def __init__(self, heads: int, units: int = 6):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, units), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(units, 2) for _ in range(heads))

    def forward(self, x: Tensor, task: int) -> Tensor:
        return self.heads[task % len(self.heads)](self.body(x))


def learn(model: nn.Module, optimizer: Any, tasks: Sequence[tuple[Tensor, Tensor, int | None]], epochs: int) -> None:
    """Train on the minibatches of all of these tasks in random order, each of one task."""
    for _ in range(epochs):
        split = [(task, index) for task in tasks for index in torch.randperm(len(task[0])).split(BATCH)]
        for place in torch.randperm(len(split)).tolist():
            (x, y, task), index = split[place]
            optimizer.zero_grad()
            output = model(x[index]) if task is None else model(x[index], task)
            F.cross_entropy(output, y[index]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, tasks: Sequence[tuple[Tensor, Tensor, int | None]]) -> float:
    """Of the mean, averaged over the tasks."""
    outputs = [model(x) if task is None else model(x, task) for x, _, task in tasks]
    return mean(float((f.argmax(1) == y).float().mean()) for f, (_, y, _) in zip(outputs, tasks, strict=True))


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,000 training and 797 test examples, split anew for each seed."""
    x, y = shuffled_digits()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    x, y = x[order] / 16, y[order]
    return (x[:1000], y[:1000]), (x[1000:], y[1000:])


def tasks_of(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, int | None]]:
    """The classes by twos, each to be told from the other."""
    return [(x[y // 2 == task], y[y // 2 == task] % 2, task) for task in range(TASKS)]


def one_after_the_other(name: str, heads: int, seed: int, epochs: int) -> dict[str, float]:
    """Accuracies of an optimizer without a prior, with its last posterior as prior, and on all tasks at once."""
    train, test = (tasks_of(*part) for part in digits(seed))
    results = {}
    for way in ("without", "with prior", "at once"):
        if name == "SGD" and way == "with prior":
            continue
        torch.manual_seed(seed)
        model, prior = Network(heads), None
        for stage in [train] if way == "at once" else [[task] for task in train]:
            optimizer = OPTIMIZERS[name](model, sum(len(x) for x, _, _ in stage), prior)
            learn(model, optimizer, stage, epochs)
            if way == "with prior":
                prior = optimizer.posterior().clone()
            if name != "SGD":
                optimizer.unwatch()
        results[way] = accuracy(model, test)
    return results


def sites(seed: int, epochs: int) -> dict[str, float]:
    """Accuracies on ten classes of two sites, of the average of their means, merged, and of all data at once."""
    (x, y), (x_test, y_test) = digits(seed)
    test = [(x_test, y_test, None)]
    torch.manual_seed(seed)
    start = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))

    def posterior(model: nn.Module, x: Tensor, y: Tensor, prior: Any) -> Any:
        optimizer = OPTIMIZERS["IVON"](model, len(x), prior)
        learn(model, optimizer, [(x, y, None)], epochs)
        learned = optimizer.posterior().clone()
        optimizer.unwatch()
        return learned

    prior = posterior(start, x[:200], y[:200], None)
    results = {"first 200": accuracy(start, test)}
    x, y = x[200:], y[200:]
    models = [copy.deepcopy(start) for _ in range(4)]
    parts = [y < 5, y >= 5]
    learned = [posterior(model, x[part], y[part], prior) for model, part in zip(models, parts, strict=False)]
    results["a site alone"] = mean(accuracy(model, test) for model in models[:2])
    with torch.no_grad():
        for name, p in models[2].named_parameters():
            p.copy_(torch.stack([each.mean[name] for each in learned]).mean(0))
    results["average"] = accuracy(models[2], test)
    models[2].load_state_dict(dict(vlearn.posterior.merge(learned).mean))
    results["merged"] = accuracy(models[2], test)
    posterior(models[3], x, y, prior)
    return results | {"all at once": accuracy(models[3], test)}


def over_seeds(runs: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard error of each result."""
    columns = {name: [run[name] for run in runs] for name in runs[0]}
    error = {name: stdev(c) / math.sqrt(len(c)) if len(c) > 1 else 0.0 for name, c in columns.items()}
    return {name: {"mean": mean(column), "error": error[name]} for name, column in columns.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="one epoch, one seed; nothing is written")
    smoke = parser.parse_args(argv).smoke
    seeds, epochs = (range(1), 1) if smoke else (range(3), 60)
    problems = {"one head": 1, "a head for each task": TASKS}
    continual = {
        problem: {
            name: over_seeds([one_after_the_other(name, heads, seed, epochs) for seed in seeds]) for name in OPTIMIZERS
        }
        for problem, heads in problems.items()
    }
    merging = over_seeds([sites(seed, epochs) for seed in seeds])

    def cell(result: dict[str, float] | None) -> str:
        return "" if result is None else f"{100 * result['mean']:.1f} ± {100 * result['error']:.1f}"

    ways = ("without", "with prior", "at once")
    for problem, rows in continual.items():
        table = [[name, *(cell(row.get(way)) for way in ways)] for name, row in rows.items()]
        print_table(f"Test accuracy in %, {problem}", ["", *ways], table)
    print_table("Two sites, test accuracy in %", list(merging), [[cell(result) for result in merging.values()]])
    if not smoke:
        content = {"continual": continual, "merging": merging}
        write_json(RESULTS / "continual.json", {**provenance("python -m benchmarks.continual", 0), **content})


if __name__ == "__main__":
    main()
