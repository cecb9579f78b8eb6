"""Draws narrower than the posterior: how much of Price's Hessian is their noise, and what is refused because of it."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict

import vlearn
from tests.optim.table import equal, states
from vlearn.optim.sampling import blocks
from vlearn.optim.updates.hessian_noise import KEY

LOSSES = {"IVON": {}, "VON": {"curvature": "price"}}
diagonal = pytest.mark.parametrize("name", LOSSES)
MOMENTA = {"constant": {"beta2": 0.9}, "warm-up": {"beta2": 0.9, "beta2_warmup": 3.0}}
momenta = pytest.mark.parametrize("momenta", MOMENTA)


def loss_of(parameters: list[nn.Parameter]) -> Tensor:
    return sum((p.sin() + p.square() * torch.arange(1, p.numel() + 1).view(p.shape)).sum() for p in parameters)  # type: ignore[return-value]


def two_parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(5, 2, dtype=torch.float64)), nn.Parameter(torch.randn(4, dtype=torch.float64))]


def moment(t: int, beta2: float, t0: float | None) -> float:
    """β₂ of step t, from 0, by the published rule."""
    return beta2 if t0 is None else min(beta2, 1 - 1 / (t + t0))


def run(optimizer: Any, parameters: list[nn.Parameter], steps: int, draws: int = 1) -> list[list[Tensor]]:
    """The mean (θ - m)∘g of each step and parameter."""
    history = []
    for _ in range(steps):
        means = [p.detach().clone() for p in parameters]
        products = [torch.zeros_like(p) for p in parameters]
        for _ in range(draws):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                loss_of(parameters).backward()
                for product, p, mean in zip(products, parameters, means, strict=True):
                    assert p.grad is not None
                    product.add_((p.detach() - mean) * p.grad / draws)
        optimizer.step()
        history.append(products)
    return history


@diagonal
@momenta
@pytest.mark.parametrize("draws", [1, 3])
def test_the_noise_is_that_of_the_written_formula(name: str, momenta: str, draws: int) -> None:
    parameters = two_parameters()
    settings = MOMENTA[momenta]
    optimizer = getattr(vlearn, name)(parameters, 0.01, 4000.0, num_data=10, **settings, **LOSSES[name])
    noises = [0.0] * len(parameters)
    for t, step in enumerate(run(optimizer, parameters, 12, draws)):
        keep = moment(t, settings["beta2"], settings.get("beta2_warmup"))
        for i, product in enumerate(step):  # ĥ/(h + wd) = ess·(θ - m)∘g
            noises[i] = keep * noises[i] + 0.5 * float(((1 - keep) * 4000 * product).square().mean())
    expected = (10 * noises[0] + 4 * noises[1]) / 14
    assert optimizer.diagnostics().hessian_noise == pytest.approx(expected, rel=1e-10)


def test_of_a_dense_hessian_it_is_that_of_its_eigenvalues() -> None:
    parameters = two_parameters()
    optimizer = vlearn.FullVON(parameters, 0.01, 400.0, num_data=10, rule="iblr", curvature="price", beta2=0.9)
    noise = 0.0
    for _ in range(8):
        mean = torch.cat([p.detach().reshape(-1) for p in parameters])
        rows = [s["hessian"].reshape(-1, 14) for s in optimizer.state.values()] or [torch.eye(14, dtype=torch.float64)]
        precision = torch.cat(rows) + 1e-4 * torch.eye(14, dtype=torch.float64)
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            loss_of(parameters).backward()
            move = torch.cat([p.detach().reshape(-1) for p in parameters]) - mean
        gradient = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        optimizer.step()
        estimate = torch.outer(gradient, 400 * precision @ move)
        values, vectors = torch.linalg.eigh(precision)
        root = vectors @ (values.rsqrt().unsqueeze(1) * vectors.mT)  # S^-½
        x = torch.linalg.eigvalsh(root @ (estimate + estimate.mT) @ root / 2)
        noise = 0.9 * noise + 0.5 * 0.1**2 * float(x.square().mean())
    assert optimizer.diagnostics().hessian_noise == pytest.approx(noise, rel=1e-9)


def test_it_is_by_how_much_a_hessian_outgrows_that_of_the_loss() -> None:
    """A quadratic with noisy gradients, whose Hessian is known: the precision is too large by what is told."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.zeros(10_000, dtype=torch.float64))
    curvature, spread = 0.5, 0.2
    optimizer = vlearn.IVON(
        [p], lr=0.0, ess=1e4, hess_init=curvature, beta2=0.999, weight_decay=0.1, num_data=100,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    for _ in range(1500):
        with optimizer.sampled_params(train=True):
            optimizer.zero_grad()
            p.grad = curvature * p.detach() + spread * torch.randn_like(p)
        optimizer.step()
    excess = float((optimizer.state[p]["hessian"] - curvature).mean()) / (curvature + 0.1)
    noise = optimizer.diagnostics().hessian_noise
    # ½(1 - β₂)·ess·(spread² + curvature²·δ²)/(h + wd), but for what is not forgotten yet
    assert excess == pytest.approx(0.5e-3 * 1e4 * spread**2 / 0.6 * (1 - 0.999**1500), rel=0.05)
    assert noise == pytest.approx(excess, rel=0.2)


@diagonal
def test_slices_of_a_parameter_count_as_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for limit in (2**20, 4):
        monkeypatch.setattr(blocks, "CPU_BLOCK", limit)
        parameters, generator = two_parameters(), torch.Generator().manual_seed(0)
        optimizer = getattr(vlearn, name)(
            parameters, 0.0, 1e4, num_data=10, generator=generator, beta2=0.9, beta2_warmup=2.0, **LOSSES[name]
        )
        drawn = torch.Generator().manual_seed(1)
        for _ in range(4):
            with optimizer.sampled_params(train=True):
                with torch.no_grad():
                    for p, mean in zip(parameters, optimizer.posterior().mean.values(), strict=True):
                        p.copy_(mean + 0.01 * torch.randn(p.shape, generator=drawn, dtype=p.dtype))
                optimizer.zero_grad()
                loss_of(parameters).backward()
            optimizer.step()
        found.append([float(optimizer.state[p][KEY]) for p in parameters])
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.slow
def test_a_compiled_step_counts_the_same_noise() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(128, 256, dtype=torch.float64))
        optimizer = vlearn.IVON([p], 0.01, 1e4, num_data=10, beta2=0.9, compiled=compiled)
        noise = torch.Generator().manual_seed(1)
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                with torch.no_grad():
                    mean = optimizer.posterior().mean["param_0"]
                    p.copy_(mean + 0.01 * torch.randn(p.shape, generator=noise, dtype=p.dtype))
                optimizer.zero_grad()
                loss_of([p]).backward()
            optimizer.step()
        found.append(float(optimizer.state[p][KEY]))
    assert found[0] == pytest.approx(found[1], rel=1e-10) and found[0] > 0


