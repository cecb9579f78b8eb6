"""Batches as sensitivities take them: inputs, target and the number of each example, however a loader yields them."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from vlearn.per_example.replay import model_arguments

LABELS = ("labels", "label")  # under which a dict has its target


class IndexedDataset(Dataset):
    """A dataset that yields (x, y, index), so that a shuffled loader still names its examples.

    Args:
        dataset: a map-style dataset that yields (x, y), or dicts whose target is under "labels" or "label".
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        item = self.dataset[index]
        label = next((name for name in LABELS if isinstance(item, Mapping) and name in item), None)
        if label is not None:
            return {name: value for name, value in item.items() if name != label}, item[label], index
        if not isinstance(item, tuple | list) or len(item) != 2:
            given = f"{len(item)} entries" if isinstance(item, tuple | list) else f"type {type(item).__name__}"
            raise ValueError(
                f"the dataset yields an item of {given}, but IndexedDataset takes (x, y), or dicts with 'labels': let "
                "it yield ((x1, x2), y) where the model has several inputs."
            )
        x, y = item
        return x, y, index


class Batch(NamedTuple):
    """One minibatch: positional and keyword arguments of the model, targets, and ``[n]`` example numbers."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    index: Tensor

    def rows(self, rows: Tensor) -> Batch:
        """Some of the examples: those rows of every tensor that has one for each."""
        count = len(self.index)

        def of(leaf: Any) -> Any:
            has_rows = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == count
            return leaf[rows.to(leaf.device)] if has_rows else leaf

        args, kwargs, target = tree_map(of, (self.args, self.kwargs, self.target))
        return Batch(args, kwargs, target, self.index[rows])

    def fits(self, other: Batch) -> bool:
        """Whether the two can be made one: all they hold are tensors with a row for each example, of one shape."""
        mine, theirs = (tree_flatten((batch.args, batch.kwargs, batch.target)) for batch in (self, other))

        def joins(leaf: Any, its: Any) -> bool:
            if not (isinstance(leaf, Tensor) and isinstance(its, Tensor) and leaf.dim() and its.dim()):
                return False
            rows = leaf.shape[0] == len(self.index) and its.shape[0] == len(other.index)
            return rows and leaf.shape[1:] == its.shape[1:] and leaf.dtype == its.dtype

        return mine[1] == theirs[1] and all(map(joins, mine[0], theirs[0]))


def joined(parts: list[Batch]) -> Batch:
    """One batch of several that fit."""
    if len(parts) == 1:
        return parts[0]
    flat = [tree_flatten((part.args, part.kwargs, part.target)) for part in parts]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    args, kwargs, target = tree_unflatten([torch.cat(column) for column in columns], flat[0][1])
    return Batch(args, kwargs, target, torch.cat([part.index for part in parts]))


def batches(
    loader: Iterable[Any], device: torch.device, by_number: bool = False, model: nn.Module | None = None
) -> Iterator[Batch]:
    """The loader's batches on a device; without an index, examples are numbered by their place in the dataset.

    Args:
        by_number: refuse a loader whose examples cannot be numbered so.
        model: what the batches are for, whose forward says how it takes its inputs; see `model_arguments`.

    Raises:
        ValueError: if a batch is not one of those that `split` takes, has no tensors, or not one index an example.
    """
    numbers_known = in_order(loader)
    given: Iterable[Any] = loader if numbers_known else with_numbers(loader)
    if given is loader and not numbers_known:
        unknown = (
            "the loader does not go through its dataset in order and does not number its examples, so they cannot be "
            "told apart: wrap the dataset in vlearn.IndexedDataset, or do not shuffle."
        )
        if by_number:
            given = _all_numbered(given, unknown)
        elif not isinstance(getattr(loader, "dataset", None), IndexedDataset):
            warnings.warn(unknown.replace("cannot be told apart", "are numbered in its order"), stacklevel=3)
    seen = 0
    for batch in given:
        numbers = None
        if isinstance(batch, _Numbered):
            batch, numbers = batch
        x, target, index = split(batch)
        x, target = (tree_map(lambda leaf: _on(device, leaf), part) for part in (x, target))
        count = _count(x, target, index if index is not None else numbers)
        if index is None:
            index = torch.arange(seen, seen + count) if numbers is None else numbers
        else:
            _check_numbers(index, loader)
        seen += count
        args, kwargs = model_arguments(model, x)
        yield Batch(args, kwargs, target, index.cpu())


class _Numbered(NamedTuple):
    batch: Any
    numbers: Tensor


class _NumberedItems(Dataset):
    """A dataset that yields (item, number)."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.dataset[index], index


