"""Models that return a state beside their output, as recurrent ones do, or several outputs of other shapes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import vlearn
from tests.oracles.networks import Model
from tests.oracles.per_example import relative_error

N, T = 6, 5
LABELS = torch.arange(N) % 3
CELLS = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}


def network(cell, **settings):
    """As tutorials have it: `return logits, hidden`."""

    def forward(m, x, hidden=None):
        out, hidden = m.rnn(x if m.rnn.batch_first else x.transpose(0, 1), hidden)
        return m.out(out[:, -1] if m.rnn.batch_first else out[-1]), hidden

    torch.manual_seed(0)
    layer = CELLS[cell](4, 3, **settings)
    return Model(forward, rnn=layer, out=nn.Linear(6 if layer.bidirectional else 3, 3)).double()


def inputs():
    return torch.randn(N, T, 4, dtype=torch.double, generator=torch.Generator().manual_seed(2))


def state(layers, cell):
    generator = torch.Generator().manual_seed(3)
    parts = [torch.randn(layers, N, 3, dtype=torch.double, generator=generator) for _ in range(2)]
    return tuple(parts) if cell == "LSTM" else parts[0]


def one_of(tree, n):
    """The example's part of a state ``[layers, N, H]``."""
    return tuple(part[:, n : n + 1].contiguous() for part in tree) if isinstance(tree, tuple) else tree[:, n : n + 1]


def truth(model, weights, variance, loss, of_example):
    """g_nᵀ Σ g_n from each example run alone."""
    found = []
    for n in range(N):
        live = {name: w.clone().requires_grad_() for name, w in weights.items()}
        value = loss(functional_call(model, live, of_example(n)), LABELS[n : n + 1])
        rows = torch.autograd.grad(value, list(live.values()), allow_unused=True)
        found.append(sum((variance[k] * g.square()).sum() for k, g in zip(live, rows, strict=True) if g is not None))
    return torch.stack(found)


def logits_loss(output, target):
    return F.cross_entropy(output[0], target)


def state_loss(output, target):
    states = output[1] if isinstance(output[1], tuple) else (output[1],)
    of_state = torch.stack([each.square().sum((0, 2)) for each in states]).sum(0)  # [N]
    return F.cross_entropy(output[0], target) + of_state.mean()


def assert_live(model, args, of_example, loss):
    twin = copy.deepcopy(model)
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    loss(model(*args), LABELS).backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    whole = optimizer.sensitivities(deviation=True, output=0)
    own = truth(twin, weights, optimizer.posterior().variance, loss, of_example)
    assert relative_error(whole.self_influence, own) < 1e-10
    part = optimizer.sensitivities(deviation=True, output=0, examples=[4, 1])
    assert relative_error(part.self_influence, own[[4, 1]]) < 1e-10
    assert relative_error(part.deviation, whole.deviation[[4, 1]]) < 1e-10


SETTINGS = {
    "examples first": {"batch_first": True},
    "positions first": {},
    "two directions": {"num_layers": 2, "bidirectional": True},
    "as many layers as examples": {"num_layers": N},
}
MIXED = "depends on the other examples of the batch|other outputs than on the batch"


