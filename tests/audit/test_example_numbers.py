"""Every batch's numbers are those of its examples, which show by their content which ones they are."""

import operator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import vlearn
from vlearn.audit.example_numbers import CARRIED, CARRIED_TARGETS, ExampleNumbers

N = 20
WHOLE = TensorDataset(100 + torch.arange(N), torch.arange(N) % 3)  # example n holds 100 + n


class Pair(NamedTuple):
    x: Tensor
    label: Tensor


class Form(Dataset):
    """The same examples in another form."""

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return N

    def __getitem__(self, i):
        x, y = WHOLE[i]
        return {"dict": {"x": x, "labels": y}, "named tuple": Pair(x, y), "list": [x, y]}[self.form]


class Stream(IterableDataset):
    """Examples without places, in an order of its own."""

    def __init__(self, form="dict"):
        self.form = form

    def __iter__(self):
        for n in (7, 3, 3, 19, 0, 11):
            item = {"x": 100 + n, "labels": n % 3, "row": n}
            yield item if self.form == "dict" else (item["x"], item["labels"], n)


def contents(batch):
    if isinstance(batch, dict):
        return batch["x"]
    return batch[0]


def pairs(numbers, loader, epochs=2):
    """(number, what the example holds) of all examples of some epochs."""
    found = []
    for _ in range(epochs):
        for batch in numbers.follow(loader):
            x = contents(batch)
            found += zip(numbers.of(batch, len(x)).tolist(), (x - 100).tolist(), strict=True)
    return found


