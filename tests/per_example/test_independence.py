"""Examples that meet in the model are refused, wherever they meet; models that only look like it are not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.optim.table import FAMILY, equal, states, weights
from tests.oracles.networks import Model
from tests.oracles.per_example import relative_error
from tests.sensitivity.small import LABELS, C, D, N, covariance_of, inputs, loss_of, optimizer_of, truth_at, weights_of

ORDER = torch.tensor([2, 0, 5, 3, 1, 4])


def between(middle, **parts):
    """Two linear layers with a function of (model, hidden values) between them."""
    torch.manual_seed(0)
    model = Model(lambda m, x: m.out(middle(m, m.into(x))), into=nn.Linear(D, 4), out=nn.Linear(4, C), **parts)
    return model.double()


def permuted(m, h):
    order = h[:, 0].argsort()
    return m.inner(h[order])[order.argsort()]


MIXING = {
    "mean over the batch": lambda m, h: torch.tanh(h - 0.3 * h.mean(0)),
    "largest of the batch": lambda m, h: h - h.max(0).values,
    "batch normalisation by hand": lambda m, h: F.batch_norm(h, None, None, training=True),
    "attention over the batch": lambda m, h: torch.softmax(h @ h.T, 1) @ h,
    "neighbour": lambda m, h: h + h.roll(1, 0),
    "statistics without gradient": lambda m, h: h / h.std().detach(),
    "example number": lambda m, h: h * torch.arange(1, len(h) + 1).flip(0).unsqueeze(1),
}


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("deviation", [False, True])
def test_examples_that_meet_between_two_layers_are_refused(name, deviation):
    model = between(MIXING[name])
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=r"what goes into out \(Linear\) depends on the other examples of the batch"):
        optimizer.sensitivities(deviation=deviation)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 9])
def test_a_largest_entry_held_constant_is_refused_whichever_example_has_it(count):
    labels = torch.arange(count) % C
    for place in range(count):
        model = between(lambda m, h: h / h.detach().abs().max())
        x = torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        x[place] *= 20
        posterior = optimizer_of(model).posterior()
        with pytest.raises(RuntimeError, match=r"what goes into out \(Linear\) depends on the other examples"):
            vlearn.sweep(model, posterior, [(x, labels)], F.cross_entropy, progress=False)
        model = between(lambda m, h: h / h.detach().abs().max())
        optimizer = optimizer_of(model)
        F.cross_entropy(model(x), labels).backward()
        with pytest.raises(RuntimeError, match=r"what goes into out \(Linear\) depends on the other examples"):
            optimizer.sensitivities()


class InTrainMode(nn.Module):
    """Lets examples meet where it is in train mode."""

    def forward(self, h):
        return h.roll(1, 0) if self.training else h


def turned_on(model):
    model.on = True


def exchanged(model):
    model.first.train()
    model.second.eval()


CHANGING = {
    "another operation": (lambda m, h: h - h.mean(0) if m.on else h, turned_on),
    "the same operations along another axis": (lambda m, h: h - h.mean(0 if m.on else 1, keepdim=True), turned_on),
    "as many modules in train mode, but others": (lambda m, h: m.second(m.first(h)), exchanged),
}


@pytest.mark.parametrize("name", CHANGING)
def test_a_model_that_comes_to_let_examples_meet_after_a_clean_step_is_refused(name):
    middle, change = CHANGING[name]
    model = between(middle, first=InTrainMode(), second=nn.Identity())
    model.on = False
    model.first.eval()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    assert len(optimizer.sensitivities().self_influence) == N
    optimizer.step()
    optimizer.zero_grad()
    change(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
        optimizer.sensitivities()


GATED = {
    "a gate between the examples": lambda m, h: h + m.gate * (torch.softmax(h @ h.T, 1) @ h),
    "a gate of their values alone": lambda m, h: h * (1 + m.gate * h.detach().mean(0)),
}


@pytest.mark.parametrize("name", GATED)
def test_a_gate_that_opens_in_training_is_seen_when_the_passes_have_doubled(name):
    model = between(GATED[name])
    optimizer = optimizer_of(model)
    for number in range(1, 9):
        model.gate = 0.5 if number > 5 else 0.0
        optimizer.zero_grad()
        loss_of(model, inputs()).backward()
        if number == 8:
            with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
                optimizer.sensitivities()
        else:
            optimizer.sensitivities()
        optimizer.step()


class Sorting(nn.Module):
    """Averages sequences in the order of their lengths, as before packing, and puts them back."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(D, 4), nn.Linear(4, C)
        self.double()

    def forward(self, x, lengths):
        order = lengths.argsort(descending=True, stable=True)
        is_there = torch.arange(x.shape[1]) < lengths[order].unsqueeze(1)
        h = torch.tanh(self.into(x[order])) * is_there.unsqueeze(2)
        return self.out(h.sum(1) / lengths[order].unsqueeze(1))[order.argsort()]


