"""The table of settings that worked: what each optimizer was given in recorded runs, and what came of it."""

from __future__ import annotations

from typing import Any

from benchmarks.report.markdown import percent, short, table
from benchmarks.report.records import read
from benchmarks.tables.optimizers import TASKS

FAMILY = {
    "IVON": "`IVON`",
    "EVON": "`EVON`",
    "VAdamW": "`VAdamW`",
    "VON": "`VON`",
    "VOGN": "`VOGN`",
    "KFACVON": "`KFACVON`",
    "EK-FAC": "`KFACVON`, EK-FAC",
}


def worked() -> str:
    """Task, network, optimizer, settings and result of every recorded run of the family."""
    rows = _generalization("fashion-mnist")
    for name in ("fashion-mnist-5k", "digits"):
        rows += _family(name)
    for name in TASKS:
        rows += _defaults(name)
    return table(("task and network", "examples, batch, epochs", "optimizer", "settings", "result"), rows)


def _generalization(name: str) -> list[tuple[str, ...]]:
    record = read(f"generalization/{name}")
    experiment, mean = record["experiment"], record["table"]["IVON"]["mean"]
    count = experiment["num_data"] or 60_000
    settings = _variational(experiment["lr"], experiment, count)
    size = _size(count, experiment["batch"], experiment["epochs"])
    result = f"test loss {short(mean['test_loss'], 3)}, {percent(mean['test_accuracy'])}"
    return [(experiment["title"], size, "`IVON`", settings, result)]


def _family(name: str) -> list[tuple[str, ...]]:
    record = read(f"family/{name}")
    experiment, rows = record["experiment"], []
    for method, label in FAMILY.items():
        if method not in record["table"]:
            continue
        mean, lr = record["table"][method]["mean"], record["learning_rates"][method]["chosen"]
        settings = _variational(lr, experiment, experiment["num_data"])
        if method == "EVON":
            settings = f"`lr={lr:.2g}, ess=N, weight_decay={_decay(experiment)}`"
        if method == "VAdamW":
            settings = f"`lr={lr:.2g}, prior_precision={experiment['prior_precision']:g}`"
        result = f"test loss {short(mean['nll'], 3)}, of draws {short(mean['nll_by_draws'], 3)}"
        size = _size(experiment["num_data"], experiment["batch"], experiment["epochs"])
        result += f", {percent(mean['accuracy'])}"
        rows.append((experiment["title"], size, label, settings, result))
    return _once(rows)


def _defaults(name: str) -> list[tuple[str, ...]]:
    record, rows = read(f"defaults/{name}"), []
    given = record["settings"]
    for method, which, settings in (
        ("VAdamW", "tuned", "`lr={lr:g}`"),
        ("EVON", "tuned", "`lr={lr:g}`"),
    ):
        found = record["methods"].get(method, {})
        if which not in found:
            continue
        lr = found["best"] if which == "tuned" else found["rate"]
        mean = found[which]["mean"]
        result = f"return {mean['return']:.0f}" if "return" in mean else f"validation loss {short(mean['loss'], 3)}"
        if "accuracy" in mean:
            result += f", {percent(mean['accuracy'])}"
        size = _size(given["num_data"], given["batch"], given["epochs"])
        rows.append((TASKS[name], size, f"`{method.partition(',')[0]}`", settings.format(lr=lr), result))
    return _once(rows)


def _variational(lr: float, experiment: dict[str, Any], count: int) -> str:
    decay = _decay({**experiment, "num_data": count})
    return (
        f"`lr={lr:.2g}, ess=N, hess_init={experiment['hess_init']:g}, beta2={experiment['beta2']:g}, "
        f"weight_decay={decay}`"
    )


def _decay(experiment: dict[str, Any]) -> str:
    return f"{experiment['prior_precision'] / experiment['num_data']:g}"


def _size(count: int, batch: int, epochs: int) -> str:
    return f"{count:,}, {batch}, {epochs}"


def _once(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Task and size in the first row of a task alone."""
    return [row if not i else ("", "", *row[2:]) for i, row in enumerate(rows)]
