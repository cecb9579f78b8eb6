"""Leave-one-out losses of a posterior of about as many effective parameters as examples come with a warning."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import vlearn

N, STEPS = 1000, 400
LR, MOMENTUM = 0.02, 0.9


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, Tensor, Tensor, torch.optim.Optimizer, float]:
    """A network after a short training, its data, its optimizer, and its loss on other examples."""
    digits = load_digits()
    x, y = torch.tensor(digits.data) / 16, torch.tensor(digits.target)
    torch.manual_seed(0)
    order = torch.randperm(len(y))
    x, y = x[order], y[order]
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    for _ in range(STEPS):
        part = torch.randint(N, (50,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
    with torch.no_grad():
        held_out = F.cross_entropy(model(x[N:]), y[N:])
    return model, x[:N], y[:N], optimizer, float(held_out)


def swept(trained: Any, posterior: Any, count: int = N, **options: Any) -> vlearn.SensitivityTable:
    model, x, y, _, _ = trained
    return vlearn.sweep(model, posterior, [(x[:count], y[:count])], F.cross_entropy, progress=False, **options)


def fitted(trained: Any, **options: Any) -> Any:
    model, x, y, _, _ = trained
    return vlearn.posterior.fit(model, [(x, y)], F.cross_entropy, progress=False, **options)


def test_a_diagonal_that_overstates_is_told_and_what_the_message_advises_does_not(trained: Any) -> None:
    model, x, y, optimizer, held_out = trained
    with pytest.warns(UserWarning, match="not to be believed.*effective parameters for each example"):
        overstated = swept(trained, fitted(trained, structure="diagonal"))
    assert overstated.loo_loss.mean() > 2 * held_out
    time = vlearn.posterior.training_time(optimizer, STEPS)
    advised = swept(trained, fitted(trained, training_time=time))  # a warning would be an error
    assert 0.7 < float(advised.loo_loss.mean()) / held_out < 1.4


@pytest.mark.parametrize(
    ("options", "count"),
    [({"leverage": None}, N), ({"loo_loss": False}, N), ({"refined": True}, N), ({}, 99)],
    ids=["leverage", "loo_loss", "refined", "rows"],
)
def test_nothing_is_said_where_it_cannot_be_known_or_was_not_asked(
    options: dict[str, Any], count: int, trained: Any
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swept(trained, fitted(trained, structure="diagonal"), count, **options)
