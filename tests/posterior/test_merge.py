"""The product of posteriors over one prior: that of all data where each is exact, and refused where there is none."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import vlearn
from tests.optim.test_prior import closed_form, learned, regression
from tests.oracles.per_example import relative_error
from tests.posterior.structures import STRUCTURES, posterior_of
from vlearn.posterior import Diagonal, Full, merge


@pytest.mark.parametrize("with_prior", [False, True])
def test_of_linear_regressions_on_parts_of_the_data_it_is_the_one_on_all(with_prior: bool) -> None:
    """With a prior that is a posterior itself, with correlations, too."""
    tasks = regression()
    delta = 2.0
    base, mean = delta * torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    priors: list[dict[str, Any]] = [{"weight_decay": delta / len(x)} for x, _ in tasks]
    if with_prior:
        x0, y0 = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
        priors = [{"prior": learned(vlearn.FullVON, (x0, y0), weight_decay=delta / 9)}] * 2
        mean, base = closed_form(x0, y0, base, mean)
    merged = merge([learned(vlearn.FullVON, task, **prior) for task, prior in zip(tasks, priors, strict=True)])
    x, y = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    expected, precision = closed_form(x, y, base, mean)
    assert isinstance(merged, Full) and merged.num_data == len(x)
    assert relative_error(merged.mean["weight"].squeeze(0), expected) < 1e-10
    assert relative_error(merged.block(("weight",)).precision(), precision) < 1e-10
    kl = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(expected, precision_matrix=precision),
        torch.distributions.MultivariateNormal(mean, precision_matrix=base),
    )
    assert merged.kl() == pytest.approx(float(kl), rel=1e-8)


def test_of_independent_weights_diagonal_posteriors_are_enough() -> None:
    tasks = regression(orthogonal=True)
    delta = 2.0
    posteriors = [learned(vlearn.VON, (x, y), weight_decay=delta / len(x)) for x, y in tasks]
    merged = merge(posteriors)
    x, y = (torch.cat(parts) for parts in zip(*tasks, strict=True))
    unit = torch.eye(3, dtype=torch.float64)
    mean, precision = closed_form(x, y, delta * unit, torch.zeros(3, dtype=torch.float64))
    assert isinstance(merged, Diagonal)
    assert relative_error(merged.mean["weight"].squeeze(0), mean) < 1e-10
    assert relative_error(merged.precision["weight"].squeeze(0), precision.diagonal()) < 1e-10
    assert float(merged.prior_precision["weight"]) == pytest.approx(delta)
    assert merged.ess["weight"] == sum(posterior.ess["weight"] for posterior in posteriors)
    # The next task learns on from both.
    third = learned(vlearn.VON, tasks[0], prior=merged)
    assert (
        relative_error(
            third.precision["weight"], merged.precision["weight"] + posteriors[0].precision["weight"] - delta
        )
        < 1e-9
    )


def test_it_belongs_to_the_model_of_the_first_and_holds_its_mean_in_a_sweep() -> None:
    (x, y), other = regression()
    model = nn.Linear(3, 1, bias=False).double()
    before = model.weight.detach().clone()
    optimizer = vlearn.IVON(model, 0.1, 20, weight_decay=0.1)
    second = learned(vlearn.VON, other, weight_decay=2 / len(other[0]))
    merged = merge([optimizer.posterior(), second])
    table = vlearn.sweep(model, merged, [(x, y.unsqueeze(1))], nn.functional.mse_loss, progress=False)
    loss = (x @ merged.mean["weight"].squeeze(0) - y).square()
    assert relative_error(table.loss, loss) < 1e-12
    assert torch.equal(model.weight.detach(), before)
    model.load_state_dict(dict(merged.mean), strict=False)
    assert torch.equal(model.weight.detach(), merged.mean["weight"])


def test_one_posterior_alone_is_itself() -> None:
    posterior = learned(vlearn.VON, regression()[0], weight_decay=0.1)
    merged = merge([posterior])
    assert relative_error(merged.mean["weight"], posterior.mean["weight"]) < 1e-14
    assert relative_error(merged.precision["weight"], posterior.precision["weight"]) < 1e-14


@pytest.mark.parametrize("structure", STRUCTURES)
def test_precisions_are_those_of_the_dense_covariance(structure: str) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).double()
    posterior, covariance = posterior_of(dict(model.named_parameters()), structure)
    precision = covariance.inverse()
    flat = torch.cat([posterior.precision[name].reshape(-1) for name in posterior.names])
    assert relative_error(flat, precision.diagonal()) < 1e-9
    sizes = dict(zip(posterior.names, [p.numel() for p in model.parameters()], strict=True))
    ends = torch.tensor(list(sizes.values())).cumsum(0).tolist()
    at = {name: torch.arange(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}
    for group in dict.fromkeys(posterior.groups.values()):
        rows = torch.cat([at[name] for name in group])
        assert relative_error(posterior.block(group).precision(), precision[rows][:, rows]) < 1e-9
    nearest = Diagonal.nearest(posterior)
    assert relative_error(torch.cat([nearest.precision[n].reshape(-1) for n in nearest.names]), flat) < 1e-12
    for name in posterior.names:
        assert torch.equal(nearest.mean[name], posterior.mean[name])
        assert nearest.ess[name] == posterior.ess[name]


def test_the_nearest_diagonal_is_a_copy_with_the_same_prior() -> None:
    (x, y), other = regression()
    first = learned(vlearn.FullVON, (x, y), weight_decay=0.1)
    second = learned(vlearn.FullVON, other, prior=first)
    nearest = Diagonal.nearest(second)
    assert relative_error(torch.as_tensor(nearest.prior_precision["weight"]), first.precision["weight"]) < 1e-12
    assert relative_error(nearest.prior_mean["weight"], first.mean["weight"]) < 1e-12
    # Products and diagonals change places.
    merged = merge([nearest, Diagonal.nearest(learned(vlearn.FullVON, (x, y), prior=first))])
    whole = merge([second, learned(vlearn.FullVON, (x, y), prior=first)])
    assert relative_error(merged.precision["weight"], whole.precision["weight"]) < 1e-12


def refused(kind: type[Exception], message: str) -> Any:
    return pytest.raises(kind, match=re.escape(message))


def simple(precision: float = 50.0, prior: float = 2.0, num_data: float = 10.0, name: str = "w") -> Diagonal:
    mean = {name: torch.zeros(2, dtype=torch.float64)}
    return Diagonal.from_precision(mean, {name: torch.full((2,), precision).double()}, num_data, prior)


def test_what_has_no_product_of_its_kind_is_refused() -> None:
    with refused(ValueError, "there is nothing to merge: give a sequence of posteriors."):
        merge([])
    model = nn.Linear(4, 3).double()
    kronecker, _ = posterior_of(dict(model.named_parameters()), "layers")
    with refused(
        ValueError, "are of the kind Kronecker, but only a product of Diagonal ones or of Full ones is of their"
    ):
        merge([kronecker, kronecker])
    with refused(ValueError, "of the kind Diagonal, Kronecker"):
        merge([simple(), kronecker])
    with refused(ValueError, "the posteriors are not of the same parameters in the same order"):
        merge([simple(), simple(name="v")])
    with refused(ValueError, "the prior of 'w' is not the same in all posteriors: give their optimizers one prior"):
        merge([simple(), simple(prior=3.0)])
    moved = simple()
    moved.prior_mean = {"w": torch.ones(2, dtype=torch.float64)}
    with refused(ValueError, "the prior of 'w' is not the same in all posteriors"):
        merge([simple(), moved])
    with refused(
        ValueError, "the prior precision of 'w' is zero or unknown, but a product over one prior divides by it"
    ):
        merge([simple(prior=0.0), simple(prior=0.0)])
    with refused(ValueError, "the precision that is left of 'w' is not positive, for its curvature is negative where"):
        merge([simple(precision=0.5), simple(precision=0.6)])
    with refused(
        ValueError, "a posterior has the training time 3, so its precision is not the sum of curvature and prior"
    ):
        merge([simple().stopped_at(3.0), simple()])
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    with refused(RuntimeError, "this posterior gives no product with others: "):
        merge([vlearn.posterior.from_optimizer(sgd, model, num_data=30)] * 2)
    optimizer = vlearn.IVON(model, 0.1, 50)
    stale = optimizer.posterior()
    model(torch.ones(2, 4).double()).square().mean().backward()
    optimizer.step()
    with refused(RuntimeError, "keep one with .clone()."):
        merge([stale, stale])


def test_dense_posteriors_of_other_priors_or_without_a_product_are_refused() -> None:
    tasks = regression()
    first = learned(vlearn.FullVON, tasks[0], weight_decay=0.1)
    second = learned(vlearn.FullVON, tasks[1], prior=first)
    with refused(ValueError, "the prior of 'weight' is not the same in all posteriors"):
        merge([first, second])
    mean = {"w": torch.zeros(2, dtype=torch.float64)}
    narrow = torch.tensor([[1.1, 1.0], [1.0, 1.1]], dtype=torch.float64)  # below the prior in one direction
    posterior = Full(mean, narrow, 10, prior_precision={"w": 1.0})
    with refused(
        ValueError, "the precision that is left is not positive definite, for the curvature is negative where"
    ):
        merge([posterior, Full(mean, torch.tensor([[1.2, 0.5], [0.5, 1.2]]).double(), 10, prior_precision={"w": 1.0})])
