"""Settings of parameter groups: those that every optimizer has, their rules, and the two spellings of betas."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor

_NONFINITE = ("raise", "skip", "ignore")
SettingRule = tuple[str, bool, str]  # name of a setting, whether its value keeps the rule, the rule and a remedy


class SharedOptions(TypedDict, total=False):
    """The settings that every optimizer of the family takes as keyword arguments, and may have by parameter group.

    Attributes:
        hess_init: the Hessian at the start, per example, default 1. After t steps its remaining weight is β₂ᵗ, or what
            beta2_warmup says.
        beta1: the momentum β₁ of the gradient, default 0.9.
        beta2: the momentum β₂ of the Hessian, default 0.99: estimates that carry little noise forget hess_init in
            500 steps; 0.999 is for long runs.
        beta2_warmup: t₀ in steps, at least 1: the momentum is min(β₂, 1 - 1/(t + t₀)) in step t, from 0, so that the
            Hessian is the mean of hess_init, with the weight of t₀ - 1 steps, and of all estimates so far, and from
            step 1/(1 - β₂) - t₀ on their exponential average; with beta2=1 it stays the mean. hess_init keeps a weight
            of (t₀ - 1)/(t + t₀ - 1) after t steps of the mean, and 1 forgets it at the first. Each parameter has its
            own t: the updates that it has had, also those without an estimate, which keep the Hessian. Default None:
            β₂ is constant.
        weight_decay: wd = δ/N for a prior precision δ and N examples, default 1e-4.
        prior: a posterior N(m₀, P₀⁻¹) of vlearn's, to learn on from: P₀/N stands for wd and m - m₀ for m, entry by
            entry, for each parameter that it has, the same tensor or else one of the same name. Others keep
            weight_decay. P₀ is its Σ⁻¹ on the scale of its num_data, whatever the tempering of its draws. FullVON takes
            all of P₀, the others its diagonal. A parameter group may have a prior of its own, which may know other
            parameters too. It is copied into the state: a run that is resumed has it, and loading a state replaces it.
        mc_samples: the number of draws per `step(closure)`, default 1.
        sync: average gradients and curvature over all processes at `step()`, without a DistributedDataParallel wrapper.
        debias: divide the momentum by 1 - β₁ᵗ, default True.
        num_data: the number of training examples N, the scale of posterior and sensitivities, whatever the draws';
            default ess, so give it where ess is not N.
        generator: of the noise; default torch's global one. Of several processes each has its own noise, also if
            their generators are alike.
        shared_noise: all processes take one draw, that of rank 0's generator. It depends on seed, parameter and place
            of an entry alone, so that any number of processes, one too, make the same steps. Under
            DistributedDataParallel it supports clipping and GradScaler, which draws of their own do not; but it is one
            draw instead of one per process. Sharded parameters (`fully_shard`, tensor parallelism) always share it.
        nonfinite: "raise" (default) FloatingPointError at a gradient that is not finite, "skip" the step and count it
            in `nonfinite_count`, or "ignore": do not look.
        batch_norm: "refuse" (default) rows of examples that meet in a BatchNorm in train mode, or take the batch's
            statistics as "constant", an approximation: see `watch`.
    """

    hess_init: float
    beta1: float
    beta2: float
    beta2_warmup: float | None
    weight_decay: float
    prior: Any
    mc_samples: int
    sync: bool
    debias: bool
    num_data: float | None
    generator: torch.Generator | None
    shared_noise: bool
    nonfinite: str
    batch_norm: str


DEFAULTS = SharedOptions(
    hess_init=1.0,
    beta1=0.9,
    beta2=0.99,
    beta2_warmup=None,
    weight_decay=1e-4,
    prior=None,
    mc_samples=1,
    sync=False,
    debias=True,
    num_data=None,
    generator=None,
    shared_noise=False,
    nonfinite="raise",
    batch_norm="refuse",
)


def settings_of(owner: str, lr: float, ess: float, shared: SharedOptions, **own: Any) -> dict[str, Any]:
    """The settings of the parameter groups of an optimizer, as its `defaults`.

    Args:
        owner: the optimizer's name.
        shared: the shared options that were given.
        own: the settings that this optimizer alone has.
    Raises:
        TypeError: if an option is unknown.
    """
    for name in shared:
        if name not in DEFAULTS:
            raise TypeError(f"{owner}.__init__() got an unexpected keyword argument {name!r}")
    settings: dict[str, Any] = {"lr": lr, "ess": ess, **DEFAULTS, **shared, **own}
    del settings["generator"], settings["batch_norm"]
    return with_betas(settings, settings)


def own_options(shared: SharedOptions) -> tuple[torch.Generator | None, str]:
    """(generator, batch_norm), which are the optimizer's own and not its groups'."""
    return shared.get("generator"), shared.get("batch_norm", "refuse")


Optimizer = TypeVar("Optimizer", bound=type)


def with_shared_options(optimizer: Optimizer, defaults: SharedOptions = DEFAULTS) -> Optimizer:
    """Class decorator: signature and docstring show the shared options where they say ``**shared``."""
    signature = inspect.signature(optimizer.__init__)
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    options = inspect.get_annotations(SharedOptions)
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=options[name])
        for name, default in defaults.items()
        if name not in signature.parameters
    ]
    setattr(optimizer.__init__, "__signature__", signature.replace(parameters=parameters))  # noqa: B010
    documented = (SharedOptions.__doc__ or "").partition("Attributes:\n")[2].rstrip()
    if optimizer.__doc__:
        lines = [line if "**shared:" not in line else documented for line in optimizer.__doc__.splitlines()]
        optimizer.__doc__ = "\n".join(lines)
    return optimizer


def tempering_of(group: dict[str, Any]) -> float:
    """τ/ρ, which the prior of a parameter group counts with; 1 unless the optimizer has one of the two settings."""
    return group.get("tempering", 1.0) / group.get("augmentation", 1.0)


def tempered_ess_and_decay(group: dict[str, Any]) -> tuple[float, float]:
    """(effective sample size of the draws, weight decay) of a parameter group, after tempering and augmentation.

    Both are as given unless the optimizer has one of the two settings: ess·ρ/τ and wd·τ/ρ. Where it has a prior
    precision δ, wd = δ/N.
    """
    if "prior_precision" in group:
        return group["ess"], group["prior_precision"] / group["num_data"]
    ratio = tempering_of(group)
    return (
        (group["ess"], group["weight_decay"]) if ratio == 1 else (group["ess"] / ratio, group["weight_decay"] * ratio)
    )


def _is_warmup(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and 1 <= value < math.inf)


def beta2_of_step(group: dict[str, Any], step: int) -> float:
    """β₂ of a parameter's step, from 1: constant, or min(β₂, 1 - 1/(step - 1 + t₀)) with a `beta2_warmup` t₀."""
    beta2, warmup = float(group["beta2"]), group.get("beta2_warmup")
    return beta2 if warmup is None else min(beta2, 1 - 1 / (step - 1 + warmup))


