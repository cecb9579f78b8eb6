"""Which example is which, and what a loader may yield: alike in every function that takes one."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import vlearn
from tests.sensitivity.small import LABELS, D, N, inputs, network, optimizer_of

DATA = TensorDataset(inputs(), LABELS)


class Backwards:
    def __iter__(self):
        return iter(range(N - 1, -1, -1))

    def __len__(self):
        return N


ORDERS = {
    "shuffled": lambda data: DataLoader(data, 4, shuffle=True),
    "subset": lambda data: DataLoader(data, 4, sampler=SubsetRandomSampler(range(N))),
    "batches": lambda data: DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 4, False)),
    "weighted": lambda data: DataLoader(data, 4, sampler=WeightedRandomSampler(torch.ones(N), N, replacement=False)),
    "processes": lambda data: DataLoader(data, 4, sampler=DistributedSampler(data, 1, 0, shuffle=True)),
    "own sampler": lambda data: DataLoader(data, 4, sampler=Backwards()),
    "workers": lambda data: DataLoader(data, 4, shuffle=True, num_workers=1, persistent_workers=True),
    "own collate function": lambda data: DataLoader(
        data,
        4,
        shuffle=True,
        collate_fn=lambda items: [torch.stack([x for x, _ in items]), torch.tensor([int(y) for _, y in items])],
    ),
}


@pytest.fixture
def trained():
    model = network()
    return model, optimizer_of(model).posterior()


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_examples_keep_their_numbers_in_any_order(order, trained):
    loader = order(DATA)
    for _ in range(2):
        table = vlearn.sweep(*trained, loader, F.cross_entropy, leverage=None)
        expected = vlearn.sweep(*trained, DataLoader(DATA, N), F.cross_entropy, leverage=None)
        assert table.index.sort().values.tolist() == list(range(N))
        torch.testing.assert_close(table.self_influence[table.index.argsort()], expected.self_influence)
    groups = [vlearn.leave_group_out(*trained, each, LABELS, F.cross_entropy) for each in (loader, DataLoader(DATA, N))]
    torch.testing.assert_close(groups[0].left_out_loss, groups[1].left_out_loss)
    test = DataLoader(DATA, 4)
    pairs = [vlearn.influence(*trained, each, test, F.cross_entropy) for each in (loader, DataLoader(DATA, N))]
    assert torch.equal(pairs[0].train_index, torch.arange(N))
    torch.testing.assert_close(pairs[0].values, pairs[1].values)
    assert type(next(iter(loader))) is list  # the loader is as before


class Own(DataLoader):
    """A loader of somebody else's, whose batches nobody can see into."""


def test_a_loader_that_cannot_be_numbered_is_refused_or_warned_of(trained):
    loader = Own(DATA, 4, shuffle=True)
    match = "does not go through its dataset in order and does not number its examples"
    with pytest.warns(UserWarning, match="they are numbered in its order"):
        vlearn.sweep(*trained, loader, F.cross_entropy, leverage=None)
    with pytest.raises(ValueError, match=match):
        vlearn.leave_group_out(*trained, loader, LABELS, F.cross_entropy)
    with pytest.raises(ValueError, match=match):
        vlearn.influence(*trained, loader, DataLoader(DATA, 4), F.cross_entropy)
    numbered = Own(vlearn.IndexedDataset(DATA), 4, shuffle=True)
    table = vlearn.sweep(*trained, numbered, F.cross_entropy, leverage=None)
    assert table.index.sort().values.tolist() == list(range(N))
    vlearn.leave_group_out(*trained, numbered, LABELS, F.cross_entropy)


def test_a_subset_numbers_its_own_examples(trained):
    loader = DataLoader(Subset(DATA, [4, 2, 0]), 2, shuffle=True)
    table = vlearn.sweep(*trained, loader, F.cross_entropy, leverage=None)
    expected = vlearn.sweep(*trained, [DATA[:]], F.cross_entropy, leverage=None)
    torch.testing.assert_close(table.loss, expected.loss[torch.tensor([4, 2, 0])[table.index]])


