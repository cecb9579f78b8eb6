"""What `optimizer.sensitivities()` reads, when, and what it leaves alone."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vlearn
from tests.oracles.networks import Model
from tests.oracles.per_example import flat, moving, per_example, relative_error

N, D, C = 6, 5, 3
LABELS = torch.tensor([0, 1, 2, 2, 1, 0])


def inputs(seed=5):
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), *between, nn.Linear(8, C)).double()


def optimizer_of(model, **arguments):
    arguments = {"lr": 0.1, "ess": 100, "generator": torch.Generator().manual_seed(1), **arguments}
    return vlearn.IVON(model, **arguments)


def loss_of(model, x):
    return F.cross_entropy(model(x), LABELS[: len(x)])


def rows(output):
    return F.cross_entropy(output, LABELS[: len(output)], reduction="none")


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def truth_at(weights, model, x):
    model.load_state_dict(weights)
    return per_example(model, lambda m: m(x), rows)


def covariance_of(optimizer, model):
    return torch.diag(flat({name: optimizer.posterior().variance[name] for name in moving(model)}))


def assert_equal(left, right):
    for name in ("residual", "self_influence", "prediction_error", "deviation"):
        a, b = getattr(left, name), getattr(right, name)
        assert (a is None and b is None) or torch.equal(a, b), name


class Operations(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# -- when ---------------------------------------------------------------------------------------------------------


def test_watching_adds_no_operator_to_a_training_step():
    free = ("detach", "alias", "_local_scalar_dense")  # views, and the step counter read as a number

    def step(watched):
        model = network(nn.LayerNorm(8)).train()
        optimizer = optimizer_of(model if watched else model.parameters())
        with Operations() as operations:
            if not watched:
                optimizer.train()
            loss_of(model, inputs()).backward()
            if not watched:
                optimizer.eval()
            optimizer.step()
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


@pytest.mark.parametrize("where", ["before backward", "after backward", "after step"])
@pytest.mark.parametrize("how", ["eval", "no_grad", "eval with gradients"])
def test_passes_that_do_not_train_change_nothing(where, how):
    def read(disturb):
        model = network(nn.LayerNorm(8), nn.Dropout(0.4))
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


# -- which weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", ["context", "two contexts", "closure", "modes", "context without watch before"])
def test_every_loop_is_read_at_its_last_draw(loop):
    model = network(nn.LayerNorm(8))
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
    truth = truth_at(seen[-1], network(nn.LayerNorm(8)), x)
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
    truth = per_example(_twin(model), lambda m: m(inputs()), lambda f: rows(f) + f.square().sum(1))
    covariance = covariance_of(optimizer, model)
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.residual, truth.residual) < 1e-10
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


def test_examples_that_the_loss_leaves_out_have_zero_rows():
    model = network(nn.LayerNorm(8))
    optimizer = optimizer_of(model)
    optimizer.watch(model, loss_reduction="sum")
    rows(model(inputs())[:2]).sum().backward()
    s = optimizer.sensitivities(deviation=True)
    assert bool((s.self_influence[:2] > 0).all()) and not s.self_influence[2:].any()
    assert not s.deviation[2:].any()


def test_two_optimizers_read_their_own_parameters():
    model = network(nn.LayerNorm(8))
    first = optimizer_of(list(model[0].parameters()))
    second = optimizer_of(list(model[2].parameters()) + list(model[3].parameters()))
    first.watch(model), second.watch(model)
    loss_of(model, inputs()).backward()
    for optimizer, wanted in ((first, ("0.",)), (second, ("2.", "3."))):
        twin = _twin(model)
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


# -- what it does not touch ---------------------------------------------------------------------------------------


class Counter(nn.Module):
    """A module without a rule that counts its calls in a buffer and in an attribute."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(8))
        self.register_buffer("calls", torch.zeros(()))
        self.seen = None

    def forward(self, x):
        self.calls += 1
        self.seen = x
        return self.gain * x


def stateful():
    return network(Counter(), nn.Unflatten(1, (1, 8)), nn.InstanceNorm1d(1, track_running_stats=True), nn.Flatten())


def test_replays_update_no_buffer_and_no_attribute():
    model = stateful()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    buffers, seen = {name: b.clone() for name, b in model.named_buffers()}, model[2].seen
    optimizer.sensitivities(deviation=True)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    assert model[2].seen is seen
    assert model[2].calls == 1


