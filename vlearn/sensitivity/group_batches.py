"""Which examples belong to which group, by their numbers, and each group's examples in batches of their own."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from vlearn.linearized.batches import Batch, joined

HELD_BATCHES = 16  # as many of the loader's batches may wait to be filled up


class Membership:
    """Groups of examples, in the order of their names or as the mapping has them.

    Args:
        groups: ``[N]`` the group of each example, a whole number or any name, or a mapping from names to the numbers
            of their examples, which may overlap.

    Raises:
        ValueError: if there is no group, one is empty, or one names an example twice.
    """

    def __init__(self, groups: Any):
        if isinstance(groups, Mapping):
            examples_of = {name: _numbers(examples, f"groups[{name!r}]") for name, examples in groups.items()}
            self.labelled: int | None = None
        else:
            names = _names(groups)
            examples_of = {
                name: torch.tensor([i for i, each in enumerate(names) if each == name]) for name in _sorted(set(names))
            }
            self.labelled = len(names)
        if not examples_of:
            raise ValueError("groups is empty: give each example's group, or a mapping from names to examples.")
        self.names = list(examples_of)
        self.groups_of: dict[int, list[int]] = {}
        for k, (name, examples) in enumerate(examples_of.items()):
            if not len(examples):
                raise ValueError(f"group {name!r} has no example: leave it out.")
            if len(examples.unique()) < len(examples):
                raise ValueError(f"group {name!r} has an example twice: name each once.")
            for i in examples.tolist():
                self.groups_of.setdefault(i, []).append(k)
        self.sizes = torch.tensor([len(examples) for examples in examples_of.values()])

    def __len__(self) -> int:
        return len(self.names)

    def count(self) -> PassCounter:
        """A count of the members that one pass through the data comes across."""
        return PassCounter(self)


class PassCounter:
    """Members that one pass has come across."""

    def __init__(self, members: Membership):
        self._members = members
        self._counts = torch.zeros_like(members.sizes)

    def rows_of(self, index: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(group, its rows in this batch) for each group that has any."""
        members, rows_of_group = self._members, {}
        for row, i in enumerate(index.tolist()):
            if members.labelled is not None and not 0 <= i < members.labelled:
                raise ValueError(
                    f"the loader gave example {i}, but groups has {members.labelled} entries: give the group of every "
                    "example, in the order of their numbers."
                )
            for k in members.groups_of.get(i, ()):
                rows_of_group.setdefault(k, []).append(row)
        for k, rows in rows_of_group.items():
            self._counts[k] += len(rows)
            yield k, torch.tensor(rows)

    def check(self) -> None:
        """Raises ValueError unless every group was complete and no example came twice."""
        wrong = (self._counts != self._members.sizes).nonzero().flatten().tolist()
        if wrong:
            k = wrong[0]
            raise ValueError(
                f"group {self._members.names[k]!r} has {int(self._members.sizes[k])} examples, but a pass through the "
                f"loader gave {int(self._counts[k])} of them: use a loader that gives every example once, each time it "
                "is iterated."
            )


def batches_by_group(
    batches: Iterable[Batch], seen: PassCounter, only: Tensor | None = None
) -> Iterator[tuple[int, Batch]]:
    """(group, some of its examples), in batches about as large as the loader's: the size at which a pass is cheapest.

    Args:
        only: ``[K]`` the groups that are wanted.
    """
    held: dict[int, list[Batch]] = {}
    full = 0

    def count(k: int) -> int:
        return sum(len(part.index) for part in held[k])

    for batch in batches:
        full = max(full, len(batch.index))
        for k, rows in seen.rows_of(batch.index):
            if only is not None and not bool(only[k]):
                continue
            part = batch.rows(rows)
            if k in held and not held[k][-1].fits(part):
                yield k, joined(held.pop(k))
            held.setdefault(k, []).append(part)
        while held:
            most = max(held, key=count)
            if count(most) < full and sum(map(count, held)) <= HELD_BATCHES * full:
                break
            yield most, joined(held.pop(most))
    for k, parts in held.items():
        yield k, joined(parts)


def _names(groups: Any) -> list[Hashable]:
    """The name of each example's group, from a tensor, an array, a series or a sequence."""
    if isinstance(groups, Tensor) or all(isinstance(each, int | float) for each in groups):
        values = torch.as_tensor(groups)
        return _numbers(values.long() if values.dtype == torch.bool else values, "groups").tolist()
    return groups.tolist() if hasattr(groups, "tolist") else list(groups)


def _sorted(names: set[Hashable]) -> list[Hashable]:
    try:
        return sorted(names)  # pyright: ignore
    except TypeError:  # names of several kinds
        return sorted(names, key=repr)


def _numbers(values: Any, name: str) -> Tensor:
    numbers = torch.as_tensor(values)
    if numbers.numel() == 0:
        return numbers.reshape(0).long()
    if numbers.dim() != 1 or numbers.is_floating_point() or numbers.is_complex():
        raise ValueError(
            f"{name} has shape {tuple(numbers.shape)} and type {numbers.dtype}, but it must be a list of whole numbers."
        )
    return numbers.cpu().long()
