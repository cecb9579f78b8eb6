"""`diagnostics().advice()`: each fault is named on a run that has it, and a healthy run hears nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, SubsetRandomSampler, TensorDataset

import vlearn
from vlearn.linearized.numbering import example_count
from vlearn.optim.diagnostics.advice import LONGEST_STEP, STUCK, WIDEST
from vlearn.optim.diagnostics.diagnostics import Diagnostics

N, BATCH = 600, 50
EACH: dict[str, dict[str, Any]] = {
    "IVON": {"lr": 0.2, "ess": N, "hess_init": 0.1, "beta2": 0.99},
    "EVON": {"lr": 3.0, "ess": N},
    "VAdamW": {"lr": 3e-3, "num_data": N},
    "VON": {"lr": 0.1, "ess": N, "weight_decay": 1 / N},
    "VOGN": {"lr": 0.1, "ess": N, "weight_decay": 1 / N},
    "KFACVON": {"lr": 0.1, "ess": N, "weight_decay": 1 / N},
    "FullVON": {"lr": 0.1, "ess": N, "weight_decay": 1 / N, "hess_init": 0.1},
}
Run = tuple[Any, DataLoader, Callable[..., Tensor]]


def digits(name: str, epochs: int = 10, **changed: Any) -> Run:
    """An optimizer that has trained on images of digits, with its loader and loss."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    bunch = load_digits()
    x, y = torch.tensor(bunch.images[:N], dtype=torch.float32).unsqueeze(1) / 8 - 1, torch.tensor(bunch.target[:N])
    if name == "FullVON":  # whose state is a matrix of all parameters
        model = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))
    else:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
    return trained(name, model, TensorDataset(x, y), F.cross_entropy, epochs, changed)


def regression(name: str, scale: float, epochs: int = 10, **changed: Any) -> Run:
    """The same for a regression whose noise has half the variance of `scale` squared."""
    torch.manual_seed(0)
    x = torch.randn(N, 6)
    y = scale * (x[:, :1].sin() + x[:, 1:2] + math.sqrt(0.5) * torch.randn(N, 1))
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 1))
    return trained(name, model, TensorDataset(x, y), F.mse_loss, epochs, changed)


def trained(
    name: str, model: nn.Module, data: TensorDataset, loss: Callable[..., Tensor], epochs: int, changed: dict[str, Any]
) -> Run:
    loader = DataLoader(data, batch_size=BATCH, shuffle=True)
    optimizer = getattr(vlearn, name)(model, **{**EACH[name], **changed})
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return optimizer, loader, loss


def only(advice: list[str]) -> str:
    assert len(advice) == 1, advice
    return advice[0]


@pytest.mark.parametrize("name", EACH)
def test_a_healthy_run_hears_nothing(name: str) -> None:
    optimizer, loader, loss = digits(name)
    assert optimizer.diagnostics().advice() == []
    found = optimizer.diagnostics(loader, loss)
    assert found.advice() == []
    assert found.loss_at_mean < 1 and found.num_examples == N and found.batch == BATCH


def test_a_likelihood_that_matches_the_loss_hears_nothing() -> None:
    optimizer, loader, loss = regression("EVON", 1.0)
    found = optimizer.diagnostics(loader, loss)
    assert found.advice() == [] and found.assumed_variance == pytest.approx(0.5, rel=1e-4)
    assert found.residual_variance == pytest.approx(found.loss_at_mean, rel=1e-4)


@pytest.mark.parametrize("name", ["IVON", "VOGN"])
def test_a_hessian_that_stays_hess_init_is_told_the_momentum(name: str) -> None:
    optimizer, loader, loss = digits(name, beta2=0.99999)
    told = only(optimizer.diagnostics().advice())
    assert told.startswith("after 120 steps 99.9% of the Hessian is still hess_init=") and "set beta2=0.98," in told
    assert optimizer.diagnostics(loader, loss).advice() == [told]


@pytest.mark.parametrize("name", ["IVON", "EVON", "VAdamW"])
def test_draws_that_are_too_wide_are_told_the_setting_of_their_width(name: str) -> None:
    optimizer, loader, loss = digits(name, ess=BATCH)
    told = only(optimizer.diagnostics(list(loader), loss).advice())  # which does not say how many examples there are
    assert "the draws are too wide: set ess=" in told


def test_draws_that_are_as_wide_as_hess_init_makes_them_are_told_that() -> None:
    optimizer, loader, loss = digits("IVON", hess_init=1e-4, beta2=0.998)
    told = only(optimizer.diagnostics(loader, loss).advice())
    assert "the draws are too wide: set hess_init=0.00" in told


