"""``vlearn report`` and ``vlearn watch``, also as ``python -m vlearn``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlearn._extras import require
from vlearn.audit.texts import read_texts
from vlearn.report_page.report import THUMBNAILS, report
from vlearn.report_page.server import Watched, serve

DATA = """the training data, for their images or texts: a CSV file with the columns text and label (--text, --label name
others), an .npz file with an array of images (and perhaps labels and names), a folder of images with a subfolder for
each class, or module:name of a dataset or of a function that makes one, looked up from the working directory"""


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status."""
    parser = argparse.ArgumentParser(prog="vlearn", description="Look at what a training run says of its data.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, what in {
        "report": "write one HTML file, which opens without a network",
        "watch": "serve the same page from the record while it grows, on this machine alone",
    }.items():
        command = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        command.add_argument("run", metavar="RUN", type=Path, help="folder of the record, as vlearn.Recorder writes it")
        command.add_argument("--data", metavar="DATA", help=DATA)
        command.add_argument("--text", default="text", help="column of the texts of a CSV file")
        command.add_argument("--label", default="label", help="column of the labels of a CSV file")
        command.add_argument("--names", help="names of the classes, with commas between them")
        command.add_argument("--title", help="of the page")
        command.add_argument("--score", help="by which labels are ordered: loss, margin, probability, ...")
        command.add_argument("--thumbnails", type=int, default=THUMBNAILS, help="images at most (default %(default)s)")
        if name == "report":
            command.add_argument("--out", type=Path, default=Path("report.html"), help="default %(default)s")
        else:
            command.add_argument("--port", type=int, default=8080, help="default %(default)s; 0 takes a free one")
            command.add_argument("--every", type=float, default=3.0, help="seconds between looks at the record")
    given = parser.parse_args(arguments)
    try:
        options: dict[str, Any] = {"title": given.title, "score": given.score, "thumbnails": given.thumbnails}
        dataset, labels, names = read_data(given.data, given.text, given.label)
        options |= {"labels": labels, "names": names if given.names is None else given.names.split(",")}
        if given.command == "report":
            path = report(given.run, dataset, given.out, **options)
            sys.stdout.write(f"{path} ({path.stat().st_size / 1e6:.1f} MB)\n")
        else:
            serve(Watched(given.run, dataset, **options), given.port, given.every)
    except (OSError, ValueError, TypeError, ImportError, AttributeError, OverflowError) as error:
        parser.exit(1, f"{parser.prog} {given.command}: {error}\n")
    return 0


def read_data(source: str | None, text: str = "text", label: str = "label") -> tuple[Any, Any, list[str] | None]:
    """A dataset, labels by example number and names of the classes, of what ``--data`` names; None what it lacks.

    Raises:
        ValueError: if it is none of the kinds that are read.
    """
    if source is None:
        return None, None, None
    path = Path(source)
    if path.is_dir():
        folder = require("torchvision.datasets", extra="vision", feature="a folder of images").ImageFolder(source)
        return folder, None, None
    if path.suffix == ".csv":
        return read_texts(path, text, label), None, None
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return _of_arrays(dict(arrays), source)
    module, _, name = source.partition(":")
    if not name or os.sep in module:
        raise ValueError(f"--data {source} is no CSV or .npz file, no folder, and no module:name.")
    sys.path.insert(0, os.getcwd())
    found = getattr(importlib.import_module(module), name)
    if not (callable(found) or hasattr(found, "__getitem__")):
        raise ValueError(f"--data {source} is a {type(found).__name__}, but it must be a dataset or make one.")
    is_dataset = hasattr(found, "__getitem__") and hasattr(found, "__len__")
    return (found if is_dataset else found()), None, None


def _of_arrays(arrays: Mapping[str, np.ndarray], source: str) -> tuple[Any, Any, list[str] | None]:
    images = next((array for array in arrays.values() if array.ndim in (3, 4)), None)
    if images is None:
        raise ValueError(f"{source} has no array of images: save them as [N, H, W], [N, 3, H, W] or [N, H, W, 3].")
    labels = next((arrays[name] for name in ("labels", "y") if name in arrays), None)
    return images, labels, [str(name) for name in arrays["names"]] if "names" in arrays else None
