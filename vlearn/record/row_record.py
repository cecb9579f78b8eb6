"""Rows of a table on disk, written batch by batch by one or several processes, each to a part of its own.

A folder holds ``rows.json``, which says what the rows are of, and ``rows.0.npy``, ``rows.1.npy``, ... while they are
written, ``rows.npy`` with all of them in the order of the examples' numbers when they are complete. Each file is an
array of records: ``np.load("rows.npy", mmap_mode="r")["loss"]``.

The rows of a batch are written and synced before the file's header counts them. So a process may be killed at any
moment, and loses the batch that it was at; the next one appends to its part.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from vlearn.record.example_order import example_order

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

_VERSION = 1
_KEY = ("index", "loss", "position")
_COPIED_BYTES = 2**26  # of rows that are held while the parts are joined


class RowRecord:
    """A folder of rows.

    Args:
        path: the folder; made by :meth:`begin`.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether the folder holds rows, or is to hold some."""
        return (self.path / "rows.json").exists()

    @property
    def task(self) -> dict[str, Any]:
        """What the rows are of.

        Raises:
            FileNotFoundError: if the folder holds no rows.
            ValueError: if they are of a version that this vlearn does not know.
        """
        return self._content["task"]

    @property
    def is_complete(self) -> bool:
        """Whether all rows are there."""
        return self._content["complete"]

    @property
    def _content(self) -> dict[str, Any]:
        with open(self.path / "rows.json") as file:
            content = json.load(file)
        if content.get("version") != _VERSION:
            raise ValueError(
                f"{self.path} has rows of version {content.get('version')}, but this vlearn reads version {_VERSION}: "
                "use the vlearn that wrote it, or another path."
            )
        return content

    def begin(self, task: Mapping[str, Any]) -> None:
        """Make the folder, or go on with the one that is there; its rows are of this task, and more may come."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._commit(task, complete=False)

    @property
    def count(self) -> int:
        """The number of rows so far."""
        return sum(len(_read(file)) for file in self._files())

    def rows(self) -> np.ndarray:
        """All rows so far as records ``[N]``; once they are complete, as a view of the disk."""
        parts = [_read(file) for file in self._files()]
        if not parts:
            return np.empty(0, [("index", "<i8"), ("loss", "<f4")])
        self._check_alike(parts)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def key(self) -> np.ndarray:
        """Of all rows so far only what tells them apart, as records ``[N]`` of "index", "loss" and "position"."""
        parts = [_read(file) for file in self._files()] or [self.rows()]
        names = [name for name in _KEY if name in (parts[0].dtype.names or ())]
        key = np.empty(sum(map(len, parts)), [(name, parts[0].dtype[name]) for name in names])
        for name in names:
            key[name] = np.concatenate([part[name] for part in parts])
        return key

    def complete(self) -> None:
        """Join all parts to one file in the order of the examples' numbers, each example once; a kill undoes nothing.

        Raises:
            ValueError: if two rows of one number are of different examples; the parts stay.
        """
        files = self._files()
        if files:
            self._join(files)
        for part in self.path.glob("rows.*.npy"):
            part.unlink(missing_ok=True)
        self._commit(self.task, complete=True)

    def writer(self, part: int) -> RowWriter:
        """To add rows as one of several processes, each with a part of its own.

        Raises:
            RuntimeError: if another process writes to the part now.
        """
        return RowWriter(self.path / f"rows.{part}.npy")

    def _join(self, files: list[Path]) -> None:
        parts = [_read(file) for file in files]
        self._check_alike(parts)
        key, sizes = self.key(), [len(part) for part in parts]
        source = np.repeat(np.arange(len(parts)), sizes)
        columns = {name: key[name] for name in key.dtype.names or ()}
        order = example_order(source=source, names=[file.name for file in files], **columns)
        joined = self.path / "rows.npy"
        if len(files) == 1 and np.array_equal(order, np.arange(sizes[0])):
            os.replace(files[0], joined)
        else:
            starts = np.concatenate([[0], np.cumsum(sizes)])
            new = self.path / "rows.npy.new"
            new.unlink(missing_ok=True)
            with RowWriter(new) as writer:
                step = max(1, _COPIED_BYTES // parts[0].dtype.itemsize)
                for begin in range(0, len(order), step):
                    places = order[begin : begin + step]
                    chunk = np.empty(len(places), parts[0].dtype)
                    for k, part in enumerate(parts):
                        own = source[places] == k
                        chunk[own] = part[places[own] - starts[k]]
                    writer.append(chunk)
            os.replace(new, joined)  # from here on the parts only repeat it

    def _files(self) -> list[Path]:
        """Those that have rows: of complete rows first, then each part's."""
        parts = sorted(self.path.glob("rows.*.npy"), key=lambda file: int(file.name.split(".")[1]))
        return [file for file in (self.path / "rows.npy", *parts) if file.exists() and file.stat().st_size]

    def _check_alike(self, parts: list[np.ndarray]) -> None:
        if any(part.dtype != parts[0].dtype for part in parts):
            raise ValueError(
                f"{self.path} has rows of several kinds: give all batches outputs of one shape and dtype, or leave "
                "what has its shape out (deviation=None)."
            )

    def _commit(self, task: Mapping[str, Any], complete: bool) -> None:
        """Replace ``rows.json`` as a whole."""
        new = self.path / "rows.json.new"
        with open(new, "w") as file:
            json.dump({"version": _VERSION, "complete": complete, "task": dict(task)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path / "rows.json")


class RowWriter:
    """Appends records to an ``.npy`` file, of which no other process may be a writer meanwhile; a context.

    Args:
        file: which need not exist.

    Attributes:
        count: of the records that the file has.

    Raises:
        RuntimeError: if another process writes to the file.
    """

    def __init__(self, file: Path):
        self._path = file
        self._file: IO[bytes] = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        self._lock()
        self.count, self.dtype = 0, None
        if file.stat().st_size:
            found = _read(file)
            self.count, self.dtype = len(found), found.dtype

    def append(self, rows: np.ndarray) -> None:
        """Write records; once this returns, no kill loses them.

        Raises:
            ValueError: if they are of another kind than those of the file.
        """
        if self.dtype is None:
            self.dtype = rows.dtype
            self._write_header()
        if rows.dtype != self.dtype:
            raise ValueError(
                f"{self._path} has rows of another kind ({self.dtype}) than those that come ({rows.dtype}): give all "
                "batches outputs of one shape and dtype, or leave what has its shape out (deviation=None)."
            )
        self._file.seek(len(_header(self.dtype, 0)) + self.count * self.dtype.itemsize)
        self._file.write(np.ascontiguousarray(rows).tobytes())
        self._sync()
        self.count += len(rows)
        self._write_header()

    def close(self) -> None:
        """Let other processes write to the file."""
        self._file.close()

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_header(self) -> None:
        assert self.dtype is not None
        self._file.seek(0)
        self._file.write(_header(self.dtype, self.count))
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise RuntimeError(
                f"another process writes to {self._path}: wait until it ends, or use another path."
            ) from None


def _header(dtype: np.dtype, count: int) -> bytes:
    """That of an ``.npy`` file of records ``[count]``; of one length, whatever the count."""

    def text(count: int) -> str:
        descr = np.lib.format.dtype_to_descr(dtype)
        return repr({"descr": descr, "fortran_order": False, "shape": (count,)})

    length = -(-(len(text(10**20)) + 11) // 64) * 64 - 10  # with magic, version and its own length a multiple of 64
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", length) + (text(count).ljust(length - 1) + "\n").encode("latin1")


def _read(file: Path) -> np.ndarray:
    """The records of a file, as a view of the disk that may be written to in memory alone."""
    return np.load(file, mmap_mode="c")
