"""Influence of training on test examples equals explicit gradients, in any chunks."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import vlearn
from tests.oracles.networks import CASES
from tests.oracles.per_example import moving, per_example, relative_error
from tests.oracles.refits import ridge
from tests.posterior.structures import STRUCTURES, posterior_of
from tests.sensitivity.test_closed_form import half_square
from tests.sensitivity.test_refined import regression

LABELS = torch.arange(12) % 3


def influence_of(model, posterior, train, test, loss_fn=F.cross_entropy, **arguments):
    return vlearn.influence(model, posterior, train, test, loss_fn, progress=False, **arguments)


def network(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), *between, nn.Linear(8, 3)).double()


def inputs(count=12, seed=5):
    return torch.randn(count, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def arguments_of(model=None):
    model = network() if model is None else model
    train, test = TensorDataset(inputs(), LABELS), TensorDataset(inputs(7, 6), LABELS[:7])
    loaders = DataLoader(train, batch_size=5), DataLoader(test, batch_size=3)
    return model, vlearn.IVON(model, lr=0.1, ess=50).posterior(), *loaders


def truth_of(model, covariance):
    model.eval()
    gradients = [
        per_example(model, lambda m, x=x: m(x), lambda f, y=y: F.cross_entropy(f, y, reduction="none")).gradients
        for x, y in ((inputs(), LABELS), (inputs(7, 6), LABELS[:7]))
    ]
    return gradients[0] @ covariance @ gradients[1].mT


@pytest.mark.parametrize("chunk", [None, 1, 2, 100])
def test_it_equals_explicit_gradients(chunk):
    model, posterior, train, test = arguments_of(network(nn.LayerNorm(8)))
    found = influence_of(model, posterior, train, test, chunk=chunk)
    count = sum(p.numel() for p in model.parameters())
    truth = truth_of(model, torch.eye(count, dtype=torch.float64) / (50 * (1 + 1e-4)))
    assert relative_error(found.values, truth) < 1e-10
    assert torch.equal(found.train_index, torch.arange(12)) and torch.equal(found.test_index, torch.arange(7))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_the_influence_on_itself_is_the_self_influence(name):
    case = CASES[name]()
    posterior = vlearn.IVON(case.model, lr=0.1, ess=50).posterior()
    loader = [(case.x, case.target)]
    found = influence_of(case.model, posterior, loader, loader, case.loss)
    table = vlearn.sweep(case.model, posterior, loader, case.loss, None, progress=False)
    assert relative_error(found.values.diagonal(), table.self_influence) < 1e-10
    assert relative_error(found.values, found.values.mT) < 1e-10


@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_structure_of_a_covariance_equals_its_dense_form(structure):
    model, _, train, test = arguments_of(network(nn.LayerNorm(8)))
    posterior, covariance = posterior_of(moving(model), structure)
    found = influence_of(model, posterior, train, test, chunk=2)
    assert relative_error(found.values, truth_of(model, covariance)) < 1e-10


def test_a_dense_covariance_joins_all_layers():
    model, _, train, test = arguments_of()
    factor = torch.randn(75, 75, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    precision = factor @ factor.mT + torch.eye(75, dtype=torch.float64)
    posterior = vlearn.posterior.Full({name: p.detach() for name, p in moving(model).items()}, precision, 12)
    found = influence_of(model, posterior, train, test, chunk=2)
    assert relative_error(found.values, truth_of(model, torch.linalg.inv(precision))) < 1e-10


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("top_k", [1, 4, 12, 100])
def test_top_k_is_the_largest_of_the_whole(top_k, chunk):
    arguments = arguments_of()
    whole = influence_of(*arguments).values
    best = influence_of(*arguments, top_k=top_k, chunk=chunk)
    order = whole.abs().argsort(0, descending=True)[:top_k]
    assert torch.equal(best.train_index, order)
    assert relative_error(best.values, whole.gather(0, order)) < 1e-12
    assert best.values.shape == (min(top_k, 12), 7)


def test_linear_regression_moves_by_it_to_first_order():
    """Cook: the test loss's change by a refit without i is g_jᵀΣg_i / (1 - v_i) and a square of the same."""
    x, y, model, posterior, _ = regression()
    new = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
    found = influence_of(model, posterior, [(x, y)], [new], half_square).values
    leverage = vlearn.sweep(model, posterior, [(x, y)], half_square, "exact", progress=False).leverage
    variance = torch.linalg.inv(x.mT @ x + torch.eye(5, dtype=torch.float64))
    for i in (0, 17, 39):
        keep = torch.arange(40) != i
        refit = half_square(new[0] @ ridge(x[keep], y[keep, 0], 1.0).unsqueeze(1), new[1])
        before = half_square(model(new[0]).detach(), new[1])
        first = found[i] / (1 - leverage[i])
        moved = (new[0] @ variance @ x[i]) * (model(x[i]) - y[i]).detach() / (1 - leverage[i])
        assert relative_error(first + moved.square() / 2, refit - before) < 1e-10


