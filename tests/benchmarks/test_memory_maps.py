"""The memory maps of the benchmarks: they are drawn, go on where they were, and their numbers are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("laplace")
pytest.importorskip("sklearn")

from benchmarks import memory_maps
from benchmarks.problems import images as datasets
from benchmarks.training import recorded_runs


@pytest.mark.slow
def test_the_smoke_run_draws_all_three_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert memory_maps.main(arguments) == 0
    found = {part: json.loads((tmp_path / "out" / f"{part}.json").read_text()) for part in memory_maps.EXPERIMENTS}
    assert all((tmp_path / "out" / f"{part}.png").exists() for part in found)
    assert list(found["epochs"]["table"]) == ["epoch 1", "epoch 3"]
    assert list(found["complexity"]["table"]) == ["underfit", "fit", "overfit"]
    shared = found["measures"]["shared_of_top_1_percent"]
    assert list(shared) == list(memory_maps.MEASURES) and all(row[name] == 1 for name, row in shared.items())
    first = capsys.readouterr()
    assert "Memory maps of three models" in first.out and "epoch 3/3" in first.err
    assert memory_maps.main(arguments) == 0
    again = capsys.readouterr()
    assert "epoch 3/3" not in again.err  # nothing is trained twice
    assert again.out.splitlines()[3:] == first.out.splitlines()[3:]


def test_a_twentieth_of_the_labels_becomes_another_class() -> None:
    images = datasets.load("digits").first(400, 10)
    changed, noisy = memory_maps.with_changed_labels(images, seed=1)
    assert changed.sum() == 20
    np.testing.assert_array_equal((noisy.y != images.y).numpy(), changed)
    assert noisy.y.min() >= 0 and noisy.y.max() <= 9 and noisy.x is images.x


def test_recovered_counts_changed_labels_at_the_top() -> None:
    changed = np.zeros(200, dtype=bool)
    changed[[3, 7, 11, 50]] = True
    values = np.zeros(200)
    values[[3, 9, 7, 11]] = (9.0, 8.0, 7.0, 6.0)
    found = memory_maps.recovered(values, changed)
    assert found == {"share_of_top_1_percent": 0.5, "share_found": 0.75}


def test_the_overfitting_model_is_the_one_that_generalization_trains() -> None:
    experiment = memory_maps.EXPERIMENTS["complexity"]
    overfit = memory_maps.with_prior(experiment, memory_maps.PRIORS["overfit"])
    assert overfit == recorded_runs.EXPERIMENTS["overfit"]
