"""Batches as sensitivities take them: (x, y) or (x, y, index)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import DataLoader, Dataset, RandomSampler


class IndexedDataset(Dataset):
    """A dataset that yields (x, y, index), so that a shuffled loader still names its examples.

    Args:
        dataset: a map-style dataset that yields (x, y).
    """

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        x, y = self.dataset[index]
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


def batches(loader: Iterable[Any], device: torch.device, by_number: bool = False) -> Iterator[Batch]:
    """The loader's batches on a device; without an index, examples are numbered in loader order.

    Args:
        by_number: refuse a loader whose order is not that of the examples and that does not number them.

    Raises:
        ValueError: if a batch is neither (x, y) nor (x, y, index), or has no tensors, or not one index an example.
    """
    shuffles = isinstance(loader, DataLoader) and isinstance(loader.sampler, RandomSampler)
    seen = 0
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
            given = f"{len(batch)} entries" if isinstance(batch, tuple | list) else type(batch).__name__
            raise ValueError(f"the loader gave a batch of {given}, but it must yield (x, y) or (x, y, index).")
        if by_number and shuffles and len(batch) == 2:
            raise ValueError(
                "the loader shuffles and does not number its examples, so they cannot be told apart: wrap the dataset "
                "in vlearn.IndexedDataset, or do not shuffle."
            )
        x, target = (tree_map(lambda leaf: _on(device, leaf), part) for part in batch[:2])
        sizes = [leaf.shape[0] for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.dim() > 0]
        if not sizes:
            raise ValueError(
                f"the loader gave inputs without a tensor ({type(batch[0]).__name__}): let it yield tensors, or tuples "
                "or dicts of them, with the examples along dimension 0."
            )
        index = torch.as_tensor(batch[2]) if len(batch) == 3 else torch.arange(seen, seen + sizes[0])
        if index.shape != (sizes[0],):
            raise ValueError(
                f"the loader gave {index.numel()} indices for {sizes[0]} examples, but it must give one for each."
            )
        seen += sizes[0]
        args, kwargs = ((), x) if isinstance(x, dict) else (tuple(x) if isinstance(x, tuple | list) else (x,), {})
        yield Batch(args, kwargs, target, index.cpu())


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