@pytest.mark.parametrize(("name", "lr"), [("IVON", 8.0), ("EVON", 100.0), ("VAdamW", 0.2), ("KFACVON", 10.0)])
def test_a_learning_rate_that_is_too_high_is_told_a_lower_one(name: str, lr: float) -> None:
    optimizer, loader, loss = digits(name, lr=lr)
    told = only(optimizer.diagnostics(loader, loss).advice())
    assert told.startswith(f"lr={lr:g} is too high")
    assert lr / 1000 < float(told.rpartition("lr=")[2][:-1]) < lr / 4


def test_an_ess_that_is_not_the_number_of_examples_is_told_that_number() -> None:
    optimizer, loader, loss = digits("IVON", ess=BATCH)
    assert optimizer.diagnostics().advice() == []  # it may be all there are
    told = only(optimizer.diagnostics(loader, loss).advice())
    assert told == "ess is 50, but the loader has 600 examples, so that the posterior is too wide: set ess=600."
    optimizer, loader, loss = digits("VOGN", epochs=1, num_data=N * BATCH)
    told = only(optimizer.diagnostics(loader, loss).advice())
    assert told.startswith("num_data is 30000, but") and told.endswith("the posterior is too narrow: set num_data=600.")


def test_fewer_examples_than_a_minibatch_has_are_noticed_without_a_loader() -> None:
    told = only(digits("EVON", epochs=1, ess=1)[0].diagnostics().advice())
    assert told.startswith("ess is 1, but one minibatch alone has 50 examples: set ess to the number of")


@pytest.mark.parametrize("name", ["IVON", "VAdamW"])
def test_a_squared_error_of_another_scale_is_told_its_factor(name: str) -> None:
    optimizer, loader, loss = regression(name, 0.1)
    told = only(optimizer.diagnostics(loader, loss).advice())
    assert "noise of variance 0.5, but that of the residuals is 0.0" in told
    assert 10 <= float(told.rpartition(" ")[2][:-1]) <= 200


def test_an_ess_that_stands_for_the_scale_of_a_squared_error_is_let_be() -> None:
    optimizer, loader, loss = regression("EVON", 0.1, num_data=N, ess=N * 50)
    assert optimizer.diagnostics(loader, loss).advice() == []


SETTINGS = {"lr": 0.1, "ess": 1000, "hess_init": 1.0, "beta2": 0.99, "weight_decay": 0.0, "draw_variance": None}


def told_of(**found: Any) -> list[str]:
    settings = {**SETTINGS, "num_data": 1000, "num_data_given": False, **found.pop("settings", {})}
    fields: dict[str, Any] = {"step": 500, "hess_init_weight": 0.0, "batch": 100, "loss_at_mean": 0.1, **found}
    names = ("hessian_min", "hessian_median", "hessian_max", "hessian_moved", "signal_to_noise", "clipped")
    return Diagnostics(**dict.fromkeys(names, 1.0), nonfinite_count=0, settings=settings, **fields).advice()


@pytest.mark.parametrize(
    ("below", "above"),
    [
        ({"hess_init_weight": STUCK - 1e-3}, {"hess_init_weight": STUCK}),
        ({"step_size": LONGEST_STEP / 10.1}, {"step_size": LONGEST_STEP / 9.9}),
        ({"loss_at_draws": 0.09 + WIDEST}, {"loss_at_draws": 0.11 + WIDEST}),
        ({"num_examples": 1400, "num_terms": 1400}, {"num_examples": 1600, "num_terms": 1600}),
        ({"num_examples": 10, "num_terms": 1000}, {"num_examples": 10, "num_terms": 10}),  # a loss of tokens
        ({"num_examples": 10, "num_terms": None}, {"num_examples": 2000, "num_terms": None}),
        ({"residual_variance": 0.13, "assumed_variance": 0.5}, {"residual_variance": 0.12, "assumed_variance": 0.5}),
    ],
)
def test_it_speaks_beyond_its_threshold(below: dict[str, Any], above: dict[str, Any]) -> None:
    kept = {"loss_at_draws": 0.1}
    assert told_of(**kept | below) == []
    assert len(told_of(**kept | above)) == 1


