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


# Each meets others only at some distance, or by their targets alone.
COMPARING |= {
    "four apart": lambda f, y: F.cross_entropy(f, y, reduction="none") + f.roll(4, 0).square().sum(1),
    "one apart": lambda f, y: F.cross_entropy(f, y, reduction="none") + f.roll(1, 0).square().sum(1),
    "over the number of examples": lambda f, y: F.cross_entropy(f, y, reduction="none") / len(f),
    "all targets": lambda f, y: F.cross_entropy(f, y, reduction="none") * y.double().mean(),
}


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_are_as_many_as_the_outputs_are_refused_as_broadcast():
    torch.manual_seed(0)
    model, target = nn.Linear(5, N).double(), torch.randn(N, dtype=torch.float64)
    with pytest.raises(ValueError, match="were broadcast against one another"):
        sweep(model, nn.HuberLoss(), target)
    with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
        sweep(model, lambda f, y: (f - y).square().mean(1), target)
    with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
        sweep(nn.Linear(5, 1).double(), lambda f, y: (f - y).square().mean(1), target)


@pytest.mark.filterwarnings("ignore:Using a target size")
def test_targets_that_are_broadcast_within_an_example_are_not():
    torch.manual_seed(0)
    model, target = nn.Linear(5, 3).double(), torch.randn(N, 1, dtype=torch.float64)
    table = sweep(model, F.mse_loss, target)
    assert relative_error(table.loss, (model(inputs()) - target).square().mean(1).detach()) < 1e-12


def test_a_loss_that_draws_random_numbers_compares_nothing():
    torch.manual_seed(0)
    table = sweep(network(), lambda f, y: F.cross_entropy(F.dropout(f, 0.3), y, reduction="none"), loo_loss=False)
    assert bool(table.self_influence.isfinite().all())


class SumThenMean(nn.Module):
    """Its "mean" is that over the examples, of the sums of their entries."""

    def __init__(self, reduction="mean"):
        super().__init__()
        self.reduction = reduction

    def forward(self, output, target):
        losses = (output - target).square()
        if self.reduction == "none":
            return losses
        return losses.sum() / (len(losses) if self.reduction == "mean" else 1)


class Mean(nn.MSELoss):
    """A loss of the user's own."""


def by_another_word(output, target, reduction="elementwise_mean"):
    losses = F.mse_loss(output, target, reduction="none")
    return losses if reduction == "none" else losses.mean()


OWN = {
    "a mean of sums": (SumThenMean(), torch.sum),
    "a sum": (SumThenMean("sum"), torch.sum),
    "a mean": (Mean(), torch.mean),
    "by another word": (by_another_word, torch.mean),
    "a default of none": (partial(partial(F.mse_loss, reduction="none"), reduction="mean"), torch.mean),
}


@pytest.mark.parametrize("name", OWN)
def test_the_value_of_a_loss_of_ones_own_tells_its_reduction(name):
    loss_fn, reduce = OWN[name]
    model = network()
    table = sweep(model, loss_fn, SOFT)
    truth = per_example(model.eval(), lambda m: m(inputs()), lambda f: reduce((f - SOFT).square(), 1))
    assert relative_error(table.loss, truth.loss) < 1e-12
    covariance = covariance_of(optimizer_of(model), model)
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-12


def test_a_reduction_that_nothing_tells_is_refused():
    def loss_fn(output, target, *, reduction):
        return F.mse_loss(output, target, reduction=reduction)

    with pytest.raises(ValueError, match=r"a reduction of its own.* use reduction='mean' or 'sum', as by functools.pa"):
        sweep(network(), loss_fn, SOFT)
    assert len(sweep(network(), partial(loss_fn, reduction="sum"), SOFT)) == N


def test_one_entry_needs_no_reduction():
    model = nn.Linear(5, 1).double()
    target = torch.randn(N, 1, dtype=torch.float64)
    for loss_fn in (nn.MSELoss(reduction="none"), nn.MSELoss(reduction="sum"), nn.MSELoss()):
        table = sweep(model, loss_fn, target)
        assert relative_error(table.loss, (model(inputs()) - target).square().squeeze(1).detach()) < 1e-12


