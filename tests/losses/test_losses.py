"""Sensitivities are those of each example's own loss, whatever the training loss does to it."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.per_example import flat, moving, per_example, relative_error
from vlearn.losses.example_loss import ExampleLoss
from vlearn.losses.output_hessian import hessian_probe, hessian_root, output_hessian

N, D, C = 6, 5, 3
CLASS_WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])
SOFT = torch.tensor([[0.2, 0.5, 0.3]] * N, dtype=torch.float64)
REAL = torch.linspace(-2, 2, N * C, dtype=torch.float64).reshape(N, C)
YES_NO = (REAL > 0).double()

# name: (loss with a reduction argument, target, sum of what the mean divides by)
LOSSES = {
    "cross entropy": (F.cross_entropy, LABELS, N),
    "label smoothing": (partial(F.cross_entropy, label_smoothing=0.2), LABELS, N),
    "class weights": (partial(F.cross_entropy, weight=CLASS_WEIGHTS), LABELS, CLASS_WEIGHTS[LABELS].sum().item()),
    "soft targets": (F.cross_entropy, SOFT, N),
    "ignored targets": (F.cross_entropy, torch.tensor([0, -100, 2, 2, -100, 0]), 4),
    "squared error": (F.mse_loss, REAL, N),
    "binary": (F.binary_cross_entropy_with_logits, YES_NO, N),
    "binary with weights": (partial(F.binary_cross_entropy_with_logits, pos_weight=CLASS_WEIGHTS), YES_NO, N),
    "poisson": (F.poisson_nll_loss, REAL.abs().round(), N),
    "gaussian of a fixed variance": (partial(F.gaussian_nll_loss, var=torch.full((N, C), 0.3).double()), REAL, N),
    "huber": (partial(F.huber_loss, delta=0.7), REAL, N),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)).double()


def inputs():
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def own_rows(loss, target):
    return lambda output: loss(output, target, reduction="none").reshape(N, -1).mean(1)


def covariance_of(optimizer, model):
    return torch.diag(flat({name: optimizer.posterior().variance[name] for name in moving(model)}))


def truth_at_the_draw(model, x, rows):
    twin = network()
    with torch.no_grad():
        for theirs, p in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.copy_(p)
    return per_example(twin, lambda m: m(x), rows)


def assert_live(optimizer, model, truth, tolerance=1e-10):
    s = optimizer.sensitivities(deviation=True)
    covariance = covariance_of(optimizer, model)
    assert relative_error(s.residual, truth.residual) < tolerance
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < tolerance
    assert relative_error(s.deviation, truth.deviation(covariance)) < tolerance


@pytest.mark.parametrize(
    ("name", "reduction"),
    [(name, reduction) for name in LOSSES for reduction in ("sum", "callable")]
    + [(name, "mean") for name, (_, _, denominator) in LOSSES.items() if denominator == N],
)
def test_live_rows_do_not_depend_on_the_reduction(name, reduction):
    loss, target, denominator = LOSSES[name]
    model, x = network(), inputs()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    if reduction == "sum":
        optimizer.watch(model, loss_reduction="sum")
        total = own_rows(loss, target)(model(x)).sum()
    elif reduction == "callable":
        optimizer.watch(model, loss_reduction=lambda: denominator)
        total = loss(model(x), target)
    else:
        total = loss(model(x), target)
    total.backward()
    assert_live(optimizer, model, truth_at_the_draw(model, x, own_rows(loss, target)))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("form", ["function", "callable"])
def test_sweep_undoes_the_reduction(name, form):
    loss, target, _ = LOSSES[name]
    model, x = network(), inputs()
    truth = per_example(model, lambda m: m(x), own_rows(loss, target))
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    rows = own_rows(loss, target)
    loss_fn = loss if form == "function" else lambda output, _: rows(output)
    table = vlearn.sweep(model, optimizer.posterior(), [(x, target)], loss_fn, "exact", progress=False)
    covariance = covariance_of(optimizer, model)
    change = truth.deviation(covariance)
    assert relative_error(table.loss, truth.loss) < 1e-10
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(table.deviation, change) < 1e-10
    assert relative_error(table.loo_loss, rows(truth.output + change)) < 1e-10
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-10


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.CrossEntropyLoss(), "cross entropy"),
        (nn.CrossEntropyLoss(weight=CLASS_WEIGHTS), "class weights"),
        (nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum"), "label smoothing"),
        (nn.MSELoss(), "squared error"),
        (nn.BCEWithLogitsLoss(), "binary"),
        (nn.PoissonNLLLoss(), "poisson"),
        (nn.HuberLoss(delta=0.7), "huber"),
    ],
)
def test_a_loss_module_is_read_without_its_reduction_and_left_with_it(module, name):
    loss, target, _ = LOSSES[name]
    reduction, output = module.reduction, inputs()[:, :C]
    assert torch.equal(ExampleLoss(module)(output, target), own_rows(loss, target)(output))
    assert module.reduction == reduction


@pytest.mark.parametrize("loss_fn", [nn.GaussianNLLLoss(), F.gaussian_nll_loss], ids=["module", "function"])
def test_a_gaussian_loss_takes_mean_and_variance_from_the_model(loss_fn):
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            output = self.net(x)
            return output[:, 0], F.softplus(output[:, 1])

    torch.manual_seed(0)
    model, x, y = Head(), inputs(), REAL[:, 0]

    def rows(output):
        return F.gaussian_nll_loss(output[:, 0], y, F.softplus(output[:, 1]), reduction="none")

    truth = per_example(model, lambda m: m.net(x), rows)
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    loader = [(x, y)]
    table = vlearn.sweep(model, optimizer.posterior(), loader, loss_fn, None, output=0, progress=False)
    covariance = covariance_of(optimizer, model)
    assert relative_error(table.loss, truth.loss) < 1e-10
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(table.deviation, truth.deviation(covariance)[:, 0]) < 1e-10
    with pytest.raises(ValueError, match=r"a Gaussian loss of a model that gives Tensor, but it needs \(mean, var"):
        vlearn.sweep(model.net, optimizer.posterior(), loader, loss_fn, None, progress=False)


def test_class_weights_under_a_mean_loss_need_the_sum_of_the_weights():
    """The factor N / Σ w that loss_reduction="mean" gets wrong, as the warning says."""
    loss, target, denominator = LOSSES["class weights"]
    model, x = network(), inputs()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    loss(model(x), target).backward()
    truth = truth_at_the_draw(model, x, own_rows(loss, target))
    with pytest.warns(UserWarning, match="the loss weighs the classes"):
        rows = optimizer.sensitivities()
    assert relative_error(rows.residual, truth.residual * N / denominator) < 1e-10


def test_every_token_of_an_example_counts_when_the_denominator_is_the_number_of_tokens():
    torch.manual_seed(0)
    x, y = torch.randn(4, 7, D, dtype=torch.float64), torch.randint(C, (4, 7))
    y[0, 3:] = y[2, :5] = -100

    def build():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)).double()

    model, twin = build(), build()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    optimizer.watch(model, loss_reduction=lambda: int((y != -100).sum()))
    F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
    with torch.no_grad():
        for theirs, p in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.copy_(p)
    truth = per_example(twin, lambda m: m(x), lambda f: F.cross_entropy(f.mT, y, reduction="none").sum(1))
    covariance = covariance_of(optimizer, model)
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation.flatten(1), truth.deviation(covariance)) < 1e-10


@pytest.mark.parametrize("scale", [0.25, 65536.0, lambda: 1e-3])
def test_the_loss_scale_is_undone(scale):
    model, x = network(), inputs()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    optimizer.watch(model, loss_scale=scale)
    (F.cross_entropy(model(x), LABELS) * (scale() if callable(scale) else scale)).backward()
    assert_live(optimizer, model, truth_at_the_draw(model, x, own_rows(F.cross_entropy, LABELS)))


def test_accumulation_gives_the_rows_of_the_last_micro_batch():
    model, x = network(), inputs()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    optimizer.watch(model, loss_scale=lambda: 1 / 3)
    for part in torch.arange(N).chunk(3):
        (F.cross_entropy(model(x[part]), LABELS[part]) / 3).backward()
    truth = truth_at_the_draw(model, x, own_rows(F.cross_entropy, LABELS))
    s = optimizer.sensitivities()
    assert relative_error(s.residual, truth.residual[-2:]) < 1e-10
    assert relative_error(s.self_influence, truth.self_influence(covariance_of(optimizer, model))[-2:]) < 1e-10


def test_a_gradient_scaler_is_read_at_backward_and_clipping_does_not_matter():
    model, x = network(), inputs()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    optimizer.watch(model, loss_scale=scaler.get_scale)
    scaler.scale(F.cross_entropy(model(x), LABELS)).backward()
    truth = truth_at_the_draw(model, x, own_rows(F.cross_entropy, LABELS))
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2048
    assert_live(optimizer, model, truth)


def test_autocast_is_near_the_full_precision():
    model, x = network().float(), inputs().float()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(x)
        loss = F.cross_entropy(output.float(), LABELS)
    loss.backward()
    truth = truth_at_the_draw(model.double(), x.double(), own_rows(F.cross_entropy, LABELS))
    model.float()
    s = optimizer.sensitivities(deviation=True)
    covariance = covariance_of(optimizer, model).double()
    assert s.self_influence.dtype == torch.float32
    assert relative_error(s.self_influence.double(), truth.self_influence(covariance)) < 0.05
    assert relative_error(s.deviation.double(), truth.deviation(covariance)) < 0.05


@pytest.mark.parametrize("name", LOSSES)
def test_the_root_of_the_curvature_squares_to_it(name):
    loss, target, _ = LOSSES[name]
    output = inputs()[:, :C].requires_grad_()
    rows = own_rows(loss, target)(output)
    (residual,) = torch.autograd.grad(rows.sum(), output, create_graph=True)
    hessian = output_hessian(residual, output)
    root = hessian_root(hessian, output)
    assert relative_error(root @ root.mT, hessian) < 1e-12


@pytest.mark.parametrize("seed", range(4))
def test_the_probe_of_an_example_between_two_classes_is_exact(seed):
    """Λ has rank one, so that signs square away; with the symmetric root the probe would be double or nothing."""

    def residual(scores):
        return torch.autograd.grad(F.cross_entropy(scores, torch.tensor([1])), scores, create_graph=True)[0]

    scores = torch.full((1, 4), -60.0, dtype=torch.float64)
    scores[0, [1, 3]] = torch.tensor([0.3, 0.9], dtype=torch.float64)
    scores.requires_grad_()
    zero = torch.zeros_like(scores, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    found, is_clipped = hessian_probe(residual(scores), scores, lambda: (residual(zero), zero), generator)
    (probe,) = found
    assert not bool(is_clipped)
    p = scores.detach()[0].softmax(0)
    difference = torch.tensor([0.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    assert relative_error(torch.outer(probe, probe), p[1] * p[3] * torch.outer(difference, difference)) < 1e-12


def test_a_loss_without_second_derivative_is_swept_without_leverage():
    model = network()
    posterior = vlearn.IVON(model, lr=0.1, ess=100).posterior()
    table = vlearn.sweep(model, posterior, [(inputs(), LABELS)], F.multi_margin_loss, leverage=None, progress=False)
    assert torch.equal(table.loss, F.multi_margin_loss(model.eval()(inputs()), LABELS, reduction="none"))


def test_the_curvature_of_a_confident_example_keeps_its_digits():
    """p(1 - p) of order 1e-12: an eigendecomposition would lose the vanishing part to rounding."""
    output = torch.tensor([[30.0, 0.0, 1.0], [0.0, 0.5, 1.0]], dtype=torch.float64, requires_grad=True)
    (residual,) = torch.autograd.grad(
        F.cross_entropy(output, torch.tensor([0, 1]), reduction="sum"), output, create_graph=True
    )
    hessian = output_hessian(residual, output)
    root = hessian_root(hessian, output)
    assert relative_error((root @ root.mT)[0], hessian[0].detach()) < 1e-6


def test_the_curvature_of_a_loss_linear_in_the_output_is_zero():
    output = inputs().requires_grad_()
    (residual,) = torch.autograd.grad((output * 3).sum(), output, create_graph=True)
    assert torch.equal(output_hessian(residual, output), torch.zeros(N, D, D, dtype=torch.float64))


def test_a_probe_is_right_of_a_loss_that_has_no_value_at_zeros():
    """-log p_y of a model that ends in softmax: its curvature is 1/p_y² in the label's direction alone."""

    def residual(p):
        return torch.autograd.grad(F.nll_loss(p.log(), LABELS, reduction="sum"), p, create_graph=True)[0]

    p, zero = inputs()[:, :C].softmax(1).requires_grad_(), torch.zeros(N, C, dtype=torch.float64, requires_grad=True)
    probe, is_clipped = hessian_probe(residual(p), p, lambda: (residual(zero), zero))
    assert not is_clipped.any()
    truth = F.one_hot(LABELS, C) / p.detach()
    torch.testing.assert_close(probe.abs(), truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rotated", [False, True])
def test_a_probe_tells_which_examples_curve_downwards(rotated):
    """Rotated outputs take the path of dense matrices, others that of diagonal ones."""
    turn = torch.linalg.qr(inputs()[:3, :3])[0] if rotated else torch.eye(3, dtype=torch.float64)
    factors = torch.tensor([[2.0, 1.0, 0.0], [2.0, -1.0, 0.0]], dtype=torch.float64)

    def residual(output):
        return torch.autograd.grad((factors * (output @ turn).square()).sum() / 2, output, create_graph=True)[0]

    output, zero = (torch.ones(2, 3, dtype=torch.float64, requires_grad=True) * k for k in (1, 0))
    found = [hessian_probe(residual(output), output, lambda: (residual(zero), zero)) for _ in range(2000)]
    assert all(is_clipped.tolist() == [False, True] for _, is_clipped in found)
    u = torch.stack([u for u, _ in found])
    products = u.unsqueeze(3) * u.unsqueeze(2)
    truth = turn @ torch.diag_embed(factors.clamp_min(0)) @ turn.T
    assert bool(((products.mean(0) - truth).abs() <= 5 * products.std(0) / 2000**0.5 + 1e-9).all())


def test_negative_curvature_is_dropped_from_the_leverage():
    hessian = torch.diag_embed(torch.tensor([[2.0, -1.0, 0.0]], dtype=torch.float64))
    root = hessian_root(hessian, torch.zeros(1, 3, dtype=torch.float64))
    assert torch.allclose(root @ root.mT, torch.diag_embed(torch.tensor([[2.0, 0.0, 0.0]], dtype=torch.float64)))
