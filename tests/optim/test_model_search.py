"""An optimizer that was made from parameters alone, as libraries make theirs, finds its model in a plain loop."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.optim.table import FAMILY, IVON, VOGN, Entry, context, data, equal, family, network, plain, states, weights
from vlearn.optim.watch import model_search

X, Y = data()


def trained(optimizer, model, steps=3):
    for _ in range(steps):
        plain(optimizer, model, X, Y)
    return [*weights(model), *states(optimizer)]


def seeded(entry, params, **settings):
    torch.manual_seed(3)
    return entry.make(params, **settings)


@family
def test_it_trains_and_reads_as_one_that_was_given_the_model(entry: Entry) -> None:
    results, rows = [], []
    for given in (True, False):
        model = network()
        optimizer = seeded(entry, model if given else model.parameters())
        results.append(trained(optimizer, model))
        rows.append(optimizer.sensitivities(deviation=True))
        table = vlearn.sweep(model, optimizer.posterior(), [(X, Y)], F.cross_entropy, leverage=None)
        assert len(table) == len(X)
    assert equal(*results)
    assert torch.equal(rows[0].self_influence, rows[1].self_influence)
    assert torch.equal(rows[0].deviation, rows[1].deviation)


def test_keyword_arguments_reach_the_first_recorded_pass() -> None:
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, *, x):
            return self.net(x)

    results = []
    for given in (True, False):
        model = Named()
        optimizer = seeded(IVON, model if given else model.parameters())
        F.cross_entropy(model(x=X), Y).backward()
        results.append(optimizer.sensitivities(deviation=True))
    assert torch.equal(results[0].deviation, results[1].deviation)


class Parts(nn.Module):
    """Whose parts a library calls one by one, as those of a policy."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.other = nn.Linear(6, 5).double(), nn.Linear(5, 3).double(), nn.Linear(5, 3).double()


def test_parts_that_are_called_apart_are_all_found() -> None:
    results = []
    for given in (True, False):
        model = Parts()
        optimizer = seeded(IVON, model if given else model.parameters())
        for head in (model.head, model.head, model.other, model.head):
            optimizer.zero_grad()
            F.cross_entropy(head(model.body(X).tanh()), Y).backward()
            optimizer.step()
        head = model.other
        optimizer.zero_grad()
        F.cross_entropy(head(torch.ones(len(X), 5, dtype=torch.float64)), Y).backward()  # the first call of a step
        optimizer.step()
        results.append([*weights(model), *states(optimizer)])
        model.eval()
        before = weights(model)
        model.head(model.body(X))
        assert equal(before, weights(model))
    assert equal(*results)
    assert not optimizer._runtime.search._missing