class _NumberedCollate:
    """The loader's own collate function, beside the numbers."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self._collate = collate

    def __call__(self, items: list[tuple[Any, int]]) -> _Numbered:
        return _Numbered(self._collate([item for item, _ in items]), torch.tensor([number for _, number in items]))


def in_order(loader: Any) -> bool:
    """Whether a loader gives its examples in the order of the dataset: what is no DataLoader has no other order."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return True
    batch_sampler = loader.batch_sampler
    if batch_sampler is None:
        return type(loader.sampler) is SequentialSampler
    return type(batch_sampler) is BatchSampler and type(batch_sampler.sampler) is SequentialSampler


def with_numbers(loader: Any) -> Iterable[Any]:
    """The same loader, giving the number of each example beside its batches; itself where that cannot be done."""
    batched = type(loader) is DataLoader and loader.batch_sampler is not None
    if not batched or isinstance(loader.dataset, IndexedDataset):
        return loader
    numbered = copy.copy(loader)
    # A loader refuses new attributes, as its workers have the old ones; the copy has no workers yet.
    numbered.__dict__.update(
        dataset=_NumberedItems(loader.dataset), collate_fn=_NumberedCollate(loader.collate_fn), _iterator=None
    )
    return numbered


def split(batch: Any) -> tuple[Any, Any, Tensor | None]:
    """(inputs, target, example numbers ``[n]`` or None) of a loader's batch.

    Takes (x, y), (x, y, index) as a tuple or a list, and dicts (also the BatchEncoding of Hugging Face), whose target
    is under "labels" or "label" and whose numbers are under "index".

    Raises:
        ValueError: if it is something else.
    """
    if isinstance(batch, Mapping):
        rest = dict(batch)
        label = next((name for name in LABELS if name in rest), None)
        if label is None:
            raise ValueError(
                f"the loader gave a dict of {', '.join(map(repr, rest))}, but its target must be under 'labels': let "
                "it yield (x, y) or (x, y, index), or name it so."
            )
        target, index = rest.pop(label), rest.pop("index", None)
        return rest, target, None if index is None else torch.as_tensor(index)
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        given = f"{len(batch)} entries" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(
            f"the loader gave a batch of {given}, but it must yield (x, y) or (x, y, index), or dicts with 'labels': "
            "put several inputs into one tuple, ((x1, x2), y)."
        )
    index = torch.as_tensor(batch[2]) if len(batch) == 3 else None
    if index is not None and (index.is_floating_point() or index.dim() != 1):
        raise ValueError(
            f"the loader gave a third entry of shape {tuple(index.shape)} and {index.dtype}, but it must be the number "
            "of each example: put several inputs into one tuple, ((x1, x2), y)."
        )
    return batch[0], batch[1], index


def _count(x: Any, target: Any, index: Tensor | None) -> int:
    """The number of examples: of their numbers, else of the target's rows, else of the first input's."""
    sizes = [leaf.shape[0] for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not sizes:
        raise ValueError(
            f"the loader gave inputs without a tensor ({type(x).__name__}): let it yield tensors, or tuples "
            "or dicts of them, with the examples along dimension 0."
        )
    rows = [leaf.shape[0] for leaf in tree_leaves(target) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    # A target may have a row for each token; an input may be none of the examples', as the matrix of a graph.
    count = rows[0] if rows and (rows[0] in sizes or len(set(sizes)) > 1) else sizes[0]
    if index is not None and index.shape != (count,):
        raise ValueError(
            f"the loader gave {index.numel()} indices for {count} examples, but it must give one for each."
        )
    return count


def _check_numbers(index: Tensor, loader: Any) -> None:
    """Raise ValueError where the third entry of a batch has an example twice, as labels have."""
    if not isinstance(getattr(loader, "dataset", None), IndexedDataset) and len(index.unique()) < len(index):
        raise ValueError(
            "the loader gave the number of an example twice in one batch, so that the third entry is no index: put "
            "several inputs into one tuple, ((x1, x2), y), or number the examples by vlearn.IndexedDataset."
        )


def _all_numbered(given: Iterable[Any], unknown: str) -> Iterator[Any]:
    for batch in given:
        if split(batch)[2] is None:
            raise ValueError(unknown)
        yield batch


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next(iter(model.parameters())).device


def with_progress_bar(given: Iterator[Batch], loader: Any, progress: bool | None, name: str) -> Iterable[Batch]:
    """The batches with a progress bar around them, by default where standard error is a terminal."""
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return given
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return given
    total = len(loader) if hasattr(loader, "__len__") else None
    return tqdm(given, total=total, desc=name, unit="batch", leave=False)


def _on(device: torch.device, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.to(device)
    return leaf.clone() if leaf.is_inference() else leaf  # autograd takes no tensors made under inference_mode
