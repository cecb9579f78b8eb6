"""Modules without a rule that draw random numbers: on the whole batch, with the numbers of the pass, or a refusal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

import vlearn
from tests.oracles.networks import Model
from tests.oracles.per_example import relative_error

N, D = 6, 4
LABELS = torch.arange(N) % 3
MAKERS = {
    "IVON": lambda model, **shared: vlearn.IVON(model, lr=0.1, ess=N, **shared),
    "VON": lambda model, **shared: vlearn.VON(model, lr=0.01, ess=N, **shared),
    "VOGN": lambda model, **shared: vlearn.VOGN(model, lr=0.01, ess=N, **shared),
    "KFACVON": lambda model, **shared: vlearn.KFACVON(model, lr=0.01, ess=N, **shared),
    "FullVON": lambda model, **shared: vlearn.FullVON(model, lr=0.01, ess=N, **shared),
}


def maker(name):
    return lambda model: MAKERS[name](model, generator=torch.Generator().manual_seed(1))


def encoder(**settings):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 5, **settings)
    return Model(lambda m, x: m.out(m.layer(x).mean(1)), layer=layer, out=nn.Linear(D, 3)).double()


def inputs(positions=3):
    return torch.randn(N, positions, D, dtype=torch.double, generator=torch.Generator().manual_seed(2))


def own_gradients(model, weights, args, seed):
    """[{name: gradient}] of each example's own loss, from one forward pass of the whole batch with its masks."""
    live = {name: w.clone().requires_grad_() for name, w in weights.items()}
    torch.manual_seed(seed)
    losses = F.cross_entropy(functional_call(model, live, args), LABELS, reduction="none")
    rows = [torch.autograd.grad(loss, list(live.values()), retain_graph=True) for loss in losses]
    return [dict(zip(live, row, strict=True)) for row in rows]


def live_rows(model, args, optimizer, **asked):
    """(rows, truth) of one training pass."""
    torch.manual_seed(3)
    F.cross_entropy(model(*args), LABELS).backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    s, variance = optimizer.sensitivities(**asked), optimizer.posterior().variance
    truth = own_gradients(model, weights, args, 3)
    return s, torch.stack([sum((variance[name] * g.square()).sum() for name, g in row.items()) for row in truth])


def test_the_masks_are_those_of_the_pass():
    model = encoder(batch_first=True, dropout=0.4)
    optimizer = maker("IVON")(model)
    s, truth = live_rows(model, (inputs(),), optimizer)
    assert relative_error(s.self_influence, truth) < 1e-12
    optimizer.zero_grad()
    torch.manual_seed(4)
    F.cross_entropy(model(inputs()), LABELS).backward()
    assert relative_error(optimizer.sensitivities().self_influence, s.self_influence) > 0.1


def test_vogn_learns_from_the_gradients_under_the_masks():
    """h ← β₂ h + (1 - β₂) (Σ_n g_n² / N), summed over num_data."""
    model = encoder(batch_first=True, dropout=0.4)
    optimizer = maker("VOGN")(model)
    optimizer.posterior()
    before = {name: optimizer.state[p]["hessian"].clone() for name, p in model.named_parameters()}
    torch.manual_seed(3)
    F.cross_entropy(model(inputs()), LABELS).backward()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    truth = own_gradients(model, weights, (inputs(),), 3)
    beta = optimizer.param_groups[0]["beta2"]
    for name, p in model.named_parameters():
        mean = torch.stack([row[name].square() for row in truth]).mean(0)
        assert relative_error(optimizer.state[p]["hessian"], beta * before[name] + (1 - beta) * mean) < 1e-12


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("batch_first", [True, False], ids=["examples first", "positions first"])
def test_every_optimizer_trains_a_transformer_layer_as_torch_makes_it(name, batch_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(D, 2, 5, batch_first=batch_first)  # dropout 0.1
    model = Model(
        lambda m, x: m.out((m.layer(x) if batch_first else m.layer(x.mT.mT.transpose(0, 1)).transpose(0, 1)).mean(1))
    )
    model.layer, model.out = layer, nn.Linear(D, 3)
    model.double()
    optimizer = MAKERS[name](model)
    start = [p.detach().clone() for p in model.parameters()]
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(inputs()), LABELS).backward()
        optimizer.step()
    assert all(bool((p != old).any()) for p, old in zip(model.parameters(), start, strict=True))
    s = optimizer.sensitivities(deviation=True)
    assert bool((s.self_influence > 0).all()) and bool(s.deviation.isfinite().all())


