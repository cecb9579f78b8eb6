"""Activation checkpointing: the recomputation inside the backward pass is at the weights of the forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import vlearn
from tests.optim.table import LOOPS, data, equal, network, weights

X, Y = data()


class Blocks(nn.Module):
    """A watched model that checkpoints its last layer itself, or not."""

    def __init__(self, **kind: bool):
        super().__init__()
        self.net = network()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.net[1](self.net[0](x))
        return checkpoint(self.net[2], hidden, **self.kind) if self.kind else self.net[2](hidden)


class Root(nn.Module):
    """Checkpoints the whole network, which alone is watched."""

    def __init__(self, **kind: bool):
        super().__init__()
        self.net = network()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        # A reentrant checkpoint passes gradients on only where its input wants them.
        return checkpoint(self.net, x.clone().requires_grad_(), **self.kind) if self.kind else self.net(x)


def trained(model: Any, loop: str) -> list[Tensor]:
    watched = model if isinstance(model, Blocks) else model.net
    optimizer = vlearn.IVON(watched, lr=0.1, ess=12, generator=torch.Generator().manual_seed(7))
    for _ in range(3):
        LOOPS[loop](optimizer, model, X, Y)
    return weights(model)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("make", "reentrant"), [(Blocks, False), (Blocks, True), (Root, False)], ids=["blocks", "reentrant blocks", "root"]
)
def test_checkpointed_training_is_the_same_bit_for_bit(make: Any, reentrant: bool, loop: str) -> None:
    assert equal(trained(make(use_reentrant=reentrant), loop), trained(make(), loop))


@pytest.mark.parametrize("loop", ["plain", "closure", "modes"])
def test_a_reentrant_checkpoint_around_a_watched_model_is_refused(loop: str) -> None:
    """Its forward pass has no graph, so it is at the mean; the gradient would be at the draw."""
    model = Root(use_reentrant=True)
    with pytest.raises(RuntimeError, match="Sequential is computed again inside the backward pass.*use_reentrant=Fal"):
        trained(model, loop)


def test_a_reentrant_checkpoint_inside_sampled_params_is_at_the_draw() -> None:
    assert equal(trained(Root(use_reentrant=True), "context"), trained(Root(), "context"))


def test_passes_without_a_graph_beside_a_checkpointed_one_are_no_reentrant_checkpoint() -> None:
    model, reference = Root(use_reentrant=False), Root()
    for each in (model, reference):
        optimizer = vlearn.IVON(each.net, lr=0.1, ess=12, generator=torch.Generator().manual_seed(7))
        for _ in range(2):
            with torch.no_grad():
                each.net(X)
            loss = F.cross_entropy(each(X), Y)
            with torch.no_grad():
                each.net(X)
            loss.backward()
            optimizer.step()
    assert equal(weights(model), weights(reference))
