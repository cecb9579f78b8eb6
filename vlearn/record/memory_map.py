"""Memory map on disk: what the model knows of every example, at every recorded step.

A folder holds ``memory.json`` (number of examples; step, kind and test loss of every snapshot) and one file
per column, ``leverage.f32`` and so on: raw little-endian float32, ``[snapshot, example]`` in row-major order,
NaN where unseen. The rows of a snapshot are written before ``memory.json`` names it, and that file is
replaced as a whole, so a run may be killed at any moment: a half-written snapshot is not there, and the next
one is written over it.
"""

from __future__ import annotations

import json
import operator
import os
from pathlib import Path
from typing import Any

import numpy as np

LIVE_COLUMNS = ("self_influence", "prediction_error")
SWEEP_COLUMNS = ("loss", "loo_loss", "self_influence", "leverage", "prediction_error")
COLUMNS = (*SWEEP_COLUMNS, "step")

_DTYPE = np.dtype("<f4")
_VERSION = 1


class MemoryMap:
    """Per-example quantities of a training run, one row of ``num_data`` numbers per snapshot and column.

    Columns are ``loss``, ``loo_loss`` and ``self_influence`` (the loss's units), ``leverage`` (effective
    parameters), ``prediction_error`` (in [0, 1] for hard-label cross-entropy), and ``step``, at which a live
    row was taken. A snapshot is either *live* (rows from training steps, at sampled weights) or a *sweep*
    (all at the posterior mean); the two never mix. One process writes; others may open the folder to read.

    Args:
        num_data: number of training examples, the length of every row.
        path: folder of the record. A folder that already holds one is continued.
        overwrite: start anew; a record that the folder holds is deleted.

    Raises:
        ValueError: if ``num_data`` is not positive, or ``path`` holds a record of another number of examples.

    Source: memory maps, Tailor et al. (2024).

    Example:
        >>> import tempfile
        >>> from types import SimpleNamespace
        >>> memory = MemoryMap(num_data=4, path=tempfile.mkdtemp())
        >>> memory.new_snapshot(step=0)
        >>> memory.record([2, 0], SimpleNamespace(self_influence=[0.5, 0.25], prediction_error=[1.0, 0.0]))
        >>> memory.column("self_influence")[0].tolist()
        [0.25, nan, 0.5, nan]
    """

    def __init__(self, num_data: int, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        self.num_data = operator.index(num_data)
        if self.num_data < 1:
            raise ValueError(f"num_data={num_data}, but it must be positive: use the number of training examples.")
        self.path = Path(path)
        self._snapshots: list[dict[str, Any]] = []
        self._open_rows: dict[str, np.memmap] = {}
        if (self.path / "memory.json").exists() and not overwrite:
            found, self._snapshots = _read(self.path)
            if found != self.num_data:
                raise ValueError(
                    f"num_data={self.num_data}, but {self.path} holds a record of {found} examples: "
                    f"use another path, MemoryMap.open({str(self.path)!r}) to continue it, or overwrite=True."
                )
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            self._commit(self._snapshots)
            for name in COLUMNS if overwrite else ():
                self._file(name).unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MemoryMap:
        """Open an existing record, whatever its number of examples.

        Raises:
            FileNotFoundError: if ``path`` holds no record.
        """
        return cls(_read(Path(path))[0], path)

    def __len__(self) -> int:
        """Number of snapshots."""
        return len(self._snapshots)

    def __repr__(self) -> str:
        return f"MemoryMap(num_data={self.num_data}, path={str(self.path)!r}, snapshots={len(self)})"

    @property
    def steps(self) -> np.ndarray:
        """``[S]`` training step of every snapshot, int64."""
        return np.array([snapshot["step"] for snapshot in self._snapshots], dtype=np.int64)

    @property
    def kinds(self) -> np.ndarray:
        """``[S]`` of ``"live"`` (sampled weights) or ``"sweep"`` (posterior mean)."""
        return np.array([snapshot["kind"] for snapshot in self._snapshots], dtype="<U5")

    @property
    def test_loss(self) -> np.ndarray:
        """``[S]`` mean test loss, float64, NaN where none was given."""
        losses = [snapshot["test_loss"] for snapshot in self._snapshots]
        return np.array([np.nan if loss is None else loss for loss in losses], dtype=np.float64)

    def column(self, name: str) -> np.ndarray:
        """One quantity of every example at every snapshot so far, as a read-only view of the disk.

        Args:
            name: ``loss``, ``loo_loss``, ``self_influence``, ``leverage``, ``prediction_error`` or ``step``.

        Returns:
            ``[S, num_data]`` float32, NaN where unseen; nothing is loaded until it is indexed.

        Raises:
            ValueError: if there is no column of that name.
        """
        if name not in COLUMNS:
            raise ValueError(f"column {name!r} does not exist: use one of {', '.join(COLUMNS)}.")
        shape = (len(self), self.num_data)
        if len(self) == 0 or not self._file(name).exists():
            return np.broadcast_to(np.array(np.nan, _DTYPE), shape)
        return np.memmap(self._file(name), _DTYPE, mode="r", shape=shape)

    def new_snapshot(self, step: int) -> None:
        """Open a live snapshot, to which :meth:`record` writes from now on.

        Naming the step of the live snapshot that is open already continues it, as a resumed run does.

        Args:
            step: training step, counted in optimizer steps; not before the last snapshot.

        Raises:
            ValueError: if ``step`` goes back.
        """
        if self._live_is_open() and self._snapshots[-1]["step"] == operator.index(step):
            return
        self._append({"step": self._check_step(step, "live"), "kind": "live", "test_loss": None}, {})

    def record(self, index: Any, s: Any) -> None:
        """Write the live rows of a minibatch to the open snapshot; an example seen again is written over.

        Args:
            index: ``[B]`` integers, each example's place in the training set.
            s: what ``optimizer.sensitivities()`` returns, or any object with arrays or tensors
                ``self_influence`` ``[B]`` and ``prediction_error`` ``[B]`` and perhaps a number ``step``.

        Raises:
            RuntimeError: if no live snapshot is open.
            ValueError: if an index is out of range or a shape differs; nothing is written.
        """
        if not self._live_is_open():
            raise RuntimeError("No live snapshot is open: call new_snapshot(step) before record(index, s).")
        index = self._check_index(index)
        columns = {name: _check_column(name, getattr(s, name), index) for name in LIVE_COLUMNS}
        step = getattr(s, "step", None)
        if step is not None:
            columns["step"] = np.full(len(index), step, _DTYPE)
        for name, values in columns.items():
            if name not in self._open_rows:
                self._open_rows[name] = self._row(name, len(self) - 1)
            self._open_rows[name][index] = values

    def record_sweep(self, step: int, table: Any, test_loss: float | None = None) -> None:
        """Write a sweep over the data set as a snapshot of its own: all of it or, after a kill, nothing.

        Args:
            step: training step, counted in optimizer steps; after the last sweep.
            table: what ``vlearn.sweep`` returns, or any object with arrays or tensors ``[B]`` ``index``
                (unique) and ``loss``, ``loo_loss``, ``self_influence``, ``leverage``, ``prediction_error``,
                some of which may be None.
            test_loss: mean loss on test data at the same weights, if known.

        Raises:
            ValueError: if ``step`` goes back, an index is out of range or repeated, or a shape differs;
                nothing is written.
        """
        step = self._check_step(step, "sweep")
        index = self._check_index(table.index)
        repeated = index[np.bincount(index, minlength=self.num_data)[index] > 1]
        if len(repeated):
            raise ValueError(
                f"table.index holds {repeated[0]} more than once, but a sweep sees every example once: "
                "use a loader without replacement."
            )
        given = {name: getattr(table, name, None) for name in SWEEP_COLUMNS}
        rows = {}
        for name, values in given.items():
            if values is not None:
                rows[name] = np.full(self.num_data, np.nan, _DTYPE)
                rows[name][index] = _check_column(name, values, index)
        if not rows:
            raise ValueError(f"The table has nothing to record: give one of {', '.join(SWEEP_COLUMNS)}.")
        test_loss = None if test_loss is None else float(test_loss)
        self._append({"step": step, "kind": "sweep", "test_loss": test_loss}, rows)

    def rewind(self, step: int) -> None:
        """Forget the snapshots after ``step``, as when training resumes from a checkpoint of that step."""
        self._open_rows = {}
        self._commit([snapshot for snapshot in self._snapshots if snapshot["step"] <= operator.index(step)])

    def _append(self, snapshot: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
        self._open_rows = {}
        unseen = np.full(self.num_data, np.nan, _DTYPE)
        for name in COLUMNS:
            if name in rows or self._file(name).exists():
                row = self._row(name, len(self))
                row[:] = rows.get(name, unseen)
                row.flush()
        self._commit([*self._snapshots, snapshot])

    def _row(self, name: str, snapshot: int) -> np.memmap:
        """Row of a column for writing; a column not on disk yet starts as NaN."""
        file = self._file(name)
        if not file.exists():
            unseen = np.full(self.num_data, np.nan, _DTYPE).tobytes()
            with open(file.with_suffix(".new"), "wb") as new:
                for _ in range(snapshot + 1):
                    new.write(unseen)
            os.replace(new.name, file)
        offset = snapshot * self.num_data * _DTYPE.itemsize
        return np.memmap(file, _DTYPE, mode="r+", offset=offset, shape=(self.num_data,))

    def _commit(self, snapshots: list[dict[str, Any]]) -> None:
        new = self.path / "memory.json.new"
        with open(new, "w") as file:
            json.dump({"version": _VERSION, "num_data": self.num_data, "snapshots": snapshots}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path / "memory.json")
        self._snapshots = snapshots

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.f32"

    def _live_is_open(self) -> bool:
        return len(self) > 0 and self._snapshots[-1]["kind"] == "live"

    def _check_step(self, step: int, kind: str) -> int:
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step={step}, but it must not be negative: count optimizer steps from 0.")
        last = self._snapshots[-1]["step"] if self._snapshots else -1
        # A live snapshot may open at the step of the sweep before it; a second one of its kind may not.
        repeated = any(snapshot["step"] == step and snapshot["kind"] == kind for snapshot in self._snapshots)
        if step < last or repeated:
            raise ValueError(
                f"step={step}, but {self.path} already has a snapshot of step {last}: steps must grow; after "
                "going back to a checkpoint call rewind(step) with the checkpoint's step."
            )
        return step

    def _check_index(self, index: Any) -> np.ndarray:
        index = _as_array(index)
        if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
            raise ValueError(
                f"index has shape {index.shape} and type {index.dtype}, but it must be [B] integers: "
                "each example's place in the training set (vlearn.IndexedDataset yields it)."
            )
        outside = index[(index < 0) | (index >= self.num_data)]
        if len(outside):
            raise ValueError(
                f"index {outside[0]} is out of range, but indices must be 0 to {self.num_data - 1} "
                f"for num_data={self.num_data}: use each example's place in the training set."
            )
        return index.astype(np.int64)


def _read(path: Path) -> tuple[int, list[dict[str, Any]]]:
    with open(path / "memory.json") as file:
        content = json.load(file)
    if content.get("version") != _VERSION:
        raise ValueError(
            f"{path} has record version {content.get('version')}, but this vlearn reads version {_VERSION}: "
            "use the vlearn that wrote it, or another path."
        )
    return content["num_data"], content["snapshots"]


def _as_array(values: Any) -> np.ndarray:
    """Array of a list, array or tensor, without importing torch."""
    return np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)


def _check_column(name: str, values: Any, index: np.ndarray) -> np.ndarray:
    # numpy has no bfloat16, so a tensor becomes float32 on its own side.
    array = _as_array(values.detach().float() if hasattr(values, "detach") else values)
    if array.shape != index.shape:
        raise ValueError(f"{name} has shape {array.shape}, but index has {index.shape}: give one value per example.")
    with np.errstate(over="ignore"):
        return array.astype(_DTYPE)
