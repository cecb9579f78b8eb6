"""The table of the comparison."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.report.terminal import print_table

WITHIN, WORST = 0.02, 0.05  # of tuned AdamW's loss; of AdamW's at its default


def show(results: dict[str, dict[str, Any]]) -> None:
    """Print each task's validation losses, and on how many tasks one line does as well as AdamW."""
    rows = [[name, *losses(result)] for name, result in results.items()]
    header = ["task", "AdamW, line", "tuned", "SGD, tuned", "ivon-opt", "VAdamW, line", "tuned"]
    close = sum(ratio(result, "tuned", "tuned") <= 1 + WITHIN for result in results.values())
    safe = sum(ratio(result, "line", "line") <= 1 + WORST for result in results.values())
    notes = [
        f"VAdamW tuned is within {WITHIN:.0%} of AdamW tuned on {close} of {len(results)} tasks.",
        f"VAdamW's line is within {WORST:.0%} of AdamW's line on {safe} of {len(results)} tasks.",
    ]
    print_table("Validation loss of the mean", header, rows, notes)


def losses(result: dict[str, Any]) -> list[str]:
    """Those of the table's columns."""
    cells = (("AdamW", "line"), ("AdamW", "tuned"), ("SGD", "tuned"), ("ivon-opt", "line"), ("VAdamW", "line"))
    return [number(loss_of(result, *cell)) for cell in (*cells, ("VAdamW", "tuned"))]


def loss_of(result: dict[str, Any], method: str, which: str) -> float:
    loss = result["methods"][method][which]["mean"]["loss"]
    return math.inf if loss is None else loss


def ratio(result: dict[str, Any], ours: str, theirs: str) -> float:
    """VAdamW's loss over AdamW's, of the line or tuned."""
    return loss_of(result, "VAdamW", ours) / loss_of(result, "AdamW", theirs)


def number(loss: float) -> str:
    """A loss with three significant digits."""
    return f"{loss:.3g}" if math.isfinite(loss) else "diverged"
