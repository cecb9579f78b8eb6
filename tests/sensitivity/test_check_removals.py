"""The check of removals on a linear model, where removals are known exactly, and on training that does not behave."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from vlearn.sensitivity import RemovalCheck

N, FEATURES, PRIOR = 60, 3, 2.0


def half_square(f: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (f - y).square().sum(1)


class Regression:
    """Ridge regression, whose minimum without some examples is solved for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.x = torch.randn(N, FEATURES, dtype=torch.float64)
        self.y = self.x @ torch.randn(FEATURES, 1, dtype=torch.float64) + torch.randn(N, 1, dtype=torch.float64)
        self.loader = [(self.x[:35], self.y[:35]), (self.x[35:], self.y[35:])]
        self.model = nn.Linear(FEATURES, 1, bias=False).double()
        self.solve(self.model, torch.ones(N, dtype=torch.bool))
        with torch.no_grad():
            self.model.weight.mul_(1 + 1e-9)  # so that solving moves it

    def solve(self, model: Any, keep: Tensor) -> None:
        x, y = self.x[keep], self.y[keep]
        normal = x.mT @ x + PRIOR * torch.eye(FEATURES, dtype=torch.float64)
        model.weight.data.copy_(torch.linalg.solve(normal, x.mT @ y).mT)

    def table(self, **kwargs: Any) -> Any:
        posterior = vlearn.posterior.fit(
            self.model, self.loader, half_square, "full", prior_precision=PRIOR, curvature="ggn-exact", progress=False
        )
        return vlearn.sweep(self.model, posterior, self.loader, half_square, progress=False, **kwargs)

    def check(self, table: Any = None, train_on: Callable[..., Any] | None = None, **kwargs: Any) -> RemovalCheck:
        given = {"groups": 6, "share": 0.02, "progress": False, **kwargs}
        table = self.table() if table is None else table
        return vlearn.check_removals(
            self.model, table, self.solve if train_on is None else train_on, self.loader, half_square, **given
        )


@pytest.fixture(scope="module")
def problem() -> Regression:
    return Regression()


def test_removed_alone_the_refined_prediction_is_exact(problem: Regression) -> None:
    check = problem.check(problem.table(refined=True), groups=20)
    assert len(check.index.unique()) == 20 and check.repeat_change == 0
    torch.testing.assert_close(check.predicted, check.retrained, rtol=1e-5, atol=1e-8)
    for estimate in (check.slope, check.pearson, check.spearman, check.mean_ratio):
        assert estimate == pytest.approx((1, 1, 1), abs=1e-5)
    assert "trust order and size" in check.verdict and str(check) == check.verdict


def test_changes_are_those_of_refits_without_each_group(problem: Regression) -> None:
    check = problem.check(share=0.05, groups=5)
    assert check.index.shape == (15,) and check.group.tolist() == [g for g in range(5) for _ in range(3)]
    assert len(check.index.unique()) == 15
    kept_squares = []
    whole = nn.Linear(FEATURES, 1, bias=False).double()
    problem.solve(whole, torch.ones(N, dtype=torch.bool))
    for group in range(5):
        removed = check.index[check.group == group]
        keep = torch.ones(N, dtype=torch.bool).index_fill(0, removed, False)
        refit = nn.Linear(FEATURES, 1, bias=False).double()
        problem.solve(refit, keep)
        with torch.no_grad():
            change = half_square(refit(problem.x), problem.y) - half_square(whole(problem.x), problem.y)
        torch.testing.assert_close(check.retrained[check.group == group], change[removed])
        kept_squares.append(change[keep].square())
    assert check.kept_change == pytest.approx(float(torch.cat(kept_squares).mean().sqrt()))
    table = problem.table()
    torch.testing.assert_close(check.predicted, (table.loo_loss - table.loss)[check.index])


