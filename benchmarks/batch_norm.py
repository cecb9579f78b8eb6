"""What batch_norm="constant" is worth: its rows beside those in eval mode, what trains with it, and its cost.

    python -m benchmarks.batch_norm [--smoke]

The digits' CNN with a BatchNorm after each convolution. Rows: self-influences of all training examples at IVON's mean,
in minibatches of several sizes whose statistics are constants, beside a sweep in eval mode whose running statistics
were estimated again at the mean (torch.optim.swa_utils.update_bn). Training: the test accuracy after 30 epochs. Cost: a
step with 64 and 128 channels and 250 examples beside the plain forward and backward pass; medians, one thread.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import vlearn
from benchmarks.cost.timing import medians
from benchmarks.problems.digits import Digits, Settings
from benchmarks.report.agreement import agreement, spearman
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table

SETTINGS = Settings(epochs=30)
AT_THE_MEAN = 1e14  # ess of draws that are the mean
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "IVON": lambda model, **shared: vlearn.IVON(model, lr=0.2, hess_init=0.1, beta2=0.999, **shared),
    "VON": lambda model, **shared: vlearn.VON(model, lr=0.02, **shared),
    "VOGN": lambda model, **shared: vlearn.VOGN(model, lr=0.02, **shared),
    "KFACVON": lambda model, **shared: vlearn.KFACVON(model, lr=0.02, **shared),
}


def network(settings: Settings) -> nn.Sequential:
    """The CNN of the digits with BatchNorm."""
    first, second = settings.channels
    torch.manual_seed(settings.seed)
    return nn.Sequential(
        nn.Conv2d(1, first, 3, stride=2, padding=1),
        nn.BatchNorm2d(first),
        nn.ReLU(),
        nn.Conv2d(first, second, 3),
        nn.BatchNorm2d(second),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * second, 10),
    )


def trained(name: str, data: Digits, settings: Settings) -> tuple[nn.Sequential, Any]:
    """The network and its optimizer, at the mean, whose running statistics are those of the training data."""
    model = network(settings)
    shared = {"ess": settings.num_data, "weight_decay": settings.weight_decay, "batch_norm": "constant"}
    optimizer = OPTIMIZERS[name](model, **shared)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps)
    for minibatches in data.minibatches(settings):
        for index in minibatches:
            optimizer.zero_grad()
            F.cross_entropy(model(data.x[index]), data.y[index]).backward()
            optimizer.step()
            schedule.step()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # an average over all minibatches
    update_bn([(x,) for x in data.x.split(100)], model)
    return model, optimizer


def accuracy(model: nn.Module, data: Digits) -> float:
    """Of the mean on the test examples, in eval mode."""
    model.eval()
    with torch.no_grad():
        right = model(data.x_test).argmax(-1) == data.y_test
    model.train()
    return float(right.float().mean())


def live_rows(model: nn.Module, optimizer: vlearn.IVON, data: Digits, batch: int) -> Tensor:
    """Self-influences ``[N]`` in minibatches of this size, at the mean."""
    at_mean = vlearn.IVON(model, lr=0.0, ess=AT_THE_MEAN, num_data=optimizer.num_data, batch_norm="constant")
    at_mean.load_state_dict(optimizer.state_dict())
    for group in at_mean.param_groups:
        group.update(lr=0.0, ess=AT_THE_MEAN, num_data=optimizer.num_data)
    rows = []
    for x, y in zip(data.x.split(batch), data.y.split(batch), strict=True):
        at_mean.zero_grad()
        F.cross_entropy(model(x), y).backward()
        rows.append(at_mean.sensitivities().self_influence)
    at_mean.unwatch()
    return torch.cat(rows)


def rows(settings: Settings, data: Digits, batches: tuple[int, ...]) -> dict[str, dict[str, float]]:
    """Agreement of the rows with constants with those in eval mode, by batch."""
    model, optimizer = trained("IVON", data, settings)
    optimizer.unwatch()
    eval_mode = vlearn.sweep(
        model, optimizer.posterior(), [(data.x, data.y)], F.cross_entropy, leverage=None, progress=False
    ).self_influence.numpy()
    table = {}
    for batch in batches:
        live = live_rows(model, optimizer, data, batch).numpy()
        pearson, _ = agreement(live, eval_mode)
        ratio = float((live.sum() / eval_mode.sum()).item())
        table[str(batch)] = {"Pearson": pearson, "Spearman": spearman(live, eval_mode), "ratio of the sums": ratio}
    return table


def cost(settings: Settings, data: Digits, rounds: int) -> dict[str, float]:
    """Milliseconds of a pass over a minibatch of a wider network, and multiples of it."""
    settings = replace(settings, channels=(64, 128))
    x, y = data.x[:250], data.y[:250]

    def plain(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()

        return call

    def stepping(name: str, asks: bool) -> Callable[[], None]:
        model = network(settings)
        optimizer = OPTIMIZERS[name](model, ess=settings.num_data, batch_norm="constant")

        def call() -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if asks:
                optimizer.sensitivities()
            optimizer.step()

        return call

    seconds = medians(
        {
            "plain": plain(network(settings)),
            "IVON": stepping("IVON", False),
            "IVON with rows": stepping("IVON", True),
            "VOGN": stepping("VOGN", False),
            "VON": stepping("VON", False),
            "KFACVON": stepping("KFACVON", False),
        },
        rounds,
    )
    base = seconds.pop("plain")
    return {"plain, ms": 1e3 * base} | {name: value / base for name, value in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="two epochs of 200 examples; nothing is written")
    smoke = parser.parse_args(argv).smoke
    settings = replace(SETTINGS, epochs=2, num_data=200) if smoke else SETTINGS
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        data = Digits.load(settings)
        agreements = rows(settings, data, (10, 50) if smoke else (10, 50, 250, 1000))
        accuracies = {name: accuracy(trained(name, data, settings)[0], data) for name in OPTIMIZERS}
        times = cost(settings, data, 2 if smoke else 31)
    finally:
        torch.set_num_threads(before)
    measures = list(next(iter(agreements.values())))
    print_table(
        "Rows with constant statistics, beside those in eval mode",
        ["minibatch", *measures],
        [[name, *(f"{row[measure]:.3f}" for measure in measures)] for name, row in agreements.items()],
    )
    print_table("Test accuracy", ["", "%"], [[name, f"{100 * value:.1f}"] for name, value in accuracies.items()])
    print_table("Cost of a step", ["", "of a plain pass"], [[name, f"{value:.2f}"] for name, value in times.items()])
    if not smoke:
        content = {"agreement": agreements, "accuracy": accuracies, "cost": times}
        write_json(RESULTS / "batch_norm.json", {**provenance("python -m benchmarks.batch_norm", 0), **content})


if __name__ == "__main__":
    main()
