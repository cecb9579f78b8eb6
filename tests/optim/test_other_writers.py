"""Other code that writes, reads or moves the weights while a draw is in them, and what the step makes of it."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.func import functional_call

import vlearn
from tests.optim.table import (
    IVON,
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
    states,
    weights,
)
from vlearn._torch_internals import after_backward
from vlearn.optim.watch import other_optimizers

X, Y = data()


class Replacing(nn.Sequential):
    """Replaces the storage of its weights by a copy after each backward pass."""

    def forward(self, x):
        output = super().forward(x)
        if output.requires_grad:
            output.register_hook(lambda gradient: after_backward(self.replace))
        return output

    def replace(self):
        for p in self.parameters():
            p.data = p.data.clone()


@family
@pytest.mark.parametrize("loop", LOOPS)
def test_weights_may_get_another_storage_while_a_draw_is_in_them(entry: Entry, loop: str) -> None:
    results = []
    for kind in (nn.Sequential, Replacing):
        model = kind(*network())
        torch.manual_seed(2)
        optimizer = made(entry, loop, model)
        for _ in range(3):
            LOOPS[loop](optimizer, model, X, Y)
        results.append([*weights(model), *states(optimizer)])
    assert equal(*results)


@family
def test_the_storage_may_be_replaced_between_context_and_step(entry: Entry) -> None:
    results = []
    for replaces in (False, True):
        model = Replacing(*network())
        torch.manual_seed(2)
        optimizer = made(entry, "context", model)
        with optimizer.sampled_params(train=True):
            loss_of(model, X, Y).backward()
        if replaces:
            model.replace()
        optimizer.step()
        results.append(weights(model))
    assert equal(*results)


def attacked_step(optimizer, model, by_storage):
    """Adversarial training of the first weight (Miyato et al., 2017): a second pass at moved weights, then back."""
    p = model[0].weight
    optimizer.zero_grad()
    loss_of(model, X, Y).backward()
    if by_storage:
        backup = p.data.clone()
        p.data.add_(p.grad / p.grad.norm())
    else:
        with torch.no_grad():
            moved = p.grad / p.grad.norm()
            p.add_(moved)
    loss_of(model, X, Y).backward()
    if by_storage:
        p.data = backup
    else:
        with torch.no_grad():
            p.sub_(moved)
    optimizer.step()


@pytest.mark.parametrize("by_storage", [False, True], ids=["in place", "by p.data ="])
def test_adversarial_training_steps_from_the_mean(by_storage: bool) -> None:
    model = network()
    optimizer = IVON.make(model, lr=1e-6)
    before = weights(model)
    for _ in range(5):
        attacked_step(optimizer, model, by_storage)
    assert all(float((p - q).abs().max()) < 1e-4 for p, q in zip(weights(model), before, strict=True))


def test_a_tensor_of_another_shape_is_refused() -> None:
    model = network()
    optimizer = IVON.make(model)
    loss_of(model, X, Y).backward()
    model[0].weight.grad = None
    model[0].weight.data = torch.zeros(7, 6, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"shape \(5, 6\) was replaced by a tensor of shape \(7, 6\)"):
        optimizer.step()


@family
def test_another_optimizer_that_trains_a_draw_is_refused(entry: Entry) -> None:
    model = network()
    optimizer = made(entry, "plain", model)
    plain(optimizer, model, X, Y)
    mean = weights(model)
    other = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss_of(model, X, Y).backward()
    with pytest.raises(RuntimeError, match=r"AdamW.step\(\) has moved '0.weight' .*unwatch\(\)"):
        other.step()
    assert equal(weights(model), mean)
    optimizer.unwatch()
    loss_of(model, X, Y).backward()
    other.step()
    assert not equal(weights(model), mean)


def test_another_optimizer_may_train_other_parameters_or_the_mean() -> None:
    body, head = network(), nn.Linear(3, 3).double()
    optimizer = IVON.make(body)
    other = torch.optim.SGD(head.parameters(), lr=0.1)
    F.cross_entropy(head(body(X)), Y).backward()
    other.step()
    optimizer.step()
    before = weights(body)
    body.eval()
    whole = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.1)
    F.cross_entropy(head(body(X)), Y).backward()
    whole.step()
    assert not equal(weights(body), before)


def test_no_hook_on_the_optimizers_of_others_outlives_the_last_watch() -> None:
    gc.collect()
    others = set(other_optimizers._listeners)
    first, second = IVON.make(network()), IVON.make(network())
    assert len(other_optimizers._listeners) == len(others) + 2
    first.unwatch()
    del second
    gc.collect()
    assert set(other_optimizers._listeners) == others
    assert (other_optimizers._handle is None) == (not others)


def test_weights_written_under_a_draw_are_not_hidden_by_the_mean() -> None:
    model = network()
    optimizer = IVON.make(model)
    loss_of(model, X, Y).backward()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad  # training by hand
    model.eval()
    with pytest.raises(RuntimeError, match="written in place while a draw of IVON was in it.*unwatch"):
        model(X)
    optimizer.unwatch()
    model(X)


def test_evaluations_within_a_step_are_no_writing() -> None:
    model = network()
    optimizer = IVON.make(model)
    loss_of(model, X, Y).backward()
    for _ in range(2):
        model.eval()
        model(X)
        with optimizer.sampled_params():
            model(X)
        model.train()
        loss_of(model, X, Y).backward()
        optimizer.eval()
        optimizer.train()
    optimizer.step()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, embedded):
        return self.out(embedded.mean(1).tanh())


EARLY = {
    "an embedding looked up by hand": lambda m, t: m(F.embedding(t, m.embedding.weight)),
    "a submodule called by its weight": lambda m, t: m(F.embedding(t, m.embedding.weight.clone())),
    "derived weights": lambda m, t: functional_call(
        m, {n: p * 1.0 for n, p in m.named_parameters()}, (torch.randn(5, 2, 4),)
    ),
}


@pytest.mark.parametrize("read", EARLY.values(), ids=EARLY)
@pytest.mark.parametrize("every", [1, 2])
def test_weights_read_before_the_draw_are_refused(read, every) -> None:
    torch.manual_seed(0)
    model, tokens = Tied(), torch.randint(0, 7, (5, 2))
    optimizer = IVON.make(model)
    optimizer.watch(model, every=every)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="was read before this forward pass .* put a draw into it"):
            read(model, tokens)
        assert optimizer._sampler.draw is None
        model(model.embedding(tokens)).sum().backward()  # its first call draws
        optimizer.step()
        optimizer.zero_grad()
    optimizer.train()
    drawn = weights(model)
    loss = read(model, tokens).square().sum()
    loss.backward()
    assert equal(weights(model), drawn)
    optimizer.step()


def test_a_watched_head_behind_a_body_that_is_drawn_too_is_refused() -> None:
    body, head = nn.Linear(6, 5).double(), nn.Linear(5, 3).double()
    optimizer = IVON.make(nn.Sequential(body, head).parameters())
    optimizer.watch(head)
    with pytest.raises(RuntimeError, match=r"watch the model whose forward pass reads all weights"):
        head(body(X))
    optimizer.watch(nn.ModuleList([body, head]))
    F.cross_entropy(head(body(X)), Y).backward()
    optimizer.step()


@pytest.mark.parametrize("loop", ["context", "closure", "modes"])
@family
def test_one_gradient_tensor_assigned_at_every_step_counts_at_every_step(entry: Entry, loop: str) -> None:
    needs_gradients_alone(entry)
    constant = [torch.ones_like(p) for p in network().parameters()]
    results = []
    for copies in (False, True):
        model = network()
        torch.manual_seed(3)
        optimizer = entry.make(model.parameters())

        def assign(model=model, copies=copies):
            for p, gradient in zip(model.parameters(), constant, strict=True):
                p.grad = gradient.clone() if copies else gradient

        for _ in range(3):
            if loop == "context":
                with optimizer.sampled_params(train=True):
                    assign()
                optimizer.step()
            elif loop == "closure":
                optimizer.step(assign)
            else:
                optimizer.train()
                assign()
                optimizer.step()
        results.append(weights(model))
    assert equal(*results)
    assert all(torch.equal(g, torch.ones_like(g)) for g in constant)


def test_gradients_that_nobody_touches_inside_a_context_are_the_same_tensors_after_it() -> None:
    model = network()
    optimizer = IVON.make(model.parameters())
    with optimizer.sampled_params(train=True):
        loss_of(model, X, Y).backward()
    before = [p.grad for p in model.parameters()]
    optimizer.step()
    with optimizer.sampled_params(train=True):
        pass
    assert all(p.grad is g for p, g in zip(model.parameters(), before, strict=True))
    with pytest.raises(RuntimeError, match="without a draw"):
        optimizer.step()


@family
def test_a_loaded_state_shares_no_tensor_with_what_it_was_loaded_from(entry: Entry) -> None:
    model = network()
    optimizer = made(entry, "plain", model)
    plain(optimizer, model, X, Y)
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    other_model = network()
    other = made(entry, "plain", other_model)
    other.load_state_dict(saved)
    for _ in range(2):
        plain(other, other_model, X, Y)
    for number, state in saved["state"].items():
        for key, value in state.items():
            assert torch.equal(value, kept["state"][number][key]), key


@family
def test_distributed_checkpoints_make_the_state_of_a_new_optimizer(entry: Entry) -> None:
    model = network()
    optimizer = made(entry, "plain", model, lr=0.05)
    for _ in range(2):
        plain(optimizer, model, X, Y)
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer))
    other_model = network(seed=5)
    other = made(entry, "plain", other_model, lr=0.05)
    get_optimizer_state_dict(other_model, other)
    assert other.param_groups[0]["lr"] == 0.05
    other_model = network(seed=5)
    other = made(entry, "plain", other_model, lr=0.05)
    set_state_dict(other_model, other, model_state_dict=of_model, optim_state_dict=of_optimizer)
    assert other.param_groups[0]["lr"] == 0.05
    results = []
    for each, of in ((model, optimizer), (other_model, other)):
        torch.manual_seed(4)
        plain(of, each, X, Y)
        results.append([*weights(each), *states(of)])
    assert equal(*results)


def test_a_step_that_is_not_that_of_a_checkpoint_still_says_that_it_has_no_draw() -> None:
    model = network()
    optimizer = vlearn.IVON(model.parameters(), lr=0.0, ess=10)
    with pytest.raises(RuntimeError, match="without a draw"):
        optimizer.step()
    loss_of(model, X, Y).backward()
    with pytest.raises(RuntimeError, match="without a draw"):
        optimizer.step()
