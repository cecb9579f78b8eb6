"""The options of the scripts on image data, and their experiments one after another, each to its files."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.problems import images as datasets
from benchmarks.problems.images import Images
from benchmarks.report import pictures, tracking
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import Advance, progress

NOT_IN_COMMAND = {"experiments", "seeds", "device", "data_root", "runs", "out", "smoke"}
# (experiment, data, number of seeds, folder of its runs, progress) -> numbers
Run = Callable[[Any, Images, int, Path, Advance], dict[str, Any]]


def parser(
    script: str,
    description: str | None,
    experiments: Mapping[str, Any],
    seeds: int,
    without: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """The options that every script has; the experiments in `without` run where they are named."""
    default = [name for name in experiments if name not in without]
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--experiments", nargs="+", choices=list(experiments), default=default)
    options.add_argument("--seeds", type=int, default=seeds)
    options.add_argument("--epochs", type=int, help="instead of each experiment's own")
    options.add_argument("--num-data", type=int, help="the first training examples, instead of each experiment's own")
    options.add_argument("--device", default="cpu")
    options.add_argument("--data-root", type=Path)
    options.add_argument("--runs", type=Path, default=Path("runs") / script, help="what is needed to go on")
    options.add_argument("--out", type=Path)
    options.add_argument("--smoke", action="store_true", help="a few seconds on digits, not written to results/")
    return options


def chosen(arguments: argparse.Namespace, experiments: Mapping[str, Any], smoke: Any) -> dict[str, Any]:
    """The experiments that the options ask for, as they ask for them; `smoke` is one, or several by name."""
    asked = {name: experiments[name] for name in arguments.experiments}
    if arguments.smoke:
        asked = dict(smoke) if isinstance(smoke, Mapping) else {"digits": smoke}
    if arguments.epochs is not None:
        asked = {name: experiment.cut(arguments.epochs) for name, experiment in asked.items()}
    if arguments.num_data is not None:
        asked = {name: dataclasses.replace(each, num_data=arguments.num_data) for name, each in asked.items()}
    return asked


def run(
    script: str,
    arguments: argparse.Namespace,
    experiments: Mapping[str, Any],
    work: Run,
    draw: Callable[[dict[str, Any]], Figure | Mapping[str, Figure]],
    show: Callable[[dict[str, Any]], None],
) -> int:
    """Run the experiments, write JSON and PNG of each, print its table; 0, or 130 when interrupted.

    Args:
        script: its name, of its module and its folder of results.
        arguments: what `parser` read.
        experiments: settings by name; each has `dataset`, `num_data` and `num_test`.
        work: does one; its numbers, with a "table", go to the JSON.
        draw, show: the figure, or several by what they add to the experiment's name, and the printed table of these
            numbers.
    """
    out = arguments.out or (arguments.runs / "smoke" if arguments.smoke else RESULTS / script)
    seeds = 1 if arguments.smoke else arguments.seeds
    for name, experiment in experiments.items():
        settings = {**dataclasses.asdict(experiment), "seeds": seeds}
        with tracking.tracked(f"vlearn-{script.replace('_', '-')}", arguments.runs, settings) as (logged, said):
            images = datasets.load(experiment.dataset, arguments.data_root)
            images = images.first(experiment.num_data, experiment.num_test).to(arguments.device)
            try:
                with progress() as advance:
                    numbers = work(experiment, images, seeds, arguments.runs / name, advance)
            except KeyboardInterrupt:
                print("\nInterrupted: the same command goes on from what was saved last.", file=sys.stderr)
                return 130
            numbers = {"experiment": dataclasses.asdict(experiment), **numbers}
            source = provenance(command(script, arguments, name, seeds), 0)
            write_json(out / f"{name}.json", {**source, **numbers})
            drawn = draw(numbers)
            figures = {f"{name}-{more}": each for more, each in drawn.items()} if isinstance(drawn, Mapping) else {}
            for figure, each in (figures or {name: drawn}).items():
                pictures.save(each, out / f"{figure}.png")
                if logged:
                    logged.log({f"figures/{figure}": tracking.image(out / f"{figure}.png")})
            show(numbers)
            print(said)
            if logged:
                logged.summary.update({"table": numbers["table"]})
    return 0


def command(script: str, arguments: argparse.Namespace, name: str, seeds: int) -> str:
    """The command line that makes one experiment's numbers again."""
    if arguments.smoke:
        return f"python -m benchmarks.{script} --smoke"
    parts = [f"python -m benchmarks.{script} --experiments {name} --seeds {seeds}"]
    for option, value in vars(arguments).items():
        if option not in NOT_IN_COMMAND and value not in (None, False):
            parts.append(f"--{option.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(parts)
