"""Each comparison measure equals its published formula from explicit gradients and Jacobians."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.oracles.networks import CASES
from tests.oracles.per_example import flat, moving, per_example, relative_error
from tests.oracles.refits import ridge
from tests.sensitivity.test_closed_form import half_square
from tests.sensitivity.test_influence import LABELS, inputs, network
from tests.sensitivity.test_refined import regression
from vlearn.sensitivity import measures

LOADER = [(inputs(), LABELS)]


def dense_posterior(model, prior_precision=1.0):
    truth = per_example(model.eval(), lambda m: m(inputs()), lambda f: F.cross_entropy(f, LABELS, reduction="none"))
    precision = truth.ggn() + prior_precision * torch.eye(truth.gradients.shape[1], dtype=torch.float64)
    mean = {name: p.detach() for name, p in moving(model).items()}
    return truth, precision, vlearn.posterior.Full(mean, precision, num_data=12)


def test_cooks_distance_of_linear_regression_is_that_of_the_refits():
    x, y, model, posterior, _ = regression()
    found = measures.cooks_distance(model, posterior, [(x, y)], half_square)
    precision = x.mT @ x + torch.eye(5, dtype=torch.float64)
    for i in range(40):
        keep = torch.arange(40) != i
        move = ridge(x[keep], y[keep, 0], 1.0) - model.weight.detach().squeeze(0)
        assert float(found[i]) == pytest.approx(float(move @ precision @ move) / 5, rel=1e-9)


def test_cooks_distance_of_a_network_equals_dense_algebra():
    model = network(nn.LayerNorm(8))
    truth, precision, posterior = dense_posterior(model)
    v, identity = truth.output_covariance(torch.linalg.inv(precision)), torch.eye(3, dtype=torch.float64)
    inner = torch.linalg.solve(identity - truth.hessian @ v, truth.residual)
    expected = torch.einsum("nc,ncd,nd->n", inner, v, inner) / len(precision)
    assert relative_error(measures.cooks_distance(model, posterior, LOADER, F.cross_entropy), expected) < 1e-9
    first_order = truth.self_influence(torch.linalg.inv(precision)) / len(precision)
    low = measures.cooks_distance(model, posterior, LOADER, F.cross_entropy, threshold=1e-9)
    assert relative_error(low, first_order) < 1e-9


def test_the_influence_norm_is_the_length_of_the_move():
    model = network(nn.LayerNorm(8))
    truth, precision, posterior = dense_posterior(model)
    expected = (truth.gradients @ torch.linalg.inv(precision)).norm(dim=1)
    assert relative_error(measures.influence_norm(model, posterior, LOADER, F.cross_entropy), expected) < 1e-10
    diagonal = vlearn.IVON(model, lr=0.1, ess=50).posterior()
    variance = flat({name: diagonal.variance[name] for name in moving(model)})
    found = measures.influence_norm(model, diagonal, LOADER, F.cross_entropy)
    assert relative_error(found, (truth.gradients * variance).norm(dim=1)) < 1e-10


def test_memorization_is_the_fall_of_the_labels_probability():
    model = network()
    truth, precision, posterior = dense_posterior(model)
    after = truth.output + truth.deviation(torch.linalg.inv(precision))
    expected = (truth.output.softmax(1) - after.softmax(1))[torch.arange(12), LABELS]
    found = measures.memorization(model, posterior, LOADER, F.cross_entropy)
    assert relative_error(found, expected) < 1e-10
    assert bool((found > 0).all())


@pytest.mark.parametrize("name", ["mlp", "convolution", "embedding_tied_with_the_output_layer", "attention"])
def test_gradient_norm_and_el2n_follow_their_formulas(name):
    case = CASES[name]()
    truth = per_example(case.model.eval(), case.call, lambda f: F.cross_entropy(f, case.target, reduction="none"))
    loader = [(case.x, case.target)]
    found = measures.gradient_norm(case.model, loader, case.loss)
    assert relative_error(found, truth.gradients.norm(dim=1)) < 1e-10
    error = truth.output.softmax(1) - F.one_hot(case.target, truth.output.shape[1])
    assert relative_error(measures.el2n(case.model, loader, case.loss), error.norm(dim=1)) < 1e-12


def snapshots_of(model):
    found = []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        found.append({name: tensor + 0.3 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()})
    return found


def gradients_at(snapshot, x, y):
    model = network()
    model.load_state_dict(snapshot)
    return per_example(model, lambda m: m(x), lambda f: F.cross_entropy(f, y, reduction="none")).gradients


def test_grand_and_tracin_sum_over_snapshots_and_leave_the_weights():
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    snapshots, rates = snapshots_of(model), [0.1, 0.2, 0.4]
    train = [gradients_at(snapshot, inputs(), LABELS) for snapshot in snapshots]
    test = [gradients_at(snapshot, inputs(7, 6), LABELS[:7]) for snapshot in snapshots]
    grand = measures.grand(model, snapshots, LOADER, F.cross_entropy)
    assert relative_error(grand, sum(g.norm(dim=1) for g in train) / 3) < 1e-10
    own = measures.tracin(model, snapshots, LOADER, F.cross_entropy, rates)
    assert relative_error(own, sum(r * g.square().sum(1) for r, g in zip(rates, train, strict=True))) < 1e-10
    pairs = measures.tracin(model, snapshots, LOADER, F.cross_entropy, 0.5, [(inputs(7, 6), LABELS[:7])])
    assert relative_error(pairs, sum(0.5 * g @ h.mT for g, h in zip(train, test, strict=True))) < 1e-10
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_rows_are_in_the_order_of_the_examples_numbers():
    model = network()
    posterior = vlearn.IVON(model, lr=0.1, ess=50).posterior()
    dataset = vlearn.IndexedDataset(TensorDataset(inputs(), LABELS))
    shuffled = DataLoader(dataset, batch_size=5, shuffle=True)
    for measure in (measures.memorization, measures.influence_norm, measures.cooks_distance):
        plain = measure(model, posterior, LOADER, F.cross_entropy)
        assert relative_error(measure(model, posterior, shuffled, F.cross_entropy), plain) < 1e-10


# -- errors -----------------------------------------------------------------------------------------------------------


def test_what_is_not_defined_is_refused():
    model = network()
    posterior = vlearn.IVON(model, lr=0.1, ess=50).posterior()
    with pytest.raises(ValueError, match=r"memorization needs class labels \[N\] as targets"):
        measures.memorization(model, posterior, [(inputs(), torch.zeros(12, 3).double())], F.mse_loss)
    with pytest.raises(ValueError, match="snapshots is empty"):
        measures.grand(model, [], LOADER, F.cross_entropy)
    with pytest.raises(ValueError, match="2 learning_rates for 3 snapshots"):
        measures.tracin(model, snapshots_of(model), LOADER, F.cross_entropy, [0.1, 0.2])
    with pytest.raises(ValueError, match="the loader gave no batch"):
        measures.el2n(model, [], F.cross_entropy)
    with pytest.raises(ValueError, match=r"threshold=0, but it must be in \(0, 1\]"):
        measures.cooks_distance(model, posterior, LOADER, F.cross_entropy, threshold=0)


def test_a_posterior_that_only_ranks_gives_no_sizes():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    posterior = vlearn.posterior.from_optimizer(optimizer, model, num_data=12, prior_precision=1.0)
    for measure in (measures.cooks_distance, measures.memorization):
        with pytest.raises(RuntimeError, match="comes from SGD"):
            measure(model, posterior, LOADER, F.cross_entropy)
    norm = measures.gradient_norm(model, LOADER, F.cross_entropy)
    assert relative_error(measures.influence_norm(model, posterior, LOADER, F.cross_entropy), norm) < 1e-12