def test_a_run_of_few_steps_is_not_judged_by_them() -> None:
    assert told_of(step=99, hess_init_weight=1.0, step_size=1.0, loss_at_draws=0.1) == []


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("scale", [10.0, 1.0, 0.01])
def test_before_the_first_step_only_residuals_too_small_for_the_noise_are_told(name: str, scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = getattr(vlearn, name)(model, **EACH[name])
    batches = [(torch.randn(N, 3), scale * torch.randn(N, 1))]
    told = [each for each in optimizer.diagnostics(batches, F.mse_loss).advice() if "squared error" in each]
    assert len(told) == (scale < 0.1)


def test_residuals_that_another_fault_explains_are_not_taken_for_noise() -> None:
    residuals = {"residual_variance": 50.0, "assumed_variance": 0.5, "loss_at_draws": 0.1}
    assert "multiply the loss by 0.01." in only(told_of(**residuals))
    assert only(told_of(**residuals, step_size=1.0)).startswith("lr=")


@pytest.mark.parametrize(
    ("loss", "assumed"),
    [
        (nn.MSELoss(), 1.0),  # the mean over two outputs
        (nn.MSELoss(reduction="sum"), 0.5),
        (lambda f, y: (0.5 * (f - y) ** 2).sum(1), 1.0),
        (nn.SmoothL1Loss(), None),
        (nn.L1Loss(), None),
        (nn.BCEWithLogitsLoss(), None),
    ],
)
def test_squared_errors_are_known_by_their_slope(loss: Callable[..., Tensor], assumed: float | None) -> None:
    model = nn.Linear(3, 2)
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    found = optimizer.diagnostics([(torch.randn(20, 3), torch.rand(20, 2))], loss)
    assert found.assumed_variance == (None if assumed is None else pytest.approx(assumed, rel=1e-4))
    if assumed is not None:
        assert found.residual_variance == pytest.approx(found.loss_at_mean * assumed, rel=1e-4)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cross_entropy_is_no_squared_error_however_its_gradients_are_rounded(
    confidence: float, dtype: torch.dtype
) -> None:
    for seed in range(25):
        torch.manual_seed(seed)
        model = nn.Linear(5, 3, dtype=dtype)
        x = torch.randn(6, 5, dtype=dtype)
        with torch.no_grad():
            model.weight *= confidence
        found = vlearn.IVON(model, lr=0.1, ess=6).diagnostics([(x, torch.randint(3, (6,)))], F.cross_entropy)
        assert found.residual_variance is None


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_squared_error_is_known_by_its_slope_at_targets_of_any_size(size: float) -> None:
    model = nn.Linear(3, 2)
    batches = [(torch.randn(20, 3), size * torch.randn(20, 2))]
    found = vlearn.IVON(model, lr=0.1, ess=20).diagnostics(batches, F.mse_loss)
    assert found.assumed_variance == pytest.approx(1.0, rel=1e-4)


def test_measuring_leaves_everything_as_it_was() -> None:
    runs = []
    for measures in (True, False):
        generator = torch.Generator().manual_seed(3)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2))
        optimizer = vlearn.IVON(model, lr=0.1, ess=20, generator=generator)
        x, y = torch.randn(20, 3), torch.randint(2, (20,))
        for _ in range(2):
            F.cross_entropy(model(x), y).backward()
            if measures:  # also while a draw waits for step()
                optimizer.diagnostics(DataLoader(TensorDataset(x, y), 5, shuffle=True), F.cross_entropy)
                assert model.training
            optimizer.step()
            optimizer.zero_grad()
        runs.append([*model.state_dict().values(), torch.rand(2)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_what_it_needs_is_asked_for() -> None:
    model = nn.Linear(3, 2)
    batches, given = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))], {"lr": 0.1, "ess": 10}
    unwatched = vlearn.IVON(model.parameters(), **given)
    with pytest.raises(ValueError, match="needs loss_fn too"):
        unwatched.diagnostics(batches)
    with pytest.raises(ValueError, match="none is watched: pass model="):
        unwatched.diagnostics(batches, F.cross_entropy)
    assert unwatched.diagnostics(batches, F.cross_entropy, model).batch == 4
    with pytest.raises(ValueError, match="the loader gave no batch"):
        unwatched.diagnostics([], F.cross_entropy, model)


def test_a_loader_tells_its_examples_only_where_it_knows_them() -> None:
    data = TensorDataset(torch.arange(12))
    subset, twice = SubsetRandomSampler(range(5)), torch.utils.data.RandomSampler(data, replacement=True)
    assert example_count(DataLoader(data, 5, shuffle=True, drop_last=True)) == 12
    assert example_count(DataLoader(data, 5, sampler=subset)) == 5
    assert example_count(DataLoader(data, 5, sampler=twice)) is None
    assert example_count(DataLoader(data, 5, sampler=list(range(3)))) is None
    batches: Any = type("Batches", (BatchSampler,), {})(SequentialSampler(data), 5, False)
    assert example_count(DataLoader(data, batch_sampler=batches)) is None
    assert example_count([data.tensors]) is None
