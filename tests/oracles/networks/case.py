"""A small network in float64 with a batch, and the pieces such networks are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3
EXAMPLES = 4


@dataclass
class Case:
    """A model and one batch; `x` is a tensor, a tuple of positional or a dict of keyword arguments."""

    model: nn.Module
    x: Any
    target: Tensor
    loss: Callable[..., Tensor] = F.cross_entropy  # torch-style

    def call(self, model: nn.Module) -> Any:
        if isinstance(self.x, dict):
            return model(**self.x)
        return model(*self.x) if isinstance(self.x, tuple) else model(self.x)

    def each_loss(self, output: Tensor) -> Tensor:
        """The loss of each example, its positions averaged."""
        rows = self.loss(output, self.target, reduction="none")
        return rows.reshape(len(rows), -1).mean(1)


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(crc32(build.__name__.encode()))
            default, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.float64)
            try:
                return build()
            finally:
                torch.set_default_dtype(default)

    CASES[build.__name__] = seeded
    return seeded


def labels() -> Tensor:
    return torch.arange(EXAMPLES) % CLASSES


def rows(*shape: int) -> Tensor:
    return torch.randn(EXAMPLES, *shape)


class Model(nn.Module):
    """A model whose forward is a function of itself and its inputs, with named parts."""

    def __init__(self, forward: Callable[..., Any], **parts: Any):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def head(features: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, CLASSES))


def image_model(*layers: nn.Module, channels: int = 2, size: tuple[int, int] = (7, 6)) -> Case:
    x = rows(channels, *size)
    body = nn.Sequential(*layers)
    features = body(x[:1]).numel()
    return Case(nn.Sequential(body, nn.Tanh(), head(features)), x, labels())
