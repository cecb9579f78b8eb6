"""ignite's trainer calls the model and backward() itself: the optimizer finds the model by its parameters alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.clients.problem import EXTRA, SETTINGS, SLOWER, SeenWeights, X, Y, of_classification
from tests.optim.table import equal, network, plain, states, weights
from tests.oracles.per_example import relative_error

pytest.importorskip("ignite", reason=EXTRA)
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer  # noqa: E402
from ignite.handlers import Checkpoint, DiskSaver  # noqa: E402
from ignite.metrics import Accuracy, Loss  # noqa: E402


class Run:
    """A network, its optimizer and ignite's trainer of both; the settings are the optimizer's."""

    def __init__(self, kind: Any = vlearn.IVON, parts: int = 1, **settings: Any):
        self.model = network()
        self.seen = SeenWeights(self.model)
        own = SETTINGS if kind is vlearn.IVON else SLOWER
        self.optimizer = kind(self.model.parameters(), **{**own, **settings})
        self.trainer = create_supervised_trainer(
            self.model, self.optimizer, nn.CrossEntropyLoss(), gradient_accumulation_steps=parts
        )

    def train(self, epochs: int = 1) -> None:
        self.trainer.run(loader(), max_epochs=epochs)

    def check_rows(self, x: Any, y: Any) -> None:
        rows, variance = self.optimizer.sensitivities(), self.optimizer.posterior().variance
        truth = of_classification(self.model, self.seen.by_name, variance, x, y)
        assert relative_error(rows.self_influence, truth) < 1e-10


def loader() -> DataLoader:
    return DataLoader(TensorDataset(X, Y), batch_size=16, generator=torch.Generator())


def batches() -> Iterator[Any]:
    return zip(X.split(16), Y.split(16), strict=True)


def test_a_trainer_trains_and_its_evaluator_sees_the_mean() -> None:
    run = Run()
    evaluator = create_supervised_evaluator(run.model, {"loss": Loss(nn.CrossEntropyLoss()), "right": Accuracy()})
    before = evaluator.run(loader()).metrics["loss"]
    run.train(25)
    after = evaluator.run(loader()).metrics
    assert before > 0.9 and after["loss"] < 0.3 and after["right"] > 0.9
    assert equal(weights(run.model), [*run.optimizer.posterior().mean.values()])


@pytest.mark.parametrize("kind", [vlearn.IVON, vlearn.VON, vlearn.VOGN])
def test_a_handler_reads_the_oracle_s_rows_after_every_step(kind: Any) -> None:
    run = Run(kind)
    given = iter(batches())
    run.trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: run.check_rows(*next(given)))
    run.train()
    assert next(given, None) is None


def test_the_steps_are_those_of_the_loop_by_hand() -> None:
    run = Run(generator=torch.Generator().manual_seed(7))
    run.train(2)
    model = network()
    optimizer = vlearn.IVON(model.parameters(), **SETTINGS, generator=torch.Generator().manual_seed(7))
    for x, y in [*batches()] * 2:
        plain(optimizer, model, x, y)
    assert equal(weights(run.model), weights(model))


def test_accumulation_is_warned_of_until_it_is_told() -> None:
    run = Run(parts=2)
    run.train()
    with pytest.warns(UserWarning, match=r"the loss is 0.5 times .* tell watch\(model, loss_scale=0.5\)"):
        run.optimizer.sensitivities()
    told = Run(parts=2)
    told.optimizer.watch(told.model, loss_scale=0.5)
    told.train()
    told.check_rows(X[-16:], Y[-16:])


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Any) -> None:
    def run(epochs: int, load: Any = None, save: bool = False) -> Run:
        run = Run(generator=torch.Generator())
        to_save = {"model": run.model, "optimizer": run.optimizer, "trainer": run.trainer}
        if save:
            handler = Checkpoint(to_save, DiskSaver(str(tmp_path)), n_saved=None)
            run.trainer.add_event_handler(Events.EPOCH_COMPLETED, handler)
        if load is not None:
            Checkpoint.load_objects(to_save, checkpoint=torch.load(load, weights_only=True))
        # The noise is no part of what ignite saves.
        run.trainer.add_event_handler(
            Events.ITERATION_STARTED, lambda engine: run.optimizer.generator.manual_seed(engine.state.iteration)
        )
        run.train(epochs)
        return run

    whole = run(4, save=True)
    resumed = run(4, load=tmp_path / "checkpoint_12.pt")
    assert resumed.trainer.state.iteration == 24
    assert equal(weights(resumed.model), weights(whole.model))
    assert equal(states(resumed.optimizer), states(whole.optimizer))
