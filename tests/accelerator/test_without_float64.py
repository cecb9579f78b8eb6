"""Every optimizer, and what is asked of examples, on a device that has no float64, as Apple's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vlearn
from tests.accelerator.asked import about_examples
from tests.accelerator.pretend import DEVICE, registered
from tests.optim.table import IVON, Entry, data, family, made, network, plain, states, weights
from vlearn import _wide


@pytest.fixture
def narrow(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device, without float64."""
    module = registered()
    assert module is not None
    monkeypatch.setattr(_wide, "WITHOUT_FLOAT64", frozenset({DEVICE}))
    module.float64_at = set()
    yield device
    assert not module.float64_at


def trained(entry: Entry, where: Any) -> tuple[Any, Any, Tensor, Tensor]:
    torch.manual_seed(7)
    model = network(dtype=torch.float32).to(where)
    x, y = (each.to(where) for each in data(dtype=torch.float32))
    optimizer = made(entry, "plain", model)
    for _ in range(3):
        plain(optimizer, model, x, y)
    return model, optimizer, x, y


@family
def test_it_trains_there(entry: Entry, narrow: torch.device) -> None:
    found = []
    for where in ("cpu", narrow):
        model, optimizer, _, _ = trained(entry, where)
        found.append([t.cpu() for t in weights(model) + states(optimizer)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


@family
def test_everything_that_is_asked_about_examples_is_the_same_there(entry: Entry, narrow: torch.device) -> None:
    found = []
    for where in ("cpu", narrow):
        model, optimizer, x, y = trained(entry, where)
        batches = [(x[:8], y[:8]), (x[8:], y[8:])]
        values = about_examples(model, optimizer, batches)
        measured = optimizer.diagnostics(batches, F.cross_entropy, model=model)
        found.append([*values, torch.tensor(measured.loss_at_mean)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "eigenvalue-corrected", "full", "last-layer"])
def test_posteriors_are_fitted_there(structure: str, narrow: torch.device) -> None:
    found = []
    for where in ("cpu", narrow):
        model = network(dtype=torch.float32).to(where)
        x, y = (each.to(where) for each in data(dtype=torch.float32))
        batches = [(x[:8], y[:8]), (x[8:], y[8:])]
        posterior = vlearn.posterior.fit(
            model, batches, F.cross_entropy, structure, prior_precision="marginal-likelihood", progress=False
        )
        table = vlearn.sweep(model, posterior, batches, F.cross_entropy, "exact", refined=True, progress=False)
        measures = [posterior.entropy(), posterior.stopped_at(3.0).entropy(), posterior.kl()]
        found.append([*(torch.tensor(column) for column in table.columns().values()), torch.tensor(measures)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


def test_posteriors_are_merged_and_measured_there(narrow: torch.device) -> None:
    found = []
    for where in ("cpu", narrow):
        posteriors = []
        for _ in range(2):
            model, optimizer, x, y = trained(IVON, where)
            posteriors.append(optimizer.posterior())
        scale = vlearn.posterior.measured_scale(model, posteriors[0], [(x, y)], F.cross_entropy, progress=False)
        merged = vlearn.posterior.merge(posteriors)
        found.append([merged.mean["0.weight"].cpu(), torch.tensor(scale.scale)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