@pytest.mark.parametrize("loss", [logits_loss, state_loss], ids=["of the logits", "of the state too"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("cell", CELLS)
def test_live_rows_of_a_model_that_returns_its_state(cell, settings, loss):
    x, model = inputs(), network(cell, **settings)
    assert_live(model, (x,), lambda n: (x[n : n + 1],), loss)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_live_rows_of_a_model_that_is_given_its_state(cell, settings):
    x, model = inputs(), network(cell, **settings)
    hidden = state(settings.get("num_layers", 1) * (2 if settings.get("bidirectional") else 1), cell)
    assert_live(model, (x, hidden), lambda n: (x[n : n + 1], one_of(hidden, n)), logits_loss)


@pytest.mark.parametrize("cell", CELLS)
def test_the_sweep_of_a_model_that_returns_its_state(cell):
    x, model = inputs(), network(cell, batch_first=True)
    twin = copy.deepcopy(model)
    posterior = vlearn.IVON(model, lr=0.1, ess=20).posterior()

    def rows(output, target):
        return F.cross_entropy(output[0], target, reduction="none")

    table = vlearn.sweep(model, posterior, [(x, LABELS)], rows, "exact", output=0, progress=False)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    own = truth(twin, weights, posterior.variance, logits_loss, lambda n: (x[n : n + 1],))
    assert relative_error(table.self_influence, own) < 1e-10


@pytest.mark.parametrize("cell", CELLS)
def test_vogn_trains_a_model_that_returns_its_state(cell):
    model = network(cell, batch_first=True)
    optimizer = vlearn.VOGN(model, lr=0.01, ess=20)
    logits_loss(model(inputs()), LABELS).backward()
    optimizer.step()
    assert optimizer.sensitivities(output=0).self_influence.shape == (N,)


@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences_are_run_one_by_one(cell):
    def forward(m, x, lengths):
        state = m.rnn(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))[1]
        return m.out((state[0] if isinstance(state, tuple) else state)[-1]), state

    model, x, lengths = network(cell, batch_first=True), inputs(), torch.tensor([3, 5, 1, 5, 2, 2])
    model.function = forward
    assert_live(model, (x, lengths), lambda n: (x[n : n + 1], lengths[n : n + 1]), logits_loss)


def test_positions_taken_for_examples_are_refused():
    """A layer with the positions first that is given the examples first: it runs along them."""
    model = network("GRU")
    model.function = lambda m, x: (m.out(m.rnn(x)[0][:, -1]), None)
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    logits_loss(model(inputs()), LABELS).backward()
    with pytest.raises(RuntimeError, match=MIXED):
        optimizer.sensitivities(output=0)
    square = inputs()[:T]  # as many positions as examples
    optimizer.zero_grad()
    F.cross_entropy(model(square)[0], LABELS[:T]).backward()
    with pytest.raises(RuntimeError, match=MIXED):
        optimizer.sensitivities(output=0)


def both_loss(output, target):
    logits, hidden = output
    return F.cross_entropy(logits, target) + hidden.square().sum(1).mean()


@pytest.mark.parametrize("loss", [logits_loss, both_loss], ids=["of the logits", "of the hidden values too"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "returned twice"])
def test_logits_of_the_hidden_values_that_are_returned_beside_them(loss, twice):
    """The gradient that comes to the hidden values has come through the logits, too."""

    def forward(m, x):
        hidden = torch.tanh(m.scale * m.fc(x[:, 0]))
        logits = m.out(hidden) + F.linear(x[:, 1, :3], m.out.weight)
        return (logits, hidden, hidden) if twice else (logits, hidden)

    torch.manual_seed(0)
    model = Model(forward, fc=nn.Linear(4, 3), out=nn.Linear(3, 3)).double()
    model.scale = nn.Parameter(torch.ones(3, dtype=torch.double))
    x = inputs()
    assert_live(model, (x,), lambda n: (x[n : n + 1],), lambda output, target: loss(output[:2], target))


def test_a_model_that_returns_its_loss_beside_the_logits():
    def forward(m, x, target):
        logits = F.linear(torch.tanh(m.fc(x[:, 0])), m.fc.weight[:, :3])  # the whole model is the unit
        return F.cross_entropy(logits, target), logits

    torch.manual_seed(0)
    model = Model(forward, fc=nn.Linear(4, 3)).double()
    x, twin = inputs(), copy.deepcopy(model)
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    model(x, LABELS)[0].backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = optimizer.sensitivities(output=1, deviation=True)
    variance = optimizer.posterior().variance
    own = truth(twin, weights, variance, lambda o, y: o[0], lambda n: (x[n : n + 1], LABELS[n : n + 1]))
    assert relative_error(found.self_influence, own) < 1e-10
