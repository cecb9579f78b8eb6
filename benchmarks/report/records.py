"""Numbers of a benchmark as JSON, in ``benchmarks/results``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "results"
DIGITS = 6  # significant ones in the JSON


def read(name: str) -> dict[str, Any]:
    """The numbers that a benchmark wrote to ``results/NAME.json``."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write numbers, rounded to 6 significant digits; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False)
    path.write_text(_on_one_line(text) + "\n", encoding="utf-8")


def over_seeds(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of every number over the seeds."""
    deviation = {name: float(np.std([r[name] for r in rows], ddof=1)) if len(rows) > 1 else 0.0 for name in rows[0]}
    return {"mean": {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}, "deviation": deviation}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def _on_one_line(text: str) -> str:
    """Lists of numbers on one line each, so that the file stays short and its differences readable."""
    lines, pending = [], ""
    for line in text.split("\n"):
        opened = line.rstrip().endswith("[")
        if pending and line.strip().rstrip(",") == "]":
            lines.append(pending + line.strip())
            pending = ""
        elif opened:
            if pending:
                lines.append(pending)
            pending = line
        elif pending and not line.rstrip().endswith("{"):
            pending += ("" if pending.endswith("[") else " ") + line.strip()
        else:
            if pending:
                lines.append(pending)
                pending = ""
            lines.append(line)
    return "\n".join(lines)
