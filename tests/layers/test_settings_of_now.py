"""A rule reads a layer's settings where torch's forward reads them, also those that were changed after it was made."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import Case
from tests.oracles.per_example import flat, moving, per_example, relative_error


def change(**settings):
    def apply(module):
        for name, value in settings.items():
            setattr(module, name, value)

    return apply


def weight(*shape):
    return change(weight=nn.Parameter(torch.randn(shape)))


IMAGES, SEQUENCES, VOLUMES = (4, 4, 7, 6), (4, 4, 8), (4, 2, 4, 5, 4)
CHANGED = {
    "padding": (lambda: nn.Conv2d(4, 4, 3, padding=1), change(padding=(0, 2)), IMAGES),
    "padding of one number": (lambda: nn.Conv2d(4, 4, 3), change(padding=2), IMAGES),
    "padding to same": (lambda: nn.Conv2d(4, 4, (2, 4)), change(padding="same"), IMAGES),
    "padding from same": (lambda: nn.Conv2d(4, 4, 3, padding="same"), change(padding=(1, 0)), IMAGES),
    "padding to valid": (lambda: nn.Conv1d(4, 4, 3, padding=1), change(padding="valid"), SEQUENCES),
    "padding by reflection, which keeps its widths": (
        lambda: nn.Conv2d(4, 4, 3, padding=2, padding_mode="reflect"),
        change(padding=(0, 0)),
        IMAGES,
    ),
    "padding mode": (lambda: nn.Conv2d(4, 4, 3, padding=(2, 1)), change(padding_mode="circular"), IMAGES),
    "padding mode to zeros": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="replicate"),
        change(padding_mode="zeros", padding=(2, 0)),
        IMAGES,
    ),
    "stride and dilation": (lambda: nn.Conv2d(4, 4, 3, padding=2), change(stride=2, dilation=(2, 1)), IMAGES),
    "same padding with a new dilation": (lambda: nn.Conv2d(4, 4, 3, padding="same"), change(dilation=(2, 2)), IMAGES),
    "kernel": (lambda: nn.Conv2d(4, 4, 3, padding=1), weight(4, 4, 2, 5), IMAGES),
    "kernel of one by one": (lambda: nn.Conv3d(2, 4, 2), weight(4, 2, 1, 1, 1), VOLUMES),
    "groups": (lambda: nn.Conv2d(4, 4, 3), lambda m: (change(groups=2)(m), weight(4, 2, 3, 3)(m)), IMAGES),
    "no bias": (lambda: nn.Conv2d(4, 4, 3), change(bias=None), IMAGES),
    "settings of a transposed convolution": (
        lambda: nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1),
        change(stride=(3, 2), padding=(0, 1), output_padding=(2, 1), dilation=(1, 2)),
        IMAGES,
    ),
    "kernel of a transposed convolution": (lambda: nn.ConvTranspose1d(4, 4, 3), weight(4, 4, 2), SEQUENCES),
    "transposed convolution by one number": (
        lambda: nn.ConvTranspose2d(4, 4, 3),
        change(stride=2, padding=(1, 1), dilation=2),
        IMAGES,
    ),
    "eps of a group norm": (lambda: nn.GroupNorm(2, 4), change(eps=0.7), IMAGES),
    "groups of a group norm": (lambda: nn.GroupNorm(2, 4), change(num_groups=4), IMAGES),
    "axes of a layer norm": (
        lambda: nn.LayerNorm(6),
        lambda m: change(normalized_shape=(7, 6), weight=nn.Parameter(torch.randn(7, 6)), bias=None)(m),
        IMAGES,
    ),
    "eps of a layer norm": (lambda: nn.LayerNorm((7, 6)), change(eps=0.7), IMAGES),
    "layer norm with a bias alone": (lambda: nn.LayerNorm(6), change(weight=None), IMAGES),
    "layer norm without a bias": (lambda: nn.LayerNorm(6, bias=False), change(), IMAGES),
    "rms norm without eps": (lambda: nn.RMSNorm(6, eps=0.1), change(eps=None), IMAGES),
    "running statistics given up": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        change(track_running_stats=False),
        IMAGES,
    ),
    "running statistics": (
        lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        lambda m: (m.running_mean.normal_(), m.running_var.uniform_(0.5, 2)),
        IMAGES,
    ),
    "eps of a batch norm": (
        lambda: nn.BatchNorm2d(4),
        lambda m: (m.running_mean.normal_(), m.running_var.uniform_(0.5, 2), change(eps=0.7, momentum=None)(m)),
        IMAGES,
    ),
    "rows and columns of a linear layer": (
        lambda: nn.Linear(3, 2),
        lambda m: (weight(5, 6)(m), change(bias=None)(m)),
        IMAGES,
    ),
    "forward of its own": (
        lambda: nn.Linear(6, 5),
        lambda m: change(forward=lambda x: F.linear(x, m.weight.square(), m.bias))(m),
        IMAGES,
    ),
    "convolution of its own": (
        lambda: nn.Conv2d(4, 4, 3),
        lambda m: change(_conv_forward=lambda x, w, b: F.conv2d(x, w - w.mean((1, 2, 3), keepdim=True), b))(m),
        IMAGES,
    ),
}


def assert_exact(model, x):
    case = Case(model, x, torch.arange(len(x)) % 3)
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    covariance = torch.diag(flat({n: v for n, v in optimizer.posterior().variance.items() if n in moving(model)}))
    truth = per_example(model.eval(), case.call, case.each_loss)
    table = vlearn.sweep(model, optimizer.posterior(), [(x, case.target)], F.cross_entropy, None, progress=False)
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-10
    return table


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CHANGED)
def test_a_setting_that_was_changed_counts(name):
    make, apply, shape = CHANGED[name]
    torch.manual_seed(0)
    layer, x = make(), torch.randn(shape).double()
    apply(layer)
    layer = layer.double().eval()
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(layer(x)[0].numel(), 3).double())
    assert_exact(model, x)


@pytest.mark.parametrize("padding", [None, 2, -1], ids=["none", "from the front", "from the end"])
def test_the_padding_row_of_an_embedding_is_that_of_now(padding):
    torch.manual_seed(0)
    layer = nn.Embedding(3, 4, padding_idx=1)
    layer.padding_idx = padding
    layer.weight = nn.Parameter(torch.randn(5, 2))
    model = nn.Sequential(layer, nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)).double()
    assert_exact(model, torch.tensor([[0, 1, 2, 3, 4, 4], [1, 1, 1, 1, 1, 1], [2, 2, 4, 4, 0, 1], [3, 0, 3, 0, 3, 0]]))


def test_a_largest_norm_that_was_set_later_is_refused():
    model = nn.Sequential(nn.Embedding(3, 4), nn.Flatten(), nn.Linear(8, 3))
    model[0].max_norm = 1.0
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    F.cross_entropy(model(torch.tensor([[0, 1], [2, 0]])), torch.tensor([0, 1])).backward()
    with pytest.raises(RuntimeError, match="max_norm=1.0 makes its forward pass overwrite rows"):
        optimizer.sensitivities()


def test_a_transposed_convolution_that_is_told_its_output_size():
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

        def forward(self, x):
            return self.up(x, output_size=[10, 9])

    torch.manual_seed(0)
    model = nn.Sequential(Told(), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 90, 3)).double()
    assert_exact(model, torch.randn(4, 2, 4, 4).double())


@pytest.mark.parametrize("kind", ["pre", "post"])
@pytest.mark.parametrize("prepend", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("layer", [nn.Linear(4, 4), nn.PReLU(4)], ids=["rule", "fallback"])
def test_hooks_that_change_inputs_or_outputs_count_once(layer, kind, prepend):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 3)).double()
    if kind == "pre":
        layer.register_forward_pre_hook(lambda module, args: (2 * args[0] + 1,), prepend=prepend)
    else:
        layer.register_forward_hook(lambda module, args, output: 3 * output - 1, prepend=prepend)
    assert_exact(model, torch.randn(4, 5).double())
