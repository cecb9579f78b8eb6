"""The pretend device refuses and counts what a GPU would, and computes what the CPU computes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.accelerator.pretend import counted


def test_it_computes_what_the_cpu_computes(device: torch.device) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)), torch.randn(4, 1, 6, 6)
    model(x).logsumexp(1).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.to(device)(x.to(device)).logsumexp(1).sum().backward()
    for p, gradient in zip(model.parameters(), expected, strict=True):
        assert p.grad is not None and gradient is not None
        assert p.device.type == p.grad.device.type == device.type
        assert torch.equal(p.grad.cpu(), gradient)


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x, y: x + y,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: x.add_(y),
        lambda x, y: torch._foreach_add([x, x], [x, y]),
        lambda x, y: x @ y,
        lambda x, y: torch.randn(3, device=x.device, generator=torch.Generator()),
    ],
    ids=["add", "cat", "in place", "foreach", "product", "generator"],
)
def test_what_meets_the_cpu_is_refused(mixing: Callable[[Tensor, Tensor], object], device: torch.device) -> None:
    x = torch.ones(3, device=device)
    assert float((x + torch.tensor(2.0)).sum()) == 9  # a number may come from the CPU
    with pytest.raises(RuntimeError, match="same device|generator"):
        mixing(x, torch.ones(3))


READING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x[0]),
    "bool": lambda x: bool(x.any()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu", torch.float64),
    "copy_": lambda x: torch.empty(4).copy_(x),
    "mask": lambda x: x[x > 1],
    "nonzero": lambda x: x.nonzero(),
    "equal": lambda x: torch.equal(x, x),
    "unique": lambda x: x.unique(),
}


@pytest.mark.parametrize("how", READING)
def test_a_read_by_the_host_is_counted(how: str, device: torch.device) -> None:
    x = torch.arange(4.0).to(device)
    with counted() as counts:
        READING[how](x)
    assert counts.reads.total() == 1, counts.reads
    with counted() as counts:
        x.mul(2).sum().add_(x[1:].mean()).double()
    assert not counts.reads


def test_launches_are_counted_but_views_are_not(device: torch.device) -> None:
    x = torch.arange(6.0).to(device)
    with counted() as counts:
        rows = x.view(2, 3).T[1:].unsqueeze(0)
        rows.detach().mul_(2)
        torch.empty_like(rows).normal_()
        torch.ones(2).add_(1)
    assert counts.operations == {"mul_": 1, "normal_": 1}
    assert counts.on_cpu == {"ones": 1, "add_": 1} and not counts.uploads


def test_a_multi_tensor_operation_is_one_launch_where_cuda_makes_it_one(device: torch.device) -> None:
    x = [torch.ones(2, 3, device=device), torch.ones(4, device=device)]
    wide, turned = [t.double() for t in x], [torch.ones(3, 2, device=device).T, x[1]]
    for lists, launches in (((x, x), 1), ((x, wide), 2), ((x, turned), 2)):
        with counted() as counts:
            torch._foreach_add(*lists)
        assert counts.operations.total() == launches
    with counted() as counts:
        torch._foreach_copy_(x, wide)
    assert counts.operations.total() == 1


def test_what_comes_from_the_cpu_is_counted(device: torch.device) -> None:
    x = torch.zeros(3, device=device)
    with counted() as counts:
        x.copy_(torch.ones(3))
        torch.ones(3).to(device)
        x.mul_(torch.tensor(2.0))
    assert counts.uploads.total() == 2 and counts.numbers == {"mul_": 1}


def test_outside_the_tests_torch_sees_no_such_device(device: torch.device) -> None:
    module = torch.get_device_module(device)
    assert module.is_available()
    module.available = False
    assert not torch.accelerator.is_available() and torch.accelerator.device_count() == 0
    module.available = True