def log_kept_weight(group: dict[str, Any], steps: int, last: Tensor) -> Tensor:
    """log Π β₂ over the last of so many steps, β₂ as `beta2_of_step` has it.

    Πₛ (1 - 1/(s + t₀)) of the steps s = i, ..., j - 1 of the warm-up is (i + t₀ - 1)/(j + t₀ - 1) = 1 - (j - i)/(...).

    Args:
        last: how many of them, a scalar.
    """
    beta2, warmup = float(group["beta2"]), group.get("beta2_warmup")
    if beta2 == 0:
        return torch.where(last > 0, -math.inf, 0.0)
    if warmup is None:
        return last * math.log(beta2)
    end = steps if beta2 == 1 else min(steps, math.floor(1 / (1 - beta2) - warmup) + 1)  # of the warm-up
    last = last.clamp_max(steps)
    late = last.clamp_max(steps - max(end, 0))
    early = last - late
    return torch.log1p(-early / (steps - late + (warmup - 1)).clamp_min(1)) + late * math.log(beta2)


def log_kept_weights(group: dict[str, Any], steps: int, lasts: list[Tensor]) -> list[Tensor]:
    """`log_kept_weight` of several, at once where it is a multiple, as new tensors."""
    beta2 = float(group["beta2"])
    if beta2 > 0 and group.get("beta2_warmup") is None:
        return list(torch._foreach_mul(lasts, math.log(beta2)))
    return [log_kept_weight(group, steps, last) for last in lasts]


