"""Rows on disk survive a kill at any moment, and no two processes write to one part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlearn.record.example_order import example_order
from vlearn.record.row_record import RowRecord

KIND = np.dtype([("index", "<i8"), ("loss", "<f4"), ("deviation", "<f8", (3,)), ("kept", "?")], align=True)


def rows(numbers: list[int]) -> np.ndarray:
    found = np.zeros(len(numbers), KIND)
    found["index"], found["loss"] = numbers, np.array(numbers) / 2
    found["deviation"] = np.arange(3) + np.array(numbers)[:, None]
    return found


def begun(path: Path) -> RowRecord:
    record = RowRecord(path)
    record.begin({"of": "a test"})
    return record


def test_parts_are_joined_in_the_order_of_numbers_each_once(tmp_path: Path) -> None:
    record = begun(tmp_path)
    for part, batches in enumerate([[[7, 0], [4]], [], [[1, 5], [7, 2]]]):
        with record.writer(part) as writer:
            for batch in batches:
                writer.append(rows(batch))
    assert not record.is_complete and len(record.rows()) == 7
    record.complete()
    found = record.rows()
    np.testing.assert_array_equal(found, rows([0, 1, 2, 4, 5, 7]))
    assert record.is_complete and record.task == {"of": "a test"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["rows.json", "rows.npy"]
    with record.writer(0) as writer:  # more may come
        writer.append(rows([3, 0]))
    record.complete()
    assert record.rows()["index"].tolist() == [0, 1, 2, 3, 4, 5, 7]


def test_other_programs_read_the_file(tmp_path: Path) -> None:
    record = begun(tmp_path)
    with record.writer(0) as writer:
        for start in range(0, 2000, 100):
            writer.append(rows(list(range(start, start + 100))))
    for name in ("rows.0.npy", "rows.npy"):
        np.testing.assert_array_equal(np.load(tmp_path / name), rows(list(range(2000))))
        record.complete()


@pytest.mark.parametrize("lost", [1, 20, 60])
def test_a_batch_that_was_being_written_is_lost_and_no_other(tmp_path: Path, lost: int) -> None:
    record = begun(tmp_path)
    with record.writer(0) as writer:
        writer.append(rows([0, 1]))
        before = (tmp_path / "rows.0.npy").read_bytes()
        writer.append(rows([2, 3]))
    whole = (tmp_path / "rows.0.npy").read_bytes()
    length = len(before) - 2 * KIND.itemsize
    (tmp_path / "rows.0.npy").write_bytes(before[:length] + whole[length:-lost])  # the header is written last
    assert record.rows()["index"].tolist() == [0, 1]
    with record.writer(0) as writer:
        writer.append(rows([5]))
    assert record.rows()["index"].tolist() == [0, 1, 5]


def test_parts_of_other_kinds_are_not_joined(tmp_path: Path) -> None:
    record = begun(tmp_path)
    other = np.zeros(1, [("index", "<i8"), ("loss", "<f8")])
    with record.writer(0) as writer:
        writer.append(rows([0]))
        with pytest.raises(ValueError, match="rows of another kind"):
            writer.append(other)
    with record.writer(1) as writer:
        writer.append(other)
    with pytest.raises(ValueError, match="rows of several kinds"):
        record.complete()
    assert len(list(tmp_path.glob("rows.*.npy"))) == 2, "nothing is lost"


def test_no_two_processes_write_to_one_part(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    record = begun(tmp_path)
    attempt = f"from vlearn.record.row_record import RowRecord; RowRecord({str(tmp_path)!r}).writer(0)"
    with record.writer(0):
        ran = subprocess.run([sys.executable, "-c", attempt], capture_output=True, text=True)
    assert ran.returncode == 1 and "another process writes to" in ran.stderr
    assert subprocess.run([sys.executable, "-c", attempt], capture_output=True).returncode == 0


def test_examples_that_come_again_must_be_the_same() -> None:
    index, source = np.array([3, 1, 3, 2, 1]), np.array([0, 0, 1, 1, 1])
    loss = np.array([0.5, 1.0, 0.5 + 1e-6, np.nan, 1.0])
    assert example_order(index, loss, source, ["a", "b"]).tolist() == [1, 3, 0]
    position = np.array([0, 0, 1, 0, 0])
    assert example_order(index, loss, source, ["a", "b"], position).tolist() == [1, 3, 0, 2]
    loss[4] = 1.1
    with pytest.raises(ValueError, match="example 1 has the loss 1 in a and 1.1 in b"):
        example_order(index, loss, source, ["a", "b"])
