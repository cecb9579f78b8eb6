"""fastai wraps the optimizer's class and schedules it by names of its own."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import pytest
import torch

import vlearn
from tests.clients.problem import SETTINGS, SLOWER, SeenWeights, X, Y, of_classification
from tests.optim.table import equal, network, states, weights
from tests.oracles.per_example import relative_error

pytest.importorskip("fastai", reason="fastai asks for torchvision, spaCy and more than the extra 'clients' brings")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of pandas
    from fastai.basics import (
        Callback,
        CrossEntropyLossFlat,
        DataLoader,
        DataLoaders,
        Learner,
        OptimWrapper,
        accuracy,
    )
    from fastai.callback import progress, schedule  # noqa: F401  give Learner more methods


class Rows(Callback):
    """Compares the rows of every step with the oracle's."""

    def before_fit(self) -> None:
        self.seen, self.compared = SeenWeights(self.learn.model), 0

    def after_batch(self) -> None:
        if self.training:
            optimizer = self.learn.opt.opt
            rows, variance = optimizer.sensitivities(), optimizer.posterior().variance
            truth = of_classification(self.learn.model, self.seen.by_name, variance, self.x, self.y)
            assert relative_error(rows.self_influence.double(), truth) < 1e-4
            self.compared += 1


def learner(kind: Any = vlearn.IVON, folder: Any = ".") -> Any:
    settings = {name: value for name, value in (SETTINGS if kind is vlearn.IVON else SLOWER).items() if name != "lr"}
    data = list(zip(X.float(), Y, strict=True))
    loaders = DataLoaders(DataLoader(data, bs=16), DataLoader(data, bs=32), device="cpu")
    return Learner(
        loaders,
        network(dtype=torch.float32),
        loss_func=CrossEntropyLossFlat(),
        opt_func=partial(OptimWrapper, opt=kind, **settings),
        metrics=accuracy,
        path=folder,
    )


def fitted(learn: Any, epochs: int, rate: float, one_cycle: bool = False, **settings: Any) -> Any:
    with learn.no_logging(), learn.no_bar():
        (learn.fit_one_cycle if one_cycle else learn.fit)(epochs, rate, **settings)
    return learn


@pytest.mark.parametrize("one_cycle", [False, True], ids=["constant", "one cycle"])
def test_a_learner_trains(one_cycle: bool) -> None:
    learn = fitted(learner(), 25, 0.3, one_cycle)
    assert learn.recorder.values[0][1] > 0.6 and learn.recorder.values[-1][1] < 0.3  # validation loss
    assert learn.recorder.values[-1][2] > 0.9


@pytest.mark.parametrize("kind", [vlearn.IVON, vlearn.VON, vlearn.VOGN])
def test_a_callback_reads_the_oracle_s_rows_after_every_step(kind: Any) -> None:
    read = Rows()
    fitted(learner(kind), 2, 0.05, cbs=[read])
    assert read.compared == 12


@pytest.mark.filterwarnings("ignore:numpy.core is deprecated")
def test_a_saved_learner_goes_on(tmp_path: Any) -> None:
    learn = fitted(learner(folder=tmp_path), 2, 0.3)
    learn.save("learner")
    again = learner(folder=tmp_path).load("learner")
    assert equal(weights(again.model), weights(learn.model))
    assert equal(states(again.opt.opt), states(learn.opt.opt))
    before = weights(again.model)
    fitted(again, 1, 0.3)
    assert not equal(before, weights(again.model))