@pytest.mark.slow
def test_what_other_members_of_a_group_change_has_no_mean(problem: Regression) -> None:
    """Over many random groups the slope is that of single removals, by the refined form 1."""
    table = problem.table(refined=True)
    ratios = [problem.check(table, share=0.05, groups=20, seed=seed).mean_ratio[0] for seed in range(60)]
    error = np.std(ratios) / np.sqrt(len(ratios))
    assert abs(np.mean(ratios) - 1) < 5 * error and error < 0.02


def test_noise_that_all_runs_share_cancels_and_other_noise_is_told(problem: Regression) -> None:
    rolled: list[float] = []

    def shared(model: Any, keep: Tensor) -> None:
        rolled.append(random.random() + np.random.rand())
        problem.solve(model, keep)
        model.weight.data.add_(1e-3 * torch.randn(1, FEATURES, dtype=torch.float64))

    check = problem.check(train_on=shared)
    assert check.repeat_change == 0 and len(set(rolled)) == 1
    own = torch.Generator().manual_seed(1)

    def unshared(model: Any, keep: Tensor) -> None:
        problem.solve(model, keep)
        model.weight.data.add_(0.1 * torch.randn(1, FEATURES, dtype=torch.float64, generator=own))

    check = problem.check(train_on=unshared)
    assert "wo runs that remove nothing differ" in check.verdict and "trust" not in check.verdict


