"""Settings of parameter groups: rules that every optimizer of the family has, and the two spellings of betas."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

_NONFINITE = ("raise", "skip", "ignore")
Rule = tuple[str, bool, str]  # name of a setting, whether its value keeps the rule, the rule and a remedy


def check(group: dict[str, Any], rules: Iterable[Rule]) -> None:
    """Raise ValueError for the first rule that a parameter group's settings break."""
    for name, holds, rule in rules:
        if not holds:
            raise ValueError(f"{name}={group[name]!r}, but it {rule}.")


def common_rules(group: dict[str, Any]) -> list[Rule]:
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
        ("ess", group["ess"] > 0, positive),
        ("hess_init", group["hess_init"] > 0, "must be positive: try 1, or 0.1 for short runs"),
        ("beta1", 0 <= group["beta1"] < 1, "must be in [0, 1): try 0.9"),
        ("beta2", 0 <= group["beta2"] <= 1, "must be in [0, 1]: try 0.99999"),
        ("weight_decay", group["weight_decay"] >= 0, "must not be negative: try 1e-4"),
        ("mc_samples", whole and group["mc_samples"] >= 1, "must be a whole number of draws: use 1"),
        ("num_data", group["num_data"] is None or group["num_data"] > 0, positive),
        (
            "nonfinite",
            group["nonfinite"] in _NONFINITE,
            "must be 'raise', 'skip' or 'ignore': use 'raise'",
        ),
    ]


def lasting_precision(group: dict[str, Any]) -> Rule:
    """The rule of an estimate that may be zero: a Hessian of the last estimate alone needs weight decay beside it."""
    lasts = group["beta2"] > 0 or group["weight_decay"] > 0
    return "beta2", lasts, "must be positive without weight decay: the precision of a flat direction would be zero"


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
