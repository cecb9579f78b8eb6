"""The optimizers of the family and small problems: every contract test runs over the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlearn


@dataclass(frozen=True)
class Entry:
    """One optimizer: how to build it, and settings that its constructor must refuse."""

    name: str
    make: Callable[..., Any]
    bad: tuple[tuple[dict[str, Any], str], ...] = field(default=())
    # Settings that one parameter group may have beside another with the entry's own.
    overrides: tuple[dict[str, Any], ...] = (
        {"lr": 0.02},
        {"weight_decay": 0.1},
        {"hess_init": 2.0},
        {"ess": 30},
        {"beta2_warmup": 3.0},
    )
    captures: bool = False  # the update rule needs a watched model in every loop
    probes: bool = False  # it takes random numbers in every backward pass, and needs to know the model's output
    dense: bool = False  # the state joins all parameters
    kronecker: bool = False  # the state joins the parameters of a layer
    rotated: bool = False  # the state of a matrix is in an eigenbasis of its own
    pooled: bool = False  # a number of the state is measured over all parameters
    rate: float = 0.01  # the learning rate that the documentation names for networks
    options: dict[str, Any] = field(default_factory=dict)  # that make the variant at its defaults
    variant: str = ""  # where the same optimizer is in the table with other settings

    def state_size(self, p: Tensor, model: nn.Module) -> int:
        """Numbers in a parameter's state, without the step and the mean of narrower ones; the model is `network()`."""
        if self.kronecker:
            if p.dim() == 1:
                return p.numel() + 1  # and whose last column it is
            rows, columns = len(p), p.shape[1] + 1
            return p.numel() + rows * columns + 2 * (rows**2 + columns**2) + 3
        if self.rotated and p.dim() > 1:
            return 2 * p.numel() + 2 * (len(p) ** 2 + p.shape[1] ** 2)
        return p.numel() * (1 + (sum(q.numel() for q in model.parameters()) if self.dense else 1))

    def rounding(self, rtol: float) -> dict[str, float]:
        """Tolerances where sums are taken in another order; eigenvectors magnify what it rounds."""
        rtol *= 1e3 if self.rotated else 1
        return {"rtol": rtol, "atol": rtol / 100}

    @property
    def of_squares(self) -> dict[str, Any]:
        """Settings for a loss that is no cross-entropy."""
        return {"likelihood": "gaussian"} if self.probes else {}

    def __str__(self) -> str:
        return f"{self.name}-{self.variant}" if self.variant else self.name


