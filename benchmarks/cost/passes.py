"""Plain passes, live sensitivities and sweeps of a network on noise, as calls to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn

PLAIN = "plain forward + backward"

Call = Callable[[], Any]


def next_token(output: Tensor, target: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of logits ``[N, T, vocabulary]`` and tokens ``[N, T]``."""
    return F.cross_entropy(output.transpose(1, 2), target, reduction=reduction)


@dataclass(frozen=True)
class Subject:
    """A network, its batch, and how many examples at a time are tried with each way without vlearn.

    Inputs are noise of this size, or, with `tokens`, so many tokens.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: int
    rounds: int
    tried: dict[str, tuple[int, ...]] = field(default_factory=dict)
    tokens: int = 0
    size: tuple[int, ...] = (1, 28, 28)

    @property
    def loss(self) -> Callable[..., Tensor]:
        return next_token if self.tokens else F.cross_entropy

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def data(self, examples: int) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        if self.tokens:
            x = torch.randint(256, (examples, self.tokens + 1))
            return x[:, :-1], x[:, 1:]
        return torch.randn(examples, *self.size), torch.randint(10, (examples,))

    def batches(self, examples: int) -> list[tuple[Tensor, Tensor]]:
        return list(zip(*(part.split(self.batch) for part in self.data(examples)), strict=True))


Build = Callable[[Subject, int], Call]  # of a subject and a number of examples


def plain(subject: Subject, examples: int) -> Call:
    """Forward and backward passes of the unwatched model."""
    model, batches = subject.model(), subject.batches(examples)

    def call() -> None:
        for x, y in batches:
            training_step(model, subject, x, y)

    return call


def live(deviation: bool | None, subject: Subject, examples: int) -> Call:
    """Training steps of a watched model; sensitivities are asked for unless ``deviation`` is None."""
    model, batches = subject.model(), subject.batches(examples)
    optimizer = vlearn.IVON(model, lr=0.1, ess=60_000, hess_init=0.1)
    optimizer.posterior()  # its state is there from now on

    def call() -> None:
        for x, y in batches:
            training_step(model, subject, x, y)
            if deviation is not None:
                optimizer.sensitivities(deviation=deviation)

    return call


def sweep(leverage: str | None, subject: Subject, examples: int) -> Call:
    """A sweep at the mean, with or without the leverage."""
    model, batches = subject.model(), subject.batches(examples)
    posterior = vlearn.IVON(model.named_parameters(), lr=0.1, ess=60_000, num_data=60_000, hess_init=0.1).posterior()
    return lambda: vlearn.sweep(model, posterior, batches, subject.loss, leverage=leverage, progress=False)


def training_step(model: nn.Module, subject: Subject, x: Tensor, y: Tensor) -> None:
    """A forward and a backward pass, without the optimizer's step."""
    model.zero_grad()
    subject.loss(model(x), y).backward()


VLEARN: dict[str, Build] = {
    "watched, nothing asked": partial(live, None),
    "live self-influence": partial(live, False),
    "live with deviation": partial(live, True),
    "sweep with LOO": partial(sweep, None),
    "sweep with LOO and leverage": partial(sweep, "probe"),
}
