"""How well training data attribution predicts retraining: vlearn's influence beside what others use.

    python -m benchmarks.attribution [--tasks concrete fashion-mnist mnist fashion-mnist-n] [--by vlearn ...] [--smoke]

The linear datamodelling score (Park et al., 2023, arXiv:2303.14186): networks are retrained by SGD on random halves of
the examples, several times each; Spearman's correlation of each query's mean retrained loss with what the attributions
of the examples say, averaged over the queries, with a bootstrap interval over them. Then the rise of a query's loss
after retraining without its top 1%. Every method explains the same networks, trained by the same SGD on all the
examples; of its settings the one with the best score on a fifth of the queries is used, and the other queries are
scored. The tasks are those of ASTRA (Wang et al., 2025, arXiv:2507.14740).

What is retrained and attributed is kept under --runs: the same command goes on where it was, and more repeats or
packages are added to what is there. "cifar-10" wants an accelerator and is run only where it is named.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.attribution import methods, pictures, retraining, scores
from benchmarks.attribution.comparison import Comparison, trained
from benchmarks.attribution.tasks import ACCELERATOR, SMOKE, TASKS, Data, Task
from benchmarks.report import pictures as reports
from benchmarks.report import tracking
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import Advance, print_table, progress

TOLERANCE = 1e-6  # between a network that is trained in a batch and one that is trained alone, in float64


def run(task: Task, data: Data, arguments: argparse.Namespace, folder: Path, advance: Advance) -> dict[str, Any]:
    """The rows of one task."""
    subsets = scores.subsets(len(data.y), arguments.subsets)
    repeats = arguments.repeats or task.repeats
    retrained = retraining.retrained_losses(task, data, subsets, folder, advance, repeats)
    subjects = trained(task, data, arguments.networks, folder)
    count = min(arguments.queries, len(data.y_query))
    data, retrained = Data(data.x, data.y, data.x_query[:count], data.y_query[:count]), retrained[:, :, :count]
    comparison = Comparison(task, data, subjects, subsets, retrained, folder, advance)
    chosen = methods.of(arguments.by)
    rows = [comparison.row(method) for method in chosen]
    settings = {(row["by"], row["method"]): row["setting"] for row in rows}
    if arguments.networks > 1:
        rows += [
            comparison.row_of(method, settings[method.by, method.name], arguments.networks)
            for method in chosen
            if method.averaged
        ]
    return {
        "task": dataclasses.asdict(task),
        "subsets": arguments.subsets,
        "repeats": repeats,
        "queries": count,
        "threads": torch.get_num_threads(),
        "peers": {package: importlib.metadata.version(package) for package in arguments.by if package != "vlearn"},
        "ceiling": scores.ceiling(retrained) if repeats > 1 else None,
        "rows": rows,
        "removals": comparison.removals(rows, chosen),
    }


def show(record: dict[str, Any]) -> None:
    """Print both tables of one task."""
    lines = [
        (
            pictures.title(row),
            f"{row['score'][0]:.3f} [{row['score'][1]:.3f}, {row['score'][2]:.3f}]",
            ", ".join(_setting(name, value) for name, value in row["setting"].items()),
            f"{row['prepare, s']:.1f}",
            f"{row['query, ms']:.0f}",
            f"{row['memory, MiB']:.0f}",
        )
        for row in sorted(record["rows"], key=lambda row: -row["score"][0])
    ]
    notes = [f"{record['subsets']} subsets, {record['repeats']} retrainings each; 95% intervals over the queries."]
    if record["ceiling"] is not None:
        notes.append(f"A perfect prediction would reach {record['ceiling']:.3f}.")
    header = ("", "score", "setting", "prepare, s", "a query, ms", "memory, MiB")
    print_table(f"Linear datamodelling score: {record['task']['title']}", header, lines, notes)
    lines = [
        (f"{row['by']}: {row['method']}".removeprefix(": "), f"{row['rise']:.3f} ± {row['standard error']:.3f}")
        for row in record["removals"]
    ]
    print_table("Rise of a query's loss without its top 1%", ("", "rise"), lines)


def _setting(name: str, value: Any) -> str:
    return f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"


def check_batches(task: Task, data: Data) -> float:
    """The largest difference between weights trained in a batch of networks and alone, in float64.

    Raises:
        RuntimeError: if it is not that of rounding.
    """
    data = Data(*(each.double() if each.is_floating_point() else each for each in data))
    examples, seeds = scores.subsets(len(data.y), 3), [3, 4, 5]
    together, _ = retraining.train(task, data, examples, seeds)
    largest = 0.0
    for place, (own, seed) in enumerate(zip(examples, seeds, strict=True)):
        model = task.network(seed).double()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=task.lr, momentum=task.momentum, weight_decay=task.weight_decay
        )
        for index in retraining.batches(task, seed, len(own)):
            optimizer.zero_grad()
            task.loss(model(data.x[own[index]]), data.y[own[index]]).backward()
            optimizer.step()
        for name, alone in model.state_dict().items():
            largest = max(largest, float((together[name][place] - alone).abs().max()))
    if not largest < TOLERANCE:
        raise RuntimeError(f"networks trained in a batch differ by {largest} from those trained alone.")
    return largest


def chosen_tasks(arguments: argparse.Namespace) -> dict[str, Task]:
    """The tasks that are asked for; one that wants an accelerator is left out unless it is named."""
    if arguments.smoke:
        return {"digits": SMOKE}
    if arguments.tasks is not None:
        return {name: TASKS[name] for name in arguments.tasks}
    print(f"Left out, since they want an accelerator: {', '.join(ACCELERATOR)} (--tasks NAME runs them).")
    return {name: task for name, task in TASKS.items() if name not in ACCELERATOR}


def command(arguments: argparse.Namespace, name: str) -> str:
    """The command line that makes one task's numbers again."""
    parts = [f"python -m benchmarks.attribution --tasks {name} --subsets {arguments.subsets}"]
    parts += [f"--repeats {arguments.repeats}"] if arguments.repeats else []
    return " ".join(
        [*parts, f"--queries {arguments.queries} --networks {arguments.networks} --by {' '.join(arguments.by)}"]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tasks, write JSON and PNG of each, print its tables; 0, or 130 when interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--by", nargs="+", choices=list(methods.METHODS), help="packages, instead of all")
    parser.add_argument("--subsets", type=int, default=100, help="random halves of the examples")
    parser.add_argument("--repeats", type=int, help="retrainings of each, instead of the task's own")
    parser.add_argument("--queries", type=int, default=150, help="of those whose retrained losses are kept")
    parser.add_argument("--networks", type=int, default=3, help="that attributions are averaged over too")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--runs", type=Path, default=Path("runs") / "attribution", help="what is needed to go on")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--smoke", action="store_true", help="seconds on digits; not written to results/")
    arguments = parser.parse_args(argv)
    if arguments.smoke:
        arguments.subsets, arguments.networks = 8, 2
        arguments.by = arguments.by or methods.installed()
    arguments.by = arguments.by or list(methods.METHODS)
    try:
        methods.of(arguments.by)
    except ImportError as error:
        parser.error(f"{error} (or leave it out with --by).")
    out = arguments.out or (arguments.runs / "smoke" if arguments.smoke else RESULTS / "attribution")
    for name, task in chosen_tasks(arguments).items():
        settings = {**dataclasses.asdict(task), "subsets": arguments.subsets, "networks": arguments.networks}
        with tracking.tracked("vlearn-attribution", arguments.runs, settings) as (logged, said):
            data = Data(*(each.to(arguments.device) for each in task.load(arguments.data_root)))
            if arguments.smoke:
                print(f"Trained in a batch or alone: {check_batches(task, data):.1e} apart.")
            try:
                with progress() as advance:
                    record = run(task, data, arguments, arguments.runs / name, advance)
            except KeyboardInterrupt:
                print("\nInterrupted: the same command goes on from what was saved last.", file=sys.stderr)
                return 130
            write_json(out / f"{name}.json", {**provenance(command(arguments, name), 0), **record})
            reports.save(pictures.scores(record), out / f"{name}.png")
            show(record)
            print(said)
            if logged:
                logged.log({f"figures/{name}": tracking.image(out / f"{name}.png")})
                logged.summary.update({"table": record["rows"]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
