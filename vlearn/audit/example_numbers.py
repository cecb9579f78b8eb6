"""The number of each example of a training run, whatever order and form its loader gives it in.

    a loader over a map-style dataset    what its sampler draws, in shuffling, batch and distributed samplers, workers
    a Subset or ConcatDataset of it      the place in the dataset that is named as the whole
    a dataset without places             a key that the batch has, such as the number of a row in a database
    Hugging Face's Trainer               what its sampler draws travels with the batch, past the columns that it drops

Nothing of this changes a batch that a training loop sees: numbers go beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from vlearn.linearized.numbering import MOVED_LOADERS, Drawn, IndexedDataset, example_numbers, followed

Key = str | int | Callable[[Any], Any]
CARRIED, CARRIED_TARGETS = "vlearn_example_number", "vlearn_target"  # entries of a batch


class Source(NamedTuple):
    """Where a training loader takes its batches from."""

    dataset: Any
    batch_size: int | None
    collate_fn: Callable[[Any], Any]


class ExampleNumbers:
    """Numbers the examples of training batches from 0 to num_data - 1.

    Args:
        dataset: the whole, whose places are the numbers; default the dataset of the loader. Loaders over a `Subset` or
            `ConcatDataset` of it keep its numbers.
        key: where a batch has the numbers itself: the name or the position of an entry, or a callable from the batch to
            ``[n]`` integers. Of a Hugging Face dataset, the name of the column that has them.
        num_data: number of examples; default the length of the dataset.

    Raises:
        ValueError: if ``num_data`` is less than the dataset has examples.
    """

    def __init__(self, dataset: Any = None, key: Key | None = None, num_data: int | None = None):
        self.dataset, self.key = _unwrapped(dataset), key
        self._given = None if num_data is None else operator.index(num_data)
        self._places: np.ndarray | None = None  # numbers by place in the loader's dataset
        self._drawn: Drawn | None = None
        self._counted: int | None = None  # examples of batches that come in one order
        self._source: tuple[Any, Any, Drawn | None, np.ndarray | None] | None = None  # what is followed, and by what
        if self.dataset is not None:
            self._check_reaches(self.dataset)

    @property
    def num_data(self) -> int:
        """The number of examples.

        Raises:
            ValueError: if it is not known.
        """
        if self._given is not None:
            return self._given
        column = _column(self.dataset, self.key)
        if column is not None and len(column):
            self._given = int(column.max()) + 1  # asked for at every batch
            return self._given
        if self.dataset is None or isinstance(self.dataset, IterableDataset) or not hasattr(self.dataset, "__len__"):
            raise ValueError("the number of training examples is not known: give num_data, or the dataset.")
        return len(self.dataset)

    def follow(self, loader: Iterable[Any]) -> Any:
        """A loader to iterate in the place of the given one, or the same; `of` then numbers what it gives.

        Raises:
            ValueError: if its examples cannot be numbered.
        """
        if self._source is not None and self._source[0] is loader:  # another epoch
            _, its, self._drawn, self._places = self._source
            self._counted = 0 if self._counted is not None else None
            return its
        its, drawn, places, self._counted = loader, None, None, None
        if self.key is None or _column(self.dataset, self.key) is not None:
            if isinstance(loader, Dataset) and not isinstance(loader, IterableDataset):
                raise ValueError(
                    f"the loader is a {type(loader).__name__}, which gives single examples: follow DataLoader(dataset, "
                    "batch_size=...)."
                )
            dataset = getattr(loader, "dataset", None)
            if isinstance(dataset, IterableDataset) or (dataset is None and not isinstance(loader, list | tuple)):
                raise ValueError(
                    f"the examples of a {type(loader if dataset is None else dataset).__name__} have no places: give "
                    "key=, the name or position of the entry of a batch that has their numbers, or a callable from the "
                    "batch to them, and num_data."
                    + (" Progress bars, enumerate and zip go around follow(loader)." if dataset is None else "")
                )
            if dataset is None:
                self._counted = 0
            else:
                places = self._of_dataset(dataset)
                keeps_order = not getattr(loader, "num_workers", 0) or getattr(loader, "in_order", True)
                follows = followed(loader, keeps_workers=True) if keeps_order else None
                if follows is None:
                    raise ValueError(
                        f"the batches of a {type(loader).__name__} cannot be followed to its sampler: use "
                        "torch.utils.data.DataLoader with in_order=True, or give key=, by which a batch has its "
                        "numbers."
                    )
                its, drawn = follows
        self._source = (loader, its, drawn, places)
        self._drawn, self._places = drawn, places
        return its

    def follows(self, loader: Any) -> bool:
        """Whether this is the loader that is followed, and not one before it."""
        return self._source is not None and self._source[0] is loader

    def of(self, batch: Any, count: int | None = None) -> Tensor:
        """``[n]`` numbers of the examples of the batch that has just come; to be called once for each.

        Args:
            count: how many examples the batch has, where that is known.

        Raises:
            ValueError: if they are not known, or are not as many.
        """
        drawn = None if self._drawn is None else self._drawn.next()
        if self._counted is not None:
            if count is None:
                raise ValueError("the examples of a list of batches are counted, but this batch has no target.")
            self._counted += count
            numbers = torch.arange(self._counted - count, self._counted)
        elif self._drawn is not None:
            if drawn is None:
                raise ValueError("the sampler did not draw numbers of places: give key=, by which a batch has them.")
            numbers = self.of_places(drawn)
        elif self.key is not None:
            numbers = example_numbers(_entry(batch, self.key), _KEY_REFUSAL)
        else:
            raise ValueError("no loader is followed: iterate follow(loader).")
        return self._checked(numbers, count)

    def of_places(self, places: Tensor) -> Tensor:
        """Numbers ``[n]`` of places ``[n]`` in the loader's dataset."""
        return places if self._places is None else torch.from_numpy(self._places)[places]

    def of_carried(self, carried: Tensor, count: int | None = None) -> Tensor:
        """``[n]`` numbers from what `carry` put into a batch."""
        carried = carried.long().cpu()
        return self._checked(self.of_places(carried), count)

    def carry(self, loader: Any, targets: Callable[[Any], Any]) -> Source:
        """Let a loader's own batches, which are mappings, have the numbers under `CARRIED`, whoever iterates it.

        Also a loader that is made of it, to skip batches after a resumption, has them so.

        Args:
            targets: from a batch to its targets, which are carried along under `CARRIED_TARGETS`: a loop may take them
                out before it calls the model.

        Returns:
            What the loader was.

        Raises:
            ValueError: if its examples cannot be numbered.
        """
        while True:
            inner = next((vars(loader)[name] for name in MOVED_LOADERS if name in vars(loader)), None)
            if inner is None:
                break
            loader = inner
        dataset, collate = loader.dataset, loader.collate_fn
        if isinstance(collate, _CarryingCollate):
            dataset, collate = _unwrapped(dataset), collate.collate
        size = getattr(loader, "batch_size", None) or getattr(loader.batch_sampler, "batch_size", None)
        source = Source(dataset, size, collate)
        settings = vars(loader)  # past a DataLoader's refusal of another dataset
        if isinstance(dataset, IterableDataset):
            if not isinstance(self.key, str):
                raise ValueError(
                    f"the examples of a {type(dataset).__name__} have no places: give key=, the name of the column "
                    "that has their numbers, and num_data."
                )
            settings["collate_fn"] = _CarryingCollate(collate, self.key, targets)
            return source
        self._places = self._of_dataset(dataset)
        settings["dataset"] = _Carrying(dataset)
        settings["collate_fn"] = _CarryingCollate(collate, None, targets)
        return source

    def _checked(self, numbers: Tensor, count: int | None) -> Tensor:
        numbers = numbers.long().cpu()
        if count is not None and len(numbers) != count:
            raise ValueError(
                f"{len(numbers)} numbers for {count} examples: let a batch have one row for each example that the "
                "sampler draws, or give key=, by which a batch has its numbers."
            )
        if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) >= self.num_data):
            raise ValueError(
                f"numbers reach from {int(numbers.min())} to {int(numbers.max())}, but num_data={self.num_data}: give "
                "num_data, or the whole dataset."
            )
        return numbers

    def _check_reaches(self, dataset: Any) -> None:
        """Raise ValueError where a dataset has places beyond the number of examples that was given."""
        if self.key is None and self._given is not None and self._given < len(dataset):
            raise ValueError(f"num_data={self._given}, but the dataset has {len(dataset)} examples: leave it out.")

    def _of_dataset(self, dataset: Any) -> np.ndarray | None:
        """Numbers by place in a loader's dataset; None where they are the places."""
        if self.dataset is None:
            self._check_reaches(_unwrapped(dataset))
            self.dataset = _unwrapped(dataset)
        column = _column(self.dataset, self.key)
        if column is not None:
            if len(column) != len(dataset):
                raise ValueError(
                    f"the loader's dataset has {len(dataset)} examples, but the one with the column {self.key!r} has "
                    f"{len(column)}: give the dataset that is trained on."
                )
            return column
        if dataset is self.dataset or _same_tensors(dataset, self.dataset) or _same_rows(dataset, self.dataset):
            return None
        places = _places(dataset, self.dataset)
        if places is None or (places < 0).any():
            raise ValueError(
                f"the loader's {type(dataset).__name__} has examples that are not of the dataset that was given, or "
                "that came first: make it once, before the loop, and give the whole one (a ConcatDataset of its "
                "parts), or key=."
            )
        return places


