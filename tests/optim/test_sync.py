"""`sync=True`: two processes make the step that one makes with both draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.optim.table import FAMILY, Entry, data, loss_of, network, weights

STEPS = 3


def batch(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = data(count=12)
    return x.chunk(2)[rank], y.chunk(2)[rank]


def worker(rank: int, entry_number: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        model = network()
        optimizer = FAMILY[entry_number].make(
            model.parameters(), sync=True, generator=torch.Generator().manual_seed(rank)
        )
        for _ in range(STEPS):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model, *batch(rank)).backward()
            optimizer.step()
        torch.save(weights(model), f"{folder}/rank{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("entry", FAMILY, ids=str)
def test_two_processes_equal_one_with_both_draws(entry: Entry, tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, args=(FAMILY.index(entry), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]

    model = network()
    generators = [torch.Generator().manual_seed(rank) for rank in range(2)]
    optimizer = entry.make(model.parameters())
    for _ in range(STEPS):
        for rank in range(2):
            optimizer.generator = generators[rank]
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(model, *batch(rank)).backward()
        optimizer.step()
    for one, first, second in zip(weights(model), *ranks, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, one, rtol=1e-13, atol=1e-15)
