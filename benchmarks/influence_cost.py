"""What the influence of every training example on many test examples costs, beside a sweep of the training examples.

    python -m benchmarks.influence_cost [--data-root ROOT] [--smoke]

LeNet-5 after an epoch on Fashion-MNIST, two threads. Seconds of a sweep of the 60,000 training images with
leave-one-out losses, of `vlearn.influence` on 1,000 test images with all values, and with the ten largest of each test
image alone; and the peak of each in memory over what there was before, model, data and posterior among it. The
posterior of each structure is fitted and used in a process of its own, which also takes the time of the products of
all training with all test gradients, as matrices that are there already.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from benchmarks.cost.memory import MIB, in_fresh_process, peak, start_of_peak
from benchmarks.problems.batches import Batches, batches
from benchmarks.problems.images import Images, load
from benchmarks.problems.networks import digits_cnn, lenet5
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table, progress
from benchmarks.training.loop import training_step

STRUCTURES = ("kronecker", "eigenvalue-corrected", "diagonal")
SWEEP, ALL, LARGEST, PRODUCTS = "sweep", "influence, all values", "influence, ten largest", "products alone"
BATCH = 250
WEIGHT_DECAY = 1e-4

Costs = dict[str, dict[str, float]]  # of each call


def costs(structure: str, build: Callable[[], nn.Module], images: Images) -> Costs:
    """Seconds and MiB of peak memory of a sweep and of the influences; it is to be called in a fresh process."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = build()
    train, test = batches(images.x, images.y, BATCH), batches(images.x_test, images.y_test, BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=WEIGHT_DECAY)
    for x, y in train:
        training_step(optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
    posterior = vlearn.posterior.fit(
        model, train, F.cross_entropy, structure, prior_precision=optimizer, progress=False
    )
    influence = partial(vlearn.influence, model, posterior)
    calls: dict[str, Callable[[Batches, Batches], Any]] = {
        SWEEP: lambda train, _: vlearn.sweep(model, posterior, train, F.cross_entropy, leverage=None, progress=False),
        ALL: lambda train, test: influence(train, test, F.cross_entropy, progress=False),
        LARGEST: lambda train, test: influence(train, test, F.cross_entropy, top_k=10, progress=False),
        PRODUCTS: lambda train, test: products(sum(p.numel() for p in model.parameters()), train, test),
    }
    found: Costs = {}
    for name, call in calls.items():
        call(train[:1], test[:1])
        before, start = start_of_peak(), time.perf_counter()
        call(train, test)
        found[name] = {"seconds": time.perf_counter() - start, "peak, MiB": (peak() - before) / MIB}
    return found


def products(parameters: int, train: Batches, test: Batches) -> None:
    """Matrix products of the size of those of all training with all test gradients, P entries each."""
    of_train, of_test = torch.ones(BATCH, parameters), torch.ones(sum(len(y) for _, y in test), parameters)
    for _, y in train:
        of_train[: len(y)] @ of_test.mT


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder of Fashion-MNIST")
    parser.add_argument("--smoke", action="store_true", help="a small network on the digits; nothing is written")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        name, build, images = "digits", digits_cnn, load("digits").first(500, 50)
    else:
        name, build, images = "LeNet-5", lenet5, load("fashion-mnist", arguments.data_root).first(60_000, 1_000)
    found: dict[str, Costs] = {}
    with progress() as said:
        for structure in STRUCTURES:
            said(structure)
            found[structure] = in_fresh_process(costs, structure, build, images)
    rows = [
        [
            f"{structure}: {what}",
            f"{cost['seconds']:.1f}",
            f"{cost['seconds'] / by_call[SWEEP]['seconds']:.2f}",
            f"{cost['peak, MiB']:.0f}",
        ]
        for structure, by_call in found.items()
        for what, cost in by_call.items()
    ]
    title = f"{name}, {len(images.y):,} training and {len(images.y_test):,} test examples"
    print_table(title, ["", "seconds", "sweeps", "peak, MiB"], rows)
    if not arguments.smoke:
        counts = {"train": len(images.y), "test": len(images.y_test)}
        command = "python -m benchmarks.influence_cost"
        write_json(RESULTS / "influence_cost.json", {**provenance(command, 0), **counts, "costs": found})


if __name__ == "__main__":
    main()
