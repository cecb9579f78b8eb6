"""Training on graphs whose nodes are concatenated: the curvature is that of each graph's own gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F

import vlearn
from tests.optim.networks import covariance_of, hessian_of
from tests.optim.test_von import CERTAIN, diagonal, mean_over_signs, plain_step
from tests.oracles.graphs import NETWORKS, graphs
from tests.oracles.per_example import relative_error
from tests.sensitivity.test_example_index import loss_of, networks, nodes_and_edges, truth_at
from vlearn.per_example.kronecker_factors import CONVENTIONS

TOLERANCE = 1e-10


def vogn(model):
    """Its Hessian is the last estimate."""
    return vlearn.VOGN(model, lr=1e-3, ess=50, beta2=0.0, generator=torch.Generator().manual_seed(1))


@networks
def test_vogn_learns_from_the_gradient_of_each_graph(name):
    model = NETWORKS[name]()
    optimizer = vogn(model)
    optimizer.watch(model, example_index=nodes_and_edges)
    for step in range(2):
        g = graphs((3, 1, 0, 5 + step), seed=step)
        loss_of(model, g).backward()
        truth = truth_at(model, g).gradients.square().mean(0)
        optimizer.step()
        optimizer.zero_grad()
        assert relative_error(hessian_of(optimizer, model), truth) < 1e-12


def test_a_loss_of_nodes_gives_each_graph_the_sum_of_its_nodes():
    """1/R Σ_r ℓ_r is the mean of N/R Σ_{r of n} ℓ_r."""
    model, g = NETWORKS["two_layers_of_message_passing"](), graphs((3, 1, 5))
    model.function = lambda m, g: m.out(torch.tanh(m.middle(m.norm(torch.tanh(m.second(torch.tanh(m.first(g.x))))))))
    optimizer = vogn(model)
    optimizer.watch(model, example_index="batch")
    labels = torch.arange(9) % 3
    F.cross_entropy(model(**g.inputs), labels).backward()
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for p, weight in zip(plain.parameters(), model.parameters(), strict=True):
            p.copy_(weight)
    optimizer.step()
    losses = F.cross_entropy(plain(**g.inputs), labels, reduction="none")
    own = [losses[g.batch == n].sum() * 3 / 9 for n in range(3)]
    rows = [torch.autograd.grad(loss, list(plain.parameters()), retain_graph=True) for loss in own]
    truth = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).square().mean(0)
    assert relative_error(hessian_of(optimizer, model), truth) < 1e-12
    for examples in (None, [0]):
        with pytest.raises(RuntimeError, match="residuals need one row for each of the 3 examples"):
            optimizer.sensitivities(examples=examples)


@networks
def test_the_probe_of_von_has_the_gauss_newton_diagonal_of_each_graph_as_its_mean(name, monkeypatch):
    model, g = NETWORKS[name](), graphs()
    optimizer = vlearn.VON(model, lr=0.0, ess=CERTAIN, beta2=0.0, num_data=50)
    optimizer.watch(model, example_index="batch")

    def estimate():
        plain_step(optimizer, lambda: loss_of(model, g))
        return hessian_of(optimizer, model).clone()

    assert relative_error(mean_over_signs(monkeypatch, estimate), diagonal(truth_at(model, g))) < 1e-12


@pytest.mark.parametrize("maker", [vlearn.VON, vlearn.KFACVON, vlearn.FullVON], ids=lambda maker: maker.__name__)
@networks
def test_rows_under_other_posteriors_are_those_of_each_graph_alone(name, maker):
    model, g = NETWORKS[name](), graphs()
    optimizer = maker(model, lr=1e-3, ess=50, curvature="empirical", generator=torch.Generator().manual_seed(1))
    optimizer.watch(model, example_index=nodes_and_edges)
    plain_step(optimizer, lambda: loss_of(model, g))
    loss_of(model, g).backward()
    truth, covariance = truth_at(model, g), covariance_of(optimizer, model)
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < TOLERANCE
    assert relative_error(s.deviation, truth.deviation(covariance)) < TOLERANCE


def kfac(model, **settings):
    """Its factors are those of the last pass, at a mean that stays."""
    settings = {"curvature": "empirical", "update_every": 1, **settings}
    optimizer = vlearn.KFACVON(model, lr=0.0, ess=CERTAIN, beta2=0.0, num_data=50, **settings)
    optimizer.watch(model, example_index="batch")
    return optimizer


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_factors_are_means_over_the_nodes_that_there_are(convention):
    model, g = NETWORKS["a_layer_of_nodes_and_of_graphs"](), graphs()
    optimizer = kfac(model, kfac_approx=convention)
    seen = []

    def keep(module, args, output):
        a = torch.cat([args[0], torch.ones(len(args[0]), 1)], 1).detach()
        output.register_hook(lambda b: seen.append((a, b * len(g))))

    plain = copy.deepcopy(model)
    for layer in (plain.first, plain.shared):
        layer.register_forward_hook(keep)
    loss_of(plain, g).backward()
    plain_step(optimizer, lambda: loss_of(model, g))
    (of_graphs, of_nodes), (first,) = seen[:2], seen[2:]
    index = torch.arange(len(g))
    for layer, calls in ((model.first, [(first, g.batch)]), (model.shared, [(of_nodes, g.batch), (of_graphs, index)])):
        a, b = (torch.cat([call[k] for call, _ in calls]) for k in (0, 1))
        example = torch.cat([rows for _, rows in calls])
        if convention == "reduce":
            count = example.bincount(minlength=len(g)).clamp_min(1).unsqueeze(1)
            sums = [torch.zeros(len(g), each.shape[1]).double().index_add(0, example, each) for each in (a, b)]
            a, b = sums[0] / count, sums[1]
        state = optimizer.state[layer.weight]
        assert relative_error(state["in_factor"], a.T @ a / len(a)) < 1e-12
        assert relative_error(state["out_factor"], b.T @ b / len(g)) < 1e-12


def test_an_embedding_of_nodes_has_the_frequencies_of_those_that_there_are():
    model, g = NETWORKS["kinds_and_channels"](), graphs()
    optimizer = kfac(model)
    plain_step(optimizer, lambda: loss_of(model, g))
    frequency = g.kinds.bincount(minlength=4).double() / len(g.x)
    assert relative_error(optimizer.state[model.kinds.weight]["out_factor"], frequency) < 1e-12


@pytest.mark.parametrize("name", ["two_layers_of_message_passing", "a_layer_of_nodes_and_of_graphs"])
def test_squares_are_those_of_the_graphs_rotated_gradients(name):
    model, g = NETWORKS[name](), graphs()
    optimizer = kfac(model, eigenvalue_correction=True)
    for _ in range(2):  # the first step makes the basis
        plain_step(optimizer, lambda: loss_of(model, g))
    optimizer.unwatch()
    sizes = [p.numel() for p in model.parameters()]
    by_parameter = dict(zip(model.parameters(), truth_at(model, g).gradients.split(sizes, 1), strict=True))
    for layer in optimizer._structure.layers():
        state, rows = optimizer.state[layer.weight], len(layer.weight)
        gradients = torch.cat([by_parameter[p].reshape(len(g), rows, -1) for p in layer.parameters], 2)
        turned = torch.einsum("po,npi,ij->noj", state["out_basis"], gradients, state["in_basis"])
        assert relative_error(state["hessian"], turned.square().mean(0)) < TOLERANCE
