"""The benchmark of data attribution: networks trained at once are those trained alone, and its scores are right."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from benchmarks.attribution import __main__ as attribution
from benchmarks.attribution import methods, ours, retraining, scores
from benchmarks.attribution.comparison import trained
from benchmarks.attribution.segments import segments
from benchmarks.attribution.tasks import SMOKE, Data, Task
from benchmarks.reference.attribution.method import Subject
from benchmarks.report import agreement

REGRESSION = dataclasses.replace(SMOKE, dataset="concrete", widths=(3, 8, 8, 1), batch=7, num_data=30)


def data_of(task: Task) -> Data:
    if not task.regression:
        return task.load(None)
    drawn = torch.Generator().manual_seed(0)
    sizes = ((30, 3), (30, 1), (6, 3), (6, 1))
    return Data(*(torch.randn(size, generator=drawn) for size in sizes))


@pytest.fixture(params=[SMOKE, REGRESSION], ids=["classes", "regression"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Subject, Data]:
    """A trained network in float64."""
    data = data_of(request.param)
    data = Data(*(each.double() if each.is_floating_point() else each for each in data))
    (subject,) = trained(request.param, data, 1, tmp_path)
    snapshots = [{name: p.double() for name, p in each.items()} for each in subject.snapshots]
    return dataclasses.replace(subject, model=subject.model.double(), snapshots=snapshots), data


def gradients(subject: Subject, weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Every example's gradient, one after the other, ``[n, P]``."""
    model = subject.own_model()
    model.load_state_dict(weights)
    rows = []
    for one, target in zip(x, y, strict=True):
        own = torch.autograd.grad(subject.loss(model(one[None]), target[None]), list(model.parameters()))
        rows.append(torch.cat([g.flatten() for g in own]))
    return torch.stack(rows)


@pytest.mark.parametrize("task", [SMOKE, REGRESSION], ids=["classes", "regression"])
def test_a_network_trained_in_a_batch_is_the_one_trained_alone(task: Task) -> None:
    assert attribution.check_batches(task, data_of(task)) < 1e-12


def test_losses_of_many_networks_are_those_of_each() -> None:
    data = data_of(REGRESSION)
    weights, _ = retraining.train(REGRESSION, data, scores.subsets(30, 2), [1, 2])
    losses = retraining.query_losses(REGRESSION, data, weights)
    for place in range(2):
        model = REGRESSION.network(0)
        model.load_state_dict({name: p[place] for name, p in weights.items()})
        expected = (model(data.x_query) - data.y_query).square().squeeze(1)
        torch.testing.assert_close(losses[place], expected)


def test_an_interrupted_retraining_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    data, subsets = data_of(SMOKE), scores.subsets(200, 6)

    def stop(said: str) -> None:
        if said.endswith("retraining 1/2 of subsets to 6/6"):
            raise KeyboardInterrupt

    whole = retraining.retrained_losses(SMOKE, data, subsets, tmp_path / "whole", lambda said: None)
    with pytest.raises(KeyboardInterrupt):
        retraining.retrained_losses(SMOKE, data, subsets, tmp_path / "cut", stop)
    assert len(list((tmp_path / "cut").iterdir())) == 2
    resumed = retraining.retrained_losses(SMOKE, data, subsets, tmp_path / "cut", lambda said: None)
    assert torch.equal(whole, resumed) and whole.shape == (6, 2, 20)
    # subset 1, repeat 1, is a network of its own
    alone, _ = retraining.train(SMOKE, data, subsets[1:2], [retraining.FIRST_SEED + 100_000 + 1])
    torch.testing.assert_close(retraining.query_losses(SMOKE, data, alone)[0], whole[1, 1], rtol=1e-4, atol=1e-5)


def test_retrainings_of_other_settings_are_not_taken(tmp_path: Path) -> None:
    data, subsets = data_of(SMOKE), scores.subsets(200, 2)
    retraining.retrained_losses(SMOKE, data, subsets, tmp_path, lambda said: None, 1)
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        retraining.retrained_losses(dataclasses.replace(SMOKE, lr=0.1), data, subsets, tmp_path, lambda said: None, 1)


def test_subsets_are_halves_and_more_of_them_begin_with_the_same() -> None:
    few, many = scores.subsets(10, 2), scores.subsets(10, 5)
    assert torch.equal(few, many[:2]) and few.shape == (2, 5)
    assert all(len(set(row.tolist())) == 5 for row in many)


def test_correlations_are_spearmans_with_ties() -> None:
    drawn = np.random.default_rng(0)
    predicted, retrained = drawn.integers(0, 5, (30, 4)).astype(float), drawn.normal(size=(30, 4))
    found = scores.correlations(torch.tensor(predicted), torch.tensor(retrained))
    expected = [agreement.spearman(predicted[:, q], retrained[:, q]) for q in range(4)]
    assert np.allclose(found, expected)
    assert scores.correlations(torch.ones(5, 1), torch.randn(5, 1)) == 0


def test_a_linear_truth_has_the_score_one_and_its_opposite_minus_one() -> None:
    drawn = torch.Generator().manual_seed(0)
    attributions, chosen = torch.randn(20, 3, generator=drawn, dtype=torch.double), scores.subsets(20, 9)
    losses = torch.stack([-attributions[each].sum(0) for each in chosen])
    predicted = scores.predicted_losses(attributions, chosen)
    torch.testing.assert_close(predicted, losses)
    assert np.allclose(scores.correlations(predicted, losses), 1)
    assert np.allclose(scores.correlations(-predicted, losses), -1)


