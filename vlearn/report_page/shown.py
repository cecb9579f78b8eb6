"""What a person looks at: the images or texts of a dataset's examples, by number, made small."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlearn._extras import require
from vlearn.plot.thumbnails import thumbnails

LARGEST_SIDE = 96  # pixels of a thumbnail
LOSSLESS_SIDE = 32  # up to which a thumbnail is PNG; larger ones are JPEG
LONGEST_TEXT = 600  # characters
MOST_MISSING = 100  # examples at the beginning that may have neither image nor text
IMAGES = ("image", "img", "pixel_values", "images", "x")
TEXTS = ("text", "sentence", "content", "question", "prompt")


class Shown:
    """Images or texts of examples by number.

    Args:
        dataset: map-style; its items are (x, y), (x, y, index), dicts, or images or texts themselves. Of pandas the
            rows go by their place, whatever the index.
        show: callable from an item to an image or a text; default what of it is one.

    Attributes:
        kind: "image", "text", or None if neither was found.
        names: of the classes, where the dataset has them.

    Raises:
        TypeError: if the dataset has no items by number.
    """

    def __init__(self, dataset: Any = None, show: Callable[[Any], Any] | None = None):
        if hasattr(dataset, "iloc"):
            dataset = dataset.to_dict("records") if dataset.ndim == 2 else dataset.tolist()
        if dataset is not None and not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            raise TypeError(
                f"dataset is a {type(dataset).__name__}, but it must have items by number: give the dataset itself, as "
                "loader.dataset."
            )
        self._dataset: Any = dataset
        self._show = show or _shown_of
        inner = getattr(dataset, "dataset", dataset) if type(dataset).__name__ == "IndexedDataset" else dataset
        self._texts: Sequence[str] | None = getattr(inner, "texts", None) if show is None else None
        self.names = _names_of(inner)
        self.kind: str | None = None
        if dataset is not None and len(dataset):
            each = (self._of(number) for number in range(min(len(dataset), MOST_MISSING)))
            first = next((shown for shown in each if shown is not None), None)
            self.kind = "text" if isinstance(first, str) else "image" if _is_image(first) else None
            if self.kind is None and show is not None:
                raise ValueError(f"show gave a {type(first).__name__}, but it must give an image or a text.")

    def text(self, number: int) -> str | None:
        """Of an example, not longer than 600 characters; None where it has none."""
        given = self._of(number)
        if given is None:
            return None
        text = str(given)
        return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"

    def image(self, number: int) -> tuple[str, bytes] | None:
        """Media type and encoded image of an example, with sides of at most 96 pixels; None where it has none.

        Raises:
            ImportError: without Pillow.
        """
        pillow = require("PIL.Image", extra="report", feature="a page with images")
        image: Any = self._of(number)
        if image is None:
            return None
        if not hasattr(image, "thumbnail") or image.mode.startswith(("I", "F")):  # convert would cut these off at 255
            array = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
            image = pillow.fromarray(np.rint(thumbnails(array[None], [0])[0] * 255).astype(np.uint8))
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
        file = io.BytesIO()
        if max(image.size) <= LOSSLESS_SIDE:
            image.save(file, "PNG", optimize=True)
            return "image/png", file.getvalue()
        image.save(file, "JPEG", quality=80)
        return "image/jpeg", file.getvalue()

    def _of(self, number: int) -> Any:
        return self._texts[number] if self._texts is not None else self._show(self._dataset[number])


def _shown_of(item: Any) -> Any:
    if isinstance(item, Mapping):
        for name in (*IMAGES, *TEXTS):
            if name in item and (isinstance(item[name], str) or _is_image(item[name])):
                return item[name]
        return next((value for value in item.values() if isinstance(value, str) or _is_image(value)), None)
    return item[0] if isinstance(item, tuple | list) else item


def _is_image(value: Any) -> bool:
    if hasattr(value, "thumbnail") and hasattr(value, "convert"):
        return True
    shape = tuple(getattr(value, "shape", ()))
    if len(shape) == 3:
        return (shape[0] in (1, 3) and min(shape[1:]) > 1) or (shape[-1] == 3 and min(shape[:2]) > 1)
    return len(shape) == 2 and min(shape) > 1


def _names_of(dataset: Any) -> list[str] | None:
    """Names of the classes, as torchvision's datasets, Hugging Face's and `TextDataset` have them."""
    features = getattr(dataset, "features", None)
    if isinstance(features, Mapping):
        for name in ("label", "labels"):
            names = getattr(features.get(name), "names", None)
            if names is not None:
                return [str(each) for each in names]
    for attribute in ("classes", "names"):
        names = getattr(dataset, attribute, None)
        if isinstance(names, list | tuple) and names:
            return [str(each) for each in names]
    return None
