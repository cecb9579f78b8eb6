"""Small networks in float64, each with a batch: every way in which a layer can be used."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

CLASSES = 3
EXAMPLES = 4


@dataclass
class Case:
    """A model and one batch; `x` is a tensor, a tuple of positional or a dict of keyword arguments."""

    model: nn.Module
    x: Any
    target: Tensor
    loss: Callable[..., Tensor] = F.cross_entropy  # torch-style
    random: bool = field(default=False)  # draws numbers in train mode

    def call(self, model: nn.Module) -> Any:
        if isinstance(self.x, dict):
            return model(**self.x)
        return model(*self.x) if isinstance(self.x, tuple) else model(self.x)


CASES: dict[str, Callable[[], Case]] = {}


def case(build: Callable[[], Case]) -> Callable[[], Case]:
    def seeded() -> Case:
        with torch.random.fork_rng():
            torch.manual_seed(len(build.__name__))
            default, _ = torch.get_default_dtype(), torch.set_default_dtype(torch.float64)
            try:
                return build()
            finally:
                torch.set_default_dtype(default)

    CASES[build.__name__] = seeded
    return seeded


def labels() -> Tensor:
    return torch.arange(EXAMPLES) % CLASSES


def rows(*shape: int) -> Tensor:
    return torch.randn(EXAMPLES, *shape)


class Model(nn.Module):
    """A model whose forward is a function of itself and its inputs, with named parts."""

    def __init__(self, forward: Callable[..., Any], **parts: Any):
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def head(features: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(features, CLASSES))


def image_model(*layers: nn.Module, channels: int = 2, size: tuple[int, int] = (7, 6)) -> Case:
    x = rows(channels, *size)
    body = nn.Sequential(*layers)
    features = body(x[:1]).numel()
    return Case(nn.Sequential(body, nn.Tanh(), head(features)), x, labels())


# -- linear layers -------------------------------------------------------------------------------------------


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


# -- weights used outside their own module ----------------------------------------------------------------------


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


# -- parameters without a rule ----------------------------------------------------------------------------------


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


# -- convolutions -------------------------------------------------------------------------------------------------


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


# -- structure ------------------------------------------------------------------------------------------------------


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
    return Case(layers, rows(5), labels(), random=True)


@case
def dropout_beside_fallbacks() -> Case:
    layers = nn.Sequential(nn.Linear(5, 16), nn.LayerNorm(16), nn.Dropout(0.5), nn.PReLU(), nn.Linear(16, 3))
    return Case(layers, rows(5), labels(), random=True)


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
