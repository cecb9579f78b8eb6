"""Sensitivities of a subject as they are computed without vlearn, as calls to be timed.

vmap(grad)      every example's gradient, then its product with the posterior variance: the self-influence
vmap(jacrev)    every example's Jacobian, then diag(J Σ Jᵀ), the published code of the memory-perturbation paper
laplace-torch   the functional variance V, then V e, by each of its back ends
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cost.passes import Build, Call, Subject
from benchmarks.reference import laplace

GRADIENTS, JACOBIANS, LAPLACE = "vmap(grad)", "vmap(jacrev)", "laplace-torch"


def by_gradients(subject: Subject, examples: int) -> Call:
    """The self-influence ``[N]`` from every example's gradient."""
    model, (x, y) = subject.model(), subject.data(examples)
    values, variance = {name: p.detach() for name, p in model.named_parameters()}, variances(model)

    def loss(values: dict[str, Tensor], one: Tensor, label: Tensor) -> Tensor:
        return subject.loss(functional_call(model, values, (one.unsqueeze(0),)), label.unsqueeze(0))

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # vmap would go through the fused one example by example
            gradients = vmap(grad(loss), (None, 0, 0))(values, x, y)
        return torch.stack([g.square().flatten(1) @ variance[name] for name, g in gradients.items()]).sum(0)

    return call


def by_jacobians(subject: Subject, examples: int) -> Call:
    """The diagonals of V ``[N, C]`` from every example's Jacobian."""
    model, (x, _) = subject.model(), subject.data(examples)
    values, variance = {name: p.detach() for name, p in model.named_parameters()}, variances(model)

    def output(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, values, (one.unsqueeze(0),)).squeeze(0)

    def call() -> Tensor:
        jacobians = vmap(jacrev(output), (None, 0))(values, x)
        return torch.stack([j.square().flatten(2) @ variance[name] for name, j in jacobians.items()]).sum(0)

    return call


def by_laplace(backend: str, subject: Subject, examples: int) -> Call:
    """V e ``[N, C]``; each back end has its own fit and copy of the network, since their hooks do not go together."""
    model, (x, y) = subject.model(), subject.data(examples)
    la = laplace.fit(model, *subject.data(2), "diag", prior_precision=60.0, backend=backend)
    return lambda: laplace.deviation(la, x, y, examples)


def variances(model: nn.Module) -> dict[str, Tensor]:
    """A posterior variance of 1e-4 for every entry of each parameter, flattened."""
    return {name: torch.full((p.numel(),), 1e-4) for name, p in model.named_parameters()}


PEERS: dict[str, dict[str, Build]] = {
    GRADIENTS: {"": by_gradients},
    JACOBIANS: {"": by_jacobians},
    LAPLACE: {f"{backend}, ": partial(by_laplace, backend) for backend in laplace.BACKENDS},
}
