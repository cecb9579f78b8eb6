"""Batches as sensitivities take them: (x, y) or (x, y, index)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import Dataset


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


def batches(loader: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """The loader's batches on a device; without an index, examples are numbered in loader order.

    Raises:
        ValueError: if a batch is neither (x, y) nor (x, y, index).
    """
    seen = 0
    for batch in loader:
        if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
            found = f"{len(batch)} entries" if isinstance(batch, tuple | list) else type(batch).__name__
            raise ValueError(f"the loader gave a batch of {found}, but it must yield (x, y) or (x, y, index).")
        x, target = (tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, b) for b in batch[:2])
        args, kwargs = ((), x) if isinstance(x, dict) else (tuple(x) if isinstance(x, tuple | list) else (x,), {})
        count = next(leaf.shape[0] for leaf in tree_leaves(x) if isinstance(leaf, Tensor))
        index = torch.as_tensor(batch[2]) if len(batch) == 3 else torch.arange(seen, seen + count)
        seen += count
        yield Batch(args, kwargs, target, index.cpu())
