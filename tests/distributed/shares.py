"""A small problem whose data several processes share, and each one's loader."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

import vlearn
from vlearn.posterior import Diagonal

CLASSES, LENGTH = 3, 4


def dataset(count: int = 11, tokens: bool = False) -> TensorDataset:
    random = torch.Generator().manual_seed(3)
    shape, labels = ((count, LENGTH, 4), (count, LENGTH)) if tokens else ((count, 4), (count,))
    x = torch.randn(shape, generator=random, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, labels, generator=random))


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def posterior_of(model: nn.Module, factor: float = 1.0) -> Diagonal:
    mean: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    precision = {name: factor * (11 + p.square()) for name, p in mean.items()}
    return Diagonal.from_precision(mean, precision, num_data=11, prior_precision=2.0)


def of_tokens(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.mT, target, reduction="none")


def loader_of(data: TensorDataset, how: str = "sampler") -> DataLoader[Any]:
    """A process's share of the data."""
    sampler = vlearn.UnrepeatedDistributedSampler(data)
    if how == "repeated":
        sampler = DistributedSampler(data, shuffle=True, seed=4)
    if how == "batches":
        return DataLoader(data, batch_sampler=BatchSampler(sampler, 3, drop_last=False))
    if how == "indexed":
        return DataLoader(vlearn.IndexedDataset(data), batch_size=3, sampler=sampler)
    return DataLoader(data, batch_size=3, sampler=sampler)


class Failing(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        if index == 7:
            raise OSError("no such file")
        return super().__getitem__(index)