@pytest.mark.parametrize("kind", ["dropout", "fallback", "pruning"])
def test_weights_gradients_modes_hooks_and_random_numbers_are_as_before(kind):
    model = network({"dropout": nn.Dropout(0.3), "fallback": nn.LayerNorm(8), "pruning": nn.Linear(8, 8)}[kind])
    if kind == "pruning":
        prune.random_unstructured(model[2], "weight", amount=0.5)
    model[1].eval()
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    optimizer.step()

    def state():
        return [
            *((p, p.grad, p._version, p.requires_grad, p.data.clone(), p.grad.clone()) for p in model.parameters()),
            *((m, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()),
            *((type(v), v) for m in model.modules() for v in m.__dict__.values() if not isinstance(v, dict)),
            torch.get_rng_state(),
            optimizer.generator.get_state(),
        ]

    before = state()
    optimizer.sensitivities(deviation=True)
    for old, new in zip(before, state(), strict=True):
        pairs = zip(old, new, strict=True) if isinstance(old, tuple) else [(old, new)]
        assert all(a is b or (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) for a, b in pairs)


def test_training_with_and_without_reading_is_the_same_bit_for_bit():
    def train(read):
        model = network(nn.LayerNorm(8), nn.Dropout(0.3))
        optimizer = vlearn.IVON(model, lr=0.1, ess=100)
        torch.manual_seed(2)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, inputs(step)).backward()
            if read:
                optimizer.sensitivities(deviation=True)
            optimizer.step()
            if read:
                optimizer.sensitivities(deviation=True)
        return flat(weights_of(model))

    assert torch.equal(train(read=True), train(read=False))


def test_a_mode_changed_since_the_pass_does_not_matter():
    model = network(nn.LayerNorm(8), nn.Dropout(0.5))
    optimizer = optimizer_of(model)
    torch.manual_seed(3)
    loss_of(model, inputs()).backward()
    before = optimizer.sensitivities(deviation=True)
    model.eval()
    assert_equal(optimizer.sensitivities(deviation=True), before)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_grad_mode_around_the_call_does_not_matter(context):
    model = network(nn.LayerNorm(8))
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    before = optimizer.sensitivities(deviation=True)
    with context():
        assert_equal(optimizer.sensitivities(deviation=True), before)
    assert not before.self_influence.requires_grad and not before.deviation.requires_grad


def test_captures_go_with_the_next_training_pass_and_leave_no_hook_behind():
    model = Model(lambda m, x: m.net(x), net=network(), spare=nn.Linear(2, 2).double())  # spare is never used
    optimizer = optimizer_of(model)
    traces = []
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model, inputs()).backward()
        traces.append(weakref.ref(optimizer._watch.trace))
        optimizer.step()
    gc.collect()
    assert [trace() is not None for trace in traces] == [False, False, False, True]
    assert all(len(p._backward_hooks or ()) <= 1 for p in model.parameters())
    optimizer.unwatch()
    gc.collect()
    assert traces[-1]() is None
    assert not any(p._backward_hooks for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_pass_that_fails_leaves_nothing_to_read(error):
    def maybe(m, x):
        if m.fails:
            raise error("stop")
        return x

    model = network(Model(maybe))
    optimizer = optimizer_of(model)
    model[2].fails = False
    loss_of(model, inputs()).backward()
    optimizer.step()
    model[2].fails = True
    with pytest.raises(error):
        model(inputs())
    with pytest.raises(RuntimeError):
        optimizer.sensitivities()
    model[2].fails = False
    optimizer.zero_grad()
    loss_of(model, inputs()).backward()
    truth = truth_at(weights_of(model), network(Model(lambda m, x: x)), inputs())
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.deviation, truth.deviation(covariance_of(optimizer, model))) < 1e-10


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_replay_that_fails_leaves_the_model_as_it_was(error):
    def maybe(m, x):
        if m.fails:
            raise error("stop")
        return x

    model = network(Model(maybe), nn.LayerNorm(8))
    model[2].fails = False
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    before = optimizer.sensitivities(deviation=True)
    weights, hooks = weights_of(model), [len(m._forward_hooks) for m in model.modules()]
    model[2].fails = True
    with pytest.raises(error):
        optimizer.sensitivities(deviation=True)
    model[2].fails = False
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert_equal(optimizer.sensitivities(deviation=True), before)


