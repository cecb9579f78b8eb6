"""Every form of a per-example gradient equals autograd, for layers of any shape."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.oracles.per_example import relative_error
from vlearn.layers.convolution import ConvTransposeWeightGradient, ConvWeightGradient
from vlearn.layers.gradient_forms import Bias, Elementwise, Indexed, Outer
from vlearn.layers.registry import RULES, Rule, register, rule_of

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
quick = settings(max_examples=60, derandomize=True, deadline=None, database=None)


def gradients(module, x, cotangent):
    """{parameter: [N, *shape]} by one backward pass an example."""
    rows = [
        torch.autograd.grad(module(x[n : n + 1]), list(module.parameters()), cotangent[n : n + 1])
        for n in range(len(x))
    ]
    return {p: torch.stack(column) for p, column in zip(module.parameters(), zip(*rows, strict=True), strict=True)}


def check(module, x):
    """All operations of the forms that a layer's rule gives."""
    rule = rule_of(type(module))
    assert rule.accepts(module, x)
    output = module(x).detach()
    cotangent = torch.randn_like(output)
    if rule.linear is not None:
        flat = module(torch.zeros_like(x)).detach()
        assert relative_error(rule.linear(module, x).detach() + flat, output) < 1e-12
    for p, truth in gradients(module, x, cotangent).items():
        form = rule.form(module, p, x, cotangent)
        variance, direction = torch.rand_like(p), torch.randn_like(truth)
        assert relative_error(form.dense(), truth) < 1e-12
        assert relative_error(form.sum_of_squares(), truth.square().sum(0)) < 1e-12
        influence = (truth.square() * variance.detach()).flatten(1).sum(1)
        assert relative_error(form.weighted_square(variance.detach()), influence) < 1e-12

        # Moving p by D_n changes the output by what the layer gives with D_n in place of p, without bias.
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            direction[:, padding] = 0  # a row that counts as constant
        moved = torch.cat([_with(module, p, d)(x[n : n + 1]) for n, d in enumerate(direction)]).detach()
        assert relative_error(_output(rule, module, form.output_jvp(direction), output), moved) < 1e-12
        moved = torch.cat([_with(module, p, d)(x[n : n + 1]) for n, d in enumerate(truth * variance)]).detach()
        tangent = form.weighted_output_jvp(variance.detach())
        assert relative_error(_output(rule, module, tangent, output), moved) < 1e-12
        assert relative_error((form.b * tangent).flatten(1).sum(1), influence) < 1e-12
        assert torch.equal(rule.from_rows(module, rule.rows(module, output), tuple(output.shape)), output)


def _with(module, p, value):
    def call(x):
        state = {name: value if q is p else torch.zeros_like(q) for name, q in module.named_parameters()}
        return torch.func.functional_call(module, state, (x,))

    return call


def _output(rule, module, rows, output):
    rows = rows.expand(-1, -1, rule.rows(module, output).shape[2], -1)
    return rule.from_rows(module, rows, tuple(output.shape))


@quick
@given(
    n=st.integers(1, 4),
    between=st.lists(st.integers(1, 4), max_size=2),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    bias=st.booleans(),
)
def test_linear_layers(n, between, inputs, outputs, bias):
    torch.manual_seed(0)
    check(nn.Linear(inputs, outputs, bias).double(), torch.randn(n, *between, inputs).double())


@quick
@given(
    n=st.integers(1, 4),
    between=st.lists(st.integers(1, 4), max_size=2),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
)
def test_linear_layers_with_a_transposed_weight(n, between, inputs, outputs):
    torch.manual_seed(0)
    module = pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs).double()
    torch.nn.init.normal_(module.bias)
    check(module, torch.randn(n, *between, inputs).double())


@quick
@given(
    n=st.integers(1, 4),
    between=st.lists(st.integers(1, 6), max_size=2),
    size=st.integers(1, 4),
    features=st.integers(1, 4),
    padding=st.one_of(st.none(), st.integers(-4, 3)),
    seed=st.integers(0, 99),
)
def test_embeddings(n, between, size, features, padding, seed):
    torch.manual_seed(seed)
    padding = None if padding is None else max(min(padding, size - 1), -size)
    module = nn.Embedding(size, features, padding_idx=padding).double()
    check(module, torch.randint(size, (n, *between)))


@quick
@given(
    kind=st.sampled_from([nn.LayerNorm, nn.RMSNorm]),
    n=st.integers(1, 3),
    between=st.lists(st.integers(1, 4), max_size=2),
    normalized=st.lists(st.integers(2, 4), min_size=1, max_size=2),
)
def test_norms_of_features(kind, n, between, normalized):
    torch.manual_seed(0)
    check(uneven(kind(normalized)), torch.randn(n, *between, *normalized).double())


