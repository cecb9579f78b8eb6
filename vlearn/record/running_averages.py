"""Averages over all that was seen of each example, in memory that does not grow with the number of steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

AVERAGED = ("loss", "margin", "probability", "agreement", "prediction_error", "self_influence")
ALL = "probabilities"  # of all classes


class RunningAverages:
    """Sums and counts of each example's columns, and what was seen of it last.

    An example that is seen k times, in k epochs or as k views of it in one batch, counts k times. Each column has a
    count of its own: what is not finite is left out of the average, as is what was not given.

    Args:
        num_data: number of examples N.
        num_classes: C, if probabilities of all classes are to be averaged too.

    Attributes:
        count: ``[N]`` how often each example was seen.
        predicted: ``[N]`` class that was predicted last, -1 where there is none.
        label: ``[N]`` label that was seen last, -1 where there is none.
        relabelled: ``[N]`` whether the example has been seen with several labels.
        seen_at: ``[N]`` step at which the example was seen last, -1 where it was not.
        num_nonfinite: how many values were left out.
    """

    def __init__(self, num_data: int, num_classes: int | None = None):
        self.num_data, self.num_classes = num_data, num_classes
        self.count = np.zeros(num_data, np.int64)
        self.predicted = np.full(num_data, -1, np.int32)
        self.label = np.full(num_data, -1, np.int32)
        self.relabelled = np.zeros(num_data, bool)
        self.seen_at = np.full(num_data, -1, np.int64)
        self.num_nonfinite = 0
        self._sums: dict[str, np.ndarray] = {}
        self._counts: dict[str, np.ndarray] = {}
        self._probabilities: np.ndarray | None = None

    def add(
        self,
        index: np.ndarray,
        columns: Mapping[str, np.ndarray],
        step: int | np.ndarray = 0,
        predicted: np.ndarray | None = None,
        label: np.ndarray | None = None,
        probabilities: np.ndarray | None = None,
        seen: bool = True,
    ) -> None:
        """Add what a step saw of some examples, each as often as it is there.

        Args:
            index: ``[B]`` numbers.
            columns: ``[B]`` by name, of `AVERAGED`.
            step: of all, or ``[B]`` of each.
            predicted: ``[B]`` classes.
            label: ``[B]`` labels.
            probabilities: ``[B, C]`` predicted probabilities of all classes.
            seen: whether the examples have been seen by this, or these are further columns of what was.
        """
        for name, values in columns.items():
            sums = self._sums.setdefault(name, np.zeros(self.num_data))
            counts = self._counts.setdefault(name, np.zeros(self.num_data, np.int64))
            finite = np.isfinite(values)
            self.num_nonfinite += int(np.count_nonzero(~finite))
            np.add.at(sums, index[finite], values[finite])
            np.add.at(counts, index[finite], 1)
        if probabilities is not None and self.num_classes is not None:
            if self._probabilities is None:
                self._probabilities = np.zeros((self.num_data, self.num_classes), np.float32)
            finite = np.isfinite(probabilities).all(1)
            np.add.at(self._probabilities, index[finite], probabilities[finite].astype(np.float32))
            np.add.at(self._counts.setdefault(ALL, np.zeros(self.num_data, np.int64)), index[finite], 1)
        if seen:
            np.add.at(self.count, index, 1)
            self.seen_at[index] = step
        if predicted is not None:
            self.predicted[index] = predicted
        if label is not None:
            self.relabelled[index] |= differ(self.label[index], label)
            self.label[index] = label

    def mean(self, name: str) -> np.ndarray:
        """``[N]`` average of a column, NaN where none was seen."""
        if name not in self._sums:
            return np.full(self.num_data, np.nan)
        counts = self._counts[name]
        return np.divide(self._sums[name], counts, out=np.full(self.num_data, np.nan), where=counts > 0)

    def probabilities(self) -> np.ndarray | None:
        """``[N, C]`` average probabilities, NaN where none was seen; None where they are not kept."""
        if self._probabilities is None:
            return None
        counts = self._counts[ALL][:, None].astype(np.float32)
        return np.divide(self._probabilities, counts, out=np.full_like(self._probabilities, np.nan), where=counts > 0)

    def merge(self, other: RunningAverages) -> None:
        """Add all that another has seen, as of another process or a later time."""
        self.relabelled |= other.relabelled | differ(self.label, other.label)
        later = other.seen_at >= self.seen_at
        for mine, its in ((self.predicted, other.predicted), (self.label, other.label)):
            np.copyto(mine, its, where=later & (its >= 0))
        np.maximum(self.seen_at, other.seen_at, out=self.seen_at)
        self.count += other.count
        self.num_nonfinite += other.num_nonfinite
        for mine, its in ((self._sums, other._sums), (self._counts, other._counts)):
            for name, values in its.items():
                mine[name] = mine[name] + values if name in mine else values.copy()
        if other._probabilities is not None:
            mine = self._probabilities
            self._probabilities = other._probabilities.copy() if mine is None else mine + other._probabilities

    def copy(self) -> RunningAverages:
        """The same, apart from this."""
        copied = RunningAverages(self.num_data, self.num_classes)
        copied.merge(self)
        return copied

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it holds, by name."""
        arrays = {name: getattr(self, name) for name in ("count", "predicted", "label", "relabelled", "seen_at")}
        arrays["num_nonfinite"] = np.array(self.num_nonfinite)
        arrays |= {f"sum.{name}": values for name, values in self._sums.items()}
        arrays |= {f"counts.{name}": values for name, values in self._counts.items()}
        return arrays if self._probabilities is None else {**arrays, "probabilities": self._probabilities}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any], num_classes: int | None) -> RunningAverages:
        """Undo of `arrays`."""
        made = cls(len(arrays["count"]), num_classes)
        for name in ("count", "predicted", "label", "relabelled", "seen_at"):
            if name in arrays:  # earlier files have no "relabelled"
                setattr(made, name, np.array(arrays[name]))
        made.num_nonfinite = int(arrays["num_nonfinite"])
        for name in (*AVERAGED, ALL):
            if f"sum.{name}" in arrays:
                made._sums[name] = np.array(arrays[f"sum.{name}"])
            if f"counts.{name}" in arrays:
                made._counts[name] = np.array(arrays[f"counts.{name}"])
        if "probabilities" in arrays:
            made._probabilities = np.array(arrays["probabilities"])
        return made


def differ(labels: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Where both are there, -1 being none, and are not the same."""
    return (labels >= 0) & (others >= 0) & (labels != others)
