"""The grid of prior precisions: what it reports, and that it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("laplace")
pytest.importorskip("sklearn")

from benchmarks import hyperparameter
from benchmarks.problems import images as datasets


@pytest.mark.slow
def test_the_smoke_run_writes_a_figure_and_prints_minimisers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hyperparameter.main(["--smoke", "--out", str(tmp_path / "out")]) == 0
    numbers = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert list(numbers["table"]) == ["Laplace, Kronecker", "K-FAC, stopped", "IVON"]
    for method, row in numbers["table"].items():
        assert row["loo_minimiser"] in hyperparameter.SMOKE.prior_precisions
        assert row["regret"] >= 0
        assert all(np.isfinite(numbers["curves"][method]["loo"]))
    assert (tmp_path / "out" / "digits.png").exists()
    assert "Prior precision by leave-one-out: digits" in capsys.readouterr().out


def test_the_regret_is_the_test_loss_where_loo_has_its_minimum_less_the_smallest() -> None:
    tests = np.array([[1.0, 3.0], [0.5, 1.5], [0.7, 1.5], [2.0, 2.0]])  # of two test examples, at four δ
    loo = (2.0, 1.3, 1.2, 1.9)
    points = [[{"loo": each, "test": row.mean(), "test_losses": row}] for each, row in zip(loo, tests, strict=True)]
    found = hyperparameter.choice(np.array([1.0, 10.0, 100.0, 1000.0]), points)
    assert (found["loo_minimiser"], found["test_minimiser"], found["grid_steps_apart"]) == (100.0, 10.0, 1)
    assert found["test_minimum_inside_the_grid"]
    np.testing.assert_allclose(found["regret"], 0.1)
    # The two examples differ by .2 and 0: standard deviation .1, over √2.
    np.testing.assert_allclose(found["regret_standard_error"], 0.1 / np.sqrt(2))


def test_an_interrupted_grid_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    experiment = dataclasses.replace(hyperparameter.SMOKE, epochs=2, prior_precisions=(1.0, 10.0))
    images = datasets.load("digits").first(60, 30)
    trained: list[str] = []

    def stop_within_the_second_point(said: str) -> None:
        if "IVON, δ 10, seed 0, epoch 2/" in said:
            raise KeyboardInterrupt

    whole = hyperparameter.run_experiment(experiment, images, 1, tmp_path / "whole", lambda said: None)
    with pytest.raises(KeyboardInterrupt):
        hyperparameter.run_experiment(experiment, images, 1, tmp_path / "cut", stop_within_the_second_point)
    resumed = hyperparameter.run_experiment(experiment, images, 1, tmp_path / "cut", trained.append)
    assert resumed["curves"] == whole["curves"]
    assert "δ 10, seed 0, epoch 2/2" in trained[0]  # neither the first point nor the first epoch of the second
