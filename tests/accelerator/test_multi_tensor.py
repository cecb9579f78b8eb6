"""Copies, casts, reads and master copies of many tensors at once are what they are one by one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.accelerator.pretend import counted
from vlearn.optim.kernels.multi_tensor import cast, copied, in_memory_order, read, reconcile, reconciled
from vlearn.optim.kernels.nonfinite import are_zero, first_nonfinite
from vlearn.optim.sampling.noise import normal
from vlearn.optim.updates.adam import _sums


def layouts(dtype: torch.dtype) -> list[Tensor]:
    """Tensors of several layouts: contiguous, channels last, transposed, with gaps, of no dimension, empty."""
    torch.manual_seed(0)
    made = [
        torch.randn(3, 4),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(4, 3).T,
        torch.randn(6, 4)[::2],
        torch.randn(()),
        torch.randn(0, 3),
    ]
    return [t.to(dtype) for t in made]


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chosen", [slice(3), slice(0, 3, 2), slice(None)], ids=["dense", "two", "with gaps"])
def test_masters_follow_the_entries_that_the_user_has_written_and_no_others(
    narrow: torch.dtype, chosen: slice, device: torch.device
) -> None:
    masters = layouts(torch.float32)[chosen]
    means = [m.to(narrow) for m in masters]
    means[0][0, 1] = 3.0
    means[-1].fill_(-math.inf)
    expected = [reconciled(m, mean) for m, mean in zip(masters, means, strict=True)]
    there = [m.to(device) for m in masters]
    if len(there) > 3:
        there[3] = torch.stack([there[3], there[3]], 1)[:, 0]  # gaps, which a copy to the device has lost
    reconcile(there, [mean.to(device) for mean in means])
    assert all(torch.equal(found.cpu(), truth) for found, truth in zip(there, expected, strict=True))
    assert float(expected[0][0, 1]) == 3.0 and torch.equal(expected[0][0, 2:], masters[0][0, 2:])


def test_casts_keep_layout_and_values(device: torch.device) -> None:
    tensors = [t.to(device) for t in layouts(torch.bfloat16)]
    assert cast(tensors, torch.bfloat16) is tensors
    for made in (cast(tensors, torch.float32), copied(tensors, torch.float32)):
        for found, before in zip(made, tensors, strict=True):
            assert torch.equal(found.cpu(), before.cpu().float()) and found.stride() == before.stride()
            assert found.data_ptr() != before.data_ptr() or not found.numel()


def test_numbers_of_several_devices_are_read_in_one_wait_for_each(device: torch.device) -> None:
    values = [torch.tensor(float(n), device=device if n % 3 else "cpu") for n in range(7)]
    with counted() as counts:
        found = read(values)
    assert found == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0] and counts.reads.total() == 1
    assert read([]) == [] and read([torch.arange(3)]) == [[0, 1, 2]]


def test_a_row_of_entries_copies_none_where_it_can(device: torch.device) -> None:
    for tensor in layouts(torch.float64)[:3]:
        there = tensor.to(device)
        row = in_memory_order(there)
        assert row.data_ptr() == there.data_ptr() and row.shape == (tensor.numel(),)
        assert torch.equal(row.cpu().sort().values, tensor.reshape(-1).sort().values)


def test_noise_has_the_layout_of_the_weights_and_is_standard_normal(device: torch.device) -> None:
    like = [torch.empty(40, 30, 5, 5).to(memory_format=torch.channels_last), torch.empty(300, 70).T, torch.empty(9)]
    torch.manual_seed(0)
    noise = normal([t.to(device) for t in like], None)
    assert all(n.stride() == t.stride() and n.shape == t.shape for n, t in zip(noise, like, strict=True))
    entries = torch.cat([n.cpu().reshape(-1) for n in noise])
    assert len(entries.unique()) > 0.99 * len(entries)  # no entry is another's
    assert abs(float(entries.mean())) < 5 / math.sqrt(len(entries)) and abs(float(entries.std()) - 1) < 0.02


@pytest.mark.parametrize("count", [1, 4])
def test_sums_of_lists_are_those_of_their_entries(count: int, device: torch.device) -> None:
    torch.manual_seed(0)
    signed = [t for t in layouts(torch.float64) if t.numel()][:count]
    positive = [[t.square() for t in signed], [t.abs() for t in signed]]
    found = _sums([t.to(device) for t in signed], *([t.to(device) for t in each] for each in positive))
    for value, tensors in zip(found.cpu(), (signed, *positive), strict=True):
        torch.testing.assert_close(value, sum(t.sum() for t in tensors))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_gradient_that_is_not_finite_is_found_among_all_dtypes(value: float, device: torch.device) -> None:
    gradients = [(torch.zeros(0), t.to(device)) for d in (torch.float64, torch.bfloat16) for t in layouts(d)]
    gradients += [(torch.zeros(0), torch.full((3,), 1e300, dtype=torch.float64, device=device))]  # which no float32 is
    assert first_nonfinite(gradients) is None and first_nonfinite([]) is None
    wrong = torch.zeros(1)
    gradients.insert(5, (wrong, torch.tensor([1.0, value]).to(device)))
    assert first_nonfinite(gradients) is wrong


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("value", [1e-7, -2.0, math.nan])
def test_gradients_are_zero_if_no_entry_is_anything_else(
    value: float, dtype: torch.dtype, device: torch.device
) -> None:
    for where in ("cpu", device):
        zeros = [torch.zeros_like(t, device=where) for d in (dtype, torch.float32) for t in layouts(d)]
        assert are_zero(zeros) and are_zero([])
        zeros[1][1, 2, 3, 4] = value
        assert not are_zero(zeros)