def test_a_stream_is_numbered_in_its_order_or_by_itself(trained):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from ((x, y, 10 + i) for i, (x, y) in enumerate(DATA))

    table = vlearn.sweep(*trained, DataLoader(Stream(), 4), F.cross_entropy, leverage=None)
    assert table.index.tolist() == list(range(10, 10 + N))


class Pair(NamedTuple):
    x: Any
    y: Any


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, a, b):
        return self.net(torch.cat([a, b], 1))


class OneDict(TwoInputs):
    def forward(self, batch):
        return self.net(torch.cat([batch["a"], batch["b"]], 1))


class OnePair(TwoInputs):
    def forward(self, pair):
        return self.net(torch.cat(list(pair), 1))


PARTS = inputs()[:, :2], inputs()[:, 2:]
NAMED = dict(zip("ab", PARTS, strict=True))
FORMS = {
    "tuple": (TwoInputs, (PARTS, LABELS)),
    "list": (TwoInputs, [list(PARTS), LABELS]),
    "named tuple": (TwoInputs, Pair(Pair(*PARTS), LABELS)),
    "dict of keywords": (TwoInputs, (NAMED, LABELS)),
    "dict for one argument": (OneDict, (NAMED, LABELS)),
    "tuple for one argument": (OnePair, (Pair(*PARTS), LABELS)),
    "one dict with labels": (TwoInputs, {**NAMED, "labels": LABELS}),
    "one dict with label and index": (TwoInputs, {**NAMED, "label": LABELS, "index": torch.arange(N)}),
}


@pytest.mark.parametrize(("make", "batch"), FORMS.values(), ids=FORMS)
def test_forms_of_batches_are_alike_in_every_function(make, batch):
    model, plain = make(), network()
    posterior = vlearn.IVON(model, lr=0.1, ess=100).posterior()
    expected = vlearn.IVON(plain, lr=0.1, ess=100).posterior()
    both = (model, posterior, [batch]), (plain, expected, [(inputs(), LABELS)])
    table, truth = (vlearn.sweep(*each, F.cross_entropy, leverage=None) for each in both)
    torch.testing.assert_close(table.self_influence, truth.self_influence)
    table, truth = (vlearn.leave_group_out(*each, {"a": [0, 2]}, F.cross_entropy) for each in both)
    torch.testing.assert_close(table.left_out_loss, truth.left_out_loss)
    table, truth = (vlearn.influence(*each, each[2], F.cross_entropy) for each in both)
    torch.testing.assert_close(table.values, truth.values)
    x = {name: batch[name] for name in NAMED} if isinstance(batch, dict) else batch[0]
    seeded = [
        vlearn.predict(m, p, each, draws=2, generator=torch.Generator().manual_seed(0))
        for m, p, each in ((model, posterior, x), (plain, expected, inputs()))
    ]
    torch.testing.assert_close(*seeded)


@pytest.mark.parametrize(
    ("batch", "match"),
    [
        ({"x": inputs(), "y": LABELS}, "a dict of 'x', 'y', but its target must be under 'labels'"),
        ((inputs(), inputs(), LABELS), "number of an example twice in one batch"),
        ((inputs(), inputs(), inputs()), "third entry of shape .* must be the number of each example"),
        ((inputs(), LABELS, torch.arange(3)), "3 indices for 6 examples"),
    ],
)
def test_what_is_no_batch_is_refused(batch, match, trained):
    with pytest.raises(ValueError, match=match):
        vlearn.sweep(*trained, [batch], F.cross_entropy)


def test_items_that_are_numbered():
    assert vlearn.IndexedDataset([(1, 2)])[0] == (1, 2, 0)
    assert vlearn.IndexedDataset([{"x": 1, "labels": 2}])[0] == ({"x": 1}, 2, 0)
    for items in ([{"x": 1, "y": 2}], [(1, 2, 3)], [torch.zeros(2)]):
        with pytest.raises(ValueError, match=r"IndexedDataset takes \(x, y\)"):
            vlearn.IndexedDataset(items)[0]


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.out = nn.Embedding(11, 5, padding_idx=0), nn.Linear(5, 3)

    def forward(self, tokens):
        return self.out(self.embedding(tokens).tanh())


