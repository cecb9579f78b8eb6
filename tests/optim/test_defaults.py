"""Every optimizer of the family trains at its defaults and the learning rate that its documentation names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn

KINDS: dict[str, tuple[Callable[..., Any], float]] = {
    "IVON": (vlearn.IVON, 0.1),
    "VOGN": (vlearn.VOGN, 0.01),
    "VON": (vlearn.VON, 0.01),
    "FullVON": (vlearn.FullVON, 0.05),
    "KFACVON": (vlearn.KFACVON, 0.01),
    "EK-FAC": (partial(vlearn.KFACVON, eigenvalue_correction=True), 0.01),
}


class Bigrams(nn.Module):
    """Scores of the next token at each position, ``[N, T, C]``."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, 8)
        self.inner, self.out = nn.Linear(8, 12), nn.Linear(12, tokens)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(self.embedding(x))))


def problem(task: str) -> tuple[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
    """(model, inputs, targets, loss)."""
    torch.manual_seed(0)
    if task == "language":
        follower = torch.randperm(10)
        rows = [torch.randint(0, 10, (200, 1))]
        for _ in range(6):
            rows.append(torch.where(torch.rand(200, 1) < 0.9, follower[rows[-1]], torch.randint(0, 10, (200, 1))))
        text = torch.cat(rows, 1)
        return Bigrams(10), text[:, :-1], text[:, 1:], lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten())
    x = torch.randn(200, 6)
    teacher = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    scores = 2 * teacher(x).detach()
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    if task == "regression":
        return model, x, scores + 0.1 * torch.randn(200, 3), F.mse_loss
    return model, x, scores.argmax(1), F.cross_entropy


@pytest.mark.slow
@pytest.mark.parametrize("task", ["classification", "regression", "language"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_and_its_draws_predict(kind: str, task: str) -> None:
    model, x, y, loss = problem(task)
    make, lr = KINDS[kind]
    likelihood = {"likelihood": "gaussian"} if task == "regression" and kind not in ("IVON", "VOGN") else {}
    optimizer = make(model, lr, len(x), generator=torch.Generator().manual_seed(0), **likelihood)
    start = float(loss(model.eval()(x), y).detach())
    model.train()
    for step in range(400):
        batch = slice(step % 4 * 50, step % 4 * 50 + 50)
        optimizer.zero_grad()
        loss(model(x[batch]), y[batch]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        assert float(loss(model(x), y)) < 0.7 * start
        drawn = []
        for _ in range(16):
            with optimizer.sampled_params():
                drawn.append(float(loss(model(x), y)))
    if (kind, task) != ("VOGN", "regression"):  # whose squares are small with the residuals, its draws wide
        assert sum(drawn) / len(drawn) < start
