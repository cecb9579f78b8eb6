"""`sweep(..., out=path)` writes the table that it would give, goes on after a kill, and mixes no two sweeps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import vlearn
from vlearn.posterior import Diagonal
from vlearn.record.row_record import RowRecord
from vlearn.sensitivity import SensitivityTable
from vlearn.sensitivity.table import COLUMNS

N, LENGTH, CLASSES = 10, 3, 4


def dataset(tokens: bool = False, seed: int = 2) -> TensorDataset:
    random = torch.Generator().manual_seed(seed)
    shape = (N, LENGTH) if tokens else (N,)
    x = torch.randn(*shape, 5, generator=random, dtype=torch.float64)
    return TensorDataset(x, torch.randint(CLASSES, shape, generator=random))


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()


def wide(p: Tensor) -> Tensor:
    return p.float() if p.dtype == torch.bfloat16 else p


def posterior_of(model: nn.Module, factor: float = 1.0) -> Diagonal:
    mean: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters()}
    return Diagonal.from_precision(mean, {n: factor * (N + wide(p).square()) for n, p in mean.items()}, num_data=N)


def swept(loader: Any = None, model: nn.Module | None = None, factor: float = 1.0, **options: Any) -> SensitivityTable:
    model = network() if model is None else model
    loader = DataLoader(dataset(), batch_size=4) if loader is None else loader
    options = {"leverage": "exact", "progress": False, "loss_fn": F.cross_entropy} | options
    return vlearn.sweep(model, posterior_of(model, factor), loader, **options)


def of_tokens(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output.mT, target, reduction="none")


def assert_equal(table: SensitivityTable, other: SensitivityTable) -> None:
    for name in COLUMNS:
        a, b = getattr(table, name), getattr(other, name)
        assert (a is None) == (b is None), name
        if a is not None:
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, equal_nan=True)


class Dying(TensorDataset):
    """Fails when an example is read, as a process that is killed then would end."""

    def __init__(self, data: TensorDataset, at: int):
        super().__init__(*data.tensors)
        self.at = at

    def __getitem__(self, index: int) -> Any:
        if index == self.at:
            raise KeyboardInterrupt
        return super().__getitem__(index)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"deviation": None, "leverage": None, "loo_loss": False},
        {"deviation": True, "refined": True, "variance": True},
        {"per": "token", "leverage": None, "loss_fn": of_tokens},
    ],
    ids=["plain", "scalars", "refined", "tokens"],
)
def test_the_table_on_disk_is_that_in_memory(tmp_path: Path, options: dict[str, Any]) -> None:
    data = dataset(tokens="per" in options)
    expected = swept(DataLoader(data, batch_size=4), **options).gather()
    assert_equal(swept(DataLoader(data, batch_size=4), out=tmp_path / "sweep", **options), expected)
    opened = SensitivityTable.open(tmp_path / "sweep")
    assert_equal(opened, expected)
    assert opened.summary() == pytest.approx(expected.summary())
    rows = np.load(tmp_path / "sweep" / "rows.npy", mmap_mode="r")
    np.testing.assert_array_equal(rows["loss"], opened.loss.numpy())
    kept = options.get("deviation", "small") is not None
    assert ("deviation" in rows.dtype.names) == kept and ("leverage" in rows.dtype.names) == (
        options.get("leverage", "exact") is not None
    )


@pytest.mark.parametrize("per", ["example", "token"])
@pytest.mark.parametrize("at", [2, 5, 9])
def test_a_sweep_goes_on_where_it_was_killed(tmp_path: Path, per: str, at: int) -> None:
    data = dataset(tokens=per == "token")
    options: dict[str, Any] = {"per": per, "leverage": None, "out": tmp_path}
    options |= {"loss_fn": of_tokens} if per == "token" else {}
    with pytest.raises(KeyboardInterrupt):
        swept(DataLoader(Dying(data, at), batch_size=4), **options)
    size = LENGTH if per == "token" else 1
    rows_before = len(RowRecord(tmp_path).rows())
    assert rows_before == at // 4 * 4 * size
    with pytest.raises(RuntimeError, match=f"has {rows_before} rows so far and has not come to its end"):
        SensitivityTable.open(tmp_path)
    expected = swept(DataLoader(data, batch_size=4), **{**options, "out": None}).gather()
    assert_equal(swept(DataLoader(data, batch_size=4), **options), expected)


def test_what_is_there_is_compared_and_not_swept_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    module = sys.modules["vlearn.sensitivity.sweep"]
    rows_of = module._rows_of  # pyright: ignore
    monkeypatch.setattr(
        module, "_rows_of", lambda lin, *rest: (batches.append(len(lin.batch.index)), rows_of(lin, *rest))[1]
    )
    with pytest.raises(KeyboardInterrupt):
        swept(DataLoader(Dying(dataset(), 9), batch_size=2), out=tmp_path)
    assert batches == [2] * 4
    batches.clear()
    shuffled = DataLoader(dataset(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(3))
    table = swept(shuffled, out=tmp_path)
    assert len(batches) <= 2, "two batches that have 8 or 9"
    assert_equal(table, swept(DataLoader(dataset(), batch_size=2)))
    batches.clear()
    assert_equal(swept(DataLoader(dataset(), batch_size=2), out=tmp_path), table)
    assert not batches, "all is there"


def corrected(data: TensorDataset) -> TensorDataset:
    x, y = (column.clone() for column in data.tensors)
    y[N - 1] = (y[N - 1] + 1) % CLASSES
    return TensorDataset(x, y)


@pytest.mark.parametrize("per", ["example", "token"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (corrected, "example 9 has the loss"),
        (lambda data: Subset(data, range(N - 3)), "the loader has not given 3 of its examples, as number 7"),
    ],
    ids=["a corrected label", "dropped examples"],
)
def test_rows_of_data_that_have_changed_since_are_refused(tmp_path: Path, per: str, change: Any, message: str) -> None:
    data = dataset(tokens=per == "token")
    options: dict[str, Any] = {"per": per, "leverage": None, "out": tmp_path}
    options |= {"loss_fn": of_tokens} if per == "token" else {}
    swept(DataLoader(data, batch_size=4), **options)
    with pytest.raises(ValueError, match=f"holds a sweep of other data, or with another loss_fn: .*{message}"):
        swept(DataLoader(change(data), batch_size=4), **options)


def test_tokens_that_come_to_be_ignored_are_refused(tmp_path: Path) -> None:
    x, y = dataset(tokens=True).tensors
    options: dict[str, Any] = {"per": "token", "leverage": None, "out": tmp_path, "loss_fn": of_tokens}
    swept(DataLoader(TensorDataset(x, y), batch_size=4), **options)
    ignored = torch.where(torch.arange(LENGTH) == 1, -100, y)
    with pytest.raises(ValueError, match="other tokens of a sequence count"):
        swept(DataLoader(TensorDataset(x, ignored), batch_size=4), **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"leverage": None}, "its options differ"),
        ({"deviation": None}, "its options differ"),
        ({"model": network(5)}, "their weights or buffers differ"),
        ({"factor": 1.01}, "their posteriors' variances differ"),
        ({"loader": DataLoader(dataset(seed=7), batch_size=4)}, "a sweep of other data, or with another loss_fn"),
        (
            {"loss_fn": lambda o, t: 2 * F.cross_entropy(o, t, reduction="none")},
            "of other data, or with another loss_fn",
        ),
    ],
)
def test_a_folder_holds_one_sweep(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    expected = swept(out=tmp_path)
    with pytest.raises(ValueError, match=message):
        swept(**change, out=tmp_path)
    assert_equal(swept(out=tmp_path), expected)


def test_the_first_batch_that_is_there_is_compared_wherever_it_comes(tmp_path: Path) -> None:
    x, y = dataset()[:]
    swept([(x[:4], y[:4], range(4))], out=tmp_path)
    later = [(x[4:8], y[4:8], range(4, 8)), (x[5:9] + 1, y[5:9], range(4))]
    with pytest.raises(ValueError, match="a sweep of other data"):
        swept(later, out=tmp_path)


def test_batches_of_other_outputs_are_told_what_to_leave_out(tmp_path: Path) -> None:
    data = dataset(tokens=True)
    x, y = data.tensors
    loader = [(x[:4], y[:4]), (x[4:, :2], y[4:, :2])]

    def mean_of_tokens(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output.mT, target, reduction="none").mean(1)

    options: dict[str, Any] = {"leverage": None, "loss_fn": mean_of_tokens}
    with pytest.raises(ValueError, match="deviation=None"):
        swept(loader, out=tmp_path / "kept", **options)
    expected = swept(loader, deviation=None, **options)
    assert_equal(swept(loader, out=tmp_path / "scalars", deviation=None, **options), expected)


def test_low_precision_is_written_as_float32(tmp_path: Path) -> None:
    model = network().bfloat16()
    data = TensorDataset(dataset().tensors[0].bfloat16(), dataset().tensors[1])
    options: dict[str, Any] = {"leverage": None, "model": model}
    table = swept(DataLoader(data, batch_size=4), out=tmp_path, **options)
    expected = swept(DataLoader(data, batch_size=4), **options)
    assert table.loss.dtype == torch.float32
    torch.testing.assert_close(table.loss, expected.loss.float(), rtol=0, atol=0)


def test_a_table_in_one_process_gathers_to_that_in_the_order_of_numbers() -> None:
    shuffled = DataLoader(dataset(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3))
    assert_equal(swept(shuffled).gather(), swept())
    twice = swept([(*dataset()[:6], range(6)), (*dataset()[3:], range(3, N))])
    assert len(twice) == N + 3
    assert_equal(twice.gather(), swept())
    x, y = dataset()[:]
    with pytest.raises(ValueError, match="example 0 has the loss .* in this table and .* in this table"):
        swept([(x[:5], y[:5], range(5)), (x[5:], y[5:], range(5))]).gather()


@pytest.mark.parametrize("lacks", ["rows.json", "version"])
def test_a_folder_without_a_sweep_is_not_opened(tmp_path: Path, lacks: str) -> None:
    if lacks == "rows.json":
        with pytest.raises(FileNotFoundError):
            SensitivityTable.open(tmp_path)
        return
    swept(out=tmp_path)
    content = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(content | {"version": 9}))
    with pytest.raises(ValueError, match="rows of version 9, but this vlearn reads version 1"):
        SensitivityTable.open(tmp_path)


@pytest.mark.parametrize("option", ["auto", 3])
def test_deviation_has_three_values(option: Any) -> None:
    with pytest.raises(ValueError, match="deviation=.*must be 'small', True or None"):
        swept(deviation=option)
