"""`compiled=True`: the same numbers from one kernel per large tensor. A first compilation takes tens of seconds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import vlearn
from vlearn.optim.kernels.threefry import new_key, normals

pytestmark = pytest.mark.slow


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    """A large matrix, a large channels-last kernel, a small vector."""
    torch.manual_seed(0)
    kernel = torch.randn(64, 32, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
    return [
        nn.Parameter(torch.randn(128, 256, dtype=dtype)),
        nn.Parameter(kernel),
        nn.Parameter(torch.randn(7).to(dtype)),
    ]


def train(compiled: bool, steps: int = 4, dtype: torch.dtype = torch.float64, **settings: object) -> list[torch.Tensor]:
    """Weights and states after some steps in which both ways see the same draws."""
    weights = parameters(dtype)
    optimizer = vlearn.IVON(weights, lr=0.1, ess=100, compiled=compiled, **settings)  # pyright: ignore
    noise = torch.Generator().manual_seed(1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        for _ in range(settings.get("mc_samples", 1)):  # pyright: ignore
            with optimizer.sampled_params(train=True):
                with torch.no_grad():
                    for p, mean in zip(weights, optimizer.posterior().mean.values(), strict=True):
                        p.copy_(mean + 0.1 * torch.randn(p.shape, generator=noise, dtype=torch.float64))
                optimizer.zero_grad()
                sum(p.square().sum() + p.sin().sum() for p in weights).backward()
        optimizer.step()
    return [t.detach() for p in weights for t in (p, optimizer.state[p]["hessian"], optimizer.state[p]["momentum"])]


@pytest.mark.parametrize(
    "settings", [{}, {"hess_approx": "gradsq"}, {"clip_radius": 1e-3}, {"mc_samples": 2}, {"weight_decay": 0.0}]
)
def test_a_compiled_step_equals_the_eager_one(settings: dict) -> None:
    for a, b in zip(train(True, **settings), train(False, **settings), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)


@pytest.mark.parametrize("settings", [{"beta2_warmup": 1.0}, {"beta2_warmup": 2.0, "beta2": 0.75, "hess_init": 30.0}])
def test_a_compiled_step_of_the_warm_up_equals_the_eager_one(settings: dict) -> None:
    """Relative errors: a momentum of 0 lets the Hessian follow a draw's noise into the millions."""
    for a, b in zip(train(True, **settings), train(False, **settings), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_narrow_parameters_keep_their_master_mean_under_compilation() -> None:
    for a, b in zip(train(True, dtype=torch.bfloat16), train(False, dtype=torch.bfloat16), strict=True):
        torch.testing.assert_close(a, b)


def test_other_sizes_and_learning_rates_compile_nothing_anew() -> None:
    def step(size: int, lr: float) -> None:
        optimizer = vlearn.IVON([nn.Parameter(torch.ones(size))], lr=lr, ess=100, compiled=True)
        optimizer.train()
        optimizer.param_groups[0]["params"][0].grad = torch.ones(size)
        optimizer.step()

    step(2**15, 0.1)
    with torch.compiler.set_stance("fail_on_recompile"):
        for size, lr in ((2**14, 0.1), (3 * 2**14 + 5, 0.02), (2**20 + 2**15, 0.3)):
            step(size, lr)


@pytest.mark.parametrize("start", [1, 2.0, 30])
def test_a_momentum_that_changes_with_every_step_compiles_nothing_anew(start: float) -> None:
    """From 0, with which a warm-up of 1 begins, to the constant that it ends at."""
    p = nn.Parameter(torch.ones(2**15))
    optimizer = vlearn.IVON([p], lr=0.1, ess=100, compiled=True, beta2=0.9, beta2_warmup=7.5)

    def step() -> None:
        optimizer.train()
        p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    optimizer.param_groups[0]["beta2_warmup"] = start
    optimizer.state[p]["step"].zero_()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(12):
            step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def drawn(count: int, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A draw's standard normal noise."""
    p = nn.Parameter(torch.zeros(count, dtype=dtype))
    generator = torch.Generator().manual_seed(seed)
    optimizer = vlearn.IVON([p], 0.1, ess=50, hess_init=2.0, weight_decay=0.0, compiled=True, generator=generator)
    with optimizer.sampled_params():
        noise = p.detach() * math.sqrt(50 * 2.0)
    assert not p.any()
    return noise


@pytest.mark.parametrize(
    ("count", "dtype"), [(100_000, torch.float32), (100_001, torch.float32), (2**15, torch.float64)]
)
def test_a_compiled_draw_has_the_posteriors_scale_and_comes_from_the_generator(count: int, dtype: torch.dtype) -> None:
    noise = drawn(count, 1, dtype)
    assert abs(float(noise.mean())) < 5 / math.sqrt(count)
    assert abs(float(noise.var()) - 1) < 5 * math.sqrt(2 / count)
    assert torch.equal(noise, drawn(count, 1, dtype))
    assert abs(float((noise * drawn(count, 2, dtype)).mean())) < 5 / math.sqrt(count)


def test_the_kernel_makes_the_numbers_that_the_formula_says() -> None:
    key = new_key(torch.Generator().manual_seed(1), torch.device("cpu"))
    torch.testing.assert_close(drawn(2**15, 1), torch.cat(normals(key, 2**14)), rtol=1e-4, atol=1e-5)


def test_a_watched_model_keeps_its_draw_for_the_sensitivities() -> None:
    found = []
    for compiled in (True, False):
        torch.manual_seed(3)
        model = nn.Linear(512, 64, bias=False).double()
        optimizer = vlearn.IVON(model, lr=0.1, ess=100, compiled=compiled)
        x = torch.randn(5, 512, dtype=torch.float64)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        found.append(optimizer.sensitivities(deviation=True))
    torch.testing.assert_close(found[0].self_influence, found[1].self_influence, rtol=1e-12, atol=0)
    torch.testing.assert_close(found[0].deviation, found[1].deviation, rtol=1e-9, atol=1e-14)
