"""The posterior predictive is the average over draws, and leaves the model as it was."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import Model
from vlearn.posterior import Full


def network(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), *between, nn.Linear(4, 2)).double()


def inputs():
    return torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def optimizer_of(model):
    return vlearn.IVON(model, lr=0.1, ess=20.0, num_data=500, generator=torch.Generator().manual_seed(2))


def ensemble(posterior, x, draws, link, make=network):
    """The average by loading each draw into a copy of the model."""
    generator, copy, total = torch.Generator().manual_seed(3), make(), 0
    for _ in range(draws):
        copy.load_state_dict(posterior.sample(generator), strict=False)
        total = total + link(copy.eval()(x).detach())
    return total / draws


@pytest.mark.parametrize("draws", [1, 5])
@pytest.mark.parametrize(
    "link",
    [None, torch.sigmoid, lambda f: f, lambda f: f.argmax(1) == 0],
    ids=["softmax", "sigmoid", "identity", "decision"],
)
def test_it_is_the_average_over_draws(draws, link):
    model = network()
    posterior = optimizer_of(model).posterior()
    arguments = {} if link is None else {"link": link}
    found = vlearn.predict(model, posterior, inputs(), draws, generator=torch.Generator().manual_seed(3), **arguments)
    expected = ensemble(posterior, inputs(), draws, (lambda f: f.softmax(-1)) if link is None else link)
    assert torch.allclose(found.double(), torch.as_tensor(expected).double(), rtol=1e-13)


def test_probabilities_sum_to_one_and_are_less_sure_than_those_of_the_mean():
    model = network()
    posterior = vlearn.IVON(model, lr=0.1, ess=5.0).posterior()
    probabilities = vlearn.predict(model, posterior, 5 * inputs(), draws=200)
    assert torch.allclose(probabilities.sum(1), torch.ones(6, dtype=torch.float64))
    with torch.no_grad():
        sure = model.eval()(5 * inputs()).softmax(1).max(1).values
    assert float(probabilities.max(1).values.mean()) < float(sure.mean())


def test_draws_are_on_the_ess_scale():
    model = Model(lambda m, x: m.fc(x), fc=nn.Linear(1, 1, bias=False)).double()
    optimizer = vlearn.IVON(model, lr=0.1, ess=4.0, num_data=1e8, weight_decay=1e-9)
    draws = [
        float(vlearn.predict(model, optimizer.posterior(), torch.ones(1, 1).double(), draws=1, link=lambda f: f))
        for _ in range(500)
    ]
    assert torch.tensor(draws).var().item() == pytest.approx(1 / 4, rel=5 * (2 / 500) ** 0.5)


def test_a_dense_posterior_predicts_too():
    model = network()
    mean = {name: p.detach() for name, p in model.named_parameters()}
    posterior = Full(mean, 10 * torch.eye(26, dtype=torch.float64), num_data=1)
    found = vlearn.predict(model, posterior, inputs(), 3, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(found, ensemble(posterior, inputs(), 3, lambda f: f.softmax(-1)), rtol=1e-13)


@pytest.mark.parametrize("kind", ["tuple", "dict"])
def test_inputs_may_be_positional_or_keyword_arguments(kind):
    model = Model(lambda m, x, shift: m.net(x) + shift, net=network())
    shift = torch.randn(6, 1, dtype=torch.float64)
    x = (inputs(), shift) if kind == "tuple" else {"shift": shift, "x": inputs()}
    assert vlearn.predict(model, optimizer_of(model).posterior(), x, draws=2).shape == (6, 2)


class Failing(nn.Module):
    error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error("stop")
        return x


@pytest.mark.parametrize("draw", ["none", "active", "waiting"])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_weights_modes_buffers_and_draws_are_as_before(error, draw):
    model = network(Failing(), nn.BatchNorm1d(4)).train()
    model[0].eval()
    optimizer = optimizer_of(model)
    if draw != "none":
        F.cross_entropy(model(inputs()), torch.tensor([0, 1, 1, 0, 1, 0])).backward()
    if draw == "waiting":
        optimizer.eval()

    def state():
        return [
            *((p, p.grad, p.data.clone(), p._version) for p in model.parameters()),
            *((b, b.clone()) for b in model.buffers()),
            *((m, m.training) for m in model.modules()),
        ]

    before = state()
    model[2].error = error
    if error is None:
        vlearn.predict(model, optimizer.posterior(), inputs(), draws=2)
    else:
        with pytest.raises(error):
            vlearn.predict(model, optimizer.posterior(), inputs(), draws=2)
    for old, new in zip(before, state(), strict=True):
        for a, b in zip(old, new, strict=True):
            assert a is b or (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


def test_a_layer_registered_twice_keeps_its_parameters():
    """torch.func.functional_call with tied weights leaves such a layer with plain tensors in their place."""
    shared = nn.Linear(3, 3)
    model = nn.Sequential(shared, nn.Tanh(), shared).double()
    weight = shared.weight
    vlearn.predict(model, optimizer_of(model).posterior(), inputs(), draws=2)
    assert shared.weight is weight and isinstance(shared.weight, nn.Parameter)


def test_tied_weights_are_drawn_once():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    model = nn.Sequential(first, second).double()
    optimizer = vlearn.IVON(model, lr=0.1, ess=5.0)
    generator = torch.Generator().manual_seed(3)
    found = vlearn.predict(model, optimizer.posterior(), inputs(), 1, link=lambda f: f, generator=generator)
    weight = optimizer.posterior().sample(torch.Generator().manual_seed(3))["0.weight"]
    assert torch.allclose(found, inputs() @ weight.mT @ weight.mT, rtol=1e-13)


def test_dropout_is_off_and_torchs_random_numbers_are_not_used():
    model = network(nn.Dropout(0.5))
    posterior = optimizer_of(model).posterior()
    before = torch.get_rng_state()
    one, two = (
        vlearn.predict(model, posterior, inputs(), 2, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(one, two) and torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("draws", [0, -3])
def test_a_number_of_draws_that_is_not_positive_is_refused(draws):
    model = network()
    with pytest.raises(ValueError) as error:
        vlearn.predict(model, optimizer_of(model).posterior(), inputs(), draws=draws)
    assert str(error.value) == f"draws={draws}, but it must be positive: use 64."


def test_a_posterior_of_another_model_is_refused():
    other = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError) as error:
        vlearn.predict(network(), optimizer_of(other).posterior(), inputs())
    assert str(error.value) == (
        "the posterior's '0.weight' has shape (2, 2), but that of this Sequential has (4, 3): pass the model that was "
        "trained."
    )


def test_a_stale_posterior_is_refused():
    model = network()
    optimizer = optimizer_of(model)
    posterior = optimizer.posterior()
    F.cross_entropy(model(inputs()), torch.zeros(6, dtype=torch.long)).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="this posterior is stale"):
        vlearn.predict(model, posterior, inputs())
    assert model.training


@pytest.mark.parametrize(
    "make",
    [
        lambda x: nn.Linear(3, 1).double()(x),
        lambda x: nn.Conv1d(1, 3, 2).double()(x.unsqueeze(1)),
        lambda x: (x, x),
        lambda x: {"logits": x},
        lambda x: x.argmax(1),
        lambda x: x.sum(1),
    ],
    ids=["one logit", "[N, C, T]", "tuple", "dict", "decisions", "[N]"],
)
def test_outputs_that_are_no_scores_of_classes_need_a_link(make):
    model = Model(lambda m, x: make(m.net(x)), net=nn.Linear(3, 3)).double()
    posterior = optimizer_of(model).posterior()
    with pytest.raises(ValueError, match="the model's output has .* pass link="):
        vlearn.predict(model, posterior, inputs(), draws=2)
    assert vlearn.predict(model, posterior, inputs(), draws=2, link=lambda output: torch.ones(6)).shape == (6,)


def test_a_second_reference_to_a_parameter_is_drawn_too():
    class ByList(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(2, 3, dtype=torch.float64))
            self.weights = [self.weight]

        def forward(self, x):
            return x @ self.weights[0].T

    model = ByList()
    posterior, mean = optimizer_of(model).posterior(), model.weight.detach().clone()
    found = vlearn.predict(model, posterior, inputs(), 3, link=lambda f: f, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    weight = sum(posterior.sample(generator)["weight"] for _ in range(3)) / 3
    assert torch.allclose(found, inputs() @ weight.T, rtol=1e-12)
    assert torch.equal(model.weight, mean)
