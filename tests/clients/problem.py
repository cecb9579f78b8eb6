"""A classification that is learned in seconds, and an oracle for the training steps that a library makes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.oracles.per_example import flat, per_example

EXTRA = "the client tests need an extra: pip install -e '.[clients]'"

X = torch.randn(96, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, :3].argmax(1)  # which of the first three is the largest
SETTINGS = {"lr": 0.3, "ess": 96.0, "hess_init": 0.5}  # of IVON; the rate of the others is SLOWER
SLOWER = {"lr": 0.05, "ess": 96.0, "hess_init": 0.5}
LINES: dict[Any, dict[str, float]] = {  # those that need nothing of the pass, as their users write them
    vlearn.IVON: SETTINGS,
    vlearn.VAdamW: {"lr": 0.03, "num_data": 96},
    vlearn.EVON: {"lr": 10.0, "ess": 960.0, "num_data": 96},
}
every_line = pytest.mark.parametrize("kind", LINES, ids=lambda kind: kind.__name__)


class SeenWeights:
    """The weights that the last training forward pass of a model has seen, by name.

    Args:
        model: the model, of which every call is noted.
    """

    def __init__(self, model: nn.Module):
        self.by_name: dict[str, Tensor] = {}
        model.register_forward_hook(self._note)

    def _note(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training and torch.is_grad_enabled():
            self.by_name = {name: p.detach().clone() for name, p in model.named_parameters()}


def self_influence(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    variance: Mapping[str, Tensor],
    output: Callable[[nn.Module], Tensor],
    losses: Callable[[Tensor], Tensor],
) -> Tensor:
    """gᵀΣg ``[N]`` of each example's own loss, one backward pass each, in float64.

    Args:
        model: is copied.
        weights: at which the gradients are taken, by name.
        variance: the diagonal of Σ by name.
        output: what the copy gives, ``[N, ...]``.
        losses: of that, ``[N]``.
    """
    twin = copy.deepcopy(model).double()
    twin.load_state_dict(dict(weights), strict=False)
    diagonal = flat({name: variance[name].double() for name, p in twin.named_parameters() if p.requires_grad})
    return per_example(twin, output, losses).self_influence(torch.diag(diagonal))


def of_classification(
    model: nn.Module, weights: Mapping[str, Tensor], variance: Mapping[str, Tensor], x: Tensor, y: Tensor
) -> Tensor:
    """`self_influence` of softmax cross-entropies, of inputs ``[N, ...]`` and labels ``[N]``."""
    losses = lambda output: F.cross_entropy(output, y, reduction="none")  # noqa: E731
    return self_influence(model, weights, variance, lambda twin: twin(x.double()), losses)
