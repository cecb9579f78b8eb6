"""Posteriors that are saved and loaded are the same."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.optim.table import FAMILY, Entry, family
from tests.oracles.per_example import relative_error
from tests.posterior.test_fit import in_batches, mlp
from vlearn.gaussians.gaussian import Gaussian
from vlearn.posterior import from_optimizer
from vlearn.posterior.fit import STRUCTURES, fit
from vlearn.posterior.storage import load


def swept(model: nn.Module, posterior: Any, x: torch.Tensor) -> Any:
    return vlearn.sweep(model, posterior, in_batches(x), F.cross_entropy, leverage="exact", progress=False)


def same(found: Any, posterior: Any, model: nn.Module, x: torch.Tensor) -> None:
    assert type(found) is type(posterior) and found.names == posterior.names
    assert found.num_data == posterior.num_data and found.prior_precision == posterior.prior_precision
    for name in posterior.names:
        assert torch.equal(found.mean[name], posterior.mean[name])
        assert relative_error(found.variance[name], posterior.variance[name]) < 1e-12
        assert relative_error(found.draw_variance[name], posterior.draw_variance[name]) < 1e-12
    before, after = swept(model, posterior, x), swept(model, found, x)
    for column in ("self_influence", "loo_loss", "leverage"):
        assert relative_error(getattr(after, column), getattr(before, column)) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_fit_is_the_same_after_a_round_trip(structure: str, tmp_path: Path) -> None:
    model, x = mlp()
    posterior = fit(model, in_batches(x), F.cross_entropy, structure, progress=False)
    posterior.save(tmp_path / "posterior.pt")
    for found in (load(tmp_path / "posterior.pt"), load(tmp_path / "posterior.pt", model)):
        same(found, posterior, model, x)
    with torch.no_grad():  # the one that belongs to the model is at its own mean all the same
        model[0].weight.add_(1.0)
    assert torch.equal(swept(model, found, x).loss, swept(model, posterior, x).loss)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_it_pickles_alone_and_with_its_model(structure: str) -> None:
    model, x = mlp()
    posterior = fit(model, in_batches(x), F.cross_entropy, structure, progress=False).stopped_at(30.0)
    same(pickle.loads(pickle.dumps(posterior)), posterior, model, x)
    model_too, found = pickle.loads(pickle.dumps((model, posterior)))
    with torch.no_grad():
        model_too[2].weight.add_(1.0)
    assert torch.equal(swept(model_too, found, x).loss, swept(model, posterior, x).loss)


@family
def test_so_is_an_optimizers_state(entry: Entry, tmp_path: Path) -> None:
    model, x = mlp()
    optimizer = entry.make(model, ess=40, num_data=24)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
        optimizer.step()
    posterior = optimizer.posterior()
    posterior.save(tmp_path / "posterior.pt")
    same(load(tmp_path / "posterior.pt", model), posterior, model, x)
    clone = posterior.clone()
    for live in (posterior, clone):
        same(pickle.loads(pickle.dumps(live)), posterior, model, x)
        for model_too, found in (pickle.loads(pickle.dumps((model, live))), copy.deepcopy((model, live))):
            assert all(found.parameters[name] is p for name, p in model_too.named_parameters())
            same(found, posterior, model_too, x)
    F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    optimizer.step()
    with pytest.raises(RuntimeError):
        posterior.save(tmp_path / "stale.pt")
    with pytest.raises(RuntimeError):
        pickle.dumps(posterior)
    assert torch.equal(pickle.loads(pickle.dumps(clone)).mean["0.weight"], clone.mean["0.weight"])
    assert not (tmp_path / "stale.pt").exists() and len(FAMILY) > 5


def test_a_ranking_posterior_still_only_ranks(tmp_path: Path) -> None:
    model, x = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    F.cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
    optimizer.step()
    from_optimizer(optimizer, model, 24).save(tmp_path / "sgd.pt")
    with pytest.raises(RuntimeError, match="comes from SGD"):
        swept(model, load(tmp_path / "sgd.pt", model), x)


def test_the_file_is_read_without_pickled_code_and_holds_no_more_than_it_needs(tmp_path: Path) -> None:
    model, x = mlp()
    fit(model, in_batches(x), F.cross_entropy, "diagonal", progress=False).save(tmp_path / "posterior.pt")
    state = torch.load(tmp_path / "posterior.pt", weights_only=True)
    assert state["kind"] == "Diagonal" and set(state["mean"]) == {name for name, _ in model.named_parameters()}
    assert (tmp_path / "posterior.pt").stat().st_size < 20_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model[2].weight.data.mul_(1.01), "the weights '2.weight' of this Sequential are not those"),
        (lambda model: model.__setitem__(2, nn.Linear(5, 4).double()), "'2.weight' has shape"),
        (lambda model: model.__setitem__(2, nn.Linear(5, 3, bias=False).double()), "the posterior has '2.bias'"),
        (lambda model: model.append(model.__dict__.setdefault("_none", nn.Identity())), None),
    ],
)
def test_another_model_is_refused_by_name(change: Any, message: str | None, tmp_path: Path) -> None:
    model, x = mlp()
    fit(model, in_batches(x), F.cross_entropy, progress=False).save(tmp_path / "posterior.pt")
    other = copy.deepcopy(model)
    change(other)
    if message is None:  # nothing that the posterior is about
        assert load(tmp_path / "posterior.pt", other).parameters
        return
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "posterior.pt", other)


def test_a_structure_that_cannot_be_saved_says_so_and_writes_nothing(tmp_path: Path) -> None:
    class Spherical(Gaussian):
        def block(self, group: tuple[str, ...]) -> Any:
            raise AssertionError

    with pytest.raises(NotImplementedError, match="Spherical cannot be saved: it has no block_state"):
        Spherical({"w": torch.ones(2)}, [("w",)], 10).save(tmp_path / "posterior.pt")
    assert not (tmp_path / "posterior.pt").exists()


def test_a_state_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    torch.save({"kind": "Mixture", "mean": {}}, tmp_path / "posterior.pt")
    with pytest.raises(ValueError, match="kind 'Mixture' is that of no posterior: there are .*Diagonal"):
        load(tmp_path / "posterior.pt")


def test_another_file_is_refused(tmp_path: Path) -> None:
    torch.save({"weights": torch.ones(3)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="holds no posterior"):
        load(tmp_path / "weights.pt")
    (tmp_path / "text.pt").write_text("hello world")
    with pytest.raises(ValueError, match=r"text\.pt holds no posterior"):
        load(tmp_path / "text.pt")
