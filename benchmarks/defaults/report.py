"""The table of the comparison."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.report.terminal import print_table

WITHIN, WORST = 0.02, 0.05  # of tuned AdamW's loss; of AdamW's at its default


OURS = ("VAdamW", "EVON")
COLUMNS = [("AdamW", "line"), ("AdamW", "tuned"), ("SGD", "tuned"), ("SOAP", "tuned"), ("ivon-opt", "line")]
COLUMNS += [(method, which) for method in OURS for which in ("line", "tuned")]


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print each task's validation losses, and on how many tasks ours do as well as AdamW."""
    rows = [[name, *(number(loss_of(result, *column)) for column in COLUMNS)] for name, result in results.items()]
    header = ["task", *(f"{method}\n{which}" for method, which in COLUMNS)]
    print_table("Validation loss of the mean", header, rows, [note for ours in OURS for note in notes(results, ours)])


def notes(results: dict[str, dict[str, Any]], ours: str) -> list[str]:
    """On how many tasks a method's loss is near AdamW's."""

    def near(which: str, margin: float, reference: str) -> int:
        pairs = ((loss_of(result, ours, which), loss_of(result, "AdamW", reference)) for result in results.values())
        return sum(loss <= (1 + margin) * other < math.inf for loss, other in pairs)

    cases = (("tuned", WITHIN, "tuned"), ("line", WITHIN, "tuned"), ("line", WORST, "line"))
    return [
        f"{ours}, {which}, is within {margin:.0%} of AdamW, {other}, on {near(which, margin, other)} "
        f"of {len(results)} tasks."
        for which, margin, other in cases
    ]


def loss_of(result: dict[str, Any], method: str, which: str) -> float:
    """A method's loss, of its one line or tuned."""
    loss = result["methods"][method][which]["mean"]["loss"]
    return math.inf if loss is None else loss


def number(loss: float) -> str:
    """A loss with three significant digits."""
    return f"{loss:.3g}" if math.isfinite(loss) else "diverged"
