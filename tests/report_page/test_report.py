"""The page as a file: what goes in, what of it a browser would run, and records that were broken off."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.report_page.records import HOSTILE, hostile_texts, recorded
from vlearn.report_page.command_line import main, read_data
from vlearn.report_page.contents import chosen_examples, contents_of
from vlearn.report_page.maps import kept_snapshots
from vlearn.report_page.packing import MISSING, in_16_bits
from vlearn.report_page.shown import Shown


def unpacked(page: str, name: str = "contents") -> tuple[dict[str, Any], bytes]:
    """A block's description and arrays."""
    found = re.search(rf'id="block-{name}">([A-Za-z0-9+/=]*)</script>', page)
    assert found is not None
    content = gzip.decompress(base64.b64decode(found[1]))
    length = int.from_bytes(content[:4], "little")
    return json.loads(content[4 : 4 + length]), content[4 + length :]


class Tags(HTMLParser):
    """What of a page is markup."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [name for name, _ in attrs]


def array(arrays: bytes, entry: dict[str, Any]) -> np.ndarray:
    return np.frombuffer(arrays[entry["at"] : entry["at"] + entry["bytes"]], f"<{entry['type']}")


def test_a_page_has_what_the_record_has(tmp_path: Path) -> None:
    record = recorded(tmp_path / "run", num_data=40, epochs=3)
    images = torch.rand(40, 1, 8, 8)
    path = vlearn.report(record, images, tmp_path / "page.html", names=["cat", "dog", "owl"], settings={"lr": 0.1})
    assert path == tmp_path / "page.html" and sorted(os.listdir(tmp_path)) == ["page.html", "run"]
    description, arrays = unpacked(path.read_text())
    assert description["numData"] == 40 and description["classes"] == ["cat", "dog", "owl"]
    assert [found["key"] for found in description["maps"]] == ["memory", "data", "loss"]
    assert description["settings"] == {"lr": "0.1"} and set(description["versions"]) >= {"vlearn", "torch"}
    columns = {column["key"]: column for column in description["columns"]}
    assert np.allclose(array(arrays, columns["loss"]["values"]), record.column("loss"), atol=1e-6)
    issues = vlearn.label_issues(record)
    assert array(arrays, description["tables"][0]["numbers"]).tolist() == issues.numbers.tolist()
    assert {group["name"]: group["count"] for group in description["groups"]} == issues.counts
    found = description["maps"][0]
    x, y = (array(arrays, entry) for entry in found["positions"][-1])
    shown = found["y"]["low"] + y / (MISSING - 1) * (found["y"]["high"] - found["y"]["low"])
    assert np.allclose(shown, record.memory.column("prediction_error")[-1], atol=1e-4)
    assert found["x"]["log"] and len(np.unique(x)) > 10
    curves = description["curves"]
    assert set(curves["values"]) >= {"leave-one-out loss", "test loss"} and len(curves["steps"]) == 3
    pictures, _ = unpacked(path.read_text(), "examples")
    assert len(pictures["images"]) == 40 and pictures["images"][0]["media"] == "image/png"


def test_strangers_texts_are_not_in_the_document(tmp_path: Path) -> None:
    data = hostile_texts(30)
    record = recorded(tmp_path / "run", num_data=30, epochs=2)
    page = vlearn.report(
        record, data, tmp_path / "page.html", title=HOSTILE[0], settings={HOSTILE[1]: HOSTILE[2]}
    ).read_text()
    assert not any(text in page for text in HOSTILE) and "&lt;/script&gt;" in page
    description, _ = unpacked(page)
    texts = unpacked(page, "examples")[0]["texts"]
    assert description["classes"] == data.names[:3] and texts == data.texts
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None and policy[1].startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy[1] and "http" not in policy[1] and "connect-src" not in policy[1]
    assert "Permission is hereby granted" in page  # of the library that draws the curves
    tags = Tags()
    tags.feed(page)
    assert "img" not in tags.seen and tags.seen.count("script") == 10
    assert not [each for each in tags.attributes if each == "src" or each.startswith("on")]


def test_few_are_chosen_to_be_shown_and_those_of_the_tables_first(tmp_path: Path) -> None:
    contents = contents_of(recorded(tmp_path / "run", num_data=500, epochs=2))
    chosen = chosen_examples(contents, 60)
    assert len(chosen) == len(set(chosen.tolist())) == 60
    assert all(set(table.numbers[:5].tolist()) <= set(chosen.tolist()) for table in contents.tables)
    assert kept_snapshots(100, 10**6, 2) == [0, 99] and kept_snapshots(3, 100, 2) == [0, 1, 2]


def test_16_bits_keep_the_ends_and_tell_what_is_missing() -> None:
    values = np.array([1.0, 10.0, 100.0, np.nan, 0.0, np.inf, -np.inf])
    assert in_16_bits(values, 1, 100, log=True).tolist() == [0, 32767, 65534, MISSING, 0, 65534, 0]
    assert in_16_bits(values[:3], 0, 100, log=False).tolist() == [655, 6553, 65534]


def test_a_plain_memory_map_and_a_sweep_make_pages_too(tmp_path: Path) -> None:
    memory = vlearn.MemoryMap(5, tmp_path / "memory")
    memory.new_snapshot(0)
    memory.record([3, 1], SimpleNamespace(self_influence=[0.5, 0.25], prediction_error=[1.0, 0.1]))
    page = vlearn.report(tmp_path / "memory", path=tmp_path / "memory.html").read_text()
    description, arrays = unpacked(page)
    found = description["maps"][0]
    assert found["title"] == "Memory map"
    assert (array(arrays, found["positions"][0][0]) == MISSING).tolist() == [True, False, True, False, True]
    # Of a regression errors are not bounded by 1, and there are no labels to suspect.
    memory.record_sweep(5, SimpleNamespace(index=range(5), leverage=np.full(5, 0.1), prediction_error=np.arange(5.0)))
    description, _ = unpacked(vlearn.report(memory, path=tmp_path / "memory.html").read_text())
    assert description["maps"][0]["y"]["high"] == 4 and description["expectedIssues"] is None
    model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1])
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 3)
    posterior = vlearn.posterior.fit(model, loader, F.cross_entropy, progress=False)
    table = vlearn.sweep(model, posterior, loader, F.cross_entropy, progress=False)
    description, _ = unpacked(vlearn.report(table, path=tmp_path / "sweep.html", labels=y).read_text())
    with pytest.raises(ValueError, match="the sweep has example 5, but labels has 3"):
        vlearn.report(table, path=tmp_path / "sweep.html", labels=y[:3])
    assert description["expectedIssues"] is not None and description["tables"][0]["key"] == "issues"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": torch.rand(7, 8, 8)}, "the dataset has 7 examples, but the record has 20"),
        ({"labels": torch.zeros(7, dtype=torch.long)}, r"labels have shape \(7,\)"),
        ({"dataset": torch.rand(20, 8, 8), "show": lambda item: 3}, "show gave a int"),
        ({"score": "size"}, "score='size'"),
    ],
)
def test_what_does_not_fit_is_refused_and_no_file_is_written(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    record = recorded(tmp_path / "run", num_data=20, epochs=1)
    with pytest.raises(ValueError, match=message):
        vlearn.report(record, path=tmp_path / "page.html", **change)
    assert not (tmp_path / "page.html").exists()


def test_examples_without_an_image_or_text_are_left_out(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    record = recorded(tmp_path / "run", num_data=5, epochs=1)
    missing = [None, 1, None, 1, 1]
    for items, key in (
        ([each and image.new("L", (9, 9)) for each in missing], "images"),
        ([each and "text" for each in missing], "texts"),
    ):
        page = vlearn.report(record, items, tmp_path / "page.html").read_text()
        examples, arrays = unpacked(page, "examples")
        assert len(examples[key]) == 3 and array(arrays, examples["numbers"]).tolist() == [1, 3, 4]


@pytest.mark.parametrize("kind", ["uint16", "int32", "float32"])
def test_grey_images_of_more_than_8_bits_keep_their_contrast(kind: str) -> None:
    pillow = pytest.importorskip("PIL.Image")
    ramp = np.linspace(0, 1, 64).reshape(8, 8)
    made = Shown([pillow.fromarray((ramp if kind == "float32" else ramp * 4000).astype(kind))]).image(0)
    assert made is not None
    np.testing.assert_allclose(np.asarray(pillow.open(io.BytesIO(made[1]))), 255 * ramp, atol=1)


def test_rows_of_pandas_go_by_their_place() -> None:
    pandas = pytest.importorskip("pandas")
    shuffled = pandas.DataFrame({"text": ["a", "b", "c"], "label": [0, 1, 2]}).iloc[[2, 0, 1]]
    for rows in (shuffled, shuffled["text"]):
        assert [Shown(rows).text(n) for n in range(3)] == ["c", "a", "b"]


def test_a_model_of_one_class_makes_a_page(tmp_path: Path) -> None:
    record = vlearn.TrainingRecord(2, tmp_path / "run")
    record.record([0, 1], step=1, label=[0, 0], loss=[0.0, 0.0], probabilities=[[1.0], [1.0]])
    title = "\udcff"  # of a folder whose name is no UTF-8
    page = vlearn.report(record, path=tmp_path / "pages" / "page.html", title=title).read_text()
    assert unpacked(page)[0]["expectedIssues"] is None


def test_what_is_no_argument_is_refused_by_name(tmp_path: Path) -> None:
    record = recorded(tmp_path / "run", num_data=5, epochs=1)
    loader: Any = torch.utils.data.DataLoader([1, 2])  # type: ignore[arg-type]
    for options, message in (
        ({"dataset": loader}, "dataset is a DataLoader, but it must have items by number"),
        ({"names": {0: "a"}}, "names is a dict, but it must be a list"),
        ({"thumbnails": -1}, "thumbnails=-1, but it must not be negative"),
        ({"path": tmp_path}, "is a folder, but it must be the file"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            vlearn.report(record, **{"path": tmp_path / "page.html", **options})
    assert [each.name for each in tmp_path.iterdir()] == ["run"]


def test_what_is_no_record_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no record"):
        vlearn.report(tmp_path, path=tmp_path / "page.html")
    with pytest.raises(ValueError, match="nothing of its examples, or nothing finite"):
        vlearn.report(vlearn.TrainingRecord(3, tmp_path / "empty"), path=tmp_path / "page.html")
    with pytest.raises(TypeError, match="record is a int"):
        vlearn.report(3, path=tmp_path / "page.html")  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_a_run_that_is_killed_leaves_a_record_that_makes_a_page(tmp_path: Path) -> None:
    script = "from tests.report_page.records import recorded; import sys; recorded(sys.argv[1], 200, 10**6)"
    root = Path(__file__).parent.parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")], env=environment) as process:
        try:
            averages, until = tmp_path / "run" / "averages.npz", time.monotonic() + 120
            while not averages.exists() and process.poll() is None and time.monotonic() < until:
                time.sleep(0.02)
        finally:
            process.send_signal(signal.SIGKILL)
    description, _ = unpacked(vlearn.report(tmp_path / "run", path=tmp_path / "page.html").read_text())
    assert description["numData"] == 200 and description["maps"] and description["tables"]


def test_the_command_line_makes_a_page_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path / "run", num_data=12, epochs=1)
    np.savez(tmp_path / "data.npz", x=np.zeros((12, 8, 8), np.uint8), labels=np.arange(12) % 3, names=["a", "b", "c"])
    out = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "run"), "--data", str(tmp_path / "data.npz"), "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert unpacked(out.read_text())[0]["classes"] == ["a", "b", "c"]
    with pytest.raises(SystemExit, match="1"):
        main(["report", str(tmp_path / "nothing")])
    assert "holds no record" in capsys.readouterr().err
    (tmp_path / "data.csv").write_text("text,label\ngood,yes\nbad,no\n")
    assert read_data(str(tmp_path / "data.csv"))[0].texts == ["good", "bad"]
    (tmp_path / "mine.py").write_text("def data():\n    return ['one', 'two']\n")
    monkeypatch.chdir(tmp_path)
    assert read_data("mine:data")[0] == ["one", "two"]
    with pytest.raises(ValueError, match="no module:name"):
        read_data("nothing")
    (tmp_path / "more.py").write_text("number = 5\n")
    with pytest.raises(ValueError, match="--data more:number is a int, but it must be a dataset"):
        read_data("more:number")
    with pytest.raises(SystemExit, match="1"):
        main(["watch", str(tmp_path / "run"), "--port", "70000"])
