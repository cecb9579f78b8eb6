"""Calls that all examples share: where the recorder sees each example's own gradient of them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.capture.test_trace import places
from tests.oracles.networks import CASES, Case, Model
from tests.oracles.per_example import flat, moving, per_example, relative_error
from vlearn.capture.broadcast_calls import other_terms


@pytest.mark.parametrize(
    ("name", "by_rule"),
    [
        ("positions_without_an_example_axis", True),
        ("positions_of_one_example", True),
        ("positions_as_many_as_examples", True),
        ("positions_added_in_place", True),
        ("positions_added_in_place_to_a_view", False),
        ("positions_added_among_other_terms", True),
        ("positions_tied_with_a_layer_of_the_examples", True),
        ("positions_at_two_calls", True),
        ("sum_with_positions_used_past_the_next_layer", True),
        ("language_model_with_tied_embeddings", True),
        ("part_of_a_sum_with_positions_used_again", False),
        ("positions_used_a_second_time", False),
        ("positions_added_twice", False),
        ("positions_with_a_factor", False),
        ("positions_that_multiply", False),
    ],
)
def test_the_sum_explains_the_call_if_nothing_else_uses_its_output(name, by_rule):
    found = places(CASES[name]())["places.weight"]
    assert all(rule is by_rule for _, rule in found if found)
    assert by_rule or [path for path, _ in found] == ["Model"]


def test_a_row_that_only_looks_like_an_example_is_none():
    """As many positions as examples, in a product, where no shape tells them apart."""
    model = Model(lambda m, x: m.out((m.into(x) * m.places(torch.arange(4))).mean(1)), into=nn.Linear(5, 4))
    model.places, model.out = nn.Embedding(4, 4), nn.Linear(4, 3)
    case = Case(model.double(), torch.randn(4, 4, 5).double(), torch.tensor([0, 1, 2, 0]))
    posterior = vlearn.IVON(model, lr=0.1, ess=20).posterior()
    truth = per_example(model.eval(), case.call, case.each_loss)
    table = vlearn.sweep(model, posterior, [(case.x, case.target)], F.cross_entropy, None, progress=False)
    covariance = torch.diag(flat({name: posterior.variance[name] for name in moving(model)}))
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10


def test_the_terms_of_a_sum():
    a, b, c = (torch.randn(2, requires_grad=True) * 2 for _ in range(3))
    assert other_terms(a + b + c, b) == [c.grad_fn, a.grad_fn]
    assert other_terms(a + b, a) == [b.grad_fn]
    assert other_terms(a, a) == []
    for total in (a * b, a + 2 * b, torch.add(a, b, alpha=2), b + (a + b), a + c):
        assert other_terms(total, b) is None
