"""What a training run saw of every example: averages over the run, and their course, in one folder.

The folder is that of a `MemoryMap`, with the averages of every epoch as its live snapshots and the sweeps between
them, and ``averages.npz`` for the run: sums and counts, the label and the class predicted last. That file is replaced
as a whole, so a run may be killed at any moment, and what it had saved opens.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlearn._extras import require
from vlearn.record.memory_map import MemoryMap, as_array
from vlearn.record.running_averages import AVERAGED, RunningAverages

MOST_PROBABILITIES = 2**26  # entries of the average probabilities [N, C] up to which they are kept by default
_FILE = "averages.npz"


class TrainingRecord:
    """Averages of every example over a training run, whichever optimizer makes it.

    ====================  ==============================================================================================
    ``loss``              of the example, in the loss's units
    ``margin``            logit of its label minus the largest other; its average is the area under the margin (Pleiss
                          et al., 2020, arXiv:2001.10528)
    ``probability``       that the model gives its label
    ``agreement``         1 where the predicted class is the label, else 0; of several labels or tokens their share
    ``prediction_error``  ‖p - y‖/√2
    ``self_influence``    gᵀΣg of live sensitivities, where an optimizer of vlearn's made the step
    ====================  ==============================================================================================

    An example that is seen several times, in several epochs or as several views of it in one batch, counts as often.
    Memory does not grow with the number of steps; on disk, a snapshot takes 4 bytes for each example and column.

    Args:
        num_data: number of training examples N.
        path: folder of the record. A folder that already holds one is continued.
        num_classes: C; default the classes of the first probabilities that are recorded.
        probabilities: keep ``[N, C]`` average probabilities of all classes; default up to 2²⁶ entries.
        overwrite: start anew; a record that the folder holds is deleted.

    Attributes:
        memory: the snapshots: `MemoryMap`.
        step: the last step that was recorded.

    Raises:
        ValueError: if ``num_data`` is not positive, or ``path`` holds a record of another number of examples.

    Examples:
        >>> import tempfile
        >>> record = TrainingRecord(num_data=3, path=tempfile.mkdtemp())
        >>> record.record([2, 0], step=1, loss=[1.0, 0.5], margin=[-1.0, 2.0])
        >>> record.record([2, 2], step=2, loss=[2.0, 3.0])
        >>> record.new_snapshot(step=2)
        >>> record.column("loss").tolist()
        [0.5, nan, 2.0]
    """

    def __init__(
        self,
        num_data: int,
        path: str | os.PathLike[str],
        num_classes: int | None = None,
        probabilities: bool | None = None,
        overwrite: bool = False,
    ) -> None:
        # Anything that MemoryMap refuses it refuses before the averages are touched.
        self.memory = MemoryMap(num_data, path, overwrite)
        self.path, self.num_data, self.num_classes = Path(path), self.memory.num_data, num_classes
        self._keeps_probabilities = probabilities
        self.reset()
        if overwrite:
            (self.path / _FILE).unlink(missing_ok=True)
        elif (self.path / _FILE).exists():
            self._load(self.path / _FILE)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> TrainingRecord:
        """Open an existing record, as while it is written by another process.

        Raises:
            FileNotFoundError: if ``path`` holds no record.
        """
        return cls(MemoryMap.open(path).num_data, path)

    def reset(self) -> None:
        """Forget the averages; snapshots stay."""
        self.step = 0
        self._known: int | None = None  # snapshots, of what was loaded
        self._run = RunningAverages(self.num_data)  # up to the last snapshot
        self._open = RunningAverages(self.num_data)  # since

    def __repr__(self) -> str:
        seen = int(np.count_nonzero(self.averages.count))
        return f"TrainingRecord(num_data={self.num_data}, path={str(self.path)!r}, step={self.step}, seen={seen})"

    @property
    def num_epochs(self) -> int:
        """How many snapshots of averages there are, beside those of sweeps."""
        return int((self.memory.kinds[: self._known] == "live").sum())

    @property
    def is_open(self) -> bool:
        """Whether anything was seen since the last snapshot."""
        return bool(self._open.count.any())

    @property
    def averages(self) -> RunningAverages:
        """Sums and counts over the run so far, of which this is a copy."""
        total = self._run.copy()
        total.merge(self._open)
        return total

    def column(self, name: str) -> np.ndarray:
        """``[N]`` average of one quantity over the run so far, NaN where an example was not seen; or ``count``.

        Raises:
            ValueError: if there is no quantity of that name.
        """
        if name == "count":
            return self._run.count + self._open.count
        if name not in AVERAGED:
            raise ValueError(f"column {name!r} does not exist: use count or one of {', '.join(AVERAGED)}.")
        return self.averages.mean(name)

    @property
    def predicted(self) -> np.ndarray:
        """``[N]`` class that was predicted last, -1 where there is none."""
        return self.averages.predicted

    @property
    def labels(self) -> np.ndarray:
        """``[N]`` label that was seen last, -1 where there is none."""
        return self.averages.label

    @property
    def probabilities(self) -> np.ndarray | None:
        """``[N, C]`` average probabilities over the run, NaN where an example was not seen; None if not kept."""
        return self.averages.probabilities()

    def record(
        self,
        index: Any,
        step: Any = None,
        predicted: Any = None,
        label: Any = None,
        probabilities: Any = None,
        **columns: Any,
    ) -> None:
        """Add what a training step saw of its examples; one that is there several times counts as often.

        Args:
            index: ``[B]`` integers, each example's number.
            step: of the training, counted in optimizer steps, of all or ``[B]`` of each; default the last one.
            predicted: ``[B]`` predicted classes, -1 where there is none.
            label: ``[B]`` labels, likewise.
            probabilities: ``[B, C]`` of all classes.
            **columns: ``[B]`` of the quantities above, by name.

        Raises:
            ValueError: if a name is unknown, an index out of range or a shape differs; nothing is added.
        """
        index = self.memory.check_index(index)
        unknown = [name for name in columns if name not in AVERAGED]
        if unknown:
            raise ValueError(f"column {unknown[0]!r} does not exist: use one of {', '.join(AVERAGED)}.")
        rows = {name: _checked(name, values, index) for name, values in columns.items() if values is not None}
        predicted, label = (
            None if values is None else _checked(name, values, index)
            for name, values in {"predicted": predicted, "label": label}.items()
        )
        probabilities = None if probabilities is None else self._checked_probabilities(probabilities, index)
        steps = as_array(self.step if step is None else step).astype(np.int64)
        if steps.ndim:
            _checked("step", steps, index)
        self.step = max(self.step, int(steps.max())) if steps.size else self.step
        # What has to do with the optimizer's state alone is no view of the examples.
        seen = bool(rows.keys() - {"self_influence"})
        self._open.add(index, rows, steps, predicted, label, probabilities, seen)

    @staticmethod
    def keeps_probabilities(num_data: int, num_classes: int, asked: bool | None = None) -> bool:
        """Whether average probabilities ``[N, C]`` are kept, if that was asked for or not said."""
        return num_data * num_classes <= MOST_PROBABILITIES if asked is None else asked

    def new_snapshot(self, step: int | None = None) -> None:
        """Write the averages since the last snapshot as one of the memory map, and those of the run.

        Args:
            step: up to which they go, counted in optimizer steps; default the last that was recorded.

        Raises:
            ValueError: if ``step`` goes back.
        """
        step = self.step if step is None else int(step)
        self._forget_later()
        taken = self._open
        seen = taken.count > 0
        columns = {name: taken.mean(name) for name in AVERAGED}
        columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}
        columns["count"] = taken.count
        columns["step"] = np.where(seen, taken.seen_at, np.nan)
        if (taken.predicted >= 0).any():
            columns["predicted"] = np.where(taken.predicted >= 0, taken.predicted, np.nan)
        self.memory.record_averages(step, columns)
        self._run.merge(taken)
        self._open, self.step = RunningAverages(self.num_data, self.num_classes), step
        self.save()

    def next_step(self, step: int) -> int:
        """The step, or the first after it that a snapshot of averages can have: the training may have made none."""
        kept = slice(self._known)
        steps, kinds = self.memory.steps[kept], self.memory.kinds[kept]
        live = steps[kinds == "live"]
        return max(step, int(steps.max(initial=0)), int(live.max(initial=-1)) + 1)

    def record_sweep(self, step: int, table: Any, test_loss: float | None = None) -> None:
        """Write a sweep as a snapshot of the memory map, see `MemoryMap.record_sweep`."""
        self._forget_later()
        self.memory.record_sweep(step, table, test_loss)
        self.step = max(self.step, int(step))
        self.save()

    def merge(self, other: RunningAverages) -> None:
        """Add what another process has seen since the last snapshot."""
        self._open.num_classes = self._open.num_classes or other.num_classes
        self._open.merge(other)

    def save(self, path: str | os.PathLike[str] | None = None) -> None:
        """Write the averages of the run so far, in its folder or as a file elsewhere, for a checkpoint."""
        file = self.path / _FILE if path is None else Path(path)
        new, arrays = file.with_name(file.name + ".new"), dict[str, Any](self.state_dict())
        with open(new, "wb") as opened:
            np.savez(opened, **arrays)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(new, file)

    def state_dict(self) -> dict[str, np.ndarray]:
        """The averages as arrays, for a checkpoint; the snapshots stay in the folder."""
        snapshots = len(self.memory) if self._known is None else self._known
        arrays = {"step": self.step, "snapshots": snapshots, "num_classes": self.num_classes or 0}
        arrays = {name: np.array(number) for name, number in arrays.items()}
        for part, averages in {"run": self._run, "open": self._open}.items():
            arrays |= {f"{part}/{name}": values for name, values in averages.arrays().items()}
        return arrays

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a checkpoint: its averages, and the snapshots that it knows.

        Raises:
            ValueError: if it is of another number of examples.
        """
        arrays = {name: as_array(values) for name, values in state.items()}
        if len(arrays["run/count"]) != self.num_data:
            raise ValueError(
                f"the checkpoint is of {len(arrays['run/count'])} examples, but num_data={self.num_data}: continue "
                "with the dataset that it was made with, or make a record in another path."
            )
        self.step, self._known = int(arrays["step"]), int(arrays["snapshots"])
        self.num_classes = int(arrays["num_classes"]) or None
        self._run, self._open = (
            RunningAverages.of_arrays(
                {
                    name.removeprefix(f"{part}/"): values
                    for name, values in arrays.items()
                    if name.startswith(f"{part}/")
                },
                self.num_classes,
            )
            for part in ("run", "open")
        )

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go back to what `save` has written elsewhere."""
        self._load(Path(path))

    def summary(self, prefix: str = "") -> dict[str, float]:
        """Summarize the run so far by a few floats, as any logger takes them.

        ===========================  ===============================================================
        ``num_seen``                 examples that were seen
        ``num_nonfinite``            values that were left out, NaN or infinite
        ``loss`` and so on           mean over the examples of each quantity's average
        ``num_disagree``             examples whose predicted class was mostly not their label
        ===========================  ===============================================================

        Args:
            prefix: put before every key.
        """
        averages = self.averages
        summary = {
            "num_seen": float(np.count_nonzero(averages.count)),
            "num_nonfinite": float(averages.num_nonfinite),
        }
        for name in AVERAGED:
            values = averages.mean(name)
            if np.isfinite(values).any():
                summary[name] = float(np.nanmean(values))
                if name == "agreement":
                    summary["num_disagree"] = float(np.count_nonzero(values < 0.5))
        return {prefix + name: value for name, value in summary.items()}

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with a row for each example: the averages, ``count``, ``label``, ``predicted``."""
        return require("pandas", extra="pandas", feature="to_pandas()").DataFrame(self.columns())

    def to_parquet(self, path: str | os.PathLike[str]) -> None:
        """Write the same table as a Parquet file."""
        self.to_pandas().to_parquet(path, index=False)

    def columns(self) -> dict[str, np.ndarray]:
        """``[N]`` ``index``, ``count``, ``label``, ``predicted`` and the averages that are there, by name."""
        averages = self.averages
        columns = {"index": np.arange(self.num_data), "count": averages.count}
        columns |= {"label": averages.label, "predicted": averages.predicted}
        columns |= {name: averages.mean(name) for name in AVERAGED}
        return {name: values for name, values in columns.items() if name not in AVERAGED or np.isfinite(values).any()}

    def _load(self, file: Path) -> None:
        with np.load(file) as arrays:
            self.load_state_dict(dict(arrays))

    def _forget_later(self) -> None:
        """Drop snapshots after what was loaded, as where a kill came between the two or training went back."""
        if self._known is not None and len(self.memory) > self._known:
            self.memory.keep_first(self._known)
        self._known = None

    def _checked_probabilities(self, probabilities: Any, index: np.ndarray) -> np.ndarray | None:
        rows = as_array(probabilities)
        if self.num_classes is None and rows.ndim == 2:
            self.num_classes = rows.shape[1]
        if rows.shape != (len(index), self.num_classes):
            raise ValueError(
                f"probabilities have shape {rows.shape}, but they must be [{len(index)}, {self.num_classes}]: a row "
                "for each example, a column for each class."
            )
        if not self.keeps_probabilities(self.num_data, rows.shape[1], self._keeps_probabilities):
            return None
        self._open.num_classes = self.num_classes
        return rows


def _checked(name: str, values: Any, index: np.ndarray) -> np.ndarray:
    array = as_array(values)
    if array.shape != index.shape:
        raise ValueError(f"{name} has shape {array.shape}, but index has {index.shape}: give one value per example.")
    return array
