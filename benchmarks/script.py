"""What the scripts on image data have in common: their options, and one experiment after another to its files."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks import data as datasets
from benchmarks import pictures, report, tracking
from benchmarks.data import Images
from benchmarks.supervised import Advance

RESULTS = Path(__file__).parent / "results"
NOT_IN_COMMAND = {"experiments", "seeds", "device", "data_root", "runs", "out", "smoke"}
Run = Callable[[Any, Images, int, Path, Advance], dict[str, Any]]  # experiment, data, seeds, folder, progress -> found


def parser(
    script: str,
    description: str | None,
    experiments: Mapping[str, Any],
    seeds: int,
    without: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """The options that every script has; the experiments in `without` run where they are named."""
    default = [name for name in experiments if name not in without]
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--experiments", nargs="+", choices=list(experiments), default=default)
    found.add_argument("--seeds", type=int, default=seeds)
    found.add_argument("--epochs", type=int, help="instead of each experiment's own")
    found.add_argument("--num-data", type=int, help="the first training examples, instead of each experiment's own")
    found.add_argument("--device", default="cpu")
    found.add_argument("--data-root", type=Path)
    found.add_argument("--runs", type=Path, default=Path("runs") / script, help="what is needed to go on")
    found.add_argument("--out", type=Path)
    found.add_argument("--smoke", action="store_true", help="a few seconds on digits, not written to results/")
    return found


def chosen(arguments: argparse.Namespace, experiments: Mapping[str, Any], smoke: Any) -> dict[str, Any]:
    """The experiments that the options ask for, as they ask for them; `smoke` is one, or several by name."""
    found = {name: experiments[name] for name in arguments.experiments}
    if arguments.smoke:
        found = dict(smoke) if isinstance(smoke, Mapping) else {"digits": smoke}
    if arguments.epochs is not None:
        found = {name: experiment.cut(arguments.epochs) for name, experiment in found.items()}
    if arguments.num_data is not None:
        found = {name: dataclasses.replace(each, num_data=arguments.num_data) for name, each in found.items()}
    return found


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
                with report.progress() as advance:
                    found = work(experiment, images, seeds, arguments.runs / name, advance)
            except KeyboardInterrupt:
                print("\nInterrupted: the same command goes on from what was saved last.", file=sys.stderr)
                return 130
            found = {"experiment": dataclasses.asdict(experiment), **found}
            provenance = report.provenance(command(script, arguments, name, seeds), 0)
            report.write_json(out / f"{name}.json", {**provenance, **found})
            drawn = draw(found)
            figures = {f"{name}-{more}": each for more, each in drawn.items()} if isinstance(drawn, Mapping) else {}
            for figure, each in (figures or {name: drawn}).items():
                pictures.save(each, out / f"{figure}.png")
                if logged:
                    logged.log({f"figures/{figure}": tracking.image(out / f"{figure}.png")})
            show(found)
            print(said)
            if logged:
                logged.summary.update({"table": found["table"]})
    return 0


def command(script: str, arguments: argparse.Namespace, name: str, seeds: int) -> str:
    """What makes one experiment's numbers again."""
    if arguments.smoke:
        return f"python -m benchmarks.{script} --smoke"
    parts = [f"python -m benchmarks.{script} --experiments {name} --seeds {seeds}"]
    for option, value in vars(arguments).items():
        if option not in NOT_IN_COMMAND and value not in (None, False):
            parts.append(f"--{option.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(parts)
