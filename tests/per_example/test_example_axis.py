"""Which axis is that of the examples, where several have the batch's size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import Case, Model
from tests.oracles.per_example import flat, per_example, relative_error

N = 4
LABELS = torch.tensor([0, 1, 2, 0])


def swept(model, x):
    posterior = vlearn.IVON(model, lr=0.1, ess=20).posterior()
    loader = [(x, LABELS[: len(x[0] if isinstance(x, tuple) else x)])]
    return vlearn.sweep(model, posterior, loader, F.cross_entropy, None, progress=False)


def sequence_first(*layers):
    torch.manual_seed(0)
    return Model(
        lambda m, x: m.out(m.layers(x.transpose(0, 1)).mean(0)), layers=nn.Sequential(*layers), out=nn.Linear(5, 3)
    )


def assert_exact(model, x):
    model.double()
    case = Case(model, x.double(), LABELS)
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    covariance = torch.diag(flat(dict(optimizer.posterior().variance)))
    truth = per_example(model.eval(), case.call, case.each_loss)
    table = vlearn.sweep(model, optimizer.posterior(), [(case.x, LABELS)], F.cross_entropy, None, progress=False)
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-10


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 5), nn.LayerNorm(5), nn.Sequential(nn.Linear(5, 5)), nn.LSTM(5, 5)],
    ids=["linear", "norm", "nested", "recurrent"],
)
def test_positions_first_are_told_from_examples_where_there_are_as_many(layer):
    if isinstance(layer, nn.LSTM):
        layer = Model(lambda m, x: m.rnn(x)[0], rnn=layer)
    assert_exact(sequence_first(layer), torch.randn(N, N, 5))


def test_examples_in_the_place_of_channels_are_refused():
    with pytest.raises(RuntimeError, match="does not run on one example less to tell"):
        swept(sequence_first(nn.PReLU(N)), torch.randn(N, N, 5))


def test_a_layer_of_positions_and_examples_in_one_axis_is_no_layer_of_examples():
    """[T·N, C] with T = 1."""
    model = Model(lambda m, x: m.out(m.fc(x.transpose(0, 1).flatten(0, 1)).tanh()), fc=nn.Linear(5, 5))
    model.out = nn.Linear(5, 3)
    assert_exact(model, torch.randn(N, 1, 5))


def test_positions_first_is_exact_where_their_number_tells():
    model = sequence_first(nn.Linear(5, 5), nn.Tanh())
    whole = swept(model, torch.randn(N, 6, 5, generator=torch.Generator().manual_seed(0)))
    assert whole.self_influence.shape == (N,)


@pytest.mark.parametrize("shape", [(N, 5), (N, N, 5), (N, N, N, 5), (N, N)])
def test_examples_first_is_never_refused(shape):
    layers = nn.Sequential(nn.Linear(shape[-1], 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))
    model = Model(lambda m, x: m.layers(x).reshape(len(x), -1, 3).mean(1), layers=layers)
    assert swept(model, torch.randn(shape)).self_influence.shape == (N,)


def test_channels_and_pixels_as_many_as_examples_are_no_problem():
    model = nn.Sequential(nn.Conv2d(N, N, 3, padding=1), nn.GroupNorm(2, N), nn.Flatten(), nn.Linear(N**3, 3))
    assert swept(model, torch.randn(N, N, N, N)).self_influence.shape == (N,)


def test_one_example_with_one_position_is_no_problem():
    assert swept(sequence_first(nn.Linear(5, 5)), torch.randn(1, 1, 5)).self_influence.shape == (1,)


def test_the_model_runs_again_for_each_kind_of_pass_whatever_its_shape_and_when_its_passes_have_doubled():
    calls = []
    model = Model(lambda m, x: (calls.append(len(x)), m.fc(x).mean(1))[1], fc=nn.Linear(5, 3))
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    # With one example less; then a few, those after them, all, and a few once more, see `check_independent`.
    for size, expected in ((N, [N, N - 1, 2, 4, N, 3]), (N, [N, 2, 4, N, 3]), (3, [3, 1, 2, 3, 2]), (N, [N])):
        calls.clear()
        F.cross_entropy(model(torch.randn(size, N, 5)), LABELS[:size]).backward()
        optimizer.sensitivities()
        optimizer.step()
        assert calls == expected


def test_a_model_that_does_not_run_without_an_example_is_refused():
    model = Model(lambda m, x: m.fc(x.reshape(N, N, 5)).mean(1), fc=nn.Linear(5, 3))
    with pytest.raises(RuntimeError) as error:
        swept(model, torch.randn(N, N, 5))
    assert str(error.value) == (
        "an axis that may not be the one of the examples is as long as the batch of 4, and the model does not run on "
        "one example less to tell: use another batch size."
    )


def test_the_extra_pass_changes_nothing():
    model = nn.Sequential(
        nn.Dropout(0.4), nn.Linear(5, 5), nn.InstanceNorm1d(N, track_running_stats=True), nn.Flatten()
    )
    model.append(nn.Linear(5 * N, 3))
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    F.cross_entropy(model(torch.randn(N, N, 5)), LABELS).backward()
    buffers, random = [b.clone() for b in model.buffers()], torch.get_rng_state()
    optimizer.sensitivities()
    assert all(torch.equal(b, old) for b, old in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(random, torch.get_rng_state())


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(5))

    def forward(self, x, table):
        return self.gain * x * table


@pytest.mark.parametrize("sizes", [(N - 1, N, N + 1), (N, N + 1), (N + 1, N), (1, N)])
def test_a_table_is_one_whatever_the_size_of_the_batch(sizes):
    """What was found with one size holds for another: what is a table does not depend on it."""
    torch.manual_seed(0)
    table = torch.randn(N, 5).double()
    model = Model(lambda m, x: m.out(m.block(x, table).mean(1)), block=Table(), out=nn.Linear(5, 3)).double()
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    for size in sizes:
        x, y = torch.randn(size, N, 5).double(), torch.arange(size) % 3
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        whole = optimizer.sensitivities(deviation=True)
        part = optimizer.sensitivities(deviation=True, examples=[size - 1])
        assert relative_error(part.self_influence, whole.self_influence[-1:]) < 1e-12
        assert relative_error(part.deviation, whole.deviation[-1:]) < 1e-12
        weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
        losses = F.cross_entropy(torch.func.functional_call(model, weights, (x,)), y, reduction="none")
        variance = optimizer.posterior().variance
        for n, loss in enumerate(losses):
            rows = torch.autograd.grad(loss, list(weights.values()), retain_graph=True)
            truth = sum((variance[name] * g.square()).sum() for name, g in zip(weights, rows, strict=True))
            assert relative_error(whole.self_influence[n], truth) < 1e-12


def test_the_models_own_inputs_are_told_apart_by_what_it_gives():
    """A square mask as long as the batch: without its last row the model does not run, or gives something else."""
    model = Model(lambda m, x, mask: m.out((mask @ m.fc(x)).mean(1)), fc=nn.Linear(5, 5), out=nn.Linear(5, 3))
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    mask = torch.ones(N, N).tril()
    F.cross_entropy(model(torch.randn(N, N, 5), mask), LABELS).backward()
    assert optimizer.sensitivities(deviation=True).deviation.shape == (N, 3)


def test_an_output_without_examples_counts_only_where_the_loss_reads_it():
    def build():
        torch.manual_seed(0)
        block = Model(lambda m, x: (m.gain * x, (m.gain * x).sum((0, 1))))
        block.gain = nn.Parameter(torch.randn(5))
        model = Model(lambda m, x: (m.out(m.block(x)[0]), m.block(x)[1]), block=block, out=nn.Linear(5, 3))
        return model, vlearn.IVON(model, lr=0.1, ess=20)

    model, optimizer = build()
    x = torch.randn(N, 5)
    F.cross_entropy(model(x)[0], LABELS).backward()
    assert optimizer.sensitivities(output=0).self_influence.shape == (N,)
    model, optimizer = build()
    output, total = model(x)
    (F.cross_entropy(output, LABELS) + total).backward()
    with pytest.raises(RuntimeError, match=r"Model \(Model\): its output of shape \(\), which the loss depends on"):
        optimizer.sensitivities(output=0)
