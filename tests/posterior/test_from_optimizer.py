"""Posteriors from the state of torch's optimizers, against the formulas of Table 1."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vlearn
from vlearn.posterior import from_optimizer

N, DELTA = 50, 3.0
LABELS = torch.arange(12) % 3


def trained(make, steps=5, dtype=torch.float64):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)
    optimizer, gradients = make(model.parameters()), []
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(12, 4, dtype=dtype)), LABELS).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return model, optimizer, gradients


def running_mean(gradients, name, beta):
    average = torch.zeros_like(gradients[0][name])
    for gradient in gradients:
        average = beta * average + (1 - beta) * gradient[name].square()
    return average


@pytest.mark.parametrize("debias", [True, False])
@pytest.mark.parametrize(
    ("make", "beta"),
    [
        (lambda p: torch.optim.Adam(p, betas=(0.9, 0.95)), 0.95),
        (lambda p: torch.optim.AdamW(p, weight_decay=0.3), 0.999),
        (lambda p: torch.optim.AdamW(p, foreach=True), 0.999),
        (lambda p: torch.optim.RMSprop(p, alpha=0.9, momentum=0.5), 0.9),
        (lambda p: torch.optim.RMSprop(p, centered=True), 0.99),
        (lambda p: torch.optim.Adam([{"params": list(p), "betas": (0.9, 0.9)}], capturable=False), 0.9),
    ],
    ids=["adam", "adamw", "foreach", "rmsprop", "centred", "group"],
)
def test_the_variance_is_one_over_n_root_v_plus_delta(make, beta, debias):
    model, optimizer, gradients = trained(make)
    posterior = from_optimizer(optimizer, model, num_data=N, prior_precision=DELTA, debias=debias)
    for name in dict(model.named_parameters()):
        v = running_mean(gradients, name, beta) / (1 - beta ** len(gradients) if debias else 1)
        assert torch.allclose(posterior.variance[name], 1 / (N * v.sqrt() + DELTA), rtol=1e-10)
        assert torch.equal(posterior.mean[name], model.get_parameter(name))
    assert posterior.num_data == N and posterior.uncalibrated_reason is None
    assert torch.equal(posterior.draw_variance["0.bias"], posterior.variance["0.bias"])


def test_amsgrad_has_the_largest_average():
    model, optimizer, _ = trained(lambda p: torch.optim.Adam(p, amsgrad=True, betas=(0.9, 0.5)))
    posterior = from_optimizer(optimizer, model, num_data=N, prior_precision=DELTA, debias=False)
    for name, p in model.named_parameters():
        v = optimizer.state[p]["max_exp_avg_sq"]
        assert not torch.equal(v, optimizer.state[p]["exp_avg_sq"])
        assert torch.allclose(posterior.variance[name], 1 / (N * v.sqrt() + DELTA), rtol=1e-12)


def test_weight_decay_is_not_the_prior():
    found = []
    for decay in (0.0, 0.5):
        model, optimizer, _ = trained(lambda p: torch.optim.AdamW(p, lr=0.0, weight_decay=decay))  # noqa: B023
        found.append(from_optimizer(optimizer, model, num_data=N, prior_precision=DELTA))
    assert all(torch.equal(found[0].variance[name], found[1].variance[name]) for name in found[0].names)


def test_it_is_a_copy_and_is_swept_at_its_own_mean():
    model, optimizer, _ = trained(torch.optim.Adam)
    posterior = from_optimizer(optimizer, model, num_data=N, prior_precision=DELTA)
    x = torch.randn(12, 4, dtype=torch.float64)
    before = vlearn.sweep(model, posterior, [(x, LABELS)], F.cross_entropy, progress=False)
    state = copy.deepcopy(optimizer.state_dict())
    posterior.kl(), posterior.entropy(), posterior.sample()
    for old, new in zip(state["state"].values(), optimizer.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[key], new[key]) for key in old)
    F.cross_entropy(model(x), LABELS).backward()
    optimizer.step()
    after = vlearn.sweep(model, posterior, [(x, LABELS)], F.cross_entropy, progress=False)
    assert torch.equal(before.loo_loss, after.loo_loss)
    assert not torch.equal(model[0].weight, posterior.mean["0.weight"])


def test_frozen_and_unused_parameters_do_not_move():
    model, optimizer, _ = trained(torch.optim.Adam)
    model[0].bias.requires_grad_(False)
    unused = nn.Linear(2, 2).double()
    model.append(nn.Identity())
    model[3].extra = unused
    optimizer.add_param_group({"params": unused.parameters()})
    posterior = from_optimizer(optimizer, model, num_data=N, prior_precision=DELTA)
    assert posterior.names == ("0.weight", "2.weight", "2.bias")


def test_bfloat16_moments_give_float32_variances():
    model, optimizer, _ = trained(torch.optim.Adam, dtype=torch.bfloat16)
    posterior = from_optimizer(optimizer, model, num_data=N, prior_precision=DELTA)
    assert posterior.variance["0.weight"].dtype == torch.float32


def test_sgd_ranks_by_the_gradient_norm_and_has_no_scale():
    model, optimizer, _ = trained(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    posterior = from_optimizer(optimizer, model, num_data=N)
    assert all(torch.equal(posterior.variance[name], torch.ones_like(p)) for name, p in model.named_parameters())
    for read, what in ((posterior.sample, "draws"), (posterior.kl, "KL"), (posterior.clone().entropy, "entropy")):
        with pytest.raises(RuntimeError, match=f"^this posterior gives no {what}.*: it comes from SGD"):
            read()


def test_sgd_gives_no_leave_one_out_loss():
    model, optimizer, _ = trained(torch.optim.SGD)
    posterior, x = from_optimizer(optimizer, model, num_data=N), torch.randn(12, 4, dtype=torch.float64)
    reason = (
        "it comes from SGD, whose Σ is the identity times an arbitrary number, so self-influence and deviation rank "
        "the examples (sweep(..., loo_loss=False)) but have no size. Train with an adaptive or variational optimizer, "
        "or fit a Laplace approximation."
    )
    with pytest.raises(RuntimeError) as error:
        vlearn.sweep(model, posterior, [(x, LABELS)], F.cross_entropy, progress=False)
    assert str(error.value) == f"this posterior gives no leave-one-out loss: {reason}"
    with pytest.raises(RuntimeError) as error:
        vlearn.leave_group_out(model, posterior, [(x, LABELS)], LABELS, F.cross_entropy, progress=False)
    assert str(error.value) == f"this posterior gives no loss without a group: {reason}"

    table = vlearn.sweep(model, posterior, [(x, LABELS)], F.cross_entropy, progress=False, loo_loss=False)
    norms = []
    for row, label in zip(x, LABELS, strict=True):
        gradients = torch.autograd.grad(F.cross_entropy(model(row[None]), label[None]), list(model.parameters()))
        norms.append(sum(g.square().sum() for g in gradients))
    assert torch.allclose(table.self_influence, torch.stack(norms), rtol=1e-10)
    assert bool(table.loo_loss.isnan().all())


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_data": 0}, "num_data=0, but it must be positive: use the number of training examples."),
        ({"prior_precision": 0.0}, "prior_precision=0.0, but it must be positive."),
        (
            {"prior_precision": None},
            "prior_precision is missing: pass that of the prior on the scale of the summed loss, num_data times the "
            "weight of an L2 penalty on the mean loss.",
        ),
    ],
)
def test_arguments_that_break_their_rule_are_refused(arguments, message):
    model, optimizer, _ = trained(torch.optim.Adam)
    with pytest.raises(ValueError) as error:
        from_optimizer(optimizer, model, **{"num_data": N, "prior_precision": DELTA, **arguments})
    assert str(error.value) == message


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_an_optimizer_that_has_taken_no_step_is_refused(make):
    model, optimizer, _ = trained(make, steps=0)
    with pytest.raises(RuntimeError) as error:
        from_optimizer(optimizer, model, num_data=N, prior_precision=DELTA)
    assert str(error.value) == f"{make.__name__} has taken no step, so it knows no curvature: train first."


def test_parameters_of_another_model_are_refused():
    model, optimizer, _ = trained(torch.optim.Adam)
    with pytest.raises(ValueError) as error:
        from_optimizer(optimizer, copy.deepcopy(model), num_data=N, prior_precision=DELTA)
    assert str(error.value) == (
        "Adam trains none of the parameters of this Sequential: pass the model whose parameters it was given."
    )


def test_optimizers_outside_the_table_are_refused():
    model, optimizer, _ = trained(torch.optim.Adagrad)
    with pytest.raises(TypeError) as error:
        from_optimizer(optimizer, model, num_data=N, prior_precision=DELTA)
    assert str(error.value) == (
        "Adagrad is not among SGD, RMSprop, Adam and AdamW of torch.optim, whose state is known to give a posterior."
    )
    with pytest.raises(TypeError, match=r"has a posterior of its own: optimizer\.posterior\(\)\.$"):
        from_optimizer(vlearn.IVON(model, lr=0.1, ess=9), model, num_data=N, prior_precision=DELTA)


@pytest.mark.parametrize("library", ["accelerate", "fabric"])
def test_a_wrapped_optimizer_is_the_one_inside(library):
    model = torch.nn.Linear(4, 3)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01)
    if library == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        prepared, wrapper = accelerate.Accelerator(cpu=True).prepare(model, adam)
    else:
        lightning = pytest.importorskip("lightning")
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        fabric.launch()
        prepared, wrapper = fabric.setup(model, adam)
    prepared(torch.ones(2, 4)).sum().backward()
    wrapper.step()
    inside = next(each for each in (wrapper.optimizer, adam) if isinstance(each, torch.optim.Optimizer))
    found, expected = (from_optimizer(each, model, num_data=8, prior_precision=1.0) for each in (wrapper, inside))
    for name in expected.names:
        assert torch.equal(found.variance[name], expected.variance[name])
