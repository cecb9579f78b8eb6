"""Rules of convolutions and transposed convolutions in one, two and three dimensions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlearn.layers.gradient_forms import Form, Outer
from vlearn.layers.patch_moments import Sizes, patch_moments
from vlearn.layers.registry import Rule, bias_form, channels_first, from_channels_first, register


@dataclass(frozen=True)
class ConvWeightGradient:
    """The weight of a convolution: G_n = Σ_t b_nt (patch at t)ᵀ without the patches.

    The input is unfolded along its last axis only; an offset r of the kernel in the axes before it meets there the
    places r·dilation + stride·(0 ... size-1). A fifth (for a 5x5 kernel) of the memory traffic of unfolded patches,
    which bounds small convolutions.
    """

    x: Tensor  # [N, G·I, padded sizes]
    b: Tensor  # [N, G, T, O], T = product of sizes
    shape: torch.Size  # [O, I, kernel sizes]
    groups: int
    sizes: Sizes  # of the output
    stride: Sizes
    dilation: Sizes

    kind = "matrix"

    @cached_property
    def strips(self) -> Tensor:
        """The unfolded input ``[N, G, I·kw, padded sizes of the other axes, W]``."""
        last = self.sizes[-1:], self.stride[-1:], self.dilation[-1:]
        shifted = torch.stack([self.x[(..., *_places((c,), *last))] for c in range(self.shape[-1])], 2)
        return shifted.reshape(len(self.x), self.groups, -1, *self.x.shape[2:-1], self.sizes[-1])

    def patch_moments(self) -> tuple[Tensor, Tensor]:
        """(Σ a aᵀ ``[I·k, I·k]``, Σ a ``[I·k]``) over the rows a of `as_outer`, of one group."""
        return patch_moments(self.x, tuple(self.shape[2:]), self.sizes, self.stride, self.dilation)

    @property
    def entries(self) -> int:
        """See `Form`."""
        return self.shape.numel() + self.strips[0].numel() + self.b[0].numel()

    def dense(self) -> Tensor:
        """See `Form`; G_n ``[N, O, I, *kernel]``."""
        return self._from_offsets(self._dense())

    def output_jvp(self, direction: Tensor) -> Tensor:
        """See `Form`; the convolution of the input with D_n."""
        return self._moved(self._by_offset(direction))

    def as_outer(self) -> Outer:
        """The same with the patches written out."""
        by_offset = torch.stack(list(self._inputs()), 3)  # [N, G, I·kw, offsets, T]
        n, g, columns, offsets, t = by_offset.shape
        split = by_offset.reshape(n, g, self.shape[1], -1, offsets, t)  # [N, G, I, kw, offsets, T]
        return Outer(split.transpose(3, 4).reshape(n, g, columns * offsets, t).mT, self.b, self.shape)

    def weighted_square(self, variance: Tensor) -> Tensor:
        """See `Form`."""
        return self._dense().square_().flatten(1) @ self._by_offset(variance).flatten()

    def weighted_output_jvp(self, variance: Tensor) -> Tensor:
        """See `Form`."""
        return self._moved(self._dense().mul_(self._by_offset(variance)))

    def sum_of_squares(self) -> Tensor:
        """See `Form`."""
        return self._from_offsets(self._dense().square_().sum(0, keepdim=True))[0]

    def _inputs(self) -> Iterator[Tensor]:
        """What each offset of the kernel meets: ``[N, G, I·kw, T]``."""
        for offset in product(*map(range, self.shape[2:-1])):
            places = _places(offset, self.sizes[:-1], self.stride[:-1], self.dilation[:-1])
            yield self.strips[(..., *places, slice(None))].flatten(3)

    def _dense(self) -> Tensor:
        """Gradients by offset, ``[N, G, offsets, O, I·kw]``."""
        return torch.stack([self.b.mT @ rows.mT for rows in self._inputs()], 2)

    def _moved(self, direction: Tensor) -> Tensor:
        inputs = self._inputs()
        moved = direction[:, :, 0] @ next(inputs)  # [N, G, O, T]
        for k, rows in enumerate(inputs, 1):
            moved += direction[:, :, k] @ rows
        return moved.mT

    def _from_offsets(self, tensor: Tensor) -> Tensor:
        """``[n, G, offsets, O/G, I·kw]`` -> ``[n, O, I, kernel]``."""
        n, g, offsets, o, _ = tensor.shape
        split = tensor.reshape(n, g, offsets, o, self.shape[1], -1)
        return split.permute(0, 1, 3, 4, 2, 5).reshape(n, *self.shape)

    def _by_offset(self, tensor: Tensor) -> Tensor:
        """``[..., O, I, kernel]`` -> ``[..., G, offsets, O/G, I·kw]``."""
        lead = tensor.shape[: tensor.dim() - len(self.shape)]
        split = tensor.reshape(*lead, self.strips.shape[1], -1, self.shape[1], self.shape[2:-1].numel(), self.shape[-1])
        return split.movedim(-2, len(lead) + 1).flatten(-2)


def _places(offset: Sizes, sizes: Sizes, stride: Sizes, dilation: Sizes) -> tuple[slice, ...]:
    """Where one offset of a kernel meets the padded input, for outputs of the given sizes."""
    starts = [r * gap for r, gap in zip(offset, dilation, strict=True)]
    return tuple(
        slice(start, start + step * (size - 1) + 1, step)
        for start, size, step in zip(starts, sizes, stride, strict=True)
    )


def _as_sizes(value: int | Sizes, dimensions: int) -> Sizes:
    """What a convolution takes as one number for all axes or as one for each."""
    return (value,) * dimensions if isinstance(value, int) else tuple(value) * (dimensions // len(value))


def _widths(module: Any, kernel: Sizes, dilation: Sizes) -> list[int]:
    """What a convolution pads with, last axis first and both sides of each, as F.pad wants it."""
    if module.padding_mode != "zeros":  # laid down when the module was made, unlike `padding`
        return list(module._reversed_padding_repeated_twice)
    if module.padding == "valid":
        return [0] * (2 * len(kernel))
    if module.padding == "same":
        totals = [gap * (k - 1) for k, gap in zip(kernel, dilation, strict=True)]
        return [side for total in reversed(totals) for side in (total // 2, total - total // 2)]
    return [side for side in reversed(_as_sizes(module.padding, len(kernel))) for _ in range(2)]


def _convolution_weight(module: Any, x: Tensor, b: Tensor) -> Form:
    # As torch's forward reads them: from the weight, and from what the module has now.
    kernel = tuple(module.weight.shape[2:])
    stride, dilation = (_as_sizes(value, len(kernel)) for value in (module.stride, module.dilation))
    widths = _widths(module, kernel, dilation)
    if any(widths):
        x = F.pad(x, widths, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
    sizes = tuple(
        (length - gap * (k - 1) - 1) // step + 1
        for length, k, step, gap in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    )
    if b.shape[2] == 1:  # one patch
        patch = x[(..., *_places((0,) * len(kernel), kernel, dilation, dilation))]
        return Outer(patch.reshape(len(x), module.groups, 1, -1), b, module.weight.shape)
    if max(kernel) == 1:
        rows = x[(..., *_places((0,) * len(kernel), sizes, stride, dilation))]
        return Outer(channels_first(module, rows), b, module.weight.shape)
    return ConvWeightGradient(x, b, module.weight.shape, module.groups, sizes, stride, dilation)


for _dimensions, _type in enumerate((nn.Conv1d, nn.Conv2d, nn.Conv3d), 1):
    register(
        _type,
        Rule(
            forms={"weight": _convolution_weight, "bias": bias_form},
            rows=channels_first,
            from_rows=from_channels_first,
            accepts=lambda module, x, d=_dimensions: x.dim() == d + 2,
            linear=lambda module, x: module._conv_forward(x, module.weight, None),
        ),
    )


@dataclass(frozen=True)
class ConvTransposeWeightGradient:
    """The weight of a transposed convolution: rows of the input times the weight, added up where they overlap.

    G_n = Σ_t a_nt (patch of b at t)ᵀ with t a position of the input: an `Outer` whose output rows are patches.
    """

    patches: Outer  # b [N, G, T, O·kernel]
    b: Tensor  # [N, G, T', O]
    kernel: Sizes
    stride: Sizes
    dilation: Sizes
    padding: Sizes
    inputs: Sizes  # spatial sizes of the input
    outputs: Sizes  # of the output

    kind = "overlapping"

    @property
    def shape(self) -> torch.Size:
        """See `Form`."""
        return self.patches.shape

    @property
    def entries(self) -> int:
        """See `Form`."""
        return self.shape.numel() + self.patches.a[0].numel() + self.patches.b[0].numel() + self.b[0].numel()

    def dense(self) -> Tensor:
        """See `Form`; G_n ``[N, I, O, *kernel]``."""
        return self.patches.dense()

    def output_jvp(self, direction: Tensor) -> Tensor:
        """See `Form`; the patches that D_n makes, added up where they overlap."""
        return self._folded(self.patches.output_jvp(direction))

    def weighted_square(self, variance: Tensor) -> Tensor:
        """See `Form`."""
        return self.patches.weighted_square(variance)

    def weighted_output_jvp(self, variance: Tensor) -> Tensor:
        """See `Form`."""
        return self._folded(self.patches.weighted_output_jvp(variance))

    def sum_of_squares(self) -> Tensor:
        """See `Form`."""
        return self.patches.sum_of_squares()

    def as_outer(self) -> None:  # its output rows overlap, so they are not those of a matrix product
        """None."""
        return None

    def _folded(self, patches: Tensor) -> Tensor:
        """``[N, G, T, O·kernel]`` added up to output rows ``[N, G, T', O]``."""
        n, groups, _, features = self.b.shape
        split = patches.mT.reshape(n, groups, features, -1, *self.inputs)
        whole = patches.new_zeros(n, groups, features, *_padded(self.outputs, self))
        for k, offset in enumerate(product(*map(range, self.kernel))):
            whole[(..., *_places(offset, self.inputs, self.stride, self.dilation))] += split[:, :, :, k]
        inner = tuple(slice(p, p + size) for p, size in zip(self.padding, self.outputs, strict=True))
        return whole[(..., *inner)].flatten(3).mT


def _padded(outputs: Sizes, geometry: Any) -> Sizes:
    """Sizes of a transposed convolution's output before its padding is cut off; more if its output_padding is."""
    return tuple(size + 2 * p for size, p in zip(outputs, geometry.padding, strict=True))


def _transposed_weight(module: Any, x: Tensor, b: Tensor) -> Form:
    kernel, inputs = tuple(module.weight.shape[2:]), tuple(x.shape[2:])
    stride, dilation, padding, extra_sizes = (
        _as_sizes(value, len(kernel))
        for value in (module.stride, module.dilation, module.padding, module.output_padding)
    )
    outputs = tuple(
        (size - 1) * step - 2 * p + gap * (k - 1) + extra + 1
        for size, step, p, gap, k, extra in zip(inputs, stride, padding, dilation, kernel, extra_sizes, strict=True)
    )
    image = b.mT.unflatten(3, outputs)  # [N, G, O, ...]
    padded = F.pad(image, [p for size in reversed(padding) for p in (size, size)])
    patches = [padded[(..., *_places(offset, inputs, stride, dilation))] for offset in product(*map(range, kernel))]
    columns = torch.stack(patches, 3)  # [N, G, O, kernel, ...]
    outer = Outer(
        channels_first(module, x),
        columns.reshape(*columns.shape[:2], columns.shape[2] * columns.shape[3], -1).mT,
        module.weight.shape,
        transposed=True,
    )
    return ConvTransposeWeightGradient(outer, b, kernel, stride, dilation, padding, inputs, outputs)


for _dimensions, _type in enumerate((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), 1):
    register(
        _type,
        Rule(
            forms={"weight": _transposed_weight, "bias": bias_form},
            rows=channels_first,
            from_rows=from_channels_first,
            accepts=lambda module, x, d=_dimensions: x.dim() == d + 2,
            linear=lambda module, x: _without_bias(module, x),
        ),
    )


def _without_bias(module: Any, x: Tensor) -> Tensor:
    transpose = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[x.dim() - 2]
    return transpose(
        x, module.weight, None, module.stride, module.padding, module.output_padding, module.groups, module.dilation
    )
