"""Numbers in the sentences on optimizers, wrong labels and cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from benchmarks.report.markdown import both, from_to, percent, roughly, short
from benchmarks.report.records import read
from benchmarks.tables import labels
from benchmarks.tables.optimizers import largest_excess, recorded, with_data

MLP = "MLP 784-500-300-10"
# Of a forward pass, by layer: outputs times inputs, and of a convolution times positions.
MULTIPLICATIONS = {
    MLP: (784 * 500, 500 * 300, 300 * 10),
    "LeNet-5": (28 * 28 * 6 * 25, 10 * 10 * 16 * 150, 120 * 400, 84 * 120, 10 * 84),
}


def _loss(methods: dict[str, Any], method: str, which: str) -> float:
    """The validation loss, infinite where the method diverged; NaN, which is below nothing, where it was not run."""
    loss = methods.get(method, {}).get(which, {}).get("mean", {}).get("loss", math.nan)
    return math.inf if loss is None else loss


def _evon_below(which: str, multiple: float = 1.0) -> str:
    """In how many tasks EVON's line is below AdamW, or below this multiple of its loss."""
    below = [_loss(each, "EVON", "line") < multiple * _loss(each, "AdamW", which) for each in recorded()]
    return f"{sum(below)}"


def _evon_tuned_below() -> str:
    """In how many tasks with a loss EVON at its best rate is below AdamW at its own."""
    return f"{sum(_loss(each, 'EVON', 'tuned') < _loss(each, 'AdamW', 'tuned') for each in with_data())}"


def _soap_lowest() -> str:
    """In how many tasks SOAP at its best rate has the lowest loss."""
    below = [
        [_loss(each, method, which) < _loss(each, "SOAP", "tuned") for method in each for which in ("line", "tuned")]
        for each in recorded()
        if "SOAP" in each
    ]
    return f"{sum(not any(of_task) for of_task in below)}"


def _of_policy(method: str, which: str = "line") -> dict[str, float]:
    """What PPO reached by a method."""
    return read("defaults/ppo")["methods"][method][which]["mean"]


def _accuracy_of_lenet(method: str, which: str) -> float:
    return read("defaults/lenet")["methods"][method][which]["mean"]["accuracy"]


def _loss_in_lora(method: str) -> float:
    return _loss(read("defaults/lora")["methods"], method, "tuned")


def _of_leave_one_out(task: str, method: str = "EVON") -> dict[str, float]:
    """A method's losses by its one line."""
    return read(f"defaults/leave_one_out/{task}")["methods"][method]["mean"]


def _apart(losses: dict[str, float]) -> float:
    """What leave-one-out is off, in parts of the held-out loss."""
    return abs(losses["loo_loss"] / losses["held_out_loss"] - 1)


def _beside_held_out(method: str, shown: Callable[[float], str]) -> str:
    """A method's leave-one-out loss in multiples of the held-out loss, on all tasks but the two texts."""
    losses = [_of_leave_one_out(task, method) for task in ("lenet", "vit", "resnet", "bert", "unet", "lora")]
    return from_to((each["loo_loss"] / each["held_out_loss"] for each in losses), shown)


def _contested_above_folds() -> str:
    """For how many sets of labels and optimizers the contested loss is above cleanlab's recipe."""
    above = []
    for record in labels.records():
        (folds,) = record["table"][labels.FOLDS].values()
        for method in labels.METHODS:
            contested = record["table"][method]["contested loss, live"]
            above.append(contested["mean"]["average_precision"] > folds["mean"]["average_precision"])
    return f"{sum(above)} of {len(above)}"


def _logistic(name: str, quantity: str, digits: int) -> str:
    """A divergence in nats, of the posterior of a logistic regression."""
    return short(read("family/figures")["logistic"][name][quantity], digits)


def _seconds_of_all(which: str) -> str:
    """Seconds of going through 60,000 images."""
    return f"{read('sensitivity_cost')['whole data set'][which]:.1f} s"


def _multiple(network: str, quantity: str) -> float:
    """Of one plain forward and backward pass, one thread."""
    return read("sensitivity_cost")["multiples"]["threads=1"][network][quantity]


def _bound(network: str, products: int) -> float:
    """A plain pass and so many more products of every layer, in plain passes."""
    layers = MULTIPLICATIONS[network]  # the input of the first needs no gradient
    return 1 + products * sum(layers) / (3 * sum(layers) - layers[0])