class Texts(Dataset):
    lengths = [3, 2, 4, 1, 6, 5]

    def __len__(self):
        return len(self.lengths)

    def __getitem__(self, i):
        generator = torch.Generator().manual_seed(i)
        size = (self.lengths[i],)
        return torch.randint(1, 11, size, generator=generator), torch.randint(3, size, generator=generator)


def padded(items):
    pad = nn.utils.rnn.pad_sequence
    return pad([x for x, _ in items], True), pad([y for _, y in items], True, -100)


def mean_over_tokens(output, target):
    rows = F.cross_entropy(output.mT, target, reduction="none", ignore_index=-100)
    return rows.sum(1) / (target != -100).sum(1)


def test_batches_that_are_padded_to_different_lengths():
    model = Tagger().double()
    posterior = vlearn.IVON(model, lr=0.1, ess=100).posterior()
    whole, parts = (DataLoader(Texts(), size, collate_fn=padded) for size in (6, 2))
    tables = [vlearn.sweep(model, posterior, loader, mean_over_tokens) for loader in (whole, parts)]
    torch.testing.assert_close(tables[0].self_influence, tables[1].self_influence)
    assert tables[1].deviation.shape == (6, 1) and bool(tables[1].deviation.isnan().all())
    assert tables[1].summary()["num_nonfinite"] == 0
    pairs = [vlearn.influence(model, posterior, loader, loader, mean_over_tokens).values for loader in (whole, parts)]
    torch.testing.assert_close(*pairs)
    groups = {"a": [0, 3, 5], "b": [1, 2]}
    losses = [vlearn.leave_group_out(model, posterior, loader, groups, mean_over_tokens) for loader in (whole, parts)]
    torch.testing.assert_close(losses[0].left_out_loss, losses[1].left_out_loss)
    tokens = vlearn.sweep(
        model, posterior, parts, lambda o, t: F.cross_entropy(o.mT, t, reduction="none"), per="token", leverage=None
    )
    assert len(tokens) == sum(Texts.lengths) and tokens.deviation.shape == (len(tokens), 3)


@pytest.mark.parametrize("deviation", [None, True, False])
@pytest.mark.parametrize("size", [3, 5000])
def test_the_deviation_is_kept_where_it_is_small_or_asked_for(deviation, size):
    model = nn.Linear(D, size).double()
    posterior = vlearn.IVON(model, lr=0.1, ess=100).posterior()
    target = torch.zeros(N, size, dtype=torch.float64)
    table = vlearn.sweep(model, posterior, [(inputs(), target)], F.mse_loss, leverage=None, deviation=deviation)
    kept = vlearn.sweep(model, posterior, [(inputs(), target)], F.mse_loss, leverage=None, deviation=True)
    torch.testing.assert_close(table.deviation_norm, kept.deviation.norm(dim=1))
    if deviation or (deviation is None and size == 3):
        torch.testing.assert_close(table.deviation, kept.deviation)
    else:
        assert table.deviation.shape == (N, 1) and bool(table.deviation.isnan().all())
    assert table.summary() == pytest.approx(kept.summary())


def test_groups_may_be_named_by_anything(trained):
    names = ["cat", "dog", "cat", "owl", "dog", "cat"]
    expected = vlearn.leave_group_out(
        *trained, [DATA[:]], {"cat": [0, 2, 5], "dog": [1, 4], "owl": [3]}, F.cross_entropy
    )
    for groups in (names, tuple(names), np.array(names), np.array(names, dtype=object)):
        table = vlearn.leave_group_out(*trained, [DATA[:]], groups, F.cross_entropy)
        assert table.group == ["cat", "dog", "owl"]
        torch.testing.assert_close(table.left_out_loss, expected.left_out_loss)
    flags = [name == "cat" for name in names]
    for groups in (flags, torch.tensor(flags), np.array(flags)):
        table = vlearn.leave_group_out(*trained, [DATA[:]], groups, F.cross_entropy)
        assert table.size.tolist() == [3, 3]


