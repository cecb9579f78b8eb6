"""How a benchmark reports: numbers as JSON with what produced them, and a table on the terminal."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

PACKAGES = ("vlearn", "torch", "numpy", "laplace-torch", "ivon-opt", "scikit-learn", "wandb")
DIGITS = 6  # significant ones in the JSON


def provenance(command: str, seed: int) -> dict[str, Any]:
    """Command, seed, hardware and versions: what is needed to make the numbers again."""
    return {
        "command": command,
        "seed": seed,
        "hardware": {"processor": _processor(), "cores": cores(), "accelerator": _accelerator()},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def relative(path: Path) -> Path:
    """A path as the reader would type it."""
    path = path.resolve()
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def write_json(path: Path, content: Any) -> None:
    """Write numbers, rounded to 6 significant digits; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(content), indent=1, ensure_ascii=False)
    path.write_text(_on_one_line(text) + "\n", encoding="utf-8")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> None:
    """One table on standard output: the first column to the left, the others to the right."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place else "left", no_wrap=place == 0)
    for row in rows:
        table.add_row(*row)
    # Not cut to 80 columns where the output goes to a file.
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    for note in notes:
        console.print(note, style="dim", highlight=False)


def over_seeds(rows: list[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of every number over the seeds."""
    deviation = {name: float(np.std([r[name] for r in rows], ddof=1)) if len(rows) > 1 else 0.0 for name in rows[0]}
    return {"mean": {name: float(np.mean([r[name] for r in rows])) for name in rows[0]}, "deviation": deviation}


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A function that says what has just been done: on one line of a terminal, or line by line in a file."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield status.update
    else:
        yield lambda said: print(f"{time.strftime('%H:%M:%S')} {said}", file=sys.stderr, flush=True)


def medians(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each call, taken in turn so that drift of the machine meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if round_number >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


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


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _accelerator() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
