"""torch's default device is the user's: nothing that vlearn makes for itself goes there."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.optim.table import FAMILY, Entry, numbered


class Network(nn.Module):
    """A layer of each kind of path: with a rule, with dropout inside, without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop = nn.Linear(4, 5), nn.Sequential(nn.Dropout(0.1), nn.Linear(5, 5))
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.drop(self.first(x)).tanh() * self.scale)[:, :3]


def numbers(entry: Entry, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    """What training and every way to ask for sensitivities give."""
    torch.manual_seed(0)
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]
    optimizer = entry.make(model)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    live = optimizer.sensitivities()
    optimizer.load_state_dict(optimizer.state_dict())
    told = (model, optimizer.posterior())
    table = vlearn.sweep(*told, batches, F.cross_entropy, leverage="exact", progress=False)
    pairs = vlearn.influence(*told, batches, batches[:1], F.cross_entropy, progress=False)
    groups = vlearn.leave_group_out(*told, batches, {"a": [1, 9]}, F.cross_entropy, progress=False)
    predicted = vlearn.predict(*told, x, 3, generator=torch.Generator().manual_seed(1))
    asked: tuple[Any, ...] = (live, table, pairs, groups, predicted)
    kept = [value for result in asked for value in vars(result).values() if isinstance(value, torch.Tensor)]
    return [predicted, *kept] if isinstance(predicted, torch.Tensor) else kept


@numbered
def test_all_of_it_runs_where_new_tensors_have_no_data(number: int) -> None:
    torch.manual_seed(0)
    model, x, y = Network(), torch.randn(12, 4), torch.arange(12) % 3
    again = copy.deepcopy(model)
    expected = numbers(FAMILY[number], model, x, y)
    torch.set_default_device("meta")
    try:
        found = numbers(FAMILY[number], again, x, y)
    finally:
        torch.set_default_device(None)
    assert len(found) == len(expected) > 5
    assert all(map(torch.equal, found, expected))
