"""Leaving out a class: what is retrained, how estimates are judged, and that the run goes on where it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("laplace")
pytest.importorskip("sklearn")

from benchmarks import class_removal
from benchmarks.problems import images as datasets
from benchmarks.problems import networks


@pytest.mark.slow
def test_the_smoke_run_writes_a_figure_and_prints_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert class_removal.main(["--smoke", "--out", str(tmp_path / "out")]) == 0
    numbers = json.loads((tmp_path / "out" / "digits.json").read_text())
    assert list(numbers["table"]) == ["Laplace, Kronecker", "IVON"]
    for rows in numbers["table"].values():
        assert list(rows) == ["trained", "published", "joint", "refined", "Gauss-Newton"]
        assert all(np.isfinite(row["removed"]["pearson"]) for row in rows.values())
    assert (tmp_path / "out" / "digits.png").exists()
    assert "A class left out: digits" in capsys.readouterr().out


@pytest.mark.parametrize("trainer", ["IVON", "SGD"])
def test_without_a_class_the_summed_loss_keeps_its_prior(trainer: str, tmp_path: Path) -> None:
    images = class_removal.without(datasets.load("digits").first(100, 50), 3)
    assert len(images.x) == len(images.y) == len(images.pictures) < 100 and not (images.y == 3).any()
    experiment = class_removal.SMOKE
    training = experiment.training(
        trainer, networks.build("digits_cnn"), images, prior_precision=5.0, seed=0, file=tmp_path / "run.pt"
    )
    group = training.optimizer.param_groups[0]
    np.testing.assert_allclose(group["weight_decay"] * len(images.y), 5.0)
    assert trainer == "SGD" or group["ess"] == len(images.y)


def test_an_estimate_of_half_the_loss_has_slope_two_and_is_perfectly_correlated() -> None:
    truth = np.array([[9.0, 1.0], [9.0, 2.0], [9.0, 4.0]])  # the last epoch counts
    found = class_removal.compare(truth[:, -1] / 2, {"removed": truth, "test": truth})["removed"]
    np.testing.assert_allclose([found["pearson"], found["pearson_of_logarithms"], found["slope"]], [1, 1, 2])
    np.testing.assert_allclose(found["mean"], 7 / 3)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    experiment = dataclasses.replace(class_removal.SMOKE, epochs=2, retrained_epochs=2)
    images = datasets.load("digits").first(60, 60)
    said: list[str] = []

    def stop_while_retraining(message: str) -> None:
        if "SGD, seed 0, without 1, epoch 2/" in message:
            raise KeyboardInterrupt

    whole = class_removal.run_experiment(experiment, images, 1, tmp_path / "whole", lambda message: None)
    with pytest.raises(KeyboardInterrupt):
        class_removal.run_experiment(experiment, images, 1, tmp_path / "cut", stop_while_retraining)
    resumed = class_removal.run_experiment(experiment, images, 1, tmp_path / "cut", said.append)
    assert "without 1, epoch 2/2" in said[0]
    for method, by_class in whole["by_class"].items():
        for name, values in by_class["retrained_by_epoch"].items():
            assert np.array_equal(values, resumed["by_class"][method]["retrained_by_epoch"][name])
        for name, values in by_class["estimated"].items():
            assert np.array_equal(values, resumed["by_class"][method]["estimated"][name])


def test_the_network_that_is_retrained_starts_at_the_trained_weights(tmp_path: Path) -> None:
    images = datasets.load("digits").first(60, 60)
    experiment = dataclasses.replace(
        class_removal.SMOKE, epochs=1, retrained_epochs=1, sgd_lr=(0.0, 0.0), newton_iterations=0
    )
    full, found = class_removal.trained(experiment, images, "SGD", 0, tmp_path, lambda message: None)
    before = [p.clone() for p in full.model.parameters()]
    losses = class_removal.retrain(experiment, images, full, "SGD", 2, 0, tmp_path, lambda message: None)
    np.testing.assert_allclose(losses["removed"], [found["trained"]["removed"][2]], rtol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, full.model.parameters(), strict=True))
