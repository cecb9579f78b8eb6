"""The tasks on which attribution is scored: data, a network, and how plain SGD trains it.

The settings are those of ASTRA (Wang et al., 2025, arXiv:2507.14740, Table 2), which took them from SOURCE (Bae et al.,
2024, arXiv:2405.12186); the convolutional network is our own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.problems import images, linear_regression, networks


class Data(NamedTuple):
    """Training examples and queries, of which inputs of fully connected networks are flat."""

    x: Tensor
    y: Tensor
    x_query: Tensor
    y_query: Tensor


@dataclasses.dataclass(frozen=True)
class Task:
    """Everything that a trained network depends on but its examples and its seed.

    Attributes:
        dataset: "concrete", or a data set of `benchmarks.problems.images`.
        widths: of a fully connected network with ReLU between its layers; none for ResNet-20.
        num_data, num_queries: training examples, and test examples whose loss is predicted.
        flipped: share of the training labels that are replaced by random ones.
        at_once: networks that are retrained in one batched product.
        repeats: retrainings of each subset, with other initial weights and another order, that are averaged.
    """

    title: str
    dataset: str
    widths: tuple[int, ...]
    num_data: int
    num_queries: int
    lr: float
    weight_decay: float
    batch: int
    epochs: int
    momentum: float = 0.9
    flipped: float = 0.0
    at_once: int = 8
    repeats: int = 5

    @property
    def regression(self) -> bool:
        return self.dataset == "concrete"

    @property
    def loss(self) -> Callable[..., Tensor]:
        return F.mse_loss if self.regression else F.cross_entropy

    def network(self, seed: int) -> nn.Module:
        """The network at its first weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return networks.relu_mlp(*self.widths) if self.widths else networks.resnet20_frn()

    def steps(self, num_data: int) -> int:
        """Optimizer steps of a whole run on so many examples."""
        return self.epochs * -(-num_data // self.batch)

    def training_time(self, num_data: int) -> float:
        """η = Σ_t lr/(1 - momentum)."""
        return self.steps(num_data) * self.lr / (1 - self.momentum)

    def load(self, root: Path | None) -> Data:
        """Its examples; those of a fixed random choice where there are more."""
        if self.regression:
            return _concrete(self, images.default_root() if root is None else root)
        data = images.load(self.dataset, root)
        order = torch.Generator().manual_seed(0)
        kept = torch.randperm(len(data.y), generator=order)[: self.num_data]
        queries = torch.randperm(len(data.y_test), generator=order)[: self.num_queries]
        y = data.y[kept]
        if self.flipped:
            drawn = torch.randint(len(data.classes), y.shape, generator=order)
            y = torch.where(torch.rand(len(y), generator=order) < self.flipped, drawn, y)
        x, x_query = data.x[kept], data.x_test[queries]
        if self.widths:
            x, x_query = x.flatten(1), x_query.flatten(1)
        return Data(x, y, x_query, data.y_test[queries])


FASHION_MNIST = Task(
    title="Fashion-MNIST, 6,144",
    dataset="fashion-mnist",
    widths=(784, 512, 256, 128, 10),
    num_data=6144,
    num_queries=250,
    lr=0.03,
    weight_decay=1e-3,
    batch=64,
    epochs=20,
)
TASKS = {
    "concrete": Task(
        title="UCI Concrete",
        dataset="concrete",
        widths=(8, 128, 128, 128, 1),
        num_data=896,
        num_queries=134,
        lr=0.03,
        weight_decay=1e-5,
        batch=32,
        epochs=20,
        at_once=16,
        repeats=20,
    ),
    "fashion-mnist": FASHION_MNIST,
    "mnist": dataclasses.replace(FASHION_MNIST, title="MNIST, 6,144", dataset="mnist"),
    "fashion-mnist-n": dataclasses.replace(
        FASHION_MNIST,
        title="Fashion-MNIST-N, 6,144",
        flipped=0.3,
        lr=0.01,
        weight_decay=3e-5,
        epochs=3,
        repeats=20,
    ),
    "cifar-10": Task(
        title="CIFAR-10, 3,072",
        dataset="cifar-10",
        widths=(),
        num_data=3072,
        num_queries=250,
        lr=0.03,
        weight_decay=1e-3,
        batch=64,
        epochs=20,
        at_once=16,
    ),
}
ACCELERATOR = ("cifar-10",)  # not run unless they are named
SMOKE = Task(
    title="digits, 200",
    dataset="digits",
    widths=(64, 16, 10),
    num_data=200,
    num_queries=20,
    lr=0.03,
    weight_decay=1e-3,
    batch=32,
    epochs=5,
    at_once=4,
    repeats=2,
)


def _concrete(task: Task, root: Path) -> Data:
    x, y = linear_regression.load("concrete", root)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, query = order[: task.num_data], order[task.num_data : task.num_data + task.num_queries]
    x, y = ((each - each[train].mean(0)) / each[train].std(0) for each in (x, y.unsqueeze(1)))
    return Data(*(each.float() for each in (x[train], y[train], x[query], y[query])))
