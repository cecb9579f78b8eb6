"""The first process writes what all have seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import vlearn
from tests.distributed.ranks import Ranks
from tests.distributed.test_torchrun import launch

pytestmark = pytest.mark.slow

N = 21
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (N,), generator=torch.Generator().manual_seed(2))


def train(rank: int, folder: str | None, epochs: int) -> Any:
    """Numbers and losses that this process saw, the weights, and a sweep at the end."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    model = DistributedDataParallel(inner)
    optimizer = vlearn.IVON(model, lr=0.1, ess=N)
    sampler = DistributedSampler(TensorDataset(X, Y), seed=4)
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, sampler=sampler)
    seen: list[tuple[Tensor, Tensor]] = []
    recorder = None
    if folder is not None:
        sweeps = vlearn.audit.Sweeps(2, options={"leverage": "exact"})
        recorder = vlearn.Recorder(folder, model, optimizer, sweeps=sweeps, self_influence_every=1)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for x, y in loader if recorder is None else recorder.follow(loader):
            optimizer.zero_grad()
            losses = F.cross_entropy(model(x), y, reduction="none")
            seen.append((torch.stack([(X == row).all(1).nonzero()[0, 0] for row in x]), losses.detach()))
            losses.mean().backward()
            optimizer.step()
    table = None
    if recorder is not None:
        recorder.close()
        table = vlearn.sweep(inner, optimizer.posterior(), DataLoader(TensorDataset(X, Y), 4), F.cross_entropy, "exact")
        table = {"loss": table.loss, "leverage": table.leverage}
    numbers, losses = (torch.cat(parts) for parts in zip(*seen, strict=True))
    return {"numbers": numbers, "losses": losses, "weights": [*inner.state_dict().values()], "table": table}


def averages(*seen: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss and count of every example over what all processes saw."""
    numbers = torch.cat([each["numbers"] for each in seen]).numpy()
    losses = torch.cat([each["losses"] for each in seen]).double().numpy()
    count = np.bincount(numbers, minlength=numbers.max() + 1)
    return np.bincount(numbers, losses) / count, count


def test_averages_and_sweeps_are_those_of_all_processes(ranks: Ranks, tmp_path: Path) -> None:
    first, second = ranks(train, str(tmp_path), 2)
    record = vlearn.TrainingRecord.open(tmp_path)
    loss, count = averages(first, second)
    np.testing.assert_allclose(record.column("loss"), loss, rtol=1e-5)
    np.testing.assert_array_equal(record.column("count"), count)
    assert count.sum() == 2 * (N + 1)  # the sampler repeats one
    assert np.isfinite(record.column("self_influence")).all()
    np.testing.assert_array_equal(record.labels, Y)
    np.testing.assert_allclose(record.probabilities.sum(1), 1, rtol=1e-5)
    assert record.memory.kinds.tolist() == ["live", "live", "sweep"]
    for name, values in first["table"].items():
        np.testing.assert_allclose(record.memory.column(name)[-1], values, rtol=1e-5)


def test_training_is_bitwise_what_it_is_without(ranks: Ranks, tmp_path: Path) -> None:
    for recorded, plain in zip(ranks(train, str(tmp_path), 2), ranks(train, None, 2), strict=True):
        assert all(map(torch.equal, recorded["weights"], plain["weights"]))


@pytest.mark.parametrize("name", ["by_lightning", "by_accelerate", "by_trainer"])
def test_frameworks_records_are_those_of_all_processes(name: str, launched: Any) -> None:
    folder, first, second = launched
    record = vlearn.TrainingRecord.open(folder / name)
    loss, count = averages(first[name], second[name])
    np.testing.assert_allclose(record.column("loss"), loss, rtol=1e-5)
    np.testing.assert_array_equal(record.column("count"), count)
    assert all(map(torch.equal, first[name]["weights"], second[name]["weights"]))
    assert first[name]["is_alone"] and "the record is that of the first process" in second[name]["refused"]
    if name != "by_trainer":
        assert np.isfinite(record.memory.column("leverage")[-1]).all()


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("recorded")
    return folder, *launch("recorded.py", folder)
