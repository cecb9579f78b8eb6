"""What fitting a posterior to a trained network costs, beside an epoch of its training and laplace-torch's fits.

    python -m benchmarks.fit_cost [--smoke]

Seconds for a whole data set of noise of the sizes of Fashion-MNIST, CIFAR-10 and a small text, two threads: an epoch of
SGD in the same minibatches; `vlearn.posterior.fit` in several structures, by one probe; and laplace-torch's
diagonal and Kronecker fits by the fastest of its back ends, ASDL, on part of the data and scaled up.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import vlearn
from benchmarks.cost.passes import Subject
from benchmarks.problems.networks import LanguageModel, lenet5, resnet20_frn
from benchmarks.reference import laplace
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import Advance, print_table, progress

STRUCTURES = ("diagonal", "kronecker", "eigenvalue-corrected", "last-layer-kronecker")
PEERS = {"laplace-torch, diagonal": "diag", "laplace-torch, Kronecker": "kron"}
ROUNDS = 3


@dataclass(frozen=True)
class Data:
    """A network, so many examples, and how many of them laplace-torch is timed on; 0: it refuses the network."""

    subject: Subject
    examples: int
    for_peers: int


DATA = (
    Data(Subject("LeNet-5", lenet5, batch=250, rounds=1), 60_000, 2_500),
    Data(Subject("ResNet-20-FRN", resnet20_frn, 50, 1, size=(3, 32, 32)), 1_000, 0),
    Data(Subject("GPT, 1M", LanguageModel, batch=16, rounds=1, tokens=64), 640, 0),
)
SMOKE = (Data(Subject("LeNet-5", lenet5, batch=50, rounds=1), 200, 100),)


def epoch(data: Data) -> Callable[[], None]:
    """An epoch of plain SGD."""
    model, batches = data.subject.model(), data.subject.batches(data.examples)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def call() -> None:
        for x, y in batches:
            optimizer.zero_grad()
            data.subject.loss(model(x), y).backward()
            optimizer.step()

    return call


def fitting(structure: str, data: Data) -> Callable[[], None]:
    """A fit by vlearn."""
    model, batches = data.subject.model(), data.subject.batches(data.examples)

    def call() -> None:
        vlearn.posterior.fit(model, batches, data.subject.loss, structure, progress=False)

    return call


def best_of(call: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest call after a first one."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def by_laplace(structure: str, data: Data) -> float:
    """Seconds of laplace-torch's fit of all examples, by its fastest back end (`laplace.fit`)."""
    model, (x, y) = data.subject.model(), data.subject.data(data.for_peers)
    return best_of(partial(laplace.fit, model, x, y, structure, 1.0), 1) * data.examples / data.for_peers


def measured(every: tuple[Data, ...], rounds: int, said: Advance) -> dict[str, dict[str, float]]:
    """Seconds by network and by what was done."""
    found: dict[str, dict[str, float]] = {}
    for data in every:
        name = data.subject.name
        said(f"{name}: an epoch of training")
        row = found[name] = {"an epoch of training": best_of(epoch(data), rounds)}
        for structure in STRUCTURES:
            said(f"{name}: {structure}")
            row[f"fit, {structure}"] = best_of(fitting(structure, data), rounds)
        for label, structure in PEERS.items() if data.for_peers and importlib.util.find_spec("laplace") else ():
            said(f"{name}: {label}")
            row[label] = by_laplace(structure, data)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="200 examples, once; nothing is written")
    smoke = parser.parse_args(argv).smoke
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with progress() as said:
            seconds = measured(SMOKE if smoke else DATA, 1 if smoke else ROUNDS, said)
    finally:
        torch.set_num_threads(before)
    for name, row in seconds.items():
        base = row["an epoch of training"]
        cells = [[what, f"{value:.2f}", f"{value / base:.2f}"] for what, value in row.items()]
        print_table(name, ["", "seconds", "epochs"], cells)
    if not smoke:
        write_json(RESULTS / "fit_cost.json", {**provenance("python -m benchmarks.fit_cost", 0), "seconds": seconds})


if __name__ == "__main__":
    main()