def test_nothing_of_the_users_changes_and_it_is_repeatable() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 4), torch.randint(0, 3, (N,))
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.2), nn.Linear(6, 3))
    model[2].eval()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20, shuffle=True)
    posterior = vlearn.posterior.fit(model, loader, F.cross_entropy, progress=False)
    table = vlearn.sweep(model, posterior, loader, F.cross_entropy, progress=False)

    def train_on(copied: nn.Module, keep: Tensor) -> nn.Module:
        assert copied is not model and copied.training and not keep.all() or keep.shape == (N,)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        for batch in torch.randperm(N).split(20):
            optimizer.zero_grad()
            (F.cross_entropy(copied(x[batch]), y[batch], reduction="none") * keep[batch]).mean().backward()
            optimizer.step()
        return copied

    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), str(np.random.get_state()), random.getstate()
    with torch.no_grad():
        check = vlearn.check_removals(model, table, train_on, loader, F.cross_entropy, groups=3, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (str(np.random.get_state()), random.getstate())
    assert all(p.grad is None for p in model.parameters())
    again = vlearn.check_removals(model, table, train_on, loader, F.cross_entropy, groups=3, progress=False)
    assert torch.equal(check.retrained, again.retrained) and torch.equal(check.index, again.index)
    other = vlearn.check_removals(model, table, train_on, loader, F.cross_entropy, groups=3, seed=1, progress=False)
    assert not torch.equal(check.index, other.index)
    assert set(check.summary("a/")) >= {"a/slope", "a/slope_low", "a/pearson_high", "a/num_examples", "a/kept_change"}


def test_an_interrupt_keeps_the_groups_that_are_done(problem: Regression) -> None:
    calls = []

    def train_on(model: Any, keep: Tensor) -> None:
        calls.append(keep)
        if len(calls) == stop:
            raise KeyboardInterrupt
        problem.solve(model, keep)

    stop = 5  # two runs with all, two groups
    check = problem.check(train_on=train_on)
    assert check.group.tolist() == [0, 1] and check.num_groups == 6
    assert torch.equal(check.retrained, problem.check().retrained[:2])
    calls.clear()
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        problem.check(train_on=train_on)


def test_a_table_of_some_examples_without_a_scale(problem: Regression) -> None:
    table = problem.table(loo_loss=False)
    rows = torch.arange(10, 50)
    some = replace(
        table, **{k: getattr(table, k)[rows] for k in ("index", "loss", "loo_loss", "deviation", "self_influence")}
    )
    seen = []

    def train_on(model: Any, keep: Tensor) -> None:
        seen.append(keep)
        problem.solve(model, torch.cat([keep, torch.ones(N - len(keep), dtype=torch.bool)]))

    check = problem.check(some, train_on, groups=10)
    assert not check.calibrated and 10 <= int(check.index.min()) and int(check.index.max()) < 50
    assert all(keep.shape == (50,) and keep[:10].all() for keep in seen)
    assert "trust the order; the predictions have no scale" in check.verdict


def made(predicted: Tensor, retrained: Tensor, kept: float = 0.0, repeat: float = 0.0) -> RemovalCheck:
    count = len(predicted)
    return RemovalCheck(torch.arange(count), torch.arange(count) % 10, predicted, retrained, kept, repeat, 10)


def test_the_verdict_follows_the_numbers() -> None:
    torch.manual_seed(0)
    predicted = torch.rand(200, dtype=torch.float64)
    noise = torch.randn(200, dtype=torch.float64)
    assert "trust order and size" in made(predicted, predicted + 0.01 * noise).verdict
    assert "multiply the sizes by 0.3" in made(predicted, 0.3 * predicted + 0.01 * noise).verdict
    assert "trust only who is among" in made(predicted, predicted + 0.8 * noise, kept=0.8).verdict
    assert "no correlation could exceed" in made(predicted, predicted + 0.8 * noise, kept=0.8).verdict
    assert "cannot be told from noise" in made(predicted, noise, kept=1.0).verdict
    assert "Nothing can be said: two runs that remove nothing differ" in made(predicted, predicted, repeat=0.5).verdict
    assert "order and size; two runs that remove nothing differ" in made(predicted, predicted, repeat=0.1).verdict
    assert made(predicted, predicted + noise, kept=1.0).highest_pearson == pytest.approx(
        (1 - 0.95 / float((predicted + noise).var(correction=0))) ** 0.5
    )


def test_intervals_cover_what_is_true_about_as_often_as_they_say() -> None:
    torch.manual_seed(1)
    covered = 0
    for _ in range(100):
        predicted = torch.rand(200, dtype=torch.float64)
        shift = 0.1 * torch.randn(10, dtype=torch.float64)[torch.arange(200) % 10]  # each group has its own
        check = made(predicted, 0.7 * predicted + shift + 0.2 * torch.randn(200, dtype=torch.float64))
        _, low, high = check.slope
        covered += low < 0.7 < high
    assert covered >= 85


def filled(model: Any, value: float) -> None:
    model.weight.data.fill_(value)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"groups": 0}, "groups=0, but it must be a positive whole number"),
        ({"share": 0.7}, "share=0.7, but it must be above 0 and at most .5"),
        ({"groups": 40, "share": 0.05}, "40 groups of 3 examples are more than the 60"),
        ({"train_on": lambda model, keep: None}, "has not moved the model"),
        ({"train_on": lambda model, keep: 3}, "train_on gave a int"),
        ({"train_on": lambda model, keep: filled(model, torch.nan)}, "not finite"),
        ({"train_on": lambda model, keep: filled(model, 1.0)}, "does the same without a group"),
    ],
)
def test_what_cannot_work_is_refused(problem: Regression, how: dict[str, Any], message: str) -> None:
    before = problem.model.weight.detach().clone()
    with pytest.raises((ValueError, TypeError), match=message):
        problem.check(**how)
    assert torch.equal(problem.model.weight, before)


def test_training_the_model_itself_is_undone_and_refused(problem: Regression) -> None:
    before = problem.model.weight.detach().clone()
    with pytest.raises(ValueError, match="trained the model itself"):
        problem.check(train_on=lambda _, keep: problem.solve(problem.model, keep))
    assert torch.equal(problem.model.weight, before)


def test_tables_of_another_model_of_tokens_or_of_other_data_are_refused(problem: Regression) -> None:
    table = problem.table()
    with pytest.raises(ValueError, match="pass the model, loader and loss that were swept"):
        problem.check(replace(table, loss=table.loss + 1))
    with pytest.raises(ValueError, match="sweep with per='example'"):
        problem.check(replace(table, position=table.index))
    with pytest.raises(ValueError, match="has an example twice"):
        problem.check(replace(table, index=table.index // 2))
    with pytest.raises(ValueError, match="did not give example 60"):
        problem.check(replace(table, index=table.index + 1))
