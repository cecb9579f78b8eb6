"""How many kernels a step launches, and how often the host waits for the device: not for each tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.accelerator.pretend import Launches, counted
from tests.pairs import pairs

MOST = 40  # launches of a step outside forward and backward
MOST_NARROW = 44  # with float32 means beside weights of 16 bits, but for IVON

MAKE: dict[str, Callable[..., Any]] = {
    "IVON": lambda params, **kw: vlearn.IVON(params, 0.1, 1000, **kw),
    "IVON, clipped": lambda params, **kw: vlearn.IVON(params, 0.1, 1000, clip_radius=0.1, **kw),
    "IVON, squares": lambda params, **kw: vlearn.IVON(params, 0.1, 1000, curvature="empirical", **kw),
    "IVON, warm-up": lambda params, **kw: vlearn.IVON(params, 0.1, 1000, beta2_warmup=5.0, **kw),
    "IVON, tempered": lambda params, **kw: vlearn.IVON(params, 0.1, 5000, num_data=1000, **kw),
    "VON, price": lambda params, **kw: vlearn.VON(params, 0.01, 1000, curvature="price", **kw),
    "VON, price, tempered": lambda params, **kw: vlearn.VON(params, 0.01, 5000, num_data=1000, curvature="price", **kw),
    "VAdamW": lambda params, **kw: vlearn.VAdamW(params, num_data=1000, **kw),
}
named = pytest.mark.parametrize("name", MAKE)
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def parameters(
    count: int, device: torch.device, dtype: torch.dtype = torch.float32, channels_last: bool = True
) -> list[nn.Parameter]:
    """As many tensors, of the kinds that a ResNet has: kernels, one of them in another layout, scales, a matrix."""
    torch.manual_seed(0)
    shapes = [(4, 3, 3, 3), (4,), (4,)]
    tensors = [torch.randn(shapes[i % 3]) * 0.1 for i in range(count - 1)] + [torch.randn(5, 4) * 0.1]
    if channels_last:
        tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    return [nn.Parameter(t.to(device, dtype)) for t in tensors]


def step_of(optimizer: Any, params: list[nn.Parameter]) -> Launches:
    """What a step does, draw and update; a backward pass would leave its gradients between the two."""
    with counted() as counts:
        optimizer.train()
    for p in params:
        p.grad = torch.full_like(p, 0.01)
    with counted() as rest:
        optimizer.step()
    for kind, found in vars(rest).items():
        getattr(counts, kind).update(found)
    return counts


@named
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_step_launches_as_many_kernels_for_61_tensors_as_for_12(
    name: str, dtype: torch.dtype, device: torch.device
) -> None:
    found = []
    for count in (12, 61):
        params = parameters(count, device, dtype)
        optimizer = MAKE[name](params)
        step_of(optimizer, params), step_of(optimizer, params)
        counts = step_of(optimizer, params)
        narrow = dtype is torch.bfloat16 and not name.startswith("IVON")
        assert counts.operations.total() <= (MOST_NARROW if narrow else MOST), counts.operations
        assert counts.on_cpu.total() <= 5, counts.on_cpu
        assert not counts.uploads and not counts.numbers
        found.append(counts.operations)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("name", "nonfinite", "dtype"), pairs(list(MAKE), ["raise", "skip", "ignore"], DTYPES), ids=str
)
def test_the_host_waits_once_in_a_step_to_see_that_gradients_are_finite(
    name: str, nonfinite: str, dtype: torch.dtype, device: torch.device
) -> None:
    params = parameters(15, device, dtype)
    groups = [{"params": params[:10]}, {"params": params[10:], "lr": 0.02}]
    optimizer = MAKE[name](groups, nonfinite=nonfinite)
    step_of(optimizer, params), step_of(optimizer, params)
    reads = step_of(optimizer, params).reads.total()
    assert reads == (nonfinite != "ignore") + (name == "VAdamW")  # which keeps its scale as a number, for the width


def test_gradients_of_several_dtypes_are_looked_at_in_one_wait(device: torch.device) -> None:
    params = parameters(6, device) + parameters(6, device, torch.bfloat16)
    optimizer = vlearn.IVON(params, 0.1, 1000)
    step_of(optimizer, params)
    assert step_of(optimizer, params).reads.total() == 1


@named
def test_parameters_whose_steps_differ_take_the_same_steps_and_no_more_waits(name: str, device: torch.device) -> None:
    """A parameter that had no gradient in some steps has another number of steps."""
    params = parameters(9, device)
    optimizer = MAKE[name](params)
    optimizer.train()
    for p in params[:4]:
        p.grad = torch.full_like(p, 0.01)
    optimizer.step()
    assert step_of(optimizer, params).reads.total() == step_of(optimizer, params).reads.total() <= 2
    assert [float(optimizer.state[p]["step"]) for p in params] == [3.0] * 4 + [2.0] * 5


@pytest.mark.parametrize("options", [{}, {"num_data": 100}], ids=["", "tempered"])
@pytest.mark.parametrize("count", [12, 30])
def test_evon_launches_ten_products_for_a_matrix_and_little_else(
    count: int, options: dict[str, Any], device: torch.device
) -> None:
    params = parameters(count, device, channels_last=False)
    optimizer = vlearn.EVON(params, 0.1, 1000, update_every=100, **options)
    step_of(optimizer, params), step_of(optimizer, params)
    counts = step_of(optimizer, params)
    products = {"mm", "bmm", "addmm_"}
    matrices = sum(p.dim() > 1 for p in params)
    assert sum(counts.operations[name] for name in products) <= 10 * matrices
    assert sum(times for name, times in counts.operations.items() if name not in products) <= 70, counts.operations
    assert counts.reads.total() == 1


@pytest.mark.parametrize("curvature", ["ggn", "sampled", "empirical"])
@pytest.mark.parametrize("ekfac", [False, True])
def test_kfac_von_waits_once_in_a_step_however_many_layers_it_has(
    curvature: str, ekfac: bool, device: torch.device
) -> None:
    """But for those whose passes are checked, and those with new eigenbases, where eigh waits for each."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)), nn.LayerNorm(6)).to(device)
    x, y = torch.randn(12, 6).to(device), (torch.arange(12) % 6).to(device)
    optimizer = vlearn.KFACVON(model, 0.01, 1000, curvature=curvature, eigenvalue_correction=ekfac, update_every=5)
    optimizer.watch(model, loss_scale=1.0)  # else "empirical" looks at the output's gradient for it
    for step in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        with counted() as counts:
            optimizer.step()
        if step + 1 not in (1, 2, 4, 8) and step % 5:
            waits = 2 if curvature == "empirical" else 1  # one to count the examples that the loss counts
            assert counts.reads.total() == waits and not counts.uploads, (counts.reads, counts.uploads)


