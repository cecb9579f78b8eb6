"""Whether one changed line trains other people's networks as well as AdamW, on twelve small tasks.

    python -m benchmarks.defaults                      # every task, three seeds, in about eight hours on one thread
    python -m benchmarks.defaults --tasks gpt lenet    # some of them
    python -m benchmarks.defaults --leave-one-out      # what it says by vlearn's lines, of the tasks with classes
    python -m benchmarks.defaults --smoke              # seconds, on digits

Every method gets the same network, minibatches and schedule: the rate rises over a twentieth of the steps and falls to
zero along a cosine. AdamW, SGD, SOAP, VAdamW and EVON are run as their documentation's line has them, and at the best
of five rates by the validation loss of the first seed. Runs are kept, so the same command goes on after an interrupt.

Needs `pip install 'vlearn[defaults]'`; the data are those of the other benchmarks, see `benchmarks/problems/images.py`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.defaults import leave_one_out
from benchmarks.defaults.comparison import compare
from benchmarks.defaults.report import show
from benchmarks.defaults.task import Task
from benchmarks.defaults.tasks import smoke_task, tasks
from benchmarks.problems.images import default_root
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import progress


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(tasks(Path(), Path()))
    options.add_argument("--tasks", nargs="+", choices=names, default=names)
    options.add_argument("--seeds", type=int, default=3)
    options.add_argument("--data-root", type=Path)
    options.add_argument("--runs", type=Path, default=Path("runs") / "defaults", help="what is needed to go on")
    options.add_argument("--out", type=Path)
    options.add_argument("--leave-one-out", action="store_true", help="leave-one-out losses in the place of the table")
    options.add_argument("--smoke", action="store_true", help="a few seconds on digits, not written to results/")
    asked = options.parse_args(arguments)
    known = {"digits": smoke_task} if asked.smoke else tasks(asked.data_root or default_root(), asked.runs)
    out = asked.out or (asked.runs / "smoke" if asked.smoke else RESULTS / "defaults")
    seeds = 1 if asked.smoke else asked.seeds
    results = {}
    try:
        with progress() as advance:
            for name in known if asked.smoke else asked.tasks:
                command = f"python -m benchmarks.defaults --tasks {name} --seeds {seeds}"
                if asked.leave_one_out:
                    task = known[name]()
                    if not (isinstance(task, Task) and task.classifies):
                        continue
                    results[name] = leave_one_out.estimates(name, task, seeds, asked.runs, advance)
                    command, file = f"{command} --leave-one-out", out / "leave_one_out" / f"{name}.json"
                else:
                    results[name] = compare(name, known[name], seeds, asked.runs, advance)
                    file = out / f"{name}.json"
                write_json(file, {**provenance(command, 0), "seeds": seeds, **results[name]})
    except KeyboardInterrupt:
        print("\nInterrupted: the same command goes on from what was saved last.", file=sys.stderr)
        return 130
    (leave_one_out.show if asked.leave_one_out else show)(results)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
