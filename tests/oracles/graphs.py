"""Graphs whose nodes are concatenated to a batch, each of them alone, and networks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 3
SIZES = (4, 1, 0, 5)


@dataclass
class Graphs:
    """N graphs of R nodes and E edges.

    Attributes:
        x: ``[R, 3]`` features of nodes; kinds: ``[R]`` their kinds.
        edges: ``[2, E]`` from which node to which; features: ``[E, 2]``.
        batch: ``[R]`` the graph of each node.
        y: ``[N]`` labels.
    """

    x: Tensor
    kinds: Tensor
    edges: Tensor
    features: Tensor
    batch: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    @property
    def inputs(self) -> dict[str, object]:
        values = {name: getattr(self, name) for name in ("x", "kinds", "edges", "features", "batch")}
        return {**values, "size": len(self)}

    def alone(self, n: int) -> Graphs:
        nodes, edges = (self.batch == n).nonzero().squeeze(1), self.batch[self.edges[0]] == n
        place = torch.full((len(self.x),), -1)
        place[nodes] = torch.arange(len(nodes))
        return Graphs(
            self.x[nodes],
            self.kinds[nodes],
            place[self.edges[:, edges]],
            self.features[edges],
            torch.zeros_like(nodes),
            self.y[n : n + 1],
        )

    def each(self) -> Callable[[nn.Module], Tensor]:
        """model -> its outputs ``[N, C]``, those of every graph from a pass with that graph alone."""
        return lambda model: torch.cat([model(**self.alone(n).inputs) for n in range(len(self))])


def graphs(sizes: Sequence[int] = SIZES, in_order: bool = False, seed: int = 0) -> Graphs:
    """Random graphs of so many nodes, whose nodes and edges are mixed up unless they are to be in order."""
    generator = torch.Generator().manual_seed(seed)
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    if not in_order:
        batch = batch[torch.randperm(len(batch), generator=generator)]
    pairs = torch.cartesian_prod(torch.arange(len(batch)), torch.arange(len(batch)))
    within = (batch[pairs[:, 0]] == batch[pairs[:, 1]]) & (torch.rand(len(pairs), generator=generator) < 0.6)
    edges = pairs[within]
    if not in_order:
        edges = edges[torch.randperm(len(edges), generator=generator)]
    x, features = (
        torch.randn(n, d, generator=generator, dtype=torch.float64) for n, d in ((len(batch), 3), (len(edges), 2))
    )
    kinds = torch.randint(0, 4, (len(batch),), generator=generator)
    return Graphs(x, kinds, edges.T.contiguous(), features, batch, torch.arange(len(sizes)) % CLASSES)


class Network(nn.Module):
    """Its forward is a function of itself and of a batch of graphs, with named parts."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor, kinds: Tensor, edges: Tensor, features: Tensor, batch: Tensor, size: int) -> Tensor:
        return self.function(self, Graphs(x, kinds, edges, features, batch, torch.empty(size)))


def summed(values: Tensor, place: Tensor, count: int) -> Tensor:
    """The rows of each place added up."""
    return values.new_zeros(count, *values.shape[1:]).index_add(0, place, values)


def passed(h: Tensor, g: Graphs) -> Tensor:
    """Each node's value and those of its neighbours."""
    return h + summed(h[g.edges[0]], g.edges[1], len(h))


def pooled(h: Tensor, g: Graphs) -> Tensor:
    return summed(h, g.batch, len(g))


class Convolution(nn.Module):
    """A layer of nodes with a bias of its own, as torch_geometric's."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.linear, self.bias = nn.Linear(inputs, outputs, bias=False), nn.Parameter(torch.randn(outputs))

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        h = self.linear(h)
        return h + summed(h[edges[0]], edges[1], len(h)) + self.bias


class EdgeConvolution(nn.Module):
    """Messages that a network of the edges' features scales."""

    def __init__(self, inputs: int):
        super().__init__()
        self.scale = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, inputs))

    def forward(self, h: Tensor, edges: Tensor, features: Tensor) -> Tensor:
        return h + summed(h[edges[0]] * self.scale(features), edges[1], len(h))


class GraphNorm(nn.Module):
    """Nodes less the mean of their graph's, times a gain."""

    def __init__(self, features: int):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, h: Tensor, batch: Tensor, size: int) -> Tensor:
        count = summed(torch.ones_like(h), batch, size).clamp_min(1)
        return self.gain * (h - (summed(h, batch, size) / count)[batch])


class Dense(nn.Module):
    """The nodes of each graph as a padded sequence, through torch's transformer."""

    def __init__(self, features: int):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(features, 2, 7, dropout=0.0, batch_first=True)

    def forward(self, h: Tensor, batch: Tensor, size: int) -> Tensor:
        place = (batch.unsqueeze(1) == batch).tril(-1).sum(1)
        sequences = h.new_zeros(size, int(place.max()) + 1 if len(h) else 1, h.shape[1])
        sequences[batch, place] = h
        exist = torch.zeros(sequences.shape[:2], dtype=torch.bool)
        exist[batch, place] = True
        padding = ~exist & (torch.arange(exist.shape[1]) > 0)
        return (self.layer(sequences, src_key_padding_mask=padding) * exist.unsqueeze(2)).sum(1)


