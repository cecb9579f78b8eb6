import dataclasses
import statistics

import pytest

pytest.importorskip("laplace")

from benchmarks import fidelity_trained
from benchmarks.fidelity_trained import SETTINGS
from benchmarks.problems.digits import Digits


@pytest.mark.slow
@pytest.mark.parametrize(("method", "delta"), [("K-FAC", 1.0), ("EK-FAC", 5.0)])  # all four are on record
def test_kfacvon_trained_from_scratch_predicts_the_test_loss_and_removals(method, delta):
    slopes = []
    for seed in range(2):  # a training's slope varies by .1
        settings = dataclasses.replace(SETTINGS, prior_precision=delta, retrained=20, seed=seed)
        found = fidelity_trained.compare(settings, Digits.load(settings, standardised=False), method)
        assert found["unconverged"] == 0
        assert found["mean"]["loo_loss"] == pytest.approx(found["mean"]["test_loss"], rel=0.2)
        slopes.append(found["minimum"]["slope"])
    assert 0.6 < statistics.mean(slopes) < 1.5
    if method == "K-FAC":  # EK-FAC's single trainings come as low as .58
        assert all(0.6 < slope < 1.5 for slope in slopes)


@pytest.mark.slow
def test_evon_trained_from_scratch_ranks_and_sizes_removals():
    found = []
    for seed in range(2):
        settings = dataclasses.replace(SETTINGS, prior_precision=5.0, epochs=40, retrained=20, seed=seed)
        found.append(fidelity_trained.compare(settings, Digits.load(settings, standardised=False), "EVON"))
        assert found[-1]["unconverged"] == 0
        assert found[-1]["mean"]["loo_loss"] == pytest.approx(found[-1]["mean"]["test_loss"], rel=0.2)
    assert statistics.mean(each["minimum"]["pearson"] for each in found) > 0.95
    assert 0.6 < statistics.mean(each["minimum"]["slope"] for each in found) < 1.5
