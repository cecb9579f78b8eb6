"""Accelerate's loop, prepared, accumulated, clipped, saved and resumed, against the same loop by hand, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.frameworks.lines import LINES
from tests.optim.table import data, equal, network, weights

X, Y = data(count=24, dtype=torch.float32)


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerate's settings are global: the first Accelerator of a process makes them."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


class Run:
    """A network, its optimizer, loader and scheduler, prepared."""

    def __init__(self, parts: int = 1, how: str = "watched", precision: str = "no", make: Any = None, **settings: Any):
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts, mixed_precision=precision)
        model = network(dtype=torch.float32)
        self.own = (make or ivon)(model if how == "watched" else model.parameters(), **settings)
        if how == "watched":
            self.own.watch(model, loss_scale=1 / parts)
        loader = DataLoader(TensorDataset(X, Y), batch_size=4, generator=torch.Generator())
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, self.own, loader, one_cycle(self.own)
        )
        self.how = how
        self.rows: list[Any] = []

    def micro_batch(self, x: Tensor, y: Tensor, norm: float | None = None) -> None:
        with self.accelerator.accumulate(self.model):
            if self.how == "modes":
                self.optimizer.train()
            logits = self.model(x)
            self.accelerator.backward(F.cross_entropy(logits, y))
            if norm is not None and self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), norm)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
        if self.how == "watched":
            self.rows.append((self.own.sensitivities().residual, logits.softmax(1) - F.one_hot(y, 3)))


def ivon(params: Any, **settings: Any) -> vlearn.IVON:
    generator = torch.Generator().manual_seed(7)
    return vlearn.IVON(params, **{"lr": 0.1, "ess": 24, "hess_init": 0.5, "generator": generator, **settings})


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=20)


def by_hand(parts: int, how: str, norm: float | None, make: Any = None) -> nn.Module:
    model = network(dtype=torch.float32)
    optimizer = (make or ivon)(model if how == "watched" else model.parameters())
    scheduler = one_cycle(optimizer)
    for i, (x, y) in enumerate(zip(X.split(4), Y.split(4), strict=True)):
        if how == "modes":
            optimizer.train()
        (F.cross_entropy(model(x), y) / parts).backward()
        if i % parts == parts - 1:
            if norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model


@pytest.mark.parametrize("how", ["watched", "modes"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("norm", [None, 0.2])
def test_the_prepared_loop_is_the_loop_by_hand(how: str, parts: int, norm: float | None) -> None:
    run = Run(parts, how)
    for x, y in run.loader:
        run.micro_batch(x, y, norm)
    assert equal(weights(run.model), weights(by_hand(parts, how, norm)))
    assert run.own.state[run.model[0].weight]["step"] == 6 // parts


@pytest.mark.parametrize("line", list(LINES))
def test_every_line_makes_the_steps_of_the_loop_by_hand(line: str) -> None:
    run = Run(2, make=LINES[line])
    for x, y in run.loader:
        run.micro_batch(x, y, 0.2)
    assert equal(weights(run.model), weights(by_hand(2, "watched", 0.2, LINES[line])))
    for residual, expected in run.rows:
        torch.testing.assert_close(residual, expected)


def test_sensitivities_undo_the_division_by_the_number_of_micro_batches() -> None:
    run = Run(parts=2)
    for x, y in run.loader:
        run.micro_batch(x, y)
    for residual, expected in run.rows:
        torch.testing.assert_close(residual, expected)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("how", ["watched", "modes"])
def test_a_loaded_state_goes_on_bit_for_bit(how: str, precision: str, tmp_path: Any) -> None:
    batches = list(zip(X.split(4), Y.split(4), strict=True))
    run, other = (Run(2, how, precision, generator=None) for _ in range(2))
    for x, y in batches[:2]:
        run.micro_batch(x, y)
    run.accelerator.save_state(str(tmp_path))
    for x, y in batches[2:]:
        run.micro_batch(x, y)
    torch.manual_seed(4)
    other.accelerator.load_state(str(tmp_path))
    for x, y in batches[2:]:
        other.micro_batch(x, y)
    assert equal(weights(run.model), weights(other.model))
    assert run.scheduler.get_last_lr() == other.scheduler.get_last_lr()


def test_a_state_saved_between_micro_batches_holds_the_mean_and_no_draw(tmp_path: Any) -> None:
    run, other = Run(2), Run(2)
    x, y = X[:4], Y[:4]
    run.micro_batch(x, y)
    mean = [*run.own.posterior().clone().mean.values()]
    run.accelerator.save_state(str(tmp_path))
    assert not equal(weights(run.model), mean)
    other.micro_batch(x, y)  # a draw waits when the state is loaded
    other.accelerator.load_state(str(tmp_path))
    assert equal(weights(other.model), mean)


def test_an_optimizer_is_prepared_and_loaded_before_its_first_step() -> None:
    run = Run()
    assert run.optimizer.optimizer is run.own and not run.own.state
    state = run.optimizer.state_dict()
    run.optimizer.load_state_dict(state)
    for x, y in run.loader:
        run.micro_batch(x, y)
    assert equal(weights(run.model), weights(by_hand(1, "watched", None)))


def test_an_unwrapped_or_copied_model_holds_the_mean() -> None:
    run = Run(parts=2)
    x, y = next(iter(run.loader))
    run.micro_batch(x, y)
    mean = [*run.own.posterior().clone().mean.values()]
    assert not equal(weights(run.model), mean)
    assert equal([*run.accelerator.get_state_dict(run.model).values()], mean)
    assert equal([*run.accelerator.unwrap_model(run.model).state_dict().values()], mean)
