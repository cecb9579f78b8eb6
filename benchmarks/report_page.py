"""What a page of a run costs: seconds and memory to make, megabytes, and how it goes in a browser.

    python -m benchmarks.report_page [--smoke]

Made-up records of 10 classes and ten epochs with a sweep after each: 60,000 examples with 2,000 thumbnails of 32x32
noise, which compress worse than any real image, and a million without. Each page is made in a process of its own, whose
peak memory is what it has beyond the record's own making; then Debian's chromium opens it from disk, without a screen
and without a GPU: seconds until the map is drawn and until everything is there, and, while the map is panned, frames a
second and the share of the points that these draw (the page draws a sample in motion where all are too slow, and all
of them when it rests). Beside it are the rates with all points in each frame and with none, which is what the machine
makes of a page whose axes are drawn anew.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

import vlearn
from benchmarks.cost.memory import MIB, peak, start_of_peak
from benchmarks.report.provenance import provenance
from benchmarks.report.records import RESULTS, write_json
from benchmarks.report.terminal import print_table

CLASSES = 10
PAN = """
const [seconds, share, done] = arguments, began = performance.now(), frames = [];
if (share === 0) view.points.draw = () => {};
const step = (now) => {
  if (share === 1) view.budget = view.count;
  frames.push(now);
  view.pan(4 * Math.cos(frames.length / 9), 4 * Math.sin(frames.length / 9));
  if (frames.length < 3 || now - began < 1000 * seconds) requestAnimationFrame(step);
  else done([1000 * (frames.length - 1) / (frames.at(-1) - frames[0]), Math.min(1, view.budget / view.count)]);
};
requestAnimationFrame(step);
"""


class Pictures:
    """Noise as images."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> np.ndarray:
        if not 0 <= number < self.count:
            raise IndexError(number)
        return np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def make_record(path: Path, num_data: int, epochs: int) -> None:
    """A record in which a tenth of the labels is wrong, and an example's probabilities wander as it is learned."""
    draws = np.random.default_rng(0)
    record = vlearn.TrainingRecord(num_data, path)
    index, labels = np.arange(num_data), draws.integers(0, CLASSES, num_data)
    wrong = draws.random(num_data) < 0.1
    predicted = np.where(wrong, (labels + 1) % CLASSES, labels)
    ease = draws.beta(5, 1.5, num_data)
    for epoch in range(epochs):
        believed = np.clip(ease * (epoch + 1) / epochs + 0.05 * draws.standard_normal(num_data), 0.02, 0.98)
        own = np.where(wrong, 0.1 * (1 - believed), believed)
        others = (1 - own) / (CLASSES - 1)
        probabilities = np.repeat(others[:, None], CLASSES, 1).astype(np.float32)
        probabilities[index, predicted] = 1 - own
        probabilities[index, labels] = own
        probabilities /= probabilities.sum(1, keepdims=True)
        columns = {
            "loss": -np.log(own),
            "margin": np.log(own / others),
            "probability": own,
            "prediction_error": 1 - own,
        }
        columns["agreement"] = (predicted == labels).astype(np.float64)
        record.record(index, 100 * (epoch + 1), predicted, labels, probabilities, **columns)
        record.new_snapshot()
        leverage = 0.5 * own * (1 - own) * draws.lognormal(0, 0.4, num_data)
        swept = {"loss": -np.log(own), "loo_loss": -np.log(own) + leverage, "self_influence": leverage * (1 - own)}
        swept |= {"leverage": leverage, "prediction_error": 1 - own}
        record.record_sweep(record.step, SimpleNamespace(index=index, **swept), test_loss=2.3 / (epoch + 1))


def make_page(folder: Path, num_data: int, thumbnails: int, told: Any) -> None:
    """Make a page of a record and tell what it cost; to be called in a process of its own."""
    data = Pictures(num_data) if thumbnails else None
    base = start_of_peak()
    began = time.perf_counter()
    path = vlearn.report(folder / "run", data, folder / "page.html", thumbnails=thumbnails)
    seconds = time.perf_counter() - began
    told.put(
        {
            "seconds to make": seconds,
            "peak MiB, whole process": peak() / MIB,
            "peak MiB, beyond imports": (peak() - base) / MIB,
            "page, MB": path.stat().st_size / 1e6,
        }
    )


def in_browser(page: Path, seconds: float) -> dict[str, Any]:
    """How a page goes in chromium; nothing where there is none.

    Args:
        seconds: for which the map is panned.
    """
    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if program is None or driver is None:
        print("no chromium with chromedriver here, so pages are not opened: apt-get install chromium chromium-driver")
        return {}
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"):
        options.add_argument(argument)
    options.add_argument("--window-size=1400,1000")
    with webdriver.Chrome(options=options, service=Service(driver)) as opened:
        opened.get(page.as_uri())
        end = time.monotonic() + 120
        while opened.execute_script("return document.documentElement.dataset.ready") != "all":
            if time.monotonic() > end:
                raise TimeoutError(f"{page} was not there after two minutes")
            time.sleep(0.1)
        times = {
            name: float(opened.execute_script(f"return performance.getEntriesByName('{mark}')[0].startTime")) / 1000
            for name, mark in (("seconds to first picture", "map"), ("seconds to all", "all"))
        }
        opened.set_script_timeout(60 + seconds)
        rate, share = opened.execute_async_script(PAN, seconds, None)
        whole, none = (opened.execute_async_script(PAN, seconds, each)[0] for each in (1, 0))
        hover = "const t = performance.now(); for (let k = 0; k < 20; k++) view.nearest(300 + k, 300); "
        nearest = opened.execute_script(hover + "return (performance.now() - t) / 20")
        return {
            **times,
            "frames a second": rate,
            "share of points in motion": share,
            "frames a second, all points": whole,
            "frames a second, no points": none,
            "milliseconds to find a point": nearest,
        }


def main(argv: list[str] | None = None) -> None:
    """Make pages, open them, and write what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small records; nothing is written")
    arguments = parser.parse_args(argv)
    sizes = {"60,000 examples": (60_000, 2000, 10), "a million examples": (1_000_000, 0, 10)}
    if arguments.smoke:
        sizes = {"300 examples": (300, 50, 2)}
    found: dict[str, dict[str, Any]] = {}
    for name, (num_data, thumbnails, epochs) in sizes.items():
        with tempfile.TemporaryDirectory() as folder:
            make_record(Path(folder) / "run", num_data, epochs)
            context = multiprocessing.get_context("spawn")
            told = context.Queue()
            process = context.Process(target=make_page, args=(Path(folder), num_data, thumbnails, told))
            process.start()
            found[name] = told.get()
            process.join()
            found[name] |= in_browser(Path(folder) / "page.html", 0.3 if arguments.smoke else 8)
    names = list(next(iter(found.values())))
    print_table("Pages", ["", *found], [[name, *(f"{each[name]:.3g}" for each in found.values())] for name in names])
    if not arguments.smoke:
        content = {**provenance("python -m benchmarks.report_page", 0), "pages": found}
        write_json(RESULTS / "report_page.json", content)


if __name__ == "__main__":
    main()
