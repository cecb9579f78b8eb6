"""The posterior of a network that stopped training, and the training time of torch's SGD."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim import lr_scheduler as schedules

import vlearn
from tests.oracles.per_example import relative_error
from tests.posterior.test_fit import EXACT, N, covariance, in_batches, labels, mlp
from vlearn.gaussians.stopped_training import stopped
from vlearn.posterior import fit, load, training_time
from vlearn.posterior.fit import STRUCTURES

# The SequentialLR of torch 2.6 warns of its own steps.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")


def by_hand(sigma: Tensor, time: float | Tensor) -> Tensor:
    """(I - e^{-ηW}) W⁻¹/N of W = Σ⁻¹/N, by the matrix exponential; η one number, or one for each entry."""
    curvature = torch.linalg.inv(sigma) / N
    times = torch.as_tensor(time, dtype=sigma.dtype).expand(len(sigma))
    return (torch.eye(len(sigma), dtype=sigma.dtype) - torch.matrix_exp(-times[:, None] * curvature)) @ sigma


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if not name.startswith("last")])
@pytest.mark.parametrize("time", [1e-3, 1.0, 30.0, 1e4])
def test_it_is_the_function_of_the_curvature(structure: str, time: float, tmp_path: Path) -> None:
    model, x = mlp()
    posterior = fit(model, in_batches(x), F.cross_entropy, structure, **EXACT)
    expected = by_hand(covariance(posterior, model), time)
    stopped = posterior.stopped_at(time)
    assert relative_error(covariance(stopped, model), expected) < 1e-8
    told = fit(model, in_batches(x), F.cross_entropy, structure, training_time=time, **EXACT)
    assert relative_error(covariance(told, model), expected) < 1e-8
    told.save(tmp_path / "stopped.pt")
    assert relative_error(covariance(load(tmp_path / "stopped.pt", model), model), expected) < 1e-8
    assert torch.equal(covariance(posterior.stopped_at(math.inf), model), covariance(posterior, model))


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if not name.startswith("last")])
def test_every_layer_may_have_its_own_time(structure: str, tmp_path: Path) -> None:
    model, x = mlp()
    posterior = fit(model, in_batches(x), F.cross_entropy, structure, **EXACT)
    parameters = dict(model.named_parameters())
    times = {name: 0.3 if name.startswith("0") else 40.0 for name in parameters}
    of_entries = torch.cat([torch.full((p.numel(),), times[name]) for name, p in parameters.items()])
    expected = by_hand(covariance(posterior, model), of_entries)
    assert relative_error(covariance(posterior.stopped_at(times), model), expected) < 1e-8
    by_parameter = {p: times[name] for name, p in parameters.items()}
    assert relative_error(covariance(posterior.stopped_at(by_parameter), model), expected) < 1e-8
    told = fit(model, in_batches(x), F.cross_entropy, structure, training_time=by_parameter, **EXACT)
    assert relative_error(covariance(told, model), expected) < 1e-8


def test_a_posterior_is_stopped_once(tmp_path: Path) -> None:
    model, x = mlp()
    stopped = fit(model, in_batches(x), F.cross_entropy, "diagonal", **EXACT).stopped_at(5.0)
    stopped.save(tmp_path / "stopped.pt")
    for each in (stopped, load(tmp_path / "stopped.pt", model)):
        with pytest.raises(ValueError, match="this posterior has the training time 5 already"):
            each.stopped_at(2.0)
        assert torch.equal(covariance(each.stopped_at(math.inf), model), covariance(stopped, model))


def test_a_layers_parameters_have_one_time_together() -> None:
    model, x = mlp()
    posterior = fit(model, in_batches(x), F.cross_entropy, "kronecker", **EXACT)
    times = {name: 2.0 if name.endswith("bias") else 5.0 for name in posterior.names}
    weight, bias = model[0].weight.numel(), model[0].bias.numel()
    together = (weight + bias) / (weight / 5 + bias / 2)
    first = posterior.stopped_at(times).variance["0.weight"]
    assert relative_error(first, posterior.stopped_at(together).variance["0.weight"]) < 1e-12


def test_times_that_are_not_of_every_parameter_are_refused() -> None:
    model, x = mlp()
    posterior = fit(model, in_batches(x), F.cross_entropy, "diagonal", **EXACT)
    some = {name: 1.0 for name in posterior.names if name != "0.bias"}
    with pytest.raises(ValueError, match="training_time has none for '0.bias'"):
        posterior.stopped_at(some)
    with pytest.raises(ValueError, match="training_time has none for '0.bias'"):
        fit(model, in_batches(x), F.cross_entropy, training_time=some)
    for value in (math.inf, 0.0, -1.0, True):
        with pytest.raises(ValueError, match="training_time=.*, but it must be positive"):
            posterior.stopped_at({**some, "0.bias": value})


def test_an_optimizers_and_a_product_posterior_have_it_too() -> None:
    model, x = mlp()
    optimizer = vlearn.KFACVON(model, lr=0.01, ess=N)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    posterior = optimizer.posterior()
    expected = by_hand(covariance(posterior, model), 2.0)
    assert relative_error(covariance(posterior.stopped_at(2.0), model), expected) < 1e-8
    assert relative_error(by_hand(covariance(posterior, model), 2.0), expected) < 1e-12  # the state has not changed


@pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")
@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_a_posterior_of_laplace_torch_has_it_too(structure: str) -> None:
    pytest.importorskip("laplace")
    from tests.posterior.test_from_laplace import fitted

    model, x = mlp()
    posterior = vlearn.posterior.from_laplace(fitted(model, x, labels, structure))
    expected = by_hand(covariance(posterior, model), 3.0)
    assert relative_error(covariance(posterior.stopped_at(3.0), model), expected) < 1e-8


@pytest.mark.parametrize("time", [0.0, -1.0, math.nan])
def test_a_time_that_is_none_is_refused(time: float) -> None:
    model, x = mlp()
    with pytest.raises(ValueError, match="training_time=.*, but it must be positive"):
        fit(model, in_batches(x), F.cross_entropy, training_time=time)
    posterior = fit(model, in_batches(x), F.cross_entropy, "diagonal", **EXACT)
    with pytest.raises(ValueError, match="training_time=.*, but it must be positive"):
        posterior.stopped_at(time)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_it_predicts_what_a_short_training_without_an_example_gives(momentum: float) -> None:
    """Ridge regression by full-batch gradient descent that stops early, retrained without each example."""
    torch.manual_seed(0)
    x, decay, rate, steps = torch.randn(N, 6).double() * torch.logspace(0, -1.5, 6), 1e-3, 0.1, 200
    y = x @ torch.randn(6, 1).double() + 0.5 * torch.randn(N, 1).double()

    def trained(without: int | None) -> nn.Linear:
        torch.manual_seed(1)
        model = nn.Linear(6, 1, bias=False).double()
        keep = torch.tensor([n for n in range(N) if n != without])
        optimizer = SGD(model.parameters(), lr=rate * (1 - momentum), momentum=momentum, weight_decay=decay)
        for _ in range(steps):
            optimizer.zero_grad()
            (0.5 * (model(x[keep]) - y[keep]).square().sum() / N).backward()
            optimizer.step()
        times.append(training_time(optimizer, steps))
        return model

    times: list[Any] = []
    model = trained(None)
    change = torch.stack([(trained(n)(x[n : n + 1]) - model(x[n : n + 1])).detach() for n in range(N)]).flatten()

    def half_square(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum(1)

    told: dict[str, Any] = {"curvature": "ggn-exact", "prior_precision": N * decay, "progress": False}
    correlations = []
    for time in (math.inf, times[0]):
        posterior = fit(model, in_batches(x, y), half_square, "full", training_time=time, **told)
        table = vlearn.sweep(model, posterior, in_batches(x, y), half_square, leverage=None, progress=False)
        correlations.append(float(torch.corrcoef(torch.stack([table.deviation.flatten(), change]))[0, 1]))
    assert correlations[0] < 0.94 < 0.98 < correlations[1]


# -- the time of SGD -------------------------------------------------------------------------------------------------


def in_sequence(optimizer: SGD) -> Any:
    parts = [schedules.LinearLR(optimizer, total_iters=10), schedules.CosineAnnealingLR(optimizer, 40)]
    return schedules.SequentialLR(optimizer, parts, [10])


SCHEDULES: dict[str, Callable[[SGD], Any]] = {
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 50),
    "steps": lambda o: schedules.StepLR(o, 10, 0.5),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.95),
    "of the step": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "one cycle, of the momentum too": lambda o: schedules.OneCycleLR(o, 0.5, total_steps=60),
    "milestones": lambda o: schedules.MultiStepLR(o, [10, 30]),
    "linear": lambda o: schedules.LinearLR(o),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 10),
    "constant": lambda o: schedules.ConstantLR(o),
    "polynomial": lambda o: schedules.PolynomialLR(o, 50),
    "a rise, then a cosine": in_sequence,
}


def sgd(**settings: Any) -> SGD:
    return SGD([nn.Parameter(torch.zeros(3, dtype=torch.float64))], **{"lr": 0.3, "momentum": 0.9, **settings})


def descend(optimizer: torch.optim.Optimizer, steps: int, scheduler: Any = None, every: int = 1) -> float:
    """How far a gradient of ones has moved a parameter: the time, by definition."""
    for step in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()
        if scheduler is not None and step % every == every - 1:
            scheduler.step()
    return -float(optimizer.param_groups[0]["params"][0].detach()[0])


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rates_of_a_schedule_are_summed_up(name: str, every: int) -> None:
    optimizer = sgd()
    scheduler = SCHEDULES[name](optimizer)
    expected = descend(optimizer, 40 * every, scheduler, every)
    before = (scheduler.state_dict().keys(), optimizer.param_groups[0]["lr"], scheduler.last_epoch)
    assert training_time(optimizer, 40 * every, scheduler) == pytest.approx(expected, rel=1e-9)
    assert before == (scheduler.state_dict().keys(), optimizer.param_groups[0]["lr"], scheduler.last_epoch)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("make", [torch.optim.Adam, SGD])
def test_a_rate_that_is_a_tensor_is_read_as_its_number_is_and_stays(make: Any, name: str) -> None:
    if torch.__version__ < "2.7" and name == "a rise, then a cosine":
        pytest.skip("the SequentialLR of torch 2.6 writes into an initial_lr that is a tensor")
    times = {}
    for rate in (0.1, torch.tensor(0.1, dtype=torch.float64)):
        p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = make([p], lr=rate)
        scheduler = SCHEDULES[name](optimizer)
        start = float(optimizer.param_groups[0]["initial_lr"])
        descend(optimizer, 30, scheduler)
        now = float(optimizer.param_groups[0]["lr"])
        found = training_time(optimizer, 30, scheduler)
        times[type(rate)] = found[p] if isinstance(found, dict) else found
        assert float(optimizer.param_groups[0]["initial_lr"]) == start
        assert float(optimizer.param_groups[0]["lr"]) == now
    assert times[Tensor] == pytest.approx(times[float], rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [{"momentum": 0.0}, {}, {"dampening": 0.5}, {"nesterov": True}, {"momentum": 0.99}],
)
def test_the_momentum_builds_up(settings: dict[str, Any]) -> None:
    optimizer = sgd(**settings)
    expected = descend(optimizer, 25)
    assert training_time(optimizer, 25) == pytest.approx(expected, rel=1e-12)


def test_the_response_of_the_steps_is_nearly_that_of_the_flow() -> None:
    """Heavy-ball descent on every curvature at once: d ← d - lr v, v ← .9 v + (w d - 1)."""
    curvature = torch.logspace(-6, 0, 500, dtype=torch.float64)
    for steps, largest in ((200, 0.051), (2000, 0.006)):
        change, velocity, optimizer = torch.zeros_like(curvature), torch.zeros_like(curvature), sgd(lr=0.05)
        scheduler = schedules.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            velocity = 0.9 * velocity + (curvature * change - 1)
            change = change - optimizer.param_groups[0]["lr"] * velocity
            optimizer.step()
            scheduler.step()
        flow = 1 / stopped(curvature, float(training_time(optimizer, steps, scheduler)))  # pyright: ignore
        assert 0.5 * largest < float((change / flow - 1).abs().max()) < largest


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.2),
        lambda p: torch.optim.Adam(p, lr=0.2, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.2, weight_decay=0.0),
        lambda p: torch.optim.RMSprop(p, lr=0.2, alpha=0.0),
        lambda p: torch.optim.RMSprop(p, lr=0.2, alpha=0.0, momentum=0.7),
        lambda p: torch.optim.RMSprop(p, lr=0.2, alpha=0.95),
        lambda p: torch.optim.RMSprop(p, lr=0.2, momentum=0.7),
    ],
)
def test_adaptive_optimizers_have_a_time_for_each_parameter(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    parameters = [nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(2)]
    optimizer = make([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.05}])
    scheduler = schedules.CosineAnnealingLR(optimizer, 40)
    for _ in range(30):
        for p, size in zip(parameters, (2.0, 0.5), strict=True):
            p.grad = torch.full_like(p, size)
        optimizer.step()
        scheduler.step()
    times = training_time(optimizer, 30, scheduler)
    assert isinstance(times, dict) and list(times) == parameters
    for p, size in zip(parameters, (2.0, 0.5), strict=True):
        assert times[p] == pytest.approx(-float(p.detach()[0]) / size, rel=1e-6)


def test_groups_of_their_own_rates_predict_what_a_short_training_gives() -> None:
    """Ridge regression whose two inputs are trained at two rates, retrained without each example."""
    torch.manual_seed(0)
    x = torch.randn(N, 2).double()
    y = x.sum(1, keepdim=True) + 0.5 * torch.randn(N, 1).double()

    class TwoWeights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slow, self.fast = nn.Linear(1, 1, bias=False).double(), nn.Linear(1, 1, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.slow(x[:, :1]) + self.fast(x[:, 1:])

    def trained(without: int | None) -> tuple[TwoWeights, Any]:
        torch.manual_seed(1)
        model = TwoWeights()
        keep = torch.tensor([n for n in range(N) if n != without])
        groups = [{"params": model.slow.parameters(), "lr": 0.003}, {"params": model.fast.parameters()}]
        optimizer = SGD(groups, lr=0.1, weight_decay=1e-3)
        for _ in range(100):
            optimizer.zero_grad()
            (0.5 * (model(x[keep]) - y[keep]).square().sum() / N).backward()
            optimizer.step()
        return model, training_time(optimizer, 100)

    def half_square(output: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (output - target).square().sum(1)

    model, times = trained(None)
    change = torch.stack([(trained(n)[0](x[n : n + 1]) - model(x[n : n + 1])).detach() for n in range(N)]).flatten()
    told: dict[str, Any] = {"curvature": "ggn-exact", "prior_precision": N * 1e-3, "progress": False}
    error = {}
    for name, time in {"end": math.inf, "one time": 10.0, "own times": times}.items():
        posterior = fit(model, in_batches(x, y), half_square, "full", training_time=time, **told)
        table = vlearn.sweep(model, posterior, in_batches(x, y), half_square, leverage=None, progress=False)
        error[name] = float((table.deviation.flatten() - change).norm() / change.norm())
    # To first order in leverages of .05 on average and .2 at most.
    assert error["own times"] < 0.15 < 0.3 < min(error["end"], error["one time"])


def test_an_averaged_natural_gradient_flow_forgets_its_curvature() -> None:
    """m' = -(h + wd)⁻¹∇L on a quadratic: the share of every direction is 1 - e^{-t}, as the docstring says."""
    curvature = torch.logspace(-4, 1, 6, dtype=torch.float64)
    change = torch.zeros_like(curvature)
    for _ in range(300):
        change -= 0.01 * (curvature * change - 1) / curvature
    assert relative_error(change * curvature, torch.full_like(change, 1 - math.exp(-3.0))) < 0.01


