"""The refined removal and V itself, against dense algebra and exact refits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import CASES
from tests.oracles.per_example import moving, per_example, relative_error
from tests.oracles.refits import ridge, ridge_left_out
from tests.posterior.structures import STRUCTURES, posterior_of
from tests.sensitivity.test_closed_form import at, half_square, logistic, mean_centred

LABELS = torch.arange(12) % 3


def swept(model, posterior, loader, loss_fn=F.cross_entropy, leverage=None, **arguments):
    return vlearn.sweep(model, posterior, loader, loss_fn, leverage, progress=False, **arguments)


def regression(prior_precision=1.0, outputs=1, noise=1.0):
    """Ridge regression at its optimum, its posterior, and the predictions of its refits."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator)
    y = x @ torch.randn(5, outputs, dtype=torch.float64, generator=generator)
    y += torch.randn(40, outputs, dtype=torch.float64, generator=generator)
    delta = prior_precision * noise
    columns = [ridge(x, column, delta) for column in y.mT]
    model = at(nn.Linear(5, outputs, bias=False).double(), torch.stack(columns))
    block = x.mT @ x / noise + prior_precision * torch.eye(5, dtype=torch.float64)
    precision = torch.kron(torch.eye(outputs, dtype=torch.float64), block)
    posterior = vlearn.posterior.Full({"weight": model.weight.detach()}, precision, num_data=40)
    left_out = torch.stack([ridge_left_out(x, column, delta) for column in y.mT], 1)
    return x, y, model, posterior, left_out


@pytest.mark.parametrize("prior_precision", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("outputs", [1, 3])
def test_linear_regression_is_predicted_exactly(prior_precision, outputs):
    x, y, model, posterior, left_out = regression(prior_precision, outputs)
    table = swept(model, posterior, [(x, y)], half_square, refined=True)
    assert table.num_first_order == 0
    assert relative_error(table.deviation, left_out - model(x).detach()) < 1e-10
    assert relative_error(table.loo_loss, half_square(left_out, y)) < 1e-10


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda f, t: half_square(f, t) / 0.09,
        lambda f, t: F.gaussian_nll_loss(f, t, torch.full_like(f, 0.09), reduction="none"),
    ],
    ids=["scaled squared error", "GaussianNLLLoss"],
)
def test_the_noise_variance_of_a_gaussian_likelihood_counts(loss_fn):
    x, y, model, posterior, left_out = regression(noise=0.09)
    table = swept(model, posterior, [(x, y)], loss_fn, refined=True)
    assert relative_error(table.deviation, left_out - model(x).detach()) < 1e-10


def test_logistic_regression_comes_nearer_to_its_refits():
    """Mean losses: by 200 refits .9026, refined .9014, first order .8993."""
    oracle, model, posterior = logistic()
    loader = [(oracle.x[:90], oracle.y[:90]), (oracle.x[90:], oracle.y[90:])]
    table = swept(model, posterior, loader, refined=True)
    logits = oracle.left_out_logits()
    exact = F.cross_entropy(logits, oracle.y)
    first_order = swept(model, posterior, loader).loo_loss.mean()
    assert table.num_first_order == 0
    assert abs(float(table.loo_loss.mean() - exact)) < 0.4 * abs(float(first_order - exact))
    moved = mean_centred(logits - oracle.x @ model.weight.detach().mT)
    assert relative_error(mean_centred(table.deviation), moved) < 0.07


@pytest.mark.parametrize("name", ["mlp", "convolution", "embedding_tied_with_the_output_layer", "attention"])
def test_networks_equal_dense_algebra(name):
    case = CASES[name]()
    truth = per_example(case.model.eval(), case.call, lambda f: F.cross_entropy(f, case.target, reduction="none"))
    mean = {n: p.detach() for n, p in moving(case.model).items()}
    precision = truth.ggn() + 0.5 * torch.eye(truth.gradients.shape[1], dtype=torch.float64)
    covariance = torch.linalg.inv(precision)
    v = truth.output_covariance(covariance)
    identity = torch.eye(v.shape[1], dtype=v.dtype)
    refined = torch.linalg.solve(identity - v @ truth.hessian, truth.deviation(covariance))
    largest = torch.linalg.eigvals(v @ truth.hessian).real.amax(1)
    threshold = float(largest.mean())
    expected = torch.where((largest < threshold).unsqueeze(1), refined, truth.deviation(covariance))
    table = swept(
        case.model,
        vlearn.posterior.Full(mean, precision, num_data=4),
        [(case.x, case.target)],
        case.loss,
        leverage="exact",
        refined=True,
        threshold=threshold,
        variance=True,
    )
    assert 0 < table.num_first_order == int((largest >= threshold).sum()) < len(largest)
    assert torch.equal(table.used_first_order, largest >= threshold)
    assert relative_error(table.largest_eigenvalue, largest) < 1e-9
    assert bool((table.largest_eigenvalue <= table.leverage * (1 + 1e-9)).all())
    assert relative_error(table.deviation, expected) < 1e-9
    assert relative_error(table.function_variance, v) < 1e-10
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_of_a_covariance_equals_its_dense_form(structure):
    case = CASES["convolution"]()
    posterior, covariance = posterior_of(moving(case.model), structure)
    truth = per_example(case.model.eval(), case.call, lambda f: F.cross_entropy(f, case.target, reduction="none"))
    v = truth.output_covariance(covariance)
    refined = torch.linalg.solve(torch.eye(3, dtype=v.dtype) - v @ truth.hessian, truth.deviation(covariance))
    largest = torch.linalg.eigvals(v @ truth.hessian).real.amax(1)
    expected = torch.where((largest < 0.95).unsqueeze(1), refined, truth.deviation(covariance))
    table = swept(case.model, posterior, [(case.x, case.target)], refined=True, variance=True)
    assert relative_error(table.deviation, expected) < 1e-9
    assert relative_error(table.function_variance, v) < 1e-10


