"""Random programs over a few shared layers: whatever a model does with its weights, exact or refused."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vlearn
from tests.oracles.networks import Model
from tests.oracles.per_example import flat, moving, per_example, relative_error

N, T, D, C = 3, 5, 4, 3
LABELS = torch.tensor([0, 1, 2])


def _flattened(layer, h):
    return layer(h.reshape(-1, D)).reshape(h.shape)


def _first_in_place(m, h):
    h = m.a(h)
    return F.relu(h, inplace=True) + 0.1


def _stopped(m, h):
    with torch.no_grad():
        scale = m.a(h).norm(dim=-1, keepdim=True)
    return h * scale + m.b(h).detach()


OPERATIONS = {
    "call a": lambda m, h: torch.tanh(m.a(h)),
    "call b": lambda m, h: torch.tanh(m.b(h)),
    "b with the weight of a": lambda m, h: torch.tanh(m.tied(h)),
    "the weight of a outside its call": lambda m, h: torch.tanh(F.linear(h, m.a.weight)),
    "the transposed weight of b": lambda m, h: torch.tanh(h @ m.b.weight),
    "the bias of b outside its call": lambda m, h: h + m.b.bias,
    "an unhooked call of a": lambda m, h: torch.tanh(m.a.forward(h)),
    "rows flattened": lambda m, h: torch.tanh(_flattened(m.a, h)),
    "positions first": lambda m, h: torch.tanh(m.a(h.transpose(0, 1))).transpose(0, 1),
    "one position": lambda m, h: h + m.b(h.mean(1)).unsqueeze(1),
    "norm": lambda m, h: m.norm(h),
    "norm flattened": lambda m, h: _flattened(m.norm, h),
    "block": lambda m, h: m.block(h),
    "block that flattens": lambda m, h: m.flattening(h),
    "block whose inside is used later": lambda m, h: m.leaving(h) + m.leaving.left,
    "block whose output is used later": lambda m, h: m.keeping(h).relu_() + torch.sin(m.keeping.kept),
    "gain of a block outside it": lambda m, h: h * m.block.gain,
    "in place": _first_in_place,
    "stopped gradients": _stopped,
    "dropout": lambda m, h: m.dropout(h),
    "skip": lambda m, h: h + torch.tanh(m.b(h)),
}


def _leave(m, h):
    m.left = torch.tanh(m.gain * h)
    return m.left.square()


def _keep(m, h):
    m.kept = m.gain * h
    return m.kept


def program(names):
    torch.manual_seed(0)
    a, b, tied = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
    tied.weight = a.weight
    block = Model(lambda m, h: m.gain * torch.tanh(m.a(h)) + F.linear(h, m.a.weight), a=a)
    flattening = Model(lambda m, h: m.gain * torch.tanh(_flattened(m.b, h)) + m.b(h), b=b)
    leaving, keeping = Model(_leave), Model(_keep)
    for part in (block, flattening, leaving, keeping):
        part.gain = nn.Parameter(torch.randn(D))

    def forward(m, h):
        for name in names:
            h = OPERATIONS[name](m, h)
        return m.out(h.mean(1))

    parts = {
        "a": a,
        "b": b,
        "tied": tied,
        "block": block,
        "flattening": flattening,
        "leaving": leaving,
        "keeping": keeping,
    }
    model = Model(forward, **parts, norm=nn.LayerNorm(D), dropout=nn.Dropout(0.3), out=nn.Linear(D, C))
    return model.double()


def check(names):
    model, twin = program(names), program(names)
    x = torch.randn(N, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    optimizer = vlearn.IVON(model, lr=0.1, ess=20, generator=torch.Generator().manual_seed(2))
    optimizer.posterior()
    for state in optimizer.state.values():
        state["hessian"].uniform_(0.5, 3.0)
    torch.manual_seed(3)
    F.cross_entropy(model(x), LABELS).backward()
    with torch.no_grad():
        for theirs, p in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.copy_(p)
    torch.manual_seed(3)
    truth = per_example(twin, lambda m: m(x), lambda f: F.cross_entropy(f, LABELS, reduction="none"))
    variance = optimizer.posterior().variance
    covariance = torch.diag(flat({name: variance[name] for name in moving(model)}))
    optimizer.step()
    covariances = [covariance, torch.diag(flat({n: optimizer.posterior().variance[n] for n in moving(model)}))]
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.self_influence, truth.self_influence(covariances[1])) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariances[1])) < 1e-10
    with torch.no_grad():
        for theirs, p in zip(twin.parameters(), model.parameters(), strict=True):
            theirs.copy_(p)
    truth = per_example(twin.eval(), lambda m: m(x), lambda f: F.cross_entropy(f, LABELS, reduction="none"))
    table = vlearn.sweep(model, optimizer.posterior(), [(x, LABELS)], F.cross_entropy, "exact", progress=False)
    assert relative_error(table.self_influence, truth.self_influence(covariances[1])) < 1e-10
    assert relative_error(table.deviation, truth.deviation(covariances[1])) < 1e-10
    assert relative_error(table.leverage, truth.leverage(covariances[1])) < 1e-10


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.lists(st.sampled_from(sorted(set(OPERATIONS) - {"dropout"})), min_size=1, max_size=5))
def test_any_program_is_exact(names):
    check(names)


RULED = ["call a", "call b", "b with the weight of a", "one position", "norm", "skip", "in place", "dropout"]


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(st.lists(st.sampled_from(sorted(OPERATIONS)), min_size=1, max_size=4))
def test_any_program_with_dropout_is_exact_or_refused(names):
    try:
        check(["call a", "dropout", *names])
    except RuntimeError as error:
        assert "it draws random numbers itself" in str(error)
        assert set(names) - set(RULED), f"{names} need no fallback of the whole model"


def every_two(names, length):
    """Programs of so many operations, in which every one comes right after every one, itself too."""
    missing, walk = set(product(names, names)), [names[0]]
    while missing:
        here = [pair for pair in sorted(missing) if pair[0] == walk[-1]]
        # Those that lead to itself first, then where most are missing.
        pair = max(here or sorted(missing), key=lambda p: (p[0] == p[1], sum(q[0] == p[1] for q in missing)))
        walk += pair[1:] if here else pair
        missing.discard(pair)
    return [walk[start : start + length] for start in range(0, len(walk) - 1, length - 1)]


@pytest.mark.slow
def test_every_two_operations_after_one_another_are_exact():
    programs = every_two(sorted(set(OPERATIONS) - {"dropout"}), 8)
    assert len(programs) < 60
    for names in programs:
        check(names)


@pytest.mark.slow
@settings(max_examples=40, derandomize=True, deadline=None, database=None)
@given(st.lists(st.sampled_from(sorted(set(OPERATIONS) - {"dropout"})), min_size=1, max_size=8))
def test_any_longer_program_is_exact(names):
    check(names)
