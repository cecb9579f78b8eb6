"""FullVON: variational online Newton with a dense precision, for models of up to a few thousand parameters.

Khan and Rue, 2023, "The Bayesian Learning Rule", arXiv:2107.04562; the positive-definite rule is Lin, Schmidt, Khan,
2020, "Handling the Positive-Definite Constraint in the Bayesian Learning Rule", arXiv:2002.10060.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlearn.capture.pytrees import Selector
from vlearn.gaussians import Full
from vlearn.losses.likelihood import Likelihood
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.optimizer import VariationalOptimizer
from vlearn.optim.parameters.options import (
    SharedOptions,
    beta2_of_step,
    check,
    common_rules,
    own_options,
    positive_precision_rules,
    settings_of,
    with_shared_options,
)
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.structures.dense import DenseStructure, check_size, cholesky, filled, positions, rows_of, split
from vlearn.optim.structures.diagonal import momentum_correction
from vlearn.optim.updates.block_update import BlockUpdate
from vlearn.optim.updates.curvature import (
    CURVATURES,
    PassCurvature,
    PriceCurvature,
    check_curvature,
    check_likelihood,
)
from vlearn.optim.updates.dense import dense_hessian_step
from vlearn.optim.updates.hessian_noise import add_noise, is_measured

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_shared_options
class FullVON(VariationalOptimizer[DenseStructure, Full]):
    r"""A Gaussian with a dense covariance, by one of two rules.

    With H the Hessian of the mean loss, S = H + wd, averages over the step's draws θ ~ N(m, (ess·S)⁻¹), and
    Ĥ = mean (1/B) Σᵢ JᵢᵀuᵢuᵢᵀJᵢ, E[uᵢuᵢᵀ] = ∂²ℓᵢ/∂f², a Gauss-Newton matrix (or Price's estimate of the Hessian):

        g ← β₁g + (1 - β₁) mean ∇ℓ̄(θ)
        "von"   H ← β₂H + (1 - β₂)Ĥ, then m ← m - lr·S⁻¹(g/(1 - β₁ᵗ) + wd·m) with the new S
        "iblr"  m ← m - lr·S⁻¹(g/(1 - β₁ᵗ) + wd·m) with the old S, and
                S ← ½(S + UᵀU), U = Lᵀ - (1 - β₂)L⁻¹(H - Ĥ), S = LLᵀ, which is at least S/2 whatever Ĥ is

    With `beta2_warmup`, whose first 1 - β₂ are large, the second rule is bounded so that a burst of noise in Ĥ does not
    blow S up: of the eigenvalues x of (1 - β₂)L⁻¹(H - Ĥ)L⁻ᵀ, those beyond 1 give ½ and those below -1 give ½ + 2|x|
    in the place of 1 - x + x²/2, in S ← L(1 - x + x²/2)Lᵀ. "von" averages, so a burst counts with its weight.

    The posterior precision is num_data·S. Memory and time of a step grow with the square and the cube of the number of
    parameters.

    Args:
        params: a model, which is then watched; or anything that torch.optim takes, with `watch(model)` before the
            first step.
        lr: learning rate, 0.03 to 0.1 for networks; 1 with beta1=0 is a Newton step.
        ess: effective sample size, the width of the draws, see `VON`.
        rule: "von" or "iblr", as above; "von" needs a Hessian estimate that is never negative.
        curvature: "ggn", "sampled", "empirical" or, with the rule "iblr", "price", see `VON`.
        likelihood: what the loss is the negative logarithm of, see `VON`.
        output: which of several outputs of the model the likelihood is of: a key, an index or a callable.
        **shared: see `vlearn.optim.SharedOptions`.

    Raises:
        ValueError: if an argument breaks its rule, or there are too many parameters.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = FullVON(model, lr=0.1, ess=100)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0]))
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.posterior().variance["weight"].shape
        torch.Size([3, 2])
    """

    _copied = ("rule", "curvature", "likelihood", "output")
    _takes_prior = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        ess: float,
        *,
        rule: str = "von",
        curvature: str = "ggn",
        likelihood: Likelihood = "categorical",
        output: Selector = None,
        **shared: Unpack[SharedOptions],
    ):
        if rule not in ("von", "iblr"):
            raise ValueError(f"rule={rule!r}, but it must be 'von' or 'iblr': use 'von'.")
        check_curvature("FullVON", curvature, CURVATURES)
        check_likelihood(likelihood)
        if rule == "von" and curvature == "price":
            raise ValueError(
                "curvature='price' with rule='von', but its estimate may be negative, and the precision with it: "
                "use rule='iblr'."
            )
        self.rule, self.curvature, self.likelihood, self.output = rule, curvature, likelihood, output
        super().__init__(params, settings_of("FullVON", lr, ess, shared), *own_options(shared))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's.

        Raises:
            ValueError: if there are too many parameters for a dense Hessian.
        """
        super().add_param_group(param_group)
        try:
            check_size(self._parameters.trainable())
        except ValueError:
            for p in self.param_groups.pop()["params"]:
                self.state.pop(p, None)  # its prior
            raise

    def _check_group(self, group: Group) -> None:
        check(group, [*common_rules(group), *positive_precision_rules(group)])

    def _new_structure(self, parameters: Parameters, processes: Processes) -> DenseStructure:
        return DenseStructure(parameters)

    def _new_curvature(self, structure: DenseStructure) -> PassCurvature | PriceCurvature:
        if self.curvature == "price":
            return PriceCurvature(structure)
        return PassCurvature(structure, self.curvature, self.likelihood, self.output)

    def _prepare_update(self, draw: Draw, layer_statistics: dict[Any, list[Tensor]]) -> None:
        draw.finish()  # the draw stays in the buffers: Price's estimate wants all of it for every block

    def _update_block(self, update: BlockUpdate) -> BlockUpdate:
        return update

    def _update_jointly(self, updates: list[BlockUpdate], prepared: Any) -> None:
        """Update H, and the mean by the new S ("von") or the old one ("iblr")."""
        if not updates:
            return
        structure, joint = self._structure, self._structure.joint()
        rows = [
            (u.group, piece, gradient) for u in updates for piece, gradient in zip(u.slices, u.gradients, strict=True)
        ]
        moving = [piece.parameter for _, piece, _ in rows]
        at = positions(moving, joint).to(joint[0].device)
        old = structure.hessian(joint)
        decay = structure.prior(joint)
        pull = structure.pull_of_prior(joint, decay)[at]
        hessian = old
        if updates[0].curvatures is not None:
            estimate = torch.cat([rows_of(c).to(old) for u in updates for c in u.curvatures or []])[:, at]
            steps = [int(self.state[p]["step"]) for p in moving]
            kept = [beta2_of_step(group, step + 1) for (group, _, _), step in zip(rows, steps, strict=True)]
            rate = 1 - filled(kept, moving)
            if self.curvature == "price" and any(is_measured(u.group, u.slices, self._parameters) for u in updates):
                self._add_noise(updates, estimate, (old + decay)[at.unsqueeze(1), at])
            bounded = any(u.group.get("beta2_warmup") is not None for u in updates)
            hessian = dense_hessian_step(self.rule, old, (estimate + estimate.mT) / 2, at, rate, decay, bounded)
        precision = (old if self.rule == "iblr" else hessian) + decay
        factor = cholesky(precision[at.unsqueeze(1), at])
        means = [piece.exact_mean(structure.parameters) for _, piece, _ in rows]
        directions = []
        for group, piece, gradient in rows:
            state = self.state[piece.parameter]
            state["step"] += 1
            momentum = state["momentum"].lerp_(gradient, 1 - float(group["beta1"]))
            correction = momentum_correction(group, state["step"])
            directions.append((momentum / correction).reshape(-1).to(old))
        steps = torch.cholesky_solve((torch.cat(directions) + pull).unsqueeze(1), factor).squeeze(1)
        for (group, _, _), mean, step in zip(rows, means, split(steps, moving), strict=True):
            mean.sub_(step.reshape(mean.shape).to(mean), alpha=float(group["lr"]))
        if hessian is not old:
            structure.write_hessian(joint, hessian)

    def _add_noise(self, updates: list[BlockUpdate], estimate: Tensor, precision: Tensor) -> None:
        """Count the noise of Ĥ ``[M, M]`` by the eigenvalues x of S^-½ Ĥ S^-½, which all parameters share."""
        factor = cholesky(precision)
        half = torch.linalg.solve_triangular(factor, (estimate + estimate.mT) / 2, upper=False)
        relative = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        mean_square = relative.square().sum() / len(relative)
        for group, slices, gradients, _ in updates:
            shared = [mean_square.sqrt().to(gradient).expand_as(gradient) for gradient in gradients]
            add_noise(self._parameters, group, slices, shared)
