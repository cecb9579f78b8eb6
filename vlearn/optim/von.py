"""VON: the variational online Newton method with a diagonal Gauss-Newton or Hessian matrix.

Khan et al., 2018, arXiv:1806.04854; Khan and Rue, 2023, "The Bayesian Learning Rule", arXiv:2107.04562.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import nn

from vlearn.capture.pytrees import Selector
from vlearn.gaussians import Diagonal
from vlearn.losses.likelihood import Likelihood
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.optimizer import VariationalOptimizer
from vlearn.optim.parameters.options import SharedOptions, check, own_options, settings_of, with_shared_options
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.optim.updates.block_update import BlockUpdate
from vlearn.optim.updates.curvature import (
    CURVATURES,
    PassCurvature,
    PriceCurvature,
    check_curvature,
    check_likelihood,
)
from vlearn.optim.updates.newton import apply_newton_step, newton_rules

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_shared_options
class VON(VariationalOptimizer[DiagonalStructure, Diagonal]):
    r"""A diagonal Gaussian by online Newton steps: the curvature of the loss, not the size of the gradients.

    With t from 1, ℓ̄ the mean loss, and averages over the step's draws θ = m + ε/√(ess·(h + wd)), ε ~ N(0, 1):

        ĝ = mean ∇ℓ̄(θ),  ĥ = mean (1/B) Σᵢ (Jᵢᵀuᵢ)²,  E[uᵢuᵢᵀ] = Λᵢ = ∂²ℓᵢ/∂f²,  E[ĥ] = diag (1/B) Σᵢ JᵢᵀΛᵢJᵢ
        g ← β₁g + (1 - β₁)ĝ,  h ← β₂h + (1 - β₂)ĥ
        m ← m - lr·(g/(1 - β₁ᵗ) + wd·m)/(h + wd + damping)

    The probe u takes one more backward pass through the training step's own graph, without weight gradients; it needs
    no labels and stays informative where the training examples are fitted and their gradients vanish. The posterior
    precision is num_data·(h + wd).

    Args:
        params: a model, which is then watched; or anything that torch.optim takes, with `watch(model)` before the
            first step.
        lr: learning rate, 1e-2 for networks and less with a small Hessian; 1 with beta1=0 is a Newton step.
        ess: effective sample size, the width of the draws: the number of training examples. More makes them narrower;
            then give num_data too. The noise of "price" grows with √ess, see `diagnostics().hessian_noise`.
        curvature: "ggn" (above, u = R z, RRᵀ = Λ, z random signs), "sampled" (u the residual of labels sampled from the
            model), "empirical" (the examples' own gradients, as in `VOGN`) or "price", ĥ = ess·(h + wd)·mean
            (θ - m)∘∇ℓ̄(θ), which needs no captures and no likelihood, and with which h + wd at most halves in a step.
        likelihood: what the loss is the negative logarithm of: "categorical" (softmax cross-entropy of scores or
            log-probabilities, over whichever axis; with class weights, ignored targets, soft labels),
            "bernoulli" (binary cross-entropy of logits), "gaussian" (`F.mse_loss`: (f - y)², averaged over all
            entries), or a callable output -> torch Distribution, averaged too and taken at its word. Of the first
            three step() refuses a loss that its gradient in the output and its value do not show to be that one.
            Weights of examples and classes are read where the labels are hard.
        output: which of several outputs of the model the likelihood is of: a key, an index or a callable.
        damping: added to the preconditioner alone, never to the posterior.
        foreach: multi-tensor operations; default wherever a block has several tensors.
        **shared: see `vlearn.optim.SharedOptions`.

    Raises:
        ValueError: if an argument breaks its rule.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = VON(model, lr=0.1, ess=100)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0]))
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.posterior().variance["weight"].shape
        torch.Size([3, 2])
    """

    _copied = ("curvature", "likelihood", "output")
    _takes_prior = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        ess: float,
        *,
        curvature: str = "ggn",
        likelihood: Likelihood = "categorical",
        output: Selector = None,
        damping: float = 0.0,
        foreach: bool | None = None,
        **shared: Unpack[SharedOptions],
    ):
        check_curvature("VON", curvature, CURVATURES)
        check_likelihood(likelihood)
        self.curvature, self.likelihood, self.output = curvature, likelihood, output
        self._takes_complex = self._takes_shards = curvature == "price"
        defaults = settings_of("VON", lr, ess, shared, damping=damping, foreach=foreach)
        super().__init__(params, defaults, *own_options(shared))

    def _check_group(self, group: Group) -> None:
        check(group, newton_rules(group))

    def _new_structure(self, parameters: Parameters, processes: Processes) -> DiagonalStructure:
        return DiagonalStructure(parameters)

    def _new_curvature(self, structure: DiagonalStructure) -> PassCurvature | PriceCurvature:
        if self.curvature == "price":
            return PriceCurvature(structure)
        return PassCurvature(structure, self.curvature, self.likelihood, self.output)

    def _update_block(self, update: BlockUpdate) -> None:
        apply_newton_step(self._structure, update, signed=self.curvature == "price")
