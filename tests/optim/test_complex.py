"""Complex parameters train as pairs of reals, as in torch.optim; no example has a row of them."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn
from tests.optim.table import IVON, LOOPS, VON_PRICE, equal, states, weights

X = torch.randn(10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 2, (10,), generator=torch.Generator().manual_seed(1))


class Spectral(nn.Module):
    """A filter of frequencies (Li et al., 2021), its weight a complex parameter or a pair of reals."""

    def __init__(self, pairs: bool):
        super().__init__()
        torch.manual_seed(0)
        weight = torch.randn(5, 3, dtype=torch.complex128)
        self.pairs, self.weight = pairs, nn.Parameter(torch.view_as_real(weight).clone() if pairs else weight)
        self.out = nn.Linear(8, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight) if self.pairs else self.weight
        return self.out(torch.fft.irfft(torch.fft.rfft(x) * weight.sum(1), n=8))


def as_pairs(tensors):
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


@pytest.mark.parametrize("settings", [{}, {"foreach": True}, {"mc_samples": 2}], ids=str)
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("entry", [IVON, VON_PRICE], ids=str)
def test_it_takes_the_steps_of_a_pair(entry, loop, settings):
    if settings.get("mc_samples") and loop != "closure":
        pytest.skip("mc_samples is for closures")
    results = []
    for pairs in (False, True):
        model = Spectral(pairs)
        torch.manual_seed(2)
        optimizer = entry.make(model if loop == "plain" else model.parameters(), **settings)
        for _ in range(3):
            LOOPS[loop](optimizer, model, X, Y)
        posterior = optimizer.posterior()
        draws = posterior.sample(torch.Generator().manual_seed(3))
        seeded = {"draws": 2, "generator": torch.Generator().manual_seed(4)}
        results.append(
            [
                *as_pairs(weights(model)),
                *states(optimizer),
                *draws.values(),
                *(posterior.variance[name] for name in posterior.names),
                vlearn.predict(model, posterior, X, **seeded),
                torch.tensor(posterior.entropy()),
                torch.tensor(posterior.kl()),
            ]
        )
    assert equal(*results)


def test_what_shows_the_mean_shows_that_of_complex_weights_too():
    model = Spectral(False)
    optimizer = IVON.make(model)
    mean = model.weight.detach().clone()
    F.cross_entropy(model(X), Y).backward()
    assert not torch.equal(model.weight, mean)
    for shown in (
        model.state_dict()["weight"],
        copy.deepcopy(model).weight,
        pickle.loads(pickle.dumps(model)).weight,
    ):
        assert torch.equal(shown, mean)
    model.eval()
    model(X)
    model.weight.data = model.weight.data.clone()
    optimizer.step()
    saved = optimizer.state_dict()
    other = Spectral(False)
    again = IVON.make(other)
    again.load_state_dict(saved)
    assert equal(states(optimizer), states(again))


def test_a_gradient_that_is_not_finite_is_found():
    model = Spectral(False)
    optimizer = IVON.make(model)
    F.cross_entropy(model(X), Y).backward()
    model.weight.grad[0, 0] = complex(0.0, float("nan"))
    with pytest.raises(FloatingPointError, match="'weight' is not finite"):
        optimizer.step()


def test_no_example_has_a_row_of_complex_weights():
    model = Spectral(False)
    optimizer = IVON.make(model)
    F.cross_entropy(model(X), Y).backward()
    with pytest.raises(RuntimeError, match=r"complex parameter of shape \(5, 3\), of which no example has a gradient"):
        optimizer.sensitivities()
    optimizer.step()
    with pytest.raises(RuntimeError, match="complex parameter"):
        vlearn.sweep(model, optimizer.posterior(), [(X, Y)], F.cross_entropy)


@pytest.mark.parametrize("make", [vlearn.VON, vlearn.VOGN, vlearn.KFACVON, vlearn.FullVON])
def test_optimizers_that_need_rows_refuse_them_at_once(make):
    with pytest.raises(TypeError, match="complex parameters do not have here: use IVON"):
        make(Spectral(False), lr=0.1, ess=10)