# -- what has no sensitivities ----------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("noise", [torch.randn_like, F.dropout], ids=["randn", "dropout"])
def test_a_module_without_rule_that_draws_random_numbers_is_refused(noise):
    model = network(Noisy(noise))
    optimizer = optimizer_of(model)
    loss_of(model, inputs()).backward()
    optimizer.step()
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError, match=r"2 \(Noisy\): it draws random numbers itself"):
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


def test_create_graph_is_refused():
    model = network()
    optimizer = optimizer_of(model)
    with pytest.warns(UserWarning, match="create_graph=True"):
        loss_of(model, inputs()).backward(create_graph=True)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        optimizer.sensitivities()
    for p in model.parameters():
        p.grad = None


@pytest.mark.parametrize("layer", [nn.Linear(D, 8), nn.LayerNorm(D)])
def test_a_sequence_first_layer_with_as_many_positions_as_examples_is_refused(layer):
    def build():
        torch.manual_seed(0)
        return Model(lambda m, x: m.out(torch.tanh(m.layer(x.transpose(0, 1))).mean(0)), layer=layer, out=out).double()

    out = nn.Linear(8 if isinstance(layer, nn.Linear) else D, C)
    model = build()
    optimizer = optimizer_of(model)
    loss_of(model, torch.randn(N, N, D, dtype=torch.float64)).backward()
    with pytest.raises(RuntimeError, match=r"layer \(\w+\): an input of shape \(6, 6, 5\) has several axes as long as"):
        optimizer.sensitivities()


def test_as_many_positions_as_examples_is_no_problem_with_the_examples_first():
    model = Model(lambda m, x: m.out(m.norm(torch.tanh(m.fc(x))).mean(1)), fc=nn.Linear(D, 8), norm=nn.LayerNorm(8))
    model.out = nn.Linear(8, C)
    model.double()
    x = torch.randn(N, N, D, dtype=torch.float64)
    optimizer = optimizer_of(model)
    loss_of(model, x).backward()
    twin = Model(model.function, fc=nn.Linear(D, 8), norm=nn.LayerNorm(8), out=nn.Linear(8, C)).double()
    truth = truth_at(weights_of(model), twin, x)
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.deviation, truth.deviation(covariance_of(optimizer, model))) < 1e-10


# -- other people's hooks, checkpoints, outputs -----------------------------------------------------------------------


def with_checkpoint(reentrant):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Dropout(0.5), nn.Linear(8, 8))
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
    s = optimizer.sensitivities(deviation=True)
    assert relative_error(s.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(s.deviation, truth.deviation(covariance)) < 1e-10


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


@pytest.mark.parametrize("how", ["hidden", "written in place"])
def test_an_output_that_cannot_be_followed_is_refused(how):
    hidden = how == "hidden"
    model = Model(lambda m, x: Logits(m.fc(x)) if hidden else m.fc(x), fc=nn.Linear(D, C)).double()
    optimizer = optimizer_of(model)
    output = model(torch.randn(N, 2, D, dtype=torch.float64))
    logits = output.values if hidden else output.mul_(2)
    F.cross_entropy(logits.mean(1), LABELS).backward()
    with pytest.raises(
        ValueError, match="the loss depends on no tensor in the model's output: return tensors, or tuples"
    ):
        optimizer.sensitivities()


def test_several_outputs_ask_for_a_choice():
    model = Model(lambda m, x: {"logits": m.fc(x), "aux": m.aux(x)}, fc=nn.Linear(D, C), aux=nn.Linear(D, 1)).double()
    optimizer = optimizer_of(model)
    output = model(inputs())
    (F.cross_entropy(output["logits"], LABELS) + output["aux"].square().mean()).backward()
    with pytest.raises(ValueError, match=r"the model gives 2 outputs that the loss depends on: .* with output="):
        optimizer.sensitivities()


def test_an_output_that_the_loss_does_not_use_needs_no_choice():
    model = Model(lambda m, x: (m.fc(x), m.aux(x)), fc=nn.Linear(D, C), aux=nn.Linear(D, 1)).double()
    optimizer = optimizer_of(model)
    F.cross_entropy(model(inputs())[0], LABELS).backward()
    s = optimizer.sensitivities(deviation=True)
    assert s.residual.shape == s.deviation.shape == (N, C)


def _twin(model):
    twin = network(*[nn.LayerNorm(8)] * (len(model) - 3))
    twin.load_state_dict(weights_of(model))
    return twin
