import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev, vmap

pytest.importorskip("laplace")

from benchmarks import fidelity
from benchmarks.fidelity import BY_LAPLACE, SETTINGS
from benchmarks.problems.digits import Digits
from benchmarks.training.digits import sweep
from benchmarks.training.digits_minimum import minimum_of
from tests.oracles.kronecker import assembled, block_precision, parameter_order
from tests.oracles.per_example import PerExample, relative_error
from vlearn.posterior import Diagonal

EXACT = ("full", "block-diagonal by layer", "EK-FAC", "K-FAC", "diagonal")


def softmax_classifier(model, x, y):
    """The truth about every example; Jacobians by torch.func, residual and Λ in closed form."""
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def one(values, row):
        return functional_call(model, values, (row[None],))[0]

    jacobian = vmap(jacrev(one), (None, 0))(weights, x)
    jacobian = torch.cat([part.flatten(2) for part in jacobian.values()], 2)
    with torch.no_grad():
        output = model(x)
    p = output.softmax(1)
    residual = p - F.one_hot(y, p.shape[1])
    return PerExample(
        output=output,
        loss=F.cross_entropy(output, y, reduction="none"),
        residual=residual,
        hessian=torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1),
        gradients=torch.einsum("ncp,nc->np", jacobian, residual),
        jacobian=jacobian,
    )


def dense_precisions(truth: PerExample, inputs, model, delta):
    """Every structure's Σ⁻¹ from its definition and the dense per-example Jacobians, J_nᵀ R_n in float64."""
    n = len(truth.output)
    values, vectors = torch.linalg.eigh(truth.hessian)
    roots = torch.einsum("ncp,ncd->ndp", truth.jacobian, vectors * values.clamp_min(0).sqrt().unsqueeze(1))
    ggn = roots.flatten(0, 1).T @ roots.flatten(0, 1)
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    names = list(sizes)
    prior = delta * torch.eye(len(ggn), dtype=torch.float64)
    found = {"full": ggn + prior, "diagonal": torch.diag(ggn.diagonal()) + prior}
    blocks = {"block-diagonal by layer": {}, "K-FAC": {}, "EK-FAC": {}}
    for i, a in enumerate(inputs):
        layer = (names[2 * i], names[2 * i + 1])
        start = sum(sizes[name] for name in names[: 2 * i])
        span = slice(start, start + sum(sizes[name] for name in layer))
        shapes = [model.get_parameter(name).shape for name in layer]
        order = parameter_order(shapes)
        a = torch.cat([a, torch.ones(n, 1, dtype=torch.float64)], 1)
        b = roots[:, :, span][:, :, -shapes[1][0] :].flatten(0, 1)  # the bias' gradients are those of the outputs
        covariances = a.T @ a / n, b.T @ b / n
        blocks["block-diagonal by layer"][layer] = found["full"][span, span]
        blocks["K-FAC"][layer] = block_precision(*covariances, shapes, n, delta / n)
        basis = torch.kron(*(torch.linalg.eigh(c)[1] for c in covariances[::-1]))
        gradients = torch.empty_like(roots[:, :, span])
        gradients[..., order] = roots[:, :, span]  # [weight, bias] row by row, as torch.kron has it
        second_moment = (gradients @ basis).square().sum(1).mean(0)
        whole = basis @ torch.diag(n * second_moment + delta) @ basis.T
        blocks["EK-FAC"][layer] = whole[order][:, order]
    return found | {name: assembled(names, sizes, parts) for name, parts in blocks.items()}


def assert_exact(model, data, delta, tolerance):
    """Every structure's V e is that of its dense Σ."""
    x = data.x.double()
    ivon = Diagonal.from_precision(
        dict(model.named_parameters()), {n: torch.ones_like(p) for n, p in model.named_parameters()}, len(x)
    )
    posteriors = fidelity.posteriors(model, data, delta, ivon)
    truth = softmax_classifier(model, x, data.y)
    with torch.no_grad():
        inputs = [x.flatten(1), model[:3](x)]
    precisions = dense_precisions(truth, inputs, model, delta)
    tables = {name: sweep(model, posterior, data, leverage=None) for name, posterior in posteriors.items()}
    for name in EXACT:
        moves = truth.gradients @ torch.linalg.inv(precisions[name])
        expected = torch.einsum("ncp,np->nc", truth.jacobian, moves)
        assert relative_error(tables[name].deviation, expected) < tolerance, name
    return {name: table.loo_loss.mean().item() for name, table in tables.items()}


def digits(count, features=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 1, features // 8, 8, generator=generator)
    y = torch.randint(0, 10, (count,), generator=generator)
    return Digits(x, y, x, y)


def test_every_structures_deviation_is_that_of_its_dense_covariance():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 10)).double()
    assert_exact(model, digits(30, features=16), 2.0, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delta", "losses", "published"),
    [
        (1.0, {"train": 0.032, "test": 0.108}, {"full": 0.050, "EK-FAC": 0.102, "K-FAC": 0.108}),
        (5.0, {"train": 0.134, "test": 0.188}, {"full": 0.173, "EK-FAC": 0.209, "K-FAC": 0.211}),
    ],
)
def test_at_a_minimum_kfac_predicts_the_test_loss_and_a_diagonal_does_not(delta, losses, published):
    """Mean leave-one-out losses within a tenth of the values that the structures were first compared with."""
    settings = dataclasses.replace(SETTINGS, prior_precision=delta, epochs=80)  # L-BFGS goes on from there
    data = Digits.load(settings, standardised=False)
    _, minimum, model, _ = minimum_of(settings, data)
    assert minimum.converged
    with torch.no_grad():
        train = F.cross_entropy(model(data.x.double()), data.y).item()
        test = F.cross_entropy(model(data.x_test.double()), data.y_test).item()
    assert train == pytest.approx(losses["train"], rel=0.1) and test == pytest.approx(losses["test"], rel=0.1)
    found = assert_exact(model, data, delta, 1e-8)
    for name, value in published.items():
        assert found[name] == pytest.approx(value, rel=0.1), name
    for name in ("K-FAC", "EK-FAC", BY_LAPLACE):
        assert found[name] == pytest.approx(test, rel=0.2), name
    assert found["diagonal"] > 1.75 * test