IVON = Entry(
    "IVON",
    lambda params, **kwargs: vlearn.IVON(params, **{"lr": 0.1, "ess": 50, "hess_init": 0.5, "beta2": 0.99, **kwargs}),
    bad=(
        ({"lr": -1.0}, "lr=-1.0, but it must not be negative: try 0.1."),
        ({"ess": 0}, "ess=0, but it must be positive: use the number of training examples."),
        ({"hess_init": 0.0}, "hess_init=0.0, but it must be positive: try 1, or 0.1 for short runs."),
        ({"beta1": 1.0}, "beta1=1.0, but it must be in [0, 1): try 0.9."),
        ({"beta2": 1.5}, "beta2=1.5, but it must be in [0, 1]: try 0.99999."),
        *(
            ({"beta2_warmup": value}, f"beta2_warmup={value!r}, but it must be a number of steps, at least 1: try 100.")
            for value in (0.5, -3, math.inf, math.nan, "long")
        ),
        ({"weight_decay": -0.1}, "weight_decay=-0.1, but it must not be negative: try 1e-4."),
        ({"clip_radius": 0.0}, "clip_radius=0.0, but it must be positive: inf does not clip."),
        ({"mc_samples": 0}, "mc_samples=0, but it must be a whole number of draws: use 1."),
        ({"hess_approx": "fisher"}, "hess_approx='fisher', but it must be 'price' or 'gradsq': use 'price'."),
        ({"num_data": -5}, "num_data=-5, but it must be positive: use the number of training examples."),
        ({"nonfinite": "stop"}, "nonfinite='stop', but it must be 'raise', 'skip' or 'ignore': use 'raise'."),
    ),
    rate=0.1,
)
VOGN = Entry(
    "VOGN",
    lambda params, **kwargs: vlearn.VOGN(params, **{"lr": 0.1, "ess": 50, "hess_init": 0.5, "beta2": 0.99, **kwargs}),
    bad=(
        ({"lr": -1.0}, "lr=-1.0, but it must not be negative: try 0.1."),
        ({"damping": -1.0}, "damping=-1.0, but it must not be negative: use 0."),
        ({"tempering": 0.0}, "tempering=0.0, but it must be positive: use 1."),
        ({"augmentation": 0.0}, "augmentation=0.0, but it must be positive: use 1."),
        (
            {"beta2": 0.0, "weight_decay": 0.0},
            "beta2=0.0, but it must be positive without weight decay: the precision of a flat direction would be zero.",
        ),
        (
            {"beta2_warmup": 1, "weight_decay": 0.0},
            "beta2_warmup=1, but it must be above 1 without weight decay: the precision of a flat direction would be "
            "zero.",
        ),
    ),
    captures=True,
)
VON = Entry(
    "VON",
    lambda params, **kwargs: vlearn.VON(params, **{"lr": 0.1, "ess": 50, "hess_init": 0.5, "beta2": 0.99, **kwargs}),
    bad=(
        ({"ess": 0}, "ess=0, but it must be positive: use the number of training examples."),
        ({"damping": -1.0}, "damping=-1.0, but it must not be negative: use 0."),
    ),
    captures=True,
    probes=True,
)
VON_PRICE = Entry("VON", lambda params, **kwargs: VON.make(params, **{"curvature": "price", **kwargs}), variant="price")
FULLVON = Entry(
    "FullVON",
    lambda params, **kwargs: vlearn.FullVON(params, **{"lr": 0.1, "ess": 50, "hess_init": 0.5, **kwargs}),
    bad=(
        ({"lr": -1.0}, "lr=-1.0, but it must not be negative: try 0.1."),
        (
            {"beta2": 0.0, "weight_decay": 0.0},
            "beta2=0.0, but it must be positive without weight decay: the precision of a flat direction would be zero.",
        ),
    ),
    captures=True,
    probes=True,
    dense=True,
    rate=0.05,
)
FULLVON_PRICE = Entry(
    "FullVON",
    lambda params, **kwargs: FULLVON.make(params, **{"rule": "iblr", "curvature": "price", "beta2": 0.999, **kwargs}),
    dense=True,
    variant="price",
)
KFACVON = Entry(
    "KFACVON",
    lambda params, **kwargs: vlearn.KFACVON(
        params, **{"lr": 0.1, "ess": 50, "hess_init": 0.5, "update_every": 2, **kwargs}
    ),
    bad=(
        ({"lr": -1.0}, "lr=-1.0, but it must not be negative: try 0.1."),
        ({"damping": -1.0}, "damping=-1.0, but it must not be negative: use 0."),
        ({"tempering": 0.0}, "tempering=0.0, but it must be positive: use 1."),
        ({"update_every": 0}, "update_every=0, but it must be a positive whole number of steps: use 10."),
    ),
    captures=True,
    probes=True,
    kronecker=True,
)
EKFACVON = Entry(
    "KFACVON",
    lambda params, **kwargs: KFACVON.make(params, **{"eigenvalue_correction": True, **kwargs}),
    captures=True,
    probes=True,
    kronecker=True,
    options={"eigenvalue_correction": True},
    variant="EK-FAC",
)
AS_IVON = {  # in the place of EVON's own defaults
    "lr": 0.1,
    "hess_init": 0.5,
    "beta2": 0.99,
    "beta2_warmup": None,
    "clip_radius": math.inf,
    "rescale_lr": True,
}
EVON = Entry(
    "EVON",
    lambda params, **kwargs: vlearn.EVON(params, **{"ess": 50, "update_every": 2, **AS_IVON, **kwargs}),
    bad=(
        ({"lr": -1.0}, "lr=-1.0, but it must not be negative: try 0.1."),
        ({"clip_radius": 0.0}, "clip_radius=0.0, but it must be positive: inf does not clip."),
        ({"update_every": 0}, "update_every=0, but it must be a positive whole number of steps: use 10."),
        ({"max_dim": -1}, "max_dim=-1, but it must be a whole number of rows: use 8192."),
        ({"beta3": 1.0}, "beta3=1.0, but it must be in [0, 1): try 0.999."),
        (
            {"curvature": "ggn"},
            "curvature='ggn', but for EVON it must be 'price' or 'empirical': use KFACVON or VON, which have the "
            "others.",
        ),
    ),
    rotated=True,
    rate=2.0,
)


def _vadamw(
    params: Any, beta1: float = 0.9, beta2: float = 0.99, hess_init: float | None = None, **kwargs: Any
) -> vlearn.VAdamW:
    """By the names of the others' settings; its Hessian starts from nothing, so the prior bounds the first draw."""
    kwargs = {"betas": (beta1, beta2), "lr": 0.1, "ess": 50, "num_data": 50, "prior_precision": 25.0, **kwargs}
    return vlearn.VAdamW(params, **kwargs)


