"""The page in a real browser: it is seen, moved, pointed at, and what is selected leaves it."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vlearn
from tests.report_page.browser import browser
from tests.report_page.records import HOSTILE, hostile_texts, recorded
from tests.report_page.servers import running
from vlearn.report_page.server import Watched

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    downloads = tmp_path_factory.mktemp("downloads")
    with browser(downloads) as opened:
        opened.downloads = downloads
        yield opened


def until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """What a condition gives once it is true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain: {what}"
        time.sleep(0.05)
    return found


def ready(page: Any, state: str = "all") -> None:
    until(lambda: page.execute_script("return document.documentElement.dataset.ready") == state, "the page is ready")
    page.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")


def drag(page: Any, points: list[tuple[float, float]]) -> None:
    """Press, move and release the mouse over points of the map, in pixels from its upper left."""
    from selenium.webdriver import ActionChains

    box = page.execute_script("const b = overlay.getBoundingClientRect(); return [b.left, b.top]")
    actions = ActionChains(page, duration=20)
    for place, (x, y) in enumerate(points):
        actions.w3c_actions.pointer_action.move_to_location(int(box[0] + x), int(box[1] + y))
        if place == 0:
            actions.w3c_actions.pointer_action.pointer_down()
    actions.w3c_actions.pointer_action.pointer_up()
    actions.perform()


def downloaded(page: Any, name: str) -> str:
    file: Path = page.downloads / name
    until(file.exists, f"{name} is downloaded")
    content = file.read_bytes().decode()
    file.unlink()
    return content


def ink(page: Any) -> float:
    """Share of the map's pixels that have something on them."""
    script = """
        const done = arguments[0];
        view.draw();
        requestAnimationFrame(() => {
          const gl = view.points.gl, pixels = new Uint8Array(4 * gl.drawingBufferWidth * gl.drawingBufferHeight);
          gl.readPixels(0, 0, gl.drawingBufferWidth, gl.drawingBufferHeight, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
          let inked = 0;
          for (let i = 3; i < pixels.length; i += 4) inked += pixels[i] > 0;
          done((4 * inked) / pixels.length);
        });"""
    return page.execute_async_script(script)


def test_examples_are_moved_and_exported_and_strangers_texts_stay_texts(chromium: Any, tmp_path: Path) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    data = hostile_texts(60)
    record = recorded(tmp_path / "run", num_data=60, epochs=3)
    page = chromium
    page.get(vlearn.report(record, data, tmp_path / "page.html", title=HOSTILE[0]).as_uri())
    ready(page)
    text: Callable[[str], str] = lambda name: page.find_element(By.ID, name).text  # noqa: E731
    script = page.execute_script

    # It is seen, and says what it has.
    assert text("title") == page.title == HOSTILE[0]
    assert "60 examples" in text("facts") and text("map-title") == "Memory map"
    assert 0.0005 < ink(page) < 0.5
    expected = vlearn.label_issues(record)
    assert f"{expected.count} labels likely wrong" in " ".join(text("summary").split())
    first = page.find_elements(By.CSS_SELECTOR, ".rows tbody tr")[0]
    number = int(expected.numbers[0])
    assert str(number) in first.text and HOSTILE[number % 5][:20] in first.text

    # A point is pointed at: its text, as text, and its labels.
    place = script(f"return view.placeOf({number})")
    overlay = page.find_element(By.ID, "overlay")
    box = script("const b = overlay.getBoundingClientRect(); return [b.width, b.height]")
    ActionChains(page).move_to_element_with_offset(
        overlay, round(place[0] - box[0] / 2), round(place[1] - box[1] / 2)
    ).perform()
    until(lambda: text("hover"), "the card of a point is shown")
    pointed = int(text("hover").split("\n")[0].removeprefix("Example "))
    assert data.texts[pointed] in text("hover") and data.names[pointed % 3] in text("hover")
    ActionChains(page).click().perform()
    until(lambda: f"Example {pointed}" in text("pinned"), "the point is kept")

    # The slider moves all points to where the first sweep has them.
    before = script(f"return view.placeOf({number})")
    script("const s = document.getElementById('snapshot'); s.value = 0; s.dispatchEvent(new Event('input'))")
    until(lambda: script("return view.blend") == 1, "the points have moved")
    assert text("step") == "step 10" and script(f"return view.placeOf({number})") != before
    x, y = script(f"return view.map.unpacked[0].map((all) => all[{number}] / 65534)")
    low, high = (script(f"return view.map.x.{end}") for end in ("low", "high"))
    assert low * (high / low) ** x == pytest.approx(float(record.memory.column("leverage")[1, number]), rel=1e-3)
    assert y == pytest.approx(float(record.memory.column("prediction_error")[1, number]), abs=1e-4)

    # A lasso around the upper half selects what lies there, and that is what leaves the page.
    page.find_element(By.ID, "tool-lasso").click()
    plot = script("return view.plot")
    middle = script("return view.toPixel(0, 0.5)[1]")
    left, right, top = plot["x"] + 1, plot["x"] + plot["width"] - 1, plot["y"] + 40
    drag(page, [(left, middle), (left, top), (right, top), (right, middle)])
    error = record.memory.column("prediction_error")[1]
    selected = script("return state.selected")
    inside = [n for n in range(60) if error[n] > 0.5 and script(f"return view.placeOf({n})[1]") > top]
    assert selected == inside and len(inside) > 3
    page.find_element(By.ID, "export-csv").click()
    rows = list(csv.DictReader(downloaded(page, "examples.csv").splitlines()))
    assert [int(row["number"]) for row in rows] == selected
    names = ["'" + name if name.startswith("=") else name for name in data.names]
    assert [row["given"] for row in rows] == [names[n % 3] for n in selected]
    assert float(rows[0]["loss"]) == pytest.approx(record.column("loss")[selected[0]], rel=1e-5)
    page.find_element(By.ID, "export-json").click()
    exported = json.loads(downloaded(page, "examples.json"))
    assert exported["title"] == HOSTILE[0] and [e["number"] for e in exported["examples"]] == selected
    assert [e["given"] for e in exported["examples"]] == [data.names[n % 3] for n in selected]

    # Nothing of all this ran or was asked of a network, and dark is dark.
    assert script("return window.hacked === undefined && document.images.length === 0")
    assert script("return performance.getEntriesByType('resource').length") == 0
    assert [each for each in page.get_log("browser") if each["level"] == "SEVERE"] == []
    light = script("return getComputedStyle(document.body).backgroundColor")
    page.find_element(By.ID, "theme").click()
    assert script("return getComputedStyle(document.body).backgroundColor") != light


def test_a_watched_record_is_shown_as_it_grows(chromium: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By

    page = chromium
    with running(Watched(tmp_path / "run"), every=0.2) as address:
        page.get(address)
        until(lambda: "no record yet" in page.find_element(By.ID, "message").text, "the page waits")
        recorded(tmp_path / "run", num_data=30, epochs=1)
        ready(page)
        assert "1 epochs recorded" in page.find_element(By.ID, "facts").text
        page.execute_script("keep(3); document.documentElement.dataset.ready = 'map'")
        recorded(tmp_path / "run", num_data=30, epochs=2)
        ready(page)
        until(lambda: "2 epochs recorded" in page.find_element(By.ID, "facts").text, "it shows the second epoch")
        assert "Example 3" in page.find_element(By.ID, "pinned").text
        assert [e for e in page.get_log("browser") if "Content Security Policy" in e["message"]] == []
