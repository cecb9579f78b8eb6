"""Diagnostics in words: which setting to change, and a value to try.

Each threshold lies between runs that have the fault and runs that have not, of every optimizer of the family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FEWEST_STEPS = 100  # before, a run may still settle
STUCK = 0.9  # weight of hess_init; runs that learn have .6 at most
LONGEST_STEP = 0.025  # in multiples of the width of a posterior from one minibatch
WIDEST = 0.5  # nats that draws may cost an example: more were n > N effective parameters, by ½n/N
COUNT_FACTOR = 1.5  # between numbers of examples that are taken for the same
VARIANCE_FACTOR = 4.0  # likewise between variances of the noise


def advise(found: Mapping[str, Any]) -> list[str]:
    """Sentences that each name a setting and a value to try, the gravest first; none for a healthy run.

    Args:
        found: the fields of a `Diagnostics`, by their names.
    """
    of_count, of_rate = _of_count(found), _of_rate(found)
    of_noise = _of_noise(found, is_fitted=bool(found["step"]) and not of_count and not of_rate)
    # Draws of a wrong scale are wide for that reason.
    of_width = [] if of_count or of_noise else _of_width(found)
    return [*of_count, *of_noise, *_of_start(found), *of_rate, *of_width]


def _of_count(found: Mapping[str, Any]) -> list[str]:
    """num_data or ess is not the number of examples."""
    settings, known, terms = found["settings"], found["num_examples"], found["num_terms"]
    given, ess, seen = settings.get("num_data"), settings["ess"], found["batch"]
    if given is None:
        return []
    name = "num_data" if settings["num_data_given"] else "ess"
    if known is None:
        if seen is None or seen <= given:
            return []
        return [
            f"{name} is {given:g}, but one minibatch alone has {seen} examples: set {name} to the number of training "
            "examples, len(dataset)."
        ]
    if terms is None and given > known:
        return []
    if not any(1 / COUNT_FACTOR < given / count < COUNT_FACTOR for count in (known, terms or known)):
        effect = "wide" if given < known else "narrow"
        return [
            f"{name} is {given:g}, but the loader has {known} examples, so that the posterior is too {effect}: set "
            f"{name}={known}."
        ]
    if ess * COUNT_FACTOR <= known:
        return [f"ess is {ess:g}, but the loader has {known} examples, so that draws are too wide: set ess={known}."]
    return []


def _of_noise(found: Mapping[str, Any], is_fitted: bool) -> list[str]:
    """The squared errors of the loss are those of another variance than the residuals have.

    Args:
        is_fitted: nothing else explains residuals that are too large.
    """
    residual, assumed, settings = found["residual_variance"], found["assumed_variance"], found["settings"]
    if not residual or not assumed:
        return []
    # Of ess = N/(2σ²) the draws are those of a loss that is divided by 2σ². VAdamW's is infinite before its first step.
    ess = settings["ess"]
    by_ess = assumed * (settings["num_data"] or ess) / ess if ess < math.inf else assumed
    if any(1 / VARIANCE_FACTOR < residual / each < VARIANCE_FACTOR for each in (assumed, by_ess)):
        return []
    if residual > assumed and not is_fitted:
        return []
    return [
        f"the squared error of the loss is a likelihood of noise of variance {assumed:.2g}, but that of the residuals "
        f"is {residual:.2g}: multiply the loss by {_rounded(assumed / residual):g}."
    ]


def _of_start(found: Mapping[str, Any]) -> list[str]:
    """The Hessian is still hess_init."""
    steps, weight, start = found["step"], found["hess_init_weight"], found["settings"]["hess_init"]
    if steps < FEWEST_STEPS or weight < STUCK:
        return []
    return [
        f"after {steps} steps {weight:.1%} of the Hessian is still hess_init={start:g}: for a run of this length set "
        f"beta2={1 - _rounded(2 / steps):g}, or beta2_warmup=30."
    ]


def _of_rate(found: Mapping[str, Any]) -> list[str]:
    """Steps are long against the width of the posterior that a minibatch would have."""
    if found["batch"] is None or found["step"] < FEWEST_STEPS:
        return []
    size, rate = found["step_size"] * math.sqrt(found["batch"]), found["settings"]["lr"]
    if size < LONGEST_STEP:
        return []
    stable = _rounded(rate * LONGEST_STEP / size / 4)
    return [
        f"lr={rate:g} is too high, steps are {size:.2g} times as long as a posterior from one minibatch is wide, where "
        f"{LONGEST_STEP:g} times is stable: set lr={stable:g}."
    ]


def _of_width(found: Mapping[str, Any]) -> list[str]:
    """Draws cost much."""
    mean, drawn, settings = found["loss_at_mean"], found["loss_at_draws"], found["settings"]
    if mean is None or not drawn - mean > WIDEST:
        return []
    cost = f"the loss of draws is {drawn:.3g}, that at the mean {mean:.3g}, so that the draws are too wide: "
    factor = max(10.0, _rounded((drawn - mean) / (WIDEST / 5)))
    if settings.get("draw_variance") is not None:
        return [f"{cost}set draw_variance={_rounded(settings['draw_variance'] / factor):g}."]
    if found["hess_init_weight"] > 0.5:
        return [f"{cost}set hess_init={_rounded(settings['hess_init'] * factor):g}."]
    return [f"{cost}set ess={_rounded(settings['ess'] * factor):g}, and num_data to the number of examples."]


def _rounded(value: float) -> float:
    """To one digit."""
    return float(f"{value:.0e}")
