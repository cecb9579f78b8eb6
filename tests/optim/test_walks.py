"""Random sequences of calls: whatever is called in whatever order, only a step moves the mean."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.optim.table import FAMILY, Entry, data, equal, loss_of, made, network, plain
from vlearn.optim.sampling.draw import DrawState


class UserError(Exception):
    pass


class Walk:
    """One model and optimizer, and everything that a user may do with them."""

    def __init__(self, entry: Entry, loop: str, dtype: torch.dtype, choice: random.Random):
        self.x, self.y = data(dtype=dtype)
        self.model = network(dtype=dtype)
        self.optimizer = made(entry, loop, self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        self.scaler.scale(torch.zeros(1))
        self.choice = choice

    def mean(self) -> list[Tensor]:
        draw = self.optimizer._sampler.draw
        means = {} if draw is None else draw.means()
        return [means.get(p, p.data).clone() for p in self.model.parameters()]

    def loss(self) -> Tensor:
        return loss_of(self.model, self.x, self.y)

    def step(self) -> None:
        self.optimizer.step()

    def step_with_closure(self) -> None:
        def closure() -> None:
            self.optimizer.zero_grad()
            self.loss().backward()

        self.optimizer.step(closure)

    def step_with_scaler(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def train(self) -> None:
        self.optimizer.train()

    def eval(self) -> None:
        self.optimizer.eval()

    def backward(self) -> None:
        self.loss().backward()

    def scaled_backward(self) -> None:
        self.scaler.scale(self.loss()).backward()

    def context(self) -> None:
        with self.optimizer.sampled_params(train=True):
            if self.choice.random() < 0.5:
                self.optimizer.zero_grad()
            if self.choice.random() < 0.9:
                self.loss().backward()
            if self.choice.random() < 0.2:
                raise UserError

    def ensemble(self) -> None:
        with torch.no_grad(), self.optimizer.sampled_params():
            self.model(self.x)

    def predict(self) -> None:
        self.model.eval()
        with torch.no_grad():
            self.model(self.x)
        self.model.train()

    def forward_without_grad(self) -> None:
        with torch.no_grad():
            self.model(self.x)

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=self.choice.random() < 0.5)

    def zero_grad_of_the_model(self) -> None:
        self.model.zero_grad()

    def overflow(self) -> None:
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad.fill_(float("inf"))

    def freeze_or_unfreeze(self) -> None:
        p = self.choice.choice(list(self.model.parameters()))
        p.requires_grad_(not p.requires_grad)

    def save_and_load(self) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def copy(self) -> None:
        copy.deepcopy((self.model, self.optimizer))

    def read_posterior(self) -> None:
        self.optimizer.posterior().kl()


STEPS = (Walk.step, Walk.step_with_closure, Walk.step_with_scaler)
CALLS: list[Callable[[Walk], None]] = [
    v for name, v in vars(Walk).items() if name[0] != "_" and name not in ("mean", "loss")
]
OFTEN = [Walk.step, Walk.backward, Walk.zero_grad, Walk.context]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("loop", ["plain", "context"])
@pytest.mark.parametrize("entry", FAMILY, ids=str)
def test_only_a_step_that_raises_nothing_moves_the_mean(entry: Entry, loop: str, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    choice = random.Random(seed)
    walk = Walk(entry, loop, dtype, choice)
    mean, calls = walk.mean(), []
    for _ in range(80):
        call = choice.choice(CALLS + 2 * OFTEN)
        calls.append(call.__name__)
        raised = call_and_catch(walk, call)
        now, draw = walk.mean(), walk.optimizer._sampler.draw
        assert equal(now, mean) or (call in STEPS and not raised), calls
        assert all(bool(tensor.isfinite().all()) for tensor in now), calls
        assert (
            draw is not None and draw.state is DrawState.ACTIVE or equal([p.data for p in walk.model.parameters()], now)
        ), calls
        mean = now
    walk.save_and_load()
    walk.zero_grad_of_the_model()
    walk.model.requires_grad_(True)
    walk.optimizer.watch(walk.model)
    plain(walk.optimizer, walk.model, walk.x, walk.y)
    assert not equal(walk.mean(), mean), calls


def call_and_catch(walk: Walk, call: Any) -> bool:
    """Whether it raised one of the errors that the contract names."""
    try:
        call(walk)
    except (RuntimeError, FloatingPointError, UserError):
        return True
    except AssertionError as error:
        if "No inf checks were recorded" not in str(error):  # torch's: a scaler without gradients
            raise
        return True
    return False
