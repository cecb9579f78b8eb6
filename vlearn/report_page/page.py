"""The page: contents packed, and one HTML file of them with its styles and scripts, which asks no network for anything.

Whatever strangers have written, as labels and texts, is in compressed blocks in base64 and gets into the document as
text only. The content security policy allows the scripts and styles that are here, by their hashes, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from vlearn.audit.findings import GROUPS
from vlearn.report_page.contents import Column, Contents, chosen_examples
from vlearn.report_page.maps import kept_snapshots, packed_positions, scale_of
from vlearn.report_page.packing import Pack, in_16_bits
from vlearn.report_page.shown import Shown

STYLES = ("vendor/uPlot.min.css", "page.css")
SCRIPTS = ("vendor/uPlot.iife.min.js", "unpack.js", "points.js", "map.js", "examples.js", "curves.js", "page.js")
LICENCE = "vendor/uPlot.LICENSE"  # of the first script
EXACT_UP_TO = 200_000  # examples up to which columns keep 32 bits
MOST_TEXTS = 20_000
GROUPS_ABOUT = {
    "unpredictable": "The model does not come to believe the label.",
    "uncertain": "The prediction changes through the run, or the model leans on the example.",
    "memorised": "Right only because it was learned by heart, or late.",
    "easy": "All others.",
}


def packed(
    contents: Contents,
    shown: Shown,
    title: str,
    names: list[str] | None,
    settings: Mapping[str, Any] | None,
    version: str,
) -> bytes:
    """Everything but images and texts as one block; see `vlearn.report_page.packing`."""
    pack = Pack()
    maps = [
        packed_positions(each, kept_snapshots(len(each.steps), contents.num_data, len(contents.maps)), pack.add)
        for each in contents.maps
    ]
    columns = [_packed_column(column, contents.num_data, pack) for column in contents.columns]
    labels = contents.labels
    issues, suggested = contents.issues, np.full(contents.num_data, -1)
    groups: list[dict[str, Any]] = []
    group = np.full(contents.num_data, len(GROUPS))
    if issues is not None:
        suggested[issues.numbers] = issues.suggested
        counts = issues.counts
        for place, name in enumerate(GROUPS):
            group[issues.numbers[issues.group == name]] = place
            groups.append({"name": name, "about": GROUPS_ABOUT[name], "count": counts[name]})
    num_classes = int(max(each.max(initial=-1) for each in (labels, suggested, contents.predicted))) + 1
    named = list(names or [])[:num_classes]
    named += [str(n) for n in range(len(named), num_classes)]
    description = {
        "title": title,
        "facts": contents.facts,
        "numData": contents.num_data,
        "classes": named,
        "maps": maps,
        "columns": columns,
        "given": pack.add(_in_bytes(labels)),
        "suggested": pack.add(_in_bytes(suggested)),
        "predicted": pack.add(_in_bytes(contents.predicted)),
        "groups": groups,
        "group": pack.add(group.astype(np.uint8)),
        "expectedIssues": None if issues is None else issues.count,
        "confusions": _confusions(contents),
        "tables": [
            {
                "key": table.key,
                "title": table.title,
                "about": table.about,
                "columns": table.shown,
                "numbers": pack.add(table.numbers.astype(np.uint32)),
            }
            for table in contents.tables
        ],
        "curves": {"steps": contents.steps.tolist(), "values": {k: v.tolist() for k, v in contents.curves.items()}},
        "kind": shown.kind,
        "settings": {str(name): str(value) for name, value in (settings or {}).items()},
        "versions": {
            "vlearn": version,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "Python": platform.python_version(),
        },
        "written": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    return pack.compressed(description)


def _packed_column(column: Column, num_data: int, pack: Pack) -> dict[str, Any]:
    low, high = scale_of(column.values, column.log)
    scale = {"low": low, "high": high, "log": column.log}
    if column.key == "rank":
        array = np.nan_to_num(column.values, nan=0.0).astype(np.uint32)
    elif num_data <= EXACT_UP_TO:
        array = column.values.astype(np.float32)
    else:
        array = in_16_bits(column.values, low, high, column.log)
    return {"key": column.key, "label": column.label, "about": column.about, **scale, "values": pack.add(array)}


def _in_bytes(classes: np.ndarray) -> np.ndarray:
    """Class numbers in one byte or two; the largest that fits stands for none."""
    kind = np.uint8 if classes.max(initial=0) < 255 else np.uint16
    return np.where(classes < 0, np.iinfo(kind).max, classes).astype(kind)


def _confusions(contents: Contents) -> list[list[Any]]:
    """Given and likely true label, and how many examples are expected so, the most frequent first."""
    issues = contents.issues
    if issues is None or issues.joint is None:
        return []
    counts = issues.joint * len(issues)
    np.fill_diagonal(counts, 0)
    largest = np.argsort(-counts, axis=None)[:8]
    pairs = [(*np.unravel_index(place, counts.shape), float(counts.flat[place])) for place in largest]
    return [[int(given), int(true), count] for given, true, count in pairs if count >= 0.5]


def packed_examples(contents: Contents, shown: Shown, most: int) -> bytes:
    """The images or texts of the examples that are most worth a look, as one block."""
    pack, description = Pack(), {"numbers": None, "images": [], "texts": []}
    if shown.kind is not None:
        kept = []
        for number in chosen_examples(contents, most if shown.kind == "image" else max(most, MOST_TEXTS)).tolist():
            text, image = (shown.text(number), None) if shown.kind == "text" else (None, shown.image(number))
            if text is not None:
                description["texts"].append(text)
            elif image is not None:
                description["images"].append({"media": image[0], **pack.add_bytes(image[1])})
            else:
                continue
            kept.append(number)
        description["numbers"] = pack.add(np.array(kept, np.uint32))
    return pack.compressed(description, level=6 if shown.kind == "text" else 1)


def page(title: str, blocks: Mapping[str, bytes], poll_seconds: float | None = None) -> str:
    """The HTML.

    Args:
        title: of the document.
        blocks: "contents" and "examples", packed; none where the page is to fetch them from its server.
        poll_seconds: how often it asks its server for news; None for a file.
    """
    assets = importlib.resources.files("vlearn.report_page") / "assets"
    styles = [(assets / name).read_text(encoding="utf-8") for name in STYLES]
    scripts = [(assets / name).read_text(encoding="utf-8") for name in SCRIPTS]
    licence = (assets / LICENCE).read_text(encoding="utf-8")  # which asks to be in every copy
    scripts[0] = f"/*\n{licence}*/\n{scripts[0]}"
    embedded = "\n".join(
        f'<script type="application/octet-stream" id="block-{name}">{base64.b64encode(block).decode()}</script>'
        for name, block in blocks.items()
    )
    settings = json.dumps({"poll": poll_seconds})
    parts = {
        "POLICY": policy(styles, scripts, poll_seconds is not None),
        "TITLE": html.escape(title),
        "STYLES": "\n".join(f"<style>{style}</style>" for style in styles),
        "BLOCKS": f'<script type="application/json" id="settings">{settings}</script>\n{embedded}',
        "SCRIPTS": "\n".join(f"<script>{script}</script>" for script in scripts),
    }
    template = (assets / "page.html").read_text(encoding="utf-8")
    # In one go: what is put in is not looked at again.
    pieces = template.split("%%")
    return "".join(parts[piece] if place % 2 else piece for place, piece in enumerate(pieces))


def policy(styles: list[str], scripts: list[str], asks_server: bool) -> str:
    """The content security policy: the given styles and scripts, images that they make, and perhaps the own server."""
    hashed = [" ".join(_hash(each) for each in group) for group in (scripts, styles)]
    connect = "connect-src 'self'; " if asks_server else ""
    return (
        f"default-src 'none'; script-src {hashed[0]}; style-src {hashed[1]}; img-src blob:; {connect}"
        "base-uri 'none'; form-action 'none'"
    )


def _hash(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
