"""The optimizers that are compared, each as its documentation's line has it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import vlearn
from benchmarks.defaults.control import Control
from benchmarks.defaults.task import Task

ADAM_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
EVON_RATES = (0.3, 1.0, 3.0, 10.0, 30.0)  # times clip_radius, 1e-3, what an entry moves in a step at most
SGD_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)


@dataclasses.dataclass(frozen=True)
class Method:
    """One optimizer.

    Attributes:
        rate: the learning rate of its one line.
        rates: those that are tried where it is tuned; the others stay at the one.
        make: (model or its parameters, learning rate, task) -> optimizer.
    """

    rate: float
    make: Callable[[Any, float, Task | Control], Any]
    rates: tuple[float, ...] = ()


def parameters_of(model: Any) -> Any:
    """The parameters, where a model is given."""
    return model.parameters() if isinstance(model, nn.Module) else model


def _ivon_opt(model: Any, lr: float, task: Task | Control) -> Any:
    import ivon

    return ivon.IVON(parameters_of(model), lr=lr, ess=task.num_data)


def _soap(model: Any, lr: float, task: Task | Control) -> Any:
    from pytorch_optimizer import SOAP

    return SOAP(parameters_of(model), lr=lr)


METHODS: dict[str, Method] = {
    "AdamW": Method(1e-3, lambda model, lr, task: torch.optim.AdamW(parameters_of(model), lr=lr), ADAM_RATES),
    "SGD": Method(1e-1, lambda model, lr, task: torch.optim.SGD(parameters_of(model), lr=lr, momentum=0.9), SGD_RATES),
    "SOAP": Method(3e-3, _soap, ADAM_RATES),
    "ivon-opt": Method(0.1, _ivon_opt),
    "EVON": Method(2.0, lambda model, lr, task: vlearn.EVON(model, lr=lr, num_data=task.num_data), EVON_RATES),
    # Of the posterior's own width, where the loss is a negative log-likelihood of independent terms.
    "EVON, ess=T": Method(
        2.0, lambda model, lr, task: vlearn.EVON(model, lr=lr, ess=task.num_terms, num_data=task.num_data)
    ),
    "VAdamW": Method(1e-3, lambda model, lr, task: vlearn.VAdamW(model, lr=lr, num_data=task.num_data), ADAM_RATES),
}
