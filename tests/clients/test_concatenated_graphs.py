"""Models of torch_geometric: rows and sweeps of its batches are those of each graph alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.clients.problem import EXTRA
from tests.oracles.per_example import flat, per_example, relative_error

geometric = pytest.importorskip("torch_geometric", reason=EXTRA)
layers = geometric.nn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def graph(nodes, seed):
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.combinations(torch.arange(nodes)).T
    pairs = pairs[:, torch.rand(pairs.shape[1], generator=generator) < 0.8]
    edges = torch.cat([pairs, pairs.flip(0)], 1)
    x, features = (torch.randn(n, d, generator=generator).double() for n, d in ((nodes, 4), (edges.shape[1], 3)))
    return geometric.data.Data(x=x, edge_index=edges, edge_attr=features, y=torch.tensor([seed % 3]))


GRAPHS = [graph(nodes, seed) for seed, nodes in enumerate((4, 1, 6, 3, 2))]


class Network(nn.Module):
    def __init__(self, convolution, norm=None, takes_features=False):
        super().__init__()
        self.first, self.norm, self.second = convolution(4, 6), norm, convolution(6, 6)
        self.pool, self.out = layers.AttentionalAggregation(nn.Linear(6, 1)), nn.Linear(6, 3)
        self.takes_features = takes_features

    def forward(self, x, edge_index, edge_attr, batch):
        more = (edge_attr,) if self.takes_features else ()
        h = torch.tanh(self.first(x, edge_index, *more))
        if self.norm is not None:
            h = self.norm(h, batch)
        return self.out(self.pool(torch.tanh(self.second(h, edge_index, *more)), batch))


class OfData(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Network(layers.GCNConv)

    def forward(self, data):
        return self.inner(*tensors(data))


def tensors(data):
    return data.x, data.edge_index, data.edge_attr, data.batch


def perceptron(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.Tanh(), nn.Linear(outputs, outputs))


NETWORKS = {
    "GCNConv, GraphNorm": lambda: Network(layers.GCNConv, layers.GraphNorm(6)),
    "SAGEConv, LayerNorm": lambda: Network(layers.SAGEConv, layers.LayerNorm(6)),
    "GINConv": lambda: Network(lambda i, o: layers.GINConv(perceptron(i, o), train_eps=True)),
    "GATv2Conv": lambda: Network(lambda i, o: layers.GATv2Conv(i, o, edge_dim=3), takes_features=True),
    "NNConv": lambda: Network(lambda i, o: layers.NNConv(i, o, perceptron(3, i * o)), takes_features=True),
}


def made(name):
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def truth_of(model, call):
    alone = [geometric.data.Batch.from_data_list([each]) for each in GRAPHS]
    labels = torch.cat([each.y for each in GRAPHS])
    return per_example(
        model,
        lambda m: torch.cat([m(*call(each)) for each in alone]),
        lambda output: F.cross_entropy(output, labels, reduction="none"),
    )


def check_rows(model, plain, index, call):
    optimizer = vlearn.IVON(model, lr=0.1, ess=50, generator=torch.Generator().manual_seed(1))
    optimizer.watch(model, example_index=index)
    batch = geometric.data.Batch.from_data_list(GRAPHS)
    F.cross_entropy(model(*call(batch)), batch.y).backward()
    with torch.no_grad():
        for theirs, p in zip(plain.parameters(), model.parameters(), strict=True):
            theirs.copy_(p)
    truth, covariance = truth_of(plain, call), torch.diag(flat(optimizer.posterior().variance))
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


@pytest.mark.parametrize("name", NETWORKS)
def test_live_rows_are_those_of_each_graph_alone(name):
    check_rows(made(name), made(name), "batch", tensors)


def test_a_model_may_take_its_data_whole():
    torch.manual_seed(0)
    check_rows(OfData().double(), OfData().double(), lambda data: data.batch, lambda data: (data,))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_sweep_goes_through_a_loader_of_batches(name):
    model = made(name)
    posterior = vlearn.IVON(model, lr=0.1, ess=50).posterior()
    loader = geometric.loader.DataLoader(GRAPHS, batch_size=2)
    given = [(tensors(batch), batch.y) for batch in loader]
    table = vlearn.sweep(model, posterior, given, F.cross_entropy, progress=False, example_index="batch")
    truth = truth_of(model.eval(), tensors)
    assert torch.equal(table.index, torch.arange(5))
    assert relative_error(table.self_influence, truth.self_influence(torch.diag(flat(posterior.variance)))) < 1e-10


def test_its_linear_layer_has_a_rule():
    from vlearn.layers.registry import rule_of

    assert rule_of(layers.Linear) is rule_of(nn.Linear)
