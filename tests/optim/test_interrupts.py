"""A KeyboardInterrupt inside a forward pass, for which torch calls no forward hook, leads to no wrong gradient."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.optim.table import (
    Entry,
    data,
    equal,
    loss_of,
    needs_gradients_alone,
    needs_no_probe,
    network,
    plain,
    representatives,
    weights,
)
from tests.oracles.networks import Model


@contextmanager
def interrupted(module: nn.Module) -> Iterator[None]:
    """A call of the module made inside is interrupted."""

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    handle = module.register_forward_pre_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            yield
    finally:
        handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    model.eval()
    try:
        yield
    finally:
        model.train()


def evaluate(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def seeded(entry: Entry, model: nn.Module, **kwargs: Any) -> Any:
    return entry.make(model, generator=torch.Generator().manual_seed(1), **kwargs)


# -- the gradient is that of the draw ------------------------------------------------------------------------------


@representatives
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("how", ["first module", "last module", "no_grad", "submodule", "one call after another"])
def test_a_backward_after_an_interrupted_eval_forward_gives_the_gradient_at_the_draw(
    entry: Entry, how: str, every: int
) -> None:
    x, y = data()

    def train(is_interrupted: bool) -> list[Tensor]:
        model = network()
        optimizer = seeded(entry, model)
        optimizer.watch(model, every=every)
        found = []
        for _ in range(3):  # with every=2 the second step has no trace
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            if is_interrupted and how == "no_grad":
                with interrupted(model[1]), torch.no_grad():
                    model(x)
            elif is_interrupted and how == "submodule":
                with eval_mode(model), interrupted(model[0]):
                    model[0](x)
            elif is_interrupted:
                for _ in range(2 if how == "one call after another" else 1):
                    with eval_mode(model), interrupted(model[0 if how == "first module" else 2]):
                        model(x)
            loss.backward()
            found += gradients(model)
            optimizer.step()
            if every == 1:
                found.append(optimizer.sensitivities(deviation=True).deviation)
        return found + weights(model)

    assert equal(train(True), train(False))


@representatives
def test_a_training_forward_after_an_interrupted_eval_forward_shares_the_draw_with_the_one_before(entry: Entry) -> None:
    needs_gradients_alone(entry)
    x, y = data()

    def train(is_interrupted: bool) -> list[Tensor]:
        model = network()
        optimizer = seeded(entry, model)
        loss = loss_of(model, x[:6], y[:6])
        if is_interrupted:
            with eval_mode(model), interrupted(model[1]):
                model(x)
        (loss + loss_of(model, x[6:], y[6:])).backward()
        found = gradients(model)
        optimizer.step()
        return found + weights(model)

    assert equal(train(True), train(False))


@representatives
def test_every_optimizer_of_a_model_puts_its_draw_back(entry: Entry) -> None:
    x, y = data()

    def train(is_interrupted: bool) -> list[Tensor]:
        model = network()
        optimizers = [seeded(entry, model[k].parameters()) for k in (0, 2)]
        for optimizer in optimizers:
            optimizer.watch(model)
        loss = loss_of(model, x, y)
        if is_interrupted:
            with interrupted(model[1]):
                evaluate(model, x)
        loss.backward()
        found = gradients(model)
        for optimizer in optimizers:
            optimizer.step()
        return found + weights(model)

    assert equal(train(True), train(False))


class Hidden:
    """An output that shows nobody its tensors."""

    def __init__(self, logits: Tensor):
        self.logits = logits


# Passes that use weights before a hook of the outputs runs, or have none: autograd refuses to run them backward.
LOUD = ("gradient of a gradient", "hidden outputs")


def bent(kind: str) -> tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]:
    """A model whose training pass is out of the ordinary, and the scalar that backward starts from."""
    torch.manual_seed(0)
    parts = {"into": nn.Linear(6, 5), "block": nn.Sequential(nn.Linear(5, 5), nn.Tanh()), "out": nn.Linear(5, 3)}

    def forward(m: Any, x: Tensor) -> Any:
        if kind == "checkpoint":
            return m.out(checkpoint(m.block, m.into(x), use_reentrant=False))
        hidden = m.block(m.into(x))
        if kind == "dict":
            return {"hidden": hidden, "logits": m.out(hidden)}
        if kind == "in place":
            return m.out(hidden).mul_(2).relu_()
        if kind == "hidden outputs":
            return Hidden(m.out(hidden))
        return m.out(hidden)

    model = Model(forward, **parts).double()
    if kind == "dict":  # backward goes through one of the outputs alone
        return model, lambda m, x: m(x)["hidden"].square().mean()
    if kind == "parts":
        return model, lambda m, x: m.out(m.block(m.into(x))).square().mean()
    if kind == "recurrent":
        return model, lambda m, x: m(x).square().mean() + m(2 * x).square().mean()
    if kind == "hidden outputs":
        return model, lambda m, x: m(x).logits.square().mean()
    if kind == "gradient of a gradient":
        return model, _curvature
    return model, lambda m, x: m(x).square().mean()


def _curvature(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return slope.square().sum()


@representatives
@pytest.mark.parametrize("kind", ["checkpoint", "dict", "in place", "parts", "recurrent", *LOUD])
def test_any_kind_of_pass_gets_the_gradient_at_the_draw_or_none(entry: Entry, kind: str) -> None:
    if kind in ("parts", "recurrent", "gradient of a gradient"):
        needs_gradients_alone(entry)
    if kind in ("dict", "hidden outputs"):  # several outputs, or none to be seen
        needs_no_probe(entry)
    x, _ = data()

    def train(is_interrupted: bool) -> list[Tensor]:
        model, scalar = bent(kind)
        optimizer = seeded(entry, model, **entry.of_squares)
        loss = scalar(model, x)
        if is_interrupted:
            with interrupted(model.get_submodule("block.1")):
                evaluate(model, x)
        loss.backward()
        found = gradients(model)
        optimizer.step()
        return found + weights(model)

    expected = train(False)
    if kind in LOUD:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            train(True)
    else:
        assert equal(train(True), expected)


@representatives
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # within torch.compile
def test_a_compiled_model_gets_the_gradient_at_the_draw(entry: Entry) -> None:
    x, y = data()

    def train(compiled: bool, is_interrupted: bool) -> list[Tensor]:
        model = network()
        optimizer = seeded(entry, model)
        called = torch.compile(model, backend="eager") if compiled else model
        found = []
        for _ in range(2):
            optimizer.zero_grad()
            loss = loss_of(called, x, y)
            with torch.no_grad():
                called(x)
            if is_interrupted:
                optimizer._sampler.draw.suspend()  # what an interrupt leaves, but for the calls it leaves open
                optimizer._watch._calls.append((model, 0))
            loss.backward()
            found += gradients(model)
            optimizer.step()
            found.append(optimizer.sensitivities(deviation=True).deviation)
        return found + weights(model)

    expected = train(False, False)
    assert equal(train(True, True), expected) and equal(train(True, False), expected)


@representatives
@pytest.mark.parametrize("end", ["eval", "step", "load_state_dict"])
def test_a_graph_of_a_draw_that_is_over_is_refused_by_autograd(entry: Entry, end: str) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    loss = loss_of(model, x, y)
    with interrupted(model[1]):
        evaluate(model, x)
    if end == "load_state_dict":
        model.load_state_dict(network().state_dict())
    else:
        getattr(optimizer, end)()
    assert equal(weights(model), weights(network()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- what comes next -----------------------------------------------------------------------------------------------


def enters_a_context(optimizer: Any) -> None:
    with optimizer.sampled_params():
        pass


NEXT: dict[str, Callable[[Any], None]] = {
    "nothing": lambda optimizer: None,
    "zero_grad": lambda optimizer: optimizer.zero_grad(),
    "train": lambda optimizer: optimizer.train(),
    "eval": lambda optimizer: optimizer.eval(),
    "context": enters_a_context,
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
}


@representatives
@pytest.mark.parametrize("action", NEXT)
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("where", [0, 2])
def test_the_next_call_of_any_submodule_draws_and_has_sensitivities(
    entry: Entry, mode: str, action: str, where: int
) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    with interrupted(model[where]), torch.set_grad_enabled(mode == "train"):
        model(x)
    NEXT[action](optimizer)
    hidden = torch.randn(12, 5, dtype=torch.float64)
    nn.functional.cross_entropy(model[2](hidden), y).backward()  # not one that was open, or open alone
    optimizer.step()
    assert optimizer.sensitivities().residual.shape == (12, 3)
    plain(optimizer, model, x, y)


@representatives
def test_after_an_interrupted_training_forward_an_eval_forward_of_another_module_sees_the_mean(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    with interrupted(model[1]):
        model(x)
    draw = weights(model)
    with eval_mode(model):
        assert torch.equal(model[0](x), network()[0](x))
    assert equal(weights(model), draw)
    loss_of(model, x, y).backward()
    optimizer.step()


@representatives
def test_a_context_that_is_interrupted_leaves_no_call_open(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    with interrupted(model[1]), optimizer.sampled_params(train=True):
        model(x)
    assert equal(weights(model), weights(network())) and not optimizer._watch._calls
    with interrupted(model[1]), optimizer.sampled_params():
        model(x)
    assert equal(weights(model), weights(network())) and not optimizer._watch._calls
    plain(optimizer, model, x, y)


@representatives
def test_an_interrupted_closure_leaves_no_call_open(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    with interrupted(model[1]):
        optimizer.step(lambda: model(x))
    assert equal(weights(model), weights(network())) and not optimizer._watch._calls
    plain(optimizer, model, x, y)


@representatives
def test_a_forward_that_catches_the_interrupt_of_a_part_goes_on_as_one_pass(entry: Entry) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        try:
            m.first(x)
        except KeyboardInterrupt:
            pass
        return m.second(x)

    torch.manual_seed(0)
    model, (x, y) = Model(forward, first=nn.Linear(6, 3), second=nn.Linear(6, 3)).double(), data()
    optimizer = entry.make(model)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    model.first.register_forward_pre_hook(interrupt)  # type: ignore[union-attr]
    loss_of(model, x, y).backward()
    optimizer.step()
    assert optimizer._watch.trace.root is model
    s = optimizer.sensitivities(deviation=True)
    torch.testing.assert_close((s.residual * s.deviation).sum(1), s.self_influence)


@representatives
def test_a_part_that_a_forward_runs_in_another_thread_is_no_pass_of_its_own(entry: Entry) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            hidden = pool.submit(m.first, x).result()
        return m.second(hidden)

    torch.manual_seed(0)
    model, (x, y) = Model(forward, first=nn.Linear(6, 5), second=nn.Linear(5, 3)).double(), data()
    optimizer = entry.make(model)
    expected = model.eval()(x).detach()
    loss_of(model.train(), x, y)
    draw = weights(model)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    assert equal(weights(model), draw)
    optimizer.eval()


# -- interrupts between two lines of ours, and what the hooks hold -------------------------------------------------


@representatives
@pytest.mark.parametrize("where", range(0, 66, 3))
def test_an_interrupt_while_a_draw_is_swapped_or_dropped_keeps_the_mean(
    entry: Entry, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt after every so many copies of tensors: the finest places an interrupt can come."""
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    mean = weights(model)
    calls = 0

    def interrupting(copy: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            copied = copy(*args)
            if calls == where + 1:
                raise KeyboardInterrupt
            return copied

        return counted

    def everything() -> None:
        loss_of(model, x, y).backward()
        evaluate(model, x)
        with optimizer.sampled_params():
            model(x)
        optimizer.eval()
        optimizer.load_state_dict(optimizer.state_dict())  # drops the draw
        with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
            raise ZeroDivisionError

    monkeypatch.setattr(torch.Tensor, "copy_", interrupting(torch.Tensor.copy_))
    monkeypatch.setattr(torch, "_foreach_copy_", interrupting(torch._foreach_copy_))
    with pytest.raises(KeyboardInterrupt):
        for _ in range(10):
            everything()
    monkeypatch.undo()
    optimizer.eval()
    assert equal(weights(model), mean)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        assert all((p != m).all() for p, m in zip(weights(model), mean, strict=True))  # no noise is lost
        optimizer.step()
        mean = weights(model)


@representatives
def test_a_draw_that_is_dropped_while_the_mean_is_shown_does_not_come_back(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    loss_of(model, x, y)
    loaded = network(seed=4)
    with optimizer.at_mean():
        model.load_state_dict(loaded.state_dict())
    assert equal(weights(model), weights(loaded))


@representatives
def test_a_graph_keeps_neither_the_optimizer_nor_the_draw_alive(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    loss = loss_of(model, x, y)
    draw = ref(optimizer._sampler.draw)
    loss.backward(retain_graph=True)
    optimizer.step()
    optimizer.zero_grad()
    another = loss_of(model, x, y)  # from here on the captures of the first pass are not wanted
    gc.collect()
    assert draw() is None
    gone = ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        another.backward()
