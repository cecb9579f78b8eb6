"""Identities that hold whatever the numbers are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import CASES, Model
from tests.oracles.per_example import flat, moving, per_example, relative_error

OTHER_LOSSES = (
    "output_per_position",
    "output_without_class_axis",
    "penalty_in_the_model_output_only",
    "logits_written_in_place",
    "regression_with_two_targets",
    "several_labels_at_once",
    "language_model_with_tied_embeddings",
    "transformer_with_low_rank_adapters",
)
CROSS_ENTROPY = [name for name in CASES if name not in OTHER_LOSSES]
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def rows_of(case):
    return lambda output: F.cross_entropy(output, case.target, reduction="none")


def full_posterior(case, prior_precision):
    """The exact GGN + δI, and the oracle it came from."""
    truth = per_example(case.model.eval(), case.call, rows_of(case))
    mean = {name: p.detach() for name, p in moving(case.model).items()}
    precision = truth.ggn() + prior_precision * torch.eye(truth.gradients.shape[1], dtype=torch.float64)
    return truth, precision, vlearn.posterior.Full(mean, precision, num_data=len(case.target))


def sweep_of(case, posterior, leverage="exact", **arguments):
    loader = [(case.x, case.target)]
    return vlearn.sweep(case.model, posterior, loader, case.loss, leverage, progress=False, **arguments)


@pytest.mark.parametrize("name", CROSS_ENTROPY)
def test_residual_times_deviation_is_the_self_influence(name):
    """Both come from separate passes: Σ over the layers' rows, and one forward-mode pass through the model."""
    case = CASES[name]()
    posterior = vlearn.IVON(case.model, lr=0.1, ess=100).posterior()
    table = sweep_of(case, posterior, leverage=None)
    output = case.call(case.model.eval()).detach()
    residual = output.softmax(1) - F.one_hot(case.target, output.shape[1])
    assert relative_error((residual * table.deviation).sum(1), table.self_influence) < 1e-10

    # first-order change of the probabilities sums to zero, and the loss grows by at least its first order
    p = output.softmax(1)
    change = p * table.deviation - p * (p * table.deviation).sum(1, keepdim=True)  # Δp = ΛVe
    assert float(change.sum(1).abs().max()) < 1e-14
    assert bool((table.self_influence >= 0).all())
    assert bool((table.loo_loss - table.loss >= table.self_influence * (1 - 1e-12)).all())


@pytest.mark.parametrize("name", ["mlp", "linear_used_twice", "weight_shared_by_two_layers", "grouped_convolution"])
@pytest.mark.parametrize("prior_precision", [0.1, 5.0])
def test_full_leverages_sum_to_the_effective_number_of_parameters(name, prior_precision):
    case = CASES[name]()
    _, precision, posterior = full_posterior(case, prior_precision)
    table = sweep_of(case, posterior)
    effective = len(precision) - prior_precision * float(torch.linalg.inv(precision).trace())
    assert float(table.leverage.sum()) == pytest.approx(effective, rel=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "linear_on_sequences",
        "linear_used_three_times_on_different_lengths",
        "embedding_tied_with_the_output_layer",
        "weight_used_by_its_module_and_outside_it",
        "convolution_with_stride",
        "grouped_convolution_with_stride_and_dilation",
        "convolution_whose_output_is_1x1",
        "layer_norm_on_sequences",
        "attention",
        "layer_registered_twice",
        "parameter_of_no_dimension",
        "keyword_inputs",
    ],
)
def test_a_dense_covariance_equals_per_example_autograd(name):
    case = CASES[name]()
    truth, precision, posterior = full_posterior(case, 0.5)
    covariance = torch.linalg.inv(precision)
    table = sweep_of(case, posterior)
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-10
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-10
    assert relative_error(table.loo_loss, rows_of(case)(truth.output + truth.deviation(covariance))) < 1e-10


def test_a_dense_covariance_does_not_depend_on_the_order_of_its_rows():
    case = CASES["mlp"]()
    truth, precision, posterior = full_posterior(case, 0.5)
    names = list(posterior.mean)
    blocks = dict(
        zip(names, torch.arange(len(precision)).split([posterior.mean[n].numel() for n in names]), strict=True)
    )
    order = torch.cat([blocks[name] for name in reversed(names)])
    mean = {name: posterior.mean[name] for name in reversed(names)}
    turned = vlearn.posterior.Full(mean, precision[order][:, order], num_data=4)
    assert relative_error(sweep_of(case, turned).deviation, sweep_of(case, posterior).deviation) < 1e-10


