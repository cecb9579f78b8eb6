"""Layers of many types, with a rule and without: norms, embeddings, attention, recurrence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.networks.case import EXAMPLES, Case, Model, case, head, image_model, labels, rows


class ScaledLinear(nn.Linear):
    """Another forward under the same parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * F.linear(x, self.weight.square(), self.bias)


@case
def subclass_of_linear_with_another_forward() -> Case:
    return Case(nn.Sequential(ScaledLinear(5, 4), nn.Tanh(), nn.Linear(4, 3)), rows(5), labels())


@case
def parameter_at_the_root() -> Case:
    model = Model(lambda m, x: m.out(torch.tanh(m.fc(x * m.gain))) + m.shift, fc=nn.Linear(5, 4), out=nn.Linear(4, 3))
    model.gain, model.shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(3))
    return Case(model, rows(5), labels())


@case
def parameter_of_no_dimension() -> Case:
    model = Model(lambda m, x: m.temperature * m.fc(x), fc=nn.Linear(5, 3))
    model.temperature = nn.Parameter(torch.tensor(1.7))
    return Case(model, rows(5), labels())


@case
def layer_norm() -> Case:
    return Case(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), rows(5), labels())


@case
def layer_norm_on_sequences() -> Case:
    return Case(nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Flatten(), nn.Linear(36, 3)), rows(6, 5), labels())


@case
def rms_norm_and_prelu() -> Case:
    return Case(nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6), nn.PReLU(6), nn.Linear(6, 3)), rows(5), labels())


@case
def group_norm() -> Case:
    return image_model(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4))


@case
def instance_norm() -> Case:
    return image_model(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True))


@case
def batch_norm_in_eval_mode() -> Case:
    norm = nn.BatchNorm2d(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)  # type: ignore
    norm.weight.data.normal_(), norm.bias.data.normal_()
    built = image_model(nn.Conv2d(2, 4, 3), norm.eval())
    return built


@case
def embedding() -> Case:
    return Case(
        nn.Sequential(nn.Embedding(7, 4, padding_idx=0), nn.Flatten(), nn.Linear(24, 3)),
        torch.tensor([[1, 1, 2, 0, 0, 1], [3, 2, 1, 6, 6, 6], [0, 0, 0, 0, 0, 0], [5, 4, 3, 2, 1, 0]]),
        labels(),
    )


@case
def convolution_in_one_dimension() -> Case:
    return Case(nn.Sequential(nn.Conv1d(2, 3, 3, stride=2), nn.Tanh(), head(9)), rows(2, 7), labels())


@case
def convolution_in_three_dimensions() -> Case:
    return Case(nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), head(16)), rows(1, 3, 3, 3), labels())


@case
def transposed_convolution() -> Case:
    return image_model(nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1), size=(3, 4))


@case
def bilinear_layer_of_two_inputs() -> Case:
    return Case(Model(lambda m, x, z: m.mix(x, z), mix=nn.Bilinear(4, 5, 3)), (rows(4), rows(5)), labels())


@case
def attention() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.into(x)
        return m.out((h + m.attention(h, h, h, need_weights=False)[0]).mean(1))

    parts = {
        "into": nn.Linear(5, 6),
        "attention": nn.MultiheadAttention(6, 2, batch_first=True),
        "out": nn.Linear(6, 3),
    }
    return Case(Model(forward, **parts), rows(7, 5), labels())


@case
def attention_with_its_weights_and_a_mask() -> Case:
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        h, weights = m.attention(x, x, x, key_padding_mask=mask)
        return m.out(h.mean(1)) + weights.square().sum((1, 2)).unsqueeze(1)

    mask = torch.zeros(EXAMPLES, 5, dtype=torch.bool)
    mask[1, 3:] = mask[3, 4:] = True
    parts = {"attention": nn.MultiheadAttention(6, 2, batch_first=True), "out": nn.Linear(6, 3)}
    return Case(Model(forward, **parts), (rows(5, 6), mask), labels())


@case
def transformer_layer() -> Case:
    layer = nn.TransformerEncoderLayer(6, 2, dim_feedforward=8, dropout=0.0, batch_first=True)
    return Case(nn.Sequential(nn.Linear(5, 6), layer, nn.Flatten(), nn.Linear(42, 3)), rows(7, 5), labels())


@case
def gated_recurrent_network() -> Case:
    return Case(
        Model(lambda m, x: m.out(m.gru(x)[0][:, -1]), gru=nn.GRU(2, 4, batch_first=True), out=nn.Linear(4, 3)),
        rows(5, 2),
        labels(),
    )


@case
def recurrent_network_with_as_many_layers_as_examples() -> Case:
    gru = nn.GRU(2, 3, num_layers=2, batch_first=True, bidirectional=True)  # final state [4, N, 3]
    return Case(Model(lambda m, x: m.out(m.gru(x)[0][:, -1]), gru=gru, out=nn.Linear(6, 3)), rows(5, 2), labels())


@case
def final_state_of_a_recurrent_network() -> Case:
    model = Model(lambda m, x: m.out(m.gru(x)[1].transpose(0, 1).flatten(1)), gru=nn.GRU(2, 3, batch_first=True))
    model.out = nn.Linear(3, 3)
    return Case(model, rows(5, 2), labels())


@case
def long_short_term_memory() -> Case:
    return Case(
        Model(lambda m, x: m.out(m.lstm(x)[0][:, -1]), lstm=nn.LSTM(2, 3, batch_first=True), out=nn.Linear(3, 3)),
        rows(5, 2),
        labels(),
    )


@case
def recurrent_cell() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = torch.zeros(x.shape[0], 4, dtype=x.dtype)
        for t in range(x.shape[1]):
            h = m.cell(x[:, t], h)
        return m.out(h)

    return Case(Model(forward, cell=nn.GRUCell(2, 4), out=nn.Linear(4, 3)), rows(5, 2), labels())
