"""torch_geometric batches graphs by concatenating their nodes, and nodes of one graph are no independent examples.

Training works as with any optimizer; where no index says which example a row is of, or none has a gradient of its own,
the message says so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.clients.problem import EXTRA, SETTINGS, SLOWER, SeenWeights, self_influence
from tests.optim.table import equal, weights
from tests.oracles.per_example import relative_error

pytest.importorskip("torch_geometric", reason=EXTRA)
from torch_geometric.data import Data  # noqa: E402
from torch_geometric.loader import DataLoader  # noqa: E402
from torch_geometric.nn import (  # noqa: E402
    DenseGCNConv,
    GATConv,
    GCNConv,
    SAGEConv,
    global_mean_pool,
)

GRAPHS = []
for seed in range(48):
    generator = torch.Generator().manual_seed(seed)
    nodes = 4 + seed % 3
    x = torch.randn(nodes, 5, generator=generator, dtype=torch.float64)
    edges = torch.randint(0, nodes, (2, 2 * nodes), generator=generator)
    GRAPHS.append(Data(x=x, edge_index=edges, y=(x[:, :1].mean(0) > 0).long()))


class OfGraphs(nn.Module):
    """Two classes of graphs; takes tensors, or a batch as torch_geometric makes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = GCNConv(5, 16), GCNConv(16, 16), nn.Linear(16, 2)

    def forward(self, x: Any, edges: Any = None, batch: Any = None) -> Tensor:
        if edges is None:
            x, edges, batch = x.x, x.edge_index, x.batch
        x = self.second(self.first(x, edges).relu(), edges).relu()
        return self.head(global_mean_pool(x, batch))


class OfNodes(nn.Module):
    """Three classes of the nodes of one graph."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = kind(5, 16), kind(16, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.second(self.first(x, edges).relu(), edges)


def step(optimizer: Any, model: nn.Module, batch: Any, whole: bool) -> float:
    optimizer.zero_grad()
    output = model(batch) if whole else model(batch.x, batch.edge_index, batch.batch)
    loss = F.cross_entropy(output, batch.y)
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.mark.parametrize("whole", [False, True], ids=["tensors", "a Batch"])
def test_graphs_train_and_their_rows_are_refused(whole: bool) -> None:
    model = OfGraphs().double()
    optimizer = vlearn.IVON(model.parameters(), **SETTINGS)
    epochs = [sum(step(optimizer, model, batch, whole) for batch in DataLoader(GRAPHS, 16)) / 3 for _ in range(40)]
    assert epochs[0] > 0.6 and epochs[-1] < 0.35
    reason = "called with no tensors, .* but with DataBatch" if whole else "no example axis of size .* as dimension 0"
    with pytest.raises(RuntimeError, match=f"OfGraphs.*{reason}, so per-example gradients are not defined"):
        optimizer.sensitivities()
    other = OfGraphs().double()
    with pytest.raises(RuntimeError, match="VON updates its Hessian from gradients of single examples, .* not defined"):
        step(vlearn.VON(other.parameters(), **SLOWER), other, next(iter(DataLoader(GRAPHS, 16))), whole)


def test_graphs_are_predicted_by_the_posterior_and_not_swept() -> None:
    model = OfGraphs().double()
    optimizer = vlearn.IVON(model, **SETTINGS)
    batch = next(iter(DataLoader(GRAPHS, 16)))
    step(optimizer, model, batch, True)
    probabilities = vlearn.predict(model, optimizer.posterior(), batch, draws=4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(16, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"inputs without a tensor \(DataBatch\)"):
        vlearn.sweep(model, optimizer.posterior(), [(batch, batch.y)], F.cross_entropy)


@pytest.mark.parametrize("kind", [GCNConv, GATConv, SAGEConv])
def test_nodes_train_and_their_rows_are_refused(kind: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    edges, labels = torch.randint(0, 60, (2, 90), generator=generator), x[:, :3].argmax(1)
    training = torch.rand(60, generator=generator) < 0.7
    model = OfNodes(kind).double()
    optimizer = vlearn.IVON(model.parameters(), **SETTINGS)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x, edges)[training], labels[training])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1 and losses[-1] < 0.7 * losses[0]
    with pytest.raises(RuntimeError, match="does not run on one example"):
        optimizer.sensitivities()


def test_graphs_of_one_size_have_rows() -> None:
    """Dense layers keep the graphs apart, along dimension 0."""

    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.head = DenseGCNConv(5, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
            return self.head(self.first(x, adjacency).relu().mean(1))

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 4, 5, generator=generator, dtype=torch.float64)
    adjacency = torch.rand(8, 4, 4, generator=generator, dtype=torch.float64).round()
    labels = torch.arange(8) % 2
    model = Dense().double()
    seen, before = SeenWeights(model), weights(model)
    optimizer = vlearn.IVON(model.parameters(), **SETTINGS)
    F.cross_entropy(model(x, adjacency), labels).backward()
    optimizer.step()
    assert not equal(before, weights(model))
    truth = self_influence(
        model,
        seen.by_name,
        optimizer.posterior().variance,
        lambda twin: twin(x, adjacency),
        lambda output: F.cross_entropy(output, labels, reduction="none"),
    )
    assert relative_error(optimizer.sensitivities().self_influence, truth) < 1e-10
