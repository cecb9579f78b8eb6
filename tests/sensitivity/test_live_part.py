"""Sensitivities of some of a minibatch's examples are the rows that all of them would have."""

import pytest
import torch
from torch import nn

import vlearn
from tests.oracles.networks import CASES, Model
from tests.sensitivity.small import LABELS, C, D, N, PlainNorm, inputs, loss_of, network, optimizer_of
from tests.sensitivity.test_exactness import NAMES, TOLERANCE, error, with_uneven_state

ROWS = [2, 0]
FIELDS = ("residual", "self_influence", "prediction_error", "deviation")

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def assert_rows(part, whole, chosen):
    for name in FIELDS:
        rows = getattr(whole, name)[chosen]
        assert getattr(part, name).shape == rows.shape, name
        assert error(getattr(part, name), rows) < TOLERANCE, name
    assert part.step == whole.step


@pytest.mark.parametrize("name", NAMES)
def test_some_rows_of_any_model(name):
    case = CASES[name]()
    optimizer = with_uneven_state(case.model)
    case.model.train()
    for module in case.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    torch.manual_seed(3)
    case.loss(case.call(case.model), case.target).backward()
    whole = optimizer.sensitivities(deviation=True)
    state = torch.get_rng_state()
    chosen = ROWS if len(whole.self_influence) > 2 else [0]
    assert_rows(optimizer.sensitivities(deviation=True, examples=chosen), whole, chosen)
    assert torch.equal(state, torch.get_rng_state())


def read(*between, **arguments):
    """(all rows, the optimizer) of a small network after a backward pass."""
    model = network(*between)
    optimizer = optimizer_of(model, **arguments)
    loss_of(model, inputs()).backward()
    return optimizer.sensitivities(deviation=True), optimizer


@pytest.mark.parametrize(
    "examples",
    [[4], (5, 1, 3), range(0, 6, 2), slice(1, None, 2), torch.tensor([3, 2]), LABELS == 1],
    ids=["one", "tuple", "range", "slice", "tensor", "mask"],
)
def test_examples_are_named_in_any_usual_way_and_keep_their_order(examples):
    whole, optimizer = read(PlainNorm(8))
    chosen = torch.arange(6)[list(examples) if isinstance(examples, tuple | range) else examples]
    assert_rows(optimizer.sensitivities(deviation=True, examples=examples), whole, chosen)


def test_dropout_keeps_the_masks_of_the_whole_batch():
    torch.manual_seed(2)
    whole, optimizer = read(nn.Dropout(0.5))
    assert_rows(optimizer.sensitivities(deviation=True, examples=ROWS), whole, ROWS)


def test_a_mask_as_long_as_the_examples_that_are_asked_for_is_no_row_of_theirs():
    torch.manual_seed(0)
    mask = torch.triu(torch.full((4, 4), -torch.inf, dtype=torch.float64), 1)
    attention = nn.MultiheadAttention(D, 1, batch_first=True)
    model = Model(lambda m, x: m.out(m.mix(x, x, x, attn_mask=mask)[0].mean(1)), mix=attention, out=nn.Linear(D, C))
    optimizer = optimizer_of(model.double())
    x = torch.randn(N, 4, D, dtype=torch.float64)
    loss_of(model, x).backward()
    whole = optimizer.sensitivities(deviation=True)
    chosen = [5, 0, 3, 1]
    assert_rows(optimizer.sensitivities(deviation=True, examples=chosen), whole, chosen)


def test_an_input_written_since_the_forward_pass_is_refused_for_some_examples_too():
    model = network()
    optimizer = optimizer_of(model)
    x = inputs()
    loss_of(model, x).backward()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified in place"):
        optimizer.sensitivities(deviation=True, examples=ROWS)


def test_correlated_posteriors_give_the_same_rows():
    model = network()
    optimizer = vlearn.KFACVON(model, lr=0.01, ess=100, generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, inputs()).backward()
        optimizer.step()
    whole = optimizer.sensitivities(deviation=True)
    assert_rows(optimizer.sensitivities(deviation=True, examples=ROWS), whole, ROWS)


def test_fewer_examples_take_fewer_operations(monkeypatch):
    """No activation of the whole batch is worked on: the largest operand has the rows that were asked for."""
    from vlearn.linearized import covariance_products

    seen = []
    form_of = covariance_products.form_of
    monkeypatch.setattr(
        covariance_products,
        "form_of",
        lambda call, p, examples: seen.append(len(call.input)) or form_of(call, p, examples),
    )
    _, optimizer = read()
    seen.clear()
    optimizer.sensitivities(examples=ROWS)
    assert set(seen) == {2}


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([], r"examples of shape \(0,\)"),
        ([[0, 1]], r"examples of shape \(1, 2\)"),
        ([0.5], "whole number in one dimension, or a mask of the batch's 6 examples"),
        (torch.tensor([True, False]), "or a mask of the batch's 6 examples"),
        ([0, 6], "different numbers from 0 to 5, the minibatch has 6"),
        ([-1], "different numbers from 0 to 5"),
        ([1, 1], "different numbers from 0 to 5"),
        ("all", "must be numbers of examples"),
    ],
)
def test_other_examples_are_refused(examples, message):
    _, optimizer = read()
    with pytest.raises(ValueError, match=message):
        optimizer.sensitivities(examples=examples)


def test_examples_that_meet_are_refused_however_few_are_asked_for():
    class Centred(nn.Module):
        def forward(self, h):
            return h - h.mean(0)

    model = network(Centred())
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    for examples in ([0], ROWS):
        with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
            optimizer.sensitivities(examples=examples)