@diagonal
@pytest.mark.parametrize("settings", [{"ess": 50}, {"ess": 50, "num_data": 50}, {"ess": 50, "num_data": 70}])
def test_draws_of_the_posterior_or_wider_ones_cost_nothing_and_are_not_measured(
    name: str, settings: dict[str, float]
) -> None:
    parameters = two_parameters()
    optimizer = getattr(vlearn, name)(parameters, lr=0.01, **settings, **LOSSES[name])
    run(optimizer, parameters, 2)
    assert all(KEY not in state for state in optimizer.state.values())
    assert optimizer.diagnostics().hessian_noise == 0


@diagonal
def test_it_is_forgotten_as_the_hessian_forgets(name: str) -> None:
    parameters = two_parameters()
    optimizer = getattr(vlearn, name)(parameters, 0.0, 1e6, num_data=10, beta2=0.9, **LOSSES[name])
    run(optimizer, parameters, 3)
    before = optimizer.diagnostics().hessian_noise
    optimizer.param_groups[0]["ess"] = 10
    (step,) = run(optimizer, parameters, 1)
    added = sum(float((0.1 * 10 * product).square().sum()) for product in step) / 14 / 2
    assert optimizer.diagnostics().hessian_noise == pytest.approx(0.9 * before + added, rel=1e-10)


@diagonal
def test_a_resumed_run_goes_on_counting(name: str) -> None:
    model, x, y = trained_model()
    model = model.to(torch.bfloat16)
    settings = {"lr": 0.01, "ess": 1e6, "num_data": 10, "beta2": 0.9, "beta2_warmup": 2.0, **LOSSES[name]}
    optimizer = getattr(vlearn, name)(model, **settings)
    train(optimizer, model, x.bfloat16(), y, 3)
    copied, file = copy.deepcopy(model), io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = getattr(vlearn, name)(copied, **settings)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    runs = []
    for each, net in ((optimizer, model), (resumed, copied)):
        torch.manual_seed(5)
        train(each, net, x.bfloat16(), y, 2)
        runs.append(states(each))
    assert equal(*runs) and optimizer.diagnostics() == resumed.diagnostics()
    assert optimizer.diagnostics().hessian_noise > 0