def test_a_shuffled_loader_that_numbers_its_examples_gives_the_same():
    model, posterior, train, test = arguments_of()
    plain = influence_of(model, posterior, train, test)
    shuffled = DataLoader(vlearn.IndexedDataset(train.dataset), batch_size=5, shuffle=True)
    found = influence_of(model, posterior, shuffled, test, chunk=2)
    assert relative_error(found.values, plain.values[found.train_index]) < 1e-12
    best = influence_of(model, posterior, shuffled, test, chunk=2, top_k=3)
    assert torch.equal(best.train_index, plain.values.abs().argsort(0, descending=True)[:3])


def test_float32_is_near_float64():
    model, posterior, train, test = arguments_of()
    whole = influence_of(model, posterior, train, test).values
    single = network().float()
    loaders = [[(x.float(), y) for x, y in loader] for loader in (train, test)]
    found = influence_of(single, vlearn.IVON(single, lr=0.1, ess=50).posterior(), *loaders).values
    assert found.dtype == torch.float32
    assert relative_error(found.double(), whole) < 1e-4


def test_the_model_is_left_as_it_was():
    model, posterior, train, test = arguments_of(network(nn.Dropout(0.5)).train())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    influence_of(model, posterior, train, test, top_k=2)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["top_k", "chunk"])
def test_an_argument_that_is_not_positive_is_refused(name):
    with pytest.raises(ValueError) as error:
        influence_of(*arguments_of(), **{name: 0})
    assert str(error.value) == f"{name}=0, but it must be positive: leave it out for the default."


def dropping(*columns):
    """Ten of twelve examples, others in each pass."""
    return DataLoader(TensorDataset(*columns), batch_size=10, shuffle=True, drop_last=True)


class Noisy(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return inputs()[index] + torch.randn(5, dtype=torch.float64), LABELS[index], index


@pytest.mark.parametrize("kind", ["augmentation", "iterator", "drop_last"])
@pytest.mark.parametrize("refined", [{"chunk": 3}, {"refine": 1}, {"refine": 5}])
def test_training_examples_that_change_between_passes_are_refused(kind, refined):
    model, posterior, train, test = arguments_of()
    torch.manual_seed(0)
    loaders = {
        "augmentation": (
            DataLoader(Noisy(), batch_size=4),
            r"\(example \d+ had the loss .*: turn shuffling and random",
        ),
        "iterator": (iter(train), r"\(12 of 12 were missing\): use one that gives every example each time"),
        "drop_last": (dropping(inputs(), LABELS), r"\(\d of 10 were missing\): use one that gives every example each"),
    }
    loader, message = loaders[kind]
    with pytest.raises(ValueError, match="gave other examples when it was iterated again " + message):
        influence_of(model, posterior, loader, test, **refined)


@pytest.mark.parametrize("which", [0, 1])
def test_an_empty_loader_is_refused(which):
    model, posterior, *loaders = arguments_of()
    loaders[which] = []
    with pytest.raises(ValueError, match="a loader gave no batch: pass one that can be iterated again."):
        influence_of(model, posterior, *loaders)
