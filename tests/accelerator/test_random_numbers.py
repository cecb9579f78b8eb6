"""What draws on a device with a generator of its own is repeated there, and what is asked leaves the generator be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.accelerator.pretend import registered
from vlearn.capture.random_state import untouched_random_numbers


class OwnDropout(nn.Module):
    """A layer that no rule covers and that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(4), dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight * (1 + torch.rand_like(x))


@pytest.fixture
def own(device: torch.device) -> torch.device:
    """The device, with a generator of its own."""
    module = registered()
    assert module is not None
    module.has_generator = True
    return device


def model_and_data(where: Any, layer: Callable[[], nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), layer(), nn.Linear(5, 3)).double()
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(3, (12,))
    return model.to(where), x.to(where), y.to(where)


def step(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
    optimizer.step()


LAYERS: dict[str, Callable[[], nn.Module]] = {"dropout": nn.Dropout, "its own": OwnDropout}


@pytest.mark.parametrize("layer", LAYERS)
def test_the_masks_of_a_pass_are_those_of_its_rows(layer: str, own: torch.device) -> None:
    found = []
    for where in ("cpu", own):
        model, x, y = model_and_data(where, LAYERS[layer])
        optimizer = vlearn.IVON(model, lr=0.1, ess=50)
        torch.manual_seed(7)
        for _ in range(3):
            step(optimizer, model, x, y)
        rows = optimizer.sensitivities(deviation=True)
        assert rows.deviation is not None
        found.append((rows.residual.cpu(), rows.self_influence.cpu(), rows.deviation.cpu()))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


def test_what_is_drawn_or_seeded_inside_is_as_if_it_had_not_been(own: torch.device) -> None:
    def drawn() -> list[Tensor]:
        return [torch.rand(3), torch.rand(3, device=own).cpu()]

    torch.manual_seed(5)
    expected = drawn()
    torch.manual_seed(5)
    with untouched_random_numbers():
        torch.manual_seed(6)
        drawn()
    for value, other in zip(drawn(), expected, strict=True):
        assert torch.equal(value, other)


def test_what_is_asked_of_a_posterior_leaves_the_generator_be(own: torch.device) -> None:
    module = registered()
    assert module is not None
    model, x, y = model_and_data(own, nn.Dropout)
    optimizer = vlearn.IVON(model, lr=0.1, ess=50)
    step(optimizer, model, x, y)
    before = module.random_state
    measured = optimizer.diagnostics([(x, y)], F.cross_entropy, model=model)
    assert measured.loss_at_draws is not None
    assert torch.equal(module.random_state, before)
    step(optimizer, model, x, y)
    assert not torch.equal(module.random_state, before)