@pytest.mark.parametrize("name", ["IVON", "VON", "FullVON"])
def test_a_distributed_checkpoint_restores_it(name: str) -> None:
    model, x, y = trained_model()
    settings = {"lr": 0.01, "ess": 1e6, "num_data": 12, **NOISY[name]}
    optimizer = getattr(vlearn, name)(model, **settings)
    train(optimizer, model, x, y, 3)
    saved: Any = get_state_dict(model, optimizer)
    copied = trained_model()[0]
    resumed = getattr(vlearn, name)(copied, **settings)
    template: Any = get_optimizer_state_dict(copied, resumed)  # whose keys are those that are read from disk
    assert {key for state in template["state"].values() for key in state} == {
        key for state in saved[1]["state"].values() for key in state
    }
    assert resumed.diagnostics().hessian_noise == 0
    set_state_dict(copied, resumed, model_state_dict=saved[0], optim_state_dict=saved[1])
    assert resumed.diagnostics() == optimizer.diagnostics() and resumed.diagnostics().hessian_noise > 0


def trained_model() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return model, torch.randn(12, 4, dtype=torch.float64), torch.arange(12) % 3


def train(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


NOISY = {
    "IVON": {"beta2": 0.9},
    "VON": {"curvature": "price", "beta2": 0.9},
    "FullVON": {"curvature": "price", "rule": "iblr", "beta2": 0.9},
}


@pytest.mark.parametrize("name", NOISY)
def test_complex_parameters_count_both_of_their_reals(name: str) -> None:
    if name == "FullVON":
        pytest.skip("it takes none")
    found = []
    for complex_ in (False, True):
        torch.manual_seed(0)
        value = torch.randn(6, 2, dtype=torch.float64)
        p = nn.Parameter(torch.view_as_complex(value) if complex_ else value)
        generator = torch.Generator().manual_seed(3)
        optimizer = getattr(vlearn, name)([p], lr=0.01, ess=1e4, num_data=12, generator=generator, **NOISY[name])
        for _ in range(3):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                (torch.view_as_real(p) if complex_ else p).pow(4).sum().backward()
            optimizer.step()
        found.append(optimizer.diagnostics().hessian_noise)
    assert found[0] == pytest.approx(found[1], rel=1e-12) and found[0] > 0


@pytest.mark.parametrize("name", NOISY)
def test_a_posterior_of_noise_draws_and_ranks_but_gives_no_sizes(name: str, tmp_path: Path) -> None:
    model, x, y = trained_model()
    optimizer = getattr(vlearn, name)(model, lr=0.01, ess=1e8, num_data=12, weight_decay=0.1, **NOISY[name])
    loader = [(x, y)]
    vlearn.sweep(model, optimizer.posterior(), loader, F.cross_entropy, progress=False)  # hess_init is no noise
    train(optimizer, model, x, y, 20)
    assert optimizer.diagnostics().hessian_noise > 0.5
    live = optimizer.posterior()
    live.save(tmp_path / "posterior.pt")
    for posterior in (live, live.clone(), vlearn.posterior.load(tmp_path / "posterior.pt", model)):
        with pytest.raises(RuntimeError, match="no leave-one-out loss: its Hessian was learned from draws narrower"):
            vlearn.sweep(model, posterior, loader, F.cross_entropy, progress=False)
        with pytest.raises(RuntimeError, match="no loss without a group: .* Train on where steps were few, fit a post"):
            vlearn.leave_group_out(model, posterior, loader, y, F.cross_entropy, progress=False)
        for size in (posterior.kl, posterior.entropy):
            with pytest.raises(RuntimeError, match="and is mostly their noise"):
                size()
        assert (
            vlearn.sweep(model, posterior, loader, F.cross_entropy, loo_loss=False, progress=False).index.numel() == 12
        )
        assert vlearn.predict(model, posterior, x, draws=2).shape == (12, 3)  # the optimizer's own draws
        scale = vlearn.posterior.measured_scale(model, posterior, loader, F.cross_entropy, examples=3, progress=False)
        assert scale.scale > 0  # by the curvature of the data


def test_live_sensitivities_of_noise_are_warned_of_where_they_are_asked_for() -> None:
    model, x, y = trained_model()
    optimizer = vlearn.IVON(model, lr=0.01, ess=1e8, num_data=12, beta2=0.9)
    F.cross_entropy(model(x), y).backward()
    optimizer.sensitivities()  # before the first step its Hessian is hess_init
    train(optimizer, model, x, y, 20)
    with pytest.warns(
        UserWarning, match=r"sensitivities\(\) ranks the examples only: its Hessian was learned"
    ) as found:
        rows = optimizer.sensitivities()
    assert rows.self_influence.shape == (12,) and found[0].filename == __file__


@pytest.mark.parametrize("make", [vlearn.IVON, vlearn.EVON])
@pytest.mark.parametrize(("ess", "num_data"), [(100, 12), (5.0, 12), (12, 12), (12, None)])
def test_squared_gradients_of_minibatches_have_no_size(make: Any, ess: float, num_data: int | None) -> None:
    model, x, y = trained_model()
    optimizer = make(model, lr=0.01, ess=ess, num_data=num_data, curvature="empirical")
    train(optimizer, model, x, y, 2)
    posterior = optimizer.posterior()
    with pytest.raises(RuntimeError, match=f"squared gradient times ess={ess:g} for the Hessian, .* Use VOGN"):
        vlearn.sweep(model, posterior, [(x, y)], F.cross_entropy, progress=False)
    rows = vlearn.sweep(model, posterior, [(x, y)], F.cross_entropy, loo_loss=False, progress=False)
    assert rows.self_influence.shape == (12,)


def test_squared_gradients_are_too_large_by_ess_over_the_batch() -> None:
    """What the refusal says: at a minimum, by the mean square of the examples' own gradients."""
    torch.manual_seed(0)
    model, examples = nn.Linear(4, 1).double(), 2000
    x = torch.randn(examples, 4, dtype=torch.float64)
    y = x.sum(1, keepdim=True) + torch.randn(examples, 1, dtype=torch.float64)
    solution = torch.linalg.lstsq(torch.cat([x, x.new_ones(examples, 1)], 1), y).solution
    model.weight.data, model.bias.data = solution[:4].mT.contiguous(), solution[4]
    squares = ((model(x) - y).detach() * x).square().mean(0)
    for batch in (10, 50):
        optimizer = vlearn.IVON(
            model.parameters(), lr=0.0, ess=1e8, num_data=examples, beta2=1.0, beta2_warmup=1.0, curvature="empirical"
        )
        for _ in range(2000):
            index = torch.randint(examples, (batch,))
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                ((model(x[index]) - y[index]).square().mean() / 2).backward()
            optimizer.step()
        ratio = optimizer.state[model.weight]["hessian"] / squares
        torch.testing.assert_close(ratio, torch.full_like(ratio, 1e8 / batch), rtol=0.2, atol=0)


CURVATURES = [
    (name, {"curvature": curvature})
    for name in ("VON", "FullVON", "KFACVON")
    for curvature in ("ggn", "sampled", "empirical")
] + [("VOGN", {})]


@pytest.mark.parametrize(("name", "settings"), CURVATURES, ids=lambda value: str(value))
def test_a_hessian_of_passes_does_not_depend_on_the_width_of_the_draws(name: str, settings: dict[str, str]) -> None:
    """The passes at one draw, put into the weights by hand."""
    found = []
    for ess in (12.0, 1e10):
        model, x, y = trained_model()
        optimizer = getattr(vlearn, name)(model, lr=0.0, ess=ess, num_data=12, weight_decay=0.1, **settings)
        means = [p.detach().clone() for p in model.parameters()]
        noise = torch.Generator().manual_seed(1)
        for _ in range(4):
            with optimizer.sampled_params(train=True):
                with torch.no_grad():
                    for p, mean in zip(model.parameters(), means, strict=True):
                        p.copy_(mean + 0.1 * torch.randn(p.shape, generator=noise, dtype=p.dtype))
                optimizer.zero_grad()
                torch.manual_seed(7)  # of the probe
                F.cross_entropy(model(x), y).backward()
            optimizer.step()
        table = vlearn.sweep(model, optimizer.posterior(), [(x, y)], F.cross_entropy, leverage=None, progress=False)
        found.append(torch.stack([table.loo_loss, table.self_influence]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=0)


def test_an_ess_that_stands_for_many_more_examples_than_a_sweep_has_is_warned_of() -> None:
    model, x, y = trained_model()

    def sweep(posterior: Any, **settings: Any) -> None:
        vlearn.sweep(model, posterior, [(x, y)], F.cross_entropy, progress=False, **settings)

    message = (
        "the loader has 12 of the 1e[+]06 training examples that the optimizer's ess stands for. Pass num_data to the"
    )
    tempered = vlearn.IVON(model.parameters(), lr=0.1, ess=1e6).posterior()
    with pytest.warns(UserWarning, match=message) as found:
        vlearn.sweep(model, tempered, [(x, y)], F.cross_entropy, progress=False)
    assert found[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sweep(tempered, loo_loss=False)
        sweep(vlearn.IVON(model.parameters(), lr=0.1, ess=1e6, num_data=12).posterior())
        told = vlearn.IVON(model.parameters(), lr=0.1, ess=1e6, num_data=1e6)  # these are a part of them
        sweep(told.posterior())
        sweep(vlearn.IVON(model.parameters(), lr=0.1, ess=1200).posterior())
