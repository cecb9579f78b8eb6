"""The diagonal posterior against torch.distributions, on both of its scales."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence

import vlearn
from vlearn.posterior import Diagonal

NUM_DATA, ESS, WEIGHT_DECAY = 40.0, 1000.0, 0.3


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def trained(model, **arguments):
    arguments = {"lr": 0.1, "ess": ESS, "num_data": NUM_DATA, "weight_decay": WEIGHT_DECAY, **arguments}
    optimizer = vlearn.IVON(model, **arguments)
    optimizer.posterior()
    for state in optimizer.state.values():
        state["hessian"].uniform_(0.5, 3.0)
    return optimizer


def step(model, optimizer):
    optimizer.zero_grad()
    F.cross_entropy(model(torch.randn(5, 3, dtype=torch.float64)), torch.tensor([0, 1, 1, 0, 1])).backward()
    optimizer.step()


def small():
    mean = {"a": torch.tensor([1.0, -2.0, 0.5]).double(), "b": torch.tensor([[3.0]]).double()}
    hessian = {"a": torch.tensor([2.0, 0.1, 5.0]).double(), "b": torch.tensor([[1.0]]).double()}
    return Diagonal(mean, hessian, {"a": 0.5, "b": 0.1}, {"a": ESS, "b": ESS / 2}, NUM_DATA)


def as_distribution(posterior, variance):
    means = torch.cat([posterior.mean[name].flatten() for name in posterior.names])
    variances = torch.cat([variance[name].flatten() for name in posterior.names])
    return Independent(Normal(means, variances.sqrt()), 1)


# -- from numbers of any origin -----------------------------------------------------------------------------------


def test_from_precision_is_the_posterior_of_that_mean_and_precision():
    expected = small()
    posterior = Diagonal.from_precision(expected.mean, expected.precision, NUM_DATA)
    assert posterior.num_data == NUM_DATA and posterior.names == ("a", "b")
    for name in posterior.names:
        assert torch.equal(posterior.mean[name], expected.mean[name])
        assert torch.allclose(posterior.variance[name], expected.variance[name], rtol=1e-14)
        assert torch.allclose(posterior.draw_variance[name], expected.variance[name], rtol=1e-14)


def test_from_precision_has_the_divergence_from_its_prior():
    mean = {"a": torch.tensor([1.0, -2.0]).double()}
    posterior = Diagonal.from_precision(mean, {"a": torch.tensor([5.0, 3.0]).double()}, 10, prior_precision=2.0)
    prior = Independent(Normal(torch.zeros(2).double(), torch.full((2,), 0.5).double().sqrt()), 1)
    expected = kl_divergence(as_distribution(posterior, posterior.variance), prior)
    assert posterior.kl() == pytest.approx(float(expected), rel=1e-12)
    with pytest.raises(ValueError, match="its prior is improper"):
        Diagonal.from_precision(mean, {"a": torch.ones(2)}, 10).kl()


def test_from_precision_gives_the_sweep_and_the_prediction_of_the_optimizer_it_was_read_from():
    model = network()
    posterior = trained(model, ess=NUM_DATA).posterior()
    again = Diagonal.from_precision(posterior.mean, posterior.precision, NUM_DATA)
    data = [(torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1]))]
    one, two = (vlearn.sweep(model, p, data, loss_fn=F.cross_entropy) for p in (posterior, again))
    assert torch.allclose(one.deviation, two.deviation, rtol=1e-12)
    one, two = (
        vlearn.predict(model, p, data[0][0], 3, generator=torch.Generator().manual_seed(1)) for p in (posterior, again)
    )
    assert torch.allclose(one, two, rtol=1e-12)


@pytest.mark.parametrize(
    ("mean", "precision", "num_data", "message"),
    [
        ({"a": (2,)}, {"a": torch.ones(2)}, 0, "num_data=0, but it must be positive: use the number of training"),
        ({"a": (2,)}, {"b": torch.ones(2)}, 5, "'a' is in only one of mean and precision: give both by the same names"),
        ({"a": (2,)}, {"a": torch.ones(3)}, 5, r"precision\['a'\] has shape \(3,\), but the mean has \(2,\)"),
        (
            {"a": (2,)},
            {"a": torch.tensor([1.0, 0.0])},
            5,
            r"precision\['a'\] is not positive and finite: add the prior",
        ),
        ({"a": (1,)}, {"a": torch.tensor([float("nan")])}, 5, r"precision\['a'\] is not positive and finite"),
    ],
)
def test_from_precision_refuses_what_is_no_posterior(mean, precision, num_data, message):
    with pytest.raises(ValueError, match=message):
        Diagonal.from_precision({name: torch.zeros(shape) for name, shape in mean.items()}, precision, num_data)


# -- scales -------------------------------------------------------------------------------------------------------


def test_sensitivities_use_num_data_and_draws_use_ess():
    model = network()
    optimizer = trained(model)
    posterior = optimizer.posterior()
    assert posterior.num_data == NUM_DATA
    for name, p in model.named_parameters():
        precision = optimizer.state[p]["hessian"] + WEIGHT_DECAY
        assert torch.allclose(posterior.precision[name], NUM_DATA * precision, rtol=1e-14)
        assert torch.allclose(posterior.variance[name], 1 / (NUM_DATA * precision), rtol=1e-14)
        assert torch.allclose(posterior.draw_variance[name], 1 / (ESS * precision), rtol=1e-14)
        assert torch.equal(posterior.mean[name], p)


def test_num_data_is_ess_unless_given():
    posterior = trained(network(), num_data=None).posterior()
    assert posterior.num_data == ESS
    assert all(torch.equal(posterior.variance[name], posterior.draw_variance[name]) for name in posterior.names)


def test_groups_keep_their_own_weight_decay_and_ess():
    model = network()
    groups = [
        {"params": model[0].parameters(), "weight_decay": 0.5, "ess": 10.0},
        {"params": model[2].parameters(), "weight_decay": 0.0},
    ]
    optimizer = vlearn.IVON(groups, lr=0.1, ess=ESS, num_data=NUM_DATA, weight_decay=WEIGHT_DECAY, hess_init=2.0)
    posterior = optimizer.posterior()
    assert posterior.names == ("param_0", "param_1", "param_2", "param_3")
    assert torch.allclose(posterior.variance["param_0"], torch.tensor(1 / (NUM_DATA * 2.5)).double())
    assert torch.allclose(posterior.draw_variance["param_0"], torch.tensor(1 / (10 * 2.5)).double())
    assert torch.allclose(posterior.variance["param_3"], torch.tensor(1 / (NUM_DATA * 2.0)).double())
    assert torch.allclose(posterior.draw_variance["param_3"], torch.tensor(1 / (ESS * 2.0)).double())


def test_reading_it_changes_no_state():
    optimizer = trained(network())
    posterior = optimizer.posterior()
    before = copy.deepcopy(optimizer.state_dict())
    posterior.variance["0.weight"].zero_()
    posterior.draw_variance["0.weight"].zero_()
    posterior.precision["0.weight"].zero_()
    posterior.kl(), posterior.entropy(), posterior.sample()
    for old, new in zip(before["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)


# -- divergences --------------------------------------------------------------------------------------------------


def test_entropy_and_divergence_are_those_of_torch_distributions():
    posterior = small()
    q = as_distribution(posterior, posterior.variance)
    assert posterior.entropy() == pytest.approx(float(q.entropy()), rel=1e-13)
    scales = torch.tensor([0.5, 0.5, 0.5, 0.1], dtype=torch.float64)
    prior = Independent(Normal(torch.zeros(4).double(), (1 / (NUM_DATA * scales)).sqrt()), 1)
    assert posterior.kl() == pytest.approx(float(kl_divergence(q, prior)), rel=1e-13)
    assert isinstance(posterior.kl(), float) and isinstance(posterior.entropy(), float)


def test_the_divergence_from_the_prior_is_zero_at_the_prior():
    zeros = {"a": torch.zeros(3).double()}
    assert Diagonal(zeros, zeros, {"a": 0.7}, {"a": 1.0}, NUM_DATA).kl() == pytest.approx(0, abs=1e-14)


def test_a_zero_weight_decay_has_no_divergence_but_an_entropy():
    posterior = trained(network(), weight_decay=0.0).posterior()
    assert posterior.entropy() < 0
    with pytest.raises(ValueError) as error:
        posterior.kl()
    assert str(error.value) == (
        "weight_decay=0 for '0.weight', so its prior is improper and the KL divergence infinite: use a positive "
        "weight_decay."
    )


# -- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda m: m, ("0.weight", "0.bias", "2.weight", "2.bias")),
        (lambda m: m.named_parameters(), ("0.weight", "0.bias", "2.weight", "2.bias")),
        (lambda m: m.parameters(), ("param_0", "param_1", "param_2", "param_3")),
        (lambda m: [{"params": [m[2].weight]}, {"params": [m[0].bias]}], ("param_0", "param_1")),
    ],
    ids=["model", "named", "unnamed", "groups"],
)
def test_parameters_are_called_by_their_names_or_their_positions(make, names):
    model = network()
    posterior = vlearn.IVON(make(model), lr=0.1, ess=ESS).posterior()
    assert posterior.names == tuple(posterior.variance) == tuple(posterior.mean) == names
    assert len(posterior.variance) == len(names)
    assert all(posterior.variance[name].shape == p.shape for name, p in posterior.parameters.items())


def test_a_name_it_does_not_have_is_answered_with_those_it_has():
    with pytest.raises(KeyError, match=r"no parameter named 'c'; there are a, b"):
        small().variance["c"]


def test_it_prints_its_size():
    assert repr(small()) == "Diagonal(2 parameters, num_data=40)"


# -- staleness ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "read",
    [
        lambda q: q.mean["0.weight"],
        lambda q: q.variance["0.weight"],
        lambda q: q.precision["0.weight"],
        lambda q: q.draw_variance["0.weight"],
        lambda q: q.sample(),
        lambda q: q.kl(),
        lambda q: q.entropy(),
        lambda q: q.clone(),
        lambda q: q.covariance(q.parameters),
    ],
)
@pytest.mark.parametrize("change", ["step", "load_state_dict"])
def test_a_view_is_stale_once_the_state_has_changed(read, change):
    model = network()
    optimizer = trained(model)
    posterior = optimizer.posterior()
    read(posterior)
    step(model, optimizer) if change == "step" else optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError) as error:
        read(posterior)
    assert str(error.value) == (
        "this posterior is stale, the optimizer has stepped since: call optimizer.posterior() again, or keep one with "
        ".clone()."
    )
    read(optimizer.posterior())


def test_a_clone_survives_the_step_with_its_values():
    model = network()
    optimizer = trained(model)
    clone = optimizer.posterior().clone()
    kept = {name: (clone.mean[name].clone(), clone.variance[name]) for name in clone.names}
    numbers = clone.kl(), clone.entropy()
    step(model, optimizer)
    assert all(torch.equal(clone.mean[n], m) and torch.equal(clone.variance[n], v) for n, (m, v) in kept.items())
    assert (clone.kl(), clone.entropy()) == numbers
    assert not torch.equal(clone.mean["0.weight"], model[0].weight)
    assert clone.clone().kl() == numbers[0]


# -- the mean while a draw is in the weights ------------------------------------------------------------------------


def test_the_mean_is_read_wherever_it_waits():
    model = network()
    optimizer = trained(model)
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(torch.randn(5, 3, dtype=torch.float64)), torch.zeros(5, dtype=torch.long)).backward()
    assert not torch.equal(model[0].weight, mean["0.weight"])
    posterior = optimizer.posterior()
    assert all(torch.equal(posterior.mean[name], m) for name, m in mean.items())
    clone = posterior.clone()
    with posterior.at_mean():
        assert all(torch.equal(p, mean[name]) for name, p in model.named_parameters())
    assert not torch.equal(model[0].weight, mean["0.weight"])
    assert all(torch.equal(clone.mean[name], m) for name, m in mean.items())


# -- draws --------------------------------------------------------------------------------------------------------


def test_draws_have_the_mean_and_the_variance_of_the_ess_scale():
    """20,000 draws, each entry's mean and variance within 5 standard errors."""
    posterior, generator, count = small(), torch.Generator().manual_seed(0), 20_000
    draws = [posterior.sample(generator) for _ in range(count)]
    for name in posterior.names:
        values = torch.stack([draw[name] for draw in draws])
        variance = posterior.draw_variance[name]
        assert bool(((values.mean(0) - posterior.mean[name]).abs() < 5 * (variance / count).sqrt()).all())
        assert bool(((values.var(0) - variance).abs() < 5 * variance * (2 / count) ** 0.5).all())


def test_draws_are_reproducible_by_their_generator_and_leave_torchs_own_alone():
    posterior = small()
    before = torch.get_rng_state()
    one, two = (posterior.sample(torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in posterior.names)
    assert torch.equal(before, torch.get_rng_state())


def test_narrow_weights_have_wide_variances_and_narrow_draws():
    model = network().bfloat16()
    posterior = vlearn.IVON(model, lr=0.1, ess=ESS).posterior()
    assert posterior.variance["0.weight"].dtype == torch.float32
    clone = posterior.clone()
    assert clone.variance["0.weight"].dtype == torch.float32
    weights = {name: draw.dtype for name, draw in posterior.sample().items()}
    assert set(weights.values()) <= {torch.bfloat16, torch.float32}
    assert vlearn.predict(model, posterior, torch.randn(4, 3).bfloat16(), draws=2).shape == (4, 2)
