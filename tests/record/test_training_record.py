import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from vlearn.record import MemoryMap, TrainingRecord
from vlearn.record.running_averages import RunningAverages

N, C = 7, 3
RNG = np.random.default_rng(0)


@pytest.fixture
def record(tmp_path):
    return TrainingRecord(N, tmp_path / "run")


def steps(count, size=4, seed=0):
    """Batches with repeated examples, and everything that is recorded of them."""
    rng = np.random.default_rng(seed)
    for step in range(1, count + 1):
        probabilities = rng.dirichlet(np.ones(C), size).astype(np.float32)
        yield {
            "index": rng.integers(0, N, size),
            "step": step,
            "loss": rng.exponential(size=size),
            "margin": rng.normal(size=size),
            "probability": probabilities[:, 0].astype(float),
            "agreement": (probabilities.argmax(1) == 0).astype(float),
            "predicted": probabilities.argmax(1),
            "label": rng.integers(0, C, size),
            "probabilities": probabilities,
        }


def fill(record, batches, every=5):
    for batch in batches:
        record.record(**batch)
        if batch["step"] % every == 0:
            record.new_snapshot()


def by_example(batches, name):
    """Every value that was given of each example."""
    seen = [[] for _ in range(N)]
    for batch in batches:
        for number, value in zip(batch["index"], batch[name], strict=True):
            seen[number].append(value)
    return seen


def test_averages_are_those_of_all_values_that_were_given(record):
    batches = list(steps(13))
    fill(record, batches)
    for name in ("loss", "margin", "probability", "agreement"):
        np.testing.assert_allclose(record.column(name), [np.mean(v) for v in by_example(batches, name)], rtol=1e-12)
    expected = [np.mean(v, axis=0) for v in by_example(batches, "probabilities")]
    np.testing.assert_allclose(record.probabilities, expected, rtol=1e-5)
    np.testing.assert_array_equal(record.column("count"), [len(v) for v in by_example(batches, "loss")])
    np.testing.assert_array_equal(record.predicted, [v[-1] for v in by_example(batches, "predicted")])
    np.testing.assert_array_equal(record.labels, [v[-1] for v in by_example(batches, "label")])


def test_snapshots_are_the_averages_since_the_last_one(record):
    batches = list(steps(12))
    fill(record, batches, every=4)
    assert record.memory.steps.tolist() == [4, 8, 12] and record.memory.kinds.tolist() == ["live"] * 3
    for snapshot in range(3):
        part = by_example(batches[4 * snapshot : 4 * snapshot + 4], "loss")
        expected = [np.mean(v) if v else np.nan for v in part]
        np.testing.assert_allclose(record.memory.column("loss")[snapshot], expected, rtol=1e-6)
        np.testing.assert_array_equal(record.memory.column("count")[snapshot], [len(v) for v in part])


def test_several_views_of_an_example_in_one_batch_count_as_often(record):
    record.record([3, 3, 1], step=1, loss=[1.0, 3.0, 5.0])
    record.record([3], step=2, loss=[8.0])
    assert record.column("loss")[[1, 3]].tolist() == [5.0, 4.0]
    assert record.column("count").tolist() == [0, 1, 0, 3, 0, 0, 0]


def test_a_column_that_is_given_at_some_steps_alone_is_averaged_over_these(record):
    record.record([0, 1], step=1, loss=[1.0, 1.0])
    record.record([0, 1], step=1, self_influence=[0.5, 0.25])
    record.record([0, 1], step=2, loss=[3.0, 3.0])
    assert record.column("loss")[:2].tolist() == [2.0, 2.0]
    assert record.column("self_influence")[:2].tolist() == [0.5, 0.25]
    assert record.column("count")[:2].tolist() == [2, 2]


def test_what_is_not_finite_is_left_out_and_counted(record):
    record.record([0, 1, 2], step=1, loss=[1.0, np.inf, np.nan], margin=[1.0, 2.0, 3.0])
    record.record([1], step=2, loss=[4.0])
    np.testing.assert_array_equal(record.column("loss")[:3], [1.0, 4.0, np.nan])
    assert record.column("margin")[:3].tolist() == [1.0, 2.0, 3.0]
    assert record.summary()["num_nonfinite"] == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_tensors_are_recorded_like_arrays(record, dtype):
    loss = torch.tensor([0.5, 0.25], dtype=dtype, requires_grad=True)
    record.record(torch.tensor([4, 0]), step=1, loss=loss, predicted=torch.tensor([1, 2]))
    assert record.column("loss")[[4, 0]].tolist() == [0.5, 0.25]


