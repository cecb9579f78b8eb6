"""What a stranger may pass in the wrong place is refused by name, before anything is computed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.sensitivity.small import LABELS, N, inputs, network, optimizer_of
from vlearn.sensitivity import measures

LOADER = [(inputs(), LABELS, torch.arange(N))]
DATASET = TensorDataset(inputs(), LABELS)
LOSS = F.cross_entropy


@pytest.fixture
def trained():
    model = network()
    return model, optimizer_of(model)


TAKE_A_POSTERIOR = {
    "sweep": lambda model, given: vlearn.sweep(model, given, LOADER, LOSS),
    "sweep without scale": lambda model, given: vlearn.sweep(model, given, LOADER, LOSS, loo_loss=False, leverage=None),
    "influence": lambda model, given: vlearn.influence(model, given, LOADER, LOADER, LOSS),
    "near exact influence": lambda model, given: vlearn.influence(model, given, LOADER, LOADER, LOSS, refine=2),
    "leave_group_out": lambda model, given: vlearn.leave_group_out(model, given, LOADER, [[1, 2]], LOSS),
    "predict": lambda model, given: vlearn.predict(model, given, inputs()),
    "measured_scale": lambda model, given: vlearn.posterior.measured_scale(model, given, LOADER, LOSS),
    "cooks_distance": lambda model, given: measures.cooks_distance(model, given, LOADER, LOSS),
    "influence_norm": lambda model, given: measures.influence_norm(model, given, LOADER, LOSS),
    "memorization": lambda model, given: measures.memorization(model, given, LOADER, LOSS),
}


@pytest.mark.parametrize("name", TAKE_A_POSTERIOR)
def test_an_optimizer_is_not_its_posterior(name, trained):
    model, optimizer = trained
    with pytest.raises(TypeError, match=r"posterior is the IVON itself.*: optimizer\.posterior\(\)"):
        TAKE_A_POSTERIOR[name](model, optimizer)
    with pytest.raises(TypeError, match="posterior is of type list"):
        TAKE_A_POSTERIOR[name](model, LOADER)


TAKE_A_LOADER = {
    "sweep": lambda model, optimizer, *given: vlearn.sweep(model, optimizer.posterior(), *given),
    "fit": lambda model, optimizer, *given: vlearn.posterior.fit(model, *given),
}


@pytest.mark.parametrize("name", TAKE_A_LOADER)
def test_loader_and_loss_are_told_apart(name, trained):
    take = TAKE_A_LOADER[name]
    with pytest.raises(TypeError, match="loss_fn is of type list"):
        take(*trained, LOSS, LOADER)
    with pytest.raises(TypeError, match=r"loss_fn is the class CrossEntropyLoss.*: pass CrossEntropyLoss\(\)"):
        take(*trained, LOADER, nn.CrossEntropyLoss)
    with pytest.raises(TypeError, match="the loader is cross_entropy, which gives no batches"):
        take(*trained, LOSS, LOSS)
    with pytest.raises(TypeError, match=r"the loader is a TensorDataset, which gives single examples: pass DataLoader"):
        take(*trained, DATASET, LOSS)
    take(*trained, DataLoader(DATASET, N), LOSS)


def test_a_model_is_a_module(trained):
    model, optimizer = trained
    posterior = optimizer.posterior()
    with pytest.raises(TypeError, match="model is of type Diagonal"):
        vlearn.sweep(posterior, model, LOADER, LOSS)
    with pytest.raises(TypeError, match="model is of type list"):
        vlearn.posterior.fit(LOADER, model, LOSS)
    with pytest.raises(TypeError, match="model is of type function"):
        measures.influence_norm(LOSS, posterior, LOADER, LOSS)


def test_predict_takes_one_batch(trained):
    model, optimizer = trained
    with pytest.raises(TypeError, match="x is a DataLoader, but predict takes one batch"):
        vlearn.predict(model, optimizer.posterior(), DataLoader(DATASET, N))


@pytest.mark.parametrize("output", [lambda z: z.log_softmax(1), lambda z: z.view(N, -1)], ids=["made", "a view"])
def test_a_selector_makes_no_output_of_its_own(output, trained):
    model, posterior = trained[0], trained[1].posterior()
    for of in (
        lambda **options: vlearn.sweep(model, posterior, [(inputs(), LABELS)], F.nll_loss, progress=False, **options),
        lambda **options: vlearn.posterior.fit(model, [(inputs(), LABELS)], F.nll_loss, progress=False, **options),
    ):
        with pytest.raises(ValueError, match="makes a tensor of its own, but it must return one of the tensors"):
            of(output=output)
