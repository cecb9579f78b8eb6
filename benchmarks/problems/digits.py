"""scikit-learn's 8x8 digits, and the settings of the benchmarks on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.problems.networks import digits_cnn


@dataclasses.dataclass(frozen=True)
class Settings:
    """Everything that the numbers depend on."""

    seed: int = 0
    epochs: int = 100
    batch: int = 50
    num_data: int = 1000
    num_test: int = 797
    channels: tuple[int, int] = (8, 16)
    prior_precision: float = 5.0
    lr: float = 0.2
    hess_init: float = 0.1
    beta2: float = 0.999
    sgd_lr: float = 0.2
    momentum: float = 0.9
    retrained: int = 50

    @property
    def weight_decay(self) -> float:
        return self.prior_precision / self.num_data

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_data // self.batch)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def checkpoints(self) -> set[int]:
        """Epochs after which there is a sweep: denser at first, when the loss falls fast."""
        shares = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
        return {max(1, round(share * self.epochs)) for share in shares}


SMOKE = Settings(epochs=3, num_data=200, num_test=200, channels=(3, 4), retrained=4)


@dataclasses.dataclass(frozen=True)
class Digits:
    """The training examples ``x`` ``[N, 1, 8, 8]`` with classes ``y`` ``[N]``, and the test examples."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    @classmethod
    def load(cls, settings: Settings, standardised: bool = True) -> Digits:
        """Pixels of mean 0 and standard deviation 1, or in [0, 1]."""
        x, y = shuffled_digits()
        x = (x - x[: settings.num_data].mean()) / x[: settings.num_data].std() if standardised else x / 16
        test = slice(settings.num_data, settings.num_data + settings.num_test)
        return cls(x[: settings.num_data], y[: settings.num_data], x[test], y[test])

    def minibatches(self, settings: Settings) -> Iterator[list[Tensor]]:
        """The indices of every minibatch, epoch by epoch; they are the same for every optimizer."""
        generator = torch.Generator().manual_seed(settings.seed)
        for _ in range(settings.epochs):
            yield list(torch.randperm(len(self.y), generator=generator).split(settings.batch))


def shuffled_digits() -> tuple[Tensor, Tensor]:
    """Pixels ``[1797, 1, 8, 8]`` from 0 to 16 and classes ``[1797]``, shuffled so that any split has the same writers.

    The order is a fixed one.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = torch.randperm(len(bunch.target), generator=torch.Generator().manual_seed(0))
    return torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1)[order], torch.tensor(bunch.target)[order]


def network(settings: Settings) -> nn.Sequential:
    """A small CNN, whose initial weights depend on the seed alone."""
    torch.manual_seed(settings.seed)
    return digits_cnn(*settings.channels)
