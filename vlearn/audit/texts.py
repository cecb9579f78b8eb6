"""Sentences with labels as a data set that a network reads: of a CSV file, a Hugging Face dataset, or lists."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

PADDING, UNKNOWN = 0, 1
LONGEST_FIELD = 2**31 - 1  # characters of a text in a CSV file, of which Python takes 2¹⁷ unless told
_WORD = re.compile(r"\w+|[^\w\s]")


class TextDataset(Dataset):
    """Sentences as ``{"input_ids": [T], "attention_mask": [T], "labels": []}``, of one length T.

    Args:
        texts: N sentences.
        labels: N labels, whole numbers or names.
        names: of the classes in the order of their numbers; default those that occur, sorted.
        tokenizer: a callable as Hugging Face's tokenizers are, that takes ``max_length``, ``padding`` and
            ``truncation``; default words and signs in lower case, numbered in the order of their frequency.
        max_length: T.
        vocabulary: number of each word, where the default tokenizer is to know those of other data.

    Attributes:
        texts, labels, names: as above, labels ``[N]`` as numbers.
        vocabulary: of the default tokenizer, else None.

    Raises:
        ValueError: if the lengths differ, there is nothing, or a label is no class.

    Examples:
        >>> data = TextDataset(["Good film.", "Bad film!"], ["good", "bad"], max_length=4)
        >>> data[0]["input_ids"].tolist(), data[0]["labels"].item(), data.names
        ([3, 2, 4, 0], 1, ['bad', 'good'])
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[Any],
        names: Sequence[str] | None = None,
        tokenizer: Callable[..., Any] | None = None,
        max_length: int = 64,
        vocabulary: dict[str, int] | None = None,
    ):
        self.texts, given = [str(text) for text in texts], [_plain(label) for label in labels]
        if len(self.texts) != len(given) or not given:
            raise ValueError(f"{len(self.texts)} texts and {len(given)} labels: give one label for each, and some.")
        if all(isinstance(label, int) and not isinstance(label, bool) for label in given):
            self.names = [str(n) for n in range(max(given) + 1)] if names is None else list(names)
            numbers = given
        else:
            self.names = sorted({str(label) for label in given}) if names is None else list(names)
            number_of = {name: number for number, name in enumerate(self.names)}
            numbers = [number_of.get(str(label), -1) for label in given]
        for label, number in zip(given, numbers, strict=True):
            if not 0 <= number < len(self.names):
                raise ValueError(f"label {label!r} is none of the classes {', '.join(self.names)}: give all in names.")
        self.labels = torch.tensor(numbers)
        self.vocabulary: dict[str, int] | None = None
        if tokenizer is not None:
            settings = {"max_length": max_length, "padding": "max_length", "truncation": True}
            encoded = tokenizer(self.texts, **settings)
            self._ids, self._mask = (torch.as_tensor(encoded[name]) for name in ("input_ids", "attention_mask"))
            return
        self.vocabulary = _vocabulary(self.texts) if vocabulary is None else vocabulary
        self._ids = torch.full((len(self.texts), max_length), PADDING)
        for row, text in zip(self._ids, self.texts, strict=True):
            words = [self.vocabulary.get(word, UNKNOWN) for word in _words(text)[:max_length]]
            row[: len(words)] = torch.tensor(words, dtype=torch.long)
        self._mask = (self._ids != PADDING).long()

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        return {"input_ids": self._ids[n], "attention_mask": self._mask[n], "labels": self.labels[n]}

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest number of a word that there may be."""
        return int(self._ids.max()) + 1 if self.vocabulary is None else max(self.vocabulary.values(), default=1) + 1


def read_texts(source: Any, text: str = "text", label: str = "label", **options: Any) -> TextDataset:
    """Read sentences with labels.

    Args:
        source: path of a CSV file whose first line names its columns, a split of a Hugging Face dataset, or any
            iterable of dicts.
        text: column of the sentences.
        label: column of the labels; the names of a ClassLabel are kept.
        **options: of `TextDataset`.

    Raises:
        ValueError: if a column is missing, or a CSV file is not in UTF-8.
    """
    if isinstance(source, str | os.PathLike):
        rows: Iterable[Any] = _rows_of_csv(source)
        texts, labels = _columns(rows, text, label, str(source))
        # What looks like a number is one, so that class 10 does not come before class 2.
        if all(re.fullmatch(r"\d+", each) for each in labels):
            labels = [int(each) for each in labels]
        return TextDataset(texts, labels, **options)
    names = getattr((getattr(source, "features", None) or {}).get(label), "names", None)
    texts, labels = _columns(source, text, label, type(source).__name__)
    return TextDataset(texts, labels, **({"names": names} if names is not None else {}) | options)


def _rows_of_csv(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return list(csv.DictReader(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}): save it so.") from error
    finally:
        csv.field_size_limit(limit)


def _columns(rows: Iterable[Any], text: str, label: str, what: str) -> tuple[list[str], list[Any]]:
    texts, labels = [], []
    for row in rows:
        if row.get(text) is None or row.get(label) is None:
            missing = text if row.get(text) is None else label
            raise ValueError(
                f"{what} has a row without {missing!r}, but with {', '.join(map(repr, filter(None, row)))}: name the "
                "columns by text= and label=."
            )
        texts.append(row[text])
        labels.append(row[label])
    return texts, labels


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _vocabulary(texts: Sequence[str]) -> dict[str, int]:
    counts = Counter(word for text in texts for word in _words(text))
    ordered = sorted(counts, key=lambda word: -counts[word])  # of equally frequent ones, as they come
    return {word: number for number, word in enumerate(ordered, start=UNKNOWN + 1)}


def _plain(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label
