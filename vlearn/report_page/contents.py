"""What a page says, taken from a record or a sweep: numbers of every example, findings, tables, curves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlearn.audit.findings import LabelIssues, label_issues
from vlearn.record import MemoryMap, TrainingRecord
from vlearn.record.running_averages import AVERAGED
from vlearn.report_page.maps import Map, map_of_table, maps_of
from vlearn.sensitivity.sweep import SensitivityTable

Source = TrainingRecord | MemoryMap | SensitivityTable

MOST_ISSUES = 2000  # rows of the table of label issues
MOST_ROWS = 200  # of each other table
SWEPT = ("loss", "loo_loss", "self_influence", "leverage", "prediction_error")
LABELS = {
    "loss": "loss",
    "margin": "margin",
    "probability": "probability of the label",
    "agreement": "agreement",
    "prediction_error": "prediction error",
    "self_influence": "self-influence",
    "loo_loss": "leave-one-out loss",
    "leverage": "leverage",
}
ABOUT = {
    "loss": "of the example, in the loss's units",
    "margin": "logit of the label minus the largest other",
    "probability": "that the model gives the label",
    "agreement": "share of the run in which the prediction was the label",
    "prediction_error": "‖p − y‖/√2",
    "self_influence": "first-order increase of the example's own loss if it were removed",
    "loo_loss": "predicted loss of the example if it were removed",
    "leverage": "tr(ΛV), effective parameters that the example takes",
}
# What tables tell beside that by which they are ordered.
OF_SUSPICION = ("score", "suggested_probability", "probability", "loss", "sweep_loo_loss", "loo_loss", "agreement")
ON_A_LOGARITHMIC_SCALE = ("loss", "loo_loss", "self_influence", "leverage")


@dataclass(frozen=True)
class Column:
    """One number of every example ``[N]``, NaN where it is not known."""

    key: str
    label: str
    about: str
    values: np.ndarray
    log: bool = False


@dataclass(frozen=True)
class Table:
    """Examples to look at, in their order.

    Attributes:
        shown: keys of the columns that are told of each.
    """

    key: str
    title: str
    about: str
    numbers: np.ndarray
    shown: list[str]


@dataclass
class Contents:
    """All of a page but images, texts and looks.

    Attributes:
        labels: ``[N]`` given labels, -1 where there is none.
        predicted: ``[N]`` most probable classes, out of sample or by averages over the run; where probabilities are not
            known those predicted last, and -1 where there is none.
        issues: None where there are no labels, or no model that predicts classes.
        curves: points ``[P]`` by name of the curve and steps ``[P]`` of each, NaN where there is none.
    """

    num_data: int
    maps: list[Map]
    columns: list[Column]
    labels: np.ndarray
    predicted: np.ndarray
    issues: LabelIssues | None
    tables: list[Table]
    steps: np.ndarray
    curves: dict[str, np.ndarray]
    facts: dict[str, str] = field(default_factory=dict)


def contents_of(source: Source, labels: Any = None, score: str | None = None) -> Contents:
    """Read a record or a sweep.

    Args:
        labels, score: of `vlearn.label_issues`.
    """
    if isinstance(source, SensitivityTable):
        return _of_table(source, labels, score)
    record = source if isinstance(source, TrainingRecord) else None
    memory = source if isinstance(source, MemoryMap) else source.memory
    columns = [] if record is None else _averages(record)
    columns += _last_snapshot(memory, "sweep", "last sweep")
    if record is None:
        columns += _last_snapshot(memory, "live", "last snapshot")
    given = np.full(memory.num_data, -1) if record is None else record.labels
    given = given if labels is None else _checked_labels(labels, memory.num_data)
    issues = None
    has_losses = any(column.key == "loss" for column in columns)
    one_class = record is not None and record.num_classes == 1
    if record is not None and not one_class and (given >= 0).any() and (has_losses or score is not None):
        issues = label_issues(record, None if labels is None else given, score)
    steps, curves = _curves(memory)
    predicted = np.full(memory.num_data, -1) if record is None else record.predicted.astype(np.int64)
    contents = Contents(memory.num_data, maps_of(memory), columns, given, predicted, issues, [], steps, curves)
    contents.facts = {
        "examples": f"{memory.num_data:,}",
        "epochs recorded": f"{int((memory.kinds == 'live').sum()):,}",
        "sweeps": f"{int((memory.kinds == 'sweep').sum()):,}",
        "training steps": f"{int(memory.steps.max(initial=0 if record is None else record.step)):,}",
    }
    return _with_findings(contents)


def _of_table(table: SensitivityTable, labels: Any, score: str | None) -> Contents:
    """Of a sweep: an example's number is its place among all."""
    if table.position is not None:
        raise ValueError("the sweep has a row for each token, but a page shows examples: sweep with per='example'.")
    index = table.index.numpy()
    largest = int(index.max(initial=-1))
    count = largest + 1 if labels is None else len(labels)
    if largest >= count:
        raise ValueError(f"the sweep has example {largest}, but labels has {count}: give those of all, by number.")
    found: dict[str, np.ndarray] = {}
    for name in SWEPT:
        rows = getattr(table, name)
        if rows is not None and bool(rows.isfinite().any()):
            found[name] = np.full(count, np.nan)
            found[name][index] = rows.double().numpy()
    columns = [_column(name, name, "sweep", values) for name, values in found.items()]
    given = np.full(count, -1) if labels is None else _checked_labels(labels, count)
    output = table.output
    classifies = output is not None and output.dim() == 2 and output.shape[1] > 1 and not bool(output.isnan().all())
    issues = label_issues(table, given, score) if labels is not None and classifies else None
    predicted, no_steps = np.full(count, -1), np.zeros(0)
    contents = Contents(count, map_of_table(found), columns, given, predicted, issues, [], no_steps, {})
    contents.facts = {"examples": f"{count:,}", "examples swept": f"{len(index):,}"}
    return _with_findings(contents)


