"""What sensitivities cost in time and memory, as multiples of the training step that they come from.

    python -m benchmarks.sensitivity_cost [--data-root ROOT] [--smoke]

Time: medians over interleaved rounds in one process, for one and two threads; the unit is one plain forward and
backward pass of the same unwatched model on the same batch. "live" rows include the training step's own forward and
backward pass; "sweep" is the whole pass over a batch at the mean. Memory: the peak of two calls over what there was
before, model, data and posterior among it, in a process of its own with one thread.

How the same is computed without vlearn, each on the number of examples at a time that it is fastest with, of those
tried; the time is scaled to the batch, the memory is that of these few:

    vmap(grad)      every example's gradient, then its product with the posterior variance: the self-influence
    vmap(jacrev)    every example's Jacobian, then diag(J Σ Jᵀ), the published code of the memory-perturbation paper
    laplace-torch   the functional variance V, then V e, by the fastest of its back ends

Where Fashion-MNIST is there (`benchmarks.problems.images`), also the sweep of its 60,000 training images with LeNet-5.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import vlearn
from benchmarks.cost.memory import MIB, in_fresh_process, peak, start_of_peak
from benchmarks.cost.passes import PLAIN, VLEARN, Build, Subject, plain
from benchmarks.cost.timing import medians
from benchmarks.problems import images as datasets
from benchmarks.problems.images import Images
from benchmarks.problems.networks import LanguageModel, lenet5, mlp, resnet20_frn
from benchmarks.reference.peers import GRADIENTS, JACOBIANS, LAPLACE, PEERS
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import Advance, print_table, progress

WHOLE = "whole data set"
PEER_ROUNDS = 3


ALL_THREE = {GRADIENTS: (8, 32), JACOBIANS: (1, 4, 16), LAPLACE: (1, 4, 16)}
SUBJECTS = (
    Subject("MLP 784-500-300-10", partial(mlp, 784, 500, 300, 10), batch=256, rounds=41, tried=ALL_THREE),
    Subject("LeNet-5", lenet5, batch=256, rounds=31, tried=ALL_THREE),
    Subject("ResNet-20-FRN", resnet20_frn, 32, 9, {GRADIENTS: (4, 8), JACOBIANS: (1, 4)}, size=(3, 32, 32)),
    # The Jacobian of one sequence has 64 x 256 rows of a million entries.
    Subject("GPT, 1M", LanguageModel, batch=16, rounds=11, tried={GRADIENTS: (2, 8)}, tokens=64),
)


class Method(NamedTuple):
    """A way to compute something, `settings` in words, on so many examples at a time."""

    name: str
    build: Build
    examples: int
    settings: str = ""


def methods(subject: Subject) -> Iterator[Method]:
    """All that is compared; the ways without vlearn are at their best settings."""
    for name, build in {PLAIN: plain, **VLEARN}.items():
        yield Method(name, build, subject.batch)
    for name, counts in subject.tried.items():
        if name == LAPLACE and importlib.util.find_spec("laplace") is None:
            continue
        tried = {
            seconds_per_example(subject, build, n): Method(name, build, n, f"{variant}{n} at a time")
            for variant, build in PEERS[name].items()
            for n in dict.fromkeys(min(n, subject.batch) for n in counts)
        }
        yield tried[min(tried)]


def seconds_per_example(subject: Subject, build: Build, examples: int) -> float:
    """Seconds of a call after a first one, by example."""
    call = build(subject, examples)
    call()
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) / examples


def times(subject: Subject, compared: list[Method]) -> dict[str, float]:
    """Milliseconds of a plain step, and multiples of it of everything for the whole batch."""
    own = {method.name: method.build(subject, method.examples) for method in compared if not method.settings}
    seconds = medians(own, subject.rounds)
    for method in compared:
        if method.settings:
            per_call = medians({"": method.build(subject, method.examples)}, PEER_ROUNDS)[""]
            seconds[method.name] = per_call * subject.batch / method.examples
    base = seconds.pop(PLAIN)
    return {"plain step, ms": 1e3 * base} | {name: value / base for name, value in seconds.items()}


def peak_memory(subject: Subject, method: Method) -> float:
    """MiB of peak memory; it is to be called in a fresh process."""
    torch.set_num_threads(1)
    method.build(subject, min(2, method.examples))()  # libraries keep what they load
    call = method.build(subject, method.examples)
    before = start_of_peak()
    call()
    call()
    return (peak() - before) / MIB


def whole_data_set(images: Images, threads: int) -> dict[str, float]:
    """The sweep of all training images with LeNet-5; it is to be called in a fresh process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = lenet5()
    posterior = vlearn.IVON(model.named_parameters(), lr=0.1, ess=len(images.y), hess_init=0.1).posterior()
    batches = list(zip(images.x.split(256), images.y.split(256), strict=True))
    vlearn.sweep(model, posterior, batches[:2], F.cross_entropy, leverage=None, progress=False)
    before, start = start_of_peak(), time.perf_counter()
    for x, y in batches:
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
    middle = time.perf_counter()
    vlearn.sweep(model, posterior, batches, F.cross_entropy, leverage=None, progress=False)
    end = time.perf_counter()
    return {
        "images": len(images.y),
        "plain forward + backward, s": middle - start,
        "sweep with LOO, s": end - middle,
        "peak, MiB": (peak() - before) / MIB,
    }


Table = dict[str, dict[str, float]]  # by network, then by method


