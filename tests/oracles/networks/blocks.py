"""Blocks that do something of their own with parameters and values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from tests.oracles.networks.case import EXAMPLES, Case, Model, case, labels, rows


@case
def reparametrised_weight() -> Case:
    return Case(
        nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)),
            nn.Tanh(),
            nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)),
        ),
        rows(5),
        labels(),
    )


class Swish(torch.autograd.Function):
    """As memory-saving activations are often written: nothing but a backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return gradient * (x.sigmoid() * (1 + x * (1 - x.sigmoid())))


@case
def activation_without_a_forward_derivative() -> Case:
    body = Model(lambda m, x: Swish.apply(m.fc(x)), fc=nn.Linear(5, 4))
    return Case(nn.Sequential(body, nn.LayerNorm(4), nn.Linear(4, 3)), rows(5), labels())


@case
def parameter_beside_an_activation_without_a_forward_derivative() -> Case:
    body = Model(lambda m, x: Swish.apply(m.fc(x) * m.gain) + m.shift, fc=nn.Linear(5, 4))
    body.gain, body.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    return Case(nn.Sequential(body, nn.Tanh(), nn.Linear(4, 3)), rows(5), labels())


class Once(Swish):
    """And with a backward that autograd cannot see into."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return Swish.backward(ctx, gradient)


@case
def activation_that_is_differentiated_once() -> Case:
    body = Model(lambda m, x: Once.apply(m.fc(x) * m.gain), fc=nn.Linear(5, 4))
    body.gain = nn.Parameter(torch.randn(4))
    return Case(nn.Sequential(body, nn.Linear(4, 3)), rows(5), labels())


@case
def bags_of_embeddings() -> Case:
    return Case(nn.Sequential(nn.EmbeddingBag(7, 4), nn.Linear(4, 3)), torch.randint(7, (EXAMPLES, 5)), labels())


@case
def stopped_gradient_beside_a_parameter() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x * m.gain)
        with torch.no_grad():
            scale = (h * m.gain[:4]).norm(dim=1, keepdim=True)
            h.mul_(2)
        return m.out(h / scale + (m.gain[1:] * h).detach())

    model = Model(forward, fc=nn.Linear(5, 4), out=nn.Linear(4, 3))
    model.gain = nn.Parameter(torch.randn(5))
    return Case(model, rows(5), labels())


@case
def intermediate_value_left_in_an_attribute() -> Case:
    def inner(m: Any, x: Tensor) -> Tensor:
        m.left = torch.tanh(x * m.gain)
        return m.left.square()

    block = Model(inner)
    block.gain = nn.Parameter(torch.randn(4))
    model = Model(
        lambda m, x: m.out(m.block(m.fc(x)) + m.block.left), block=block, fc=nn.Linear(5, 4), out=nn.Linear(4, 3)
    )
    return Case(model, rows(5), labels())


@case
def layer_handed_to_a_block() -> Case:
    block = Model(lambda m, x, layer: torch.tanh(layer(x.flatten(0, 1)).reshape(x.shape)) * m.gain)
    block.gain = nn.Parameter(torch.randn(5))
    model = Model(lambda m, x: m.out(m.block(x, m.fc).mean(1)), block=block, fc=nn.Linear(5, 5), out=nn.Linear(5, 3))
    return Case(model, rows(6, 5), labels())


@case
def weight_handed_to_a_block() -> Case:
    block = Model(lambda m, x, weight: F.linear(torch.tanh(m.fc(x)), weight) * m.gain, fc=nn.Linear(5, 5))
    block.gain = nn.Parameter(torch.randn(5))
    model = Model(lambda m, x: m.out(m.block(x, m.block.fc.weight.t())), block=block, out=nn.Linear(5, 3))
    return Case(model, rows(5), labels())


@case
def control_flow_that_depends_on_the_data() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return torch.stack([m.low * row if float(row.detach().sum()) < 0 else m.high * row.square() for row in x])

    block = Model(forward)
    block.low, block.high = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
    return Case(nn.Sequential(nn.Linear(5, 4), block, nn.Linear(4, 3)), rows(5), labels())


@case
def blocks_that_give_several_outputs() -> Case:
    block = Model(lambda m, x, *, scale: {"left": (m.gain * x).tanh(), "right": [scale * x, m.gain.sum() * x]})
    block.gain = nn.Parameter(torch.randn(4))

    def forward(m: Any, x: Tensor) -> Tensor:
        found = m.block(m.fc(x), scale=2.0)
        return m.out(found["left"] * found["right"][1] + found["right"][0])

    return Case(Model(forward, block=block, fc=nn.Linear(5, 4), out=nn.Linear(4, 3)), rows(5), labels())


@case
def block_given_a_table_for_all_examples() -> Case:
    block = Model(lambda m, x, table: torch.tanh(m.gain * x) @ table)
    block.gain = nn.Parameter(torch.randn(5))
    model = Model(lambda m, x: m.out(m.block(x, m.table)), block=block, out=nn.Linear(6, 3))
    model.register_buffer("table", torch.randn(5, 6))
    return Case(model, rows(5), labels())


@case
def pruned_weight() -> Case:
    layer = prune.random_unstructured(nn.Linear(5, 4), "weight", amount=0.4)  # type: ignore
    return Case(nn.Sequential(layer, nn.Tanh(), nn.Linear(4, 3)), rows(5), labels())
