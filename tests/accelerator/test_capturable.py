"""`capturable=True`: a step of IVON with nothing of the host's in it, which a CUDA graph can replay."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.accelerator.pretend import counted
from tests.accelerator.test_launches import parameters, step_of
from tests.optim.table import data, loss_of, network, plain, weights

SETTINGS: list[dict[str, Any]] = [
    {},
    {"clip_radius": 0.05},
    {"curvature": "empirical"},
    {"debias": False},
    {"beta1": 0.0},
    {"ess": 200, "num_data": 50},
    {"weight_decay": 0.0},
]
settings = pytest.mark.parametrize("options", SETTINGS, ids=str)


def made(params: Any, capturable: bool, **options: Any) -> vlearn.IVON:
    options = {"lr": 0.1, "ess": 50, **options}
    return vlearn.IVON(params, capturable=capturable, nonfinite="ignore", **options)


@settings
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_its_steps_are_those_of_ivon(options: dict[str, Any], dtype: torch.dtype) -> None:
    found = []
    for capturable in (False, True):
        model, (x, y) = network(dtype=dtype), data(dtype=dtype)
        optimizer = made(model, capturable, **options)
        torch.manual_seed(2)
        for step in range(6):
            plain(optimizer, model, x, y)
            if step == 3:
                optimizer.param_groups[0]["lr"] = 0.03
        found.append(weights(model))
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5 if dtype is torch.float64 else 1e-2, atol=1e-6)


@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_has_nothing_of_the_hosts(options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> None:
    params = parameters(12, device, dtype)
    optimizer = made(params, True, **{**options, "lr": torch.tensor(0.1, device=device)})
    step_of(optimizer, params)
    counts = step_of(optimizer, params)
    assert not counts.reads and not counts.uploads and not counts.numbers and not counts.on_cpu, vars(counts)


def test_a_whole_training_step_of_a_watched_model_has_nothing_of_the_hosts(device: torch.device) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)).to(device)
    x, y = torch.randn(6, 1, 6, 6).to(device), (torch.arange(6) % 3).to(device)
    optimizer = made(model, True)
    for step in range(3):
        with counted() as counts:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        if step:
            assert not counts.reads and not counts.uploads and not counts.numbers and not counts.on_cpu, vars(counts)


def test_parameters_with_fewer_steps_have_their_own_correction() -> None:
    found = []
    for capturable in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2)]
        optimizer = made(params, capturable)
        for step in range(4):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                sum(p.square().sum() for p in params[: 1 + step % 2]).backward()  # pyright: ignore
            optimizer.step()
        found.append([p.detach() for p in params])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)


def test_its_learning_rate_may_be_a_tensor_that_a_schedule_writes(device: torch.device) -> None:
    found = []
    for where, lr in (("cpu", 0.1), (device, torch.tensor(0.1, device=device))):
        torch.manual_seed(0)
        model, (x, y) = network().to(where), [t.to(where) for t in data()]
        optimizer = made(model, True, lr=lr)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        for _ in range(3):
            plain(optimizer, model, x, y)
            scheduler.step()
        found.append([p.cpu() for p in weights(model)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)


def test_a_run_is_taken_up_again_with_its_steps_on_the_device(device: torch.device) -> None:
    model, (x, y) = network().to(device), [t.to(device) for t in data()]
    optimizer = made(model, True)
    plain(optimizer, model, x, y)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(1)
    plain(optimizer, model, x, y)
    again = network(seed=4).to(device)
    resumed = made(again, True)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    torch.manual_seed(1)
    plain(resumed, again, x, y)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p.detach().cpu(), q.detach().cpu())
        assert resumed.state[q]["step"].device.type == device.type and float(resumed.state[q]["step"]) == 2


def test_a_group_that_becomes_capturable_takes_its_steps_to_the_device(device: torch.device) -> None:
    params = parameters(6, device)
    optimizer = made(params, False)
    step_of(optimizer, params)
    optimizer.param_groups[0]["capturable"] = True
    step_of(optimizer, params)
    assert all(optimizer.state[p]["step"].device.type == device.type for p in params)
    assert not step_of(optimizer, params).on_cpu


@pytest.mark.parametrize(
    "options",
    [{"nonfinite": "raise"}, {"beta2_warmup": 3.0}, {"compiled": True}, {"shared_noise": True}, {"sync": True}],
    ids=str,
)
def test_what_needs_the_host_is_refused_with_it(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name}=.*capturable=True"):
        vlearn.IVON([nn.Parameter(torch.ones(2))], 0.1, 50, **{"nonfinite": "ignore", **options}, capturable=True)


def test_a_step_that_is_not_is_refused_inside_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = network(), data()
    optimizer = made(model, False)
    loss_of(model, x, y).backward()
    for name in ("is_available", "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, lambda: True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer.step()
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()
    assert all(map(torch.isfinite, [p.sum() for p in weights(model)]))