NETWORKS: dict[str, Callable[[], Network]] = {}


def network(build: Callable[[], Network]) -> Callable[[], Network]:
    def seeded() -> Network:
        with torch.random.fork_rng():
            torch.manual_seed(crc32(build.__name__.encode()))
            return build().double()

    NETWORKS[build.__name__] = seeded
    return seeded


@network
def two_layers_of_message_passing() -> Network:
    def forward(m: Network, g: Graphs) -> Tensor:
        h = torch.tanh(m.first(passed(g.x, g)))
        h = m.norm(torch.tanh(m.second(passed(h, g))))
        return m.out(torch.tanh(m.middle(pooled(h, g))))

    parts = {"first": nn.Linear(3, 6), "second": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "middle": nn.Linear(6, 5)}
    return Network(forward, **parts, out=nn.Linear(5, CLASSES))


@network
def layers_of_nodes_alone() -> Network:
    return Network(
        lambda m, g: pooled(m.out(torch.tanh(m.first(g.x))), g), first=nn.Linear(3, 5), out=nn.Linear(5, CLASSES)
    )


@network
def kinds_and_channels() -> Network:
    """Rules with the channels second, over rows that are no positions of them."""

    def forward(m: Network, g: Graphs) -> Tensor:
        h = m.group(m.norm(m.kinds(g.kinds)))
        h = torch.tanh(m.convolution(h.unflatten(1, (2, 3)))).flatten(1)
        return m.out(pooled(h, g))

    norm = nn.BatchNorm1d(6).eval()
    norm.running_mean, norm.running_var = torch.randn(6), torch.rand(6) + 0.5
    parts = {"kinds": nn.Embedding(4, 6), "norm": norm, "group": nn.GroupNorm(2, 6), "convolution": nn.Conv1d(2, 3, 2)}
    return Network(forward, **parts, out=nn.Linear(6, CLASSES))


@network
def heads_of_nodes() -> Network:
    """Several positions for each node."""

    def forward(m: Network, g: Graphs) -> Tensor:
        h = torch.tanh(m.first(g.x)).unflatten(1, (2, 3))
        return m.out(pooled(m.shared(h).tanh().sum(1), g))

    return Network(forward, first=nn.Linear(3, 6), shared=nn.Linear(3, 4), out=nn.Linear(4, CLASSES))


@network
def a_layer_of_nodes_and_of_graphs() -> Network:
    def forward(m: Network, g: Graphs) -> Tensor:
        h = torch.tanh(m.shared(passed(m.first(g.x), g)))
        return m.out(torch.tanh(m.shared(pooled(h, g))))

    return Network(forward, first=nn.Linear(3, 5), shared=nn.Linear(5, 5), out=nn.Linear(5, CLASSES))


@network
def layers_of_edges() -> Network:
    def forward(m: Network, g: Graphs) -> Tensor:
        h = torch.tanh(m.first(g.x))
        messages = torch.tanh(m.edge(torch.cat([h[g.edges[0]], g.features], 1)))
        return m.out(pooled(m.second(h + summed(messages, g.edges[1], len(h))), g))

    return Network(
        forward, first=nn.Linear(3, 4), edge=nn.Linear(6, 4), second=nn.Linear(4, 5), out=nn.Linear(5, CLASSES)
    )


@network
def convolutions_with_parameters_of_their_own() -> Network:
    def forward(m: Network, g: Graphs) -> Tensor:
        h = torch.tanh(m.first(g.x, g.edges))
        h = m.norm(m.edge(h, g.edges, g.features), g.batch, len(g))
        return m.out(pooled(torch.tanh(m.second(h, g.edges)), g))

    parts = {"first": Convolution(3, 5), "edge": EdgeConvolution(5), "norm": GraphNorm(5), "second": Convolution(5, 4)}
    return Network(forward, **parts, out=nn.Linear(4, CLASSES))


@network
def parameters_of_the_network_itself() -> Network:
    def forward(m: Network, g: Graphs) -> Tensor:
        h = torch.tanh(m.first(g.x) + m.node)
        return m.out(pooled(F.linear(passed(h, g), m.first.weight.T), g))

    return Network(forward, first=nn.Linear(3, 4), node=nn.Parameter(torch.randn(1, 4)), out=nn.Linear(3, CLASSES))


@network
def pooling_by_attention() -> Network:
    def forward(m: Network, g: Graphs) -> Tensor:
        h = torch.tanh(m.first(passed(g.x, g)))
        weight = m.gate(h).exp()
        total = summed(weight, g.batch, len(g)).clamp_min(1e-3)
        return m.out(pooled(weight * h, g) / total)

    return Network(forward, first=nn.Linear(3, 5), gate=nn.Linear(5, 1), out=nn.Linear(5, CLASSES))


@network
def a_transformer_over_padded_nodes() -> Network:
    def forward(m: Network, g: Graphs) -> Tensor:
        return m.out(m.dense(m.first(g.x), g.batch, len(g)))

    return Network(forward, first=nn.Linear(3, 4), dense=Dense(4), out=nn.Linear(4, CLASSES))