def test_an_averaged_copy_is_swept_at_its_own_weights(trained):
    model, posterior = trained
    averaged = AveragedModel(model)
    with torch.no_grad():
        for p in averaged.parameters():
            p.mul_(1.5)
    loader = [DATA[:]]
    whole, inner = (
        vlearn.sweep(each, posterior, loader, F.cross_entropy, leverage=None) for each in (averaged, averaged.module)
    )
    assert torch.equal(whole.self_influence, inner.self_influence)
    own = vlearn.sweep(model, posterior, loader, F.cross_entropy, leverage=None)
    assert not torch.equal(whole.loss, own.loss)


class OneGraph(nn.Module):
    """Whose first input is a matrix that all examples share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 3)

    def forward(self, adjacency, x):
        return self.b(torch.relu(self.a(adjacency @ x))).mean(1)


def test_an_input_that_all_examples_share_may_come_first():
    model, plain = OneGraph().double(), OneGraph().double()
    adjacency, x = torch.rand(4, 4, dtype=torch.float64), torch.randn(N, 4, 3, dtype=torch.float64)

    class Bound(nn.Module):
        def __init__(self):
            super().__init__()
            self.graph = plain

        def forward(self, x):
            return self.graph(adjacency, x)

    optimizers = [
        vlearn.IVON(each, lr=0.1, ess=100, generator=torch.Generator().manual_seed(1)) for each in (model, Bound())
    ]
    rows = []
    for optimizer, inputs_ in zip(optimizers, ((adjacency, x), (x,)), strict=True):
        F.cross_entropy(optimizer._watch.model(*inputs_), LABELS).backward()
        rows.append(optimizer.sensitivities(deviation=True))
        optimizer.step()
    torch.testing.assert_close(rows[0].self_influence, rows[1].self_influence)
    torch.testing.assert_close(rows[0].deviation, rows[1].deviation)
    loaders = [((adjacency, x), LABELS)] * 2, [(x, LABELS)] * 2
    tables = [
        vlearn.sweep(o._watch.model, o.posterior(), loader, F.cross_entropy, leverage=None)
        for o, loader in zip(optimizers, loaders, strict=True)
    ]
    assert tables[0].index.tolist() == list(range(2 * N))
    torch.testing.assert_close(tables[0].self_influence, tables[1].self_influence)
    groups = [
        vlearn.leave_group_out(o._watch.model, o.posterior(), loader[:1], {"last": [4, 5]}, F.cross_entropy)
        for o, loader in zip(optimizers, loaders, strict=True)
    ]
    torch.testing.assert_close(groups[0].left_out_loss, groups[1].left_out_loss)


def test_graphs_of_one_batch_are_refused():
    class Graphs(OneGraph):
        def forward(self, x, edges, graph):
            h = self.a(torch.zeros_like(x).index_add(0, edges[1], x[edges[0]])).relu()
            return self.b(torch.zeros(3, 6, dtype=x.dtype).index_add(0, graph, h))

    model = Graphs().double()
    x, edges = torch.randn(7, 3, dtype=torch.float64), torch.tensor([[0, 1, 3, 5], [1, 2, 4, 6]])
    batch = (x, edges, torch.tensor([0, 0, 0, 1, 1, 2, 2])), torch.tensor([0, 1, 2])
    optimizer = vlearn.IVON(model, lr=0.1, ess=3)
    F.cross_entropy(model(*batch[0]), batch[1]).backward()
    with pytest.raises(RuntimeError, match="no example axis"):
        optimizer.sensitivities()
    optimizer.step()
    with pytest.raises(RuntimeError, match="no example axis"):
        vlearn.sweep(model, optimizer.posterior(), [batch], F.cross_entropy)
