"""Which example is which, and what a loader may yield: alike in every function that takes one."""

from collections import OrderedDict, UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DataParallel
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
from tqdm import tqdm

import vlearn
from tests.oracles.per_example import flat, moving, per_example
from tests.sensitivity.small import LABELS, D, N, inputs, network, optimizer_of
from vlearn.sensitivity import measures

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
        assert table.index.tolist() == list(range(N))  # rows are found by an example's place in the dataset
        torch.testing.assert_close(table.self_influence, expected.self_influence)
    groups = [vlearn.leave_group_out(*trained, each, LABELS, F.cross_entropy) for each in (loader, DataLoader(DATA, N))]
    torch.testing.assert_close(groups[0].left_out_loss, groups[1].left_out_loss)
    test = DataLoader(DATA, 4)
    pairs = [vlearn.influence(*trained, each, test, F.cross_entropy) for each in (loader, DataLoader(DATA, N))]
    assert torch.equal(pairs[0].train_index, torch.arange(N))
    torch.testing.assert_close(pairs[0].values, pairs[1].values)
    assert type(next(iter(loader))) is list  # the loader is as before


def accelerated(data):
    accelerate = pytest.importorskip("accelerate")
    return accelerate.Accelerator(cpu=True).prepare(DataLoader(data, 4, shuffle=True))


def of_fabric(data):
    lightning = pytest.importorskip("lightning")
    fabric = lightning.Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    return fabric.setup_dataloaders(DataLoader(data, 4, shuffle=True))


class Renamed(DataLoader):
    """A loader that changes nothing in how it is iterated."""


class InLists(Dataset):
    """A dataset that is asked for many examples at once."""

    def __len__(self):
        return N

    def __getitem__(self, indices):
        return DATA[indices]


@pytest.mark.parametrize(
    "loader",
    [
        accelerated(DATA),
        of_fabric(DATA),
        Renamed(DATA, 4, shuffle=True),
        DataLoader(InLists(), batch_size=None, sampler=BatchSampler(RandomSampler(DATA), 4, False)),
        DataLoader(DATA, sampler=torch.randperm(N)),
        DataLoader(DATA, batch_sampler=[np.array([5, 3, 1]), torch.tensor([0, 2, 4])]),
    ],
    ids=["accelerate", "fabric", "subclass", "lists of numbers", "tensor", "lists of batches"],
)
def test_loaders_of_other_makes_are_numbered_by_what_their_samplers_draw(loader, trained):
    expected = vlearn.sweep(*trained, [DATA[:]], F.cross_entropy, leverage=None)
    for _ in range(2):
        table = vlearn.sweep(*trained, loader, F.cross_entropy, leverage=None, progress=False)
        assert table.index.sort().values.tolist() == list(range(N))
        torch.testing.assert_close(table.self_influence, expected.self_influence[table.index])
    pairs = vlearn.influence(*trained, loader, [DATA[:]], F.cross_entropy, chunk=2, progress=False)
    torch.testing.assert_close(pairs.values.diagonal(), expected.self_influence)


def test_empty_batches_are_passed_over(trained):
    expected = vlearn.sweep(*trained, [DATA[:]], F.cross_entropy, leverage=None)
    batches = [DATA[:4], DATA[4:4], DATA[4:]]
    table = vlearn.sweep(*trained, batches, F.cross_entropy, leverage=None)
    assert table.index.tolist() == expected.index.tolist()
    torch.testing.assert_close(table.loo_loss, expected.loo_loss)
    vlearn.posterior.fit(trained[0], batches, F.cross_entropy, progress=False)


def test_only_drawn_examples_are_there_by_their_own_numbers(trained):
    expected = vlearn.sweep(*trained, [DATA[:]], F.cross_entropy, leverage=None)
    samplers = [
        DistributedSampler(DATA, 2, 1, shuffle=False),
        WeightedRandomSampler(torch.ones(N), 9, replacement=True),
        SubsetRandomSampler([4, 1, 2]),
    ]
    for sampler in samplers:
        loader = DataLoader(DATA, 2, sampler=sampler)
        table = vlearn.sweep(*trained, loader, F.cross_entropy, leverage=None)
        torch.testing.assert_close(table.loss, expected.loss[table.index])
    assert sorted(table.index.tolist()) == [1, 2, 4]
    repeated = DataLoader(DATA, 2, sampler=WeightedRandomSampler(torch.ones(N), 99, replacement=True))
    with pytest.raises(ValueError, match=r"gave example \d twice: use one that gives every example once"):
        vlearn.influence(*trained, repeated, [DATA[:]], F.cross_entropy)
    with pytest.raises(ValueError, match=r"gave example \d twice: use one that gives every example once"):
        vlearn.leave_group_out(*trained, repeated, LABELS, F.cross_entropy)


