"""Memory map on disk: what the model knows of every example, at every recorded step.

A folder holds one ``.npy`` file per column, ``memory.loss.npy`` and so on, float32 ``[snapshot, example]`` with NaN
where an example was not seen, and ``memory.json``: the number of examples, and the step, kind and test loss of every
snapshot. Other programs read ``np.load("memory.loss.npy", mmap_mode="r")[:S]``, where S is the number of snapshots
in ``memory.json``: a file has more rows than S while a snapshot is being written, after a kill, or after a rewind.

The rows of a snapshot are written and synced before ``memory.json`` names it, and that file is replaced as a whole,
so a run may be killed at any moment: a half-written snapshot has no name, and the next one is written over it.
Records of version 1, whose columns are raw ``.f32`` files, are read as they are; the first write copies them to
``.npy`` files and leaves the old files where they are, unused.
"""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlearn.collectives import Together, default_group
from vlearn.record.example_order import example_order

LIVE_COLUMNS = ("self_influence", "prediction_error")
SWEEP_COLUMNS = ("loss", "loo_loss", "self_influence", "leverage", "prediction_error")
COLUMNS = (*SWEEP_COLUMNS, "step")
AVERAGE_COLUMNS = ("margin", "probability", "agreement", "predicted", "count")  # on disk once they are recorded

_DTYPE = np.dtype("<f4")
_VERSION = 2
_HEADER = 128  # bytes before the numbers of an .npy file; numpy pads them, so that the first axis can grow in place