VADAMW = Entry(
    "VAdamW",
    _vadamw,
    bad=(
        ({"lr": -1.0}, "lr=-1.0, but it must not be negative: try 0.1."),
        (
            {"ess": 0},
            "ess=0, but it must be finite and positive, or left to draw_variance: use the number of training examples.",
        ),
        ({"betas": (1.0, 0.999)}, "beta1=1.0, but it must be in [0, 1): try 0.9."),
        ({"betas": (0.9, 1.0)}, "beta2=1.0, but it must be below 1: try 0.999."),
        ({"eps": -1e-8}, "eps=-1e-08, but it must not be negative: try 1e-8."),
        ({"weight_decay": -0.1}, "weight_decay=-0.1, but it must not be negative: try 1e-4."),
        ({"num_data": None}, "num_data=None, but it must be given: use the number of training examples."),
        ({"num_data": -5}, "num_data=-5, but it must be positive: use the number of training examples."),
        ({"prior_precision": 0.0}, "prior_precision=0.0, but it must be positive: use 1."),
        ({"draw_variance": 0.0, "ess": None}, "draw_variance=0.0, but it must be positive: try 0.02."),
        (
            {"ess": math.inf},
            "ess=inf, but it must be finite and positive, or left to draw_variance: use the number of training "
            "examples.",
        ),
    ),
    overrides=({"lr": 0.02}, {"weight_decay": 0.1}, {"prior_precision": 2.0}, {"ess": 30}),
    pooled=True,
    rate=1e-3,
)
FAMILY = (IVON, VOGN, VON, VON_PRICE, FULLVON, FULLVON_PRICE, KFACVON, EKFACVON, EVON, VADAMW)
family = pytest.mark.parametrize("entry", FAMILY, ids=str)
# The contract of interrupts and schedulers is the sampler's, not the update's: one entry of each structure shows it.
REPRESENTATIVE = (IVON, FULLVON, KFACVON, EVON)
representatives = pytest.mark.parametrize(
    "entry", [pytest.param(e, marks=() if e in REPRESENTATIVE else pytest.mark.slow) for e in FAMILY], ids=str
)
NUMBERS = range(len(FAMILY))  # as other processes take them
numbered = pytest.mark.parametrize("number", NUMBERS, ids=map(str, FAMILY))


def named(value: Any) -> str:
    """The name of a test's parameter, of which whole numbers are optimizers."""
    return str(FAMILY[value]) if isinstance(value, int) and not isinstance(value, bool) else str(value)


def needs_parameters_apart(entry: Entry) -> None:
    """Skip the rules whose posterior joins parameters, or whose probe does, where each is to be as if alone."""
    needs_no_probe(entry)
    if entry.dense:
        pytest.skip("the posterior joins all parameters")


def needs_no_pooling(entry: Entry) -> None:
    """Skip the rules that measure something over all parameters, where each is to be bit for bit as if alone."""
    if entry.pooled:
        pytest.skip("the scale of the curvature is measured over all parameters")


def needs_no_probe(entry: Entry) -> None:
    """Skip the rules that draw a probe in every pass where two runs differ in their passes."""
    if entry.probes:
        pytest.skip("the rule draws a probe in every backward pass")


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A small classifier of six inputs and three classes."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def data(seed: int = 1, count: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, generator=generator, dtype=dtype), torch.randint(0, 3, (count,), generator=generator)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def states(optimizer: Any) -> list[Tensor]:
    """Copies of every state tensor, in the order of the parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [value.clone() for p in parameters for _, value in sorted(optimizer.state.get(p, {}).items())]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bitwise equality."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def plain(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Loop (a)."""
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    optimizer.step()


def context(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Loop (b)."""
    with optimizer.sampled_params(train=True):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
    optimizer.step()


def closure(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Loop (c)."""

    def compute() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        return loss

    optimizer.step(compute)


def modes(optimizer: Any, model: nn.Module, x: Tensor, y: Tensor) -> None:
    """Loop (d)."""
    optimizer.train()
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    optimizer.step()
    optimizer.eval()


LOOPS = {"plain": plain, "context": context, "closure": closure, "modes": modes}


def made(
    entry: Entry, loop: str, model: nn.Module, loss_scale: float | Callable[[], float] = 1.0, **kwargs: Any
) -> Any:
    """The optimizer as the loop wants it: over the model for (a), over its parameters else.

    Args:
        loss_scale: what the loss will be multiplied with; rules that need captures must know it.
    """
    optimizer = entry.make(model if loop == "plain" else model.parameters(), **kwargs)
    if entry.captures:
        optimizer.watch(model, loss_scale=loss_scale)
    return optimizer


def needs_gradients_alone(entry: Entry) -> None:
    """Skip the rules that need captures where a test writes gradients by hand, or where passes have none."""
    if entry.captures:
        pytest.skip("the rule needs a captured pass")
