import dataclasses

import pytest

pytest.importorskip("laplace")

from benchmarks import fidelity_trained
from benchmarks.fidelity_trained import SETTINGS
from benchmarks.problems.digits import Digits


@pytest.mark.slow
@pytest.mark.parametrize(("method", "delta"), [("K-FAC", 1.0), ("EK-FAC", 5.0)])  # all four are on record
def test_kfacvon_trained_from_scratch_predicts_the_test_loss_and_removals(method, delta):
    settings = dataclasses.replace(SETTINGS, prior_precision=delta, retrained=20)
    found = fidelity_trained.compare(settings, Digits.load(settings, standardised=False), method)
    assert found["unconverged"] == 0
    assert found["mean"]["loo_loss"] == pytest.approx(found["mean"]["test_loss"], rel=0.2)
    # A training's slope varies by .1, and those of EK-FAC come as low as .58.
    assert (0.6 if method == "K-FAC" else 0.5) < found["minimum"]["slope"] < 1.5


@pytest.mark.slow
def test_evon_trained_from_scratch_ranks_and_sizes_removals():
    settings = dataclasses.replace(SETTINGS, prior_precision=5.0, retrained=20)
    found = fidelity_trained.compare(settings, Digits.load(settings, standardised=False), "EVON")
    assert found["unconverged"] == 0
    assert found["mean"]["loo_loss"] == pytest.approx(found["mean"]["test_loss"], rel=0.2)
    assert found["minimum"]["pearson"] > 0.95 and 0.6 < found["minimum"]["slope"] < 1.5