def _unwrapped(dataset: Any) -> Any:
    return dataset.dataset if isinstance(dataset, IndexedDataset | _Carrying) else dataset


def _places(dataset: Any, whole: Any) -> np.ndarray | None:
    """The place in the whole of each example, -1 where it has none; None where a dataset is not made of the whole."""
    dataset = _unwrapped(dataset)
    if dataset is whole:
        return np.arange(len(whole))
    if isinstance(dataset, Subset):
        places = _places(dataset.dataset, whole)
        return None if places is None else places[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_places(part, whole) for part in dataset.datasets]
        if all(part is None for part in parts):
            return None
        return np.concatenate(
            [
                np.full(len(part), -1) if places is None else places  # type: ignore[arg-type]
                for part, places in zip(dataset.datasets, parts, strict=True)
            ]
        )
    return None


def _same_tensors(dataset: Any, whole: Any) -> bool:
    """Whether a dataset is another that was made again."""
    if not (isinstance(dataset, TensorDataset) and isinstance(whole, TensorDataset)):
        return False
    return len(dataset.tensors) == len(whole.tensors) and all(map(operator.is_, dataset.tensors, whole.tensors))


def _same_rows(dataset: Any, whole: Any) -> bool:
    """Whether a Hugging Face dataset is another without some of its columns."""
    columns, of_whole = getattr(dataset, "column_names", None), getattr(whole, "column_names", None)
    if not columns or not of_whole or type(dataset) is not type(whole) or len(dataset) != len(whole):
        return False
    first, of_first = (each.with_format(None) for each in (dataset, whole))
    return set(columns) <= set(of_whole) and all(
        first[i][name] == of_first[i][name] for name in columns for i in (0, len(dataset) - 1)
    )


