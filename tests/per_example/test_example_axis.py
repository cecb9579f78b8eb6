"""Which axis is that of the examples, where several have the batch's size."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import Model

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


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 5), nn.LayerNorm(5), nn.PReLU(N), nn.Sequential(nn.Linear(5, 5))],
    ids=["linear", "norm", "prelu", "nested"],
)
def test_positions_first_is_refused_where_there_are_as_many_as_examples(layer):
    with pytest.raises(RuntimeError, match="as long as the batch of 4"):
        swept(sequence_first(layer), torch.randn(N, N, 5))


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


def test_the_model_runs_once_more_for_each_new_shape():
    calls = []
    model = Model(lambda m, x: (calls.append(len(x)), m.fc(x).mean(1))[1], fc=nn.Linear(5, 3))
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    # With one example less; then some of the examples, all of them, and some once more, see `check_independent`.
    for size, expected in ((N, [N, N - 1, 3, N, 3]), (N, [N]), (3, [3, 2, 3, 2]), (N, [N])):
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
