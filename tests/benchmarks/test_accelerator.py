"""The benchmark for accelerators runs on the CPU in miniature, measures what it says, and has the networks it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import accelerator
from benchmarks.problems.networks import LanguageModel, resnet50_group_norm


def test_the_quick_run_writes_every_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    accelerator.main(["--device", "cpu", "--quick", "--out", str(out)])
    found = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert {"command", "hardware", "versions", "seconds"} <= found.keys()
    assert len(found["steps"]) == len(found["networks"]) == 2
    for rows in found["steps"].values():
        assert {"AdamW fused", "IVON", "VAdamW"} <= rows.keys()
        assert rows["AdamW fused"]["of AdamW fused"] == 1
        assert all(row["step, ms"] > 0 for row in rows.values())
    for row in found["networks"].values():
        for quantity in (
            "IVON, self-influence, of IVON's step",
            "IVON, self-influence and V e, of IVON's step",
            "sweep, examples per second",
            "KFACVON, ms",
            "KFACVON, with new eigenbases, ms",
        ):
            assert row[quantity] > 0 and quantity in printed


def test_what_does_not_fit_is_left_out_and_the_rest_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = accelerator.optimizers(compiled=False)

    def too_large(parameters: object) -> object:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(accelerator, "optimizers", lambda compiled: {**made, "IVON": too_large})
    found = accelerator.steps([torch.Size((10, 10))], 1, "cpu")
    assert found["IVON"]["step, ms"] is None and found["VAdamW"]["step, ms"] is not None
    assert "left out: CUDA out of memory." in capsys.readouterr().err


def test_the_sizes_are_those_that_it_names() -> None:
    found = accelerator.sizes(quick=False)
    counts = {name: sum(map(torch.Size.numel, shapes)) for name, shapes in found.parameters.items()}
    for name, count in (("8 million", 8e6), ("100 million", 1e8), ("a billion", 1e9)):
        assert counts[f"{name} parameters"] == pytest.approx(count, rel=0.05)
    assert len(found.parameters["tensors of a ResNet-50"]) == 161


def test_the_networks_have_the_published_numbers_of_parameters() -> None:
    with torch.device("meta"):
        models = resnet50_group_norm(), LanguageModel(50257, 1024, 768, 12, 12)
    assert [sum(p.numel() for p in model.parameters()) for model in models] == [25_557_032, 124_439_808]
    assert models[0](torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_what_would_begin_too_late_is_left_out_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accelerator, "LAST_BEGIN", -1.0)
    accelerator.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["steps"] and not found["networks"] and len(found["left out"]) == 8
    assert "left out for want of time: 20 thousand parameters" in capsys.readouterr().out