def _column(dataset: Any, key: Any) -> np.ndarray | None:
    """The numbers that a Hugging Face dataset has in a column; None for other datasets."""
    if not isinstance(key, str) or key not in (getattr(dataset, "column_names", None) or ()):
        return None
    if not hasattr(dataset, "__len__"):
        return None
    return example_numbers(dataset[key][:], _KEY_REFUSAL).numpy()


def _entry(batch: Any, key: Key) -> Any:
    if callable(key):
        return key(batch)
    try:
        if isinstance(key, str) and not isinstance(batch, Mapping):
            return getattr(batch, key)
        return batch[key]
    except (KeyError, IndexError, AttributeError, TypeError):
        raise ValueError(
            f"the loader gave a {type(batch).__name__} without the entry {key!r}, but key must name the one with the "
            "numbers of the examples."
        ) from None


_KEY_REFUSAL = (
    "key gave {found}, but it must give one whole number for each example: for names, look them up, "
    "key=lambda batch: [number_of[name] for name in batch['name']]."
)


class _Carrying:
    """A map-style dataset whose items come with their places."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> tuple[Any, int]:
        return self.dataset[place], place

    def __getitems__(self, places: list[int]) -> list[tuple[Any, int]]:
        fetch: Any = getattr(self.dataset, "__getitems__", None)
        items = [self.dataset[place] for place in places] if fetch is None else fetch(places)
        return list(zip(items, places, strict=True))

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)


class _CarryingCollate:
    """A collate function that puts the numbers of the items beside what another makes of them."""

    def __init__(self, collate: Callable[[Any], Any], key: str | None, targets: Callable[[Any], Any]):
        self.collate, self.key, self.targets = collate, key, targets

    def __call__(self, items: Any) -> Any:
        if self.key is None:
            items, numbers = [item for item, _ in items], [number for _, number in items]
        else:
            numbers = [item[self.key] for item in items]
        batch = self.collate(items)
        if not isinstance(batch, Mapping):
            raise ValueError(f"the collator gave a {type(batch).__name__}, but its batches must be dicts.")
        settings: Any = batch
        settings[CARRIED_TARGETS] = self.targets(batch)
        settings[CARRIED] = torch.tensor([operator.index(number) for number in numbers])
        return batch


class Following:
    """What a loop goes through in the place of its loader; each of its batches is told of before the loop gets it."""

    def __init__(self, loader: Any, begin: Callable[[Any], Any], each: Callable[[Any], None], end: Callable[[], None]):
        self.loader, self._begin, self._each, self._end = loader, begin, each, end

    def __iter__(self) -> Iterator[Any]:
        for batch in self._begin(self.loader):
            self._each(batch)
            yield batch
        self._end()

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)
