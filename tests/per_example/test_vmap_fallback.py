"""The exact fallback: any module, one example at a time, or a refusal."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from tests.oracles.networks import CASES, Case, Model
from tests.oracles.per_example import flat, moving, per_example, relative_error
from vlearn.layers import registry as rules
from vlearn.linearized import covariance_products as ghost
from vlearn.per_example import gradients as examples
from vlearn.per_example import replay
from vlearn.per_example import vmap_fallback as fallback


def swept(case, leverage=None):
    posterior = vlearn.IVON(case.model, lr=0.1, ess=20).posterior()
    table = vlearn.sweep(case.model, posterior, [(case.x, case.target)], case.loss, leverage, progress=False)
    return posterior, table


def assert_exact(case):
    posterior, table = swept(case)
    truth = per_example(case.model.eval(), case.call, case.each_loss)
    covariance = torch.diag(flat({name: posterior.variance[name] for name in moving(case.model)}))
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    change = truth.deviation(covariance)
    assert relative_error(table.deviation.reshape(change.shape), change) < 1e-10


@pytest.fixture
def two_rules(monkeypatch):
    """Linear layers and convolutions have rules, all else goes through the fallback."""
    kept = {kind: rules.RULES[kind] for kind in (nn.Linear, nn.Conv2d)}
    monkeypatch.setattr(rules, "RULES", kept)


@pytest.mark.usefixtures("two_rules")
@pytest.mark.parametrize(
    "name", [name for name in CASES if any(word in name for word in ("norm", "embedding", "convolution_in", "transp"))]
)
def test_what_has_a_rule_is_as_exact_without_it(name):
    assert_exact(CASES[name]())


FALLBACKS = [
    "layer_norm_on_sequences",
    "embedding",
    "attention_with_its_weights_and_a_mask",
    "parameter_of_no_dimension",
    "subclass_of_linear_with_another_forward",
    "weight_used_by_its_module_and_outside_it",
    "stopped_gradient_beside_a_parameter",
    "blocks_that_give_several_outputs",
    "activation_without_a_forward_derivative",
]


@pytest.mark.usefixtures("two_rules")
@pytest.mark.parametrize("name", FALLBACKS)
def test_one_backward_pass_an_entry_gives_the_same_too(name, monkeypatch):
    def refuses(*args, **kwargs):
        raise NotImplementedError("no derivative")

    monkeypatch.setattr(fallback, "jvp", refuses)
    monkeypatch.setattr(torch.autograd.forward_ad, "make_dual", refuses)
    monkeypatch.setattr(replay, "_pulled_twice", refuses)
    assert_exact(CASES[name]())


@pytest.mark.usefixtures("two_rules")
@pytest.mark.parametrize("name", FALLBACKS)
def test_one_example_after_the_other_gives_what_vmap_gives(name, monkeypatch):
    def refuses(*args, **kwargs):
        raise NotImplementedError("no batching rule")

    monkeypatch.setattr(fallback, "vmap", refuses)
    assert_exact(CASES[name]())


@pytest.mark.usefixtures("two_rules")
@pytest.mark.parametrize("name", FALLBACKS)
def test_two_backward_passes_give_what_forward_mode_gives(name, monkeypatch):
    def refuses(*args, **kwargs):
        raise NotImplementedError("no forward derivative")

    monkeypatch.setattr(fallback, "jvp", refuses)
    monkeypatch.setattr(torch.autograd.forward_ad, "make_dual", refuses)
    assert_exact(CASES[name]())


@pytest.mark.usefixtures("two_rules")
@pytest.mark.parametrize("name", [*FALLBACKS, "convolution", "weight_shared_by_two_layers", "linear_on_sequences"])
@pytest.mark.parametrize("limit", [1, 300])
def test_the_size_of_the_chunks_does_not_matter(name, limit, monkeypatch):
    monkeypatch.setattr(examples.chunks, "__defaults__", (limit,))
    monkeypatch.setattr(ghost, "FALLBACK_ENTRIES", limit)
    assert_exact(CASES[name]())


class Batchwise(nn.Module):
    def __init__(self, function, size=4):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.function = function

    def forward(self, x):
        return self.function(self.gain, x)


def around(middle, *after):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), middle, *after, nn.Linear(4, 3)).double()
    return Case(model, torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0]))


@pytest.mark.parametrize("kind", [IndexError, TypeError, AssertionError])
def test_a_module_that_cannot_take_one_example_is_refused_by_name_whatever_it_raises(kind):
    def index(gain, x):
        if len(x) == 1:
            raise kind("no row 2")
        return gain * x

    with pytest.raises(RuntimeError, match=r"^1 \(Batchwise\): it does not run on one example at a time \(no row 2\)"):
        swept(around(Batchwise(index)))


@pytest.mark.parametrize(
    "function",
    [
        lambda g, x: g * (x - x.mean(0)),
        lambda g, x: g * x / x.abs().max(),
        lambda g, x: g * x.flip(0),
        lambda g, x: g * x.cumsum(0),
        lambda g, x: g * x + 1e-3 * x.sum(),
        lambda g, x: g * x * x.shape[0],
    ],
    ids=["centred", "scaled", "flipped", "cumulated", "slightly mixed", "by the batch size"],
)
@pytest.mark.parametrize("after", [[], [nn.ReLU(inplace=True)]], ids=["seen", "overwritten"])
def test_a_module_that_mixes_examples_is_refused_by_name(function, after):
    with pytest.raises(RuntimeError) as error:
        swept(around(Batchwise(function), *after))
    assert str(error.value) == (
        "1 (Batchwise): run on one example at a time it gives other outputs than on the batch, so its per-example "
        "gradients are not defined. Use a module that treats its examples each alone, and repeats what it did."
    )


def test_a_frozen_module_may_not_mix_examples_either():
    case = around(Batchwise(lambda g, x: g * (x - x.mean(0))))
    case.model[1].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"the output of 1 \(Batchwise\) depends on the other examples of the batch"):
        swept(case)


def test_a_random_module_in_eval_mode_is_no_problem():
    class Jittered(Batchwise):
        def forward(self, x):
            return self.gain * (x + torch.randn_like(x) if self.training else x)

    assert_exact(around(Jittered(None)))


def test_a_module_that_is_refused_costs_no_random_numbers():
    generator = torch.Generator()
    case = around(Batchwise(lambda g, x: g * x + torch.rand((), generator=generator)))
    before = torch.get_rng_state()
    optimizer = vlearn.IVON(case.model, lr=0.1, ess=20)
    with pytest.raises(RuntimeError, match="it draws random numbers that are not those of torch's default generators"):
        vlearn.sweep(case.model, optimizer.posterior(), [(case.x, case.target)], case.loss, None, progress=False)
    torch.set_rng_state(before)


def test_the_buffers_of_every_example_start_alike():
    """A counter that grows with each call must not tell the examples apart."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            y = self.gain * x * (1 + 0 * self.count)
            self.count += 1
            return y

    case = around(Counted())
    posterior, table = swept(case)
    assert float(case.model[1].count) == 1