class MemoryMap:
    """Per-example quantities of a training run, one row of ``num_data`` numbers per snapshot and column.

    Columns are ``loss``, ``loo_loss`` and ``self_influence`` (the loss's units), ``leverage`` (effective
    parameters), ``prediction_error`` (in [0, 1] for hard-label cross-entropy), and ``step``, at which a live
    row was taken; a `TrainingRecord` adds ``margin``, ``probability``, ``agreement``, ``predicted`` and ``count``. A
    snapshot is either *live* (rows from training steps, at the weights that they were taken at) or a *sweep* (all at
    the posterior mean); the two never mix. One process writes, or all of torch.distributed do with `sync`;
    others may open the folder to read.

    Args:
        num_data: number of training examples, the length of every row.
        path: folder of the record. A folder that already holds one is continued.
        overwrite: start anew; a record that the folder holds is deleted.
        sync: written by all processes of torch.distributed, of which each records its own examples, live or swept; the
            record is that of one process with all of them. All must make every call, but for :meth:`record` and
            those that read; the folder must be one for all.

    Raises:
        ValueError: if ``num_data`` is not positive, or ``path`` holds a record of another number of examples or of
            a version that this vlearn does not know.
        RuntimeError: with ``sync``, here and in every call that all make, if it failed in another process.

    Source: memory maps, Tailor et al. (2024).

    Examples:
        >>> import tempfile
        >>> from types import SimpleNamespace
        >>> memory = MemoryMap(num_data=4, path=tempfile.mkdtemp())
        >>> memory.new_snapshot(step=0)
        >>> memory.record([2, 0], SimpleNamespace(self_influence=[0.5, 0.25], prediction_error=[1.0, 0.0]))
        >>> memory.column("self_influence")[0].tolist()
        [0.25, nan, 0.5, nan]
    """

    def __init__(
        self, num_data: int, path: str | os.PathLike[str], overwrite: bool = False, sync: bool = False
    ) -> None:
        self.num_data = operator.index(num_data)
        if self.num_data < 1:
            raise ValueError(f"num_data={num_data}, but it must be positive: use the number of training examples.")
        self.path = Path(path)
        self._processes = Together(default_group() if sync else None, "record")

        def make() -> None:
            if (self.path / "memory.json").exists() and not overwrite:
                self.refresh()
            else:
                self.path.mkdir(parents=True, exist_ok=True)
                self._commit([])
                for name in (*COLUMNS, *AVERAGE_COLUMNS) if overwrite else ():
                    self._file(name).unlink(missing_ok=True)
                    self._file(name, version=1).unlink(missing_ok=True)

        self._in_first(make)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> MemoryMap:
        """Open an existing record, whatever its number of examples.

        Raises:
            FileNotFoundError: if ``path`` holds no record.
        """
        return cls(_read(Path(path))["num_data"], path)

    def refresh(self) -> MemoryMap:
        """Look up which snapshots the writer has finished by now.

        Between two calls ``steps``, ``kinds``, ``test_loss`` and the columns keep one length, however many snapshots
        the writer adds. Rows of the open live snapshot are seen as they are written, without a call.

        Returns:
            This record.

        Raises:
            ValueError: if the folder now holds a record of another number of examples.
        """
        content = _read(self.path)
        if content["num_data"] != self.num_data:
            raise ValueError(
                f"num_data={self.num_data}, but {self.path} holds a record of {content['num_data']} examples: "
                f"use another path, MemoryMap.open({str(self.path)!r}) to continue it, or overwrite=True."
            )
        self._version, self._snapshots, self._open_rows = content["version"], content["snapshots"], {}
        return self

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
        return np.array([snapshot["test_loss"] for snapshot in self._snapshots], dtype=np.float64)

    def column(self, name: str) -> np.ndarray:
        """One quantity of every example at every snapshot so far, as a read-only view of the disk.

        Args:
            name: ``loss``, ``loo_loss``, ``self_influence``, ``leverage``, ``prediction_error``, ``step``, or one that
                a `TrainingRecord` adds.

        Returns:
            ``[S, num_data]`` float32, NaN where unseen; nothing is loaded until it is indexed.

        Raises:
            ValueError: if there is no column of that name.
        """
        _check_names([name])
        file, shape = self._file(name, self._version), (len(self), self.num_data)
        if len(self) == 0 or not file.exists():
            return np.broadcast_to(np.array(np.nan, _DTYPE), shape)
        return np.memmap(file, _DTYPE, "r", offset=0 if self._version == 1 else _HEADER, shape=shape)

    def new_snapshot(self, step: int) -> None:
        """Open a live snapshot, to which :meth:`record` writes from now on.

        Naming the step of the live snapshot that is open already continues it, as a resumed run does.

        Args:
            step: training step, counted in optimizer steps; not before the last snapshot.

        Raises:
            ValueError: if ``step`` goes back.
        """

        def open_live() -> None:
            if not (self._live_is_open() and self._snapshots[-1]["step"] == operator.index(step)):
                self._append({"step": self._check_step(step, "live"), "kind": "live", "test_loss": None}, [], {})

        self._in_first(open_live)

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
        index = self.check_index(index)
        columns: dict[str, Any] = {name: _check_column(name, getattr(s, name), index) for name in LIVE_COLUMNS}
        if getattr(s, "step", None) is not None:
            columns["step"] = float(s.step)
        self._convert()
        for name, values in columns.items():
            if name not in self._open_rows:
                self._open_rows[name] = np.memmap(self._file(name), _DTYPE, "r+", _HEADER, (len(self), self.num_data))
            self._open_rows[name][-1, index] = values

    def record_sweep(self, step: int, table: Any, test_loss: float | None = None) -> None:
        """Write a sweep over the data set as a snapshot of its own: all of it or, after a kill, nothing.

        With ``sync`` each process gives the rows of its own share, or all the same whole table.

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

        def own() -> tuple[int, np.ndarray, dict[str, np.ndarray]]:
            index = self.check_index(table.index)
            repeated = index[np.bincount(index, minlength=self.num_data)[index] > 1]
            if len(repeated):
                raise ValueError(
                    f"table.index holds {repeated[0]} more than once, but a sweep sees every example once: "
                    "use a loader without replacement."
                )
            given = {name: getattr(table, name, None) for name in SWEEP_COLUMNS}
            columns = {name: _check_column(name, values, index) for name, values in given.items() if values is not None}
            if not columns:
                raise ValueError(f"The table has nothing to record: give one of {', '.join(SWEEP_COLUMNS)}.")
            return self._check_step(step, "sweep"), index, columns

        (step, index, columns), *others = self._processes.each(own)
        if others:
            index, columns = _of_all([(index, columns), *((each, values) for _, each, values in others)])
        test_loss = None if test_loss is None else float(test_loss)
        snapshot = {"step": step, "kind": "sweep", "test_loss": test_loss}
        self._in_first(lambda: self._append(snapshot, index, columns))

    def record_averages(self, step: int, columns: Mapping[str, Any]) -> None:
        """Write averages over training steps as a live snapshot of its own: all of it or, after a kill, nothing.

        Args:
            step: training step up to which they go, counted in optimizer steps; after the last live snapshot.
            columns: ``[num_data]`` by name, NaN for examples that were not seen; with ``sync``, the first process's.

        Raises:
            ValueError: if ``step`` goes back, a name is unknown or a shape differs; nothing is written.
        """
        step, index = self._check_step(step, "live"), np.arange(self.num_data)
        _check_names(columns)
        rows = {name: _check_column(name, values, index) for name, values in columns.items()}
        snapshot = {"step": step, "kind": "live", "test_loss": None}
        self._in_first(lambda: self._append(snapshot, index, rows))

    def rewind(self, step: int) -> None:
        """Forget the snapshots after ``step``, as when training resumes from a checkpoint of that step.

        Args:
            step: training step of the checkpoint, counted in optimizer steps.
        """

        def forget() -> None:
            self._convert()
            self._commit([snapshot for snapshot in self._snapshots if snapshot["step"] <= operator.index(step)])

        self._in_first(forget)

    def keep_first(self, count: int) -> None:
        """Forget all snapshots but the first ``count``."""

        def forget() -> None:
            self._convert()
            self._commit(self._snapshots[: operator.index(count)])

        self._in_first(forget)

    def _in_first(self, write: Callable[[], None]) -> None:
        """Let one process write, and all see what it has written."""
        is_first = self._processes.rank == 0
        self._processes.agreed(write if is_first else lambda: None)
        if not is_first:
            self.refresh()

    def check_index(self, index: Any) -> np.ndarray:
        """``[B]`` numbers of examples as an array.

        Raises:
            ValueError: if they are no integers, or out of range.
        """
        index = as_array(index)
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

    def _append(self, snapshot: dict[str, Any], index: Any, columns: dict[str, np.ndarray]) -> None:
        """Write a snapshot's rows, NaN where ``columns`` have no values for an example, then name the snapshot."""
        self._convert()
        nan = np.array(np.nan, _DTYPE)
        kept = [name for name in AVERAGE_COLUMNS if name in columns or self._file(name).exists()]
        for name in (*COLUMNS, *kept):
            if name in kept and self._size(name) < len(self):  # of earlier snapshots
                self._write(name, 0, np.broadcast_to(nan, (len(self), self.num_data)))
            rows = np.full((1, self.num_data), nan)
            if name in columns:
                rows[0, index] = columns[name]
            self._write(name, len(self), rows)
        self._commit([*self._snapshots, snapshot])

    def _write(self, name: str, start: int, rows: np.ndarray) -> None:
        """Write rows of a column from row ``start`` on, then the header that counts them, and sync both."""
        file = self._file(name)
        with open(file, "r+b" if file.exists() else "w+b") as column:
            column.seek(_HEADER + start * self.num_data * _DTYPE.itemsize)
            for row in rows:
                column.write(row.tobytes())
            column.flush()  # a reader that finds the new header finds the rows
            column.seek(0)
            header = {"descr": _DTYPE.str, "fortran_order": False, "shape": (start + len(rows), self.num_data)}
            np.lib.format.write_array_header_1_0(column, header)
            column.flush()
            os.fsync(column.fileno())

    def _convert(self) -> None:
        """Copy the columns of a record of version 1 to ``.npy`` files; readers may still hold the ``.f32`` files."""
        if self._version == 1:
            for name in COLUMNS:
                self._write(name, 0, self.column(name))
            self._commit(self._snapshots)

    def _commit(self, snapshots: list[dict[str, Any]]) -> None:
        """Name the snapshots, whose rows are on disk, by replacing ``memory.json`` as a whole."""
        new = self.path / "memory.json.new"
        with open(new, "w") as file:
            json.dump({"version": _VERSION, "num_data": self.num_data, "snapshots": snapshots}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path / "memory.json")
        self._version, self._snapshots, self._open_rows = _VERSION, snapshots, {}

    def _file(self, name: str, version: int = _VERSION) -> Path:
        return self.path / (f"{name}.f32" if version == 1 else f"memory.{name}.npy")

    def _size(self, name: str) -> int:
        """How many whole rows a column's file has."""
        file = self._file(name)
        return (file.stat().st_size - _HEADER) // (self.num_data * _DTYPE.itemsize) if file.exists() else -1

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


