"""What reading sensitivities leaves alone."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import vlearn
from tests.oracles.networks import Model
from tests.oracles.per_example import flat, relative_error
from tests.sensitivity.small import (
    PlainNorm,
    assert_equal,
    covariance_of,
    inputs,
    loss_of,
    network,
    optimizer_of,
    truth_at,
    weights_of,
)

# -- what it does not touch ----------------------------------------------------------------------------------------


class Counter(nn.Module):
    """A module without a rule that counts its calls in a buffer and in an attribute."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))
        self.seen = None

    def forward(self, x):
        self.calls += 1
        self.seen = x
        return self.gain * x


def stateful():
    return network(Counter(), nn.Unflatten(1, (1, 8)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten())


def test_replays_update_no_buffer_and_no_attribute():
    model = stateful()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    buffers, seen = {name: b.clone() for name, b in model.named_buffers()}, model[2].seen
    optimizer.sensitivities(deviation=True)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert model[2].seen is seen
    assert model[2].calls == 1


@pytest.mark.parametrize("kind", ["dropout", "fallback", "pruning"])
def test_weights_gradients_modes_hooks_and_random_numbers_are_as_before(kind):
    model = network({"dropout": nn.Dropout(0.3), "fallback": PlainNorm(8), "pruning": nn.Linear(8, 8)}[kind])
    if kind == "pruning":
        prune.random_unstructured(model[2], "weight", amount=0.5)
    model[1].eval()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    optimizer.step()

    def state():
        return [
            *((p, p.grad, p._version, p.requires_grad, p.data.clone(), p.grad.clone()) for p in model.parameters()),
            *((m, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()),
            *((type(v), v) for m in model.modules() for v in m.__dict__.values() if not isinstance(v, dict)),
            torch.get_rng_state(),
            optimizer.generator.get_state(),
        ]

    before = state()
    optimizer.sensitivities(deviation=True)
    for old, new in zip(before, state(), strict=True):
        pairs = zip(old, new, strict=True) if isinstance(old, tuple) else [(old, new)]
        assert all(a is b or (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) for a, b in pairs)


def test_training_with_and_without_reading_is_the_same_bit_for_bit():
    def train(read):
        model = network(PlainNorm(8), nn.Dropout(0.3))
        optimizer = vlearn.IVON(model, lr=0.1, ess=100)
        torch.manual_seed(2)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, inputs(step)).backward()
            if read:
                optimizer.sensitivities(deviation=True)
            optimizer.step()
            if read:
                optimizer.sensitivities(deviation=True)
        return flat(weights_of(model))

    assert torch.equal(train(read=True), train(read=False))


def test_a_mode_changed_since_the_pass_does_not_matter():
    model = network(PlainNorm(8), nn.Dropout(0.5))
    optimizer = optimizer_of(model)
    torch.manual_seed(3)
    loss_of(model, inputs()).backward()
    before = optimizer.sensitivities(deviation=True)
    model.eval()
    assert_equal(optimizer.sensitivities(deviation=True), before)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_grad_mode_around_the_call_does_not_matter(context):
    model = network(PlainNorm(8))
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    before = optimizer.sensitivities(deviation=True)
    with context():
        assert_equal(optimizer.sensitivities(deviation=True), before)
    assert not before.self_influence.requires_grad and not before.deviation.requires_grad


def test_captures_go_with_the_next_training_pass_and_leave_no_hook_behind():
    model = Model(lambda m, x: m.net(x), net=network(), spare=nn.Linear(2, 2).double())  # spare is never used
    optimizer = optimizer_of(model)
    traces = []
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, inputs()).backward()
        traces.append(weakref.ref(optimizer._watch.trace))
        optimizer.step()
    gc.collect()
    assert [trace() is not None for trace in traces] == [False, False, False, True]
    assert all(len(p._backward_hooks or ()) <= 1 for p in model.parameters())
    optimizer.unwatch()
    gc.collect()
    assert traces[-1]() is None
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_nothing_to_read(error):
    def maybe(m, x):
        if m.fails:
            raise error("stop")
        return x

    model = network(Model(maybe))
    optimizer = optimizer_of(model)
    model[2].fails = False
    loss_of(model, inputs()).backward()
    optimizer.step()
    model[2].fails = True
    with pytest.raises(error):
        model(inputs())
    with pytest.raises(RuntimeError):
        optimizer.sensitivities()
    model[2].fails = False
    optimizer.zero_grad()
    loss_of(model, inputs()).backward()
    truth = truth_at(weights_of(model), network(Model(lambda m, x: x)), inputs())
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.deviation, truth.deviation(covariance_of(optimizer, model))) < 1e-10


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_replay_that_fails_leaves_the_model_as_it_was(error):
    def maybe(m, x):
        if m.fails:
            raise error("stop")
        return x

    model = network(Model(maybe), PlainNorm(8))
    model[2].fails = False
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    before = optimizer.sensitivities(deviation=True)
    weights, hooks = weights_of(model), [len(m._forward_hooks) for m in model.modules()]
    model[2].fails = True
    with pytest.raises(error):
        optimizer.sensitivities(deviation=True)
    model[2].fails = False
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert_equal(optimizer.sensitivities(deviation=True), before)