@quick
@given(
    n=st.integers(1, 3),
    size=st.lists(st.integers(1, 4), max_size=3),
    groups=st.integers(1, 3),
    channels=st.integers(2, 3),
)
def test_group_norms(n, size, groups, channels):
    torch.manual_seed(0)
    module = uneven(nn.GroupNorm(groups, groups * channels, eps=0.1))
    check(module, torch.randn(n, groups * channels, *size).double())


@quick
@given(n=st.integers(1, 3), size=st.lists(st.integers(1, 4), max_size=3), channels=st.integers(1, 4))
def test_batch_norms_in_eval_mode(n, size, channels):
    torch.manual_seed(0)
    kinds = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    module = uneven(kinds[len(size)](channels)).eval()
    module.running_mean.normal_(), module.running_var.uniform_(0.5, 2)
    check(module, torch.randn(n, channels, *size).double())


@quick
@given(n=st.integers(1, 3), size=st.lists(st.integers(2, 4), min_size=1, max_size=3), channels=st.integers(1, 4))
def test_instance_norms(n, size, channels):
    torch.manual_seed(0)
    module = uneven((nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[len(size) - 1](channels, affine=True))
    check(module, torch.randn(n, channels, *size).double())


def uneven(module):
    for p in module.parameters():
        torch.nn.init.normal_(p)
    return module.double()


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@st.composite
def convolutions(draw):
    dimensions = draw(st.integers(1, 3))
    largest = 3 if dimensions < 3 else 2
    groups = draw(st.integers(1, 3))
    each = st.tuples(*[st.integers(1, largest)] * dimensions)
    kernel, dilation = draw(each), draw(each)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(*[st.integers(0, 2)] * dimensions)))
    size = tuple(draw(st.integers(r, r + largest + 1)) for r in reach)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if mode in ("reflect", "circular"):  # torch pads by less than the input
        pads = reach if padding == "same" else [0] * dimensions if padding == "valid" else padding
        size = tuple(max(s, p + 1) for s, p in zip(size, pads, strict=True))
    settings = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "stride": 1 if padding == "same" else draw(each),
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": mode,
    }
    return CONVOLUTIONS[dimensions - 1](**settings).double(), draw(st.integers(1, 3)), size


@settings(quick, max_examples=150)
@given(convolutions())
def test_convolutions(drawn):
    module, n, size = drawn
    torch.manual_seed(0)
    check(module, torch.randn(n, module.in_channels, *size).double())


