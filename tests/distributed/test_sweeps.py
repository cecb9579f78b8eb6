"""Sweeps over several processes give the table of one process with all the data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset, TensorDataset

import vlearn
from tests.distributed.problems import refusal
from tests.distributed.ranks import Ranks
from tests.distributed.shares import CLASSES, LENGTH, Failing, dataset, loader_of, network, of_tokens, posterior_of
from vlearn.sensitivity import SensitivityTable
from vlearn.sensitivity.table import COLUMNS

pytestmark = pytest.mark.slow


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "refined": {"refined": True, "variance": True},
    "scalars": {"deviation": None, "leverage": None},
    "tokens": {"per": "token", "leverage": None},
}


def swept(model: nn.Module, data: TensorDataset, loader: Any, **options: Any) -> SensitivityTable:
    loss_fn = of_tokens if options.get("per") == "token" else F.cross_entropy
    options = {"leverage": "exact", "progress": False} | options
    return vlearn.sweep(model, posterior_of(model), loader, loss_fn, **options)


def alone(data: TensorDataset, **options: Any) -> SensitivityTable:
    return swept(network(), data, DataLoader(data, batch_size=3), **options).gather()


def assert_equal(one: SensitivityTable, other: SensitivityTable, exactly: bool = False) -> None:
    tolerance = {"rtol": 0.0, "atol": 0.0} if exactly else {"rtol": 1e-12, "atol": 1e-12}
    for name in COLUMNS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)


def sweep_on(rank: int, how: str, count: int, options: dict[str, Any], sync: bool) -> tuple[SensitivityTable, int]:
    data = dataset(count, tokens=options.get("per") == "token")
    table = swept(network(), data, loader_of(data, how), sync=sync, **options)
    own = len(table)
    return table if sync else table.gather(), own


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_two_processes_give_the_table_of_one(ranks: Ranks, options: str, sync: bool) -> None:
    (first, own), (second, _) = ranks(sweep_on, "sampler", 11, OPTIONS[options], sync)
    assert_equal(first, second, exactly=True)
    assert_equal(first, alone(dataset(11, options == "tokens"), **OPTIONS[options]))
    assert own == (len(first) if sync else 6 * (LENGTH if options == "tokens" else 1))


@pytest.mark.parametrize("how", ["batches", "indexed", "repeated"])
def test_every_loader_names_its_examples(ranks: Ranks, how: str) -> None:
    (first, own), (second, its) = ranks(sweep_on, how, 11, {}, False)
    assert_equal(first, second, exactly=True)
    assert_equal(first, alone(dataset()))
    assert own + its == (12 if how == "repeated" else 11), "DistributedSampler gives one example twice"


@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("count", [11, 3, 1])
def test_four_processes_may_have_unequal_shares_or_none(four_ranks: Ranks, count: int, sync: bool) -> None:
    tables = [table for table, _ in four_ranks(sweep_on, "sampler", count, {}, sync)]
    for table in tables:
        assert_equal(table, tables[0], exactly=True)
    assert_equal(tables[0], alone(dataset(count)))


def test_the_shares_of_all_processes_are_the_dataset_once() -> None:
    for count in (0, 1, 7, 8):
        shares = [list(vlearn.UnrepeatedDistributedSampler(range(count), 4, rank)) for rank in range(4)]
        assert sorted(sum(shares, [])) == list(range(count))
        lengths = [len(vlearn.UnrepeatedDistributedSampler(range(count), 4, rank)) for rank in range(4)]
        assert lengths == [len(share) for share in shares] and max(lengths) - min(lengths) <= 1
    assert list(vlearn.UnrepeatedDistributedSampler(range(3))) == [0, 1, 2], "one process has all"
    with pytest.raises(ValueError, match="rank=2 of num_replicas=2"):
        vlearn.UnrepeatedDistributedSampler(range(3), 2, 2)
    with pytest.raises(TypeError, match="has no length"):
        vlearn.UnrepeatedDistributedSampler(iter(range(3)))  # type: ignore[arg-type]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_sampler_numbers_the_examples_of_its_share(workers: int) -> None:
    data, whole = dataset(), alone(dataset())
    for rank in range(2):
        sampler = vlearn.UnrepeatedDistributedSampler(data, 2, rank)
        table = swept(network(), data, DataLoader(data, batch_size=3, sampler=sampler, num_workers=workers))
        assert table.index.tolist() == list(range(rank, 11, 2))
        torch.testing.assert_close(table.loo_loss, whole.loo_loss[rank::2], rtol=1e-12, atol=1e-12)


def with_batch_norm() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, CLASSES)).double()


def sweep_after_training(rank: int) -> Any:
    wrapper = DistributedDataParallel(with_batch_norm())
    data = dataset()
    x, y = data.tensors
    F.cross_entropy(wrapper(x[rank::2]), y[rank::2]).backward()  # each one's running statistics
    own = copy.deepcopy(wrapper.module.state_dict())
    loader = loader_of(data)
    apart = refusal(lambda: swept(wrapper, data, loader).gather())
    refused = refusal(lambda: swept(wrapper.module, data, loader, sync=True))
    return own, apart, refused, swept(wrapper, data, loader, sync=True)


def test_batch_norm_has_the_statistics_of_the_first_process(ranks: Ranks) -> None:
    (own, *messages, table), (_, *_, other) = ranks(sweep_after_training)
    assert "their weights or buffers differ" in messages[0] and "the buffer '1.running_mean' differs" in messages[1]
    assert_equal(table, other, exactly=True)
    model, data = with_batch_norm(), dataset()
    model.load_state_dict(own)
    assert_equal(table, swept(model, data, DataLoader(data, batch_size=3)))


def unlike(rank: int, how: str) -> tuple[str, str, bool]:
    """What processes that differ are told: by sync, by gather, and whether a sweep afterwards works."""
    model, data = network(), dataset()
    options: dict[str, Any] = {}
    loader: Any = loader_of(data)
    factor = 1.0
    if how == "weights" and rank:
        model.load_state_dict({name: p + 1e-9 for name, p in model.state_dict().items()})
    elif how == "posterior" and rank:
        factor = 1.1
    elif how == "options" and rank:
        options["leverage"] = None
    elif how == "own numbers":
        loader = [tuple(data[rank::2])]
    elif how == "subsets":
        loader = DataLoader(Subset(data, range(rank, 11, 2)), batch_size=3)
    elif how == "used up":
        loader = iter([]) if rank else loader
    elif how == "failing":
        loader = loader_of(Failing(*data.tensors))
    elif how == "empty":
        loader = []

    def sweep(sync: bool) -> SensitivityTable:
        return vlearn.sweep(
            model, posterior_of(model, factor), loader, F.cross_entropy, progress=False, sync=sync, **options
        )

    by_sync = refusal(lambda: sweep(True)) if how != "failing" else _os_error_or_refusal(lambda: sweep(True))
    by_gather = "" if how in ("failing", "used up") else refusal(lambda: sweep(False).gather())
    return by_sync, by_gather, len(swept(network(), data, loader_of(data), sync=True)) == 11


def _os_error_or_refusal(action: Any) -> str:
    try:
        return refusal(action)
    except OSError as error:
        return str(error)


@pytest.mark.parametrize(
    ("how", "by_sync", "by_gather"),
    [
        ("weights", "the parameter '0.weight' differs between the processes", "their weights or buffers differ"),
        ("posterior", "their posteriors' variances differ", "their posteriors' variances differ"),
        ("options", "leverage is 'probe', None in the processes: call sweep", "for the column 'leverage'"),
        ("own numbers", "example 0 has the loss", "and turn random augmentation off"),
        ("subsets", "example 0 has the loss", "in process 0 and"),
        ("used up", "the loader gave no batch", ""),
        ("failing", "no such file", ""),
        ("empty", "the loader gave no batch in any process", "the loader gave no batch in any process"),
    ],
)
def test_processes_that_differ_are_told_in_all_and_none_hangs(
    ranks: Ranks, how: str, by_sync: str, by_gather: str
) -> None:
    found = ranks(unlike, how)
    for message, other, works_afterwards in found:
        assert by_sync in message and by_gather in other and works_afterwards
    if how == "failing":
        assert "the sweep ends here because it failed in process 1, by OSError" in found[0][0]


def sweep_to(rank: int, path: str, how: str) -> Any:
    data = dataset()
    given = Failing(*data.tensors) if how == "failing" else data
    return refusal_or_table(lambda: swept(network(), data, loader_of(given), sync=True, out=path, deviation=True))


def refusal_or_table(action: Any) -> Any:
    try:
        return action()
    except (RuntimeError, ValueError, OSError) as error:
        return str(error)


def test_a_sweep_to_disk_goes_on_with_other_processes(ranks: Ranks, four_ranks: Ranks, tmp_path: Path) -> None:
    path = str(tmp_path / "table")
    first, second = ranks(sweep_to, path, "failing")
    assert "it failed in process 1" in first and second == "no such file"
    with pytest.raises(RuntimeError, match="9 rows so far"):  # 6 of the first, a batch of 3 of the second
        SensitivityTable.open(path)
    whole = alone(dataset(), deviation=True)
    for table in four_ranks(sweep_to, path, "whole"):
        assert_equal(table, whole)
    assert_equal(SensitivityTable.open(path), whole)
    assert sorted(file.name for file in Path(path).iterdir()) == ["rows.json", "rows.npy"]


def one_writes(rank: int, path: str) -> str:
    data = dataset()
    return refusal(lambda: swept(network(), data, DataLoader(data), out=path))


def test_a_sweep_to_disk_by_one_of_several_processes_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    for message in ranks(one_writes, str(tmp_path)):
        assert "call sweep with sync=True in all" in message


def probed(rank: int) -> SensitivityTable:
    """Both processes have the same examples under other numbers, and the same seed."""
    torch.manual_seed(5)
    x, y = dataset()[:4]
    return swept(network(), dataset(), [(x, y, range(4 * rank, 4 * rank + 4))], leverage="probe", sync=True)


def test_probes_differ_between_processes(ranks: Ranks) -> None:
    first, second = ranks(probed)
    assert_equal(first, second, exactly=True)
    assert first.leverage is not None and torch.equal(first.loss[:4], first.loss[4:])
    assert not torch.equal(first.leverage[:4], first.leverage[4:])
