"""VOGN: the variational online Gauss-Newton method.

Khan et al., 2018, "Fast and Scalable Bayesian Deep Learning by Weight-Perturbation in Adam", arXiv:1806.04854;
tempering, damping and the augmentation factor are Osawa et al., 2019, arXiv:1906.02506.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from vlearn.gaussians import Diagonal
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.optimizer import VariationalOptimizer
from vlearn.optim.parameters.options import SharedOptions, check, own_options, settings_of, with_shared_options
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.optim.updates.block_update import BlockUpdate
from vlearn.optim.updates.curvature import PassCurvature
from vlearn.optim.updates.newton import apply_newton_step, newton_rules

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_shared_options
class VOGN(VariationalOptimizer[DiagonalStructure, Diagonal]):
    r"""A diagonal Gaussian whose Hessian is the mean of the examples' squared gradients.

    With t from 1, ∇ℓᵢ the gradient of one example's own loss, and averages over the step's draws
    θ = m + ε/√(N̂·(h + wd̂)), ε ~ N(0, 1):

        ĝ = mean ∇ℓ̄(θ),  ĥ = mean (1/B) Σᵢ ∇ℓᵢ(θ)²
        g ← β₁g + (1 - β₁)ĝ,  h ← β₂h + (1 - β₂)ĥ
        m ← m - lr·(g/(1 - β₁ᵗ) + wd̂·m)/(h + wd̂ + γ)

    N̂ = ess·ρ/τ and wd̂ = wd·τ/ρ with tempering τ, augmentation factor ρ and damping γ, which never enters the posterior.
    The squares come from the captured training pass without a gradient per example (layers at one position: one
    matrix product). The posterior precision is num_data·(h + wd̂).

    Squared gradients stand for the curvature where the loss is the negative log-likelihood of a model that fits, as
    cross-entropy's. With squared errors on a scale that is not the noise's, and where all examples are fitted, they do
    not: use VON there.

    Args:
        params: a model, which is then watched; or anything that torch.optim takes, with `watch(model)` before the first
            step. Where the loss is divided (accumulation, a gradient scaler), say so by `watch(..., loss_scale=)`.
        lr: learning rate α, 1e-2 for networks.
        ess: effective sample size: the number of training examples.
        damping: γ, added to the preconditioner alone.
        tempering: τ, the weight of the KL divergence in the objective: below 1 for a colder posterior.
        augmentation: ρ, by how much data augmentation multiplies the examples.
        foreach: multi-tensor operations; default wherever a block has several tensors.
        **shared: see `vlearn.optim.SharedOptions`.

    Raises:
        ValueError: if an argument breaks its rule.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = VOGN(model, lr=0.01, ess=100)
        >>> loss = model(torch.ones(3, 2)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.posterior().variance["weight"].shape
        torch.Size([1, 2])
    """

    _takes_prior = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        ess: float,
        *,
        damping: float = 0.0,
        tempering: float = 1.0,
        augmentation: float = 1.0,
        foreach: bool | None = None,
        **shared: Unpack[SharedOptions],
    ):
        own = {"damping": damping, "tempering": tempering, "augmentation": augmentation, "foreach": foreach}
        super().__init__(params, settings_of("VOGN", lr, ess, shared, **own), *own_options(shared))

    def _check_group(self, group: Group) -> None:
        check(
            group,
            [
                *newton_rules(group),
                ("tempering", group["tempering"] > 0, "must be positive: use 1"),
                ("augmentation", group["augmentation"] > 0, "must be positive: use 1"),
            ],
        )

    def _new_structure(self, parameters: Parameters, processes: Processes) -> DiagonalStructure:
        return DiagonalStructure(parameters)

    def _new_curvature(self, structure: DiagonalStructure) -> PassCurvature:
        return PassCurvature(structure, "empirical")

    def _update_block(self, update: BlockUpdate) -> None:
        apply_newton_step(self._structure, update, signed=False)