def test_an_example_may_come_twice_where_the_dataset_has_it_twice(trained):
    expected = vlearn.sweep(*trained, [DATA[:]], F.cross_entropy, leverage=None)
    loader = DataLoader(Subset(vlearn.IndexedDataset(DATA), [3, 3, 1]), 3)
    table = vlearn.sweep(*trained, loader, F.cross_entropy, leverage=None)
    assert table.index.tolist() == [1, 3, 3]
    torch.testing.assert_close(table.loss, expected.loss[table.index])


class Reversed(DataLoader):
    """A loader with an order of its own, which its sampler does not know."""

    def __iter__(self):
        return iter(list(super().__iter__())[::-1])


class Named(Dataset):
    def __getitem__(self, name):
        return DATA[int(name)]


def without_order(data):
    try:
        return DataLoader(data, 4, num_workers=2, in_order=False)
    except TypeError:
        pytest.skip("this torch has no in_order")


@pytest.mark.parametrize(
    "make",
    [
        lambda data: Reversed(data, 4, shuffle=True),
        lambda data: tqdm(DataLoader(data, 4, shuffle=True), disable=True),
        without_order,
    ],
    ids=["own order", "progress bar", "out of order"],
)
def test_an_order_that_cannot_be_followed_is_refused_unless_the_examples_are_numbered(make, trained):
    match = "does not go through its dataset in order and does not number its examples"
    calls = [
        lambda loader: vlearn.sweep(*trained, loader, F.cross_entropy, leverage=None),
        lambda loader: vlearn.leave_group_out(*trained, loader, LABELS, F.cross_entropy),
        lambda loader: vlearn.influence(*trained, loader, [DATA[:]], F.cross_entropy),
        lambda loader: vlearn.influence(*trained, [DATA[:]], loader, F.cross_entropy),
        lambda loader: measures.gradient_norm(trained[0], loader, F.cross_entropy),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=match):
            call(make(DATA))
    table = vlearn.sweep(*trained, make(vlearn.IndexedDataset(DATA)), F.cross_entropy, leverage=None)
    expected = vlearn.sweep(*trained, [DATA[:]], F.cross_entropy, leverage=None)
    torch.testing.assert_close(table.loss, expected.loss[table.index])


def test_a_dataset_by_names_has_no_numbers(trained):
    loader = DataLoader(Named(), 2, sampler=list("304152"))
    with pytest.raises(ValueError, match="cannot be told apart"):
        vlearn.sweep(*trained, loader, F.cross_entropy)


def kept_items(items):
    kept = [item for item in items if item[1] != 0]
    return torch.stack([x for x, _ in kept]), torch.tensor([y for _, y in kept])


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_collate_function_that_leaves_examples_out_is_refused(shuffle, trained):
    loader = DataLoader(DATA, 3, shuffle=shuffle, collate_fn=kept_items)
    with pytest.raises(ValueError, match="examples where its sampler drew 3, so they cannot be told apart"):
        vlearn.sweep(*trained, loader, F.cross_entropy)


def test_items_that_are_batches_are_counted(trained):
    parts = [DATA[:4], DATA[4:]]
    for loader in (DataLoader(parts, batch_size=None), DataLoader(parts, collate_fn=lambda items: items[0])):
        table = vlearn.sweep(*trained, loader, F.cross_entropy, leverage=None)
        assert table.index.tolist() == list(range(N))


def test_measures_are_in_the_order_of_the_numbers(trained):
    model = trained[0]
    found = measures.gradient_norm(model, DataLoader(DATA, 4, shuffle=True), F.cross_entropy)
    torch.testing.assert_close(found, measures.gradient_norm(model, [DATA[:]], F.cross_entropy))


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


class Turned(NamedTuple):
    """A target in the first place, where its name and not its place tells."""

    label: Any
    a: Any
    b: Any


class Third(NamedTuple):
    x: Any
    y: Any
    index: Any


