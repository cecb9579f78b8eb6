"""Steps on a GPU: the numbers of the CPU, few launches, no waits, CUDA graphs, one rank of NCCL, memory."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.accelerator.test_launches import parameters
from tests.optim.table import EVON, IVON, VADAMW, VON_PRICE, Entry, data, network, plain, weights

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
DEVICE = torch.device("cuda")
DTYPES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}


# -- numbers ---------------------------------------------------------------------------------------------------------


def after_steps(entry: Entry, device: torch.device, dtype: torch.dtype, **settings: Any) -> list[Tensor]:
    """Weights and states after steps whose draws are made on the CPU, in float64."""
    torch.manual_seed(0)
    made = [torch.randn(40, 30), torch.randn(8, 3, 3, 3).to(memory_format=torch.channels_last), torch.randn(7)]
    params = [nn.Parameter((0.3 * p).to(device, dtype)) for p in made]
    optimizer = entry.make(params, **settings)
    noise = torch.Generator().manual_seed(1)
    for _ in range(5):
        for _ in range(optimizer.param_groups[0]["mc_samples"]):
            with optimizer.sampled_params(train=True):
                with torch.no_grad():
                    for p, mean in zip(params, optimizer.posterior().mean.values(), strict=True):
                        epsilon = torch.randn(p.shape, generator=noise, dtype=torch.float64)
                        p.copy_(mean + 0.05 * epsilon.to(device))
                optimizer.zero_grad()
                sum(p.double().square().sum() + p.double().sin().sum() for p in params).backward()  # pyright: ignore
        optimizer.step()
    states = [v for p in params for k, v in sorted(optimizer.state[p].items()) if not k.endswith("_basis")]
    return [t.detach().double().cpu() for t in [*params, *states]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"mc_samples": 2}, {"foreach": False}], ids=str)
@pytest.mark.parametrize("entry", [IVON, VON_PRICE, VADAMW], ids=str)
def test_a_step_gives_the_numbers_of_the_cpu(entry: Entry, options: dict[str, Any], dtype: torch.dtype) -> None:
    found, expected = (after_steps(entry, device, dtype, **options) for device in (DEVICE, torch.device("cpu")))
    for value, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(value, truth, rtol=DTYPES[dtype], atol=DTYPES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_step_of_evon_before_its_first_basis_gives_the_numbers_of_the_cpu(dtype: torch.dtype) -> None:
    settings = {"update_every": 100}
    found, expected = (after_steps(EVON, device, dtype, **settings) for device in (DEVICE, torch.device("cpu")))
    for value, truth in zip(found[:3], expected[:3], strict=True):
        torch.testing.assert_close(value, truth, rtol=100 * DTYPES[dtype], atol=DTYPES[dtype])


def test_a_step_that_overflows_is_skipped_by_the_scaler_and_leaves_all_as_it_was() -> None:
    model = network(dtype=torch.float32).to(DEVICE)
    x, y = (t.to(DEVICE) for t in data(dtype=torch.float32))
    optimizer, scaler = vlearn.IVON(model, lr=0.1, ess=50), torch.amp.GradScaler("cuda", init_scale=2.0**40)
    optimizer.watch(model, loss_scale=scaler.get_scale)
    before = weights(model)
    optimizer.zero_grad()
    with torch.autocast("cuda", dtype=torch.float16):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() < 2.0**40
    optimizer.eval()
    assert all(map(torch.equal, weights(model), before))


# -- launches and waits ----------------------------------------------------------------------------------------------

MAKE: dict[str, Callable[..., Any]] = {
    "IVON": lambda p, **kw: vlearn.IVON(p, 0.1, 1000, **kw),
    "VON, price": lambda p, **kw: vlearn.VON(p, 0.01, 1000, curvature="price", **kw),
    "VAdamW": lambda p, **kw: vlearn.VAdamW(p, num_data=1000, **kw),
}
named = pytest.mark.parametrize("name", MAKE)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def step(optimizer: Any, params: list[nn.Parameter], inside: Any) -> None:
    """Draw and update inside a context, which the gradients are not."""
    gradients = [torch.full_like(p, 0.01) for p in params]
    torch.cuda.synchronize()
    with inside:
        optimizer.train()
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()


@named
@dtypes
def test_161_tensors_take_hardly_more_launches_than_12(name: str, dtype: torch.dtype) -> None:
    launches = []
    for count in (12, 161):
        params = parameters(count, DEVICE, dtype)
        optimizer = MAKE[name](params)
        for _ in range(3):
            profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            step(optimizer, params, profile)
        launches.append(sum("LaunchKernel" in event.name for event in profile.events()))  # pyright: ignore
    assert 0 < launches[1] <= 4 * launches[0] < 400  # a multi-tensor operation takes some tens of tensors at once


@contextmanager
def waits(mode: str) -> Iterator[None]:
    """Inside, a wait of the host for the device is an error, or a warning."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@named
@dtypes
def test_the_host_waits_once_in_a_step_and_never_if_it_does_not_look(name: str, dtype: torch.dtype) -> None:
    for nonfinite in ("raise", "ignore"):
        params = parameters(31, DEVICE, dtype)
        optimizer = MAKE[name](params, nonfinite=nonfinite)
        for _ in range(2):
            step(optimizer, params, waits("default"))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step(optimizer, params, waits("warn"))
        count = sum("synchroniz" in str(each.message) for each in found)
        assert count == (nonfinite != "ignore") + (name == "VAdamW")


