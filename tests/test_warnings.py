"""Warnings name the line that the user wrote."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.optim.table import data, network

X, Y = data()
BATCHES = [(X, Y)]


def of_a_rival() -> None:
    model = network()
    first = vlearn.IVON(model, lr=0.1, ess=6)
    vlearn.EVON(model, lr=0.1, ess=6)  # here
    del first


def of_a_loss() -> None:
    model = network()
    scale = nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = vlearn.IVON([*model.named_parameters(), ("scale", scale)], lr=0.1, ess=6)
    optimizer.watch(model)
    (F.cross_entropy(model(X), Y) * scale.exp()).backward()
    optimizer.sensitivities()  # here


def of_a_sweep() -> None:
    model = network()
    posterior = vlearn.IVON(model, lr=0.1, ess=1e6).posterior()
    vlearn.sweep(model, posterior, BATCHES, F.cross_entropy, progress=False)  # here


def of_a_fit() -> None:
    model = nn.Linear(6, 2).double()

    def log_variance(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        mean, log_variance = output.unbind(-1)
        return 0.5 * ((target - mean).square() * (-log_variance).exp() + log_variance)

    told = {"curvature": "ggn-exact", "progress": False}
    vlearn.posterior.fit(model, [(X, 30.0 * Y.double())], log_variance, "kronecker", **told)  # here


@pytest.mark.parametrize("warned", [of_a_rival, of_a_loss, of_a_sweep, of_a_fit])
def test_a_warning_is_of_the_users_line(warned: Callable[[], None]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warned()
    lines, first = inspect.getsourcelines(warned)
    (here,) = (first + number for number, line in enumerate(lines) if line.endswith("# here\n"))
    caught = [each for each in caught if each.category is UserWarning]
    assert {(each.filename, each.lineno) for each in caught} == {(__file__, here)}