def test_memory_does_not_grow_with_the_steps(record):
    fill(record, steps(3), every=10**9)
    size = sum(values.nbytes for values in record.averages.arrays().values())
    fill(record, steps(500, seed=1), every=10**9)
    assert sum(values.nbytes for values in record.averages.arrays().values()) == size


@pytest.mark.parametrize("stop", [5, 7], ids=["between snapshots", "in the middle of one"])
def test_a_run_that_goes_on_in_its_folder_is_the_uninterrupted_one(tmp_path, stop):
    batches = list(steps(13))
    whole = TrainingRecord(N, tmp_path / "whole")
    fill(whole, batches)
    part = TrainingRecord(N, tmp_path / "part")
    fill(part, batches[:stop])
    part.save()
    part = TrainingRecord(N, tmp_path / "part")
    fill(part, batches[stop:])
    same_record(part, whole)


def same_record(one, other):
    for name in ("loss", "margin", "count"):
        np.testing.assert_allclose(one.column(name), other.column(name), rtol=1e-12)
        np.testing.assert_array_equal(one.memory.column(name), other.memory.column(name))
    np.testing.assert_allclose(one.probabilities, other.probabilities, rtol=1e-6)
    np.testing.assert_array_equal(one.memory.steps, other.memory.steps)


def test_going_back_to_a_checkpoint_takes_back_what_came_after(tmp_path):
    batches = list(steps(13))
    whole = TrainingRecord(N, tmp_path / "whole")
    fill(whole, batches)
    record = TrainingRecord(N, tmp_path / "run")
    fill(record, batches[:7])
    state = {name: torch.from_numpy(values.copy()) for name, values in record.state_dict().items()}
    torch.save(state, tmp_path / "checkpoint.pt")
    record.save(tmp_path / "checkpoint.npz")
    fill(record, batches[7:12])  # lost

    for load in ("state", "file"):
        later = TrainingRecord(N, tmp_path / "run")
        if load == "state":
            later.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
        else:
            later.load(tmp_path / "checkpoint.npz")
        fill(later, batches[7:])
        same_record(later, whole)


def test_a_checkpoint_of_another_number_of_examples_is_refused(record, tmp_path):
    with pytest.raises(ValueError, match="the checkpoint is of 3 examples, but num_data=7"):
        record.load_state_dict(TrainingRecord(3, tmp_path / "other").state_dict())


def test_snapshots_that_the_averages_do_not_know_are_written_anew(tmp_path):
    """As where a kill came after the snapshot and before the averages."""
    batches = list(steps(10))
    record = TrainingRecord(N, tmp_path / "run")
    fill(record, batches[:5])
    old = (tmp_path / "run" / "averages.npz").read_bytes()
    fill(record, batches[5:])
    (tmp_path / "run" / "averages.npz").write_bytes(old)
    again = TrainingRecord.open(tmp_path / "run")
    assert again.step == 5 and len(again.memory) == 2  # reading changes nothing
    fill(again, batches[5:])
    assert again.memory.steps.tolist() == [5, 10]


def test_sweeps_stand_between_the_snapshots(record):
    from types import SimpleNamespace

    fill(record, steps(5))
    index = np.arange(N)
    record.record_sweep(5, SimpleNamespace(index=index, loss=index / 10, leverage=index / 5), test_loss=0.5)
    fill(record, list(steps(10))[5:])
    assert record.memory.kinds.tolist() == ["live", "sweep", "live"]
    np.testing.assert_allclose(record.memory.column("leverage")[1], index / 5, rtol=1e-6)
    assert np.isnan(record.memory.column("margin")[1]).all()


def test_averages_of_a_memory_map_that_had_none_are_nan_before(tmp_path):
    from types import SimpleNamespace

    memory = MemoryMap(N, tmp_path)
    memory.record_sweep(0, SimpleNamespace(index=np.arange(N), loss=np.ones(N)))
    assert np.isnan(memory.column("margin")).all() and not (tmp_path / "memory.margin.npy").exists()
    memory.record_averages(3, {"margin": np.arange(N), "loss": np.arange(N)})
    np.testing.assert_array_equal(memory.column("margin"), [[np.nan] * N, np.arange(N)])
    memory.record_averages(4, {"loss": np.arange(N)})
    assert np.isnan(memory.column("margin")[2]).all() and np.load(tmp_path / "memory.margin.npy").shape == (3, N)
    with pytest.raises(ValueError, match="column 'marginal' does not exist"):
        memory.record_averages(5, {"marginal": np.arange(N)})


