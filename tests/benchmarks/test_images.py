"""The benchmarks' data sets."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.problems import images as datasets

ROOT = datasets.default_root()


@pytest.mark.parametrize(
    "name, count, shape",
    [("fashion-mnist", 60_000, (1, 28, 28)), ("mnist", 60_000, (1, 28, 28)), ("cifar-10", 10_000, (3, 32, 32))],
)
def test_real_images_are_normalised_and_whole(
    name: str, count: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # it would download what is missing
    try:
        found = datasets.load(name)
    except FileNotFoundError:
        pytest.skip(f"{name} is not in {ROOT}: set VLEARN_DATA")
    assert len(found.x) == len(found.y) == len(found.pictures) >= count and len(found.x_test) == 10_000
    assert found.x.shape[1:] == found.x_test.shape[1:] == shape
    assert (
        abs(float(found.x.mean())) < 0.02 and 0.9 < float(found.x.std()) < 1.3
    )  # the papers' CIFAR-10 scale is the mean over images
    assert 0 <= float(found.pictures.min()) and float(found.pictures.max()) == 1
    counts = found.y_test.bincount()
    assert len(counts) == len(found.classes) == 10 and int(counts.min()) > 800


def test_digits_need_no_files() -> None:
    found = datasets.load("digits", Path("nowhere"))
    assert found.x.shape == (1000, 1, 8, 8) and len(found.x_test) == 797
    assert abs(float(found.x.mean())) < 1e-5 and abs(float(found.x.std()) - 1) < 1e-5
    few = found.first(10, 5)
    assert len(few.x) == len(few.pictures) == 10 and len(few.y_test) == 5
    torch.testing.assert_close(few.x, found.x[:10])


def test_an_unknown_name_and_missing_files_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="data set 'imagenet', but there are 'fashion-mnist'"):
        datasets.load("imagenet")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(FileNotFoundError, match="no MNIST in .*: give its folder with --data-root or VLEARN_DATA"):
        datasets.load("mnist", tmp_path)
