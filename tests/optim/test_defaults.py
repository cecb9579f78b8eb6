"""Every optimizer of the family trains at its defaults and the learning rate that its documentation names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from benchmarks.problems.images import default_root
from benchmarks.problems.networks import LanguageModel
from tests.optim.table import FAMILY, Entry

pytestmark = pytest.mark.slow
kinds = pytest.mark.parametrize("entry", [e for e in FAMILY if e.options or not e.variant], ids=str)


def at_defaults(entry: Entry, model: nn.Module, ess: float, **kwargs: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    size = {"num_data": ess} if entry.name == "VAdamW" else {"ess": ess}
    return getattr(vlearn, entry.name)(model, entry.rate, generator=generator, **{**size, **entry.options, **kwargs})


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


@pytest.mark.parametrize("task", ["classification", "regression", "language"])
@kinds
def test_it_trains_and_its_draws_predict(entry: Entry, task: str) -> None:
    model, x, y, loss = problem(task)
    likelihood = {"likelihood": "gaussian"} if task == "regression" and entry.probes else {}
    optimizer = at_defaults(entry, model, len(x), **likelihood)
    start = float(loss(model.eval()(x), y).detach())
    model.train()
    for step in range(200):
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
    if (entry.name, task) != ("VOGN", "regression"):  # whose squares are small with the residuals, its draws wide
        assert sum(drawn) / len(drawn) < start


CONTEXT = 32


def shakespeare() -> Tensor:
    """The text as numbers of its characters."""
    path = default_root() / "text" / "tinyshakespeare.txt"
    if not path.exists():
        pytest.skip(f"{path} is not there: set VLEARN_DATA")
    text = path.read_text()
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    return torch.tensor([number[character] for character in text])


def pieces(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs ``[N, T]``, and the characters that follow each."""
    rows = text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
    return rows[:, :-1], rows[:, 1:]


@kinds
def test_a_small_gpt_learns_more_of_shakespeare_than_how_often_he_uses_each_character(entry: Entry) -> None:
    text = shakespeare()
    shares = text.bincount() / len(text)
    entropy = float(-(shares * shares.log()).sum())
    training, held_out = text[:-100_000], pieces(text[-100_000:], torch.arange(0, 99_000, 1_000))
    torch.manual_seed(0)
    size = {"features": 4, "layers": 1, "heads": 1} if entry.dense else {"features": 32, "layers": 1, "heads": 4}
    model = LanguageModel(len(shares), CONTEXT, **size)
    optimizer = at_defaults(entry, model, len(training))  # the loss is the mean over all characters

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    @torch.no_grad()
    def evaluated() -> float:
        model.eval()
        found = float(loss(*held_out))
        model.train()
        return found

    losses = [evaluated()]
    for step in range(200):
        optimizer.zero_grad()
        loss(*pieces(training, torch.randint(0, len(training) - CONTEXT, (16,)))).backward()
        optimizer.step()
        if step % 50 == 49:
            losses.append(evaluated())
    assert losses == sorted(losses, reverse=True) and losses[-1] < entropy
    with optimizer.sampled_params():
        assert evaluated() < entropy