def test_an_ordinary_step_of_kfac_von_waits_for_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(7)), nn.LayerNorm(6)).to(DEVICE)
    x, y = torch.randn(12, 6, device=DEVICE), torch.arange(12, device=DEVICE) % 6
    optimizer = vlearn.KFACVON(model, 0.01, 1000, update_every=5, nonfinite="ignore")
    for number in range(5):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with waits("error" if number > 1 else "default"):
            optimizer.step()


# -- CUDA graphs -----------------------------------------------------------------------------------------------------


def graphed(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, warm_up: int) -> torch.cuda.CUDAGraph:
    """A graph of a whole training step, after some steps without."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            plain(optimizer, model, x, y)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return graph


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_cuda_graph_of_a_training_step_makes_the_steps_of_ivon(dtype: torch.dtype) -> None:
    """With next to no noise, so that the draws of both are one."""
    found = []
    for capturable in (False, True):
        torch.manual_seed(0)
        model = network(dtype=dtype).to(DEVICE)
        x, y = (t.to(DEVICE) for t in data(dtype=dtype))
        settings = {"lr": 0.1, "ess": 1e14, "beta2": 0.9, "curvature": "empirical", "nonfinite": "ignore"}
        optimizer = vlearn.IVON(model, capturable=capturable, **settings)
        if capturable:
            graph = graphed(model, optimizer, x, y, warm_up=2)
            for _ in range(6):
                graph.replay()
        else:
            for _ in range(8):
                plain(optimizer, model, x, y)
        found.append([p.double() for p in weights(model)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=DTYPES[dtype] * 10 + 1e-5, atol=DTYPES[dtype] + 1e-6)


def test_every_replay_has_noise_of_its_own_and_counts_its_step() -> None:
    model = network(dtype=torch.float32).to(DEVICE)
    x, y = (t.to(DEVICE) for t in data(dtype=torch.float32))
    rate = torch.tensor(0.0, device=DEVICE)
    optimizer = vlearn.IVON(model, lr=rate, ess=50, capturable=True, nonfinite="ignore", beta2=0.9)  # pyright: ignore
    graph = graphed(model, optimizer, x, y, warm_up=2)
    hessians = []
    for _ in range(3):
        graph.replay()
        hessians.append(optimizer.state[model[0].weight]["hessian"].clone())  # pyright: ignore
    assert not torch.equal(hessians[1] - hessians[0], hessians[2] - hessians[1])
    assert all(float(state["step"]) == 5 for state in optimizer.state.values())
    before = weights(model)
    graph.replay()
    assert all(map(torch.equal, weights(model), before))  # at a rate of 0
    rate.fill_(0.1)
    graph.replay()
    assert not any(map(torch.equal, weights(model), before))


def test_a_graph_of_a_step_that_is_not_capturable_is_refused() -> None:
    model = network(dtype=torch.float32).to(DEVICE)
    x, y = (t.to(DEVICE) for t in data(dtype=torch.float32))
    optimizer = vlearn.IVON(model, lr=0.1, ess=50, nonfinite="ignore")
    with pytest.raises(RuntimeError, match="capturable=True"):
        graphed(model, optimizer, x, y, warm_up=2)


# -- one rank of NCCL ------------------------------------------------------------------------------------------------


@pytest.fixture
def one_rank() -> Iterator[None]:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29517")
    torch.cuda.set_device(0)
    torch.distributed.init_process_group("nccl", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("wrapped", ["DistributedDataParallel", "fully_shard"])
def test_one_rank_of_nccl_trains_as_no_ranks_do(wrapped: str, one_rank: None) -> None:
    found = []
    for distributed in (False, True):
        torch.manual_seed(0)
        model: nn.Module = network(dtype=torch.float32).to(DEVICE)
        x, y = (t.to(DEVICE) for t in data(dtype=torch.float32))
        if distributed and wrapped == "fully_shard":
            from torch.distributed.fsdp import fully_shard

            fully_shard(model)
        elif distributed:
            model = nn.parallel.DistributedDataParallel(model)
        # With next to no noise: a sharded draw is another one.
        optimizer = vlearn.IVON(model, lr=0.1, ess=1e14, curvature="empirical", beta2=0.9)
        for _ in range(4):
            plain(optimizer, model, x, y)
        found.append([getattr(p, "full_tensor", lambda p=p: p)() for p in weights(model)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


# -- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda p: vlearn.IVON(p, lr=0.1, ess=50), 24),  # state 8, draw 4, what an update of 2²⁵ entries takes
        (lambda p: vlearn.IVON(p, lr=0.1, ess=50, compiled=True), 15),
        (lambda p: vlearn.VAdamW(p, num_data=50), 26),
    ],
    ids=["IVON", "IVON, compiled", "VAdamW"],
)
def test_the_peak_memory_of_a_step_is_bounded(make: Callable[..., Any], most: float) -> None:
    """In bytes per parameter, over the model and its gradients."""
    params = [nn.Parameter(torch.zeros(2048, 2048, device=DEVICE)) for _ in range(32)]
    gradients = [torch.full_like(p, 0.01) for p in params]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer = make(params)
    for _ in range(3):
        optimizer.train()
        for p, gradient in zip(params, gradients, strict=True):
            p.grad = gradient
        optimizer.step()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak / sum(p.numel() for p in params) <= most
