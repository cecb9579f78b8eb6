"""The scores of all methods with their intervals."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from vlearn.plot.style import BLUE, GREY, INK, tidy  # noqa: E402


def scores(record: dict[str, Any]) -> Figure:
    """Best first, vlearn's in blue; a dashed line where a perfect prediction would be."""
    rows = sorted(record["rows"], key=lambda row: row["score"][0])
    figure, ax = plt.subplots(figsize=(8.2, 0.3 * len(rows) + 1.4), layout="constrained")
    for place, row in enumerate(rows):
        value, low, high = row["score"]
        color = BLUE if row["by"] == "vlearn" else GREY
        ax.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=color, markersize=6)
    ax.set_yticks(range(len(rows)), [title(row) for row in rows])
    if record["ceiling"] is not None:
        ax.axvline(record["ceiling"], color=INK, linewidth=1, linestyle=(0, (4, 2)))
    tidy(ax, f"linear datamodelling score, {record['subsets']} subsets", "")
    ax.set_title(record["task"]["title"], fontsize=13, color=INK, loc="left", fontweight="bold")
    return figure


def title(row: dict[str, Any]) -> str:
    """A row's name: package, method, and the number of networks where it is not one."""
    several = f", {row['networks']} networks" if row["networks"] > 1 else ""
    return f"{row['by']}: {row['method']}{several}"
