"""When `optimizer.sensitivities()` can be read, and at which weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.oracles.networks import Model
from tests.oracles.per_example import flat, moving, per_example, relative_error
from tests.sensitivity.small import (
    LABELS,
    C,
    D,
    PlainNorm,
    assert_equal,
    covariance_of,
    inputs,
    loss_of,
    network,
    optimizer_of,
    rows,
    truth_at,
    twin_of,
    weights_of,
)


class Operations(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# -- when ----------------------------------------------------------------------------------------------------------


def test_watching_adds_no_operator_to_a_training_step():
    free = ("detach", "alias", "_local_scalar_dense")  # views, and the step counter read as a number

    def step(watched):
        model = network(PlainNorm(8)).train()
        optimizer = optimizer_of(model if watched else model.parameters())
        for _ in range(2):  # a first pass of its kind takes one number of each gradient, for a check
            with Operations() as operations:
                if not watched:
                    optimizer.train()
                loss_of(model, inputs()).backward()
                if not watched:
                    optimizer.eval()
                optimizer.step()
            optimizer.zero_grad()
        return sorted(name for name in operations.names if name not in free)

    assert step(watched=True) == step(watched=False)


def test_reading_twice_gives_the_same():
    model = network()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    assert_equal(optimizer.sensitivities(deviation=True), optimizer.sensitivities(deviation=True))


def test_the_deviation_is_there_only_if_asked_for():
    model = network()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    assert optimizer.sensitivities().deviation is None


def test_sigma_is_the_state_at_the_call():
    model = network()
    optimizer = optimizer_of(model, beta2=0.5)
    loss_of(model, inputs()).backward()
    before = optimizer.sensitivities()
    optimizer.step()
    after = optimizer.sensitivities()
    assert torch.equal(before.residual, after.residual)
    assert before.step == after.step == 1
    assert not torch.equal(before.self_influence, after.self_influence)
    for state in optimizer.state.values():
        state["hessian"].add_(optimizer.param_groups[0]["weight_decay"]).mul_(2)
        state["hessian"].sub_(optimizer.param_groups[0]["weight_decay"])
    assert torch.allclose(optimizer.sensitivities().self_influence, after.self_influence / 2)


def test_the_draw_scale_is_ess_and_the_sensitivity_scale_num_data():
    found = []
    for ess in (100, 1e6):
        model = network()
        optimizer = optimizer_of(model, ess=ess, num_data=50)
        with torch.no_grad():
            variance = covariance_of(optimizer, model)
        loss_of(model, inputs()).backward()
        truth = truth_at(weights_of(model), network(), inputs())
        s = optimizer.sensitivities()
        assert relative_error(s.self_influence, truth.self_influence(variance)) < 1e-10
        found.append(float(variance[0, 0]))
    assert found[0] == found[1] == pytest.approx(1 / (50 * (1 + 1e-4)))


def test_rows_count_the_steps():
    model = network()
    optimizer = optimizer_of(model)
    for step in range(1, 4):
        optimizer.zero_grad()
        loss_of(model, inputs()).backward()
        assert optimizer.sensitivities().step == step
        optimizer.step()
        assert optimizer.sensitivities().step == step


def test_steps_in_between_raise_and_name_the_last_one():
    model = network()
    optimizer = optimizer_of(model)
    optimizer.watch(model, every=3)
    for step in range(1, 8):
        optimizer.zero_grad()
        loss_of(model, inputs()).backward()
        optimizer.step()
        if step % 3 == 1:
            assert optimizer.sensitivities().step == step
        else:
            last = step - (step - 1) % 3
            with pytest.raises(RuntimeError, match=rf"no captured training step; .*step is {last} \(every=3\)"):
                optimizer.sensitivities()


@pytest.mark.parametrize("how", ["unwatched", "before any pass", "before backward", "after an unused pass"])
def test_without_a_backward_pass_it_raises(how):
    model = network()
    optimizer = optimizer_of(model.parameters() if how == "unwatched" else model)
    message = {
        "unwatched": r"needs a watched model: use IVON\(model, \.\.\.\) or optimizer\.watch\(model\)",
        "before any pass": "has no captured training step .*: run forward and backward in train mode first",
    }.get(how, r"sensitivities\(\) before backward\(\): no gradient has reached the model's output yet")
    output = model(inputs()) if how in ("before backward", "after an unused pass") else None
    if how == "after an unused pass":
        del output
    with pytest.raises(RuntimeError, match=message):
        optimizer.sensitivities()


def test_two_training_passes_before_one_backward_raise():
    model = network()
    optimizer = optimizer_of(model)
    (loss_of(model, inputs(1)) + loss_of(model, inputs(2))).backward()
    with pytest.raises(RuntimeError, match="two training forward passes came before one backward pass"):
        optimizer.sensitivities()
    optimizer.step()
    loss_of(model, inputs()).backward()
    optimizer.sensitivities()


def test_a_training_pass_that_is_thrown_away_does_not_count():
    model = network()
    optimizer = optimizer_of(model)
    model(inputs(1))
    loss_of(model, inputs()).backward()
    truth = truth_at(weights_of(model), network(), inputs())
    s = optimizer.sensitivities()
    assert relative_error(s.self_influence, truth.self_influence(covariance_of(optimizer, model))) < 1e-10


def test_a_model_called_in_parts_raises():
    model = nn.ModuleDict({"encoder": nn.Linear(D, 4), "decoder": nn.Linear(4, C)}).double()
    optimizer = optimizer_of(model)
    F.cross_entropy(model["decoder"](torch.tanh(model["encoder"](inputs()))), LABELS).backward()
    with pytest.raises(RuntimeError, match="two training forward passes"):
        optimizer.sensitivities()
    optimizer.step()


def test_only_the_part_that_is_called_is_captured():
    model = nn.ModuleDict({"used": network(), "spare": nn.Linear(2, 2)}).double()
    optimizer = optimizer_of(model)
    F.cross_entropy(model["used"](inputs()), LABELS).backward()
    truth = truth_at(weights_of(model["used"]), network(), inputs())
    variance = optimizer.posterior().variance
    covariance = torch.diag(flat({name: variance["used." + name] for name in moving(model["used"])}))
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


def test_a_loss_that_is_a_submodule_is_no_pass_of_its_own():
    """As a LightningModule has it, which is then watched as a whole."""
    model = nn.ModuleDict({"net": network(), "loss": nn.CrossEntropyLoss()})
    optimizer = optimizer_of(model)
    model["loss"](model["net"](inputs()), LABELS).backward()
    truth = truth_at(weights_of(model["net"]), network(), inputs())
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.deviation, truth.deviation(covariance_of(optimizer, model))) < 1e-10


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_an_output_that_is_cast_at_the_end_has_its_residual_wherever_the_loss_is_taken(where):
    """Accelerate casts the outputs of a model under mixed precision, whose own loss came before."""

    def forward(model, x):
        logits = model.fc(x)
        loss = F.cross_entropy(logits, LABELS)
        return {"loss": loss, "logits": logits.float()}

    model = Model(forward, fc=network())
    optimizer = optimizer_of(model)
    output = model(inputs())
    (output["loss"] if where == "inside" else F.cross_entropy(output["logits"], LABELS)).backward()
    truth = truth_at(weights_of(model.fc), network(), inputs())
    s = optimizer.sensitivities(deviation=True)
    assert s.residual.dtype == torch.float32
    torch.testing.assert_close(s.residual.double(), truth.residual, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        s.deviation.double(), truth.deviation(covariance_of(optimizer, model)), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("where", ["before backward", "after backward", "after step"])
@pytest.mark.parametrize("how", ["eval", "no_grad", "eval with gradients"])
def test_passes_that_do_not_train_change_nothing(where, how):
    def read(disturb):
        model = network(PlainNorm(8), nn.Dropout(0.4))
        optimizer = optimizer_of(model)

        def other_pass():
            if disturb:
                model.train(how == "no_grad")
                with torch.set_grad_enabled(how == "eval with gradients"):
                    model(inputs(9)[:2])
                model.train()

        torch.manual_seed(3)
        loss = loss_of(model, inputs())
        torch.manual_seed(4)
        if where == "before backward":
            other_pass()
        loss.backward()
        if where == "after backward":
            other_pass()
        if where == "after step":
            optimizer.step()
            other_pass()
        return optimizer.sensitivities(deviation=True)

    assert_equal(read(disturb=True), read(disturb=False))


# -- which weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["context", "two contexts", "closure", "modes", "context without watch before"])
def test_every_loop_is_read_at_its_last_draw(loop):
    model = network(PlainNorm(8))
    optimizer = optimizer_of(model.parameters() if "without" in loop else model, mc_samples=2 if "two" in loop else 1)
    if "without" in loop:
        optimizer.watch(model)
    seen, x = [], inputs()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        seen.append(weights_of(model))
        return loss

    if "context" in loop:
        for _ in range(2 if "two" in loop else 1):
            with optimizer.sampled_params(train=True):
                closure()
        optimizer.step()
    elif loop == "closure":
        optimizer.step(closure)
    else:
        optimizer.train()
        closure()
        optimizer.eval()
        optimizer.step()
    truth = truth_at(seen[-1], network(PlainNorm(8)), x)
    names = "param_" if "without" in loop else ""
    variance = optimizer.posterior().variance
    keys = [f"{names}{i}" for i in range(len(seen[-1]))] if names and names + "0" in variance else list(seen[-1])
    covariance = torch.diag(flat({key: variance[key] for key in keys}))
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


def test_two_losses_of_one_pass_are_summed():
    model = network()
    optimizer = optimizer_of(model)
    output = model(inputs())
    F.cross_entropy(output, LABELS).backward(retain_graph=True)
    output.square().sum(1).mean().backward()
    truth = per_example(twin_of(model), lambda m: m(inputs()), lambda f: rows(f) + f.square().sum(1))
    covariance = covariance_of(optimizer, model)
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.residual, truth.residual) < 1e-10
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


def test_examples_that_the_loss_leaves_out_have_zero_rows():
    model = network(PlainNorm(8))
    optimizer = optimizer_of(model)
    optimizer.watch(model, loss_reduction="sum")
    rows(model(inputs())[:2]).sum().backward()
    s = optimizer.sensitivities(deviation=True)
    assert bool((s.self_influence[:2] > 0).all()) and not s.self_influence[2:].any()
    assert not s.deviation[2:].any()


def test_an_output_may_have_no_class_dimension():
    def read(last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(D, 1), last).double()
        optimizer = optimizer_of(model)
        F.mse_loss(model(inputs()).flatten(), LABELS.double()).backward()
        optimizer.step()
        return optimizer.sensitivities(deviation=True)

    flat_rows, wide = read(nn.Flatten(0)), read(nn.Identity())
    assert flat_rows.deviation.shape == (len(LABELS),)
    for name in ("residual", "deviation", "self_influence", "prediction_error"):
        torch.testing.assert_close(getattr(flat_rows, name), getattr(wide, name).view_as(getattr(flat_rows, name)))


def test_two_optimizers_read_their_own_parameters():
    model = network(PlainNorm(8))
    first = optimizer_of(list(model[0].parameters()))
    second = optimizer_of(list(model[2].parameters()) + list(model[3].parameters()))
    first.watch(model), second.watch(model)
    loss_of(model, inputs()).backward()
    for optimizer, wanted in ((first, ("0.",)), (second, ("2.", "3."))):
        twin = twin_of(model)
        for name, p in twin.named_parameters():
            p.requires_grad_(name.startswith(wanted))
        truth = per_example(twin, lambda m: m(inputs()), rows)
        covariance = torch.diag(flat({name: optimizer.posterior().variance[name] for name in moving(twin)}))
        s = optimizer.sensitivities(deviation=True)
        assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
        assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


def test_the_deviation_is_refused_once_another_optimizer_has_moved_the_model():
    model = network()
    first, second = optimizer_of(list(model[0].parameters())), optimizer_of(list(model[2].parameters()))
    first.watch(model), second.watch(model)
    loss_of(model, inputs()).backward()
    before = first.sensitivities(deviation=True)
    second.step()
    with pytest.raises(RuntimeError, match="repeating the forward pass gave other outputs"):
        first.sensitivities(deviation=True)
    assert torch.allclose(first.sensitivities().self_influence, before.self_influence)


class Attending(nn.Module):
    """A learned query for each example, in attention."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(2, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, h):
        rows = torch.stack([h, h.sin(), h.square()], 1)
        query = self.query.unsqueeze(0).expand(len(h), -1, -1)
        return self.attention(query, rows, rows)[0].sum(1)


