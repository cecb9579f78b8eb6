"""The normal numbers of a compiled draw: published bits, the right distribution, all of it from the generator."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vlearn.optim.kernels.threefry import new_key, normals, threefry


def words(*values: int) -> Tensor:
    """Unsigned 32-bit numbers as int32."""
    return torch.tensor(values).to(torch.int32)


@pytest.mark.parametrize(
    ("counter", "key", "bits"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_bits_are_those_of_the_authors_known_answers(
    counter: tuple[int, int], key: tuple[int, int], bits: tuple[int, int]
) -> None:
    first, second = threefry(words(counter[0]), words(counter[1]), words(*key))
    assert torch.equal(torch.cat([first, second]), words(*bits))


def test_the_numbers_are_standard_normal_and_the_two_rows_independent() -> None:
    n = 2**20
    first, second = (row.double() for row in normals(new_key(torch.Generator().manual_seed(0), torch.device("cpu")), n))
    both = torch.cat([first, second])
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((both**power).mean()) - moment) < 5 * math.sqrt(variance / (2 * n))
    for a, b in ((first, second), (first[1:], first[:-1]), (first.square(), second.square())):
        assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / math.sqrt(n)
    # Kolmogorov's distance to the normal distribution function
    ranks = (torch.arange(2 * n, dtype=torch.float64) + 0.5) / (2 * n)
    assert float((torch.special.ndtr(both.sort().values) - ranks).abs().max()) < 2 / math.sqrt(2 * n)


def test_a_generator_decides_the_key_and_moves_on() -> None:
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    keys = [[new_key(generator, torch.device("cpu")) for _ in range(2)] for generator in generators]
    assert torch.equal(keys[0][0], keys[1][0]) and torch.equal(keys[0][1], keys[1][1])
    assert not torch.equal(keys[0][0], keys[0][1])
    assert not torch.equal(normals(keys[0][0], 100)[0], normals(keys[0][1], 100)[0])