def test_other_processes_averages_are_merged(tmp_path):
    batches = list(steps(8))
    whole, shared = TrainingRecord(N, tmp_path / "whole"), TrainingRecord(N, tmp_path / "shared")
    fill(whole, batches, every=8)
    other = RunningAverages(N, C)
    for batch in batches:
        if batch["step"] % 2:
            shared.record(**batch)
            continue
        columns = {name: batch[name] for name in ("loss", "margin", "probability", "agreement")}
        rest = {name: batch[name] for name in ("step", "predicted", "label", "probabilities")}
        other.add(batch["index"], columns, **rest)
    shared.merge(other)
    shared.new_snapshot(8)
    same_record(shared, whole)
    np.testing.assert_array_equal(shared.predicted, whole.predicted)
    np.testing.assert_array_equal(shared.labels, whole.labels)


def test_many_classes_keep_no_probabilities_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr("vlearn.record.training_record.MOST_PROBABILITIES", N * C - 1)
    record = TrainingRecord(N, tmp_path / "many")
    fill(record, steps(3))
    assert record.probabilities is None and np.isfinite(record.column("loss")).any()
    asked = TrainingRecord(N, tmp_path / "asked", probabilities=True)
    fill(asked, steps(3))
    assert asked.probabilities is not None and asked.probabilities.shape == (N, C)


def test_a_new_record_in_the_folder_of_another_starts_anew(tmp_path):
    fill(TrainingRecord(N, tmp_path), steps(5))
    record = TrainingRecord(N, tmp_path, overwrite=True)
    assert len(record.memory) == 0 and record.column("count").sum() == 0
    with pytest.raises(ValueError, match="num_data=8, but .* holds a record of 7 examples"):
        TrainingRecord(8, tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"index": [0, 7], "loss": [1, 2]}, "index 7 is out of range"),
        ({"index": [0, 1], "loss": [1]}, r"loss has shape \(1,\), but index has \(2,\)"),
        ({"index": [0, 1], "los": [1, 2]}, "column 'los' does not exist"),
        ({"index": [0, 1], "loss": [1, 2], "predicted": [1]}, "predicted has shape"),
        ({"index": [0, 1], "loss": [1, 2], "probabilities": [[0.5, 0.5]]}, "probabilities have shape"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_added(record, given, message):
    with pytest.raises(ValueError, match=message):
        record.record(step=1, **given)
    assert record.column("count").sum() == 0


def keep_writing(path):
    record = TrainingRecord(1000, path)
    rng = np.random.default_rng(0)
    for step in range(1, 10**6):
        record.record(rng.integers(0, 1000, 32), step=step, loss=np.ones(32), probabilities=np.full((32, 4), 0.25))
        if step % 3 == 0:
            record.new_snapshot()


@pytest.mark.parametrize("delay", [0.0, 0.017, 0.05, 0.11])
def test_a_killed_run_leaves_a_record_that_opens_and_goes_on(tmp_path, delay):
    writer = multiprocessing.get_context("spawn").Process(target=keep_writing, args=(str(tmp_path),))
    writer.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "averages.npz").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(delay)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    record = TrainingRecord.open(tmp_path)
    assert record.step >= 3 and set(np.unique(record.column("loss")[record.column("count") > 0])) == {1.0}
    assert record.column("count").sum() == 32 * record.step
    record.record([0], step=record.step + 1, loss=[2.0])
    record.new_snapshot()
    assert record.memory.column("loss")[-1, 0] == 2.0 and np.all(np.diff(record.memory.steps) > 0)


def test_columns_become_a_table(record, tmp_path):
    pandas = pytest.importorskip("pandas")
    fill(record, steps(6))
    frame = record.to_pandas()
    assert list(frame.columns)[:4] == ["index", "count", "label", "predicted"]
    np.testing.assert_array_equal(frame["loss"], record.column("loss"))
    pytest.importorskip("pyarrow")
    record.to_parquet(tmp_path / "table.parquet")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "table.parquet"), frame)
