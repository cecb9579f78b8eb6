"""Linear layers: shapes, sharing, tying, and weights that are used outside their own module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.networks.case import EXAMPLES, Case, Model, case, labels, rows


@case
def mlp() -> Case:
    return Case(
        nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), rows(5), labels()
    )


@case
def one_linear_layer() -> Case:
    return Case(nn.Linear(5, 3), rows(5), labels())


@case
def linear_without_bias() -> Case:
    return Case(nn.Sequential(nn.Linear(5, 4, bias=False), nn.Tanh(), nn.Linear(4, 3, bias=False)), rows(5), labels())


@case
def linear_on_sequences() -> Case:
    return Case(
        Model(lambda m, x: m.out(torch.tanh(m.into(x))).mean(1), into=nn.Linear(5, 4), out=nn.Linear(4, 3)),
        rows(6, 5),
        labels(),
    )


@case
def linear_on_images() -> Case:
    return Case(
        Model(lambda m, x: m.out(torch.tanh(m.into(x))).mean((1, 2)), into=nn.Linear(5, 4), out=nn.Linear(4, 3)),
        rows(2, 3, 5),
        labels(),
    )


@case
def sequence_of_length_one() -> Case:
    return Case(
        Model(lambda m, x: m.out(torch.tanh(m.into(x))).sum(1), into=nn.Linear(5, 4), out=nn.Linear(4, 3)),
        rows(1, 5),
        labels(),
    )


@case
def output_per_position() -> Case:
    return Case(
        Model(lambda m, x: m.out(torch.tanh(m.into(x))), into=nn.Linear(5, 4), out=nn.Linear(4, 2)),
        rows(3, 5),
        rows(3, 2),
        F.mse_loss,
    )


@case
def output_without_class_axis() -> Case:
    model = Model(lambda m, x: m.net(x).squeeze(-1), net=nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1)))
    return Case(model, rows(5), (rows() > 0).double(), F.binary_cross_entropy_with_logits)


@case
def linear_used_twice() -> Case:
    return Case(
        Model(lambda m, x: m.out(torch.tanh(m.fc(torch.tanh(m.fc(x))))), fc=nn.Linear(5, 5), out=nn.Linear(5, 3)),
        rows(5),
        labels(),
    )


@case
def linear_used_three_times_on_different_lengths() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        first = torch.tanh(m.fc(x))  # [N, T, D]
        second = torch.tanh(m.fc(first.mean(1)))  # [N, D]
        return m.out(second + m.fc(first[:, :2]).sum(1))

    return Case(Model(forward, fc=nn.Linear(5, 5), out=nn.Linear(5, 3)), rows(4 + 2, 5), labels())


@case
def linear_in_a_loop() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 5, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = torch.tanh(m.state(h) + m.into(x[:, t]))
        return m.out(h)

    parts = {"state": nn.Linear(5, 5), "into": nn.Linear(2, 5, bias=False), "out": nn.Linear(5, 3)}
    return Case(Model(forward, **parts), rows(6, 2), labels())


@case
def linear_whose_first_use_is_under_no_grad() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.tanh(m.fc(2 * x))
        return m.out(torch.tanh(m.fc(x)) * target)

    return Case(Model(forward, fc=nn.Linear(5, 5), out=nn.Linear(5, 3)), rows(5), labels())


@case
def stopped_gradient() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.fc(x))
        with torch.no_grad():
            scale = h.norm(dim=1, keepdim=True)
        return m.out(h / scale + m.fc(x).detach())

    return Case(Model(forward, fc=nn.Linear(5, 5), out=nn.Linear(5, 3)), rows(5), labels())


@case
def weight_shared_by_two_layers() -> Case:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.weight = first.weight
    return Case(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(5, 3)), rows(5), labels())


@case
def layer_registered_twice() -> Case:
    shared = nn.Linear(5, 5)
    return Case(nn.Sequential(shared, nn.Tanh(), shared, nn.LayerNorm(5), nn.Linear(5, 3)), rows(5), labels())


@case
def block_registered_twice() -> Case:
    block = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5), nn.Tanh())
    return Case(nn.Sequential(block, block, nn.Linear(5, 3)), rows(5), labels())


@case
def bias_shared_by_two_layers() -> Case:
    first, second = nn.Linear(5, 5), nn.Linear(5, 5)
    second.bias = first.bias
    return Case(nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(5, 3)), rows(5), labels())


@case
def bias_shared_by_linear_and_convolution() -> Case:
    conv, linear = nn.Conv2d(2, 3, 3), nn.Linear(3, 3)
    linear.bias = conv.bias
    return Case(
        Model(lambda m, x: m.fc(torch.tanh(m.conv(x)).mean((2, 3))), conv=conv, fc=linear), rows(2, 5, 5), labels()
    )


@case
def embedding_tied_with_the_output_layer() -> Case:
    embedding, out = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
    out.weight = embedding.weight
    model = Model(lambda m, x: m.out(torch.tanh(m.fc(m.embedding(x).mean(1)))), embedding=embedding, out=out)
    model.fc = nn.Linear(5, 5)
    return Case(model, torch.randint(7, (EXAMPLES, 6)), torch.tensor([0, 6, 3, 3]))


@case
def rows_flattened_around_a_linear_layer() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.into(x))
        h = torch.tanh(m.fc(h.reshape(-1, 4))).reshape(h.shape)
        return m.out(h.mean(1))

    return Case(Model(forward, into=nn.Linear(5, 4), fc=nn.Linear(4, 4), out=nn.Linear(4, 3)), rows(6, 5), labels())


@case
def rows_flattened_inside_a_block() -> Case:
    block = Model(lambda m, h: m.fc(h.reshape(-1, 4)).reshape(h.shape), fc=nn.Linear(4, 4))
    layers = (nn.Linear(5, 4), nn.Tanh(), block, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    return Case(nn.Sequential(*layers), rows(6, 5), labels())


@case
def one_layer_used_both_flattened_and_not() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.fc(x.reshape(-1, 5))).reshape(x.shape)
        return m.out(torch.tanh(m.fc(h)).mean(1))

    return Case(Model(forward, fc=nn.Linear(5, 5), out=nn.Linear(5, 3)), rows(6, 5), labels())


@case
def one_layer_used_flattened_inside_a_block_and_plainly_outside() -> Case:
    fc = nn.Linear(5, 5)
    block = Model(lambda m, h: torch.tanh(m.fc(h.reshape(-1, 5))).reshape(h.shape), fc=fc)
    return Case(
        Model(lambda m, x: m.out(torch.tanh(m.fc(m.block(x))).mean(1)), block=block, fc=fc, out=nn.Linear(5, 3)),
        rows(6, 5),
        labels(),
    )


@case
def sequence_first_inside() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.fc(x.transpose(0, 1)))  # [T, N, D]
        return m.out(h.mean(0))

    return Case(Model(forward, fc=nn.Linear(5, 4), out=nn.Linear(4, 3)), rows(6, 5), labels())


@case
def two_views_in_one_batch() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        left, right = torch.tanh(m.fc(torch.cat([x, 2 * x]))).chunk(2)
        return m.out(left * right)

    return Case(Model(forward, fc=nn.Linear(5, 4), out=nn.Linear(4, 3)), rows(5), labels())


@case
def weight_used_only_outside_its_module() -> Case:
    return Case(
        Model(
            lambda m, x: m.out(torch.tanh(F.linear(x, m.fc.weight, m.fc.bias))), fc=nn.Linear(5, 4), out=nn.Linear(4, 3)
        ),
        rows(5),
        labels(),
    )


@case
def forward_method_called_past_the_hooks() -> Case:
    return Case(
        Model(lambda m, x: m.out(torch.tanh(m.fc.forward(x))), fc=nn.Linear(5, 4), out=nn.Linear(4, 3)),
        rows(5),
        labels(),
    )


@case
def weight_used_by_its_module_and_outside_it() -> Case:
    return Case(
        Model(
            lambda m, x: m.out(F.linear(torch.tanh(m.fc(x)), m.fc.weight.t())), fc=nn.Linear(5, 4), out=nn.Linear(5, 3)
        ),
        rows(5),
        labels(),
    )


@case
def embedding_used_by_its_module_and_outside_it() -> Case:
    model = Model(lambda m, x: F.linear(torch.tanh(m.fc(m.embedding(x).mean(1))), m.embedding.weight))
    model.embedding, model.fc = nn.Embedding(7, 5), nn.Linear(5, 5)
    return Case(model, torch.randint(7, (EXAMPLES, 6)), torch.tensor([0, 6, 3, 3]))


@case
def bias_used_by_its_module_and_outside_it() -> Case:
    return Case(
        Model(lambda m, x: m.out(torch.tanh(m.fc(x)) * m.fc.bias), fc=nn.Linear(5, 4), out=nn.Linear(4, 3)),
        rows(5),
        labels(),
    )


@case
def weight_used_outside_its_module_inside_a_block() -> Case:
    fc = nn.Linear(5, 5)
    block = Model(lambda m, x: torch.tanh(F.linear(torch.tanh(m.fc(x)), m.fc.weight)), fc=fc)
    return Case(nn.Sequential(nn.Linear(5, 5), block, nn.Linear(5, 3)), rows(5), labels())


@case
def parameter_of_a_block_tied_to_a_layer_inside_it() -> Case:
    fc = nn.Linear(5, 5)
    block = Model(lambda m, x: F.linear(torch.tanh(m.fc(x)), m.weight), fc=fc)
    block.weight = fc.weight
    return Case(nn.Sequential(nn.Linear(5, 5), block, nn.Linear(5, 3)), rows(5), labels())


@case
def layer_that_is_not_called_tied_to_one_that_is() -> Case:
    called, silent = nn.Linear(5, 5), nn.Linear(5, 5)
    silent.weight = called.weight
    block = Model(
        lambda m, x: m.shift + F.linear(torch.tanh(m.called(x)), m.silent.weight), silent=silent, called=called
    )
    block.shift = nn.Parameter(torch.randn(5))
    return Case(nn.Sequential(nn.Linear(5, 5), block, nn.Linear(5, 3)), rows(5), labels())


@case
def penalty_in_the_model_output_only() -> Case:
    """The weight decays inside the model: its gradient has a part that no layer's rows explain."""
    model = Model(lambda m, x: m.out(torch.tanh(m.fc(x))) + m.fc.weight.square().mean(), fc=nn.Linear(5, 4))
    model.out = nn.Linear(4, 3)
    return Case(model, rows(5), rows(3), F.mse_loss)