def test_narrow_inputs_are_widened():
    """As autocast hands them to a module whose weights are wide."""
    model = nn.Sequential(nn.Linear(5, 4), nn.PReLU(4), nn.Linear(4, 3))
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    optimizer = vlearn.IVON(model, lr=0.1, ess=20)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    s = optimizer.sensitivities(deviation=True)
    assert s.self_influence.dtype == torch.float32 and bool((s.self_influence > 0).all())


def test_a_module_is_found_by_the_forward_it_has():
    """A layer with a rule whose forward was replaced on the object is no longer that layer."""
    case = around(nn.Linear(4, 4))
    layer = case.model[1]
    layer.forward = lambda x: F.linear(x, layer.weight.square(), layer.bias)
    assert_exact(case)


def test_a_model_that_takes_a_nested_structure():
    model = Model(lambda m, x: m.out(torch.tanh(m.gain * x["a"][0] + x["b"])), out=nn.Linear(5, 3))
    model.gain = nn.Parameter(torch.randn(5))
    model.double()
    x = {"a": [torch.randn(4, 5).double()], "b": torch.randn(4, 1).double()}
    case = Case(model, (x,), torch.tensor([0, 1, 2, 0]))
    assert_exact(case)


class Through(nn.Module):
    """Gives its input, and what it is made of alone, beside what its parameter makes of it."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(4))

    def forward(self, h):
        z = torch.tanh(h * self.gain)
        return h, h.square(), z, z.sin()


@pytest.mark.parametrize(
    "used",
    [
        lambda h, square, z, sine: z,
        lambda h, square, z, sine: h + z,
        lambda h, square, z, sine: h * square + z + sine,
        lambda h, square, z, sine: square,
    ],
    ids=["what it makes", "its input too", "all", "its input alone"],
)
def test_a_module_may_return_its_input_beside_what_it_makes_of_it(used):
    def network():
        torch.manual_seed(0)
        parts = {"a": nn.Linear(5, 4), "through": Through(), "out": nn.Linear(4, 3)}
        return Model(lambda m, x: m.out(used(*m.through(m.a(x)))), **parts).double()

    case, twin = Case(network(), torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])), network()
    assert_exact(case)
    optimizer = vlearn.VOGN(case.model.train(), lr=0.1, ess=20)
    loss = case.loss(case.model(case.x), case.target)
    twin.load_state_dict({name: p.detach().clone() for name, p in case.model.named_parameters()})  # the draw
    loss.backward()
    optimizer.step()
    truth = per_example(twin, lambda m: m(case.x), case.each_loss)
    covariance = torch.diag(flat({name: optimizer.posterior().variance[name] for name in moving(case.model)}))
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10