def test_replays_cost_no_random_numbers():
    model = encoder(batch_first=True)
    optimizer = maker("IVON")(model)
    F.cross_entropy(model(inputs()), LABELS).backward()
    before = torch.get_rng_state()
    optimizer.sensitivities(deviation=True)
    optimizer.sensitivities(deviation=True, examples=[1, 4])
    assert torch.equal(before, torch.get_rng_state())


def test_some_of_the_examples_have_the_masks_that_they_had_in_the_batch():
    model = encoder(batch_first=True, dropout=0.4)
    optimizer = maker("IVON")(model)
    F.cross_entropy(model(inputs()), LABELS).backward()
    whole = optimizer.sensitivities(deviation=True)
    part = optimizer.sensitivities(deviation=True, examples=[4, 1])
    assert relative_error(part.self_influence, whole.self_influence[[4, 1]]) < 1e-12
    assert relative_error(part.deviation, whole.deviation[[4, 1]]) < 1e-12


def test_packed_sequences_with_dropout_between_the_layers():
    def forward(m, x, lengths):
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return m.out(m.rnn(packed)[1][-1])

    torch.manual_seed(0)
    model = Model(forward, rnn=nn.GRU(D, 5, 2, dropout=0.4, batch_first=True), out=nn.Linear(5, 3)).double()
    optimizer = maker("IVON")(model)
    s, truth = live_rows(model, (inputs(5), torch.tensor([3, 5, 1, 5, 2, 2])), optimizer, deviation=True)
    assert relative_error(s.self_influence, truth) < 1e-12


class Noisy(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(D))
        self.function = function

    def forward(self, x):
        return self.function(self.gain, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda g, x: F.dropout(g * x, 0.2) + x.mean(0),
        lambda g, x: F.dropout(g * x, 0.2) + x.mean(0).detach(),
        lambda g, x: F.dropout(g * x, 0.2) + 1e-2 * x.flip(0),
        lambda g, x: F.dropout(g * x, 0.2) + x.cumsum(0),
        lambda g, x: (g * x)[torch.randperm(len(x))],
    ],
    ids=["centred", "centred without a gradient", "flipped", "cumulated", "shuffled"],
)
def test_a_module_that_draws_and_mixes_examples_is_refused(function):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, D), Noisy(function), nn.Linear(D, 3)).double()
    optimizer = maker("IVON")(model)
    F.cross_entropy(model(inputs()[:, 0]), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"1 \(Noisy\): the output of an example depends on other examples"):
        optimizer.sensitivities()


def test_tokens_that_meet_without_a_gradient_are_found_too():
    def forward(m, tokens):
        words = F.dropout(F.embedding(tokens, m.table), 0.3)
        return m.out(words.mean(1) + 0.1 * words.mean((0, 1)))

    torch.manual_seed(0)
    model = Model(forward, out=nn.Linear(D, 3))
    model.table = nn.Parameter(torch.randn(7, D))
    optimizer = vlearn.IVON(model, lr=0.1, ess=N)
    F.cross_entropy(model(torch.randint(7, (N, 5))), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"Model \(Model\): the output of an example depends on other examples"):
        optimizer.sensitivities()


def test_random_numbers_of_another_generator_beside_torchs_are_refused():
    generator = torch.Generator().manual_seed(0)
    noise = Noisy(lambda g, x: F.dropout(g * x, 0.2) + torch.randn(x.shape, generator=generator, dtype=x.dtype))
    model = nn.Sequential(nn.Linear(D, D), noise, nn.Linear(D, 3)).double()
    optimizer = maker("IVON")(model)
    F.cross_entropy(model(inputs()[:, 0]), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"1 \(Noisy\): repeated with the random numbers of torch"):
        optimizer.sensitivities()


def test_an_output_that_was_overwritten_is_computed_again():
    torch.manual_seed(0)
    noise = Noisy(lambda g, x: F.dropout(g * x, 0.4))
    model = nn.Sequential(nn.Linear(D, D), noise, nn.ReLU(inplace=True), nn.Linear(D, 3)).double()
    s, truth = live_rows(model, (inputs()[:, 0],), maker("IVON")(model))
    assert relative_error(s.self_influence, truth) < 1e-12


def test_an_operation_without_a_forward_derivative_goes_backward_twice():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, gradient):
            return 2 * gradient

    def build(double):
        torch.manual_seed(0)
        noise = Noisy(lambda g, x: F.dropout(double(g * x), 0.4))
        return nn.Sequential(nn.Linear(D, D), noise, nn.Linear(D, 3)).double()

    found = []
    for model in (build(Double.apply), build(lambda x: 2 * x)):
        optimizer = maker("IVON")(model)
        found.append(live_rows(model, (inputs()[:, 0],), optimizer, deviation=True)[0])
    assert relative_error(found[0].deviation, found[1].deviation) < 1e-12
