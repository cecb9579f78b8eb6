"""Models whose outputs are bounded, as probabilities and variances are, which a linear prediction may leave."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn

N = 40
X = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGET = (X[:, :1] > 0).double()
TARGET[:4] = 1 - TARGET[:4]


class MeanAndVariance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.body(x)
        return z[:, :1], F.softplus(z[:, 1:])


def binary(output: Any, y: Tensor) -> Tensor:
    return (-y * output.log() - (1 - y) * (1 - output).log()).sum(1)


def gaussian(output: Any, y: Tensor) -> Tensor:
    mean, variance = output
    return (variance.log() / 2 + (mean - y).square() / variance / 2).sum(1)


CASES: dict[str, tuple[Any, Any, Any]] = {
    "probability": (lambda: nn.Sequential(nn.Linear(3, 1), nn.Sigmoid()), nn.BCELoss(), binary),
    "probability, function": (lambda: nn.Sequential(nn.Linear(3, 1), nn.Sigmoid()), F.binary_cross_entropy, binary),
    "mean and variance": (MeanAndVariance, nn.GaussianNLLLoss(eps=1e-300), gaussian),
}


def swept(name: str, by_hand: bool = False, precision: float = 1.0, **arguments: Any) -> tuple[Any, list[str]]:
    torch.manual_seed(1)
    make, loss, own = CASES[name]
    model = make().double()
    with torch.no_grad():
        next(model.parameters()).mul_(4)
    posterior = vlearn.IVON(model, lr=0.1, ess=N, hess_init=precision / N, weight_decay=1e-9).posterior()
    output = 0 if name == "mean and variance" else None
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        table = vlearn.sweep(
            model, posterior, [(X, TARGET)], own if by_hand else loss, output=output, leverage=None, **arguments
        )
    return table, [str(each.message) for each in seen if each.category is UserWarning]


@pytest.mark.parametrize("name", CASES)
def test_leave_one_out_losses_are_nan_where_the_loss_takes_no_such_output_and_a_warning_says_so(name: str) -> None:
    table, messages = swept(name)
    truth, _ = swept(name, by_hand=True)
    outside = table.loo_loss.isnan()
    assert 0 < int(outside.sum()) < N
    assert torch.equal(outside, truth.loo_loss.isnan())
    torch.testing.assert_close(table.loo_loss[~outside], truth.loo_loss[~outside])
    assert len(messages) == 1 and messages[0].startswith(f"{int(outside.sum())} of {N} leave-one-out losses are NaN")


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_said_where_all_are_inside_or_none_is_asked_for(name: str) -> None:
    table, messages = swept(name, precision=1e4)
    assert bool(table.loo_loss.isfinite().all()) and not messages
    table, messages = swept(name, loo_loss=False)
    assert bool(table.loo_loss.isnan().all()) and not messages
