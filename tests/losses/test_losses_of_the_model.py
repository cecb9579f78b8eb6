"""A model that gives the losses of its examples, or the log-probabilities of their labels, shows their denominator."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.per_example import flat, per_example, relative_error

N, T, D, C = 6, 4, 5, 3
X = torch.randn(N, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LABELS = torch.randint(0, C, (N, T), generator=torch.Generator().manual_seed(2))
COUNTED = torch.arange(N * T).reshape(N, T) % 3 > 0  # 16 of the 24 tokens


class LogProbabilities(nn.Module):
    """log p of the label of each token ``[N, T]``; 0 where a token does not count."""

    def __init__(self, counted=None):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, C)).double()
        self.masks = counted is not None

    def forward(self, x, labels, counted, num_items_in_batch=None):
        found = self.net(x).log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        return found * counted if self.masks else found


# name: (whether tokens are masked, loss of the log-probabilities, an example's own loss of them)
KNOWN = {
    "mean over all": (False, lambda lp: -lp.mean(), lambda lp: -lp.mean(1)),
    "mean over examples of sums": (False, lambda lp: -lp.sum(1).mean(), lambda lp: -lp.sum(1)),
    "mean over what counts": (True, lambda lp: -lp.sum() / COUNTED.sum(), lambda lp: -lp.mean(1)),
    "mean over all with zeros": (True, lambda lp: -lp.mean(), lambda lp: -lp.mean(1)),
    "mean over some examples": (False, lambda lp: -lp[:4].mean(), lambda lp: -lp.mean(1) * (torch.arange(N) < 4)),
}


def live(masked, loss, **told):
    model = LogProbabilities(COUNTED if masked else None)
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    optimizer.watch(model, **told)
    loss(model(X, LABELS, COUNTED)).backward()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        rows = optimizer.sensitivities()
    return model, optimizer, rows, [str(each.message) for each in seen]


def truth_of(model, optimizer, own):
    twin = LogProbabilities(COUNTED if model.masks else None)
    twin.load_state_dict({name: p.detach() for name, p in model.named_parameters()})
    covariance = torch.diag(flat(dict(optimizer.posterior().variance)))
    return per_example(twin, lambda m: m(X, LABELS, COUNTED), own).self_influence(covariance)


@pytest.mark.parametrize("name", KNOWN)
def test_what_it_divides_by_is_seen(name):
    masked, loss, own = KNOWN[name]
    model, optimizer, rows, messages = live(masked, loss)
    assert messages == []
    assert relative_error(rows.self_influence, truth_of(model, optimizer, own)) < 1e-10


@pytest.mark.parametrize("factor", [1 / 3, 24.0, 65536.0])
@pytest.mark.parametrize("name", KNOWN)
def test_a_factor_that_nobody_told_is_warned_of(name, factor):
    masked, loss, own = KNOWN[name]
    *_, messages = live(masked, lambda lp: factor * loss(lp))
    assert len(messages) == 1 and "times the mean of the output of the batch" in messages[0]
    if name == "mean over all":
        assert f"tell watch(model, loss_scale={factor:.4g})" in messages[0]
        model, optimizer, rows, messages = live(masked, lambda lp: factor * loss(lp), loss_scale=factor)
        assert messages == []
        assert relative_error(rows.self_influence, truth_of(model, optimizer, own)) < 1e-10


def test_a_sum_is_one_only_if_that_was_told():
    *_, messages = live(False, lambda lp: -lp.sum())
    assert len(messages) == 1 and "the loss is 24 times the mean of the output" in messages[0]
    model, optimizer, rows, messages = live(False, lambda lp: -lp.sum(), loss_reduction="sum")
    assert messages == []
    assert relative_error(rows.self_influence, truth_of(model, optimizer, lambda lp: -lp.sum(1))) < 1e-10
    *_, messages = live(False, lambda lp: -lp.sum() / 2, loss_reduction="sum")
    assert len(messages) == 1 and "the loss is 0.5 times the sum of the output" in messages[0]


@pytest.mark.parametrize("items", [16, 40])
def test_what_hugging_face_s_trainer_tells_counts_if_the_loss_divides_by_it(items):
    """A text's own loss is then the sum over its tokens."""
    model = LogProbabilities(COUNTED)
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    (-model(X, LABELS, COUNTED, num_items_in_batch=20).sum() / items).backward()
    rows = optimizer.sensitivities()
    truth = truth_of(model, optimizer, lambda lp: -lp.sum(1))
    assert relative_error(rows.self_influence, truth) < 1e-10


@pytest.mark.parametrize(
    "loss",
    [
        lambda lp: (lp * X[..., 0]).mean() / 3,
        lambda lp: lp.exp().square().mean() / 3,
        lambda lp: lp.mean() / 3,
    ],
    ids=["weighted", "curved", "of the other sign"],
)
def test_other_losses_of_the_output_give_nothing_away(loss):
    *_, messages = live(False, loss)
    assert messages == []


@pytest.mark.parametrize("count", [1, 4])
def test_examples_that_are_alike_say_nothing(count):
    """Whatever the loss, their gradients are the same."""
    model = nn.Linear(D, 1).double()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    model(torch.ones(count, D, dtype=torch.float64)).square().mean().backward()
    assert optimizer.sensitivities().self_influence.shape == (count,)


def test_a_gradient_that_is_not_finite_says_nothing():
    *_, messages = live(False, lambda lp: lp.mean() * float("nan"))
    assert messages == []


def test_a_loss_of_one_number_for_each_example():
    class Losses(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(D, C).double()

        def forward(self, x, labels):
            return F.cross_entropy(self.fc(x), labels, reduction="none")

    torch.manual_seed(0)
    model = Losses()
    optimizer = vlearn.IVON(model, lr=0.1, ess=100)
    optimizer.watch(model)
    model(X[:, 0], LABELS[:, 0]).mean().backward()
    covariance = torch.diag(flat(dict(optimizer.posterior().variance)))
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    rows = optimizer.sensitivities()
    twin = Losses()
    twin.load_state_dict(weights)
    truth = per_example(twin, lambda m: m(X[:, 0], LABELS[:, 0]), lambda losses: losses)
    assert relative_error(rows.self_influence, truth.self_influence(covariance)) < 1e-10
    (model(X[:, 0], LABELS[:, 0]).mean() / 2).backward()
    with pytest.warns(UserWarning, match="the loss is 0.5 times the mean of the output"):
        optimizer.sensitivities()
