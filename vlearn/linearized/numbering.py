"""Which example is which: an example's number is its place in the dataset, in whatever order a loader goes through it.

A batch may have the numbers of its examples (`IndexedDataset`). Where it has none they are

    of a DataLoader over a map-style dataset    what its sampler drew
    of anything else                            counted in its order, which is taken to be that of the data

and where a sampler cannot be followed and is not sequential, unknown. By the numbers and losses one pass through a
loader is seen to have the examples of another.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
)

from vlearn.collectives import process_count, process_rank

TARGETS = ("labels", "label")  # what a batch with names calls its target
# Where Accelerate's and Fabric's loaders keep the one whose batches they move to a device.
MOVED_LOADERS = ("base_dataloader", "_dataloader")
LOSSES_AGREE = 1e-3  # relative difference of two losses of one example, computed in batches of other examples


def example_numbers(given: Any, refusal: str) -> Tensor:
    """Numbers of examples ``[N]``, int64, from whatever a batch has of them.

    Args:
        refusal: what the error says, with {found} for what was given instead.
    Raises:
        ValueError: if they are no whole numbers, one for each example.
    """
    try:
        numbers = given if isinstance(given, Tensor) else torch.as_tensor(given, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        numbers = None
    if numbers is None or numbers.dim() != 1 or numbers.is_floating_point() or numbers.dtype == torch.bool:
        found = type(given).__name__ if numbers is None else f"shape {tuple(numbers.shape)} and {numbers.dtype}"
        raise ValueError(refusal.format(found=found))
    return numbers.long()


class SamePasses:
    """Sees that each pass through a loader gives the same examples, each once, with the losses that they have had.

    Attributes:
        losses: of the first pass that has ended, by the numbers of its examples; None before.
    """

    def __init__(self) -> None:
        self.losses: dict[int, float] | None = None
        self._now: dict[int, float] = {}

    def add(self, numbers: Tensor, loss: Tensor) -> None:
        """Take the examples of a batch: their numbers ``[n]`` and losses ``[n]``.

        Raises:
            ValueError: if this pass has had one of them.
        """
        for i, value in zip(numbers.tolist(), loss.tolist(), strict=True):
            if i in self._now:
                raise ValueError(
                    f"the training loader gave example {i} twice: use one that gives every example once, without "
                    "replacement and without filling up the last batch."
                )
            self._now[i] = value

    def end(self) -> None:
        """The pass has ended.

        Raises:
            ValueError: if its examples are others than those of the first.
        """
        now, self._now = self._now, {}
        first = self.losses = now if self.losses is None else self.losses
        if now.keys() != first.keys():
            raise ValueError(
                f"the training loader gave other examples when it was iterated again ({len(first.keys() - now.keys())} "
                f"of {len(first)} were missing): use one that gives every example each time, with drop_last=False and "
                "without sampling, and pass a loader, not an iterator."
            )
        before, after = (torch.tensor([losses[i] for i in first], device="cpu").double() for losses in (first, now))
        size = float(before[before.isfinite()].abs().mean()) if before.isfinite().any() else 0.0
        differs = ~torch.isclose(before, after, rtol=LOSSES_AGREE, atol=LOSSES_AGREE * size, equal_nan=True)
        if differs.any():
            i = list(first)[int(differs.int().argmax())]
            raise ValueError(
                f"the training loader gave other examples when it was iterated again (example {i} had the loss "
                f"{first[i]:.6g}, then {now[i]:.6g}): turn shuffling and random augmentation off (or, where it is "
                "shuffling alone, wrap the dataset in vlearn.IndexedDataset), and pass a loader, not an iterator."
            )


class IndexedDataset(Dataset):
    """A dataset that yields (x, y, index), so that a shuffled loader still names its examples.

    Args:
        dataset: a map-style dataset that yields (x, y), or dicts with their targets under "labels" or "label".

    Raises:
        TypeError: if the dataset cannot be indexed.
        ValueError: at an item that is neither.
    """

    def __init__(self, dataset: Any):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{type(dataset).__name__} has no numbered examples, but IndexedDataset takes a map-style dataset: let "
                "an iterable one yield (x, y, index) itself."
            )
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        number = index + len(self) if isinstance(index, int) and index < 0 else index
        target = next((name for name in TARGETS if isinstance(item, Mapping) and name in item), None)
        if target is not None:
            return {name: entry for name, entry in item.items() if name != target}, item[target], number
        if not isinstance(item, tuple | list) or len(item) != 2:
            given = f"{len(item)} entries" if isinstance(item, tuple | list) else f"type {type(item).__name__}"
            raise ValueError(
                f"the dataset yields items of {given}, but IndexedDataset takes (x, y), or dicts with 'labels' or "
                "'label': put several inputs into one tuple, ((x1, x2), y)."
            )
        return item[0], item[1], number


class UnrepeatedDistributedSampler(Sampler[int]):
    """One process's share of a dataset, every example in exactly one share, for passes that must see each once.

    It gives the examples rank, rank + num_replicas, ... in their order: the shares of
    ``DistributedSampler(dataset, shuffle=False)`` without what that repeats to make them equal. They differ by one
    example at most, and are empty where there are more processes than examples. There are no epochs: `sweep`,
    `influence` and `leave_group_out` do not care for the order. Training by DistributedDataParallel wants equal shares.

    Args:
        dataset: a map-style dataset, or anything that has a length.
        num_replicas: number of processes; by default those of torch.distributed, 1 without it.
        rank: which of them this is; by default this process.

    Raises:
        TypeError: if the dataset has no length.
        ValueError: if there is no such process.

    Examples:
        >>> [list(UnrepeatedDistributedSampler(range(5), num_replicas=2, rank=rank)) for rank in range(2)]
        [[0, 2, 4], [1, 3]]
    """

    def __init__(self, dataset: Sized, num_replicas: int | None = None, rank: int | None = None):
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise TypeError(
                f"{type(dataset).__name__} has no length to be shared out, but UnrepeatedDistributedSampler takes a "
                "map-style dataset: let an iterable one yield its process's share, as (x, y, index)."
            )
        self.dataset = dataset
        self.num_replicas = process_count() if num_replicas is None else num_replicas
        self.rank = process_rank() if rank is None else rank
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(
                f"rank={self.rank} of num_replicas={self.num_replicas}, but ranks count from 0 to one less: leave both "
                "out under torchrun."
            )

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, len(self.dataset), self.num_replicas))

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))


class Numbering:
    """The numbers of a loader's examples where its batches do not have them.

    Attributes:
        loader: to be iterated in the place of the given one; `drawn` is then called once for each batch.
    """

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self._seen = 0
        self._drawn: Drawn | None = None
        self._in_order = True
        sampled = _sampled(loader)
        if sampled is None:
            return
        keeps_order = not getattr(sampled, "num_workers", 0) or getattr(sampled, "in_order", True)
        if isinstance(sampled.dataset, IterableDataset):
            self._in_order = keeps_order
            return
        self._in_order = keeps_order and _is_sequential(_index_sampler(sampled))
        # A loader that numbers its examples itself keeps its persistent workers.
        follows = followed(loader) if keeps_order and not isinstance(sampled.dataset, IndexedDataset) else None
        if follows is not None:
            self.loader, self._drawn = follows

    def drawn(self) -> Tensor | None:
        """``[n]`` what the sampler drew for the batch that has just come; None if that is not known."""
        return None if self._drawn is None else self._drawn.next()

    def number(self, count: int, drawn: Tensor | None) -> Tensor:
        """The numbers ``[count]`` of the examples of a batch that has none.

        Raises:
            ValueError: if they are not known.
        """
        if drawn is not None and (len(drawn) > count or len(drawn) < count and not self._in_order):
            raise ValueError(
                f"the loader gave {count} examples where its sampler drew {len(drawn)}, so they cannot be told apart: "
                "let its dataset and collate_fn yield (x, y, index)."
            )
        if self._in_order:  # also where an item of the dataset is several examples
            self._seen += count
            return torch.arange(self._seen - count, self._seen, device="cpu")
        if drawn is None:
            raise ValueError(
                "the loader does not go through its dataset in order and does not number its examples, so they cannot "
                "be told apart: wrap the dataset in vlearn.IndexedDataset, or do not shuffle."
            )
        return drawn

    def check(self, index: Tensor, drawn: Tensor | None) -> None:
        """Raises ValueError where a batch has a number twice, as labels or groups in the place of numbers have."""
        drawn_twice = drawn is not None and len(drawn.unique()) < len(drawn)
        if len(index.unique()) < len(index) and not drawn_twice and not _is_indexed(_sampled(self.loader)):
            raise ValueError(
                "the loader gave the number of an example twice in one batch, so that what it gave are no numbers: "
                "yield (x, y, index), several inputs as ((x1, x2), y), and what else a loss needs as (x, (y, more))."
            )


def _sampled(loader: Any) -> Any:
    """The loader, or what a progress bar goes through, if it has samplers; else None."""
    while isinstance(getattr(loader, "iterable", None), Iterable):  # tqdm
        loader = loader.iterable
    return loader if all(hasattr(loader, name) for name in ("dataset", "sampler", "batch_sampler")) else None


def example_count(loader: Any) -> int | None:
    """The number of examples that a loader goes through in an epoch, all processes together; None if it does not say.

    It does where its samplers are torch's own and give each example of a dataset, or of a subset, once.
    """
    sampled = _sampled(loader)
    if sampled is None or isinstance(sampled.dataset, IterableDataset) or not isinstance(sampled.dataset, Sized):
        return None
    if sampled.batch_sampler is not None and type(sampled.batch_sampler) is not BatchSampler:
        return None
    sampler = sampled.sampler
    if type(sampler) is SubsetRandomSampler:
        return len(sampler)
    if type(sampler) is RandomSampler and (sampler.replacement or sampler.num_samples != len(sampled.dataset)):
        return None
    known = (SequentialSampler, RandomSampler, DistributedSampler, UnrepeatedDistributedSampler)
    return len(sampled.dataset) if type(sampler) in known else None


def _index_sampler(loader: Any) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _is_sequential(sampler: Any) -> bool:
    while type(sampler) is BatchSampler:
        sampler = sampler.sampler
    return type(sampler) is SequentialSampler


def _is_indexed(sampled: Any) -> bool:
    """Whether an `IndexedDataset` is what a loader reads, also through a Subset."""
    dataset = getattr(sampled, "dataset", None)
    while dataset is not None and not isinstance(dataset, IndexedDataset):
        dataset = getattr(dataset, "dataset", None)
    return dataset is not None


class Drawn:
    """A sampler that remembers what it gave, until its batches come or it begins anew."""

    def __init__(self, sampler: Any):
        self._sampler = sampler
        self._waiting: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self._waiting.clear()  # of an iteration that was broken off
        for numbers in self._sampler:
            self._waiting.append(numbers)
            yield numbers

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def next(self) -> Tensor | None:
        """``[n]`` what was drawn for the next batch; None where that is not known."""
        if not self._waiting:
            return None
        given = self._waiting.popleft()
        try:
            if isinstance(given, Sequence) or getattr(given, "ndim", 0):
                return torch.tensor([operator.index(number) for number in given], dtype=torch.long, device="cpu")
            return torch.tensor([operator.index(given)], device="cpu")
        except TypeError:  # a dataset by names has no numbers
            return None


def followed(loader: Any, keeps_workers: bool = False) -> tuple[Any, Drawn] | None:
    """A loader that shares everything with the given one, and what its sampler draws.

    None for a loader with an iteration of its own, which may leave out batches or change their order.

    Args:
        keeps_workers: let it have persistent workers of its own, where it is to be iterated again and again.
    """
    if type(loader).__iter__ is DataLoader.__iter__:
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        drawn = Drawn(_index_sampler(loader))
        # The given loader's persistent workers would go on with the sampler that they began with.
        workers = {"_iterator": None} if keeps_workers else {"persistent_workers": False}
        return _copy(loader, {name: drawn, **workers}), drawn
    for name in MOVED_LOADERS:
        moved = vars(loader).get(name) if hasattr(loader, "__dict__") else None
        follows = followed(moved, keeps_workers) if isinstance(moved, DataLoader) else None
        if follows is not None:
            return _copy(loader, {name: follows[0]}), follows[1]
    return None


def _copy(loader: Any, changed: dict[str, Any]) -> Any:
    copied = object.__new__(type(loader))
    copied.__dict__.update(vars(loader), **changed)  # past a DataLoader's refusal of new samplers
    return copied
