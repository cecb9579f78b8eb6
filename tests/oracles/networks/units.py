"""What the exact fallback takes as its unit, and what lies inside: states, parameters of containers, masks, tables."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles.networks.case import EXAMPLES, Case, Model, case, labels, rows

# -- recurrent layers, whose states have the examples along axis 1 ----------------------------------------------------


def _recurrent(layer: nn.RNNBase, positions: int = 5) -> Case:
    features = (2 if layer.bidirectional else 1) * (layer.proj_size or layer.hidden_size)

    def forward(m: Any, x: Tensor) -> Tensor:
        out = m.rnn(m.into(x) if layer.batch_first else m.into(x).transpose(0, 1))[0]
        return m.out(out[:, -1] if layer.batch_first else out[-1])

    return Case(
        Model(forward, into=nn.Linear(2, 3), rnn=layer, out=nn.Linear(features, 3)), rows(positions, 2), labels()
    )


@case
def recurrence_with_positions_first() -> Case:
    return _recurrent(nn.LSTM(3, 4))


@case
def recurrence_with_as_many_positions_as_examples_first() -> Case:
    return _recurrent(nn.GRU(3, 4), positions=EXAMPLES)


@case
def recurrence_in_two_directions_and_layers() -> Case:
    return _recurrent(nn.GRU(3, 2, num_layers=2, bidirectional=True))


@case
def recurrence_that_projects() -> Case:
    return _recurrent(nn.LSTM(3, 4, proj_size=2, batch_first=True))


@case
def recurrence_with_dropout_between_layers() -> Case:
    return _recurrent(nn.LSTM(3, 4, num_layers=2, dropout=0.4, batch_first=True))


@case
def recurrence_given_its_state() -> Case:
    model = Model(lambda m, x, state: m.out(m.rnn(x, state)[0][:, -1]), rnn=nn.RNN(2, 3, 2, batch_first=True))
    model.out = nn.Linear(3, 3)
    return Case(model, (rows(5, 2), torch.randn(2, EXAMPLES, 3)), labels())


@case
def recurrence_given_a_state_of_as_many_layers_as_examples() -> Case:
    model = Model(lambda m, x, state: m.out(m.rnn(x, state)[0][:, -1]), rnn=nn.GRU(2, 3, EXAMPLES, batch_first=True))
    model.out = nn.Linear(3, 3)
    return Case(model, (rows(5, 2), torch.randn(EXAMPLES, EXAMPLES, 3)), labels())


class Encoder(nn.Module):
    """A user's own module that returns a state beside its output."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))
        self.rnn = nn.GRU(2, 4, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, state = self.rnn(x)
        return self.gain * out, self.gain * state


@case
def state_that_a_block_returns() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        out, state = m.encoder(x)
        return m.out(out.mean(1) + state[0])

    return Case(Model(forward, encoder=Encoder(), out=nn.Linear(4, 3)), rows(5, 2), labels())


class Both(nn.Module):
    """Gives a hidden value, what it makes of it, and a total that is made of both."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.tanh(self.gain * x)
        out = self.shift * hidden.square() + x
        return hidden, out, hidden, hidden * out.exp(), hidden + out


@case
def outputs_of_which_some_are_made_of_others() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b, c, d, e = m.both(m.into(x))
        return m.out(a * b + c.square() + torch.sin(d) + e.cos())

    return Case(Model(forward, into=nn.Linear(5, 4), both=Both(), out=nn.Linear(4, 3)), rows(5), labels())


@case
def outputs_made_of_others_with_dropout() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        a, b, *_ = m.both(F.dropout(m.gain * m.into(x), 0.3, m.training))
        return m.out(a * b)

    block = Model(forward, into=nn.Linear(5, 4), both=Both(), out=nn.Linear(4, 4))
    block.gain = nn.Parameter(torch.randn(4))
    return Case(nn.Sequential(block, nn.Tanh(), nn.Linear(4, 3)), rows(5), labels())


# -- parameters of modules that are not called ------------------------------------------------------------------------


def _around(block: nn.Module) -> Case:
    return Case(nn.Sequential(nn.Linear(5, 4), nn.Tanh(), block, nn.Linear(4, 3)), rows(5), labels())


@case
def parameters_in_a_dict() -> Case:
    return _around(Model(lambda m, x: x @ m.own["a"] + m.own["b"], own=_parameters(a=(4, 4), b=(4,))))


@case
def parameters_in_lists_within_a_dict() -> Case:
    lists = nn.ModuleDict({"a": nn.ParameterList([torch.randn(4, 4)]), "b": nn.ParameterList([torch.randn(4)])})
    return _around(Model(lambda m, x: torch.tanh(x @ m.own["a"][0]) * m.own["b"][0], own=lists))


@case
def weight_of_a_child_that_is_not_called() -> Case:
    return _around(Model(lambda m, x: F.linear(x, m.fc.weight.square()), fc=nn.Linear(4, 4, bias=False)))


@case
def parameters_in_a_dict_beside_a_layer_that_is_called() -> Case:
    block = Model(lambda m, x: m.fc(x * m.own["a"]) + x @ m.own["b"], own=_parameters(a=(4,), b=(4, 4)))
    block.fc = nn.Linear(4, 4)
    return _around(block)


@case
def parameters_in_a_dict_of_a_block_that_is_called_twice() -> Case:
    block = Model(lambda m, x: x @ m.own["a"], own=_parameters(a=(4, 4)))
    return _around(Model(lambda m, x: torch.tanh(m.block(x)) + m.block(x * x), block=block))


@case
def parameters_in_a_dict_used_outside_their_block() -> Case:
    model = Model(lambda m, x: m.out(m.block(m.into(x)) * m.block.own["a"]), into=nn.Linear(5, 4), out=nn.Linear(4, 3))
    model.block = Model(lambda m, x: x.tanh(), own=_parameters(a=(4,)))
    return Case(model, rows(5), labels())


@case
def parameters_in_a_dict_where_rows_are_folded() -> Case:
    block = Model(lambda m, x: x @ m.own["a"], own=_parameters(a=(4, 4)))
    fold = Model(lambda m, x: m.block(x.reshape(-1, 4)).reshape(len(x), -1).tanh(), block=block)
    return Case(nn.Sequential(nn.Linear(5, 12), fold, nn.Linear(12, 3)), rows(5), labels())


def _parameters(**shapes: tuple[int, ...]) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()})


def _adapters(name: str, **settings: Any) -> Case:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    model = peft.inject_adapter_in_model(getattr(peft, name)(**settings), model)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p)
    return Case(model, torch.randint(7, (EXAMPLES, 3)), labels())


@case
def adapters_of_embeddings() -> Case:
    return _adapters("LoraConfig", r=2, target_modules=["0", "1"])


@case
def adapters_that_scale() -> Case:
    return _adapters("IA3Config", target_modules=["1"], feedforward_modules=[])


@case
def adapters_by_products_of_factors() -> Case:
    return _adapters("LoHaConfig", r=2, target_modules=["1"])


# -- random numbers inside --------------------------------------------------------------------------------------------


def _sequences(block: nn.Module, positions_first: bool = False, positions: int = 3) -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = m.into(x)
        h = m.block(h.transpose(0, 1)).transpose(0, 1) if positions_first else m.block(h)
        return m.out(h.flatten(1))

    parts = {"into": nn.Linear(3, 4), "block": block, "out": nn.Linear(4 * positions, 3)}
    return Case(Model(forward, **parts), rows(positions, 3), labels())


@case
def transformer_layer_with_dropout() -> Case:
    return _sequences(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3, batch_first=True))


@case
def transformer_layer_with_dropout_and_positions_first() -> Case:
    return _sequences(nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3), positions_first=True)


@case
def attention_with_dropout() -> Case:
    attention = nn.MultiheadAttention(4, 2, dropout=0.4)
    return _sequences(Model(lambda m, x: m.attention(x, x, x)[0], attention=attention), positions_first=True)


class Noisy(nn.Module):
    """A gain, dropout and noise in one module without a rule."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(features))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.gain * x
        return F.dropout(self.gain * x, 0.3) + self.gain * torch.randn_like(x) * torch.rand((), dtype=x.dtype)


@case
def noise_inside_a_block() -> Case:
    return _sequences(Noisy(4))


@case
def dropout_where_the_whole_model_is_the_unit() -> Case:
    model = Model(lambda m, t: m.out(m.dropout(m.words(t)).mean(1)) @ m.words.weight[:, :3].mean(0).diag())
    model.words, model.dropout, model.out = nn.Embedding(6, 4), nn.Dropout(0.4), nn.Linear(4, 3)
    return Case(model, torch.randint(6, (EXAMPLES, 5)), labels())


# -- tables as long as the batch, and square inputs -------------------------------------------------------------------


class Table(nn.Module):
    """Positions by a table that is handed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return x + (self.gain * x).tanh() * table


def _with_table(table: Tensor) -> Case:
    model = Model(lambda m, x: m.out(m.block(m.into(x), m.table).mean(1)), into=nn.Linear(3, 4), block=Table())
    model.table, model.out = table, nn.Linear(4, 3)
    return Case(model, rows(EXAMPLES, 3), labels())


@case
def table_as_long_as_the_batch() -> Case:
    return _with_table(nn.Buffer(torch.randn(EXAMPLES, 4)))


@case
def table_of_parameters_as_long_as_the_batch() -> Case:
    return _with_table(nn.Parameter(torch.randn(EXAMPLES, 4)))


@case
def square_mask_of_attention() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return m.attention(x, x, x, attn_mask=mask)[0]

    return _sequences(Model(forward, attention=nn.MultiheadAttention(4, 2, batch_first=True)), positions=EXAMPLES)


@case
def mask_of_the_model_as_long_as_the_batch() -> Case:
    def forward(m: Any, x: Tensor, mask: Tensor) -> Tensor:
        return m.out(m.block(m.into(x), src_mask=mask).mean(1))

    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(EXAMPLES)
    return Case(
        Model(forward, into=nn.Linear(3, 4), block=layer, out=nn.Linear(4, 3)), (rows(EXAMPLES, 3), mask), labels()
    )


@case
def layer_of_a_table_as_long_as_the_batch() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.out((m.into(x) @ m.fc(m.table).mT).tanh().mean(1))

    parts = {"into": nn.Linear(3, 4), "fc": nn.Linear(2, 4), "out": nn.Linear(EXAMPLES, 3)}
    return Case(Model(forward, table=nn.Buffer(torch.randn(EXAMPLES, 2)), **parts), rows(6, 3), labels())


@case
def layer_of_a_parameter_as_long_as_the_batch_inside_a_block() -> Case:
    block = Model(lambda m, x: (x @ m.fc(m.prompt).mT).softmax(-1), fc=nn.Linear(2, 4))
    block.prompt = nn.Parameter(torch.randn(EXAMPLES, 2))
    return _around(block)


@case
def offsets_of_as_many_positions_as_examples() -> Case:
    def forward(m: Any, x: Tensor) -> Tensor:
        place = torch.arange(x.shape[1])
        scores = m.into(x) @ x.mT + m.offsets(place.unsqueeze(1) - place + len(place)).squeeze(-1)
        return m.out((scores.softmax(-1) @ x).mean(1))

    parts = {"into": nn.Linear(3, 3), "offsets": nn.Embedding(2 * EXAMPLES, 1), "out": nn.Linear(3, 3)}
    return Case(Model(forward, **parts), rows(EXAMPLES, 3), labels())


@case
def layers_with_as_many_positions_as_examples_first() -> Case:
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.TransformerEncoderLayer(4, 2, 5, 0.0))
    return _sequences(block, positions_first=True, positions=EXAMPLES)


# -- memory formats, and weights without entries ----------------------------------------------------------------------


@case
def channels_last() -> Case:
    gain = Model(lambda m, x: m.gain * F.group_norm(x, 2, m.norm.weight), norm=nn.GroupNorm(2, 4, affine=True))
    gain.gain = nn.Parameter(torch.randn(4, 1, 1))
    layers = [nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), gain, nn.InstanceNorm2d(4, affine=True)]
    layers += [nn.ConvTranspose2d(4, 2, 2, stride=2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers)
    for p in model.parameters():
        if p.dim() == 4:
            p.data = p.data.to(memory_format=torch.channels_last)
    return Case(model, rows(2, 6, 5).to(memory_format=torch.channels_last), labels())


@case
def channels_last_in_three_dimensions() -> Case:
    layers = [nn.Conv3d(2, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 8, 3)]
    x = rows(2, 3, 3, 3).to(memory_format=torch.channels_last_3d)
    return Case(nn.Sequential(*layers), x, labels())


@case
def output_that_is_expanded() -> Case:
    gain = Model(lambda m, x: (m.gain * x.mean(1, keepdim=True)).expand_as(x))
    gain.gain = nn.Parameter(torch.randn(1))
    return _around(gain)


@case
def complex_values_inside() -> Case:
    model = Model(lambda m, x: m.out(torch.fft.irfft(m.filter(torch.fft.rfft(m.into(x))), n=6)), into=nn.Linear(5, 6))
    model.filter = Model(lambda m, x: x * torch.view_as_complex(m.pairs))
    model.filter.pairs, model.out = nn.Parameter(torch.randn(4, 2)), nn.Linear(6, 3)
    return Case(model, rows(5), labels())


@case
def weights_without_entries() -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it initialises nothing
        none, rest = nn.Linear(4, 0), nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3))
    model = Model(lambda m, x: torch.cat([m.fc(x), m.none(x)], 1) * m.scale + m.rest(x) + m.empty.sum(), none=none)
    model.fc, model.rest = nn.Linear(4, 3), rest
    model.scale, model.empty = nn.Parameter(torch.tensor(1.5)), nn.Parameter(torch.empty(0, 2))
    return Case(model, rows(4), labels())
