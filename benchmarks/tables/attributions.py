"""Tables of data attribution against retraining, over the tasks whose numbers there are."""

from __future__ import annotations

from typing import Any

from benchmarks.report.markdown import short, table
from benchmarks.report.records import RESULTS, read

TASKS = ("concrete", "fashion-mnist", "mnist", "fashion-mnist-n", "cifar-10")
TIMED, WEIGHED = "mnist", "fashion-mnist"  # whose times and whose memory are shown, of networks of one size

Key = tuple[str, str, int]


def scores() -> str:
    """The linear datamodelling score of every method, best first, with its cost."""
    records = _records()
    by_task = {name: {_key(row): row for row in record["rows"]} for name, record in records.items()}
    keys = list(dict.fromkeys(key for rows in by_task.values() for key in rows))
    keys.sort(key=lambda key: -_mean([rows[key]["score"][0] for rows in by_task.values() if key in rows]))
    lines = []
    for key in keys:
        cells = [_score(rows[key]) if key in rows else "-" for rows in by_task.values()]
        timed, weighed = by_task[TIMED].get(key), by_task[WEIGHED].get(key)
        cells += [_time(timed["prepare, s"]), f"{timed['query, ms']:.0f} ms"] if timed else ["-", "-"]
        cells.append(f"{weighed['memory, MiB']:.0f} MiB" if weighed else "-")
        lines.append((_title(key), *cells))
    ceilings = [short(record["ceiling"], 2) if record["ceiling"] is not None else "-" for record in records.values()]
    lines.append(("what a perfect prediction would reach", *ceilings, "", "", ""))
    header = [record["task"]["title"] for record in records.values()]
    return table(("", *header, "prepare", "a query", "memory"), lines)


def removals() -> str:
    """The rise of a query's loss after retraining without its top 1%."""
    records = _records()
    by_task = [{(row["by"], row["method"], 1): row for row in record["removals"]} for record in records.values()]
    keys = dict.fromkeys(key for rows in by_task for key in rows)

    def cell(row: dict[str, Any] | None) -> str:
        return f"{row['rise']:.3f} ± {row['standard error']:.3f}" if row else "-"

    lines = [(_title(key), *(cell(rows.get(key)) for rows in by_task)) for key in keys]
    return table(("", *(record["task"]["title"] for record in records.values())), lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _records() -> dict[str, dict[str, Any]]:
    there = [name for name in TASKS if (RESULTS / "attribution" / f"{name}.json").exists()]
    return {name: read(f"attribution/{name}") for name in there}


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _key(row: dict[str, Any]) -> Key:
    return row["by"], row["method"], row["networks"]


def _title(key: Key) -> str:
    by, method, networks = key
    package = f"**{by}**" if by == "vlearn" else by
    several = f", mean over {networks} networks" if networks > 1 else ""
    return f"{package}: {method}{several}" if by else method


def _score(row: dict[str, Any]) -> str:
    value, low, high = (short(number, 2) for number in row["score"])
    return f"{value} [{low}, {high}]"
