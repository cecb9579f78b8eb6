"""Layer rules: how the layers with a weight and a bias give the forms of `vlearn.capture.forms`.

A rule holds for one exact type: a subclass may compute something else, so it goes to the fallback
unless its own rule is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlearn.capture.forms import Form, Outer, Shift, Strips


class Rule(NamedTuple):
    """How one layer type applies its `weight` to rows of its input and adds its `bias`.

    Attributes:
        weight: (module, input, output gradient) -> form of the weight.
        rows: (module, output or its gradient) -> ``[N, G, T, O]``, a view where possible.
        from_rows: (module, rows ``[N, G, T, O]``, shape of the output) -> a tensor of that shape.
        linear: (module, input) -> output without the bias, linear in the input.
        accepts: input -> whether dimension 0 is the example axis.
    """

    weight: Callable[[Any, Tensor, Tensor], Form]
    rows: Callable[[Any, Tensor], Tensor]
    from_rows: Callable[[Any, Tensor, tuple[int, ...]], Tensor]
    linear: Callable[[Any, Tensor], Tensor]
    accepts: Callable[[Tensor], bool]

    def form(self, module: nn.Module, parameter: Tensor, x: Tensor, gradient: Tensor) -> Form:
        """Per-example gradient of the module's weight or bias from one use."""
        if parameter is module.bias:
            rows = self.rows(module, gradient)
            return Shift(rows if rows.shape[2] == 1 else rows.sum(2, keepdim=True), parameter.shape)
        return self.weight(module, x, gradient)


RULES: dict[type[nn.Module], Rule] = {}


def _linear_rows(module: nn.Linear, tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], 1, -1, tensor.shape[-1])


def _linear_weight(module: nn.Linear, x: Tensor, gradient: Tensor) -> Form:
    return Outer(_linear_rows(module, x), _linear_rows(module, gradient), module.weight.shape)


def _linear_from_rows(module: nn.Linear, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows.reshape(shape)


RULES[nn.Linear] = Rule(
    weight=_linear_weight,
    rows=_linear_rows,
    from_rows=_linear_from_rows,
    linear=lambda module, x: F.linear(x, module.weight),
    accepts=lambda x: x.dim() >= 2,
)


def _conv2d_rows(module: nn.Conv2d, y: Tensor) -> Tensor:
    return y.flatten(2).unflatten(1, (module.groups, -1)).mT


def _conv2d_weight(module: nn.Conv2d, x: Tensor, gradient: Tensor) -> Form:
    b = _conv2d_rows(module, gradient)
    # Last axis first, as F.pad wants it; also what padding="same" resolves to.
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    height, width = gradient.shape[2:]
    (kh, kw), (down, across), (down_gap, gap) = module.kernel_size, module.stride, module.dilation
    if kh * kw == 1 or height * width == 1:
        patches = F.unfold(x, module.kernel_size, module.dilation, 0, module.stride)  # [N, I·kh·kw, T]
        return Outer(patches.unflatten(1, (module.groups, -1)).mT, b, module.weight.shape)
    reach = across * (width - 1) + 1
    strips = torch.stack([x[..., c * gap : c * gap + reach : across] for c in range(kw)], 2)  # [N, I, kw, :, W]
    strips = strips.reshape(x.shape[0], module.groups, -1, x.shape[2], width)
    return Strips(strips, b, module.weight.shape, height, down, down_gap)


def _conv2d_from_rows(module: nn.Conv2d, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows.mT.reshape(shape)


RULES[nn.Conv2d] = Rule(
    weight=_conv2d_weight,
    rows=_conv2d_rows,
    from_rows=_conv2d_from_rows,
    linear=lambda module, x: module._conv_forward(x, module.weight, None),
    accepts=lambda x: x.dim() == 4,
)
