"""Layer rules: how a layer with parameters gives the forms of `vlearn.layers.gradient_forms`.

A rule holds for one exact type: a subclass may compute something else, so it goes to the fallback
unless its own rule is registered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from vlearn.layers.gradient_forms import Bias, Form


def features_last(module: Any, tensor: Tensor) -> Tensor:
    """``[N, ..., O]`` as rows ``[N, 1, T, O]``."""
    return tensor.reshape(tensor.shape[0], 1, math.prod(tensor.shape[1:-1]), tensor.shape[-1])


def from_features_last(module: Any, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo of `features_last`, for whatever the last axes are."""
    return rows.reshape(shape)


def channels_first(module: Any, tensor: Tensor) -> Tensor:
    """``[N, C, ...]`` as rows ``[N, G, T, C/G]``."""
    groups = getattr(module, "groups", 1)
    return tensor.reshape(tensor.shape[0], groups, tensor.shape[1] // groups, math.prod(tensor.shape[2:])).mT


def from_channels_first(module: Any, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo of `channels_first`."""
    return rows.mT.reshape(shape)


def bias_form(module: Any, x: Tensor, b: Tensor) -> Bias:
    """The form of a `bias` that is added at every position."""
    return Bias(b if b.shape[2] == 1 else b.sum(2, keepdim=True), module.bias.shape)


class Rule(NamedTuple):
    """How one layer type of a single input and a single output applies its parameters: the output is affine in each.

    Attributes:
        forms: by the parameter's name in the module, (module, input, b) -> form of its per-example gradient, where b
            is the gradient of the output as rows.
        rows: (module, output or its gradient) -> ``[N, G, T, O]``, a view where possible.
        from_rows: (module, rows ``[N, G, T, O]``, the output's shape) -> a tensor of that shape; the inverse of `rows`,
            with which it must be given unless that only reshapes.
        accepts: (module, input) -> whether the rule holds for this input, whose dimension 0 must be that of the
            examples; else the call goes through the fallback. By default an input needs two axes.
        linear: (module, input) -> output without what does not depend on the input, for layers that are linear in it.
        refuses: module -> why its examples have no gradients of their own, None where they have.
    """

    forms: Mapping[str, Callable[[Any, Tensor, Tensor], Form]]
    rows: Callable[[Any, Tensor], Tensor] = features_last
    from_rows: Callable[[Any, Tensor, tuple[int, ...]], Tensor] = from_features_last
    accepts: Callable[[Any, Tensor], bool] = lambda module, x: x.dim() >= 2
    linear: Callable[[Any, Tensor], Tensor] | None = None
    refuses: Callable[[Any], str | None] = lambda module: None

    def covers(self, module: nn.Module, parameter: Tensor) -> bool:
        """Whether the module has the parameter under exactly one of the names that the rule knows, and no other."""
        names = [name for name, p in module._parameters.items() if p is parameter]
        return len(names) == 1 and names[0] in self.forms

    def form(self, module: nn.Module, parameter: Tensor, x: Tensor, gradient: Tensor) -> Form:
        """Per-example gradient of one of the module's parameters from one use."""
        name = next(name for name, p in module._parameters.items() if p is parameter)
        return self.forms[name](module, x, self.rows(module, gradient))


RULES: dict[type[nn.Module], Rule] = {}
_by_name: dict[str, Rule] = {}  # of layers in packages that may not be installed


def register(layer: type[nn.Module] | str, rule: Rule | type[nn.Module]) -> None:
    """Give a layer type a rule of its own, so that its per-example gradients are as cheap as those of `nn.Linear`.

    Without one, the layer goes through the fallback: as exact, but slower. The rule holds for this very type, not for
    its subclasses, and takes the place of an earlier one.

    Args:
        layer: the type, or its full name, ``"package.module.Name"``, if its package may not be installed.
        rule: a `Rule`, or the type whose rule holds for this layer too.
    Raises:
        ValueError: if a type without a rule is given as the rule.

    A layer that scales its features, and a subclass that computes what its base does:

        >>> import torch
        >>> from torch import nn
        >>> from vlearn.capture import Rule, Elementwise, features_last, register
        >>> class Gain(nn.Module):
        ...     def __init__(self, features):
        ...         super().__init__()
        ...         self.gain = nn.Parameter(torch.ones(features))
        ...
        ...     def forward(self, x):
        ...         return self.gain * x.relu()
        >>> def gain(module, x, b):
        ...     return Elementwise(features_last(module, x.relu()), b, module.gain.shape)
        >>> register(Gain, Rule({"gain": gain}))
        >>> class OrthogonalLinear(nn.Linear):
        ...     def reset_parameters(self):
        ...         nn.init.orthogonal_(self.weight), nn.init.zeros_(self.bias)
        >>> register(OrthogonalLinear, nn.Linear)
    """
    if not isinstance(rule, Rule):
        known = rule_of(rule)
        if known is None:
            raise ValueError(f"rule={rule.__name__}, but that type has no rule: pass a vlearn.capture.Rule.")
        rule = known
    if isinstance(layer, str):
        _by_name[layer] = rule
    else:
        RULES[layer] = rule


def rule_of(layer: type[nn.Module]) -> Rule | None:
    """The rule of a layer type, None if it has none."""
    rule = RULES.get(layer)
    if rule is None and _by_name:
        rule = _by_name.get(f"{layer.__module__}.{layer.__qualname__}")
    return rule
