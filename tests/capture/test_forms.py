"""Every form of a per-example gradient equals autograd, for layers of any shape."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.oracles.per_example import relative_error
from vlearn.capture.forms import Outer, Shift, Strips
from vlearn.capture.rules import RULES

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
    rule = RULES[type(module)]
    output = module(x).detach()
    cotangent = torch.randn_like(output)
    for p, truth in gradients(module, x, cotangent).items():
        form = rule.form(module, p, x, cotangent)
        variance, direction = torch.rand_like(p), torch.randn_like(truth)
        assert relative_error(form.dense(), truth) < 1e-12
        assert relative_error(form.sum_of_squares(), truth.square().sum(0)) < 1e-12
        influence = (truth.square() * variance.detach()).flatten(1).sum(1)
        assert relative_error(form.weighted_square(variance.detach()), influence) < 1e-12

        # moving p by D_n changes the output by what the layer gives with D_n in place of p, without bias
        moved = torch.cat([_with(module, p, d)(x[n : n + 1]) for n, d in enumerate(direction)]).detach()
        assert relative_error(_output(rule, module, form.moved_rows(direction), output), moved) < 1e-12
        moved = torch.cat([_with(module, p, d)(x[n : n + 1]) for n, d in enumerate(truth * variance)]).detach()
        assert relative_error(_output(rule, module, form.output_tangent(variance.detach()), output), moved) < 1e-12
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


@st.composite
def convolutions(draw):
    groups = draw(st.integers(1, 3))
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    kernel, dilation = draw(pair), draw(pair)
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = draw(st.one_of(st.sampled_from(["same", "valid"]), st.tuples(st.integers(0, 2), st.integers(0, 2))))
    size = tuple(draw(st.integers(r, r + 4)) for r in reach)
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    if mode in ("reflect", "circular"):  # torch pads by less than the input
        pads = reach if padding == "same" else [0, 0] if padding == "valid" else padding
        size = tuple(max(s, p + 1) for s, p in zip(size, pads, strict=True))
    return {
        "n": draw(st.integers(1, 3)),
        "size": size,
        "settings": {
            "in_channels": groups * draw(st.integers(1, 2)),
            "out_channels": groups * draw(st.integers(1, 2)),
            "kernel_size": kernel,
            "stride": 1 if padding == "same" else draw(pair),
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "bias": draw(st.booleans()),
            "padding_mode": mode,
        },
    }


@settings(quick, max_examples=150)
@given(convolutions())
def test_convolutions(drawn):
    torch.manual_seed(0)
    module = nn.Conv2d(**drawn["settings"]).double()
    check(module, torch.randn(drawn["n"], module.in_channels, *drawn["size"]).double())


@pytest.mark.parametrize(
    ("module", "shape", "form"),
    [
        (nn.Linear(5, 3), (4, 5), Outer),
        (nn.Linear(5, 3), (4, 6, 5), Outer),
        (nn.Conv2d(2, 3, 3), (4, 2, 6, 6), Strips),
        (nn.Conv2d(2, 3, 1), (4, 2, 6, 6), Outer),
        (nn.Conv2d(2, 3, 6), (4, 2, 6, 6), Outer),  # one position
    ],
)
def test_each_layer_takes_its_cheapest_form(module, shape, form):
    module, x = module.double(), torch.randn(shape).double()
    cotangent = torch.randn_like(module(x)).detach()
    rule = RULES[type(module)]
    assert type(rule.form(module, module.weight, x, cotangent)) is form
    assert type(rule.form(module, module.bias, x, cotangent)) is Shift


def test_one_position_forms_nothing_of_the_size_of_the_gradient():
    x, cotangent = torch.randn(8, 50), torch.randn(8, 40)
    form = RULES[nn.Linear].form(nn.Linear(50, 40), nn.Linear(50, 40).weight, x, cotangent)
    assert form.entries == 0
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            largest = max(largest, result.numel())
            return result

    with Sizes():
        form.weighted_square(torch.rand(40, 50))
        form.output_tangent(torch.rand(40, 50))
    assert largest <= 40 * 50  # the gradients would be 8 x 40 x 50


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
