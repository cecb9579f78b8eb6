"""The table of scores that find wrong labels, over the sets of labels whose numbers there are."""

from __future__ import annotations

from typing import Any

from benchmarks.report.markdown import percent, short, table
from benchmarks.report.records import RESULTS, read

SETS = ("digits-symmetric", "digits-pairs", "fashion-mnist-symmetric", "fashion-mnist-pairs", "cifar-10n-aggregate")
SETS += ("cifar-10n-random1", "cifar-10n-random2", "cifar-10n-random3", "cifar-10n-worst")
METHODS, FOLDS = ("SGD", "AdamW", "IVON", "EVON"), "SGD, five folds"


def scores() -> str:
    """Average precision of every score, by the optimizer that trained; and of cleanlab's recipe."""
    rows = []
    for record in records():
        found = record["table"]
        for place, score in enumerate(found["SGD"]):
            title = _title(record) if place == 0 else ""
            rows.append((title, score, *(_precision(found[method][score]) for method in METHODS)))
        (folds,) = found[FOLDS].values()
        rows.append(("", "cleanlab, five folds", _precision(folds), *("" for _ in range(len(METHODS) - 1))))
    return table(("labels", "score", *METHODS), rows)


def runs() -> str:
    """What the runs were: accuracy, how many labels were counted as wrong, the suggestions, seconds."""
    rows = []
    for record in records():
        for place, method in enumerate((*METHODS, FOLDS)):
            about, found = record["runs"][method]["mean"], record["table"][method]
            seconds = next(iter(found.values()))["mean"]["seconds"]
            expected = "?" if about["expected"] is None else f"{about['expected']:.0f}"
            accuracy = percent(about["accuracy"]) if "accuracy" in about else ""
            suggested = percent(about["right_suggestions"]) if "right_suggestions" in about else ""
            title = _title(record) if place == 0 else ""
            rows.append((title, method, accuracy, f"{expected} of {about['wrong']:.0f}", suggested, f"{seconds:.0f}"))
    header = ("labels", "trained by", "test accuracy", "counted as wrong", "right suggestions", "processor seconds")
    return table(header, rows)


def records() -> list[dict[str, Any]]:
    """The results of every set of labels that has been run."""
    return [read(f"label_errors/{name}") for name in SETS if (RESULTS / f"label_errors/{name}.json").exists()]


def _title(record: dict[str, Any]) -> str:
    seeds = record["command"].partition("--seeds ")[2].split(" ")[0] or "3"
    return f"{record['experiment']['title']} ({seeds} {'seed' if seeds == '1' else 'seeds'})"


def _precision(row: dict[str, Any]) -> str:
    return short(row["mean"]["average_precision"], 3)