def hess_init_weight(group: dict[str, Any], steps: int) -> float:
    """What is left of hess_init in the Hessian of a parameter after so many steps that had an estimate."""
    return float(log_kept_weight(group, steps, torch.tensor(float(steps), dtype=torch.float64)).exp())


def check(group: dict[str, Any], rules: Iterable[SettingRule]) -> None:
    """Raise ValueError for the first rule that a parameter group's settings break."""
    for name, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name}={group[name]!r}, but it {rule}.")


def whole_number_rule(group: dict[str, Any], name: str, least: int, remedy: str) -> SettingRule:
    """The rule of a setting that counts something.

    Args:
        remedy: what it counts, and a value that works.
    """
    whole = isinstance(group[name], int) and group[name] >= least
    return name, whole, f"must be {'a positive' if least else 'a'} whole number of {remedy}"


def common_rules(group: dict[str, Any]) -> list[SettingRule]:
    """The rules of the settings that all optimizers have.

    Raises:
        ValueError: if lr is a tensor of several numbers, which rules cannot compare.
    """
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError(f"lr={group['lr']}, but it must be one number: use a parameter group for each rate.")
    whole = isinstance(group["mc_samples"], int)
    positive = "must be positive: use the number of training examples"
    return [
        ("lr", bool(group["lr"] >= 0), "must not be negative: try 0.1"),
        ("num_data", group["num_data"] is None or group["num_data"] > 0, positive),
        ("ess", group["ess"] > 0, positive),
        ("hess_init", group["hess_init"] > 0, "must be positive: try 1, or 0.1 for short runs"),
        ("beta1", 0 <= group["beta1"] < 1, "must be in [0, 1): try 0.9"),
        ("beta2", 0 <= group["beta2"] <= 1, "must be in [0, 1]: try 0.99999"),
        ("beta2_warmup", _is_warmup(group.get("beta2_warmup")), "must be a number of steps, at least 1: try 100"),
        ("weight_decay", group["weight_decay"] >= 0, "must not be negative: try 1e-4"),
        ("mc_samples", whole and group["mc_samples"] >= 1, "must be a whole number of draws: use 1"),
        (
            "nonfinite",
            group["nonfinite"] in _NONFINITE,
            "must be 'raise', 'skip' or 'ignore': use 'raise'",
        ),
    ]


def positive_precision_rules(group: dict[str, Any]) -> list[SettingRule]:
    """Rules of an estimate that may be zero: a Hessian of the last estimate alone needs weight decay beside it."""
    decays, warmup = group["weight_decay"] > 0, group.get("beta2_warmup")
    lasts = "without weight decay: the precision of a flat direction would be zero"
    return [
        ("beta2", decays or group["beta2"] > 0, f"must be positive {lasts}"),
        ("beta2_warmup", decays or warmup is None or warmup > 1, f"must be above 1 {lasts}"),
    ]


def with_betas(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`betas` beside beta1 and beta2, as torch's schedulers want them; either may be given."""
    if "betas" in group:
        beta1, beta2 = group["betas"]
    else:
        beta1, beta2 = group.get("beta1", defaults["beta1"]), group.get("beta2", defaults["beta2"])
    return {**group, "beta1": beta1, "beta2": beta2, "betas": (beta1, beta2)}


def follow_betas(groups: list[dict[str, Any]], known: dict[int, Any]) -> None:
    """`betas`, which torch's schedulers write, and beta1 and beta2, which users of ivon-opt write, are one setting.

    Whichever was written since the last step counts; `betas` if both were.

    Args:
        groups: parameter groups, changed in place.
        known: the `betas` that each group had after the last step, brought up to date.
    """
    for number, group in enumerate(groups):
        if group["betas"] is known.get(number):
            group["betas"] = (group["beta1"], group["beta2"])
        group["beta1"], group["beta2"] = known[number] = group["betas"]
