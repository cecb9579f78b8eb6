"""Σ a aᵀ over the patches a that a convolution sees, without most of the products and without the patches.

With X the padded input, the entry for channels i, j and kernel offsets r, s is Σ_p X_i(p + r) X_j(p + s), p over the
positions of the output. Where both offsets are one row lower these are the same products, but for the first row, which
has gone, and the one below the last, which has come. So only the pairs with r in the kernel's first row are multiplied
out, k of k² for a kernel of k rows; the others follow by second moments of the rows at the edges.
"""

from __future__ import annotations

import torch
from torch import Tensor

Sizes = tuple[int, ...]


def patch_moments(x: Tensor, kernel: Sizes, sizes: Sizes, stride: Sizes, dilation: Sizes) -> tuple[Tensor, Tensor]:
    """(Σ a aᵀ ``[I·k, I·k]``, Σ a ``[I·k]``) over all examples and positions, a in the order of the weight's columns.

    Args:
        x: the padded input ``[N, I, ...]``.
        kernel: its sizes.
        sizes: of the output.
        stride, dilation: of each axis.
    """
    total = _windows(x.sum(0).unsqueeze(1), kernel, sizes, stride, dilation).sum(1)
    if not _shifts_pay(kernel, sizes, stride, dilation):
        patches = _windows(x.transpose(0, 1).contiguous(), kernel, sizes, stride, dilation)
        return patches @ patches.mT, total
    rows, gap, height = kernel[0], dilation[0], sizes[0]
    by_row = x.permute(1, 2, 0, 3).contiguous()  # [I, H, N, W]: the rows take the place of the examples
    strips = _windows(by_row, kernel[1:], sizes[1:], stride[1:], dilation[1:]).unflatten(1, (x.shape[2], -1))

    def moved(start: int, count: int) -> Tensor:
        return strips[:, start : start + count].flatten(1)  # [I·kw, count·N·W], a view

    def edge(start: int) -> Tensor:
        met = torch.stack([moved(start + r * gap, gap) for r in range(rows - 1)], 1).flatten(0, 1)
        return (met @ met.mT).view(len(strips), rows - 1, len(strips), rows - 1)

    moment = strips.new_empty(len(strips), rows, len(strips), rows)
    for s in range(rows):
        moment[:, 0, :, s] = moved(0, height) @ moved(s * gap, height).mT
    change = edge(height).sub_(edge(0))
    for r in range(1, rows):
        moment[:, r, :, 0] = moment[:, 0, :, r].mT
        moment[:, r, :, 1:] = moment[:, r - 1, :, :-1] + change[:, r - 1]
    split = moment.view(x.shape[1], kernel[1], rows, x.shape[1], kernel[1], rows)
    return split.permute(0, 2, 1, 3, 5, 4).reshape(len(total), -1), total


def _shifts_pay(kernel: Sizes, sizes: Sizes, stride: Sizes, dilation: Sizes) -> bool:
    """Whether rows move by one position from offset to offset, and the edges cost less than is saved."""
    if len(kernel) != 2 or stride[0] != 1:
        return False
    k, height = kernel[0], sizes[0]
    return k * height + 2 * dilation[0] * (k - 1) ** 2 < k**2 * height


def _windows(x: Tensor, kernel: Sizes, sizes: Sizes, stride: Sizes, dilation: Sizes) -> Tensor:
    """What each offset of a kernel over the last axes meets: ``[I, ..., axes]`` -> ``[I·kernel, ...·sizes]``."""
    axes = len(kernel)
    own, lead, steps = x.stride()[-axes:], x.shape[1:-axes], x.stride()[1:-axes]
    offsets = [step * gap for step, gap in zip(own, dilation, strict=True)]
    places = [step * each for step, each in zip(own, stride, strict=True)]
    windows = x.as_strided((len(x), *kernel, *lead, *sizes), (x.stride(0), *offsets, *steps, *places))
    return windows.reshape(len(x) * torch.Size(kernel).numel(), -1)
