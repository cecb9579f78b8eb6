"""What was found about kinds of passes is kept for a bounded number of them, and no longer than the model."""

import gc

import pytest
from torch import nn

from vlearn.capture import model_checks
from vlearn.capture.model_checks import ModelChecks, remember


def test_as_many_kinds_as_the_limit_are_remembered(monkeypatch):
    monkeypatch.setattr(model_checks, "MOST_KINDS", 1)
    findings = {}
    for kind in ("one", "two"):
        remember(findings, kind, kind.upper())
        assert findings == {kind: kind.upper()}


def test_findings_are_those_of_one_model_and_go_with_it():
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    checks = ModelChecks.of(model)
    assert ModelChecks.of(model) is checks and ModelChecks.of(other) is not checks
    gc.collect()
    count = len(model_checks._checks_of)
    del model
    gc.collect()
    assert len(model_checks._checks_of) == count - 1


@pytest.mark.parametrize("name", ["unattributed", "independent", "example_axes"])
def test_there_are_none_at_first(name):
    assert getattr(ModelChecks(), name) == {}
