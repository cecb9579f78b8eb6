"""Writes the tables of the README and the manual, and the numbers between them, from those in `benchmarks/results/`.

    python -m benchmarks.tables [--check]

Each stands between the markers of `benchmarks.report.markdown`. `--check` writes nothing: it prints what would
change and exits with 1 if anything would.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.report.markdown import with_numbers, with_tables
from benchmarks.tables import (
    attributions,
    costs,
    labels,
    losses,
    optimizers,
    prose_losses,
    prose_optimizers,
    prose_removals,
    removals,
    settings,
)

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
TABLES: dict[str, Callable[[], str]] = {
    "optimizers": optimizers.family,
    "family-fashion-mnist": optimizers.fashion_mnist,
    "family-digits": optimizers.digits,
    "family-cost": optimizers.cost,
    "lines": optimizers.lines,
    "defaults": optimizers.defaults,
    "defaults-calibration": optimizers.defaults_calibration,
    "defaults-leave-one-out": optimizers.defaults_leave_one_out,
    "continual": optimizers.continual,
    "merging": optimizers.merging,
    "step-cost": costs.step,
    "step-cost-gpu": costs.step_on_a_gpu,
    "sensitivity-cost": costs.sensitivities,
    "batch-norm": costs.batch_norm,
    "fit-cost": costs.fits,
    "influence-cost": costs.influences,
    "stopped-digits": partial(losses.stopped_training, "digits"),
    "stopped-fashion-mnist": partial(losses.stopped_training, "fashion-mnist"),
    "stopped-fashion-mnist-overfit": partial(losses.stopped_training, "fashion-mnist-overfit"),
    "stopped-fashion-mnist-published": partial(losses.stopped_training, "fashion-mnist-published"),
    "stopped-fashion-mnist-adam": partial(losses.stopped_training, "fashion-mnist-adam"),
    "stopped-fashion-mnist-adamw": partial(losses.stopped_training, "fashion-mnist-adamw"),
    "generalization-fashion-mnist": losses.fashion_mnist,
    "digits": losses.digits,
    "running-average": losses.running_average,
    "prior-precision": losses.prior_precision,
    "fidelity": removals.structures,
    "fidelity-trained": removals.from_scratch,
    "group-removal": removals.groups,
    "retraining-digits": removals.digits,
    "retraining-images": removals.images,
    "class-removal-mlp": removals.classes_mlp,
    "class-removal-lenet5": removals.classes_lenet5,
    "linear": removals.linear,
    "changed-labels": removals.changed_labels,
    "settings": settings.worked,
    "label-errors": labels.scores,
    "label-errors-runs": labels.runs,
    "attribution": attributions.scores,
    "attribution-removals": attributions.removals,
}
NUMBERS: dict[str, Callable[[], str]] = {
    **prose_optimizers.NUMBERS,
    **prose_losses.NUMBERS,
    **prose_removals.NUMBERS,
}


def written(text: str) -> str:
    """The document with its tables and numbers as the results have them."""
    return with_numbers(with_tables(text, TABLES), NUMBERS)


def differences(documents: Sequence[Path]) -> list[str]:
    """The lines of a diff from the documents as they are to what the numbers say."""
    lines: list[str] = []
    for path in documents:
        now = path.read_text(encoding="utf-8")
        name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        lines += difflib.unified_diff(
            now.splitlines(), written(now).splitlines(), str(name), f"{name}, from results/", lineterm=""
        )
    return lines


def main(argv: list[str] | None = None, documents: Sequence[Path] = DOCUMENTS) -> int:
    """Write tables and numbers, 0; or check them, 1 if a document is out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is out of date")
    if parser.parse_args(argv).check:
        changed = differences(documents)
        if changed:
            print(*changed, "Tables or numbers are out of date: run `make tables`.", sep="\n", file=sys.stderr)
        return int(bool(changed))
    for path in documents:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