def _checked_labels(labels: Any, count: int) -> np.ndarray:
    array = np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels)
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"labels have shape {array.shape} and type {array.dtype}, but they must be [{count}] whole numbers, one "
            "for each example by its number."
        )
    return array.astype(np.int64)


def _column(key: str, name: str, when: str, values: np.ndarray) -> Column:
    log = name in ON_A_LOGARITHMIC_SCALE and bool((values[np.isfinite(values)] >= 0).all())
    return Column(key, f"{LABELS[name]}, {when}", ABOUT[name], values, log)


def _averages(record: TrainingRecord) -> list[Column]:
    averages, columns = record.averages, []
    for name in AVERAGED:
        values = averages.mean(name)
        if np.isfinite(values).any():
            columns.append(_column(name, name, "run average", values))
    return columns


def _last_snapshot(memory: MemoryMap, kind: str, when: str) -> list[Column]:
    columns = []
    for name in SWEPT:
        column = memory.column(name)
        for snapshot in np.flatnonzero(memory.kinds == kind)[::-1]:
            values = column[snapshot].astype(np.float64)
            if np.isfinite(values).any():
                columns.append(_column(f"{kind}_{name}", name, when, values))
                break
    return columns


def _curves(memory: MemoryMap) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Means over the examples at each step of a snapshot."""
    steps = np.unique(memory.steps)
    curves: dict[str, np.ndarray] = {}

    def add(name: str, snapshot: int, value: float) -> None:
        if np.isfinite(value):
            curve = curves.setdefault(name, np.full(len(steps), np.nan))
            curve[np.searchsorted(steps, memory.steps[snapshot])] = value

    loss, loo, test = memory.column("loss"), memory.column("loo_loss"), memory.test_loss
    for snapshot, kind in enumerate(memory.kinds):
        if kind == "sweep":
            add("leave-one-out loss", snapshot, _mean(loo[snapshot]))
            add("test loss", snapshot, test[snapshot])
            add("training loss, sweep", snapshot, _mean(loss[snapshot]))
        else:
            add("training loss, average over the epoch", snapshot, _mean(loss[snapshot]))
    return steps, curves


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean(dtype=np.float64)) if len(finite) else float("nan")


def _with_findings(contents: Contents) -> Contents:
    """Its tables, and the columns that they are ordered by."""
    issues = contents.issues
    if issues is not None:
        contents.columns[:0] = _suspicion(contents, issues)
    values = {column.key: column.values for column in contents.columns}

    def first(*keys: str) -> str | None:
        return next((key for key in keys if key in values), None)

    def add(key: str, title: str, about: str, numbers: np.ndarray, *shown: str | None) -> None:
        told = [each for each in (*shown, *OF_SUSPICION) if each is not None and each in values]
        contents.tables.append(Table(key, title, about, numbers, list(dict.fromkeys(told))[:5]))

    loo, leverage = first("sweep_loo_loss", "loo_loss"), first("sweep_leverage", "leverage")
    influence = first("sweep_self_influence", "self_influence", "live_self_influence")
    if issues is not None:
        count = MOST_ROWS if issues.count is None else min(max(issues.count, MOST_ROWS), MOST_ISSUES)
        add("issues", "Label issues", _about_issues(issues), issues.numbers[:count], "rank")
    elif loo is not None:
        about = "Examples that the model would miss most if they were removed."
        add("loo", "Leave-one-out loss", about, _largest(values[loo]), loo)
    if influence is not None:
        about = "Examples whose own loss would rise most if they were removed: the model leans on them alone."
        add("influential", "Most influential", about, _largest(values[influence]), influence, leverage)
    if issues is not None:
        memorised = issues.numbers[issues.group == "memorised"][:MOST_ROWS]
        about = "Examples that are right only because they were learned by heart, or late; the most suspicious first."
        add("memorised", "Memorised", about, memorised, "rank")
        uncertain = np.sort(issues.numbers[issues.group == "uncertain"])
        if leverage is not None:
            order, about = (
                -values[leverage],
                "Examples of high leverage, the highest first: the model is not sure of them.",
            )
        else:
            order = np.abs(values["agreement"] - 0.5) if "agreement" in values else values["rank"]
            about = "Examples whose prediction was the label for about half of the run."
        uncertain = uncertain[np.argsort(order[uncertain], kind="stable")][:MOST_ROWS]
        add("ambiguous", "Ambiguous", about, uncertain, leverage or "agreement")
    return contents


def _about_issues(issues: LabelIssues) -> str:
    about = "Labels in the order in which they are worth a look, the most suspicious first. "
    if issues.count is None:
        return about + "How many are wrong is not known: no probabilities were kept, or the run fits nearly all labels."
    return about + f"About {issues.count:,} are expected to be wrong."


def _suspicion(contents: Contents, issues: LabelIssues) -> list[Column]:
    """What label issues say of each example as columns; what they predict goes into the contents."""
    rank, score, suggested = (np.full(contents.num_data, np.nan) for _ in range(3))
    rank[issues.numbers] = np.arange(1, len(issues) + 1)
    score[issues.numbers] = issues.score
    columns = [
        Column("rank", "rank of suspicion", "1 is the label most likely wrong", rank),
        Column("score", "suspicion", "score by which labels are ordered, see vlearn.label_issues", score),
    ]
    if issues.probabilities is not None:
        known = np.isfinite(issues.probabilities).all(1)
        numbers, probabilities = issues.numbers[known], issues.probabilities[known]
        contents.predicted[numbers] = probabilities.argmax(1)
        suggested[numbers] = probabilities[np.arange(len(numbers)), issues.suggested[known]]
        about = "that the model gives the suggested class, on average over the run, or without the example"
        columns.append(Column("suggested_probability", "probability of the suggestion", about, suggested))
    return columns


def _largest(values: np.ndarray) -> np.ndarray:
    finite = np.flatnonzero(np.isfinite(values))
    return finite[np.argsort(-values[finite], kind="stable")[:MOST_ROWS]]


def chosen_examples(contents: Contents, most: int) -> np.ndarray:
    """``[K]`` examples of which a page has the image or text: of each table in turn, then evenly of the others.

    Args:
        most: K, if there are as many.
    """
    if contents.num_data <= most:
        return np.arange(contents.num_data)
    chosen = np.zeros(contents.num_data, bool)
    left = most
    longest = max((len(table.numbers) for table in contents.tables), default=0)
    for place in range(longest):
        for table in contents.tables:
            if place < len(table.numbers) and left and not chosen[table.numbers[place]]:
                chosen[table.numbers[place]] = True
                left -= 1
    others = np.flatnonzero(~chosen)
    chosen[others[np.linspace(0, len(others) - 1, left).astype(int)]] = True
    return np.flatnonzero(chosen)