def _read(path: Path) -> dict[str, Any]:
    if not (path / "memory.json").exists():
        raise FileNotFoundError(f"{path} holds no record (memory.json): give the folder that a record was written to.")
    with open(path / "memory.json") as file:
        content = json.load(file)
    if content.get("version") not in (1, _VERSION):
        raise ValueError(
            f"{path} has record version {content.get('version')}, but this vlearn reads versions 1 and {_VERSION}: "
            "use the vlearn that wrote it, or another path."
        )
    return content


def _of_all(told: list[tuple[np.ndarray, dict[str, np.ndarray]]]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The rows of all processes; what several have is there once.

    Raises:
        ValueError: if two have different examples under one number, or other columns.
    """
    ranks = [rank for rank, (index, _) in enumerate(told) if len(index)] or [0]
    parts = [told[rank] for rank in ranks]
    names = list(parts[0][1])
    other = next((list(columns) for _, columns in parts if list(columns) != names), None)
    if other is not None:
        raise ValueError(f"the processes give the columns {names} and {other}: sweep with the same arguments in all.")
    index = np.concatenate([index for index, _ in parts])
    columns = {name: np.concatenate([columns[name] for _, columns in parts]) for name in names}
    source = np.repeat(np.arange(len(parts)), [len(index) for index, _ in parts])
    compared = columns.get("loss", next(iter(columns.values())))
    order = example_order(index, compared, source, [f"process {rank}" for rank in ranks])
    return index[order], {name: values[order] for name, values in columns.items()}


def _check_names(names: Iterable[str]) -> None:
    for name in names:
        if name not in (*COLUMNS, *AVERAGE_COLUMNS):
            raise ValueError(f"column {name!r} does not exist: use one of {', '.join((*COLUMNS, *AVERAGE_COLUMNS))}.")


def _check_column(name: str, values: Any, index: np.ndarray) -> np.ndarray:
    array = as_array(values)
    if array.shape != index.shape:
        raise ValueError(f"{name} has shape {array.shape}, but index has {index.shape}: give one value per example.")
    with np.errstate(over="ignore"):
        return array.astype(_DTYPE)


def as_array(values: Any) -> np.ndarray:
    """Array of a list, array or tensor, without importing torch; numpy has no bfloat16, which becomes float32."""
    if hasattr(values, "detach"):
        values = (values.detach().float() if str(values.dtype) == "torch.bfloat16" else values.detach()).cpu()
    return np.asarray(values)
