"""Convolutions, and how layers are put together: freezing, in-place writes, dropout, inputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.networks.case import CASES, EXAMPLES, Case, Model, case, head, image_model, labels, rows


def _convolution(name: str, channels: int = 2, size: tuple[int, int] = (7, 6), **arguments: Any) -> None:
    def build() -> Case:
        settings = {"in_channels": channels, "out_channels": 4, "kernel_size": 3, **arguments}
        return image_model(nn.Conv2d(**settings), channels=channels, size=size)

    build.__name__ = name
    case(build)


_convolution("convolution")
_convolution("convolution_without_bias", bias=False)
_convolution("convolution_with_stride", stride=2)
_convolution("convolution_with_uneven_stride", stride=(3, 2), kernel_size=(2, 3))
_convolution("convolution_with_dilation", dilation=2)
_convolution("convolution_with_uneven_dilation_stride_and_padding", dilation=(2, 1), stride=(1, 2), padding=(2, 1))
_convolution("convolution_1x1", kernel_size=1)
_convolution("convolution_1x1_with_stride_and_padding", kernel_size=1, stride=2, padding=1)
_convolution("convolution_3x1", kernel_size=(3, 1), padding=(1, 0))
_convolution("convolution_1x3", kernel_size=(1, 3), padding=(0, 2))
_convolution("convolution_whose_output_is_1x1", kernel_size=(7, 6))
_convolution("convolution_whose_output_is_1x1_by_stride", kernel_size=2, stride=9)
_convolution("convolution_of_one_channel", channels=1)
_convolution("grouped_convolution", channels=4, groups=2)
_convolution("grouped_convolution_1x1", channels=4, groups=2, kernel_size=1)
_convolution("grouped_convolution_whose_output_is_1x1", channels=4, groups=2, kernel_size=(7, 6))
_convolution("grouped_convolution_with_stride_and_dilation", channels=4, groups=2, stride=2, dilation=2, padding=2)
_convolution("depthwise_convolution", channels=4, groups=4)
_convolution("depthwise_convolution_with_multiplier", channels=2, groups=2)
_convolution("convolution_padded_same", padding="same")
_convolution("convolution_padded_same_with_even_kernel", padding="same", kernel_size=(2, 4))
_convolution("convolution_padded_same_with_dilation", padding="same", dilation=2, kernel_size=(2, 3))
_convolution("convolution_padded_valid", padding="valid")
_convolution("convolution_padded_by_zeros", padding=(2, 1))
_convolution("convolution_padded_by_reflection", padding=(2, 1), padding_mode="reflect")
_convolution("convolution_padded_by_replication", padding=(2, 1), padding_mode="replicate")
_convolution("convolution_padded_in_a_circle", padding=(2, 1), padding_mode="circular")
_convolution("convolution_padded_same_in_a_circle", padding="same", padding_mode="circular", kernel_size=(2, 3))


@case
def convolution_used_twice() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m.conv(torch.tanh(m.conv(x))))
        return m.out(h.flatten(1)) + m.conv(x[:, :, ::2, ::2]).mean((2, 3))[:, :1]

    parts = {"conv": nn.Conv2d(2, 2, 3, padding=1), "out": nn.Linear(2 * 25, 3)}
    return Case(Model(forward, **parts), rows(2, 5, 5), labels())


@case
def frames_folded_into_the_batch() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        n, t = x.shape[:2]
        return m.out(torch.tanh(m.conv(x.flatten(0, 1))).reshape(n, t, -1).mean(1))

    return Case(Model(forward, conv=nn.Conv2d(1, 2, 2), out=nn.Linear(8, 3)), rows(2, 1, 3, 3), labels())


@case
def frozen_first_layer() -> Case:
    built = CASES["mlp"]()
    built.model[0].requires_grad_(False)  # type: ignore
    return built


@case
def frozen_last_layer() -> Case:
    built = CASES["mlp"]()
    built.model[-1].requires_grad_(False)  # type: ignore
    return built


@case
def frozen_weight_with_free_bias() -> Case:
    built = image_model(nn.Conv2d(2, 3, 3))
    built.model[0][0].weight.requires_grad_(False)  # type: ignore
    built.model[2][1].weight.requires_grad_(False)  # type: ignore
    return built


@case
def layer_that_is_never_used() -> Case:
    built = CASES["mlp"]()
    built.model[1].spare = nn.Linear(2, 2)  # type: ignore
    return built


@case
def in_place_activations() -> Case:
    return Case(
        nn.Sequential(
            nn.Conv2d(2, 3, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(3, 3, 2),
            nn.GroupNorm(1, 3),
            nn.ReLU(inplace=True),
            head(48 // 4),
        ),
        rows(2, 5, 5),
        labels(),
    )


@case
def in_place_activation_of_a_view() -> Case:
    """A linear layer on sequences gives a view, whose node leaves the graph when it is written in place."""
    layers = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.ELU(inplace=True))
    return Case(
        Model(lambda m, x: m.out(m.layers(x).mean(1)), layers=layers, out=nn.Linear(4, 3)), rows(6, 5), labels()
    )


@case
def in_place_write_to_a_part_of_a_view() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        h[:, 0] = 0
        h[:, 1:3] *= 2.5
        return m.out(h.mean(1))

    return Case(Model(forward, fc=nn.Linear(5, 4), out=nn.Linear(4, 3)), rows(6, 5), labels())


@case
def in_place_sum_on_a_block_that_gives_a_view() -> Case:
    block = Model(lambda m, x: (m.gain * x).transpose(1, 2))
    block.gain = nn.Parameter(torch.randn(5))

    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.block(x)
        h += x.transpose(1, 2)
        return m.out(h.mean(2))

    return Case(Model(forward, block=block, out=nn.Linear(5, 3)), rows(6, 5), labels())


@case
def in_place_product_with_the_own_weight() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.fc(x)
        h *= F.linear(x, m.fc.weight)
        return m.out(torch.tanh(h))

    return Case(Model(forward, fc=nn.Linear(5, 4), out=nn.Linear(4, 3)), rows(5), labels())


@case
def logits_written_in_place() -> Case:
    model = Model(lambda m, x: m.fc(x).mul_(0.5), fc=nn.Linear(5, 3))
    return Case(model, rows(6, 5), torch.randn(EXAMPLES, 6, 3), F.mse_loss)


@case
def logits_of_masked_classes() -> Case:
    masked = torch.tensor([[False, False, True], [False, False, True], [True, False, False], [False, True, True]])
    model = Model(lambda m, x: m.net(x).masked_fill(m.masked[: len(x)], -torch.inf))
    model.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    model.register_buffer("masked", masked)
    return Case(model, rows(5), labels())


@case
def residual_connections() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.into(x)
        h = h + torch.tanh(m.first(h))
        update = m.second(h)
        update += h
        return m.out(update)

    parts = {name: nn.Linear(4, 4) for name in ("first", "second")}
    return Case(Model(forward, into=nn.Linear(5, 4), out=nn.Linear(4, 3), **parts), rows(5), labels())


@case
def dropout() -> Case:
    layers = nn.Sequential(
        nn.Dropout(0.3), nn.Linear(5, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 3), nn.Dropout(0.1)
    )
    return Case(layers, rows(5), labels())


@case
def dropout_beside_fallbacks() -> Case:
    layers = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.Dropout(0.5), nn.PReLU(), nn.Linear(16, 3))
    return Case(layers, rows(5), labels())


@case
def two_inputs() -> Case:
    model = Model(
        lambda m, x, z: m.out(torch.tanh(m.left(x) * m.right(z))), left=nn.Linear(5, 4), right=nn.Linear(2, 4)
    )
    model.out = nn.Linear(4, 3)
    return Case(model, (rows(5), rows(2)), labels())


@case
def keyword_inputs() -> Case:
    def forward(m: Any, *, tokens: Tensor, scale: Tensor) -> Tensor:
        return m.out(torch.tanh(m.embedding(tokens).mean(1) * scale + m.shift))

    model = Model(forward, embedding=nn.Embedding(7, 4), out=nn.Linear(4, 3))
    model.shift = nn.Parameter(torch.randn(4))
    return Case(model, {"tokens": torch.randint(7, (EXAMPLES, 5)), "scale": rows(1)}, labels())


@case
def layer_called_with_a_keyword() -> Case:
    return Case(
        Model(lambda m, x: m.out(torch.tanh(m.fc(input=x))), fc=nn.Linear(5, 4), out=nn.Linear(4, 3)), rows(5), labels()
    )


@case
def one_example() -> Case:
    built = image_model(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))
    return Case(built.model, built.x[:1], built.target[:1])
