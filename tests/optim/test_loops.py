"""The four loops: where the draw and the mean are, on every path."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from tests.optim.table import (
    LOOPS,
    Entry,
    data,
    equal,
    family,
    loss_of,
    made,
    needs_gradients_alone,
    network,
    plain,
    weights,
)

loops = pytest.mark.parametrize("loop", LOOPS)


@family
@loops
def test_every_loop_trains_and_leaves_the_mean(entry: Entry, loop: str) -> None:
    model, (x, y) = network(), data()
    optimizer = made(entry, loop, model)
    before = float(loss_of(model.eval(), x, y).detach())
    model.train()
    for _ in range(60):
        LOOPS[loop](optimizer, model, x, y)
    mean = weights(model)
    with optimizer.sampled_params():
        assert not equal(weights(model), mean)
    assert equal(weights(model), mean)
    assert float(loss_of(model.eval(), x, y).detach()) < 0.7 * before


@family
def test_the_four_loops_give_the_same_step_for_the_same_noise(entry: Entry) -> None:
    x, y = data()
    results = []
    for loop in LOOPS:
        model = network()
        optimizer = made(entry, loop, model)
        torch.manual_seed(5)
        for _ in range(3):
            LOOPS[loop](optimizer, model, x, y)
        results.append(weights(model))
    assert all(equal(results[0], other) for other in results[1:])


@family
def test_contexts_average_their_draws_whether_or_not_gradients_are_zeroed(entry: Entry) -> None:
    x, y = data()

    def train(zero: str) -> list[torch.Tensor]:
        model = network()
        optimizer = made(entry, "context", model)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            for _ in range(3):
                with optimizer.sampled_params(train=True):
                    if zero == "before":
                        optimizer.zero_grad()
                    loss_of(model, x, y).backward()
                if zero == "after":
                    optimizer.zero_grad()
                if zero == "in place":
                    optimizer.zero_grad(set_to_none=False)
                if zero == "model":
                    model.zero_grad()
            optimizer.step()
        return weights(model)

    reference = train("before")
    for zero in ("never", "after", "in place", "model"):
        assert equal(train(zero), reference), zero


@family
def test_closure_draws_mc_samples_times_as_that_many_contexts_do(entry: Entry) -> None:
    x, y = data()
    first, second = network(), network()
    by_closure, by_context = made(entry, "context", first, mc_samples=3), made(entry, "context", second)
    torch.manual_seed(3)
    losses = []

    def compute() -> torch.Tensor:
        by_closure.zero_grad()
        loss = loss_of(first, x, y)
        loss.backward()
        losses.append(loss.item())
        return loss

    returned = by_closure.step(compute)
    torch.manual_seed(3)
    for _ in range(3):
        with by_context.sampled_params(train=True):
            by_context.zero_grad()
            loss_of(second, x, y).backward()
    by_context.step()
    assert equal(weights(first), weights(second))
    assert len(losses) == 3 and len(set(losses)) == 3
    assert returned.item() == pytest.approx(sum(losses) / 3)


@family
def test_closure_may_return_none_and_need_not_zero_gradients(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = made(entry, "context", model, mc_samples=2)
    assert optimizer.step(lambda: loss_of(model, x, y).backward()) is None


@family
@pytest.mark.parametrize("mc_samples", [1, 3])
def test_a_closure_shares_the_pending_draw_of_a_watched_model(entry: Entry, mc_samples: int) -> None:
    """What Lightning does under accumulation: the closure of the first micro-batches runs without step()."""
    model, (x, y) = network(), data()
    optimizer = entry.make(model, mc_samples=mc_samples)
    optimizer.watch(model, loss_scale=1 / 2)
    seen = []

    def closure() -> None:
        (loss_of(model, x, y) / 2).backward()
        seen.append(weights(model))

    closure()
    if mc_samples > 1:
        optimizer.zero_grad()
    optimizer.step(closure)
    assert equal(seen[0], seen[1]) and len(seen) == 1 + mc_samples
    assert all(not equal(seen[1], other) for other in seen[2:])


@family
def test_gradients_accumulated_before_a_closure_of_several_draws_are_refused(entry: Entry) -> None:
    """They would count for the first draw alone."""
    model, (x, y) = network(), data()
    optimizer = entry.make(model, mc_samples=3)
    loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match="mc_samples=3, but gradients were accumulated before step.*call zero_grad"):
        optimizer.step(lambda: loss_of(model, x, y).backward())
    assert equal(weights(model), weights(network()))


@family
def test_a_closure_after_contexts_may_do_nothing_but_not_train(entry: Entry) -> None:
    """Lightning hands step() a closure that does nothing where a manual loop has none."""
    x, y = data()
    results = []
    for closure in (None, lambda: None):
        model = network()
        optimizer = made(entry, "context", model)
        torch.manual_seed(3)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                loss_of(model, x, y).backward()
        optimizer.step(closure)
        results.append(weights(model))
    assert equal(*results)
    with optimizer.sampled_params(train=True):
        loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match="while a draw of sampled_params|outside sampled_params"):
        optimizer.step(lambda: loss_of(model, x, y).backward())
    assert equal(weights(model), results[0])


@family
def test_a_closure_call_with_a_nonfinite_gradient_raises_or_skips_the_whole_step(entry: Entry) -> None:
    x, y = data()
    for rule in ("raise", "skip"):
        model = network()
        optimizer = made(entry, "context", model, mc_samples=3, nonfinite=rule)
        calls = []

        def closure(model=model, optimizer=optimizer, calls=calls) -> torch.Tensor:  # type: ignore[no-untyped-def]
            optimizer.zero_grad()
            loss = loss_of(model, x, y)
            loss.backward()
            calls.append(1)
            if len(calls) == 2:
                model[0].weight.grad.fill_(float("nan"))
            return loss

        if rule == "raise":
            with pytest.raises(FloatingPointError, match="0.weight|param_0"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
            assert optimizer.nonfinite_count == 1
        assert len(calls) == 2
        assert equal(weights(model), weights(network()))


@family
@pytest.mark.parametrize("loop", ["plain", "context", "modes"])
def test_accumulated_micro_batches_make_the_step_of_the_big_batch(entry: Entry, loop: str) -> None:
    x, y = data(count=12)

    def train(parts: int) -> list[torch.Tensor]:
        model = network()
        optimizer = made(entry, loop, model, 1 / parts)
        torch.manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            if loop == "context":
                with optimizer.sampled_params(train=True):
                    for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                        (loss_of(model, a, b) / parts).backward()
            else:
                for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                    if loop == "modes":
                        optimizer.train()
                    (loss_of(model, a, b) / parts).backward()
            optimizer.step()
        return weights(model)

    for one, many in zip(train(1), train(3), strict=True):
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-14)


class StopError(Exception):
    pass


@family
@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("train", [True, False])
def test_leaving_a_context_by_any_exit_restores_the_mean(entry: Entry, error: type[BaseException], train: bool) -> None:
    model, (x, y) = network(), data()
    optimizer = made(entry, "context", model)
    mean = weights(model)
    with pytest.raises(error):
        with optimizer.sampled_params(train=train):
            loss_of(model, x, y).backward()
            raise error
    assert equal(weights(model), mean)
    with pytest.raises(RuntimeError, match="step\\(\\) without a draw"):
        optimizer.step()
    with optimizer.sampled_params(train=True):
        loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match="outside any draw"):  # it was added to the abandoned gradient
        optimizer.step()


@family
def test_closing_a_generator_inside_a_context_restores_the_mean(entry: Entry) -> None:
    model = network()
    optimizer = made(entry, "context", model)
    mean = weights(model)

    def generate():  # type: ignore[no-untyped-def]
        with optimizer.sampled_params(train=True):
            yield 1

    generator = generate()
    next(generator)
    assert not equal(weights(model), mean)
    generator.close()
    assert equal(weights(model), mean)


@family
@pytest.mark.parametrize("where", range(0, 60, 7))
def test_an_interrupt_while_drawing_or_restoring_keeps_the_mean(
    entry: Entry, where: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt after every so many tensor copies of a whole step, the finest places an interrupt can come."""
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    mean = weights(model)
    copy, calls = torch.Tensor.copy_, 0

    def interrupted(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == where + 1:
            raise KeyboardInterrupt
        return copy(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.Tensor, "copy_", interrupted)
    try:
        loss_of(model, x, y)
        with torch.no_grad():
            model(x)
        optimizer.eval()
        optimizer.train()
    except KeyboardInterrupt:
        pass
    monkeypatch.undo()
    optimizer.eval()
    assert equal(weights(model), mean)


@family
@loops
def test_an_exception_in_the_forward_pass_loses_nothing(entry: Entry, loop: str) -> None:
    model, (x, y) = network(), data()
    optimizer = made(entry, loop, model)
    mean = weights(model)

    def fail(*args: object) -> None:
        raise StopError

    handle = model[2].register_forward_pre_hook(fail)
    with pytest.raises(StopError):
        LOOPS[loop](optimizer, model, x, y)
    handle.remove()
    with torch.no_grad():
        expected = network()(x)
        assert torch.equal(model(x), expected) or loop == "modes"  # a watched model shows the mean
    optimizer.eval()
    assert equal(weights(model), mean)
    LOOPS[loop](optimizer, model, x, y)


@family
def test_eval_and_no_grad_forwards_of_a_watched_model_see_the_mean_and_put_the_draw_back(entry: Entry) -> None:
    model, (x, y) = network(), data()
    expected = network()(x).detach()
    optimizer = entry.make(model)
    loss = loss_of(model, x, y)
    draw = weights(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert equal(weights(model), draw)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    model.eval()
    assert torch.equal(model[2](model[1](model[0](x))), expected)  # submodules too
    assert torch.equal(model(x).detach(), expected)
    model.train()
    assert equal(weights(model), draw)
    loss.backward()  # the graph still finds its draw
    optimizer.step()


@family
def test_backward_through_an_eval_forward_made_under_a_draw_is_refused(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    loss_of(model, x, y)
    with pytest.raises(RuntimeError, match="Call optimizer.eval\\(\\) before that forward pass"):
        loss_of(model.eval(), x, y).backward()
    optimizer.eval()
    optimizer.zero_grad()
    loss_of(model, x, y).backward()


@family
def test_backward_after_the_context_is_refused_by_autograd(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = made(entry, "context", model)
    with optimizer.sampled_params(train=True):
        loss = loss_of(model, x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@family
def test_gradients_written_by_hand_inside_a_context_count(entry: Entry) -> None:
    x, y = data()
    results = []
    for by_hand in (True, False):
        model = network()
        optimizer = made(entry, "context", model)
        torch.manual_seed(1)
        for _ in range(2):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                if by_hand:
                    gradients = torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
                    for p, gradient in zip(model.parameters(), gradients, strict=True):
                        p.grad = gradient
                else:
                    loss_of(model, x, y).backward()
            optimizer.step()
        results.append(weights(model))
    assert equal(*results)


@family
def test_eval_and_train_put_the_same_draw_away_and_back(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = made(entry, "context", model)
    mean = weights(model)
    optimizer.train()
    draw = weights(model)
    loss_of(model, x, y).backward()
    optimizer.eval()
    assert equal(weights(model), mean)
    optimizer.train()
    assert equal(weights(model), draw)
    optimizer.eval()
    optimizer.step()
    assert not equal(weights(model), mean)


@family
def test_an_ensemble_draw_leaves_a_waiting_draw_as_it_was(entry: Entry) -> None:
    x, y = data()

    def train(ensemble: bool) -> list[torch.Tensor]:
        model = network()
        generator = torch.Generator().manual_seed(1)
        optimizer = entry.make(model, generator=generator)
        loss_of(model, x, y).backward()
        draw, state = weights(model), generator.get_state()
        if ensemble:
            with optimizer.sampled_params():
                assert not equal(weights(model), draw)
                first = model(x).detach()
            with torch.no_grad(), optimizer.sampled_params():
                assert not torch.equal(model(x), first)
            generator.set_state(state)
        assert equal(weights(model), draw)
        optimizer.step()
        return weights(model)

    assert equal(train(True), train(False))


@family
@pytest.mark.parametrize("ask", ["ensemble", "diagnostics"])
@pytest.mark.parametrize("loop", ["plain", "closure", "modes"])
def test_what_is_asked_between_forward_and_backward_leaves_the_pass_as_it_was(
    entry: Entry, ask: str, loop: str
) -> None:
    x, y = data()

    def train(asks: bool) -> list[torch.Tensor]:
        model = network()
        optimizer = made(entry, loop, model)
        torch.manual_seed(3)

        class Asked(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                output, state = model(x), torch.get_rng_state()
                if asks and ask == "ensemble":
                    with torch.no_grad(), optimizer.sampled_params():
                        model(x)
                elif asks:
                    optimizer.diagnostics([(x, y)], nn.functional.cross_entropy, model)
                torch.set_rng_state(state)
                return output

        for _ in range(3):
            LOOPS[loop](optimizer, Asked(), x, y)
        return weights(model)

    assert equal(train(True), train(False))


@family
def test_backward_after_an_ensemble_is_refused_whatever_draw_is_in_the_weights(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = made(entry, "context", model)
    with optimizer.sampled_params():
        losses = [loss_of(model, x, y) for _ in range(3)]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[0].backward()
    with optimizer.sampled_params(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[1].backward()
    optimizer.train()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses[2].backward()


@family
def test_misuse_names_the_remedy_and_changes_nothing(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model.parameters())
    mean = weights(model)
    with pytest.raises(RuntimeError, match="(?s)without a draw.*\\(a\\).*\\(b\\).*\\(c\\).*\\(d\\)"):
        optimizer.step()
    loss_of(model.eval(), x, y).backward()
    with pytest.raises(RuntimeError, match="without a draw"):
        optimizer.step()
    model.train()
    with pytest.raises(RuntimeError, match="leave the first context"):
        with optimizer.sampled_params(), optimizer.sampled_params():
            pass
    with pytest.raises(RuntimeError, match="step\\(\\) inside sampled_params"):
        with optimizer.sampled_params(train=True):
            optimizer.step()
    with pytest.raises(RuntimeError, match="train\\(\\) inside"):
        with optimizer.sampled_params():
            optimizer.train()
    assert equal(weights(model), mean)
    optimizer.zero_grad()
    optimizer.watch(model)
    optimizer.train()
    loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match="call step\\(\\) before sampled_params"):
        with optimizer.sampled_params(train=True):
            pass
    optimizer.step()


@family
def test_gradients_of_a_backward_outside_any_draw_are_refused_until_they_are_zeroed(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    model.eval()
    loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match="eval mode, where it predicts with the mean: call model.train"):
        optimizer.step()
    model.train()
    loss_of(model, x, y).backward()
    with pytest.raises(RuntimeError, match="gradient of '.*' comes from a backward pass outside any draw"):
        optimizer.step()
    model.zero_grad()
    plain(optimizer, model, x, y)


@family
def test_mc_samples_above_one_needs_a_closure_or_contexts(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model, mc_samples=2)
    with pytest.raises(RuntimeError, match="mc_samples=2"):
        plain(optimizer, model, x, y)
    assert equal(weights(model), weights(network()))


@family
def test_a_watched_model_may_be_called_in_parts(entry: Entry) -> None:
    needs_gradients_alone(entry)
    x, y = data()

    def train(parts: bool) -> list[torch.Tensor]:
        model = network()
        optimizer = entry.make(model)
        torch.manual_seed(2)
        optimizer.zero_grad()
        output = model[2](model[1](model[0](x))) if parts else model(x)
        torch.nn.functional.cross_entropy(output, y).backward()
        optimizer.step()
        return weights(model)

    assert equal(train(True), train(False))


@family
def test_a_pass_that_torch_func_transforms_draws_nothing(entry: Entry) -> None:
    x, y = data()

    def gradient(weights: dict[str, torch.Tensor], x: torch.Tensor, y: torch.Tensor, model: nn.Module) -> torch.Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x[None],)), y[None])

    def train(transformed: bool) -> list[torch.Tensor]:
        model, unwatched = network(), network()
        optimizer = entry.make(model)
        torch.manual_seed(2)
        for _ in range(2):
            if transformed:
                at = {name: p.detach() for name, p in model.named_parameters()}
                per_example = torch.func.vmap(torch.func.grad(gradient), in_dims=(None, 0, 0, None))
                found, expected = (per_example(at, x, y, each) for each in (model, unwatched))
                assert all(torch.equal(found[name], expected[name]) for name in at)
            plain(optimizer, model, x, y)
        optimizer.sensitivities()
        return weights(model)

    assert equal(train(True), train(False))


@family
def test_two_optimizers_share_a_model_each_with_its_own_parameters(entry: Entry) -> None:
    model, (x, y) = network(), data()
    first, second = entry.make(model[0].parameters()), entry.make(model[2].parameters())
    first.watch(model)
    second.watch(model)
    before = weights(model)
    for optimizer in (first, second):
        optimizer.zero_grad()
    loss_of(model, x, y).backward()
    assert not any(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    for optimizer in (first, second):
        optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    model.eval()
    after = weights(model)
    model(x)
    assert equal(weights(model), after)


@family
def test_clipping_and_unscaling_between_backward_and_step_count(entry: Entry) -> None:
    x, y = data()

    def train(loop: str, how: str) -> list[torch.Tensor]:
        model = network()
        factor = 1024.0 if how == "scaled" else 1.0
        optimizer = made(entry, loop, model, factor)
        torch.manual_seed(2)
        if loop == "context":
            with optimizer.sampled_params(train=True):
                (factor * loss_of(model, x, y)).backward()
        else:
            (factor * loss_of(model, x, y)).backward()
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(0.5 if how == "clipped" else 1 / factor)
        optimizer.step()
        return weights(model)

    for loop in ("plain", "context"):
        assert equal(train(loop, "scaled"), train(loop, "as it is"))
        assert not equal(train(loop, "clipped"), train(loop, "as it is"))


@family
def test_an_optimizer_that_goes_leaves_the_mean_and_no_hooks(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    loss_of(model, x, y)
    assert not equal(weights(model), weights(network()))
    del optimizer
    gc.collect()
    assert equal(weights(model), weights(network()))
    assert not any(module._forward_hooks for module in model.modules())


@family
def test_a_second_optimizer_over_the_same_parameters_takes_over_with_a_warning(entry: Entry) -> None:
    model, (x, y) = network(), data()
    first = entry.make(model)
    loss_of(model, x, y)
    with pytest.warns(UserWarning, match="watched by another"):
        second = entry.make(model)
    assert equal(weights(model), weights(network()))
    plain(second, model, x, y)
    with pytest.raises(RuntimeError, match="without a draw"):
        first.step()


@family
def test_an_interrupt_inside_an_eval_forward_leaves_a_model_that_trains_on(entry: Entry) -> None:
    model, (x, y) = network(), data()
    optimizer = entry.make(model)
    loss_of(model, x, y).backward()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    handle = model[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(x)
    handle.remove()
    with torch.no_grad():
        assert torch.equal(model(x), network()(x))
    plain(optimizer, model, x, y)
    optimizer.sensitivities()


@family
def test_a_module_that_calls_itself_is_one_forward_pass(entry: Entry) -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(6, 6, dtype=torch.float64)

        def forward(self, x: torch.Tensor, depth: int = 2) -> torch.Tensor:
            return x if depth == 0 else torch.tanh(self.cell(self(x, depth - 1)))

    torch.manual_seed(0)
    model, (x, y) = Tree(), data()
    optimizer = entry.make(model)
    plain(optimizer, model, x, y)
    s = optimizer.sensitivities(deviation=True)
    torch.testing.assert_close((s.residual * s.deviation).sum(1), s.self_influence)