@dataclass
class Record:
    a: Any
    b: Any
    labels: Any
    idx: Any


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
    "dict for one argument of a wrapper": (lambda: DataParallel(OneDict()), (NAMED, LABELS)),
    "dict for one argument of an average": (lambda: AveragedModel(OneDict()), (NAMED, LABELS)),
    "dict for one argument of compiled code": (lambda: torch.compile(OneDict(), backend="eager"), (NAMED, LABELS)),
    "another mapping": (TwoInputs, (UserDict(NAMED), LABELS)),
    "another mapping with labels": (OneDict, UserDict({**NAMED, "labels": LABELS})),
    "ordered dict with numbers": (TwoInputs, OrderedDict(**NAMED, labels=LABELS, idx=list(range(N)))),
    "dataclass": (TwoInputs, Record(*PARTS, LABELS, torch.arange(N))),
    "named tuple with its target first": (TwoInputs, Turned(LABELS, *PARTS)),
    "named tuple with numbers": (TwoInputs, Third(PARTS, LABELS, np.arange(N))),
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
    x = batch[0] if isinstance(batch, tuple | list) and not isinstance(batch, Turned) else NAMED
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
        ((inputs(), LABELS, ["a"] * N), "a third entry of list, but it must be the number of each example"),
        ({"x": inputs(), "labels": LABELS, "idx": torch.ones(N)}, "a 'idx' of shape .*torch.float32"),
        ((Record(*PARTS, LABELS, None), LABELS), "inputs in a Record: let it yield tensors"),
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


@pytest.mark.parametrize("deviation", ["small", None, True, False])
@pytest.mark.parametrize("size", [3, 5000])
def test_the_deviation_is_kept_where_it_is_small_or_asked_for(deviation, size):
    model = nn.Linear(D, size).double()
    posterior = vlearn.IVON(model, lr=0.1, ess=100).posterior()
    target = torch.zeros(N, size, dtype=torch.float64)
    table = vlearn.sweep(model, posterior, [(inputs(), target)], F.mse_loss, leverage=None, deviation=deviation)
    kept = vlearn.sweep(model, posterior, [(inputs(), target)], F.mse_loss, leverage=None, deviation=True)
    torch.testing.assert_close(table.deviation_norm, kept.deviation.norm(dim=1))
    if deviation is True or (deviation == "small" and size == 3):
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
    mixed = vlearn.leave_group_out(*trained, [DATA[:]], [("b", 1), 7, ("b", 1), "a", 7, ("b", 1)], F.cross_entropy)
    assert mixed.group == [("b", 1), 7, "a"]
    torch.testing.assert_close(mixed.left_out_loss, expected.left_out_loss)
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
    with pytest.warns(UserWarning, match="is not the mean of the posterior, which has only its names"):
        whole, inner = (
            vlearn.sweep(each, posterior, loader, F.cross_entropy, leverage=None)
            for each in (averaged, averaged.module)
        )
    assert torch.equal(whole.self_influence, inner.self_influence)
    own = vlearn.sweep(model, posterior, loader, F.cross_entropy, leverage=None)
    assert not torch.equal(whole.loss, own.loss)


