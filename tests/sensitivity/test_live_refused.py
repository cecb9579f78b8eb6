"""What has no sensitivities, and models with hooks, checkpoints and several outputs."""

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.oracles.networks import Model
from tests.oracles.networks.blocks import Swish
from tests.oracles.per_example import per_example, relative_error
from tests.sensitivity.small import (
    LABELS,
    C,
    D,
    N,
    PlainNorm,
    assert_equal,
    covariance_of,
    inputs,
    loss_of,
    network,
    optimizer_of,
    rows,
    truth_at,
    weights_of,
)
from vlearn.capture.pytrees import tensor_leaves

# -- what has no sensitivities -------------------------------------------------------------------------------------


def test_batch_norm_in_train_mode_is_refused_by_name_but_trains():
    model = nn.Sequential(nn.Linear(D, 4), nn.Sequential(nn.BatchNorm1d(4), nn.Tanh()), nn.Linear(4, C)).double()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    optimizer.step()
    with pytest.raises(
        RuntimeError,
        match=r"sensitivities are not defined for this step: 1\.0 \(BatchNorm1d\) is in train mode, .*"
        r"put it in eval mode \(module\.eval\(\)\) or use GroupNorm, LayerNorm",
    ):
        optimizer.sensitivities()
    model[1][0].eval()
    loss_of(model, inputs()).backward()
    assert optimizer.sensitivities(deviation=True).deviation.shape == (N, C)


def test_batch_norm_without_running_statistics_is_refused_in_eval_mode_too():
    model = network(nn.BatchNorm1d(8, track_running_stats=False))
    optimizer = optimizer_of(model)
    model[2].eval()
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=r"2 \(BatchNorm1d\)"):
        optimizer.sensitivities()


