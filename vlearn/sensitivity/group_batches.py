"""Which examples belong to which group, by their numbers, and each group's examples in batches of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vlearn.linearized.batches import Batch, Part, joined
from vlearn.linearized.processes import Processes

HELD_BATCHES = 16  # as many of the loader's batches may wait to be filled up


class Membership:
    """Groups of examples, in the order of their names or as the mapping has them.

    Args:
        groups: ``[N]`` the group of each example, a whole number or any name; or a mapping from names to the
            numbers of their examples, or to masks ``[N]``, which may overlap.

    Raises:
        ValueError: if there is no group, one is empty, or one names an example twice.
    """

    def __init__(self, groups: Any):
        self.labelled: int | None = None  # of how many examples the groups are given, where it is of all
        examples_of = self._of_mapping(groups) if isinstance(groups, Mapping) else self._of_labels(groups)
        if not examples_of:
            raise ValueError("groups is empty: give each example's group, or a mapping from names to examples.")
        self.names = list(examples_of)
        self.groups_of: dict[int, list[int]] = {}
        for k, (name, examples) in enumerate(examples_of.items()):
            if not examples:
                raise ValueError(f"group {name!r} has no example: leave it out.")
            if len(set(examples)) < len(examples):
                raise ValueError(f"group {name!r} has an example twice: name each once.")
            for i in examples:
                self.groups_of.setdefault(i, []).append(k)
        self.sizes = torch.tensor([len(examples) for examples in examples_of.values()], device="cpu")

    def __len__(self) -> int:
        return len(self.names)

    def _of_labels(self, groups: Any) -> dict[Any, list[int]]:
        labels = _values(groups, "groups")
        self.labelled = len(labels)
        examples_of: dict[Any, list[int]] = {}
        for i, label in enumerate(labels):
            if label is None or isinstance(label, float | complex) or not isinstance(label, Hashable):
                raise ValueError(
                    f"groups has {label!r} of type {type(label).__name__}, but it must name the group of each example "
                    "by a whole number, a string or another name."
                )
            examples_of.setdefault(label, []).append(i)
        try:
            return {label: examples_of[label] for label in sorted(examples_of)}
        except TypeError:  # names of several kinds stay in the order of their first examples
            return examples_of

    def _of_mapping(self, groups: Mapping[Any, Any]) -> dict[Any, list[int]]:
        examples_of: dict[Any, list[int]] = {}
        for name, given in groups.items():
            values = _values(given, f"groups[{name!r}]")
            if values and all(isinstance(value, bool) for value in values):
                if self.labelled not in (None, len(values)):
                    raise ValueError(
                        f"groups[{name!r}] is a mask of {len(values)} entries and another one of {self.labelled}, but "
                        "each needs one for every example."
                    )
                self.labelled = len(values)
                values = [i for i, is_member in enumerate(values) if is_member]
            for value in values:
                if not isinstance(value, int) or isinstance(value, bool):
                    raise ValueError(
                        f"groups[{name!r}] has {value!r} of type {type(value).__name__}, but it must be the whole "
                        "numbers of its examples, or a mask of bools, one for every example."
                    )
            examples_of[name] = values
        return examples_of

    def digest(self) -> str:
        """What two memberships share if they are the same."""
        return hashlib.sha256(repr((self.names, sorted(self.groups_of.items()))).encode()).hexdigest()

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
                    f"the loader gave example {i}, but groups has {members.labelled} entries: give one for every "
                    "example, in the order of their numbers."
                )
            for k in members.groups_of.get(i, ()):
                rows_of_group.setdefault(k, []).append(row)
        for k, rows in rows_of_group.items():
            self._counts[k] += len(rows)
            yield k, torch.tensor(rows, device="cpu")

    def check(self, processes: Processes) -> None:
        """Raises ValueError unless every group was complete in all processes together, and no example came twice."""
        counts = torch.stack(processes.each(lambda: self._counts)).sum(0)
        wrong = (counts != self._members.sizes).nonzero().flatten().tolist()
        if wrong:
            k = wrong[0]
            raise ValueError(
                f"group {self._members.names[k]!r} has {int(self._members.sizes[k])} examples, but a pass through the "
                f"loader gave {int(counts[k])} of them: use a loader that gives every example once, each time it is "
                "iterated, over several processes by vlearn.UnrepeatedDistributedSampler and sync=True."
            )


def batches_by_group(
    batches: Iterable[Batch], seen: PassCounter, only: Tensor | None = None
) -> Iterator[tuple[int, Batch]]:
    """(group, some of its examples), in batches about as large as the loader's: the size at which a pass is cheapest.

    Where an index gives the examples, each batch of the loader is kept whole, once for each group in it.

    Args:
        only: ``[K]`` the groups that are wanted.
    """
    held: dict[int, list[Part]] = {}
    full = 0

    def count(k: int) -> int:
        return sum(len(part.index) for part in held[k])

    for batch in batches:
        full = max(full, len(batch.index))
        for k, rows in seen.rows_of(batch.index):
            if only is not None and not bool(only[k]):
                continue
            if batch.example_rows:  # what else belongs to an example, as the edges of a graph, is not known
                yield k, replace(batch, members=rows)
                continue
            part = batch.part(rows)
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


def _values(given: Any, name: str) -> list[Any]:
    """The entries of a list, a set, a tensor, an array or a pandas Series, as Python's own values."""
    if not isinstance(given, Iterable) or isinstance(given, str) or getattr(given, "ndim", 1) != 1:
        shape = getattr(given, "shape", None)
        found = f"type {type(given).__name__}" if shape is None else f"shape {tuple(shape)}"
        raise ValueError(f"{name} has {found}, but it must be a list of one value for each example.")
    values = given.tolist() if hasattr(given, "tolist") else list(given)  # pyright: ignore
    return [value.item() if getattr(value, "shape", None) == () else value for value in values]
