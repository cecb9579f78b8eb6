"""The benchmark of leave-one-out against test losses: it runs, goes on where it was, and its figures are there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("laplace")
pytest.importorskip("sklearn")

from benchmarks import evolution, generalization
from benchmarks.problems import images as datasets
from benchmarks.report.curves import Curves
from benchmarks.report.terminal import Advance
from benchmarks.training import recorded_runs


@pytest.mark.slow
def test_the_smoke_run_writes_figures_and_prints_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert generalization.main(arguments) == 0
    assert evolution.main([*arguments[:3], "--out", str(tmp_path / "evolution")]) == 0
    numbers = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert list(numbers["table"]) == ["IVON", "Laplace, diagonal", "Laplace, Kronecker"]
    assert all(np.isfinite(value) for row in numbers["table"].values() for value in row["mean"].values())
    assert (tmp_path / "out" / "digits.png").exists() and (tmp_path / "evolution" / "digits.png").exists()
    shown = capsys.readouterr().out
    assert "Leave-one-out against test loss: digits" in shown and "Self-influence over training: digits" in shown


@pytest.mark.parametrize("trainer", ["IVON", "SGD"])
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(trainer: str, tmp_path: Path) -> None:
    experiment = dataclasses.replace(recorded_runs.SMOKE, num_data=100, num_test=50, laplace=(1, 2, 3))
    images = datasets.load("digits").first(100, 50)

    def stop_after_two(said: str) -> None:
        if "epoch 2/" in said:
            raise KeyboardInterrupt

    def run(runs: Path, advance: Advance) -> tuple[list[torch.Tensor], Curves]:
        training = recorded_runs.train(experiment, images, 0, trainer, runs, advance)
        return list(training.model.parameters()), training.recorded["curves"]

    whole, curves = run(tmp_path / "whole", lambda said: None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_after_two)
    resumed, resumed_curves = run(tmp_path / "cut", lambda said: None)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert curves.loo_loss == resumed_curves.loo_loss and curves.test_loss == resumed_curves.test_loss


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path: Path) -> None:
    images = datasets.load("digits").first(60, 20)
    experiment = dataclasses.replace(recorded_runs.SMOKE, epochs=1, recorded=(), mapped=(), num_data=60)
    recorded_runs.train(experiment, images, 0, "IVON", tmp_path, lambda said: None)
    with pytest.raises(ValueError, match=r"belongs to other settings \(lr\): give another --runs folder"):
        recorded_runs.train(dataclasses.replace(experiment, lr=0.3), images, 0, "IVON", tmp_path, lambda said: None)


def test_rows_that_a_run_did_not_record_are_missed_before_anything_is_drawn(tmp_path: Path) -> None:
    images = datasets.load("digits").first(60, 20)
    experiment = dataclasses.replace(recorded_runs.SMOKE, epochs=2, recorded=(1, 2), mapped=(1, 2))
    rows = recorded_runs.recorded_rows(experiment, images, tmp_path / "with", lambda said: None)
    assert rows.steps.tolist() == [1, 2]
    recorded_runs.train(experiment, images, 0, "IVON", tmp_path / "without", lambda said: None, mapped=False)
    with pytest.raises(ValueError, match=r"has no rows of epochs \[1, 2\]: the run went past them; give another"):
        recorded_runs.recorded_rows(experiment, images, tmp_path / "without", lambda said: None)
