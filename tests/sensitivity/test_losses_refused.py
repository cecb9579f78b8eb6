"""Losses that give no example a loss of its own are refused; those of unusual kinds have the right rows."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.per_example import per_example, relative_error
from tests.sensitivity.small import LABELS, N, covariance_of, inputs, network, optimizer_of

SOFT = torch.rand(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).softmax(1)


def sweep(model, loss_fn, target=LABELS, **settings):
    posterior = optimizer_of(model).posterior()
    return vlearn.sweep(model, posterior, [(inputs(), target)], loss_fn, **{"leverage": None, **settings})


REDUCTIONS = {
    "module summed": (nn.MSELoss(reduction="sum"), lambda f: F.mse_loss(f, SOFT, reduction="none").sum(1)),
    "partial summed": (partial(F.l1_loss, reduction="sum"), lambda f: F.l1_loss(f, SOFT, reduction="none").sum(1)),
    "batch mean": (nn.KLDivLoss(reduction="batchmean"), lambda f: F.kl_div(f, SOFT, reduction="none").sum(1)),
    "partial batch mean": (
        partial(F.kl_div, reduction="batchmean"),
        lambda f: F.kl_div(f, SOFT, reduction="none").sum(1),
    ),
    "partial of a partial": (
        partial(partial(F.huber_loss, reduction="sum"), delta=0.5),
        lambda f: F.huber_loss(f, SOFT, reduction="none", delta=0.5).sum(1),
    ),
    "mean": (nn.MSELoss(), lambda f: F.mse_loss(f, SOFT, reduction="none").mean(1)),
    "a default of sum": (
        lambda f, y, reduction="sum": F.mse_loss(f, y, reduction=reduction),
        lambda f: F.mse_loss(f, SOFT, reduction="none").sum(1),
    ),
}


@pytest.mark.parametrize(("loss_fn", "rows"), REDUCTIONS.values(), ids=REDUCTIONS)
def test_entries_are_reduced_as_the_loss_reduces_them(loss_fn, rows):
    model = network()
    table = sweep(model, loss_fn, SOFT, leverage="exact")
    truth = per_example(model.eval(), lambda m: m(inputs()), rows)
    covariance = covariance_of(optimizer_of(model), model)
    assert relative_error(table.loss, truth.loss) < 1e-12
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-12
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-9 or float(truth.hessian.abs().max()) == 0


def test_entries_of_no_reduction_are_refused():
    with pytest.raises(ValueError, match="reduction='none' and gave 3 entries for each example"):
        sweep(network(), nn.MSELoss(reduction="none"), SOFT)
    assert len(sweep(network(), nn.CrossEntropyLoss(reduction="none"))) == N  # one entry: nothing to reduce


@pytest.mark.parametrize("loss_fn", [F.mse_loss, nn.L1Loss(), F.smooth_l1_loss, lambda f, y: (f - y).square()])
@pytest.mark.parametrize("shapes", [((N, 1), (N,)), ((N,), (N, 1))])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_a_target_that_is_broadcast_is_refused(loss_fn, shapes):
    model = nn.Sequential(nn.Linear(5, 1), nn.Flatten(0) if shapes[0] == (N,) else nn.Identity()).double()
    target = torch.randn(shapes[1], dtype=torch.float64)
    posterior = vlearn.IVON(model, lr=0.1, ess=10).posterior()
    match = "were broadcast against one another: give both the same shape"
    with pytest.raises(ValueError, match=match):
        vlearn.sweep(model, posterior, [(inputs(), target)], loss_fn)
    with pytest.raises(ValueError, match=match):
        vlearn.leave_group_out(model, posterior, [(inputs(), target)], {"a": [0, 1]}, loss_fn)
    with pytest.raises(ValueError, match=match):
        vlearn.influence(model, posterior, [(inputs(), target)], [(inputs(), target)], loss_fn)


COMPARING = {
    "contrastive": lambda f, y: F.cross_entropy(f @ f.T, torch.arange(len(f)), reduction="none"),
    "batch mean taken off": lambda f, y: F.cross_entropy(f - f.mean(0), y, reduction="none"),
    "over a detached mean": lambda f, y: (r := F.cross_entropy(f, y, reduction="none")) / r.detach().mean(),
    "in another order": lambda f, y: F.cross_entropy(f, y, reduction="none").flip(0),
    "ranks": lambda f, y: F.cross_entropy(f, y, reduction="none").cumsum(0),
}


@pytest.mark.parametrize("loss_fn", COMPARING.values(), ids=COMPARING)
def test_a_loss_that_compares_examples_is_refused(loss_fn):
    with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
        sweep(network(), loss_fn)


def test_a_loss_is_looked_at_once_for_each_shape():
    calls = []

    def loss_fn(output, target):
        calls.append(len(output))
        return F.cross_entropy(output, target, reduction="none")

    model = network()
    batch = (inputs(), LABELS)
    vlearn.sweep(model, optimizer_of(model).posterior(), [batch] * 3, loss_fn, leverage=None, loo_loss=False)
    assert calls.count(4) == 1  # part of a batch


class PositionsFirst(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.a(x).tanh()).transpose(0, 1)


@pytest.mark.parametrize("length", [4, N])
def test_outputs_with_positions_first_are_refused(length):
    model = PositionsFirst().double()
    x, y = torch.randn(N, length, 3, dtype=torch.float64), torch.randint(3, (N, length))

    def rows(output, target):
        return F.cross_entropy(output.permute(1, 2, 0), target, reduction="none").mean(1)

    optimizer = optimizer_of(model)
    rows(model(x), y).mean().backward()
    with pytest.raises(RuntimeError, match="examples"):
        optimizer.sensitivities()
    with pytest.raises(RuntimeError, match="dimension 0"):
        vlearn.sweep(model, optimizer.posterior(), [(x, y)], rows)


def test_a_loss_function_that_reads_a_parameter_is_refused():
    model = network()
    with pytest.raises(RuntimeError, match="loss_fn reads a parameter of the posterior itself"):
        sweep(model, lambda f, y: F.cross_entropy(f * model[0].bias.sum().exp(), y, reduction="none"))


def multi_margin(output, target):
    return F.multi_margin_loss(output, target, reduction="none")


@pytest.mark.parametrize("leverage", ["probe", "exact"])
def test_a_loss_without_a_second_derivative_in_torch_has_its_curvature_by_differences(leverage):
    model = network()
    table = sweep(model, multi_margin, leverage=leverage)
    assert float(table.leverage.abs().max()) < 1e-8  # piecewise linear

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0].exp()

    known = sweep(model, lambda f, y: f.exp().sum(1), leverage="exact")
    found = sweep(model, lambda f, y: Once.apply(f).sum(1), leverage="exact")
    assert relative_error(found.leverage, known.leverage) < 1e-6


def test_where_that_would_take_too_many_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr("vlearn.linearized.linearization.DIFFERENCES", 2)
    with pytest.raises(RuntimeError, match="pass leverage=None"):
        sweep(network(), multi_margin, leverage="probe")


@pytest.mark.parametrize(
    ("loss_fn", "target"),
    [
        (F.mse_loss, SOFT),
        (F.binary_cross_entropy_with_logits, SOFT),
        (nn.PoissonNLLLoss(), SOFT),
        (F.huber_loss, SOFT),
        (F.l1_loss, SOFT),
    ],
)
def test_the_probe_of_a_loss_of_each_entry_forms_no_matrix(loss_fn, target, monkeypatch):
    model = network()
    exact = sweep(model, loss_fn, target, leverage="exact").leverage
    monkeypatch.setattr("vlearn.losses.output_hessian.output_hessian", None)
    draws = [
        sweep(model, loss_fn, target, leverage="probe", generator=torch.Generator().manual_seed(seed)).leverage
        for seed in range(400)
    ]
    error = (torch.stack(draws).mean(0) - exact).abs()
    assert bool((error <= 0.3 * exact + 1e-12).all())


def test_the_noise_that_a_model_expands_to_a_row_for_each_example():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net, self.log_noise = nn.Linear(5, 1), nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            return self.net(x), self.log_noise.expand(len(x), 1)

    def rows(output, target):
        return (0.5 * (-output[1]).exp() * (output[0] - target).square() + 0.5 * output[1]).sum(1)

    model = Noisy().double()
    target = torch.randn(N, 1, dtype=torch.float64)
    table = vlearn.sweep(model, optimizer_of(model).posterior(), [(inputs(), target)], rows, leverage=None, output=0)
    truth = per_example(model, lambda m: m(inputs())[0], lambda f: f.sum(1), lambda m: rows(m(inputs()), target))
    covariance = covariance_of(optimizer_of(model), model)
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-12
