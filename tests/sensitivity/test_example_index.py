"""Graphs batched by concatenating their nodes: rows are those of each graph alone, or there are none."""

import copy

import pytest
import torch
import torch.nn.functional as F

import vlearn
from tests.oracles.graphs import NETWORKS, graphs
from tests.oracles.per_example import moving, per_example, relative_error
from tests.sensitivity.test_exactness import covariance_of, with_uneven_state
from tests.sensitivity.test_leave_group_out import dense_change

TOLERANCE = 1e-10
networks = pytest.mark.parametrize("name", NETWORKS)


def nodes_and_edges(**inputs):
    return inputs["batch"], inputs["batch"][inputs["edges"][0]]


def loss_of(model, g):
    return F.cross_entropy(model(**g.inputs), g.y)


def rows_of(g):
    return lambda output: F.cross_entropy(output, g.y, reduction="none")


def watched(model, example_index="batch", **arguments):
    optimizer = with_uneven_state(model, **arguments)
    optimizer.watch(model, example_index=example_index)
    return optimizer


def truth_at(model, g):
    """Of each graph alone, at the weights that the model has now; the copy has no hooks that draw."""
    weights = [p.detach().clone() for p in model.parameters()]
    plain = copy.deepcopy(model)
    with torch.no_grad():
        for p, weight in zip(plain.parameters(), weights, strict=True):
            p.copy_(weight)
    return per_example(plain, g.each(), rows_of(g))


def check_live(optimizer, model, g):
    loss_of(model, g).backward()
    truth, covariance = truth_at(model, g), covariance_of(optimizer, model)
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.residual, truth.residual) < TOLERANCE
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < TOLERANCE
    assert relative_error(s.deviation, truth.deviation(covariance)) < TOLERANCE
    chosen = [len(g) - 1, 0][: len(g)]
    part = optimizer.sensitivities(deviation=True, examples=chosen)
    for name in ("residual", "self_influence", "prediction_error", "deviation"):
        assert relative_error(getattr(part, name), getattr(s, name)[chosen]) < TOLERANCE


@pytest.mark.parametrize("index", ["batch", nodes_and_edges], ids=["nodes", "nodes and edges"])
@networks
def test_live_rows_are_those_of_each_graph_alone(name, index):
    model = NETWORKS[name]()
    optimizer = watched(model, index)
    for step in range(3):  # the first pass of a kind is looked at, later ones are known
        check_live(optimizer, model, graphs((3, 1, 0, 5 + step), seed=step))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("index", ["batch", nodes_and_edges], ids=["nodes", "nodes and edges"])
@networks
def test_a_sweep_is_that_of_each_graph_alone(name, index):
    model, batches = NETWORKS[name](), [graphs(), graphs((2, 3, 4), seed=1)]
    optimizer = with_uneven_state(model)
    covariance = covariance_of(optimizer, model)
    table = vlearn.sweep(
        model,
        optimizer.posterior(),
        [(g.inputs, g.y) for g in batches],
        F.cross_entropy,
        leverage="exact",
        variance=True,
        progress=False,
        example_index=index,
    )
    assert torch.equal(table.index, torch.arange(7))
    for g, rows in zip(batches, (slice(0, 4), slice(4, 7)), strict=True):
        truth = truth_at(model.eval(), g)
        change = truth.deviation(covariance)
        assert relative_error(table.loss[rows], truth.loss) < TOLERANCE
        assert relative_error(table.self_influence[rows], truth.self_influence(covariance)) < TOLERANCE
        assert relative_error(table.deviation[rows], change) < TOLERANCE
        assert relative_error(table.loo_loss[rows], rows_of(g)(truth.output + change)) < TOLERANCE
        assert relative_error(table.leverage[rows], truth.leverage(covariance)) < TOLERANCE
        assert relative_error(table.function_variance[rows], truth.output_covariance(covariance)) < TOLERANCE


def test_a_refined_sweep_of_graphs_is_that_of_each_alone():
    model, g = NETWORKS["two_layers_of_message_passing"](), graphs()
    truth, covariance, posterior = dense_posterior(model, g)
    table = vlearn.sweep(
        model,
        posterior,
        [(g.inputs, g.y)],
        F.cross_entropy,
        refined=True,
        threshold=1 - 1e-9,
        progress=False,
        example_index="batch",
    )
    expected = torch.cat([dense_change(truth, covariance, [n], refined=True) for n in range(len(g))])
    assert relative_error(table.deviation, expected) < 1e-9


def dense_posterior(model, g, prior_precision=0.5):
    truth = per_example(model, g.each(), rows_of(g))
    precision = truth.ggn() + prior_precision * torch.eye(truth.gradients.shape[1], dtype=torch.float64)
    mean = {name: p.detach() for name, p in moving(model).items()}
    return truth, torch.linalg.inv(precision), vlearn.posterior.Full(mean, precision, num_data=len(g))


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("name", ["two_layers_of_message_passing", "convolutions_with_parameters_of_their_own"])
def test_groups_of_graphs_are_left_out_together(name, refined):
    model, g = NETWORKS[name](), graphs((3, 1, 0, 4, 2, 5))
    truth, covariance, posterior = dense_posterior(model, g)
    members = {"a": [4, 1, 0], "b": [5], "c": [2, 3, 4]}
    table = vlearn.leave_group_out(
        model,
        posterior,
        [(g.inputs, g.y)],
        members,
        F.cross_entropy,
        refined=refined,
        tolerance=1e-12,
        threshold=1 - 1e-9,
        progress=False,
        example_index="batch",
    )
    for k, rows in enumerate(map(sorted, members.values())):
        change = dense_change(truth, covariance, rows, refined)
        left_out = F.cross_entropy(truth.output[rows] + change, g.y[rows])
        assert table.index[k].tolist() == rows
        assert relative_error(table.deviation[k], change) < 1e-7
        assert relative_error(table.loss[k], truth.loss[rows].mean()) < TOLERANCE
        assert relative_error(table.left_out_loss[k], left_out) < 1e-7
    assert not table.num_first_order


@networks
def test_influence_between_graphs_is_that_of_each_alone(name):
    model, train, test = NETWORKS[name](), [graphs(), graphs((2, 3), seed=1)], graphs((3, 1), seed=2)
    optimizer = with_uneven_state(model)
    found = vlearn.influence(
        model,
        optimizer.posterior(),
        [(g.inputs, g.y) for g in train],
        [(test.inputs, test.y)],
        F.cross_entropy,
        progress=False,
        example_index="batch",
    )
    of_train, of_test = (torch.cat([truth_at(model.eval(), g).gradients for g in part]) for part in (train, [test]))
    assert relative_error(found.values, of_train @ covariance_of(optimizer, model) @ of_test.T) < TOLERANCE
