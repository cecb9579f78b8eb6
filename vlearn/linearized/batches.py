"""Batches as sensitivities take them: inputs, target, and a number for each example, in whatever form they come."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import Dataset, IterableDataset

from vlearn.capture.names import argument_names, model_arguments
from vlearn.capture.pytrees import plain, rows_along
from vlearn.layers.example_axes import Axes
from vlearn.layers.example_rows import ExampleRows
from vlearn.linearized.numbering import TARGETS, Numbering, example_numbers
from vlearn.per_example.measured_rows import ExampleIndex, check_example_index, told_rows

T = TypeVar("T")
NUMBERS = ("index", "idx")  # what a batch with names calls the numbers of its examples


@dataclass(frozen=True, eq=False)
class Batch:
    """One minibatch: positional and keyword arguments of the model, targets, and ``[n]`` example numbers.

    Attributes:
        example_rows: which examples the rows of concatenated inputs are of, where an index gives the examples.
        members: ``[k]`` of such a batch, which cannot be cut, the only examples that count; None for all.
        input_axes: along which axis of each leaf of (args, kwargs) the examples lie, where a pass has shown it; None
            where the sizes must tell.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    target: Any
    index: Tensor
    example_rows: Sequence[ExampleRows] = ()
    members: Tensor | None = None
    input_axes: Axes | None = None

    @property
    def axes(self) -> Axes:
        """Along which axis of each leaf of arguments and target the examples lie; None: it is the same for all."""
        inputs, target = ([*map(self._axis_by_size, tree_leaves(x))] for x in ((self.args, self.kwargs), self.target))
        return [*(inputs if self.input_axes is None else self.input_axes), *target]

    def _axis_by_size(self, leaf: Any) -> int | None:
        return 0 if isinstance(leaf, Tensor) and leaf.shape[:1] == self.index.shape else None

    def rows(self, rows: Tensor) -> Batch:
        """Some of the examples, as a batch."""
        return joined([self.part(rows)])

    def part(self, rows: Tensor) -> Part:
        """Some of the examples: their entries of every tensor that has some for each, and all of the rest."""
        leaves, structure = tree_flatten((self.args, self.kwargs, self.target))
        axes = self.axes
        taken = [
            leaf if axis is None else rows_along(leaf, axis, rows.to(leaf.device))
            for leaf, axis in zip(leaves, axes, strict=True)
        ]
        return Part(taken, axes, structure, self.index[rows])


@dataclass(frozen=True, eq=False)
class Part:
    """Some of the examples of a batch.

    Attributes:
        leaves: all that its arguments and target hold.
        axes: along which axis of each the examples lie; None: it is the same for all.
        structure: how they are held.
        index: ``[n]`` numbers of the examples.
    """

    leaves: list[Any]
    axes: Axes
    structure: TreeSpec
    index: Tensor

    def fits(self, other: Part) -> bool:
        """Whether the two can be made one: their entries are of one shape, and the rest is the very same."""

        def joins(leaf: Any, its: Any, axis: int | None) -> bool:
            if axis is None:
                return leaf is its
            return leaf.select(axis, 0).shape == its.select(axis, 0).shape and leaf.dtype == its.dtype

        alike = self.structure == other.structure and self.axes == other.axes
        return alike and all(map(joins, self.leaves, other.leaves, self.axes))


def joined(parts: list[Part]) -> Batch:
    """One batch of several parts that fit."""
    first, columns = parts[0], zip(*(part.leaves for part in parts), strict=True)
    leaves = [
        column[0] if axis is None or len(parts) == 1 else torch.cat(column, axis)
        for column, axis in zip(columns, first.axes, strict=True)
    ]
    args, kwargs, target = tree_unflatten(leaves, first.structure)
    input_axes = first.axes[: len(tree_leaves((args, kwargs)))]
    return Batch(args, kwargs, target, torch.cat([part.index for part in parts]), input_axes=input_axes)


def batches(loader: Iterable[Any], model: nn.Module, example_index: ExampleIndex | None = None) -> Iterator[Batch]:
    """The loader's batches, where the model is and as its forward takes them.

    Args:
        example_index: which example each row of concatenated inputs is of, see `vlearn.sweep`.
    Raises:
        TypeError: if the loader gives no batches.
        ValueError: if a batch is none that `split` takes, has no tensors, or its examples cannot be numbered.
    """
    check_example_index(example_index)
    _check_loader(loader)
    device, names = device_of(model), argument_names(model)
    numbering = Numbering(loader)
    for given in numbering.loader:
        drawn = numbering.drawn()
        x, target, index = split_on(device, given, names)
        known = index if index is not None else drawn
        arguments, rows = model_arguments(model, x), []
        if example_index is None:
            count = _count(x, target, None if known is None else len(known))
        else:
            rows = _told_rows(example_index, model, arguments, target)
            count = rows[0].num_examples
        if count == 0:  # as where everything of a batch was filtered out
            continue
        if index is None:
            index = numbering.number(count, drawn)
        elif len(index) != count:
            raise ValueError(
                f"the loader gave {len(index)} indices for {count} examples, but it must give one for each."
            )
        else:
            numbering.check(index, drawn)
        yield Batch(*arguments, target, index, rows)


def _check_loader(loader: object) -> None:
    if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
        raise TypeError(
            f"the loader is a {type(loader).__name__}, which gives single examples: pass DataLoader(dataset, "
            "batch_size=...), or batch_size=None if its items are batches."
        )
    if not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        name = getattr(loader, "__name__", type(loader).__name__)
        raise TypeError(f"the loader is {name}, which gives no batches: pass a DataLoader, or a list of (x, y).")


