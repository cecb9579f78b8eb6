"""Live and swept sensitivities equal explicit per-example gradients and Jacobians, for every kind of layer use."""

import pytest
import torch
import torch.nn.functional as F

import vlearn
from tests.oracles.networks import CASES
from tests.oracles.networks.whole import WHOLE
from tests.oracles.per_example import by_functorch, flat, moving, per_example, relative_error

NUM_DATA, WEIGHT_DECAY = 50.0, 0.02
TOLERANCE = 1e-10
# A block that is given another module as an argument sees the mean in it once the step has been taken.
HANDED_OVER = "layer_handed_to_a_block"

SLOW = {
    "resnet20_with_filter_response_norm",
    "language_model_with_tied_embeddings",
    "transformer_with_low_rank_adapters",
    "encoder_of_torch_nn",
}
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def with_uneven_state(model, **arguments):
    """An IVON whose Hessian differs between entries, and whose noise leaves torch's own generator alone."""
    arguments = {"lr": 0.1, "ess": NUM_DATA, "weight_decay": WEIGHT_DECAY, **arguments}
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    optimizer = vlearn.IVON(model, generator=generator, **arguments)
    optimizer.posterior()
    for state in optimizer.state.values():
        state["hessian"].uniform_(0.5, 3.0)
    return optimizer


def covariance_of(optimizer, model):
    """Dense Σ of the moving parameters, from the optimizer's state by hand."""
    by_name = {name: optimizer.state[p]["hessian"] for name, p in moving(model).items()}
    return torch.diag(1 / (NUM_DATA * (flat(by_name) + WEIGHT_DECAY)))


def rows_of(case):
    """The case's loss of each example."""

    def loss(output):
        rows = case.loss(output, case.target, reduction="none")
        return rows.reshape(len(rows), -1).mean(1)

    return loss


def error(value, truth):
    return relative_error(value.reshape(len(value), -1), truth.reshape(len(truth), -1))


@pytest.mark.parametrize("name", NAMES)
def test_live_equals_per_example_autograd(name):
    case = CASES[name]()
    twin = CASES[name]().model
    optimizer = with_uneven_state(case.model)
    case.model.train()
    for module in case.model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()
    twin.train(), [m.train(case.model.get_submodule(n).training) for n, m in twin.named_modules()]
    torch.manual_seed(3)
    case.loss(case.call(case.model), case.target).backward()
    with torch.no_grad():
        for theirs, p in zip(twin.parameters(), case.model.parameters(), strict=True):
            theirs.copy_(p)  # the draw
    torch.manual_seed(3)
    truth = per_example(twin, case.call, rows_of(case))
    before = covariance_of(optimizer, case.model)
    found = [(optimizer.sensitivities(deviation=True), before)]
    optimizer.step()
    if name == HANDED_OVER:
        with pytest.raises(RuntimeError):
            optimizer.sensitivities()
    else:
        found.append((optimizer.sensitivities(deviation=True), covariance_of(optimizer, case.model)))
    for s, covariance in found:
        assert error(s.residual, truth.residual) < TOLERANCE
        assert error(s.self_influence, truth.self_influence(covariance)) < TOLERANCE
        assert error(s.deviation, truth.deviation(covariance)) < TOLERANCE
        assert (
            error(s.prediction_error, truth.residual.reshape(len(truth.residual), -1).norm(dim=1) / 2**0.5) < TOLERANCE
        )
        assert s.residual.shape == s.deviation.shape == truth.residual.shape


@pytest.mark.parametrize("name", NAMES)
def test_sweep_equals_per_example_autograd(name):
    case = CASES[name]()
    twin = CASES[name]().model.eval()
    truth = per_example(twin, case.call, rows_of(case))
    optimizer = with_uneven_state(case.model)
    covariance = covariance_of(optimizer, case.model)
    index = torch.randperm(len(case.target))
    table = vlearn.sweep(
        case.model, optimizer.posterior(), [(case.x, case.target, index)], case.loss, leverage="exact", progress=False
    )
    change = truth.deviation(covariance)
    assert error(table.loss[index], truth.loss) < TOLERANCE
    assert error(table.self_influence[index], truth.self_influence(covariance)) < TOLERANCE
    assert error(table.deviation[index], change) < TOLERANCE
    assert error(table.loo_loss[index], rows_of(case)(truth.output + change.reshape(truth.output.shape))) < TOLERANCE
    assert error(table.leverage[index], truth.leverage(covariance)) < TOLERANCE
    norms = truth.residual.reshape(len(truth.residual), -1).norm(dim=1)
    assert error(table.prediction_error[index], norms / 2**0.5) < TOLERANCE
    assert torch.equal(table.index, torch.arange(len(index)))


def test_the_oracle_agrees_with_functorch():
    case = CASES["mlp"]()
    truth = per_example(case.model, case.call, rows_of(case))
    variance = torch.rand(truth.gradients.shape[1], dtype=torch.float64)

    def loss(output, target):
        return F.cross_entropy(output, target, reduction="none")

    influence, change = by_functorch(case.model, case.x, case.target, loss, variance)
    assert error(influence, truth.self_influence(torch.diag(variance))) < 1e-13
    assert error(change, truth.deviation(torch.diag(variance))) < 1e-13


def test_the_whole_models_are_of_twelve_kinds():
    assert len(WHOLE) == 12 and set(WHOLE) <= set(CASES)