def test_a_model_around_one_that_was_found_takes_its_place() -> None:
    inner = network()
    outer = nn.Sequential(inner, nn.Linear(3, 3).double())
    optimizer = IVON.make(outer.parameters())
    F.cross_entropy(inner(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    F.cross_entropy(outer(X), Y).backward()
    assert optimizer._watch is not None and optimizer._watch.model is outer
    assert optimizer.sensitivities().self_influence.shape == (len(X),)
    optimizer.step()
    assert set(optimizer.posterior().names) == {name for name, _ in outer.named_parameters()}


def test_parameters_that_are_added_later_are_searched_for_too() -> None:
    body, head = network(), nn.Linear(3, 3).double()
    optimizer = IVON.make(body.parameters())
    plain(optimizer, body, X, Y)
    optimizer.add_param_group({"params": head.parameters()})
    F.cross_entropy(head(body(X)), Y).backward()
    before = weights(head)
    optimizer.step()
    assert not equal(before, weights(head))
    optimizer.zero_grad()
    F.cross_entropy(head(torch.ones(len(X), 3, dtype=torch.float64)), Y).backward()
    optimizer.step()


@pytest.mark.parametrize("loop", ["context", "modes", "closure"])
def test_the_loops_in_which_the_user_draws_are_left_alone(loop: str) -> None:
    model = network()
    optimizer = IVON.make(model.parameters())
    before = weights(model)
    if loop == "context":
        context(optimizer, model, X, Y)
    elif loop == "modes":
        optimizer.train()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    else:
        optimizer.step(lambda: F.cross_entropy(model(X), Y).backward())
    assert not equal(before, weights(model))
    assert optimizer._watch is None
    before = weights(model)
    F.cross_entropy(model(X), Y)  # a training forward pass outside the loop
    assert equal(before, weights(model))
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_pass_before_the_first_context_does_not_bind_the_optimizer_to_the_plain_loop() -> None:
    model = network()
    optimizer = IVON.make(model.parameters())
    before = weights(model)
    F.cross_entropy(model(X), Y)  # as a library that looks at the shapes of a model
    context(optimizer, model, X, Y)
    assert optimizer._watch is None and not equal(before, weights(model))
    before = weights(model)
    F.cross_entropy(model(X), Y)
    assert equal(before, weights(model))


def test_an_explicit_watch_has_priority() -> None:
    model = network()
    watching, unwatched = IVON.make(model), IVON.make(model.parameters())
    plain(watching, model, X, Y)
    assert unwatched._watch is None and watching._watch is not None
    with pytest.raises(RuntimeError, match="without a draw"):
        unwatched.step()


def test_the_later_of_two_optimizers_finds_the_model() -> None:
    model = network()
    first, second = IVON.make(model.parameters()), IVON.make(model.parameters())
    plain(second, model, X, Y)
    assert first._watch is None and second._watch is not None


def test_an_optimizer_for_each_of_two_models() -> None:
    models = [network(seed) for seed in range(2)]
    optimizers = [VOGN.make(model.parameters()) for model in models]
    before = [weights(model) for model in models]
    for optimizer, model in zip(optimizers, models, strict=True):
        plain(optimizer, model, X, Y)
    for old, model in zip(before, models, strict=True):
        assert not equal(old, weights(model))


def test_unwatch_is_final() -> None:
    model = network()
    optimizer = IVON.make(model.parameters())
    optimizer.unwatch()
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match="without a draw"):
        optimizer.step()


def test_passes_without_gradients_or_in_eval_mode_find_nothing() -> None:
    model = network()
    optimizer = IVON.make(model.parameters())
    with torch.no_grad():
        model(X)
    model.eval()
    F.cross_entropy(model(X), Y)
    torch.func.functional_call(model, dict(model.named_parameters()), (X,))
    assert optimizer._watch is None
    model.train()
    plain(optimizer, model, X, Y)
    assert optimizer._watch is not None


def test_copies_search_for_their_own_model() -> None:
    model = network()
    other_model, other = copy.deepcopy((model, IVON.make(model.parameters())))
    before = weights(model)
    plain(other, other_model, X, Y)
    assert equal(before, weights(model)) and not equal(before, weights(other_model))


@pytest.mark.parametrize("entry", FAMILY[:1])
def test_the_hook_on_all_modules_lives_as_long_as_a_search(entry: Entry) -> None:
    gc.collect()
    others = set(model_search._searches)
    model = network()
    optimizer = entry.make(model.parameters())
    assert len(model_search._searches) == len(others) + 1 and model_search._handle is not None
    plain(optimizer, model, X, Y)
    assert set(model_search._searches) == others
    optimizer = entry.make(model.parameters())
    del optimizer
    gc.collect()
    nn.Identity()(X)
    assert set(model_search._searches) == others
    assert (model_search._handle is None) == (not others)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_model_trains_by_its_parameters_alone() -> None:
    model = torch.jit.script(network())
    with pytest.raises(TypeError, match="scripted Sequential, which calls no hooks: .*parameters()"):
        IVON.make(model)
    optimizer = IVON.make(model.parameters())
    before = weights(model)
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match="without a draw"):
        optimizer.step()
    optimizer.zero_grad()
    context(optimizer, model, X, Y)
    assert not equal(before, weights(model))