def never_stepped(optimizer: SGD) -> Any:
    return schedules.StepLR(optimizer, 3)


def chained(optimizer: SGD) -> Any:
    return schedules.ChainedScheduler([schedules.LinearLR(optimizer), schedules.ExponentialLR(optimizer, 0.9)])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    ("optimizer", "scheduler", "steps", "error", "message"),
    [
        (torch.optim.Adam([nn.Parameter(torch.zeros(1))]), None, 5, ValueError, "Adam has taken no step"),
        (torch.optim.NAdam([nn.Parameter(torch.zeros(1))]), None, 5, TypeError, "NAdam is not among SGD"),
        (sgd(), None, 0, ValueError, "steps=0, but it must be a positive whole number"),
        (sgd(), chained, 5, ValueError, "the rates of this ChainedScheduler cannot be computed again"),
        (sgd(), lambda o: schedules.StepLR(sgd(), 3), 5, ValueError, "it sets those of another optimizer"),
        (sgd(), never_stepped, 5, ValueError, "of this StepLR cannot be computed again .it has not been stepped"),
        (sgd(), schedules.ReduceLROnPlateau, 5, ValueError, "of this ReduceLROnPlateau cannot be computed again"),
    ],
)
def test_what_has_no_such_time_is_refused(
    optimizer: Any, scheduler: Any, steps: int, error: type[Exception], message: str
) -> None:
    made = None if scheduler is None else scheduler(optimizer)
    for _ in range(3 if made is not None and scheduler is not never_stepped else 0):
        optimizer.step()
        made.step(1.0) if isinstance(made, schedules.ReduceLROnPlateau) else made.step()
    with pytest.raises(error, match=message):
        training_time(optimizer, steps, made)