def test_the_refined_form_of_one_output_is_cooks_formula():
    """For one output, Δf = Ve/(1 - ΛV): leverage and deviation are all it needs."""
    model = Model(lambda m, x: m.fc(x).squeeze(1), fc=nn.Linear(3, 1, bias=False)).double()
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0.0, 1, 1, 0, 1, 0], dtype=torch.float64)
    optimizer = vlearn.IVON(model, lr=0.1, ess=6)
    table = vlearn.sweep(
        model, optimizer.posterior(), [(x, y)], F.binary_cross_entropy_with_logits, "exact", progress=False
    )
    p = model.eval()(x).detach().sigmoid()
    v = (x.square() @ optimizer.posterior().variance["fc.weight"].mT).squeeze(1)
    assert relative_error(table.leverage, p * (1 - p) * v) < 1e-12
    assert relative_error(table.deviation, v * (p - y)) < 1e-12


def test_scaling_the_number_of_examples_scales_every_first_order_quantity():
    found = []
    for num_data in (10, 1000):
        case = CASES["mlp"]()
        found.append(sweep_of(case, vlearn.IVON(case.model, lr=0.1, ess=7, num_data=num_data).posterior()))
    for name in ("self_influence", "deviation", "leverage"):
        assert relative_error(getattr(found[0], name), 100 * getattr(found[1], name)) < 1e-12


def test_self_influence_is_the_change_of_the_own_loss_under_a_small_step():
    """ℓ_i(θ + εΣg_i) - ℓ_i(θ) = ε·self-influence + O(ε²): the sign is that of removal."""
    case = CASES["layer_norm"]()
    posterior = vlearn.IVON(case.model, lr=0.1, ess=50).posterior()
    table = sweep_of(case, posterior)
    truth = per_example(case.model.eval(), case.call, rows_of(case))
    variance = flat({name: posterior.variance[name] for name in moving(case.model)})
    size = 1e-6
    for i in range(len(case.target)):
        moved = CASES["layer_norm"]().model.eval()
        nn.utils.vector_to_parameters(
            nn.utils.parameters_to_vector(moved.parameters()) + size * variance * truth.gradients[i], moved.parameters()
        )
        output = case.call(moved).detach()
        change = (rows_of(case)(output)[i] - table.loss[i]) / size
        assert float(change) == pytest.approx(float(table.self_influence[i]), rel=1e-4)
        assert relative_error((output[i] - truth.output[i]) / size, table.deviation[i]) < 1e-4


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (F.cross_entropy, torch.arange(8) % 3),
        (lambda f, t, reduction: F.cross_entropy(f, t, label_smoothing=0.1, reduction=reduction), torch.arange(8) % 3),
        (F.mse_loss, torch.zeros(8, 3, dtype=torch.float64)),
    ],
    ids=["cross entropy", "label smoothing", "squared error"],
)
def test_the_probe_is_unbiased(loss, target):
    """400 probes of each example's leverage, within 5 standard errors of the exact one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    posterior = vlearn.IVON(model, lr=0.1, ess=20).posterior()
    x = torch.randn(8, 5, dtype=torch.float64)
    exact = vlearn.sweep(model, posterior, [(x, target)], loss, "exact", progress=False).leverage
    generator, repeats = torch.Generator().manual_seed(1), 400
    loader = [(x.repeat(50, 1), target.repeat(50, *[1] * (target.dim() - 1)))] * (repeats // 50)
    probes = vlearn.sweep(model, posterior, loader, loss, "probe", progress=False, generator=generator).leverage
    probes = probes.reshape(repeats, 8)
    error = probes.std(0) / repeats**0.5
    assert bool(((probes.mean(0) - exact).abs() < 5 * error).all())
    assert bool((probes >= 0).all())


def test_curvature_downwards_counts_in_the_leverage():
    """Cauchy noise, exact and refined by hand, probed on average."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(24, 3).double(), torch.randn(24).double()

    def loss(output, target):
        return torch.log1p((output.sum(1) - target).square()) + output[:, 1].square() / 10

    def swept(leverage="exact", **options):
        return vlearn.sweep(model, posterior, [(x, y)], loss, leverage, progress=False, **options)

    options = {"curvature": "ggn-exact", "prior_precision": 9.0, "progress": False}
    posterior = vlearn.posterior.fit(model, [(x, y)], loss, "full", **options)
    with torch.no_grad():
        hessian = torch.func.vmap(torch.func.hessian(lambda f, t: loss(f[None], t[None])[0]))(model(x), y)
    exact = swept(variance=True)
    truth = torch.einsum("ncd,ndc->n", hessian, exact.function_variance)
    assert bool((truth < -0.01).any())
    assert relative_error(exact.leverage, truth) < 1e-10
    assert relative_error(swept(refined=True).leverage, truth) < 1e-10
    trace = sum(float(each.sum()) for each in posterior.variance.values())
    assert float(exact.leverage.sum()) == pytest.approx(8 - 9 * trace, rel=1e-10)
    generator = torch.Generator().manual_seed(0)
    probed = torch.stack([swept("probe", generator=generator).leverage for _ in range(100)])
    assert bool(((probed.mean(0) - truth).abs() <= 5 * probed.std(0) / 10 + 1e-9).all())