@st.composite
def transposed_convolutions(draw):
    dimensions = draw(st.integers(1, 3))
    largest = 3 if dimensions < 3 else 2
    groups = draw(st.integers(1, 2))
    each = st.tuples(*[st.integers(1, largest)] * dimensions)
    kernel, stride, dilation, size = draw(each), draw(each), draw(each), draw(each)
    padding, extra = [], []
    for k, step, gap, length in zip(kernel, stride, dilation, size, strict=True):
        whole = (length - 1) * step + gap * (k - 1) + 1
        padding.append(draw(st.integers(0, min(2, (whole - 1) // 2))))
        extra.append(draw(st.integers(0, max(step, gap) - 1)))
    settings = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": tuple(padding),
        "output_padding": tuple(extra),
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return TRANSPOSED[dimensions - 1](**settings).double(), draw(st.integers(1, 3)), size


@settings(quick, max_examples=150)
@given(transposed_convolutions())
def test_transposed_convolutions(drawn):
    module, n, size = drawn
    torch.manual_seed(0)
    check(module, torch.randn(n, module.in_channels, *size).double())


@pytest.mark.parametrize(
    ("module", "shape", "form"),
    [
        (nn.Linear(5, 3), (4, 5), Outer),
        (nn.Linear(5, 3), (4, 6, 5), Outer),
        (nn.Conv2d(2, 3, 3), (4, 2, 6, 6), ConvWeightGradient),
        (nn.Conv2d(2, 3, 1), (4, 2, 6, 6), Outer),
        (nn.Conv2d(2, 3, 6), (4, 2, 6, 6), Outer),  # one position
        (nn.Conv1d(2, 3, 3), (4, 2, 6), ConvWeightGradient),
        (nn.Conv3d(2, 3, 2), (4, 2, 3, 3, 3), ConvWeightGradient),
        (nn.ConvTranspose2d(2, 3, 2), (4, 2, 3, 3), ConvTransposeWeightGradient),
        (nn.LayerNorm(5), (4, 6, 5), Elementwise),
        (nn.GroupNorm(2, 4), (4, 4, 3), Elementwise),
    ],
)
def test_each_layer_takes_its_cheapest_form(module, shape, form):
    module, x = module.double(), torch.randn(shape).double()
    cotangent = torch.randn_like(module(x)).detach()
    rule = RULES[type(module)]
    assert type(rule.form(module, module.weight, x, cotangent)) is form
    assert type(rule.form(module, module.bias, x, cotangent)) is Bias


def test_one_position_forms_nothing_of_the_size_of_the_gradient():
    x, cotangent = torch.randn(8, 50), torch.randn(8, 40)
    module = nn.Linear(50, 40)
    form = RULES[nn.Linear].form(module, module.weight, x, cotangent)
    assert form.entries == 0
    variance = torch.rand(40, 50)
    assert largest_result(lambda: form.weighted_square(variance)) <= 40 * 50  # the gradients would be 8 x 40 x 50
    assert largest_result(lambda: form.weighted_output_jvp(variance)) <= 40 * 50


def largest_result(compute):
    """Entries of the largest tensor that an operation inside makes, views apart."""
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for leaf in result if isinstance(result, tuple | list) else [result]:
                largest = max(largest, leaf.numel())
            return result

    with Sizes():
        compute()
    return largest


def test_a_bias_does_not_read_the_input():
    module = nn.Linear(5, 3).double()
    cotangent = torch.randn(4, 3).double()
    form = RULES[nn.Linear].form(module, module.bias, torch.full((4, 5), torch.nan).double(), cotangent)
    assert torch.equal(form.dense(), cotangent)


def test_a_shift_of_a_grouped_convolution_has_its_channels_in_order():
    module = nn.Conv2d(4, 6, 3, groups=2).double()
    cotangent = torch.randn(2, 6, 3, 3).double()
    form = RULES[nn.Conv2d].form(module, module.bias, torch.randn(2, 4, 5, 5).double(), cotangent)
    assert torch.allclose(form.dense(), cotangent.sum((2, 3)))
    assert torch.allclose(
        form.weighted_square(torch.arange(6.0).double()), (form.dense() ** 2) @ torch.arange(6.0).double()
    )


def test_padding_modes_pad_as_torch_does():
    """The one place where a rule repeats what a layer does before its product."""
    for mode in ("zeros", "reflect", "replicate", "circular"):
        module = nn.Conv2d(1, 1, 3, padding=(2, 1), padding_mode=mode, bias=False).double()
        x = torch.randn(1, 1, 5, 5).double()
        form = RULES[nn.Conv2d].form(module, module.weight, x, torch.ones_like(module(x)))
        width = module._reversed_padding_repeated_twice
        padded = F.pad(x, width, mode="constant" if mode == "zeros" else mode)
        assert relative_error(form.dense().sum(), F.unfold(padded, 3).sum()) < 1e-12


def test_an_embedding_forms_nothing_of_the_size_of_its_table():
    module = nn.Embedding(1000, 4)
    form = RULES[nn.Embedding].form(module, module.weight, torch.randint(1000, (8, 6)), torch.randn(8, 6, 4))
    assert type(form) is Indexed
    variance = torch.rand(1000, 4)
    assert largest_result(lambda: form.weighted_square(variance)) <= 8 * 6 * 4
    assert largest_result(lambda: form.weighted_output_jvp(variance)) <= 8 * 6 * 4


def test_the_padding_row_of_an_embedding_does_not_move():
    """Its gradient is zero whatever the loss, so it counts as a constant, for a joint covariance too."""
    module = nn.Embedding(3, 2, padding_idx=1).double()
    form = RULES[nn.Embedding].form(module, module.weight, torch.tensor([[0, 1]]), torch.ones(1, 2, 2).double())
    moved = form.output_jvp(torch.ones(1, 3, 2).double())
    assert moved.flatten().tolist() == [1, 1, 0, 0]
    assert form.dense()[0].tolist() == [[1, 1], [0, 0], [0, 0]]


def test_a_type_takes_the_rule_of_another():
    class Same(nn.Linear):
        pass

    assert rule_of(Same) is None
    register(Same, nn.Linear)
    assert rule_of(Same) is RULES[nn.Linear]


def test_a_type_without_a_rule_gives_none_to_another():
    with pytest.raises(ValueError) as error:
        register(nn.Linear, nn.Bilinear)
    assert str(error.value) == "rule=Bilinear, but that type has no rule: pass a vlearn.capture.Rule."
    assert isinstance(rule_of(nn.Linear), Rule)
