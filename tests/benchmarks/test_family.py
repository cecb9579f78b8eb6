"""The benchmark of the family: it runs, goes on where it was, and its references and scores are right."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("ivon")
pytest.importorskip("laplace")
pytest.importorskip("pytorch_optimizer")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from benchmarks.family import __main__ as family
from benchmarks.family import comparison, cost, logistic_posterior, regression_predictive
from benchmarks.family.methods import METHODS, Problem, posterior_of
from benchmarks.family.scores import linearised, scores
from benchmarks.problems import images as datasets
from benchmarks.reference import laplace
from benchmarks.training.calibration import calibration_error
from benchmarks.training.loop import finish, training_step
from vlearn.posterior import from_laplace

FILES = ["digits.json", "digits.png", "figures.json", "logistic.png", "regression.png"]


@pytest.mark.slow
def test_the_smoke_run_writes_figures_and_prints_every_method(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert family.main(["--smoke", "--runs", str(tmp_path / "runs"), "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == FILES
    numbers = json.loads((out / "digits.json").read_text())
    assert set(numbers["table"]) == {*METHODS, *comparison.AFTERWARDS}
    for name, row in numbers["table"].items():
        assert np.isfinite(row["mean"]["nll"])
        assert ("loo_loss" in row["mean"]) == (name != "SGD")
    assert all(set(each["held_out"]) for each in numbers["learning_rates"].values())
    shown = capsys.readouterr().out
    assert all(f"  {name}  " in shown for name in numbers["table"])


@pytest.mark.slow
def test_the_cost_of_a_step_is_printed_for_every_optimizer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "peak_memory", lambda name, device: 1.0)  # in a process of its own
    assert family.main(["--cost", "--smoke", "--out", str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / "cost.json").read_text())
    assert list(numbers["steps"]["threads=1"]) == cost.NAMES
    assert "of SGD" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_with_the_first_model_that_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(comparison, "METHODS", {name: METHODS[name] for name in ("SGD", "IVON")})
    monkeypatch.setattr(comparison, "MOST", 3)
    monkeypatch.setattr(comparison, "LAPLACE", {})
    monkeypatch.setattr(family, "run_figures", lambda *arguments: {})
    monkeypatch.setattr(family, "print_figures", lambda found: None)
    trained: list[str] = []
    train = comparison.train

    def count(experiment, images, method, lr, seed):
        if len(trained) == 5:
            trained.append("")
            raise KeyboardInterrupt
        trained.append(method)
        return train(experiment, images, method, lr, seed)

    monkeypatch.setattr(comparison, "train", count)
    arguments = ["--smoke", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert family.main(arguments) == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert family.main(arguments) == 0
    assert trained == ["SGD"] * 4 + ["IVON", "", *["IVON"] * 3]


def test_the_grid_goes_on_while_the_best_rate_is_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparison, "METHODS", {"SGD": dataclasses.replace(METHODS["SGD"], rate=1.0)})
    monkeypatch.setattr(comparison, "train", lambda experiment, images, method, lr, seed: (lr, None, None, None))
    images = datasets.load("digits").first(20, 10)

    def tried(best: float) -> list[float]:
        monkeypatch.setattr(comparison, "row", lambda lr, *rest: {"nll": abs(np.log(lr / best))})
        return [
            round(lr, 3)
            for lr in comparison.tune(comparison.SMOKE, images, "SGD", tmp_path / str(best), lambda said: None)
        ]

    assert tried(best=1.0) == [0.333, 1.0, 3.0]
    assert tried(best=0.1) == [0.037, 0.111, 0.333, 1.0, 3.0]
    assert tried(best=100.0) == [0.333, 1.0, 3.0, 9.0, 27.0]


def test_a_rate_that_diverges_is_not_chosen() -> None:
    tried = {
        0.1: {"nll": 1.0, "nll_by_draws": 3.0},
        0.2: {"nll": 2.0, "nll_by_draws": 2.0},
        0.3: {"nll": float("nan"), "nll_by_draws": float("nan")},
    }
    assert comparison.best("SGD", tried) == 0.1
    assert comparison.best("IVON", tried) == 0.2


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_its_state_is_read(method: str) -> None:
    images = datasets.load("digits").first(100, 50)
    experiment = dataclasses.replace(comparison.SMOKE, epochs=2, num_data=100)
    model, posterior, problem, _ = comparison.train(experiment, images, method, METHODS[method].rate, seed=0)
    assert problem.weight_decay == 0.05
    assert (posterior is None) == (method == "SGD")
    if posterior is not None:
        assert all(torch.equal(posterior.mean[name], p) for name, p in model.named_parameters())
        assert all(bool((posterior.variance[name] <= 1 / 5.0 + 1e-5).all()) for name in posterior.names)


def test_ivon_opt_and_vlearn_are_read_as_the_same_posterior() -> None:
    """Where the noise is negligible both have gradient zero for the Hessian, which then only decays."""
    problem = Problem(num_data=10, prior_precision=1.0, seed=0, hess_init=0.5, beta2=0.9)
    variances = {}
    for method in ("ivon-opt", "IVON"):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = METHODS[method].make(model, 0.0, problem)
        for _ in range(3):
            training_step(optimizer, lambda model=model: 0.0 * model(torch.ones(1, 3)).sum())
        posterior = posterior_of(optimizer, model, problem)
        assert posterior is not None
        variances[method] = posterior.variance["weight"].clone()  # pyright: ignore
        finish(optimizer)
    torch.testing.assert_close(variances["ivon-opt"], variances["IVON"])


def test_the_calibration_error_is_the_weighted_distance_of_confidence_and_accuracy() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([True, True, True, False])
    assert calibration_error(confidence, right) == pytest.approx(0.5 * 0.05 + 0.5 * 0.05)
    found = scores(torch.tensor([[0.75, 0.25], [0.5, 0.5]]), torch.tensor([0, 1]))
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(np.log(0.75) + np.log(0.5)) / 2)


@pytest.mark.filterwarnings("ignore:ASDL backend is used:UserWarning")
def test_the_linearised_prediction_is_that_of_laplace_torch() -> None:
    images = datasets.load("digits").first(100, 40)
    model, _, problem, _ = comparison.train(
        dataclasses.replace(comparison.SMOKE, num_data=100), images, "SGD", 0.1, seed=0
    )
    la = laplace.fit(model, images.x, images.y, "kron", problem.prior_precision)
    ours = linearised(model, from_laplace(la), images.x_test, images.y_test, draws=4000)
    torch.manual_seed(0)
    theirs = la(images.x_test, pred_type="glm", link_approx="mc", n_samples=4000)
    assert float((ours - theirs).abs().max()) < 5 * 0.5 * (2 / 4000) ** 0.5


def test_full_von_finds_the_nearest_gaussian_and_no_gaussian_is_nearer() -> None:
    problem = logistic_posterior.Logistic.example()
    best = logistic_posterior.nearest_gaussian(problem)
    constant = problem.log_normalizer(best)
    found = logistic_posterior.train(problem, "FullVON", steps=300)
    smallest = logistic_posterior.divergence(best, problem, constant)
    assert 0 < smallest < logistic_posterior.divergence(found, problem, constant) < smallest + 1e-2
    assert float(torch.distributions.kl_divergence(found, best)) < 1e-2
    assert smallest < logistic_posterior.divergence(logistic_posterior.laplace(problem), problem, constant)


def test_hamiltonian_monte_carlo_samples_a_gaussian() -> None:
    precision = torch.tensor([[2.0, 0.9], [0.9, 1.0]], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def energy(place: torch.Tensor) -> torch.Tensor:
        return ((place - mean) @ precision * (place - mean)).sum(1) / 2

    start = torch.zeros(50, 2, dtype=torch.float64)
    draws, accepted = regression_predictive.hamiltonian(energy, start, warm_up=150, kept=200, leaps=12)
    chains = draws.mean(0)
    assert bool(((chains.mean(0) - mean).abs() < 5 * chains.std(0) / 50**0.5).all())
    second = ((draws - mean).unsqueeze(3) * (draws - mean).unsqueeze(2)).mean(0)
    assert bool(((second.mean(0) - precision.inverse()).abs() < 5 * second.std(0) / 50**0.5).all())
    assert 0.6 < accepted < 0.99
    assert float(regression_predictive.disagreement(draws).max()) < 1.1


def test_networks_in_parallel_are_the_network() -> None:
    model, (x, _, _) = regression_predictive.network(), regression_predictive.data()
    rows = torch.cat([p.detach().flatten() for p in model.parameters()]).unsqueeze(0)
    torch.testing.assert_close(regression_predictive.function(rows, x).squeeze(0), model(x).detach().squeeze(1))


def test_the_scaled_squared_error_is_the_negative_log_likelihood_but_for_a_constant() -> None:
    y, f = torch.randn(5).double(), torch.randn(5).double()
    scale, noise = regression_predictive.SCALE, regression_predictive.NOISE
    exact = -torch.distributions.Normal(f, noise).log_prob(y)
    found = F.mse_loss(f / scale, y / scale, reduction="none")
    torch.testing.assert_close(found - exact, (found - exact)[0].expand(5))
