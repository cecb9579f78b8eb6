"""The optimizers that `benchmarks.family` compares: how each is made, stepped, and read as a posterior.

Every one has the same grid of factors around a learning rate of its own, and the same prior. The rates are what each
documentation recommends, for runs as short as here at its upper end. AdamW and VAdamW keep their own decoupled weight
decay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import vlearn
from vlearn.gaussians.protocol import Posterior
from vlearn.posterior import Diagonal, from_optimizer

GRID = (1 / 3, 1.0, 3.0)  # times each method's own rate; where the best is at an end, the grid goes on
MOST = 5  # rates that are tried
IVON_OPT = "ivon-opt"
EVON_TAKES = ("ess", "weight_decay", "generator")  # hess_init is soon forgotten, as its own beta2_warmup has it
FORGETFUL = "VON, default beta2"  # without hess_init within hundreds of steps


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a training run is given beside its learning rate.

    Attributes:
        hess_init, beta2: of every variational optimizer. Their defaults are for other lengths of training, and with
            fewer examples than parameters much depends on what hess_init still weighs at the end.
    """

    num_data: int
    prior_precision: float
    seed: int
    hess_init: float
    beta2: float

    @property
    def weight_decay(self) -> float:
        return self.prior_precision / self.num_data

    def variational(self) -> dict[str, Any]:
        return {
            "ess": self.num_data,
            "weight_decay": self.weight_decay,
            "hess_init": self.hess_init,
            "beta2": self.beta2,
        }

    def vlearn(self) -> dict[str, Any]:
        return {**self.variational(), "generator": torch.Generator().manual_seed(self.seed)}


@dataclasses.dataclass(frozen=True)
class Method:
    """One optimizer.

    Attributes:
        rate: the learning rate in the middle of the grid.
        make: (model, learning rate, problem) -> optimizer.
        is_posterior: the state is a posterior whose draws are the method's prediction.
    """

    rate: float
    make: Callable[[nn.Module, float, Problem], Any]
    is_posterior: bool = True


def _sgd(model: nn.Module, lr: float, problem: Problem) -> Any:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=problem.weight_decay)


def _ivon_opt(model: nn.Module, lr: float, problem: Problem) -> Any:
    import ivon

    return ivon.IVON(model.parameters(), lr=lr, **problem.variational())


METHODS: dict[str, Method] = {
    "SGD": Method(0.1, _sgd, is_posterior=False),
    "AdamW": Method(3e-3, lambda model, lr, problem: torch.optim.AdamW(model.parameters(), lr=lr), is_posterior=False),
    IVON_OPT: Method(0.2, _ivon_opt),
    "IVON": Method(0.2, lambda model, lr, p: vlearn.IVON(model, lr=lr, **p.vlearn())),
    "EVON": Method(2.0, lambda model, lr, p: vlearn.EVON(model, lr=lr, **{key: p.vlearn()[key] for key in EVON_TAKES})),
    "VAdamW": Method(
        3e-3,
        lambda model, lr, p: vlearn.VAdamW(
            model,
            lr=lr,
            num_data=p.num_data,
            prior_precision=p.prior_precision,
            generator=torch.Generator().manual_seed(p.seed),
        ),
    ),
    "VON": Method(0.03, lambda model, lr, p: vlearn.VON(model, lr=lr, **p.vlearn())),
    FORGETFUL: Method(
        0.03, lambda model, lr, p: vlearn.VON(model, lr=lr, **{**p.vlearn(), "hess_init": 1.0, "beta2": 0.99})
    ),
    "VOGN": Method(0.03, lambda model, lr, p: vlearn.VOGN(model, lr=lr, **p.vlearn())),
    "KFACVON": Method(0.1, lambda model, lr, p: vlearn.KFACVON(model, lr=lr, **p.vlearn())),
    "EK-FAC": Method(0.1, lambda model, lr, p: vlearn.KFACVON(model, lr=lr, **p.vlearn(), eigenvalue_correction=True)),
}


def soap(model: Any, lr: float) -> Any:
    """The peer of EVON, whose basis it has, on a model's parameters."""
    from pytorch_optimizer import SOAP

    return SOAP(model.parameters(), lr=lr)


def posterior_of(optimizer: Any, model: nn.Module, problem: Problem) -> Posterior | None:
    """The posterior that an optimizer's state is, or implies; None of SGD, whose scale is arbitrary."""
    if isinstance(optimizer, torch.optim.SGD):
        return None
    if isinstance(optimizer, torch.optim.AdamW):
        return from_optimizer(optimizer, model, problem.num_data, problem.prior_precision)
    if hasattr(optimizer, "posterior"):
        return optimizer.posterior()
    named = {name: p.detach() for name, p in model.named_parameters()}
    (group,) = optimizer.param_groups
    hessian = group["hess"].split([p.numel() for p in named.values()])  # one vector of all parameters in their order
    precision = {
        name: problem.num_data * (h.reshape(p.shape) + problem.weight_decay)
        for (name, p), h in zip(named.items(), hessian, strict=True)
    }
    return Diagonal.from_precision(named, precision, problem.num_data, problem.prior_precision)