def draw(record: dict[str, Any], path: Path) -> None:
    """Bars on logarithmic axes; each network has a column of panels, with time above memory."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    multiples, memory = record["multiples"]["threads=1"], record["memory, MiB"]
    figure = plt.figure(figsize=(13, 6), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    rows = (
        (upper, multiples, [*VLEARN, *PEERS], "time in multiples of a plain forward + backward pass, one thread"),
        (lower, memory, [PLAIN, *VLEARN, *PEERS], "peak memory, MiB; of the others, of so many examples at a time"),
    )
    for part, table, names, label in rows:
        panels = part.subplots(1, len(table), sharex=True, sharey=True)
        part.supxlabel(label, fontsize=9)
        for panel, (network, values) in zip(panels, table.items(), strict=True):
            there = [name for name in names if name in values]
            colors = ["0.6" if name == PLAIN else "#0072B2" if name in VLEARN else "#D55E00" for name in there]
            bars = panel.barh(
                [names.index(name) for name in there], [values[name] for name in there], 0.72, color=colors
            )
            settings = record["settings"][network] if table is memory else {}
            counts = [f" ({settings[name].split(', ')[-1]})" if name in settings else "" for name in there]
            texts = [f"{values[name]:.3g}{count}" for name, count in zip(there, counts, strict=True)]
            panel.bar_label(bars, texts, fontsize=8, padding=2)
            panel.set_xscale("log")
            panel.set_yticks(range(len(names)), names)
            panel.tick_params(labelsize=8)
            panel.tick_params(axis="y", length=0)
            panel.spines[["top", "right"]].set_visible(False)
            if table is multiples:
                panel.set_title(network, fontsize=10)
                panel.axvline(1, color="0.4", linewidth=0.8)
        panels[0].invert_yaxis()
        shown = [values[name] for values in table.values() for name in names if name in values]
        panels[0].set_xlim(0.7 * min(shown), (6 if table is multiples else 25) * max(shown))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_tables(record: dict[str, Any]) -> None:
    """Print a table of times for each number of threads, one of memory and one of the whole data set."""
    tables = {f"Multiples of one plain forward + backward pass, {key}": t for key, t in record["multiples"].items()}
    tables["Peak memory of a call, MiB"] = record["memory, MiB"]
    notes = [f"{n}: " + "; ".join(f"{m} {how}" for m, how in ways.items()) for n, ways in record["settings"].items()]
    for title, table in tables.items():
        names = dict.fromkeys(name for values in table.values() for name in values)
        cells = [[name, *(_cell(values.get(name)) for values in table.values())] for name in names]
        print_table(title, ["", *(f"{name}, batch {record['batch'][name]}" for name in table)], cells, notes)
        notes = []
    if WHOLE in record:
        rows = [[name, _cell(value)] for name, value in record[WHOLE].items()]
        print_table("LeNet-5 on Fashion-MNIST, two threads, batches of 256", ["", ""], rows)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, help="folder of the data sets")
    parser.add_argument(
        "--smoke", action="store_true", help="a few rounds on tiny batches of two networks; nothing is written"
    )
    arguments = parser.parse_args(argv)
    subjects = SUBJECTS
    if arguments.smoke:
        few = {GRADIENTS: (2,), JACOBIANS: (1,), LAPLACE: (1,)}
        subjects = [
            replace(s, batch=max(2, s.batch // 16), rounds=2, tried={name: few[name] for name in s.tried})
            for s in SUBJECTS[1::2]
        ]
    before = torch.get_num_threads()
    try:
        with progress() as said:
            record = measured(subjects, (1,) if arguments.smoke else (1, 2), said)
            if not arguments.smoke:
                said("Fashion-MNIST, the whole training set")
                record |= with_images(arguments.data_root, said)
    finally:
        torch.set_num_threads(before)
    print_tables(record)
    if not arguments.smoke:
        command = "python -m benchmarks.sensitivity_cost"
        write_json(RESULTS / "sensitivity_cost.json", {**provenance(command, 0), **record})
        draw(record, RESULTS / "sensitivity_cost.png")


def measured(subjects: Sequence[Subject], threads: Sequence[int], said: Advance) -> dict[str, Any]:
    """Times by the number of threads, and peak memory, of all that is compared on every subject."""
    torch.set_num_threads(1)
    compared: dict[str, list[Method]] = {}
    for subject in subjects:
        said(f"{subject.name}: best settings of the others")
        compared[subject.name] = list(methods(subject))
    multiples: dict[str, Table] = {}
    for count in threads:
        torch.set_num_threads(count)
        table = multiples[f"threads={count}"] = {}
        for subject in subjects:
            said(f"{subject.name}, {count} threads")
            table[subject.name] = times(subject, compared[subject.name])
    memory: Table = {subject.name: {} for subject in subjects}
    for subject in subjects:
        for method in compared[subject.name]:
            said(f"{subject.name}, memory: {method.name}")
            memory[subject.name][method.name] = in_fresh_process(peak_memory, subject, method)
    return {
        "batch": {subject.name: subject.batch for subject in subjects},
        "settings": {name: {m.name: m.settings for m in ways if m.settings} for name, ways in compared.items()},
        "multiples": multiples,
        "memory, MiB": memory,
    }


def with_images(root: Path | None, said: Advance) -> dict[str, Any]:
    """The entry of the whole data set; none where it is not there."""
    try:
        images = datasets.load("fashion-mnist", root)
    except FileNotFoundError as error:
        said(f"left out: {error}")
        return {}
    return {WHOLE: in_fresh_process(whole_data_set, images, 2)}


if __name__ == "__main__":
    main()
