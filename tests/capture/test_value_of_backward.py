"""The value of the loss is read while its backward pass runs, from within, wherever the pass was started."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from vlearn._torch_internals import current_node
from vlearn.capture.autograd_graph import value_of_backward


def test_it_is_that_of_what_was_made_of_the_output() -> None:
    x = torch.ones(2, 3, requires_grad=True)
    y, seen = 2 * x, []

    def look(gradient: Tensor) -> None:
        node = current_node()
        with ThreadPoolExecutor(1) as elsewhere:  # as where an accelerator's nodes run
            assert elsewhere.submit(value_of_backward, node).result() == value_of_backward(node)
        seen.append(value_of_backward(node))

    y.register_hook(look)
    (3 * y.square().mean()).backward(retain_graph=True)
    torch.autograd.grad([y.sum(), x.sum(), (y + 1).sum()], [x], retain_graph=True)
    (y + 1).backward(torch.full_like(y, 5.0))
    assert seen == [12, 12 + 18, 90]
    assert value_of_backward(y.grad_fn) is None


def test_a_pass_inside_another_has_its_own() -> None:
    x = torch.ones(3, requires_grad=True)
    y, seen = 2 * x, []

    def inner(gradient: Tensor) -> None:
        with torch.enable_grad():
            z = 3 * x.detach().requires_grad_()
            z.register_hook(lambda g: seen.append(value_of_backward(current_node())))
            z.sum().backward()
        seen.append(value_of_backward(current_node()))

    y.register_hook(inner)
    y.sum().backward()
    assert seen == [9, 6]


def test_a_pass_from_an_edge_has_none() -> None:
    x = torch.ones(3, requires_grad=True)
    y, seen = 2 * x, []
    y.register_hook(lambda g: seen.append(value_of_backward(current_node())))
    edge = get_gradient_edge(y.sum())
    torch.autograd.backward([edge], [torch.tensor(1.0)])  # type: ignore[list-item]
    assert seen == [None]


@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_low_precision_is_read_as_it_is(scale: float) -> None:
    x = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    y, seen = 2 * x, []
    y.register_hook(lambda g: seen.append(value_of_backward(current_node())))
    (scale * y.mean()).backward()
    assert seen == [2 * scale]