def test_the_ceiling_is_the_correlation_with_the_expectation() -> None:
    drawn = torch.Generator().manual_seed(0)
    expectation = torch.randn(400, 1, 50, generator=drawn)
    retrained = expectation + 2 * torch.randn(400, 4, 50, generator=drawn)
    reached = float(scores.correlations(expectation[:, 0], retrained.mean(1)).mean())
    assert scores.ceiling(retrained) == pytest.approx(reached, abs=0.03)


def test_the_interval_is_of_the_mean_over_the_queries() -> None:
    values = np.random.default_rng(0).normal(size=400)
    mean, low, high = scores.with_interval(values)
    assert mean == values.mean()
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_gradient_products_and_tracin_are_what_they_are_called(subject: tuple[Subject, Data]) -> None:
    own, data = subject
    products = [
        gradients(own, dict(each), own.x, own.y) @ gradients(own, dict(each), data.x_query, data.y_query).T
        for each in own.snapshots
    ]
    found = ours.with_posterior(own, ours.identity)(data.x_query, data.y_query)
    torch.testing.assert_close(found, products[-1])
    traced = ours.tracin(own)(data.x_query, data.y_query)
    torch.testing.assert_close(traced, own.lr * torch.stack(products).sum(0))


def test_one_segment_with_the_gradients_at_the_end_is_stopped_training(subject: tuple[Subject, Data]) -> None:
    own, data = subject
    own = dataclasses.replace(own, snapshots=own.snapshots[-1:])
    setting = {"structure": "eigenvalue-corrected"}
    stopped = ours.with_posterior(own, ours.fitted, **setting, stopped=True)(data.x_query, data.y_query)
    torch.testing.assert_close(segments(own, 1)(data.x_query, data.y_query), stopped)
    torch.testing.assert_close(ours.over_snapshots(own, **setting, stopped=True)(data.x_query, data.y_query), stopped)


def test_an_earlier_segment_decays_through_the_later_one(subject: tuple[Subject, Data]) -> None:
    own, data = subject
    own = dataclasses.replace(own, snapshots=[own.snapshots[2], own.snapshots[-1]])
    time = own.training_time / 2
    vectors = gradients(own, dict(own.snapshots[1]), data.x_query, data.y_query)
    total = 0.0
    for snapshot in reversed(own.snapshots):
        model = own.own_model()
        model.load_state_dict(snapshot)
        posterior = ours.fitted(model, own, "eigenvalue-corrected")
        parameters = dict(model.named_parameters())
        shapes = {p: p.shape for p in parameters.values()}

        def times(rows: torch.Tensor, sigma=posterior, shapes=shapes, parameters=parameters) -> torch.Tensor:
            parts = rows.split([shape.numel() for shape in shapes.values()], 1)
            given = {p: part.reshape(-1, *shape) for (p, shape), part in zip(shapes.items(), parts, strict=True)}
            with torch.no_grad():
                moved = sigma.covariance(parameters).multiply(given)
            return torch.cat([moved[p].flatten(1) for p in shapes], 1)

        # H from its inverse, then the functions of a dense matrix
        size = sum(shape.numel() for shape in shapes.values())
        hessian = torch.linalg.inv(times(torch.eye(size, dtype=torch.double)) * len(own.y))
        values, basis = torch.linalg.eigh((hessian + hessian.mT) / 2)
        response = basis @ torch.diag(-torch.expm1(-time * values) / (values * len(own.y))) @ basis.mT
        decay = basis @ torch.diag(torch.exp(-time * values)) @ basis.mT
        total = total + gradients(own, dict(snapshot), own.x, own.y) @ response @ vectors.T
        vectors = vectors @ decay
    torch.testing.assert_close(segments(own, 2)(data.x_query, data.y_query), total, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("package", ["kronfluence", "dattri", "captum"])
def test_a_package_that_is_not_there_is_named_before_any_work(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip("it is there")
    with pytest.raises(SystemExit):
        attribution.main(["--by", package, "--tasks", "concrete"])
    assert f"benchmarks.attribution needs {package}: pip install 'vlearn[attribution]'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("package", ["kronfluence", "dattri", "captum"])
def test_every_peer_attributes_every_example_to_every_query(subject: tuple[Subject, Data], package: str) -> None:
    pytest.importorskip(package)
    own, data = subject
    own = dataclasses.replace(
        own,
        model=own.own_model().float(),
        snapshots=[{name: p.float() for name, p in each.items()} for each in own.snapshots],
        x=own.x.float(),
        y=own.y.float() if own.regression else own.y,
    )
    x, y = data.x_query.float(), data.y_query.float() if own.regression else data.y_query
    for method in methods.METHODS[package]:
        assert method.scorer([own], method.settings[-1])(x, y).shape == (len(own.y), len(y)), method.name


@pytest.mark.slow
def test_the_smoke_run_writes_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--smoke", "--by", "vlearn", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert attribution.main(arguments) == 0
    record = json.loads((tmp_path / "out" / "digits.json").read_text())
    single = [row["method"] for row in record["rows"] if row["networks"] == 1]
    assert single == [method.name for method in ours.METHODS]
    assert {row["method"] for row in record["rows"] if row["networks"] == 2} == {
        method.name for method in ours.METHODS if method.averaged
    }
    assert all(np.isfinite(row["score"]).all() for row in record["rows"])
    assert record["removals"][0]["method"] == "random" and (tmp_path / "out" / "digits.png").exists()
    shown = capsys.readouterr().out
    assert "Trained in a batch or alone" in shown and "Linear datamodelling score: digits" in shown