def split_on(device: torch.device, batch: Any, arguments: Iterable[str] = ()) -> tuple[Any, Any, Tensor | None]:
    """As `split`, with inputs and target on a device."""
    x, target, index = split(batch, arguments)
    return tree_map(partial(_on, device), x), tree_map(lambda leaf: plain(_on(device, leaf)), target), index


def split(batch: Any, arguments: Iterable[str] = ()) -> tuple[Any, Any, Tensor | None]:
    """(inputs, target, numbers ``[n]`` of the examples or None) of a batch.

    A tuple or list is (x, y) or (x, y, index). A mapping (a dict, Hugging Face's BatchEncoding), a dataclass, or a
    named tuple that calls its target so, has the target under "labels" or "label" and, if it has any, the numbers
    under "index" or "idx"; all the rest are inputs.

    Args:
        arguments: names of the model's inputs, which are no numbers.

    Raises:
        ValueError: if it is something else.
    """
    named = _by_name(batch)
    if named is not None:
        target = next((name for name in TARGETS if name in named), None)
        if target is None:
            raise ValueError(
                f"the loader gave a {type(batch).__name__} of {', '.join(map(repr, named))}, but its target must be "
                "under 'labels' or 'label': let it yield (x, y) or (x, y, index), or name it so."
            )
        number = next((name for name in NUMBERS if name in named and name not in arguments), None)
        x = {name: entry for name, entry in named.items() if name not in (target, number)}
        return x, _plain(named[target]), None if number is None else _numbers(named[number], f"{number!r}")
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        given = f"{len(batch)} entries" if isinstance(batch, tuple | list) else type(batch).__name__
        raise ValueError(
            f"the loader gave a batch of {given}, but it must yield (x, y) or (x, y, index), or dicts with 'labels': "
            "put several inputs into one tuple, ((x1, x2), y)."
        )
    index = _numbers(batch[2], "third entry") if len(batch) == 3 else None
    return _plain(batch[0]), _plain(batch[1]), index


def _by_name(batch: Any) -> dict[str, Any] | None:
    """The entries of a batch by their names; None for one that goes by position."""
    if isinstance(batch, Mapping):
        return dict(batch)
    if is_dataclass(batch):
        return {each.name: getattr(batch, each.name) for each in fields(batch)}
    names = getattr(batch, "_fields", ())
    if not isinstance(batch, tuple) or not names:
        return None
    first_is_x = len(names) > 1 and names[0] not in TARGETS + NUMBERS
    if first_is_x and (len(names) == 2 or len(names) == 3 and names[2] in NUMBERS):
        return None
    return dict(zip(names, batch, strict=True))


def _plain(entry: Any) -> Any:
    """A mapping as the dict that it is: torch sees no tensors in others."""
    return dict(entry) if isinstance(entry, Mapping) else entry


def _numbers(given: Any, what: str) -> Tensor:
    refusal = (
        f"the loader gave a {what} of {{found}}, but it must be the number of each example: put several inputs into "
        "one tuple, ((x1, x2), y), and what else a loss needs into the target, (x, (y, more))."
    )
    return example_numbers(given, refusal).cpu()


def _count(x: Any, target: Any, known: int | None) -> int:
    """The number of examples: what is known, else the rows of an input that are also those of a target.

    An input may be none of the examples', as the matrix of a graph that they share, and a target have a row for each
    token: only what both have counts, and if there is none the rows of the first input.

    Args:
        known: how many numbers there are; it counts if an input has as many rows.
    """
    sizes, targets = ([leaf.shape[0] for leaf in tree_leaves(part) if _has_rows(leaf)] for part in (x, target))
    hidden = next((leaf for leaf in tree_leaves(x) if is_dataclass(leaf)), None)
    if not sizes or hidden is not None:
        given = f"without a tensor ({type(x).__name__})" if hidden is None else f"in a {type(hidden).__name__}"
        raise ValueError(
            f"the loader gave inputs {given}: let it yield tensors, or tuples or dicts of them, with the examples "
            "along dimension 0."
        )
    candidates = [known, *(size for size in [sizes[0]] if size in targets), *targets]
    return next((count for count in candidates if count in sizes), sizes[0])


def _told_rows(
    example_index: ExampleIndex, model: nn.Module, arguments: tuple[Any, Any], target: Any
) -> list[ExampleRows]:
    """As `told_rows`, of as many examples as there are targets.

    Raises:
        ValueError: if there is a target for each row.
    """
    count = next((leaf.shape[0] for leaf in tree_leaves(target) if _has_rows(leaf)), None)
    rows = told_rows(example_index, model, *arguments, count)
    if any(len(each) == count and int(each.index.max()) + 1 < len(each) for each in rows):
        raise ValueError(
            f"the loader gave {count} targets, one for each row and not for each example that example_index names: "
            "take a loss of one value for each example."
        )
    return rows


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    return next(iter(model.parameters())).device


def with_progress_bar(
    given: Iterator[T], loader: Any, progress: bool | None, name: str, unit: str = "batch"
) -> Iterable[T]:
    """The batches, or other units, with a progress bar around them, by default where standard error is a terminal."""
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return given
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return given
    try:
        total = len(loader)
    except (TypeError, NotImplementedError):  # a stream has no length
        total = None
    return tqdm(given, total=total, desc=name, unit=unit, leave=False)


def _on(device: torch.device, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.to(device)
    return leaf.clone() if leaf.is_inference() else leaf  # autograd takes no tensors made under inference_mode
