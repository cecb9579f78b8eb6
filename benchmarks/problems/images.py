"""The image data sets of the benchmarks: torchvision's where it imports, else the same files read here.

The files lie where torchvision puts them: `ROOT/FashionMNIST/raw`, `ROOT/MNIST/raw` and `ROOT/cifar-10-batches-py`,
with ROOT from `--data-root`, else from the environment variable VLEARN_DATA, else `data`. With torchvision, what is
missing is downloaded.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.problems.digits import shuffled_digits

# Mean and standard deviation of the training images' channels, as the papers normalise.
FASHION = ((0.2860,), (0.3530,))
MNIST = ((0.1307,), (0.3081,))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))


@dataclass(frozen=True)
class Images:
    """A classification data set in memory.

    Attributes:
        x, x_test: ``[N, channels, height, width]`` float32, normalised.
        y, y_test: ``[N]`` classes.
        pictures: ``[N, channels, height, width]`` of the training set in [0, 1], to be drawn.
        classes: a name for each class.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    pictures: Tensor
    classes: tuple[str, ...]

    def to(self, device: str) -> Images:
        """The same with examples and labels on a device; the pictures stay."""
        moved = (t.to(device) for t in (self.x, self.y, self.x_test, self.y_test))
        return Images(self.name, *moved, self.pictures, self.classes)

    def first(self, count: int, test_count: int | None = None) -> Images:
        """The first examples of both halves."""
        half, test = slice(count), slice(test_count)
        tensors = self.x[half], self.y[half], self.x_test[test], self.y_test[test], self.pictures[half]
        return Images(self.name, *tensors, self.classes)


def default_root() -> Path:
    """The folder of the data sets: VLEARN_DATA, else `data`."""
    return Path(os.environ.get("VLEARN_DATA", "data"))


def load(name: str, root: Path | None = None) -> Images:
    """A data set by name.

    Args:
        name: "fashion-mnist", "mnist", "cifar-10" (of which the part that is there is read) or "digits".
        root: folder of the data; see the module's docstring.

    Raises:
        FileNotFoundError: if its files are not there and torchvision cannot download them.
        ValueError: if there is no data set of this name.
    """
    if name not in LOADERS:
        raise ValueError(f"data set {name!r}, but there are {', '.join(map(repr, LOADERS))}.")
    return LOADERS[name](default_root() if root is None else root)


def _idx(folder: str, classes: tuple[str, ...], scaling: tuple[tuple[float, ...], ...]) -> Callable[[Path], Images]:
    def read(root: Path) -> Images:
        raw = root / folder / "raw"
        if not (raw / "train-images-idx3-ubyte").exists():
            _download(folder, root)
        parts = {}
        for half, prefix in (("train", "train"), ("test", "t10k")):
            parts[half] = _read_idx(raw / f"{prefix}-images-idx3-ubyte"), _read_idx(raw / f"{prefix}-labels-idx1-ubyte")
        pictures = {half: torch.from_numpy(images).unsqueeze(1).float() / 255 for half, (images, _) in parts.items()}
        labels = {half: torch.from_numpy(each).long() for half, (_, each) in parts.items()}
        return _normalised(folder, pictures, labels, scaling, classes)

    return read


def _read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the IDX format: 0, 0, type, number of axes, then each axis as four bytes, then the data."""
    content = path.read_bytes()
    axes = content[3]
    shape = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(axes)]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape).copy()


def _cifar(root: Path) -> Images:
    folder = root / "cifar-10-batches-py"
    if not (folder / "test_batch").exists():
        _download("CIFAR10", root)
    batches = [path for i in range(1, 6) if (path := folder / f"data_batch_{i}").exists()]
    halves = {"train": batches, "test": [folder / "test_batch"]}
    read: dict[str, list[Any]] = {half: [_unpickled(path) for path in paths] for half, paths in halves.items()}
    images = {half: np.concatenate([each["data"] for each in parts]) for half, parts in read.items()}
    pictures = {half: torch.from_numpy(each).view(-1, 3, 32, 32).float() / 255 for half, each in images.items()}
    labels = {half: torch.tensor([y for each in parts for y in each["labels"]]) for half, parts in read.items()}
    classes = tuple(_unpickled(folder / "batches.meta")["label_names"])
    return _normalised("CIFAR10", pictures, labels, CIFAR, classes)


def _unpickled(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return pickle.load(file, encoding="latin1")


def _digits(root: Path) -> Images:
    """scikit-learn's digits, which need no file; a fixed random split into 1,000 and 797."""
    pixels, labels = shuffled_digits()
    pictures = pixels / 16
    halves = {"train": slice(1000), "test": slice(1000, None)}
    scaling = ((pictures[:1000].mean().item(),), (pictures[:1000].std().item(),))
    split = {half: pictures[rows] for half, rows in halves.items()}
    return _normalised(
        "digits", split, {half: labels[rows] for half, rows in halves.items()}, scaling, tuple("0123456789")
    )


def _normalised(
    name: str,
    pictures: dict[str, Tensor],
    labels: dict[str, Tensor],
    scaling: tuple[tuple[float, ...], ...],
    classes: tuple[str, ...],
) -> Images:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in scaling)
    x, x_test = ((pictures[half] - mean) / std for half in ("train", "test"))
    return Images(name, x, labels["train"], x_test, labels["test"], pictures["train"], classes)


def _download(name: str, root: Path) -> None:
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another torch
        raise FileNotFoundError(
            f"no {name} in {root}: give its folder with --data-root or VLEARN_DATA, or install torchvision, which "
            "downloads it (pip install 'vlearn[vision]')."
        ) from error
    for train in (True, False):
        getattr(datasets, name)(root, train=train, download=True)


CLOTHES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
LOADERS: dict[str, Callable[[Path], Images]] = {
    "fashion-mnist": _idx("FashionMNIST", CLOTHES, FASHION),
    "mnist": _idx("MNIST", tuple("0123456789"), MNIST),
    "cifar-10": _cifar,
    "digits": _digits,
}