class Mixer(nn.Module):
    """Normalises over the batch, and is not called BatchNorm."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.gain * (x - x.mean(0))


@pytest.mark.parametrize("after", [nn.Tanh(), nn.ReLU(inplace=True)])
def test_a_module_that_mixes_examples_is_refused(after):
    model = network(Mixer(), after)
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=r"2 \(Mixer\): run on one example at a time it gives other outputs"):
        optimizer.sensitivities()


class Noisy(nn.Module):
    def __init__(self, noise):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.noise = noise

    def forward(self, x):
        return self.gain * x + self.noise(x)


def test_a_module_without_rule_that_draws_random_numbers_of_its_own_is_refused():
    generator = torch.Generator().manual_seed(0)
    model = network(Noisy(lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)))
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    optimizer.step()
    before = torch.get_rng_state()
    with pytest.raises(
        RuntimeError, match=r"2 \(Noisy\): it draws random numbers that are not those of torch's default"
    ):
        optimizer.sensitivities()
    assert torch.equal(before, torch.get_rng_state())


def test_a_module_that_changes_its_own_buffers_as_it_computes_is_refused():
    model = network(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)).double())  # a power iteration a call
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=r"2 \(ParametrizedLinear\): run on one example at a time"):
        optimizer.sensitivities()


def test_random_numbers_from_elsewhere_are_refused_by_the_deviation():
    generator = torch.Generator().manual_seed(0)
    noise = Model(lambda m, x: x + torch.randn(x.shape, generator=generator, dtype=x.dtype))
    model = network(noise)
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match="repeating the forward pass gave other outputs"):
        optimizer.sensitivities(deviation=True)
    assert optimizer.sensitivities().self_influence.shape == (N,)


def test_an_input_overwritten_since_the_pass_is_refused_by_the_deviation():
    model, x = network(), inputs()
    optimizer = optimizer_of(model)
    model.insert(0, Model(lambda m, x: x * 2))
    optimizer.watch(model)
    loss_of(model, x).backward()
    before = optimizer.sensitivities()
    x.zero_()
    with pytest.raises(RuntimeError, match="an input of the model was modified in place"):
        optimizer.sensitivities(deviation=True)
    assert_equal(optimizer.sensitivities(), before)


def test_a_layer_input_overwritten_since_the_pass_is_refused():
    model, x = network(), inputs()
    optimizer = optimizer_of(model)
    loss_of(model, x).backward()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"0 \(Linear\): its input was modified in place after its forward pass"):
        optimizer.sensitivities()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")  # torch says so once in a process
def test_create_graph_is_refused():
    model = network()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        optimizer.sensitivities()
    for p in model.parameters():
        p.grad = None


def test_as_many_positions_as_examples_is_no_problem_with_the_examples_first():
    model = Model(lambda m, x: m.out(m.norm(torch.tanh(m.fc(x))).mean(1)), fc=nn.Linear(D, 8), norm=PlainNorm(8))
    model.out = nn.Linear(8, C)
    model.double()
    x = torch.randn(N, N, D, dtype=torch.float64)
    optimizer = optimizer_of(model)
    loss_of(model, x).backward()
    twin = Model(model.function, fc=nn.Linear(D, 8), norm=PlainNorm(8), out=nn.Linear(8, C)).double()
    truth = truth_at(weights_of(model), twin, x)
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.deviation, truth.deviation(covariance_of(optimizer, model))) < 1e-10


# -- other people's hooks, checkpoints, outputs --------------------------------------------------------------------


def with_checkpoint(reentrant, block=None):
    torch.manual_seed(0)
    block = block or nn.Sequential(nn.Linear(8, 8), PlainNorm(8), nn.Dropout(0.5), nn.Linear(8, 8))
    parts = {"into": nn.Linear(D, 8), "block": block, "out": nn.Linear(8, C)}
    return Model(lambda m, x: m.out(checkpoint(m.block, m.into(x), use_reentrant=reentrant)), **parts).double()


def test_a_checkpointed_block_is_exact():
    model, twin = with_checkpoint(False), with_checkpoint(False)
    twin.function = lambda m, x: m.out(m.block(m.into(x)))
    optimizer = optimizer_of(model)
    torch.manual_seed(3)
    loss_of(model, inputs()).backward()
    torch.manual_seed(3)
    truth = truth_at(weights_of(model), twin, inputs())
    covariance = covariance_of(optimizer, model)
    forward_derivative = torch.__version__ >= "2.12"  # of checkpoint() itself
    s = optimizer.sensitivities(deviation=forward_derivative)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    if forward_derivative:
        assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


def test_no_deviation_goes_backward_through_a_checkpoint():
    # Of as many examples as features, and without bias, so that shapes alone do not tell what is recomputed.
    model = with_checkpoint(False, Model(lambda m, x: Swish.apply(m.fc(x)), fc=nn.Linear(8, 8, bias=False)))
    optimizer = optimizer_of(model)
    loss = F.cross_entropy(model(torch.randn(8, D, dtype=torch.float64)), torch.arange(8) % C)
    loss.backward()
    optimizer.sensitivities()
    with pytest.raises(RuntimeError, match=r"no deviation through checkpoint\(\).* leave the deviation out"):
        optimizer.sensitivities(deviation=True)


def test_a_reentrant_checkpoint_is_refused():
    model = with_checkpoint(True)
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(RuntimeError, match=r"reentrant checkpointing\): use checkpoint\(\.\.\., use_reentrant=False\)"):
        optimizer.sensitivities()


@pytest.mark.parametrize(
    ("kind", "when"),
    [
        ("output of a layer", "before watching"),
        ("output of a layer", "after watching"),
        ("input of a layer", "before watching"),
        ("input of a layer", "after watching"),
        ("input of the model", "before watching"),
        ("input of the model", "after watching"),
    ],
)
def test_hooks_of_others_that_change_values_are_part_of_the_model(when, kind):
    def hook(model):
        if kind == "output of a layer":
            model[0].register_forward_hook(lambda m, args, output: 3 * output.square())
        elif kind == "input of a layer":
            model[2].register_forward_pre_hook(lambda m, args: (2 * args[0] - 1,))
        else:
            model.register_forward_pre_hook(lambda m, args: (2 * args[0] - 1,))

    model, twin = network(), network()
    hook(twin)
    if when == "before watching":
        hook(model)
    optimizer = optimizer_of(model)
    if when == "after watching":
        hook(model)
    loss_of(model, inputs()).backward()
    truth = truth_at(weights_of(model), twin, inputs())
    covariance = covariance_of(optimizer, model)
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


class Logits:
    """Not one of the structures whose tensors can be found."""

    def __init__(self, values):
        self.values = values


@pytest.mark.parametrize("how", ["hidden", "a view, written in place"])
def test_an_output_that_cannot_be_followed_is_refused(how):
    hidden = how == "hidden"
    model = Model(lambda m, x: Logits(m.fc(x)) if hidden else m.fc(x)[:], fc=nn.Linear(D, C)).double()
    optimizer = optimizer_of(model)
    output = model(torch.randn(N, 2, D, dtype=torch.float64))
    logits = output.values if hidden else output.mul_(2)
    F.cross_entropy(logits.mean(1), LABELS).backward()
    with pytest.raises(
        ValueError, match="the loss depends on no tensor in the model's output: return tensors, or tuples"
    ):
        optimizer.sensitivities()


def test_a_loss_alone_is_refused_and_the_module_inside_it_has_rows():
    """As of a loss module that calls the model once for each of two inputs."""

    class Similarity(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(D, C)

        def forward(self, left, right):
            return torch.cosine_similarity(self.net(left), self.net(right))

    target = torch.linspace(-1, 1, N, dtype=torch.float64)
    loss = Model(lambda m, *pair: F.mse_loss(m.similarity(*pair), target), similarity=Similarity()).double()
    pair = inputs(), inputs(6)
    optimizer = optimizer_of(loss)
    loss(*pair).backward()
    with pytest.raises(
        ValueError, match="the loss alone, .*: where each has a loss of its own, watch the module inside"
    ):
        optimizer.sensitivities()
    optimizer.watch(loss.similarity)
    loss(*pair).backward()
    s, weights = optimizer.sensitivities(deviation=True), weights_of(loss.similarity)
    twin = Similarity().double()
    twin.load_state_dict(weights)
    truth = per_example(twin, lambda m: m(*pair), lambda output: (output - target).square())
    covariance = covariance_of(optimizer, loss)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)[:, 0]) < 1e-10


def test_several_outputs_ask_for_a_choice():
    model = Model(lambda m, x: {"logits": m.fc(x), "aux": m.aux(x)}, fc=nn.Linear(D, C), aux=nn.Linear(D, 1)).double()
    optimizer = optimizer_of(model)
    output = model(inputs())
    (F.cross_entropy(output["logits"], LABELS) + output["aux"].square().mean()).backward()
    with pytest.raises(ValueError, match=r"the model gives 2 outputs that the loss depends on: .* with output="):
        optimizer.sensitivities()
    for output in ("logit", 0, lambda whole: whole):
        with pytest.raises(ValueError, match=r"output=.* selects no tensor that the loss depends on"):
            optimizer.sensitivities(output=output)


def test_a_selector_may_turn_an_output_around_but_makes_none_of_its_own():
    turned = Model(lambda m, x: m.fc(x).mT, fc=nn.Linear(D, C)).double()
    optimizer = optimizer_of(turned)
    F.cross_entropy(turned(inputs()).mT, LABELS).backward()
    assert optimizer.sensitivities(output=lambda whole: whole.mT).residual.shape == (N, C)
    with pytest.raises(ValueError, match="output= makes a tensor of its own, but it must return one of the tensors"):
        optimizer.sensitivities(output=lambda whole: 2 * whole.mT)


def test_an_index_into_a_single_output_is_refused():
    model = network()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    with pytest.raises(ValueError, match="output=0 selects no tensor"):
        optimizer.sensitivities(output=0)


class Pair(NamedTuple):
    logits: torch.Tensor
    aux: torch.Tensor


@pytest.mark.parametrize(
    ("make", "output"),
    [
        (lambda logits, aux: {"aux": aux, "logits": logits}, "logits"),
        (lambda logits, aux: (aux, logits), 1),
        (lambda logits, aux: (aux, logits), -1),
        (Pair, "logits"),
        (lambda logits, aux: (aux, {"nested": [logits]}), lambda whole: whole[1]["nested"][0]),
    ],
    ids=["key", "index", "index from the end", "attribute", "callable"],
)
def test_one_of_several_outputs_is_selected(make, output):
    parts = {"net": network(), "aux": nn.Linear(D, 1)}
    model = Model(lambda m, x: make(m.net(x), m.aux(x)), **parts).double()
    optimizer = optimizer_of(model)
    twin = copy.deepcopy(model)
    aux, logits = sorted(tensor_leaves(model(inputs())), key=lambda leaf: leaf.shape[1])

    def loss(logits, aux):
        return F.cross_entropy(logits, LABELS, reduction="none") + aux.square().squeeze(1)

    loss(logits, aux).mean().backward()
    twin.load_state_dict(weights_of(model))
    truth = per_example(
        twin, lambda m: m.net(inputs()), rows, whole_loss=lambda m: loss(m.net(inputs()), m.aux(inputs()))
    )
    covariance = covariance_of(optimizer, model)
    s = optimizer.sensitivities(deviation=True, output=output)
    assert relative_error(s.residual, truth.residual) < 1e-10
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


def test_an_output_that_the_loss_does_not_use_needs_no_choice():
    model = Model(lambda m, x: (m.fc(x), m.aux(x)), fc=nn.Linear(D, C), aux=nn.Linear(D, 1)).double()
    optimizer = optimizer_of(model)
    F.cross_entropy(model(inputs())[0], LABELS).backward()
    s = optimizer.sensitivities(deviation=True)
    assert s.residual.shape == s.deviation.shape == (N, C)


def test_parts_that_are_called_apart_are_to_be_called_in_one_forward():
    model = nn.ModuleDict({"encoder": nn.Linear(D, 4), "decoder": nn.Linear(4, C)}).double()
    optimizer = optimizer_of(model)
    loss_of(lambda x: model["decoder"](model["encoder"](x).tanh()), inputs()).backward()
    with pytest.raises(RuntimeError, match=r"call 'encoder' \(Linear\) and 'decoder' \(Linear\) in the forward pass"):
        optimizer.sensitivities()