def _sweep_over_jacrev(network: str) -> float:
    return _multiple(network, "vmap(jacrev)") / _multiple(network, "sweep with LOO")


def _fit_over_laplace_torch() -> float:
    seconds = read("fit_cost")["seconds"]["LeNet-5"]
    return seconds["laplace-torch, Kronecker"] / seconds["fit, kronecker"]


def _growth_in_tokens(quantity: str) -> float:
    """The power of the length of a sequence that a sweep grows with."""
    (slopes,) = (found for title, found in read("growth")["slopes"].items() if title.startswith("tokens"))
    return slopes[quantity]["sweep with LOO"]


NUMBERS: dict[str, Callable[[], str]] = {
    "init-weight": lambda: short(read("family/fashion-mnist-5k")["remaining_weight_of_hess_init"], 2),
    "von-forgets": lambda: percent(
        read("family/fashion-mnist-5k")["table"]["VON, default beta2"]["mean"]["accuracy"], 0
    ),
    "fullvon-nearest": lambda: _logistic("FullVON", "from_nearest", 4),
    "nearest-truth": lambda: _logistic("nearest Gaussian", "from_truth", 4),
    "diagonal-truth": lambda: _logistic("nearest diagonal Gaussian", "from_truth", 3),
    "tasks": lambda: f"{len(recorded())}",
    "tasks-with-data": lambda: f"{len(with_data())}",
    "vadamw-above": lambda: percent(largest_excess()),
    "vadamw-above-tuned": lambda: percent(largest_excess("tuned")),
    "lora-vadamw": lambda: percent(1 - _loss_in_lora("VAdamW") / _loss_in_lora("AdamW"), 0),
    "evon-below-line": lambda: _evon_below("line"),
    "evon-below-tuned": lambda: _evon_below("tuned"),
    "evon-near-tuned": lambda: _evon_below("tuned", 1.02),
    "evon-tuned-below": _evon_tuned_below,
    "soap-lowest": _soap_lowest,
    "lenet-evon": lambda: percent(_accuracy_of_lenet("EVON", "line")),
    "lenet-adamw": lambda: percent(_accuracy_of_lenet("AdamW", "tuned")),
    "ppo-evon": lambda: f"{_of_policy('EVON')['return']:.0f}",
    "ppo-evon-tuned": lambda: f"{_of_policy('EVON', 'tuned')['return']:.0f}",
    "ppo-wide": lambda: f"{_of_policy('EVON, ess=T')['return']:.0f}",
    "ppo-clipped": lambda: percent(_of_policy("EVON")["beyond the clip"], 0),
    "ppo-clipped-wide": lambda: percent(_of_policy("EVON, ess=T")["beyond the clip"], 0),
    "gru-of-other-scenes": lambda: short(_of_leave_one_out("gru")["loss"], 3),
    "text-apart": lambda: percent(max(_apart(_of_leave_one_out(name)) for name in ("gpt", "gru"))),
    "evon-loo": lambda: _beside_held_out("EVON", lambda multiple: short(multiple, 2)),
    "vadamw-overstates": lambda: _beside_held_out("VAdamW", roughly),
    "contested-above": _contested_above_folds,
    "sweep-all": lambda: _seconds_of_all("sweep with LOO, s"),
    "train-all": lambda: _seconds_of_all("plain forward + backward, s"),
    "bounds": lambda: both((_bound(name, 1) for name in MULTIPLICATIONS), "{:.2f}".format),
    "live": lambda: both((_multiple(name, "live self-influence") for name in MULTIPLICATIONS), "{:.2f}".format),
    "watching": lambda: both((_multiple(name, "watched, nothing asked") for name in MULTIPLICATIONS), "{:.2f}".format),
    "deviation-bound": lambda: f"{_bound('LeNet-5', 4):.2f}",
    "deviation": lambda: f"{_multiple('LeNet-5', 'live with deviation'):.2f}",
    "jacrev": lambda: both(map(_sweep_over_jacrev, MULTIPLICATIONS), roughly),
    "fit-faster": lambda: roughly(_fit_over_laplace_torch()),
    "growth-tokens": lambda: both(map(_growth_in_tokens, ("time, ms", "memory, MiB")), "{:.1f}".format),
}
