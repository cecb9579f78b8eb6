"""Every optimizer on a device that is not the CPU, with the same numbers: bit for bit, as the CPU computes them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlearn
from tests.accelerator.asked import about_examples
from tests.accelerator.pretend import counted
from tests.optim.table import FAMILY, LOOPS, Entry, data, equal, family, loss_of, made, network, plain, states, weights
from tests.pairs import pairs

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "not foreach": {"foreach": False},
    "tempered": {"ess": 200, "num_data": 50},
    "warm-up": {"beta2_warmup": 2.0},
    "skip": {"nonfinite": "skip"},
}


def on(device: Any, tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.to(device) for tensor in tensors]


def same(run: Callable[[Any], list[Tensor]], device: torch.device) -> bool:
    """Whether a run is the same, bit for bit, on the CPU and on the device, and stays there."""
    found = []
    for where in ("cpu", device):
        torch.manual_seed(7)
        tensors = run(where)
        assert tensors and all(t.device.type == torch.device(where).type or t.dim() == 0 for t in tensors)
        found.append(on("cpu", tensors))
    return equal(*found)


@family
@pytest.mark.parametrize("loop", LOOPS)
def test_it_trains_there_in_every_loop(entry: Entry, loop: str, device: torch.device) -> None:
    def run(where: Any) -> list[Tensor]:
        model, (x, y) = network().to(where), on(where, list(data()))
        optimizer = made(entry, loop, model)
        for _ in range(4):
            LOOPS[loop](optimizer, model, x, y)
        return weights(model) + states(optimizer)

    assert same(run, device)


@family
@pytest.mark.parametrize("options", OPTIONS)
def test_it_trains_there_with_every_option(entry: Entry, options: str, device: torch.device) -> None:
    settings = dict(OPTIONS[options])
    dtype = settings.pop("dtype", torch.float64)
    if entry.dense:
        settings.pop("foreach", None)
    if entry.pooled:
        settings.pop("beta2_warmup", None)

    def run(where: Any) -> list[Tensor]:
        model = network(dtype=dtype).to(where)
        x, y = on(where, list(data(dtype=dtype)))
        optimizer = made(entry, "plain", model, **settings)
        for _ in range(4):
            plain(optimizer, model, x, y)
            with torch.no_grad():
                model[0].weight[0, 0] += 1.0  # which a master copy follows  # pyright: ignore
        return weights(model) + states(optimizer)

    assert same(run, device)


@family
def test_draws_of_one_step_are_averaged_there(entry: Entry, device: torch.device) -> None:
    def run(where: Any) -> list[Tensor]:
        model, (x, y) = network().to(where), on(where, list(data()))
        optimizer = made(entry, "context", model)
        for _ in range(3):
            for part in (slice(6), slice(6, None)):
                with optimizer.sampled_params(train=True):
                    optimizer.zero_grad()
                    loss_of(model, x[part], y[part]).backward()
            optimizer.step()
        return weights(model) + states(optimizer)

    assert same(run, device)


@family
def test_everything_that_is_asked_about_examples_is_the_same_there(entry: Entry, device: torch.device) -> None:
    def run(where: Any) -> list[Tensor]:
        model, (x, y) = network().to(where), on(where, list(data()))
        optimizer = made(entry, "plain", model)
        for _ in range(2):
            plain(optimizer, model, x, y)
        found = about_examples(model, optimizer, [(x[:8], y[:8]), (x[8:], y[8:])])
        return [*found, vlearn.predict(model, optimizer.posterior(), x, 3).cpu()]

    found = []
    for where in ("cpu", device):
        torch.manual_seed(7)
        found.append(run(where))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


@family
def test_a_run_is_taken_up_again_there(entry: Entry, device: torch.device) -> None:
    x, y = on(device, list(data()))
    model = network().to(device)
    optimizer = entry.make(model)
    torch.manual_seed(3)
    for _ in range(3):
        plain(optimizer, model, x, y)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    random_state = torch.get_rng_state()
    for _ in range(3):
        plain(optimizer, model, x, y)
    again_model = network(seed=3).to(device)
    again = entry.make(again_model)
    again.load_state_dict(saved["optimizer"])
    again_model.load_state_dict(saved["model"])
    torch.set_rng_state(random_state)
    for _ in range(3):
        plain(again, again_model, x, y)
    assert equal(on("cpu", weights(again_model) + states(again)), on("cpu", weights(model) + states(optimizer)))
    assert all(t.device.type == device.type or t.dim() == 0 for t in states(again))


@pytest.mark.parametrize(
    ("entry", "value", "dtype"),
    pairs(FAMILY, [math.nan, math.inf, -math.inf], [torch.float64, torch.float32, torch.bfloat16]),
    ids=str,
)
def test_a_gradient_that_is_not_finite_is_refused_there(
    entry: Entry, value: float, dtype: torch.dtype, device: torch.device
) -> None:
    model = network(dtype=dtype).to(device)
    x, y = on(device, list(data(dtype=dtype)))
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    before = on("cpu", weights(model) + states(optimizer))
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    model[2].weight.grad[1, 2] = value  # pyright: ignore
    with pytest.raises(FloatingPointError, match="2.weight"):
        optimizer.step()
    assert equal(on("cpu", weights(model) + states(optimizer)), before)


@pytest.mark.parametrize("make", [vlearn.IVON, lambda p, **k: vlearn.VON(p, curvature="price", **k), vlearn.EVON])
def test_complex_parameters_are_trained_there(make: Callable[..., Any], device: torch.device) -> None:
    def run(where: Any) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        p = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.complex128).to(where))
        optimizer = make([p], lr=0.1, ess=100)
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                (p * p.conj()).real.square().sum().backward()
            optimizer.step()
        return [torch.view_as_real(p.detach()), *states(optimizer)]

    assert same(run, device)


def test_a_generator_of_the_cpu_is_refused_there_as_torch_refuses_it(device: torch.device) -> None:
    model, (x, y) = network().to(device), on(device, list(data()))
    optimizer = vlearn.IVON(model, lr=0.1, ess=50, generator=torch.Generator())
    with pytest.raises(RuntimeError, match="generator"):
        plain(optimizer, model, x, y)


def test_draw_and_mean_change_places_there_without_a_read(device: torch.device) -> None:
    model, (x, y) = network().to(device), on(device, list(data()))
    optimizer = vlearn.IVON(model, lr=0.1, ess=50)
    mean, of_mean = on("cpu", weights(model)), network()(data()[0]).detach()
    loss = loss_of(model, x, y)
    drawn = on("cpu", weights(model))
    with counted() as counts, torch.no_grad():
        outputs = [model(x) for _ in range(3)]
    assert not counts.reads
    assert all(torch.equal(output.cpu(), of_mean) for output in outputs) and equal(on("cpu", weights(model)), drawn)
    loss.backward()
    optimizer.eval()
    assert equal(on("cpu", weights(model)), mean)
