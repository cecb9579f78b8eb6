"""Compiled models draw, and are captured, as eager ones do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.table import LOOPS, data, equal, network, weights

pytestmark = [  # the compiler hides these itself, which "error" overrides
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]

X, Y = data(dtype=torch.float32)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def ivon(params: Any) -> vlearn.IVON:
    generator = torch.Generator().manual_seed(7)
    return vlearn.IVON(params, lr=0.1, ess=12, hess_init=0.5, generator=generator)


def eager_network() -> nn.Module:
    return network(dtype=torch.float32)


def watched_then_compiled(backend: str) -> tuple[Any, nn.Module, vlearn.IVON]:
    model = eager_network()
    optimizer = ivon(model)
    return torch.compile(model, backend=backend), model, optimizer


def compiled_then_watched(backend: str) -> tuple[Any, nn.Module, vlearn.IVON]:
    model = eager_network()
    compiled = torch.compile(model, backend=backend)
    return compiled, model, ivon(compiled)


def the_original_watched(backend: str) -> tuple[Any, nn.Module, vlearn.IVON]:
    model = eager_network()
    compiled = torch.compile(model, backend=backend)
    return compiled, model, ivon(model)


def compiled_in_place(backend: str) -> tuple[Any, nn.Module, vlearn.IVON]:
    model = eager_network()
    model.compile(backend=backend)
    return model, model, ivon(model)


def called_then_watched(backend: str) -> tuple[Any, nn.Module, vlearn.IVON]:
    model = eager_network()
    compiled: Any = torch.compile(model, backend=backend)
    compiled(X)
    return compiled, model, ivon(compiled)


def a_compiled_part(backend: str) -> tuple[Any, nn.Module, vlearn.IVON]:
    model: Any = eager_network()
    model[0] = torch.compile(model[0], backend=backend)
    return model, model, ivon(model)


WAYS = (
    watched_then_compiled,
    compiled_then_watched,
    the_original_watched,
    compiled_in_place,
    called_then_watched,
    a_compiled_part,
)


def trained(call: Any, model: nn.Module, optimizer: vlearn.IVON) -> list[tuple[Tensor, ...]]:
    """Two steps, and what is seen on the way: predictions at the mean during a draw, sensitivities, predictions."""
    seen = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = F.cross_entropy(call(X), Y)
        with torch.no_grad():
            at_mean = call(X)
        loss.backward()
        saved = [value.clone() for value in model.state_dict().values()]
        optimizer.step()
        s = optimizer.sensitivities(deviation=True)
        assert s.deviation is not None
        seen.append((at_mean, s.self_influence, s.deviation, s.residual, *saved))
    call.eval()
    seen.append((call(X).detach(),))
    call.train()
    return seen


def check(way: Any, backend: str, exact: bool) -> None:
    call, model, optimizer = way(backend)
    seen = trained(call, model, optimizer)
    names = list(optimizer.posterior().variance)
    reference = eager_network()
    expected = trained(reference, reference, ivon(reference))
    for ours, theirs in zip(seen, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert not exact or equal(weights(model), weights(reference))
    assert names == [name for name, _ in reference.named_parameters()]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_compiled_model_trains_and_is_captured_as_an_eager_one(way: Any) -> None:
    check(way, "eager", exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[:3], ids=lambda way: way.__name__)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_so_does_one_whose_graphs_are_differentiated_and_generated(way: Any, backend: str) -> None:
    check(way, backend, exact=backend == "aot_eager")


@pytest.mark.parametrize("loop", ["context", "closure", "modes"])
def test_the_loops_without_a_watch_compile_to_one_graph(loop: str) -> None:
    model, reference = eager_network(), eager_network()
    compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
    compiled(X)
    for call, optimizer in ((compiled, ivon(model.parameters())), (reference, ivon(reference.parameters()))):
        for _ in range(2):
            LOOPS[loop](optimizer, call, X, Y)
    assert equal(weights(model), weights(reference))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_a_model_watched_after_its_first_compiled_call_is_refused_with_the_reason() -> None:
    model = eager_network()
    compiled: Any = torch.compile(model, backend="eager")
    compiled(X)
    optimizer = ivon(model)
    F.cross_entropy(compiled(X), Y).backward()
    with pytest.raises(RuntimeError, match="If the model is compiled, .* give it what torch.compile returned"):
        optimizer.sensitivities()
    with pytest.raises(RuntimeError, match="If the model is compiled, .* give it what torch.compile returned"):
        optimizer.step()
    assert equal(weights(model), weights(eager_network()))


@pytest.mark.parametrize("in_place", [False, True])
def test_a_compiled_model_is_swept_as_an_eager_one(in_place: bool) -> None:
    tables = []
    for compiles in (True, False):
        model: Any = eager_network()
        optimizer = ivon(model.named_parameters())
        if compiles and in_place:
            model.compile(backend="eager")
        elif compiles:
            model = torch.compile(model, backend="eager")
        model(X)
        tables.append(vlearn.sweep(model, optimizer.posterior(), [(X, Y)], loss_fn=F.cross_entropy))
    for name in ("loss", "loo_loss", "deviation", "self_influence", "leverage"):
        torch.testing.assert_close(getattr(tables[0], name), getattr(tables[1], name))
