import json
import multiprocessing
import os
import signal
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vlearn.record import MemoryMap
from vlearn.record.memory_map import COLUMNS

N = 6


@pytest.fixture
def memory(tmp_path):
    return MemoryMap(num_data=N, path=tmp_path / "run")


def rows(*values, step=None):
    values = np.array(values, dtype=np.float32)
    return SimpleNamespace(self_influence=values, prediction_error=values / 10, step=step)


def sweep(index=range(N), scale=1.0, **replaced):
    index = np.array(index)
    columns = {
        "loss": index + 0.1,
        "loo_loss": index + 0.2,
        "self_influence": index + 0.3,
        "leverage": index + 0.4,
    }
    columns = {name: scale * values for name, values in columns.items()}
    columns |= {"prediction_error": index / 10, "index": index, **replaced}
    return SimpleNamespace(**columns)


def content(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_live_rows_go_to_the_open_snapshot_and_the_rest_is_nan(memory):
    memory.new_snapshot(step=0)
    memory.record([3, 1], rows(30, 10, step=7))
    memory.record([5], rows(50, step=8))
    memory.new_snapshot(step=10)
    memory.record([0], rows(1))
    nan = np.nan
    np.testing.assert_array_equal(
        memory.column("self_influence"), [[nan, 10, nan, 30, nan, 50], [1, nan, nan, nan, nan, nan]]
    )
    np.testing.assert_allclose(memory.column("prediction_error")[0, [1, 3, 5]], [1, 3, 5])
    np.testing.assert_array_equal(memory.column("step"), [[nan, 7, nan, 7, nan, 8], [nan] * 6])
    np.testing.assert_array_equal(memory.steps, [0, 10])


def test_an_example_seen_again_is_written_over(memory):
    memory.new_snapshot(step=0)
    memory.record([2], rows(1))
    memory.record([2], rows(9))
    assert memory.column("self_influence")[0, 2] == 9


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tensors_are_recorded_like_arrays(memory, dtype):
    memory.new_snapshot(step=torch.tensor(3))
    s = SimpleNamespace(
        self_influence=torch.tensor([0.5, 0.25], dtype=dtype, requires_grad=True),
        prediction_error=torch.tensor([1.0, 0.0], dtype=dtype),
        step=torch.tensor(4.0),
    )
    memory.record(torch.tensor([4, 0]), s)
    np.testing.assert_array_equal(memory.column("self_influence")[0, [4, 0]], [0.5, 0.25])
    np.testing.assert_array_equal(memory.column("step")[0, [4, 0]], [4, 4])
    assert memory.steps.tolist() == [3]


def test_a_sweep_in_any_order_lands_by_index(memory):
    memory.record_sweep(5, sweep([4, 2, 0]), test_loss=0.7)
    nan = np.nan
    np.testing.assert_allclose(memory.column("leverage"), [[0.4, nan, 2.4, nan, 4.4, nan]])
    np.testing.assert_allclose(memory.column("loo_loss"), [[0.2, nan, 2.2, nan, 4.2, nan]], rtol=1e-6)
    np.testing.assert_array_equal(memory.test_loss, [0.7])


def test_a_missing_column_or_test_loss_is_nan(memory):
    memory.record_sweep(5, sweep(leverage=None))
    memory.record_sweep(6, sweep())
    assert np.isnan(memory.column("leverage")[0]).all()
    assert np.isfinite(memory.column("leverage")[1]).all()
    assert np.isnan(memory.test_loss).all()
    assert memory.column("step").shape == (2, N)


def test_live_snapshots_and_sweeps_alternate_at_equal_steps(memory):
    memory.new_snapshot(0)
    memory.record([0], rows(1))
    memory.record_sweep(10, sweep())
    memory.new_snapshot(10)
    memory.record([0], rows(2))
    assert memory.kinds.tolist() == ["live", "sweep", "live"]
    np.testing.assert_allclose(memory.column("self_influence")[:, 0], [1, 0.3, 2])


def test_columns_are_read_only_views_of_the_disk(memory):
    memory.record_sweep(0, sweep())
    column = memory.column("loss")
    assert isinstance(column, np.memmap)
    for name in ("loss", "step"):
        with pytest.raises(ValueError, match="read-only"):
            memory.column(name)[0, 0] = 1


def test_columns_are_npy_files_that_numpy_reads_without_vlearn(memory):
    for step in range(11):
        memory.record_sweep(step, sweep(scale=step))
    memory.new_snapshot(11)
    memory.record([2], rows(7, step=12))
    files = sorted(file.name for file in memory.path.glob("*.npy"))
    assert files == sorted(f"memory.{name}.npy" for name in COLUMNS)
    for name in COLUMNS:
        column = np.load(memory.path / f"memory.{name}.npy", mmap_mode="r")
        assert column.dtype == np.float32
        np.testing.assert_array_equal(column, memory.column(name))
    snapshots = json.loads((memory.path / "memory.json").read_text())["snapshots"]
    assert snapshots[10] == {"step": 10, "kind": "sweep", "test_loss": None}


def test_a_reader_sees_new_snapshots_when_it_refreshes(memory):
    memory.record_sweep(0, sweep())
    reader = MemoryMap.open(memory.path)
    seen = reader.column("loss")
    memory.record_sweep(1, sweep(scale=2.0), test_loss=0.5)
    assert (len(reader), len(reader.column("loss"))) == (1, 1)
    assert reader.refresh() is reader
    np.testing.assert_array_equal(reader.column("loss"), memory.column("loss"))
    np.testing.assert_array_equal(reader.test_loss, [np.nan, 0.5])
    np.testing.assert_array_equal(seen, memory.column("loss")[:1])


def test_a_reader_of_another_number_of_examples_is_refused_when_it_refreshes(memory):
    reader = MemoryMap.open(memory.path)
    MemoryMap(7, memory.path, overwrite=True)
    with pytest.raises(ValueError, match="num_data=6, but .* holds a record of 7 examples"):
        reader.refresh()


def test_a_snapshot_is_synced_to_the_disk_before_it_is_named(memory, monkeypatch):
    memory.record_sweep(0, sweep())
    done = []

    def name_of(descriptor):
        inode = os.fstat(descriptor).st_ino
        return next(file.name for file in memory.path.iterdir() if file.stat().st_ino == inode)

    def fsync(descriptor):
        name = name_of(descriptor)
        if name.endswith(".npy"):  # the row is in the file by now
            assert np.load(memory.path / name, mmap_mode="r").shape == (2, N)
        else:
            assert len(json.loads((memory.path / name).read_text())["snapshots"]) == 2
        done.append(("fsync", name))

    def replace(source, target, move=os.replace):
        done.append(("replace", os.path.basename(target)))
        move(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    memory.record_sweep(1, sweep())
    assert done == [
        *(("fsync", f"memory.{name}.npy") for name in COLUMNS),
        ("fsync", "memory.json.new"),
        ("replace", "memory.json"),
    ]


def test_an_empty_record_has_empty_columns(memory):
    assert len(memory) == 0
    assert memory.column("loss").shape == (0, N)
    assert memory.steps.shape == memory.test_loss.shape == memory.kinds.shape == (0,)


def test_opening_the_same_path_continues_the_record(memory):
    memory.record_sweep(0, sweep(), test_loss=1.5)
    memory.new_snapshot(3)
    memory.record([1], rows(1))
    again = MemoryMap(N, memory.path)
    again.record([2], rows(2))
    again.new_snapshot(3)
    again.record([3], rows(3))
    np.testing.assert_array_equal(again.column("self_influence")[1, 1:4], [1, 2, 3])
    assert again.steps.tolist() == [0, 3]
    assert repr(MemoryMap.open(memory.path)) == repr(again)
    np.testing.assert_array_equal(again.test_loss, [1.5, np.nan])


def test_another_number_of_examples_is_refused_before_anything_changes(memory):
    memory.record_sweep(0, sweep())
    before = content(memory.path)
    with pytest.raises(ValueError, match=r"num_data=7, but .* holds a record of 6 examples: use another path"):
        MemoryMap(7, memory.path)
    assert content(memory.path) == before


def test_opening_a_path_without_a_record_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no record"):
        MemoryMap.open(tmp_path)


@pytest.mark.parametrize("num_data", [N, 3, 11])
def test_overwriting_starts_anew_with_any_number_of_examples(memory, num_data):
    memory.record_sweep(0, sweep())
    memory.record_sweep(5, sweep())
    memory.path.joinpath("notes.txt").write_text("mine")
    fresh = MemoryMap(num_data, memory.path, overwrite=True)
    assert len(fresh) == 0 and fresh.column("loss").shape == (0, num_data)
    assert sorted(content(memory.path)) == ["memory.json", "notes.txt"]
    fresh.record_sweep(1, sweep(range(num_data)))
    np.testing.assert_allclose(fresh.column("loss"), [np.arange(num_data) + 0.1], rtol=1e-6)
    assert len(MemoryMap(num_data, memory.path)) == 1


def test_another_version_can_be_overwritten(memory):
    memory.path.joinpath("memory.json").write_text(json.dumps({"version": 99}))
    assert len(MemoryMap(N, memory.path, overwrite=True)) == 0


def test_another_version_is_refused(memory):
    (memory.path / "memory.json").write_text(json.dumps({"version": 99}))
    with pytest.raises(ValueError, match="record version 99, but this vlearn reads versions 1 and 2"):
        MemoryMap(N, memory.path)


def test_rewind_forgets_later_snapshots_and_their_rows(memory):
    for step in (0, 10, 20):
        memory.new_snapshot(step)
        memory.record([0, 1], rows(step, step))
    memory.rewind(10)
    assert memory.steps.tolist() == [0, 10]
    memory.new_snapshot(15)
    memory.record([0], rows(15))
    np.testing.assert_array_equal(memory.column("self_influence")[:, :2], [[0, 0], [10, 10], [15, np.nan]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.record([6], rows(1)), r"^index 6 is out of range, but indices must be 0 to 5"),
        (lambda m: m.record([-1], rows(1)), r"^index -1 is out of range"),
        (
            lambda m: m.record([0.5], rows(1)),
            r"^index has shape \(1,\) and type float64, but it must be \[B\] int",
        ),
        (lambda m: m.record([[0]], rows(1)), r"^index has shape \(1, 1\)"),
        (lambda m: m.record([0, 1], rows(1)), r"^self_influence has shape \(1,\), but index has \(2,\)"),
        (
            lambda m: m.new_snapshot(4),
            r"^step=4, but .* already has a snapshot of step 5: .* call rewind\(step\)",
        ),
        (lambda m: m.new_snapshot(-1), r"^step=-1, but it must not be negative"),
        (lambda m: m.record_sweep(3, sweep()), r"^step=3, but .* already has a snapshot of step 5"),
        (lambda m: m.record_sweep(9, sweep([0, 0])), r"^table.index holds 0 more than once"),
        (lambda m: m.record_sweep(9, sweep([0, N])), r"^index 6 is out of range"),
        (
            lambda m: m.record_sweep(9, sweep(leverage=[1.0])),
            r"^leverage has shape \(1,\), but index has \(6,\)",
        ),
        (lambda m: m.record_sweep(9, SimpleNamespace(index=[0])), r"^The table has nothing to record"),
        (lambda m: m.column("leverages"), r"^column 'leverages' does not exist: use one of loss, loo_loss"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(memory, call, message):
    memory.new_snapshot(5)
    memory.record([0], rows(1))
    before = content(memory.path)
    with pytest.raises(ValueError, match=message):
        call(memory)
    assert content(memory.path) == before
    assert len(memory) == 1


def test_a_repeated_sweep_is_refused(memory):
    memory.record_sweep(5, sweep())
    with pytest.raises(ValueError, match="already has a snapshot of step 5"):
        memory.record_sweep(5, sweep())


@pytest.mark.parametrize("num_data", [0, -3])
def test_num_data_must_be_positive(tmp_path, num_data):
    with pytest.raises(ValueError, match=rf"^num_data={num_data}, but it must be positive"):
        MemoryMap(num_data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_recording_needs_an_open_live_snapshot(memory):
    with pytest.raises(RuntimeError, match=r"^No live snapshot is open: call new_snapshot\(step\)"):
        memory.record([0], rows(1))
    memory.record_sweep(0, sweep())
    with pytest.raises(RuntimeError, match="No live snapshot is open"):
        memory.record([0], rows(1))


def test_a_sweep_that_dies_half_way_leaves_no_trace(memory, monkeypatch):
    memory.record_sweep(0, sweep())

    def die(self, snapshots):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MemoryMap, "_commit", die)
        memory.record_sweep(1, sweep(scale=-1.0))
    again = MemoryMap(N, memory.path)
    assert again.steps.tolist() == [0]
    again.record_sweep(2, sweep([5], leverage=None))
    np.testing.assert_allclose(again.column("loss")[:, 4], [4.1, np.nan])
    assert np.isnan(again.column("leverage")[1]).all()


def write_sweeps(path):
    memory = MemoryMap(20_000, path)
    index = np.arange(20_000)
    for step in range(len(memory), 100_000):
        values = np.full(20_000, step, dtype=np.float32)
        memory.record_sweep(step, SimpleNamespace(index=index, loss=values, leverage=-values))


def test_a_kill_at_any_moment_loses_no_finished_snapshot_and_shows_no_half(tmp_path):
    found = 0
    for delay in (0.12, 0.05):
        writer = multiprocessing.get_context("spawn").Process(target=write_sweeps, args=(tmp_path,))
        writer.start()
        while not (tmp_path / "memory.json").exists() or len(MemoryMap(20_000, tmp_path)) <= found + 3:
            time.sleep(0.01)
        time.sleep(delay)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        memory = MemoryMap(20_000, tmp_path)
        steps = memory.steps
        assert len(steps) > found
        found = len(steps)
        np.testing.assert_array_equal(steps, np.arange(found))
        np.testing.assert_array_equal(memory.column("loss").min(axis=1), steps)
        np.testing.assert_array_equal(memory.column("loss").max(axis=1), steps)
        np.testing.assert_array_equal(memory.column("leverage").max(axis=1), -steps)
        read_without_vlearn = np.load(tmp_path / "memory.loss.npy", mmap_mode="r")[:found]
        np.testing.assert_array_equal(read_without_vlearn, memory.column("loss"))


def test_memory_in_use_stays_at_a_few_rows(tmp_path):
    num_data = 100_000
    memory = MemoryMap(num_data, tmp_path)
    table = SimpleNamespace(index=np.arange(num_data), loss=np.ones(num_data, dtype=np.float32))
    tracemalloc.start()
    for step in range(40):
        memory.record_sweep(step, table)
    means = [row.mean() for row in memory.column("loss")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert means == [1] * 40
    # The index as int64, its counts and a few rows of 4 bytes; all 40 rows would be 160 bytes per example.
    assert peak < 50 * num_data


def write_version_1(path, live_is_open=False):
    """Write a record as version 1 did: two sweeps without leverage, and perhaps a live snapshot with two rows."""
    path.mkdir()
    snapshots = [{"step": step, "kind": "sweep", "test_loss": loss} for step, loss in ((0, 2.5), (10, None))]
    index, unseen = np.arange(N), np.full(N, np.nan)
    columns = {
        "loss": [index + 0.5, index + 0.25],
        "loo_loss": [index + 1.5, index + 1.25],
        "self_influence": [index / 2, index / 4],
        "prediction_error": [index / 8, index / 16],
    }
    if live_is_open:
        snapshots.append({"step": 10, "kind": "live", "test_loss": None})
        columns = {name: [*rows, unseen.copy()] for name, rows in columns.items()}
        columns["step"] = [unseen, unseen, unseen.copy()]
        for name, value in {"self_influence": 3, "prediction_error": 0.5, "step": 11}.items():
            columns[name][2][[1, 4]] = value
    for name, values in columns.items():
        # A row more than the record names, as a killed run leaves it.
        np.array([*values, np.zeros(N)], dtype="<f4").tofile(path / f"{name}.f32")
    record = {"version": 1, "num_data": N, "snapshots": snapshots}
    (path / "memory.json").write_text(json.dumps(record))
    return {name: np.array(values, dtype=np.float32) for name, values in columns.items()}


def test_a_record_of_version_1_is_read_and_left_as_it_is(tmp_path):
    columns = write_version_1(tmp_path / "old", live_is_open=True)
    before = content(tmp_path / "old")
    memory = MemoryMap(N, tmp_path / "old")
    assert (memory.steps.tolist(), memory.kinds.tolist()) == ([0, 10, 10], ["sweep", "sweep", "live"])
    np.testing.assert_array_equal(memory.test_loss, [2.5, np.nan, np.nan])
    for name, values in columns.items():
        assert isinstance(memory.column(name), np.memmap)
        np.testing.assert_array_equal(memory.column(name), values)
    assert memory.column("leverage").shape == (3, N)
    assert np.isnan(memory.column("leverage")).all()
    assert content(tmp_path / "old") == before


@pytest.mark.parametrize("live_is_open", [False, True])
def test_a_record_of_version_1_is_continued_as_npy_files(tmp_path, live_is_open):
    columns = write_version_1(tmp_path / "old", live_is_open)
    memory, reader = MemoryMap(N, tmp_path / "old"), MemoryMap.open(tmp_path / "old")
    memory.record_sweep(20, sweep(), test_loss=1.0)
    before = 3 if live_is_open else 2
    again = MemoryMap.open(tmp_path / "old")
    assert len(again) == before + 1
    for name in COLUMNS:
        column = np.load(tmp_path / "old" / f"memory.{name}.npy")
        np.testing.assert_array_equal(column[:before], columns.get(name, np.full((before, N), np.nan)))
        np.testing.assert_array_equal(column, again.column(name))
        np.testing.assert_array_equal(reader.column(name), column[:before])
    np.testing.assert_allclose(again.column("leverage")[-1], np.arange(N) + 0.4, rtol=1e-6)
    np.testing.assert_array_equal(again.test_loss[[0, -1]], [2.5, 1.0])


def test_the_open_snapshot_of_a_version_1_record_goes_on(tmp_path):
    write_version_1(tmp_path / "old", live_is_open=True)
    memory = MemoryMap(N, tmp_path / "old")
    memory.new_snapshot(10)
    memory.record([4, 5], rows(8, 9, step=12))
    np.testing.assert_array_equal(
        MemoryMap.open(memory.path).column("self_influence")[2], [np.nan, 3, np.nan, np.nan, 8, 9]
    )
    np.testing.assert_array_equal(memory.column("step")[2], [np.nan, 11, np.nan, np.nan, 12, 12])


def test_a_version_1_record_rewinds_and_an_empty_one_begins(tmp_path):
    columns = write_version_1(tmp_path / "old")
    memory = MemoryMap(N, tmp_path / "old")
    memory.rewind(5)
    np.testing.assert_array_equal(MemoryMap.open(memory.path).column("loss"), columns["loss"][:1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "memory.json").write_text(json.dumps({"version": 1, "num_data": N, "snapshots": []}))
    empty = MemoryMap(N, tmp_path / "empty")
    assert empty.column("loss").shape == (0, N)
    empty.record_sweep(0, sweep())
    np.testing.assert_allclose(MemoryMap.open(empty.path).column("loss"), [np.arange(N) + 0.1], rtol=1e-6)


@pytest.mark.parametrize("allowed", range(len(COLUMNS) + 2))
def test_a_conversion_that_is_killed_at_any_write_is_made_again(tmp_path, monkeypatch, allowed):
    columns = write_version_1(tmp_path / "old")
    left = iter(range(allowed))

    def die_at_last(descriptor, sync=os.fsync):
        if next(left, None) is None:
            raise KeyboardInterrupt
        sync(descriptor)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "fsync", die_at_last)
        MemoryMap(N, tmp_path / "old").record_sweep(20, sweep())
    again = MemoryMap(N, tmp_path / "old")
    np.testing.assert_array_equal(again.column("loss"), columns["loss"])
    again.record_sweep(20, sweep())
    np.testing.assert_array_equal(MemoryMap.open(again.path).column("loss")[:2], columns["loss"])


def test_overwriting_deletes_a_version_1_record(tmp_path):
    write_version_1(tmp_path / "old")
    MemoryMap(N, tmp_path / "old", overwrite=True)
    assert sorted(content(tmp_path / "old")) == ["memory.json"]
