"""The benchmark of what sensitivities cost runs, and asks for what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import sensitivity_cost
from benchmarks.cost.passes import PLAIN, VLEARN
from benchmarks.problems.images import Images
from benchmarks.problems.networks import LanguageModel, lenet5


@pytest.mark.slow
def test_the_smoke_run_prints_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    sensitivity_cost.main(["--smoke"])
    printed = capsys.readouterr().out
    for words in (*VLEARN, "vmap(grad)", "vmap(jacrev)", "LeNet-5", "GPT, 1M", "Peak memory"):
        assert words in printed


def test_the_picture_has_a_panel_for_each_network_though_some_miss_a_method(tmp_path: Path) -> None:
    networks = [subject.name for subject in sensitivity_cost.SUBJECTS]
    values = {name: 1.0 + place for place, name in enumerate((PLAIN, *VLEARN))}
    found = {
        "multiples": {"threads=1": dict.fromkeys(networks, values)},
        "memory, MiB": {network: values | {"vmap(grad)": 20.0} for network in networks},
        "settings": {network: {"vmap(grad)": "8 at a time"} for network in networks},
    }
    sensitivity_cost.draw(found, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_the_whole_data_set_is_timed_beside_its_plain_pass() -> None:
    x, y = torch.randn(300, 1, 28, 28), torch.arange(300) % 10
    found = sensitivity_cost.whole_data_set(Images("noise", x, y, x[:1], y[:1], x[:1], ()), torch.get_num_threads())
    assert found["images"] == 300
    assert set(found) == {"images", "plain forward + backward, s", "sweep with LOO, s", "peak, MiB"}


def test_lenet_has_the_papers_number_of_parameters() -> None:
    assert sum(p.numel() for p in lenet5().parameters()) == 61_706


def test_the_language_model_has_about_a_million_parameters() -> None:
    assert 0.9e6 < sum(p.numel() for p in LanguageModel().parameters()) < 1.1e6