def test_an_approximate_covariance_beyond_the_threshold_keeps_the_first_order():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    posterior = vlearn.IVON(model, lr=0.1, ess=2).posterior()  # variances that no data support
    loader = [(torch.randn(12, 5, dtype=torch.float64), LABELS)]
    plain, table = swept(model, posterior, loader), swept(model, posterior, loader, refined=True)
    kept = table.used_first_order
    assert 0 < table.num_first_order < 12
    assert torch.equal(table.deviation[kept], plain.deviation[kept])
    assert bool((table.deviation[~kept].norm(dim=1) > plain.deviation[~kept].norm(dim=1)).all())
    assert plain.num_first_order is plain.function_variance is None


def test_a_loss_that_is_not_convex_in_the_output_is_refined_with_its_own_curvature():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.randn(12, dtype=torch.float64)

    def loss(output, target):  # mean and log variance
        return 0.5 * ((output[:, 0] - target).square() * (-output[:, 1]).exp() + output[:, 1])

    truth = per_example(model, lambda m: m(x), lambda f: loss(f, y))
    assert bool((torch.linalg.eigvalsh(truth.hessian) < 0).any())
    posterior = vlearn.IVON(model, lr=0.1, ess=100).posterior()
    covariance = torch.eye(truth.gradients.shape[1], dtype=torch.float64) / (100 * (1 + 1e-4))
    v = truth.output_covariance(covariance)
    expected = torch.linalg.solve(torch.eye(2, dtype=v.dtype) - v @ truth.hessian, truth.deviation(covariance))
    assert relative_error(swept(model, posterior, [(x, y)], loss, refined=True).deviation, expected) < 1e-10


def test_one_sequence_is_refined_over_all_its_positions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 7)).double()
    x, y = torch.randint(7, (4, 5)), torch.randint(7, (4, 5))

    def loss(output, target):
        return F.cross_entropy(output.mT, target, reduction="none").sum(1)

    truth = per_example(model, lambda m: m(x), lambda f: loss(f, y))
    posterior = vlearn.IVON(model, lr=0.1, ess=30).posterior()
    covariance = torch.eye(truth.gradients.shape[1], dtype=torch.float64) / (30 * (1 + 1e-4))
    v = truth.output_covariance(covariance)
    expected = torch.linalg.solve(torch.eye(35, dtype=v.dtype) - v @ truth.hessian, truth.deviation(covariance))
    table = swept(model, posterior, [(x, y)], loss, "exact", refined=True)
    assert relative_error(table.deviation.flatten(1), expected) < 1e-10
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-10


# -- errors -----------------------------------------------------------------------------------------------------------


def arguments_of():
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    return model, vlearn.IVON(model, lr=0.1, ess=12).posterior(), [(torch.randn(12, 5).double(), LABELS)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 1.5}, "threshold=1.5, but it must be in (0, 1]"),
        ({"threshold": 0.0}, "threshold=0.0, but it must be in (0, 1]"),
    ],
)
def test_an_argument_that_breaks_its_rule_is_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        swept(*arguments_of(), **arguments)
    assert message in str(error.value)


def test_refining_a_loss_of_two_outputs_is_refused():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(5, 3), nn.Linear(5, 1)

        def forward(self, x):
            return self.left(x), self.right(x)

    model = Two().double()
    posterior = vlearn.IVON(model, lr=0.1, ess=12).posterior()
    loader = arguments_of()[2]

    def loss(output, target):
        return F.cross_entropy(output[0], target, reduction="none") + output[1].square().squeeze(1)

    with pytest.raises(ValueError, match="refined=True needs a loss of one output alone"):
        swept(model, posterior, loader, loss, output=0, refined=True)
