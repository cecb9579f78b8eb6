"""Layer rules: how a layer's input and output become the rows of `vlearn.capture.forms`, and back.

A rule holds for one exact type: a subclass may compute something else, so it goes to the fallback
unless its own rule is registered.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn


class Rule(NamedTuple):
    """How one layer type applies its `weight` (and adds its `bias`) to rows.

    Attributes:
        input_rows: (module, input) -> ``[N, G, T, I]``.
        output_rows: (module, output or its gradient) -> ``[N, G, T, O]``, a view where possible.
        from_rows: (module, rows ``[N, G, T, O]``, shape of the output) -> a tensor of that shape.
        accepts: input -> whether dimension 0 is the example axis.
    """

    input_rows: Callable[[nn.Module, Tensor], Tensor]
    output_rows: Callable[[nn.Module, Tensor], Tensor]
    from_rows: Callable[[nn.Module, Tensor, tuple[int, ...]], Tensor]
    accepts: Callable[[Tensor], bool]


RULES: dict[type[nn.Module], Rule] = {}


def _linear_rows(module: nn.Module, tensor: Tensor) -> Tensor:
    return tensor.reshape(tensor.shape[0], 1, -1, tensor.shape[-1])


def _linear_from_rows(module: nn.Module, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows.reshape(shape)


RULES[nn.Linear] = Rule(_linear_rows, _linear_rows, _linear_from_rows, lambda x: x.dim() >= 2)


def _conv2d_input_rows(module: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    padding: tuple[int, ...] | int
    if module.padding_mode == "zeros" and not isinstance(module.padding, str):
        padding = module.padding
    else:
        # The layer's own padding, last axis first, as F.pad wants it; also what "same" resolves to.
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, module._reversed_padding_repeated_twice, mode=mode), 0
    patches = F.unfold(x, module.kernel_size, module.dilation, padding, module.stride)  # [N, C·k·k, T]
    return patches.unflatten(1, (module.groups, -1)).transpose(2, 3)


def _conv2d_output_rows(module: nn.Module, y: Tensor) -> Tensor:
    assert isinstance(module, nn.Conv2d)
    return y.flatten(2).unflatten(1, (module.groups, -1)).transpose(2, 3)


def _conv2d_from_rows(module: nn.Module, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    return rows.transpose(2, 3).reshape(shape)


RULES[nn.Conv2d] = Rule(_conv2d_input_rows, _conv2d_output_rows, _conv2d_from_rows, lambda x: x.dim() == 4)