class Shared(nn.Module):
    """A graph that all examples share, before them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(3, 6).double(), nn.Linear(6, 2).double()

    def forward(self, adjacency, x):
        return self.b(torch.relu(self.a(adjacency @ x)).mean(1))


def shared_graph(count):
    generator = torch.Generator().manual_seed(1)
    adjacency = torch.rand(5, 5, dtype=torch.float64, generator=generator)
    x = torch.randn(count, 5, 3, dtype=torch.float64, generator=generator)
    model = Shared().eval()
    return model, vlearn.IVON(model, lr=0.1, ess=9).posterior(), adjacency, x, torch.arange(count) % 2


@pytest.mark.parametrize("count", [1, 4, 6, 8])
def test_what_all_examples_share_is_no_example(count):
    model, posterior, adjacency, x, y = shared_graph(count)
    truth = per_example(model, lambda m: m(adjacency, x), lambda f: F.cross_entropy(f, y, reduction="none"))
    covariance = torch.diag(flat({name: posterior.variance[name] for name in moving(model)}))
    loader = [((adjacency, x), y), ((adjacency, x), y)]
    table = vlearn.sweep(model, posterior, loader, F.cross_entropy, leverage="exact")
    assert table.index.tolist() == list(range(2 * count))
    for column, expected in (
        (table.self_influence, truth.self_influence(covariance)),
        (table.deviation, truth.deviation(covariance)),
        (table.leverage, truth.leverage(covariance)),
    ):
        torch.testing.assert_close(column, torch.cat([expected, expected]))
    groups = {"ends": [0, 2 * count - 1], "one": [count]}
    found = vlearn.leave_group_out(model, posterior, loader, groups, F.cross_entropy)
    torch.testing.assert_close(found.left_out_loss[1], table.loo_loss[count])
    move = truth.gradients[[0, count - 1]].sum(0) @ covariance
    torch.testing.assert_close(found.deviation[0], truth.jacobian[[0, count - 1]] @ move)


def test_what_may_be_the_examples_or_shared_by_them_is_refused():
    model, posterior, adjacency, x, y = shared_graph(5)
    loader = [((adjacency, x), y)]
    with pytest.raises(RuntimeError, match="the examples|other examples"):
        vlearn.sweep(model, posterior, loader, F.cross_entropy)
    with pytest.raises(RuntimeError, match="the examples|other examples"):
        vlearn.leave_group_out(model, posterior, loader, {"one": [0]}, F.cross_entropy)


def test_a_group_of_one_does_not_hide_that_examples_meet():
    class Centred(nn.Module):
        def forward(self, h):
            return h - h.mean(0)

    model = network(Centred()).eval()
    with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
        vlearn.leave_group_out(model, optimizer_of(model).posterior(), [DATA[:]], {"one": [0]}, F.cross_entropy)


def test_groups_may_be_masks_and_any_collection_of_numbers(trained):
    expected = vlearn.leave_group_out(*trained, [DATA[:]], {"a": [1, 4]}, F.cross_entropy)
    mask = [i in (1, 4) for i in range(N)]
    for given in (mask, torch.tensor(mask), np.array(mask), {1, 4}, range(1, 5, 3), np.array([1, 4]), (1, np.int64(4))):
        table = vlearn.leave_group_out(*trained, [DATA[:]], {"a": given}, F.cross_entropy)
        assert table.group == ["a"] and table.size.tolist() == [2]
        torch.testing.assert_close(table.left_out_loss, expected.left_out_loss)
    for given in (mask[:5], [False, True]):
        with pytest.raises(ValueError, match=f"but groups has {len(given)} entries: give one for every example"):
            vlearn.leave_group_out(*trained, [DATA[:]], {"a": given}, F.cross_entropy)


@pytest.mark.parametrize(
    ("groups", "match"),
    [
        ({"a": mask_of, "b": [True, False]}, "groups\\['b'\\] is a mask of 2 entries and another one of 6")
        for mask_of in ([True] * N,)
    ]
    + [
        ({"a": ["cat"]}, "groups\\['a'\\] has 'cat' of type str, but it must be the whole numbers of its examples"),
        ({"a": [0.5]}, "groups\\['a'\\] has 0.5 of type float"),
        ({"a": 3}, "groups\\['a'\\] has type int, but it must be a list"),
        ({"a": "012"}, "groups\\['a'\\] has type str, but it must be a list"),
        (torch.zeros(N, 2), "groups has shape \\(6, 2\\), but it must be a list"),
        ([None] * N, "groups has None of type NoneType"),
    ],
)
def test_groups_of_no_use_are_refused(groups, match, trained):
    with pytest.raises(ValueError, match=match):
        vlearn.leave_group_out(*trained, [DATA[:]], groups, F.cross_entropy)


@pytest.mark.parametrize("wrap", [AveragedModel, DataParallel, torch.compile, lambda m: AveragedModel(DataParallel(m))])
def test_a_copy_in_a_wrapper_is_matched_by_the_names_inside(wrap, trained):
    model, posterior = trained
    other = network().eval()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    of_wrapper = vlearn.IVON(wrap(network()), lr=0.1, ess=100).posterior()
    with pytest.warns(UserWarning, match="is not the mean of the posterior, which has only its names"):
        expected, wrapped, back = (
            vlearn.sweep(each, of, [DATA[:]], F.cross_entropy, leverage=None).self_influence
            for each, of in ((other, posterior), (wrap(other), posterior), (other, of_wrapper))
        )
    torch.testing.assert_close(wrapped, expected)
    torch.testing.assert_close(back, expected)


def test_a_module_of_ones_own_called_module_is_no_wrapper():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.module, self.weight = nn.Linear(D, 3).double(), nn.Parameter(torch.ones(3, dtype=torch.float64))

        def forward(self, x):
            return self.module(x) * self.weight

    model = Two()
    posterior = vlearn.IVON(nn.Linear(D, 3).double(), lr=0.1, ess=9).posterior()  # "weight" is another one's
    with pytest.raises(ValueError, match="the posterior's 'weight' has shape"):
        vlearn.sweep(model, posterior, [DATA[:]], F.cross_entropy)


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
