"""Kronecker, EK-FAC and mixed covariances against dense per-example autograd, layer by layer."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import CASES, Case
from tests.oracles.per_example import moving, per_example, relative_error
from tests.posterior.structures import STRUCTURES, posterior_of
from vlearn.linearized import kronecker_products as rotated

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
SPECIAL = ("penalty_in_the_model_output_only", "logits_written_in_place", "output_per_position")
NAMES = [name for name in CASES if name not in SPECIAL]


def assert_exact(model, call, x, target, loss_fn, structure):
    posterior, covariance = posterior_of(moving(model), structure)
    truth = per_example(model.eval(), call, Case(model, x, target, loss_fn).each_loss)
    table = vlearn.sweep(model, posterior, [(x, target)], loss_fn, "exact", progress=False)
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    change = truth.deviation(covariance)
    assert relative_error(table.deviation.reshape(change.shape), change) < 1e-10
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", NAMES)
def test_every_structure_equals_its_dense_covariance(name, structure):
    case = CASES[name]()
    assert_exact(case.model, case.call, case.x, case.target, case.loss, structure)


@pytest.mark.parametrize("structure", ["diagonal", "kronecker", "full", "last-layer"])
@pytest.mark.parametrize("narrow", ["model", "posterior"])
def test_the_model_may_be_of_another_dtype_than_its_posterior(structure, narrow):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randn(9, 2, 5, dtype=torch.float64), torch.arange(9) % 3

    def fitted(dtype):
        told = {"curvature": "ggn-exact", "prior_precision": 1.0, "progress": False}
        return vlearn.posterior.fit(model.to(dtype), [(x.to(dtype), y)], F.cross_entropy, structure, **told)

    def swept(posterior, dtype):
        return vlearn.sweep(model.to(dtype), posterior, [(x.to(dtype), y)], F.cross_entropy, "exact", progress=False)

    expected = swept(fitted(torch.float64), torch.float64)
    dtypes = (torch.float64, torch.float32) if narrow == "model" else (torch.float32, torch.float64)
    table = swept(fitted(dtypes[0]), dtypes[1])
    for name in ("self_influence", "deviation", "loo_loss", "leverage"):
        assert relative_error(getattr(table, name).double(), getattr(expected, name)) < 1e-5


def conv(kernel, channels, outputs, **arguments):
    body = nn.Sequential(nn.Conv2d(channels, outputs, kernel, **arguments), nn.Tanh(), nn.Flatten())
    x = torch.randn(4, channels, 7, 6, dtype=torch.float64)
    return nn.Sequential(body, nn.Linear(body(x.float()).shape[1], 3)).double(), x


@pytest.mark.parametrize("by_rows", [True, False], ids=["rows rotated", "gradients rotated"])
@pytest.mark.parametrize(
    ("kernel", "arguments"),
    [
        (3, {}),
        ((2, 3), {"stride": (2, 1), "padding": 1}),
        (3, {"dilation": 2}),
        (3, {"padding": "same", "padding_mode": "circular"}),
        (1, {}),
        (3, {"groups": 2}),
        ((7, 6), {}),
        (3, {"bias": False}),
    ],
)
@pytest.mark.parametrize("structure", ["layers", "separate"])
def test_both_ways_to_rotate_a_convolution_are_exact(kernel, arguments, structure, by_rows, monkeypatch):
    torch.manual_seed(0)
    model, x = conv(kernel, 2, 4, **arguments)
    taken = []
    monkeypatch.setattr(rotated, "rows_cost_less", lambda *sizes: taken.append(sizes) or by_rows)
    assert_exact(model, lambda m: m(x), x, torch.tensor([0, 1, 2, 1]), F.cross_entropy, structure)
    assert taken or (kernel, arguments) in (((7, 6), {}), (3, {"groups": 2}))


def test_one_position_stores_nothing_of_the_size_of_the_gradients(monkeypatch):
    from vlearn.layers.gradient_forms import Outer
    from vlearn.linearized import covariance_products

    monkeypatch.setattr(Outer, "dense", lambda form: pytest.fail("a gradient was formed"))
    monkeypatch.setattr(covariance_products, "_add_dense", lambda *given: pytest.fail("gradients were formed"))
    case = CASES["mlp"]()
    assert_exact(case.model, case.call, case.x, case.target, case.loss, "layers")


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias"])
def test_a_layer_that_was_frozen_in_part_later_is_refused_and_a_fit_of_what_is_left_is_exact(frozen):
    """What is held fixed leaves the others another covariance than its block of Σ."""
    case = CASES["mlp"]()
    posterior, _ = posterior_of(moving(case.model), "layers")
    case.model.get_parameter(frozen).requires_grad_(False)
    batches = [(case.x, case.target)]
    with pytest.raises(ValueError, match=f"'{frozen}' is frozen .* fit a posterior to the model as it is"):
        vlearn.sweep(case.model, posterior, batches, case.loss, None, progress=False)
    fitted = vlearn.posterior.fit(case.model, batches, case.loss, "full", curvature="ggn-exact", progress=False)
    truth = per_example(case.model.eval(), case.call, lambda f: case.loss(f, case.target, reduction="none"))
    ggn = sum(j.mT @ h @ j for j, h in zip(truth.jacobian, truth.hessian, strict=True))
    covariance = torch.linalg.inv(ggn + torch.eye(len(ggn)))
    table = vlearn.sweep(case.model, fitted, batches, case.loss, None, progress=False)
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-8


def test_narrow_rows_meet_a_wide_covariance():
    """A float32 model with the factors of its float64 twin."""
    case = CASES["mlp"]()
    posterior, _ = posterior_of(moving(case.model), "layers")
    wide = vlearn.sweep(case.model, posterior, [(case.x, case.target)], case.loss, "exact", progress=False)
    narrow = vlearn.sweep(
        case.model.float(), posterior, [(case.x.float(), case.target)], case.loss, "exact", progress=False
    )
    assert relative_error(narrow.deviation.double(), wide.deviation) < 1e-5
    assert relative_error(narrow.self_influence.double(), wide.self_influence) < 1e-5
