"""`vlearn.report`: from a record to a file."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlearn.record import MemoryMap, TrainingRecord
from vlearn.report_page.contents import Contents, Source, contents_of
from vlearn.report_page.page import packed, packed_examples, page
from vlearn.report_page.shown import Shown
from vlearn.sensitivity.sweep import SensitivityTable

THUMBNAILS = 2000


def report(
    record: Source | str | os.PathLike[str],
    dataset: Any = None,
    path: str | os.PathLike[str] = "report.html",
    *,
    labels: Any = None,
    names: Sequence[str] | None = None,
    show: Callable[[Any], Any] | None = None,
    title: str | None = None,
    score: str | None = None,
    thumbnails: int = THUMBNAILS,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write one HTML file that shows what a training run or a sweep says of its data.

    It opens from disk without a network. It has the memory map with a slider over the snapshots, tables of likely wrong
    labels, of the most influential, memorised and ambiguous examples, and the curves of the losses. Examples that are
    selected there leave it as CSV or JSON.

    The images that are in the file are those of the tables' first rows, then evenly spread ones; texts likewise, but
    20,000 of them. Up to 200,000 examples numbers have 32 bits, beyond, and on the maps, 16 bits of their range.

    Args:
        record: a `TrainingRecord` or its folder, also while a run writes it or after it was killed; a `MemoryMap`; or
            what `vlearn.sweep` returned.
        dataset: the training data by example number, for their images or texts; default none are shown. Items are
            (x, y), dicts, or images or texts themselves, as of `vlearn.audit.read_texts`, of torchvision, and of
            Hugging Face. Normalised images are stretched from their minimum to their maximum.
        path: of the file; one that is there is replaced as a whole, a folder that is not there is made.
        labels: ``[N]`` given labels by example number; default those that the record has seen.
        names: of the classes; default those of the dataset, or their numbers.
        show: callable from an item of the dataset to an image (``[H, W]``, ``[1, H, W]``, ``[3, H, W]``,
            ``[H, W, 3]``, or of Pillow) or a text; default what of the item is one.
        title: of the page; default the name of the folder.
        score: by which labels are ordered, see `vlearn.label_issues`.
        thumbnails: how many images the file has at most.
        settings: of the run, shown as they are.

    Returns:
        The path.

    Raises:
        FileNotFoundError: if the folder holds no record.
        ValueError: if nothing is recorded yet, or a length differs; nothing is written.
        TypeError: if an argument is of another kind.
        ImportError: if there are images, but no Pillow.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder, but it must be the file to write.")
    if isinstance(names, str | Mapping):
        raise TypeError(
            f"names is a {type(names).__name__}, but it must be a list of the classes' names in the order of their "
            "numbers."
        )
    if thumbnails < 0:
        raise ValueError(f"thumbnails={thumbnails}, but it must not be negative: 0 leaves images out.")
    opened = open_source(record)
    shown, contents = read(opened, dataset, labels, show, score)
    if not contents.columns:
        raise ValueError(
            "the record has nothing of its examples, or nothing finite: record an epoch, or sweep, first, in a run "
            "that does not diverge."
        )
    title = title or default_title(getattr(opened, "path", None))
    names = shown.names or [] if names is None else names
    described = packed(contents, shown, title, list(names), settings, version())
    blocks = {"contents": described, "examples": packed_examples(contents, shown, thumbnails)}
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_bytes(page(title, blocks).encode("utf-8", "replace"))  # also names of folders that are no UTF-8
    os.replace(new, path)
    return path


def open_source(record: Source | str | os.PathLike[str]) -> Source:
    """What to make a page of: as it is, or what a folder holds.

    Raises:
        FileNotFoundError: if it holds nothing of the kind.
    """
    if not isinstance(record, str | os.PathLike):
        if not isinstance(record, TrainingRecord | MemoryMap | SensitivityTable):
            raise TypeError(
                f"record is a {type(record).__name__}, but it must be a TrainingRecord, a MemoryMap, a "
                "SensitivityTable, or the folder of a record."
            )
        return record
    if not (Path(record) / "memory.json").exists():
        raise FileNotFoundError(f"{record} holds no record (memory.json): give the folder that a Recorder writes to.")
    opened = TrainingRecord.open(record)
    # Without averages it is the plain memory map of another program, or a run that was killed in its first epoch.
    return opened if opened.averages.count.any() else opened.memory


def read(
    source: Source, dataset: Any, labels: Any = None, show: Callable[[Any], Any] | None = None, score: str | None = None
) -> tuple[Shown, Contents]:
    """The data and what the record says of them.

    Raises:
        ValueError: if they are of different numbers of examples.
    """
    if isinstance(source, SensitivityTable) and labels is None:
        labels = getattr(dataset, "labels", getattr(dataset, "targets", None))
    shown, contents = Shown(dataset, show), contents_of(source, labels, score)
    if dataset is not None and len(dataset) != contents.num_data:
        raise ValueError(
            f"the dataset has {len(dataset)} examples, but the record has {contents.num_data}: give the data that the "
            "run was trained on, in the same order."
        )
    return shown, contents


def default_title(folder: str | os.PathLike[str] | None) -> str:
    """Of a page of the record in a folder."""
    return "Data audit" if folder is None else f"Data audit of {Path(folder).resolve().name}"


def version() -> str:
    """Of vlearn, as installed."""
    try:
        return importlib.metadata.version("vlearn")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
