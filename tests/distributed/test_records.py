"""Records written by several processes are those of one process with all the examples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F
from torch.utils.data import DataLoader

import vlearn
from tests.distributed.problems import refusal
from tests.distributed.ranks import Ranks
from tests.distributed.shares import dataset, loader_of, network, posterior_of
from vlearn.record.memory_map import COLUMNS

pytestmark = pytest.mark.slow


def live(numbers: Any, step: int) -> Any:
    rows = np.asarray(numbers, np.float32)
    return SimpleNamespace(self_influence=rows + step / 8, prediction_error=1 / (1 + rows), step=step)


def table_of(loader: Any, **options: Any) -> Any:
    model = network()
    return vlearn.sweep(model, posterior_of(model), loader, F.cross_entropy, "exact", progress=False, **options)


def write(path: str, ranks: list[int], loader: Any, **options: Any) -> vlearn.MemoryMap:
    """Two live snapshots and two sweeps; a process has the rows of its ranks."""
    sync = options.pop("sync", False)
    memory = vlearn.MemoryMap(num_data=11, path=path, sync=sync)
    for epoch in range(2):
        memory.new_snapshot(10 * epoch)
        for rank in ranks:
            numbers = list(range(rank, 11, 2))
            memory.record(numbers[:3], live(numbers[:3], 10 * epoch + 1))
            memory.record(numbers[3:], live(numbers[3:], 10 * epoch + 2))
        memory.record_sweep(10 * epoch + 5, table_of(loader, **options), test_loss=0.5)
    return memory


def write_on(rank: int, path: str, how: str, whole: bool) -> Any:
    memory = write(path, [rank], loader_of(dataset(), how), sync=True) if not whole else None
    if memory is None:
        memory = vlearn.MemoryMap(num_data=11, path=path, sync=True)
        memory.record_sweep(5, table_of(loader_of(dataset()), sync=True), test_loss=0.5)
    return memory.steps, memory.kinds, {name: np.array(memory.column(name)) for name in COLUMNS}


@pytest.mark.parametrize("how", ["sampler", "repeated"])
def test_all_processes_write_the_record_of_one(ranks: Ranks, tmp_path: Path, how: str) -> None:
    alone = write(str(tmp_path / "alone"), [0, 1], DataLoader(dataset(), batch_size=3))
    for steps, kinds, columns in ranks(write_on, str(tmp_path / "all"), how, False):
        assert steps.tolist() == alone.steps.tolist() and kinds.tolist() == alone.kinds.tolist()
        for name, column in columns.items():
            np.testing.assert_allclose(column, alone.column(name), rtol=1e-6, err_msg=name)
    opened = vlearn.MemoryMap.open(tmp_path / "all")
    assert opened.test_loss[1] == 0.5 and len(opened) == 4
    assert not np.isnan(opened.column("loo_loss")[1]).any() and not np.isnan(opened.column("step")[2]).any()


def test_a_table_that_all_have_is_recorded_once(ranks: Ranks, tmp_path: Path) -> None:
    whole = table_of(DataLoader(dataset(), batch_size=3))
    for steps, _, columns in ranks(write_on, str(tmp_path / "all"), "sampler", True):
        assert steps.tolist() == [5]
        np.testing.assert_allclose(columns["loo_loss"][0], whole.loo_loss, rtol=1e-6)


def unlike(rank: int, path: str, how: str) -> tuple[str, int]:
    memory = vlearn.MemoryMap(num_data=11, path=path, sync=True)
    table = table_of(loader_of(dataset()))
    if how == "range" and rank:
        table.index[0] = 11
    elif how == "numbers" and rank:
        table.index.sub_(1)
    elif how == "columns" and rank:
        table = dataclasses.replace(table, leverage=None)
    message = refusal(lambda: memory.record_sweep(-1 if how == "step" and rank == 0 else 3, table))
    memory.record_sweep(7, table_of(loader_of(dataset())))
    return message, len(memory)


@pytest.mark.parametrize(
    ("how", "first", "second"),
    [
        ("range", "it failed in process 1, by ValueError: index 11 is out of range", "index 11 is out of range"),
        ("numbers", "example 0 has the loss", "in process 1"),
        ("columns", "the processes give the columns", "sweep with the same arguments in all"),
        ("step", "step=-1", "it failed in process 0, by ValueError: step=-1"),
    ],
)
def test_a_record_that_fails_in_one_process_fails_in_all(
    ranks: Ranks, tmp_path: Path, how: str, first: str, second: str
) -> None:
    (message, snapshots), (other, its) = ranks(unlike, str(tmp_path), how)
    assert first in message and second in other and snapshots == its == 1


def start_anew(rank: int, path: str) -> tuple[int, int]:
    write(path, [rank], loader_of(dataset()), sync=True).rewind(0)
    left = len(vlearn.MemoryMap(num_data=11, path=path, sync=True))
    return left, len(vlearn.MemoryMap(num_data=11, path=path, overwrite=True, sync=True))


def test_all_processes_rewind_and_overwrite(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(start_anew, str(tmp_path)) == [(1, 0), (1, 0)]
