"""The numbers on a GPU are those of the oracles too; run where there is one: python -m pytest tests/cuda."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.table import Entry, family
from tests.oracles.networks import CASES
from tests.sensitivity import test_exactness

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]
named = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def on_the_gpu() -> Iterator[None]:
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)


@named
def test_live_equals_per_example_autograd(name: str) -> None:
    test_exactness.test_live_equals_per_example_autograd(name)


@named
def test_sweep_equals_per_example_autograd(name: str) -> None:
    test_exactness.test_sweep_equals_per_example_autograd(name)


class Convolutions(nn.Module):
    """Images ``[N, 1, 8, 8]`` to four classes."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(8 * 64, 4)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


def images(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    y = torch.arange(48) % 4
    return torch.randn(4, 1, 8, 8, dtype=dtype)[y] + 0.3 * torch.randn(48, 1, 8, 8, dtype=dtype), y


def made(entry: Entry, model: nn.Module, **settings: Any) -> Any:
    if entry.dense:
        model.body.requires_grad_(False)  # P x P
    return entry.make(model, ess=48, lr=entry.rate, hess_init=1.0, **settings)


SETTINGS = pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast", "float16 autocast and scaler"])


@SETTINGS
@family
def test_it_trains_and_knows_its_examples(entry: Entry, precision: str) -> None:
    model, (x, y) = Convolutions(), images()
    scaler = torch.amp.GradScaler("cuda", enabled="scaler" in precision, init_scale=256.0)
    optimizer = made(entry, model)
    optimizer.watch(model, loss_scale=scaler.get_scale)
    dtype = torch.bfloat16 if precision.startswith("bfloat16") else torch.float16
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled="autocast" in precision):
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    found = optimizer.sensitivities()
    assert bool((found.self_influence >= 0).all()) and 0 < float(found.self_influence.sum()) < torch.inf


@family
def test_a_state_is_moved_and_taken_up_again(entry: Entry) -> None:
    model, (x, y) = Convolutions(torch.float64), images(torch.float64)
    optimizer = made(entry, model)

    def steps(optimizer: Any, model: nn.Module) -> list[Tensor]:
        torch.manual_seed(2)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    steps(optimizer, model)
    saved = {k: v.cpu().clone() for k, v in model.state_dict().items()}, copy.deepcopy(optimizer.state_dict())
    expected = steps(optimizer, model)
    again = Convolutions(torch.float64)
    fresh = made(entry, again)
    again.load_state_dict(saved[0])
    fresh.load_state_dict(saved[1])
    for found, value in zip(steps(fresh, again), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gradient_that_is_not_finite_is_seen(value: float, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(300, 70), nn.Linear(70, 3)).to(dtype)
    optimizer = vlearn.IVON(model, lr=0.1, ess=10)
    before = [p.detach().clone() for p in model.parameters()]
    F.cross_entropy(model(torch.randn(4, 300, dtype=dtype)), torch.arange(4) % 3).backward()
    (gradient, *_) = [p.grad for p in model.parameters() if p.grad is not None]
    gradient[31, 7] = value
    with pytest.raises(FloatingPointError, match="0.weight"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_a_compiled_step_is_the_step() -> None:
    """Of a tensor that is large enough for a kernel; with next to no noise both are one rule."""
    torch.manual_seed(0)
    models = [nn.Linear(2048, 2048, bias=False) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(16, 2048)
    for model, compiled in zip(models, (False, True), strict=True):
        optimizer = vlearn.IVON(model, lr=0.1, ess=1e12, beta2=0.9, curvature="empirical", compiled=compiled)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(models[1].weight, models[0].weight, rtol=1e-4, atol=1e-6)


def test_recurrent_layers_are_swept_in_eval_mode() -> None:
    """Where cuDNN has no backward pass; afterwards it is on again."""
    torch.manual_seed(0)

    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(5, 6, batch_first=True), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0][:, -1])

    model, x, y = Reader(), torch.randn(8, 7, 5), torch.arange(8) % 3
    posterior = vlearn.IVON(model, lr=0.1, ess=8, hess_init=1.0).posterior()
    table = vlearn.sweep(model, posterior, [(x, y)], F.cross_entropy, progress=False)
    assert torch.backends.cudnn.enabled
    on_cpu = copy.deepcopy(model).cpu()
    posterior = vlearn.IVON(on_cpu, lr=0.1, ess=8, hess_init=1.0).posterior()
    truth = vlearn.sweep(on_cpu, posterior, [(x.cpu(), y.cpu())], F.cross_entropy, progress=False)
    torch.testing.assert_close(table.self_influence.cpu(), truth.self_influence.cpu(), rtol=1e-3, atol=1e-6)
