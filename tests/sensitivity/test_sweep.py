"""What `vlearn.sweep` gives for any loader, posterior and mode, and what it leaves alone."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import vlearn
from tests.oracles.networks import Model
from tests.oracles.per_example import flat, moving, per_example, relative_error
from tests.sensitivity.small import PlainNorm

N, D, C = 12, 5, 3
LABELS = torch.arange(N) % C
COLUMNS = ("loss", "loo_loss", "deviation", "self_influence", "leverage", "prediction_error")


def inputs():
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


def network(*between):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), PlainNorm(8), *between, nn.Linear(8, C)).double()


def optimizer_of(model, **arguments):
    arguments = {"lr": 0.1, "ess": 100, "generator": torch.Generator().manual_seed(1), **arguments}
    return vlearn.IVON(model, **arguments)


def swept(model, posterior, loader=None, loss_fn=F.cross_entropy, leverage="exact", **arguments):
    loader = [(inputs(), LABELS)] if loader is None else loader
    return vlearn.sweep(model, posterior, loader, loss_fn, leverage, progress=False, **arguments)


def assert_close(left, right, columns=COLUMNS):
    for name in columns:
        assert relative_error(getattr(left, name), getattr(right, name)) < 1e-12, name


def rows(output):
    return F.cross_entropy(output, LABELS, reduction="none")


# -- loaders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 5, N, 100])
def test_the_batch_size_does_not_matter(size):
    model = network()
    posterior = optimizer_of(model).posterior()
    loader = DataLoader(TensorDataset(inputs(), LABELS), batch_size=size)
    table = swept(model, posterior, loader)
    assert_close(table, swept(model, posterior))
    assert torch.equal(table.index, torch.arange(N)) and len(table) == N


@pytest.mark.parametrize("count", [64, 65, 130])
def test_many_batches_stay_in_the_loaders_order(count):
    model = network()
    posterior = optimizer_of(model).posterior()
    one = swept(model, posterior, [(inputs()[:1], LABELS[:1])])
    examples = torch.arange(count) % N
    table = swept(model, posterior, DataLoader(TensorDataset(inputs()[examples], LABELS[examples])))
    assert torch.equal(table.index, torch.arange(count)) and table.loss[0] == one.loss[0]
    assert_close(table, swept(model, posterior, [(inputs()[examples], LABELS[examples])]))


def test_a_shuffled_indexed_loader_names_its_examples():
    model = network()
    posterior = optimizer_of(model).posterior()
    dataset = vlearn.IndexedDataset(TensorDataset(inputs(), LABELS))
    assert len(dataset) == N
    order = torch.Generator().manual_seed(3)
    table = swept(model, posterior, DataLoader(dataset, batch_size=5, shuffle=True, generator=order))
    assert table.index.tolist() == list(range(N))
    plain = swept(model, posterior)
    for name in COLUMNS:
        assert relative_error(getattr(table, name), getattr(plain, name)[table.index]) < 1e-12


def two_inputs():
    torch.manual_seed(0)
    model = Model(lambda m, x, shift: m.net(x) + shift, net=network())
    return model, inputs(), torch.randn(N, 1, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["tuple", "list", "dict"])
def test_inputs_may_be_positional_or_keyword_arguments(kind):
    model, x, shift = two_inputs()
    posterior = optimizer_of(model).posterior()
    batch = {"tuple": (x, shift), "list": [x, shift], "dict": {"shift": shift, "x": x}}[kind]
    table = swept(model, posterior, [(batch, LABELS)])
    truth = per_example(model.eval(), lambda m: m(x, shift), rows)
    covariance = torch.diag(flat({name: posterior.variance[name] for name in moving(model)}))
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-10


def test_batches_may_be_lists_and_indices_any_sequence():
    model = network()
    table = swept(model, optimizer_of(model).posterior(), [[inputs(), LABELS, list(range(N, 2 * N))]])
    assert torch.equal(table.index, torch.arange(N, 2 * N))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_grad_mode_around_it_does_not_matter(context):
    """As in the evaluation loops of training frameworks; the batches are then inference tensors."""
    model = network()
    posterior = optimizer_of(model).posterior()
    before = swept(model, posterior)
    with context():
        table = swept(model, posterior, [(inputs() * 1, LABELS * 1)])
    assert_close(table, before)
    assert all(not getattr(table, name).requires_grad and not getattr(table, name).is_inference() for name in COLUMNS)


# -- models and posteriors --------------------------------------------------------------------------------------------


def test_an_unwatched_model_and_a_clone_give_the_same():
    model = network()
    optimizer = optimizer_of(model)
    before = swept(model, optimizer.posterior())
    unwatched = optimizer_of(network().named_parameters())
    assert_close(swept(network(), unwatched.posterior().clone()), before)
    assert_close(swept(model, optimizer.posterior().clone()), before)


@pytest.mark.parametrize("draw", [False, True])
def test_a_clone_is_swept_at_its_own_mean(draw):
    model = network(nn.Dropout(0.3))
    optimizer = optimizer_of(model)
    clone = optimizer.posterior().clone()
    before = swept(model, clone)
    F.cross_entropy(model(inputs()), LABELS).backward()
    optimizer.step()
    if draw:
        F.cross_entropy(model(inputs()), LABELS).backward()
    state = state_of(model)
    assert_close(swept(model, clone), before)
    assert_close(swept(model, clone.clone()), before)
    assert_same(state, state_of(model))
    assert relative_error(swept(model, optimizer.posterior()).deviation, before.deviation) > 1e-3


def test_parameters_that_the_posterior_lacks_do_not_move():
    model = network()
    posterior = optimizer_of(list(model[3].named_parameters())).posterior()
    model.requires_grad_(False)
    model[3].requires_grad_(True)
    truth = per_example(model.eval(), lambda m: m(inputs()), rows)
    model.requires_grad_(True)
    covariance = torch.eye(truth.gradients.shape[1], dtype=torch.float64) / (100 * (1 + 1e-4))
    table = swept(model, posterior)
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-10


def test_it_runs_at_the_mean_while_a_draw_waits_and_the_step_is_the_same():
    def train(sweep_in_between):
        model = network(nn.Dropout(0.3))
        optimizer = optimizer_of(model)
        clean = swept(model, optimizer.posterior())
        torch.manual_seed(2)
        F.cross_entropy(model(inputs()), LABELS).backward()
        drawn = [p.detach().clone() for p in model.parameters()]
        live = optimizer.sensitivities(deviation=True)
        if sweep_in_between:
            assert_close(swept(model, optimizer.posterior()), clean)
            assert all(torch.equal(p, d) for p, d in zip(model.parameters(), drawn, strict=True))
            again = optimizer.sensitivities(deviation=True)
            assert torch.equal(again.deviation, live.deviation)
        optimizer.step()
        return flat(dict(model.named_parameters()))

    assert torch.equal(train(True), train(False))


def test_float32_is_near_float64():
    model = network()
    table = swept(model, optimizer_of(model).posterior())
    single = network().float()
    other = swept(single, optimizer_of(single).posterior(), [(inputs().float(), LABELS)])
    for name in COLUMNS:
        assert getattr(other, name).dtype == torch.float32
        assert relative_error(getattr(other, name).double(), getattr(table, name)) < 1e-4


def test_batch_norm_is_swept_with_its_running_statistics():
    model = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4), nn.Linear(4, C)).double().train()
    optimizer = optimizer_of(model)
    F.cross_entropy(model(inputs()), LABELS).backward()
    optimizer.step()
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    table = swept(model, optimizer.posterior())
    assert all(torch.equal(b, statistics[name]) for name, b in model.named_buffers())
    posterior = optimizer.posterior()
    truth = per_example(model.eval(), lambda m: m(inputs()), rows)
    covariance = torch.diag(flat({name: posterior.variance[name] for name in moving(model)}))
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-10


def test_torchs_own_loss_takes_the_scores_of_a_model_that_gives_its_loss_beside_them():
    model = Model(lambda m, x: {"loss": m.net(x).mean(), "logits": m.net(x)}, net=network()).double()
    posterior = optimizer_of(model).posterior()
    assert torch.equal(swept(model, posterior).loo_loss, swept(model, posterior, output="logits").loo_loss)


@pytest.mark.parametrize("output", ["logits", lambda whole: whole["logits"]])
def test_one_of_several_outputs_is_selected(output):
    model = Model(lambda m, x: {"aux": m.aux(x), "logits": m.net(x)}, net=network(), aux=nn.Linear(D, 1)).double()
    posterior = optimizer_of(model).posterior()
    table = swept(model, posterior, output=output)
    twin = Model(lambda m, x: m.net(x), net=network(), aux=nn.Linear(D, 1)).double()
    twin.load_state_dict(model.state_dict())
    truth = per_example(twin.eval(), lambda m: m(inputs()), rows)
    covariance = torch.diag(flat({name: posterior.variance[name] for name in moving(model)}))
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-10
    assert relative_error(table.leverage, truth.leverage(covariance)) < 1e-10


def test_a_callable_loss_sees_every_output():
    model = Model(lambda m, x: (m.net(x), m.aux(x)), net=network(), aux=nn.Linear(D, 1)).double()
    posterior = optimizer_of(model).posterior()

    def loss(output, target):
        return F.cross_entropy(output[0], target, reduction="none") + output[1].square().squeeze(1)

    table = swept(model, posterior, loss_fn=loss, output=0, leverage=None)
    truth = per_example(model.eval(), lambda m: m(inputs())[0], rows, whole_loss=lambda m: loss(m(inputs()), LABELS))
    covariance = torch.diag(flat({name: posterior.variance[name] for name in moving(model)}))
    assert relative_error(table.loss, truth.loss) < 1e-12
    assert relative_error(table.self_influence, truth.self_influence(covariance)) < 1e-10
    assert relative_error(table.deviation, truth.deviation(covariance)) < 1e-10
    assert table.leverage is None


# -- what it does not touch ---------------------------------------------------------------------------------------


def state_of(model):
    return [
        *((p, p.grad, p._version, p.requires_grad, p.data.clone()) for p in model.parameters()),
        *((p.grad.clone(),) for p in model.parameters() if p.grad is not None),
        *((m.training, dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in model.modules()),
        *((p._backward_hooks,) for p in model.parameters()),
        *((b, b.clone()) for b in model.buffers()),
        (torch.get_rng_state(),),
    ]


def assert_same(before, after):
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            assert a is b or (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b)


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("leverage", ["probe", "exact", None])
def test_everything_is_as_before(watched, leverage):
    model = network(nn.Dropout(0.3), nn.BatchNorm1d(8)).train()
    model[0].eval()
    model[2].bias.requires_grad_(False)
    optimizer = optimizer_of(model if watched else model.named_parameters())
    with optimizer.sampled_params(train=True):
        F.cross_entropy(model(inputs()), LABELS).backward()
    before = state_of(model)
    swept(model, optimizer.posterior(), leverage=leverage, generator=torch.Generator().manual_seed(1))
    assert_same(before, state_of(model))


class Failing(nn.Module):
    def __init__(self):
        super().__init__()
        self.error = None

    def forward(self, x):
        if self.error is not None:
            raise self.error("stop")
        return x


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["loader", "model", "loss", "replay"])
@pytest.mark.parametrize("draw", [False, True])
def test_everything_is_as_before_after_an_interruption(error, where, draw):
    model = network(Failing(), nn.Dropout(0.3)).train()
    optimizer = optimizer_of(model)
    if draw:
        F.cross_entropy(model(inputs()), LABELS).backward()
    before = state_of(model)

    def loader():
        yield inputs()[:6], LABELS[:6]
        if where == "loader":
            raise error("stop")
        model[3].error = error if where == "model" else None
        yield inputs()[6:], LABELS[6:]

    def loss(output, target):
        if where == "loss":
            raise error("stop")
        model[3].error = error if where == "replay" else None
        return F.cross_entropy(output, target, reduction="none")

    with pytest.raises(error):
        swept(model, optimizer.posterior(), loader(), loss)
    assert_same(before, state_of(model))
    model[3].error = None
    assert_close(swept(model, optimizer.posterior()), swept(network(), optimizer_of(network()).posterior()))


# -- the probe ------------------------------------------------------------------------------------------------------


def test_the_probe_is_reproducible_by_its_generator():
    model = network()
    posterior = optimizer_of(model).posterior()
    one, other = (swept(model, posterior, leverage="probe", generator=torch.Generator().manual_seed(7)) for _ in "ab")
    assert torch.equal(one.leverage, other.leverage)
    assert not torch.equal(one.leverage, swept(model, posterior, leverage="probe").leverage)


# -- errors ---------------------------------------------------------------------------------------------------------


def test_a_leverage_that_is_none_of_the_three_is_refused():
    model = network()
    with pytest.raises(ValueError) as error:
        swept(model, optimizer_of(model).posterior(), leverage="Probe")
    assert str(error.value) == "leverage='Probe', but it must be 'probe', 'exact' or None: use 'probe'."


@pytest.mark.parametrize("loss_fn", [nn.functional.cross_entropy, nn.CrossEntropyLoss()])
def test_a_loss_that_is_one_number_is_refused(loss_fn):
    model = network()
    with pytest.raises(ValueError) as error:
        swept(model, optimizer_of(model).posterior(), loss_fn=lambda output, target: loss_fn(output, target))
    assert str(error.value) == (
        "loss_fn gave one number for the whole batch, but sensitivities need each example's own loss: pass a loss with "
        "a `reduction` argument, or a callable (output, target) -> [N]."
    )


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        ((inputs(),), "1 entries"),
        ((inputs(), LABELS, LABELS, LABELS), "4 entries"),
        (inputs(), "Tensor"),
    ],
)
def test_a_batch_of_another_form_is_refused(batch, found):
    model = network()
    with pytest.raises(ValueError) as error:
        swept(model, optimizer_of(model).posterior(), [batch])
    assert str(error.value) == (
        f"the loader gave a batch of {found}, but it must yield (x, y) or (x, y, index), or dicts with 'labels': put "
        "several inputs into one tuple, ((x1, x2), y)."
    )


@pytest.mark.parametrize("x", ["text", {"name": "text"}, ()])
def test_a_batch_without_tensors_is_refused(x):
    model = network()
    with pytest.raises(ValueError, match="the loader gave inputs without a tensor"):
        swept(model, optimizer_of(model).posterior(), [(x, LABELS)])


def test_an_index_of_another_length_is_refused():
    model = network()
    with pytest.raises(ValueError) as error:
        swept(model, optimizer_of(model).posterior(), [(inputs(), LABELS, torch.arange(3))])
    assert str(error.value) == "the loader gave 3 indices for 12 examples, but it must give one for each."


def test_an_empty_loader_is_refused():
    model = network()
    exhausted = iter([])
    with pytest.raises(ValueError) as error:
        swept(model, optimizer_of(model).posterior(), exhausted)
    assert str(error.value) == "the loader gave no batch: pass one that can be iterated again."


def test_a_posterior_of_another_model_is_refused():
    other = nn.ModuleDict({"net": nn.Linear(2, 2)})
    with pytest.raises(ValueError) as error:
        swept(network(), vlearn.IVON(other, lr=0.1, ess=10).posterior())
    assert str(error.value) == (
        "the posterior's parameters (net.weight, net.bias, ...) are not those of this Sequential (0.weight, 0.bias, "
        "2.weight, ...): pass the model that was trained."
    )


def test_a_posterior_of_another_model_with_the_same_names_is_refused():
    with pytest.raises(ValueError) as error:
        swept(network(), vlearn.IVON(nn.Sequential(nn.Linear(2, 2)), lr=0.1, ess=10).posterior())
    assert str(error.value) == (
        "the posterior's '0.weight' has shape (2, 2), but that of this Sequential has (8, 5): pass the model that was "
        "trained."
    )


def test_a_stale_posterior_is_refused():
    model = network()
    optimizer = optimizer_of(model)
    posterior = optimizer.posterior()
    F.cross_entropy(model(inputs()), LABELS).backward()
    optimizer.step()
    before = state_of(model)
    with pytest.raises(RuntimeError) as error:
        swept(model, posterior)
    assert str(error.value) == (
        "this posterior is stale, the optimizer has stepped since: call optimizer.posterior() again, or keep one with "
        ".clone()."
    )
    assert_same(before, state_of(model))


def test_several_outputs_ask_for_a_choice():
    model = Model(lambda m, x: (m.net(x), m.aux(x)), net=network(), aux=nn.Linear(D, 1)).double()

    def loss(output, target):
        return F.cross_entropy(output[0], target, reduction="none") + output[1].square().squeeze(1)

    with pytest.raises(ValueError, match=r"the model gives 2 outputs that the loss depends on: select the one"):
        swept(model, optimizer_of(model).posterior(), loss_fn=loss)


def test_a_model_that_mixes_examples_is_refused():
    model = network(nn.BatchNorm1d(8, track_running_stats=False))
    with pytest.raises(RuntimeError, match=r"sensitivities are not defined for this model: 3 \(BatchNorm1d\)"):
        swept(model, optimizer_of(model).posterior())


def test_a_model_of_which_nothing_moves_is_refused():
    model = network()
    posterior = optimizer_of(model).posterior()
    model.requires_grad_(False)
    with pytest.raises(RuntimeError, match="the model's output depends on no parameter of the posterior"):
        swept(model, posterior)


@pytest.mark.filterwarnings("ignore:.*_register_pytree_node. is deprecated:FutureWarning")  # by torch 2.6 itself
def test_a_dataclass_that_torch_does_not_know_is_named_and_one_that_it_knows_is_taken():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        kind: str

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network()

        def forward(self, x):
            return Output(self.body(x), "classes")

    def loss(output, target):
        return F.cross_entropy(output.logits, target, reduction="none")

    model = Wrapped()
    posterior = optimizer_of(model).posterior()
    with pytest.raises(RuntimeError, match=r"the model gives a Output, in which no tensors are seen: .*register_datac"):
        swept(model, posterior, loss_fn=loss)
    torch.export.register_dataclass(Output)
    found = swept(model, posterior, loss_fn=loss)
    twin = network()
    torch.testing.assert_close(found.loo_loss, swept(twin, optimizer_of(twin).posterior()).loo_loss)


def test_a_progress_bar_is_shown_on_request(capsys):
    model = network()
    vlearn.sweep(model, optimizer_of(model).posterior(), [(inputs(), LABELS)], F.cross_entropy, progress=True)
    assert "sweep" in capsys.readouterr().err
    vlearn.sweep(model, optimizer_of(model).posterior(), [(inputs(), LABELS)], F.cross_entropy)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