@pytest.mark.parametrize(
    "loss_fn", [nn.CosineEmbeddingLoss(), nn.TripletMarginLoss(), F.margin_ranking_loss, F.ctc_loss, nn.CTCLoss()]
)
def test_a_loss_of_other_arguments_is_refused(loss_fn):
    with pytest.raises(ValueError, match=r"pass a callable \(output, target\) -> \[N\]"):
        sweep(network(), loss_fn)


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


def test_as_many_positions_as_examples_are_told_apart_after_batches_of_others():
    """The first batch, whose output shows it by its size, must not vouch for the second."""
    model = PositionsFirst().double()
    optimizer = optimizer_of(model)
    for length in (4, N):
        optimizer.zero_grad()
        output = model(torch.randn(N, length, 3, dtype=torch.float64))
        F.cross_entropy(output.permute(1, 2, 0), torch.zeros(N, length, dtype=torch.long)).backward()
        with pytest.raises(RuntimeError, match=r"examples first, as by output.transpose\(0, 1\)"):
            optimizer.sensitivities()


def test_as_many_classes_as_examples_are_no_other_axis():
    torch.manual_seed(0)
    model = nn.Linear(5, N).double()
    optimizer = optimizer_of(model)
    F.cross_entropy(model(inputs()), LABELS).backward()
    assert optimizer.sensitivities(examples=[0, 2]).residual.shape == (2, N)


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


@pytest.mark.parametrize("settings", [{"leverage": "exact"}, {"refined": True}])
def test_where_that_would_take_too_many_the_remedy_is_named(settings, monkeypatch):
    monkeypatch.setattr("vlearn.linearized.linearization.DIFFERENCES", 2)
    with pytest.raises(RuntimeError, match="pass leverage='probe' or leverage=None"):
        sweep(network(), multi_margin, **settings)


def test_the_leverage_of_many_outputs_without_a_second_derivative_is_unbiased(monkeypatch):
    """Of a loss whose curvature is negative in places: what is estimated is tr(ΛV) itself."""
    monkeypatch.setattr("vlearn.linearized.linearization.DIFFERENCES", 2)
    lengths, labels = torch.tensor([4, 3, 4]), torch.tensor([[1, 2], [2, 2], [1, 1]])

    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Linear(5, 3)

        def forward(self, x):
            return self.net(x).log_softmax(2)

    def rows(output, target):
        return F.ctc_loss(output.transpose(0, 1), target[0], target[1], torch.full((len(output),), 2), reduction="none")

    model = Scores().double()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    posterior = optimizer_of(model).posterior()
    wide = vlearn.sweep(
        model,
        posterior,
        [(x.repeat(400, 1, 1), (labels.repeat(400, 1), lengths.repeat(400)))],
        rows,
        generator=torch.Generator().manual_seed(0),
        progress=False,
    )
    probes = wide.leverage.reshape(400, 3)
    variance = torch.cat([posterior.variance[name].reshape(-1) for name in posterior.names])
    for n in range(3):
        parameters = list(model.parameters())
        output = model.eval()(x[n : n + 1])
        jacobian = torch.stack(
            [
                torch.cat([g.reshape(-1) for g in torch.autograd.grad(entry, parameters, retain_graph=True)])
                for entry in output.reshape(-1)
            ]
        )

        def residual(flat, n=n):
            leaf = flat.reshape(1, 4, 3).detach().requires_grad_()
            loss = rows(leaf, (labels[n : n + 1], lengths[n : n + 1])).sum()
            return torch.autograd.grad(loss, leaf)[0].reshape(-1)

        at, step = output.detach().reshape(-1), 1e-5
        moves = step * torch.eye(len(at)).double()
        hessian = torch.stack([(residual(at + move) - residual(at - move)) / (2 * step) for move in moves])
        exact = ((hessian + hessian.mT) / 2 * ((jacobian * variance) @ jacobian.mT)).sum()
        error = probes[:, n].std() / 400**0.5
        assert float((probes[:, n].mean() - exact).abs()) < 5 * float(error) + 1e-8


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
    rows = [(inputs().repeat(400, 1), target.repeat(400, 1))]  # each row has a probe of its own
    posterior, generator = optimizer_of(model).posterior(), torch.Generator().manual_seed(0)
    draws = vlearn.sweep(model, posterior, rows, loss_fn, leverage="probe", generator=generator, progress=False)
    error = (draws.leverage.reshape(400, N).mean(0) - exact).abs()
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