class Starting(nn.Module):
    """A learned first state, of a recurrent layer."""

    def __init__(self):
        super().__init__()
        self.state = nn.Parameter(torch.randn(1, 1, 4))
        self.recurrent = nn.GRU(4, 4, batch_first=True)

    def forward(self, h):
        return self.recurrent(h.unsqueeze(1), self.state.expand(-1, len(h), -1))[0][:, 0]


class Sharing(nn.Module):
    """A parameter itself, given to a module that has another."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 4))
        self.reading = Model(lambda m, h, table: m.gain * (h @ table))
        self.reading.gain = nn.Parameter(torch.randn(4))

    def forward(self, h):
        return self.reading(h, self.table)


class Projecting(nn.Module):
    """A layer with a rule that is given a parameter's row for each example."""

    def __init__(self):
        super().__init__()
        self.start = nn.Parameter(torch.randn(4))
        self.linear = nn.Linear(4, 4)

    def forward(self, h):
        return h * self.linear(self.start.expand(len(h), -1))


@pytest.mark.parametrize("kind", [Attending, Starting, Sharing, Projecting])
def test_a_parameter_that_is_an_input_of_a_layer_may_be_moved_by_the_step(kind):
    def make():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(D, 4), kind(), nn.Linear(4, C)).double()

    model = make()
    optimizer = optimizer_of(model)
    loss = loss_of(model, inputs())
    drawn = weights_of(model)
    loss.backward()
    optimizer.step()
    truth, covariance = truth_at(drawn, make(), inputs()), covariance_of(optimizer, model)
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10