def test_an_order_that_is_another_only_in_a_later_batch_is_refused_there():
    sequences = torch.randn(3 * N, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([4] * 2 * N + [2, 4, 1, 3, 4, 2])
    cut = [((sequences[i : i + N], lengths[i : i + N]), LABELS) for i in range(0, 3 * N, N)]
    model = Sorting()
    posterior = optimizer_of(model).posterior()
    assert len(vlearn.sweep(model, posterior, cut[:2], F.cross_entropy, progress=False)) == 2 * N
    with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
        vlearn.sweep(model, posterior, cut, F.cross_entropy, progress=False)
    model = Sorting()
    optimizer = optimizer_of(model)
    for number, (x, y) in enumerate(cut):
        optimizer.zero_grad()
        F.cross_entropy(model(*x), y).backward()
        if number < 2:
            optimizer.sensitivities()
            continue
        with pytest.raises(RuntimeError, match="depends on the other examples of the batch"):
            optimizer.sensitivities()


@pytest.mark.parametrize("entry", [entry for entry in FAMILY if entry.captures], ids=str)
def test_a_step_that_learns_from_single_examples_refuses_them_before_anything_changes(entry):
    for middle, right in ((MIXING["mean over the batch"], False), (lambda m, h: torch.tanh(h), True)):
        model = between(middle)
        optimizer = entry.make(model)
        mean = weights(model)
        loss_of(model, inputs()).backward()
        state = states(optimizer)
        if right:
            optimizer.step()
            assert not equal(weights(model), mean)
        else:
            with pytest.raises(RuntimeError, match=r"what goes into out \(Linear\) depends on the other examples"):
                optimizer.step()
            assert equal(weights(model), mean) and equal(states(optimizer), state)


def test_examples_that_meet_before_the_first_layer_or_after_the_last_are_refused():
    for model, where in (
        (Model(lambda m, x: m.fc(x - x.mean(0)), fc=nn.Linear(D, C)), r"what goes into fc \(Linear\)"),
        (Model(lambda m, x: m.fc(x).softmax(0), fc=nn.Linear(D, C)), r"the output of Model \(Model\)"),
    ):
        posterior = optimizer_of(model.double()).posterior()
        loader = [(inputs(), torch.arange(N) % C)]
        with pytest.raises(RuntimeError, match=where):
            vlearn.sweep(model, posterior, loader, F.cross_entropy, progress=False)
        with pytest.raises(RuntimeError, match=where):
            vlearn.influence(model, posterior, loader, loader, F.cross_entropy, progress=False)


def test_examples_in_another_order_inside_are_refused():
    model = between(permuted, inner=nn.Linear(4, 4))
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=r"what goes into inner \(Linear\) depends on the other examples"):
        optimizer.sensitivities()


def test_the_gradients_of_a_model_that_draws_random_numbers_show_it_too():
    model = between(lambda m, h: m.drop(h) - 0.3 * h.mean(0), drop=nn.Dropout(0.5))
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=r"makes of the output of into \(Linear\) depends on the other examples"):
        optimizer.sensitivities()


def test_a_model_that_only_runs_on_whole_batches_shows_it_in_its_gradients():
    model = between(lambda m, h: h[ORDER] + h)
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=r"makes of the output of into \(Linear\) depends on the other examples"):
        optimizer.sensitivities()


SEPARATE = {
    "dropout": lambda m, h: F.dropout(h, 0.5),
    "noise of a generator": lambda m, h: h + torch.randn(h.shape, generator=m.generator, dtype=h.dtype),
    "order of the features": lambda m, h: h[:, [2, 0, 3, 1]],
    "statistics of the features": lambda m, h: (h - h.mean(1, keepdim=True)) / h.std(1, keepdim=True).detach(),
    "choice for each example": lambda m, h: torch.where(h.sum(1, keepdim=True) > 0, h.tanh(), 2 * h),
    "gathered and put back": lambda m, h: torch.zeros_like(h).index_add(0, (r := (h[:, 0] > 0).nonzero()[:, 0]), h[r]),
    "place in the batch": lambda m, h: h * torch.arange(1, len(h) + 1).unsqueeze(1),
    "masked classes": lambda m, h: h.masked_fill(h > 0.5, -torch.inf).softmax(1),
}


@pytest.mark.parametrize("name", SEPARATE)
def test_what_each_example_goes_through_alone_is_exact(name):
    model, twin = between(SEPARATE[name]), between(SEPARATE[name])
    model.generator, twin.generator = (torch.Generator().manual_seed(0) for _ in range(2))
    optimizer = optimizer_of(model)
    torch.manual_seed(3)
    loss_of(model, inputs()).backward()
    torch.manual_seed(3)
    truth = truth_at(weights_of(model), twin, inputs())
    state = torch.get_rng_state()
    found = optimizer.sensitivities().self_influence
    assert relative_error(found, truth.self_influence(covariance_of(optimizer, model))) < 1e-10
    assert torch.equal(state, torch.get_rng_state())
