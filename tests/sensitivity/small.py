"""A small network, its batch, and the truth about its live sensitivities."""

import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.per_example import flat, moving, per_example

N, D, C = 6, 5, 3
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


class PlainNorm(nn.LayerNorm):
    """A layer without a rule: its gradients come from the fallback."""


def inputs(seed=5):
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), *between, nn.Linear(8, C)).double()


def optimizer_of(model, **arguments):
    arguments = {"lr": 0.1, "ess": 100, "generator": torch.Generator().manual_seed(1), **arguments}
    return vlearn.IVON(model, **arguments)


def loss_of(model, x):
    return F.cross_entropy(model(x), LABELS[: len(x)])


def rows(output):
    return F.cross_entropy(output, LABELS[: len(output)], reduction="none")


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def truth_at(weights, model, x):
    model.load_state_dict(weights)
    return per_example(model, lambda m: m(x), rows)


def covariance_of(optimizer, model):
    return torch.diag(flat({name: optimizer.posterior().variance[name] for name in moving(model)}))


def assert_equal(left, right):
    for name in ("residual", "self_influence", "prediction_error", "deviation"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None and b is None) or torch.equal(a, b), name


def twin_of(model):
    twin = network(*[PlainNorm(8)] * (len(model) - 3))
    twin.load_state_dict(weights_of(model))
    return twin
