"""skorch makes the optimizer from its class and keyword arguments, and calls step(closure)."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import nn

import vlearn
from tests.clients.problem import EXTRA, LINES, SETTINGS, SLOWER, SeenWeights, X, Y, every_line, of_classification
from tests.optim.table import closure, equal, network, states, weights
from tests.oracles.per_example import relative_error

skorch = pytest.importorskip("skorch", reason=EXTRA)


def classifier(kind: Any = vlearn.IVON, epochs: int = 1, callbacks: Any = None) -> Any:
    torch.manual_seed(0)
    settings = LINES.get(kind, SLOWER)
    return skorch.NeuralNetClassifier(
        network,
        criterion=nn.CrossEntropyLoss,
        optimizer=kind,
        max_epochs=epochs,
        batch_size=16,
        train_split=None,
        callbacks=callbacks,
        verbose=0,
        **{f"optimizer__{name}": value for name, value in settings.items()},
    )


class Watching(skorch.callbacks.Callback):
    """Gives the optimizer its model, and reads the rows of every step with what they are to be compared with."""

    def on_train_begin(self, net: Any, **kwargs: Any) -> None:
        net.optimizer_.watch(net.module_)
        self.seen, self.steps = SeenWeights(net.module_), []

    def on_batch_end(self, net: Any, batch: Any = None, training: bool = False, **kwargs: Any) -> None:
        if training:
            rows, variance = net.optimizer_.sensitivities(), net.optimizer_.posterior().clone().variance
            self.steps.append((rows, dict(self.seen.by_name), variance, *batch))


@every_line
def test_a_class_and_its_keyword_arguments_train(kind: Any) -> None:
    net = classifier(kind, epochs=25).fit(X, Y)
    assert net.history[0, "train_loss"] > 0.9 and net.history[-1, "train_loss"] < 0.4
    assert net.score(X, Y.numpy()) > 0.9


def test_the_steps_are_those_of_the_loop_by_hand() -> None:
    net = classifier(epochs=2).set_params(optimizer__generator=torch.Generator().manual_seed(7)).fit(X, Y)
    model = network()
    optimizer = vlearn.IVON(model.parameters(), **SETTINGS, generator=torch.Generator().manual_seed(7))
    for x, y in list(zip(X.split(16), Y.split(16), strict=True)) * 2:
        closure(optimizer, model, x, y)
    assert equal(weights(net.module_), weights(model))


@pytest.mark.parametrize("kind", [vlearn.IVON, vlearn.VAdamW, vlearn.VON, vlearn.VOGN])
def test_a_callback_that_watches_the_module_has_the_rows_of_every_step(kind: Any) -> None:
    read = Watching()
    net = classifier(kind, callbacks=[("watch", read)]).fit(X, Y)
    assert len(read.steps) == 6
    for rows, seen, variance, x, y in read.steps:
        truth = of_classification(net.module_, seen, variance, x, y)
        assert relative_error(rows.self_influence, truth) < 1e-10


def test_without_it_the_message_names_the_remedy() -> None:
    net = classifier().fit(X, Y)
    with pytest.raises(
        RuntimeError, match=r"needs a watched model: use IVON\(model, ...\) or optimizer.watch\(model\)"
    ):
        net.optimizer_.sensitivities()
    with pytest.raises(RuntimeError, match=r"which only a watched model gives: .* optimizer.watch\(model\)"):
        classifier(vlearn.VON).fit(X, Y)


@every_line
def test_a_net_goes_on_from_its_saved_files(kind: Any, tmp_path: Any) -> None:
    files = {"f_params": tmp_path / "params.pt", "f_optimizer": tmp_path / "optimizer.pt"}
    net, other = classifier(kind, epochs=2).fit(X, Y), classifier(kind, epochs=2).initialize()
    net.save_params(**files)
    other.load_params(**files)
    assert equal(weights(other.module_), weights(net.module_))
    assert equal(states(other.optimizer_), states(net.optimizer_))
    for each in (net, other):
        torch.manual_seed(1)
        each.partial_fit(X, Y)
    assert equal(weights(other.module_), weights(net.module_))


def test_a_pickled_net_predicts_as_before() -> None:
    net = classifier(epochs=2).fit(X, Y)
    again = pickle.loads(pickle.dumps(net))
    assert (again.predict_proba(X) == net.predict_proba(X)).all()
    again.partial_fit(X, Y)
