"""Second moments of patches against the patches written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vlearn.layers import channels_first
from vlearn.layers.convolution import ConvWeightGradient
from vlearn.layers.registry import rule_of


def form_of(module: Any, x: torch.Tensor) -> Any:
    rule = rule_of(type(module))
    assert rule is not None
    return rule.form(module, module.weight, x, channels_first(module, module(x)).detach())


GEOMETRIES: list[tuple[Any, tuple[int, ...]]] = [
    (nn.Conv2d(3, 4, 3, padding=1), (3, 8, 8)),
    (nn.Conv2d(1, 4, 5, padding=2), (1, 12, 9)),
    (nn.Conv2d(2, 4, 5), (2, 14, 14)),
    (nn.Conv2d(2, 4, (3, 5), padding="same", dilation=(2, 1)), (2, 17, 9)),
    (nn.Conv2d(2, 4, (4, 1)), (2, 12, 5)),
    (nn.Conv2d(2, 4, (1, 4)), (2, 12, 5)),
    (nn.Conv2d(2, 4, 3, stride=(1, 2), padding=(0, 1)), (2, 13, 9)),
    (nn.Conv2d(2, 4, 3, stride=2, padding=1), (2, 9, 9)),
    (nn.Conv2d(2, 4, 3), (2, 4, 4)),
    (nn.Conv2d(2, 4, 3, dilation=4), (2, 11, 11)),
    (nn.Conv2d(2, 4, 3, padding=2, padding_mode="reflect"), (2, 8, 9)),
    (nn.Conv2d(2, 4, 3, padding=2, padding_mode="circular"), (2, 8, 9)),
    (nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate"), (2, 8, 9)),
    (nn.Conv1d(2, 4, 3, stride=2, dilation=2, padding=1), (2, 15)),
    (nn.Conv3d(2, 4, (2, 3, 2), stride=(1, 2, 1), padding=1), (2, 4, 5, 6)),
]


@pytest.mark.parametrize(("module", "size"), GEOMETRIES, ids=str)
def test_they_are_those_of_the_patches(module: Any, size: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, *size, dtype=torch.float64)
    form = form_of(module.double(), x)
    assert isinstance(form, ConvWeightGradient)
    rows = form.as_outer().a.flatten(0, 2)
    moment, total = form.patch_moments()
    expected = rows.mT @ rows
    assert float((moment - expected).abs().max() / expected.abs().max()) < 1e-14
    torch.testing.assert_close(total, rows.sum(0), rtol=1e-13, atol=1e-13)


def test_inputs_of_any_memory_format_are_read_right() -> None:
    torch.manual_seed(0)
    module, x = nn.Conv2d(3, 4, 3, padding=1).double(), torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = form_of(module, x).patch_moments()
    wide = torch.randn(3, 6, 8, 16, dtype=torch.float64)
    wide[:, ::2, :, ::2] = x
    for same in (x.to(memory_format=torch.channels_last), wide[:, ::2, :, ::2]):
        for found, right in zip(form_of(module, same).patch_moments(), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-13)