class Layers(nn.Module):
    """So many layers, of which each is one kernel forward."""

    def __init__(self, count: int):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(*(nn.Linear(6, 6) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def training_step(
    make: Callable[[nn.Module], Any], layers: int, device: torch.device, set_to_none: bool = True
) -> Launches:
    """What the fifth training step of a model does, forward and backward too: some before it are checked."""
    model = Layers(layers).to(device)
    x, y = torch.randn(12, 6).to(device), (torch.arange(12) % 6).to(device)
    optimizer = make(model)
    steps = []
    for _ in range(5):
        with counted() as counts:
            optimizer.zero_grad(set_to_none)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        steps.append(counts)
    return steps[-1]


@pytest.mark.parametrize("name", ["IVON", "IVON, warm-up", "VON, price", "VAdamW"])
def test_a_watched_model_makes_neither_a_launch_nor_a_wait_for_each_layer(name: str, device: torch.device) -> None:
    """Beside what AdamW's training step takes; the draw is kept, as sensitivities may be asked for."""
    more = []
    for layers in (2, 6):
        own = training_step(MAKE[name], layers, device)
        plain = training_step(lambda model: torch.optim.AdamW(model.parameters(), foreach=True), layers, device)
        assert own.reads.total() == 1 + (name == "VAdamW") and not own.uploads
        more.append(own.operations.total() - plain.operations.total())
    assert more[0] == more[1] <= MOST


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("name", ["VON", "VOGN", "KFACVON"])
def test_captures_take_no_wait_for_each_layer(name: str, set_to_none: bool, device: torch.device) -> None:
    def make(model: nn.Module) -> Any:
        options = {"update_every": 100} if name == "KFACVON" else {}
        return getattr(vlearn, name)(model, 0.01, 1000, **options)

    few, many = (training_step(make, layers, device, set_to_none) for layers in (2, 6))
    assert few.reads == many.reads and few.uploads == many.uploads


def test_the_mean_is_shown_in_between_by_a_few_launches(device: torch.device) -> None:
    found = []
    for layers in (2, 6):
        model = Layers(layers).to(device)
        x, y = torch.randn(12, 6).to(device), (torch.arange(12) % 6).to(device)
        optimizer = vlearn.IVON(model, 0.1, 1000)
        loss = F.cross_entropy(model(x), y)
        with counted() as counts, torch.no_grad():
            model(x)
        found.append(counts.operations.total() - layers)
        loss.backward()
        optimizer.step()
    assert found[0] == found[1] <= 8