LOADERS = {
    "in order": lambda: DataLoader(WHOLE, 6),
    "shuffled": lambda: DataLoader(WHOLE, 6, shuffle=True),
    "drop last": lambda: DataLoader(WHOLE, 6, shuffle=True, drop_last=True),
    "workers": lambda: DataLoader(WHOLE, 3, shuffle=True, num_workers=2),
    "persistent workers": lambda: DataLoader(WHOLE, 3, shuffle=True, num_workers=2, persistent_workers=True),
    "with replacement": lambda: DataLoader(WHOLE, 6, sampler=WeightedRandomSampler(torch.rand(N), 30)),
    "batch sampler": lambda: DataLoader(WHOLE, batch_sampler=BatchSampler(RandomSampler(WHOLE), 6, False)),
    "distributed": lambda: DataLoader(WHOLE, 3, sampler=DistributedSampler(WHOLE, num_replicas=3, rank=1)),
    "dict": lambda: DataLoader(Form("dict"), 6, shuffle=True),
    "named tuple": lambda: DataLoader(Form("named tuple"), 6, shuffle=True),
    "list": lambda: DataLoader(Form("list"), 6, shuffle=True),
    "indexed": lambda: DataLoader(vlearn.IndexedDataset(WHOLE), 6, shuffle=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_numbers_are_places_in_the_dataset(name):
    numbers = ExampleNumbers()
    found = pairs(numbers, LOADERS[name]())
    assert found and all(number == held for number, held in found)
    assert numbers.num_data == N


SPLITS = {
    "subset": Subset(WHOLE, [4, 2, 19, 7]),
    "subset of a subset": Subset(Subset(WHOLE, torch.tensor([4, 2, 19, 7])), [3, 0, 0]),
    "concatenation of subsets": ConcatDataset([Subset(WHOLE, [5, 6]), Subset(WHOLE, [6, 1, 2])]),
    "indexed inside": Subset(vlearn.IndexedDataset(WHOLE), [4, 2]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_parts_of_the_whole_keep_its_numbers(name):
    numbers = ExampleNumbers(WHOLE)
    found = pairs(numbers, DataLoader(SPLITS[name], 2, shuffle=True))
    assert len(found) == 2 * len(SPLITS[name]) and all(number == held for number, held in found)
    assert numbers.num_data == N


def test_a_concatenation_counts_through_its_parts():
    other = TensorDataset(100 + N + torch.arange(5), torch.zeros(5))
    both = ConcatDataset([WHOLE, other])
    assert all(number == held for number, held in pairs(ExampleNumbers(), DataLoader(both, 4, shuffle=True)))
    numbers = ExampleNumbers(both)
    assert all(number == held for number, held in pairs(numbers, DataLoader(Subset(both, [22, 3]), 2, shuffle=True)))
    assert numbers.num_data == N + 5
    with pytest.raises(ValueError, match="has examples that are not of the dataset that was given, or that came first"):
        ExampleNumbers(WHOLE).follow(DataLoader(both, 4))


def test_without_a_whole_a_subset_counts_its_own_places():
    found = pairs(ExampleNumbers(), DataLoader(Subset(WHOLE, [4, 2, 19]), 2, shuffle=True), epochs=1)
    assert sorted(found) == [(0, 4), (1, 2), (2, 19)]


def test_a_dataset_that_is_made_again_of_the_same_tensors_has_the_same_places():
    numbers = ExampleNumbers()
    for _ in range(2):
        loader = DataLoader(TensorDataset(*WHOLE.tensors), 3, shuffle=True)
        assert all(number == held for number, held in pairs(numbers, loader, epochs=1))


def test_another_dataset_is_refused():
    with pytest.raises(ValueError, match="TensorDataset has examples that are not of the dataset"):
        ExampleNumbers(WHOLE).follow(DataLoader(TensorDataset(torch.zeros(3)), 2))


def test_an_epoch_that_was_broken_off_leaves_nothing_behind():
    numbers, loader = ExampleNumbers(), DataLoader(WHOLE, 3, shuffle=True, num_workers=1)
    for batch in numbers.follow(loader):
        numbers.of(batch, 3)
        break
    assert all(number == held for number, held in pairs(numbers, loader))


@pytest.mark.parametrize("name", ["shuffled", "workers", "with replacement"])
def test_following_changes_neither_the_batches_nor_the_random_state(name):
    def run(follow):
        torch.manual_seed(0)
        numbers, loader = ExampleNumbers(), LOADERS[name]()
        batches = [contents(batch) for _ in range(2) for batch in (numbers.follow(loader) if follow else loader)]
        return torch.cat(batches), torch.get_rng_state()

    for followed, plain in zip(run(True), run(False), strict=True):
        assert torch.equal(followed, plain)


@pytest.mark.parametrize(
    ("form", "key"),
    [("dict", "row"), ("tuple", 2), ("tuple", lambda batch: batch[2].tolist()), ("dict", lambda batch: batch["row"])],
    ids=["name", "position", "callable giving a list", "callable giving a tensor"],
)
def test_a_stream_has_the_key_that_is_given(form, key):
    numbers = ExampleNumbers(key=key, num_data=N)
    found = pairs(numbers, DataLoader(Stream(form), 4), epochs=1)
    assert [number for number, _ in found] == [7, 3, 3, 19, 0, 11] and all(n == held for n, held in found)


def test_a_stream_without_a_key_is_refused():
    for loader in (DataLoader(Stream(), 4), iter([])):
        with pytest.raises(ValueError, match="have no places: give key="):
            ExampleNumbers(num_data=N).follow(loader)
    with pytest.raises(ValueError, match="not known: give num_data"):
        _ = ExampleNumbers(key="row").num_data


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("other", "without the entry 'other'"),
        (lambda batch: ["a", "b", "c", "d"], "for names, look them up"),
        (lambda batch: torch.rand(4), "must give one whole number for each example"),
        (lambda batch: [1, 2], "2 numbers for 4 examples"),
        (lambda batch: [1, 2, 3, 20], "numbers reach from 1 to 20, but num_data=20"),
    ],
)
def test_a_key_that_gives_no_numbers_is_refused(key, message):
    numbers = ExampleNumbers(key=key, num_data=N)
    batch = next(iter(numbers.follow(DataLoader(Stream(), 4))))
    with pytest.raises(ValueError, match=message):
        numbers.of(batch, 4)


def test_a_list_of_batches_is_counted_in_its_order():
    numbers = ExampleNumbers(num_data=7)
    batches = [(100 + torch.arange(4), None), (104 + torch.arange(3), None)]
    assert pairs(numbers, batches) == 2 * [(n, n) for n in range(7)]


def test_a_loader_that_gives_other_than_was_drawn_is_refused():
    loader = DataLoader(WHOLE, 4, shuffle=True, collate_fn=lambda items: torch.utils.data.default_collate(items * 2))
    numbers = ExampleNumbers()
    batch = next(iter(numbers.follow(loader)))
    with pytest.raises(ValueError, match="4 numbers for 8 examples"):
        numbers.of(batch, 8)


def test_batches_out_of_order_are_refused():
    with pytest.raises(ValueError, match="cannot be followed to its sampler"):
        ExampleNumbers().follow(DataLoader(WHOLE, 4, num_workers=1, in_order=False))


@pytest.mark.parametrize("workers", [0, 2])
def test_numbers_that_a_batch_carries_are_places_too(workers):
    numbers, loader = ExampleNumbers(), DataLoader(Form("dict"), 6, True, num_workers=workers)
    for _ in range(2):  # the second time changes nothing
        source = numbers.carry(loader, operator.itemgetter("labels"))
        assert source == (numbers.dataset, 6, torch.utils.data.default_collate)
    for _ in range(2):
        for batch in loader:
            carried = batch.pop(CARRIED)
            assert numbers.of_carried(carried, len(carried)).tolist() == (batch["x"] - 100).tolist()
            assert torch.equal(batch.pop(CARRIED_TARGETS), batch["labels"]) and batch.keys() == {"x", "labels"}


def test_a_stream_carries_its_key_past_a_collator_that_drops_it():
    def collate(items):
        return {"x": torch.tensor([item["x"] for item in items])}

    numbers, loader = ExampleNumbers(key="row", num_data=N), DataLoader(Stream(), 4, collate_fn=collate)
    numbers.carry(loader, operator.itemgetter("x"))
    for batch in loader:
        carried = batch[CARRIED]
        assert numbers.of_carried(carried, len(carried)).tolist() == (batch["x"] - 100).tolist()


def test_accelerates_loaders_are_followed_also_where_they_skip():
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(WHOLE, 6, shuffle=True))
    numbers = ExampleNumbers(WHOLE)
    found = pairs(numbers, loader)
    assert len(found) == 2 * N and all(number == held for number, held in found)
    found = pairs(numbers, accelerate.skip_first_batches(loader, 2), epochs=1)
    assert len(found) == N - 12 and all(number == held for number, held in found)


class TestHuggingFaceDatasets:
    @pytest.fixture
    def dataset(self):
        datasets = pytest.importorskip("datasets")
        rows = {"x": [100 + n for n in range(N)], "labels": [0] * N, "row": list(range(N))}
        return datasets.Dataset.from_dict(rows).with_format("torch")

    def test_places_are_the_numbers(self, dataset):
        assert all(number == held for number, held in pairs(ExampleNumbers(), DataLoader(dataset, 6, shuffle=True)))

    def test_a_column_goes_through_selections_and_shuffles(self, dataset):
        part = dataset.shuffle(seed=1).select(range(8))
        numbers = ExampleNumbers(part, key="row", num_data=N)
        found = pairs(numbers, DataLoader(part, 3, shuffle=True))
        assert len(found) == 16 and all(number == held for number, held in found)

    def test_a_column_counts_also_where_the_loaders_dataset_has_lost_it(self, dataset):
        part = dataset.shuffle(seed=1)
        lost = part.remove_columns(["row"])
        found = pairs(ExampleNumbers(part, key="row"), DataLoader(lost, 3, shuffle=True))
        assert all(number == held for number, held in found)

    def test_a_dataset_without_some_columns_has_the_same_places(self, dataset):
        lost = dataset.remove_columns(["row"])
        assert all(n == held for n, held in pairs(ExampleNumbers(dataset), DataLoader(lost, 3, shuffle=True)))
        with pytest.raises(ValueError, match="not of the dataset that was given, or that came first"):
            ExampleNumbers(dataset).follow(DataLoader(lost.select(range(19, -1, -1)), 3))
