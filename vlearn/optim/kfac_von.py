"""KFACVON: noisy K-FAC, the variational online Newton method with Kronecker factors.

Zhang, Sun, Duvenaud, Grosse, 2018, "Noisy Natural Gradient as Variational Inference", arXiv:1712.02390; EK-FAC is
George et al., 2018, arXiv:1806.03884.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlearn.capture.pytrees import Selector
from vlearn.losses.likelihood import Likelihood
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.kernels.multi_tensor import read
from vlearn.optim.parameters.options import (
    SharedOptions,
    check,
    own_options,
    settings_of,
    whole_number_rule,
    with_shared_options,
)
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.rotated import RotatedOptimizer
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.structures.kronecker import KroneckerStructure
from vlearn.optim.updates.bases import refresh_bases
from vlearn.optim.updates.block_update import BlockUpdate
from vlearn.optim.updates.curvature import PassCurvature, check_curvature, check_likelihood
from vlearn.optim.updates.kronecker import Gradients, averaged_statistics, decomposed, move_mean, update_factors
from vlearn.optim.updates.newton import apply_newton_step, newton_rules
from vlearn.per_example.kronecker_factors import CONVENTIONS, Layer

if TYPE_CHECKING:
    from typing_extensions import Unpack


@with_shared_options
class KFACVON(RotatedOptimizer[KroneckerStructure]):
    r"""A Gaussian with a Kronecker product for the precision of each layer: the curvature within it, not its diagonal.

    For a layer with weight M ``[O, I]``, its bias the last column, inputs a (1 appended), and gradients b of the output
    rows, with E[uᵢuᵢᵀ] = ∂²ℓᵢ/∂f² sent back from the model's output f:

        A ← running mean of a aᵀ = Q_A d_A Q_Aᵀ,  B ← running mean of b bᵀ = Q_B d_B Q_Bᵀ
        s = β₂ᵗ·hess_init + (1 - β₂ᵗ)·d_B d_Aᵀ
        θ = M + Q_B(E ∘ 1/√(ess·(s + wd)))Q_Aᵀ,  E standard normal
        g ← β₁g + (1 - β₁) mean ∇ℓ̄(θ)
        M ← M - lr·Q_B[Q_Bᵀ(g/(1 - β₁ᵗ) + wd·M)Q_A / (s + wd + damping)]Q_Aᵀ

    Running means start at their first value and weigh older ones by β₂. The posterior precision is
    num_data·Q(s + wd)Qᵀ, Q = Q_B ⊗ Q_A: the damping by wd is exact, and is the prior. A `prior` with a precision P₀ of
    each entry pulls M exactly, and adds its diagonal in the basis, of Qᵀ(P₀/N)Q, to s: of all Gaussians with this basis
    that is the nearest. Layers are linear layers,
    convolutions of one group and embeddings, also user-registered ones that are matrix products; a bias in another
    parameter group than its weight, layers with more than 8192 inputs or outputs, and all other parameters are
    diagonal, as in `VON`. Where positions share a weight, A takes the inputs of every `update_every`-th step alone.

    Args:
        params: a model, which is then watched; or anything that torch.optim takes, with `watch(model)` before the
            first step.
        lr: learning rate, 1e-2 for networks; 1 with beta1=0 is a Newton step.
        ess: effective sample size: the number of training examples.
        curvature: where b comes from: "ggn" (u = R z, RRᵀ = ∂²ℓ/∂f², z random signs), "sampled" (u the residual of
            labels sampled from the model) or "empirical" (the training gradients: no likelihood, and the less
            curvature the better the examples are fitted).
        likelihood: what the loss is the negative logarithm of, see `VON`.
        output: which of several outputs of the model the likelihood is of: a key, an index or a callable.
        kfac_approx: of positions that share a weight: "expand" takes them for independent, "reduce" for one, see
            `vlearn.per_example.kronecker_factors`.
        eigenvalue_correction: EK-FAC: s ← β₂s + (1 - β₂) mean (Q_BᵀG_nQ_A)², G_n the examples' own gradients from u.
        factored_damping: Zhang's and K-FAC's: s + wd is the product (d_B + √wd/π)(d_A + π√wd).
        update_every: steps from one eigendecomposition to the next.
        damping: added to the preconditioner alone, never to the posterior.
        tempering: τ, the weight of the KL divergence in the objective (Zhang's λ): ess/τ and wd·τ stand for ess and wd.
        foreach: multi-tensor operations for diagonal parameters; default wherever a block has several tensors.
        **shared: see `vlearn.optim.SharedOptions`.

    Attributes:
        decomposition_failures: eigendecompositions that failed, where the last good basis stayed.

    Raises:
        ValueError: if an argument breaks its rule.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = KFACVON(model, lr=0.01, ess=100)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0]))
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.posterior().variance["weight"].shape
        torch.Size([3, 2])
    """

    _copied = ("curvature", "likelihood", "output", "kfac_approx", "eigenvalue_correction", "factored_damping")
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
        kfac_approx: str = "expand",
        eigenvalue_correction: bool = False,
        factored_damping: bool = False,
        update_every: int = 10,
        damping: float = 0.0,
        tempering: float = 1.0,
        foreach: bool | None = None,
        **shared: Unpack[SharedOptions],
    ):
        check_curvature("KFACVON", curvature, ("ggn", "sampled", "empirical"), "use IVON or VON, which have it")
        check_likelihood(likelihood)
        if kfac_approx not in CONVENTIONS:
            raise ValueError(f"kfac_approx={kfac_approx!r}, but it must be 'expand' or 'reduce': use 'expand'.")
        if eigenvalue_correction and factored_damping:
            raise ValueError(
                "factored_damping=True with eigenvalue_correction=True, whose s is no product of factors: use one of "
                "them."
            )
        self.curvature, self.likelihood, self.output = curvature, likelihood, output
        self.kfac_approx, self.eigenvalue_correction = kfac_approx, eigenvalue_correction
        self.factored_damping = factored_damping
        own = {"update_every": update_every, "damping": damping, "tempering": tempering, "foreach": foreach}
        super().__init__(params, settings_of("KFACVON", lr, ess, shared, **own), *own_options(shared))

    def _check_group(self, group: Group) -> None:
        check(
            group,
            [
                *newton_rules(group),
                ("tempering", group["tempering"] > 0, "must be positive: use 1"),
                whole_number_rule(group, "update_every", 1, "steps: use 10"),
            ],
        )

    def _take_prior(self, prior: Any, candidates: list[Tensor], whole: bool) -> None:
        if self.factored_damping:
            raise ValueError(
                "factored_damping=True with a prior, but it damps by one weight decay: use factored_damping=False."
            )
        super()._take_prior(prior, candidates, whole)

    def _new_structure(self, parameters: Parameters, processes: Processes) -> KroneckerStructure:
        return KroneckerStructure(parameters, processes, self.kfac_approx, self.eigenvalue_correction)

    def _new_curvature(self, structure: KroneckerStructure) -> PassCurvature:
        return PassCurvature(structure, self.curvature, self.likelihood, self.output)

    def _update_block(self, update: BlockUpdate) -> BlockUpdate | None:
        """Update the parameters that are in no layer."""
        alone, in_layers = update.parted(self._structure.layer_of())
        if alone.slices:
            apply_newton_step(self._structure.diagonal, alone, signed=False)
        return in_layers if in_layers.slices else None

    def _prepare_update(self, draw: Draw, layer_statistics: dict[Any, list[Tensor]]) -> dict[Layer, dict[str, Tensor]]:
        """The statistics of each layer, averaged over draws and processes; those of new layers make them."""
        structure = self._structure
        statistics_of = averaged_statistics(structure, layer_statistics)
        for layer, statistics in statistics_of.items():
            if not any(p in structure.layer_of() for p in layer.parameters):
                structure.add_layer(layer, statistics["out_factor"], statistics["in_factor"])
        return statistics_of

    def _update_jointly(self, updates: list[BlockUpdate], prepared: dict[Layer, dict[str, Tensor]]) -> None:
        """Update the layers."""
        structure, gradients = self._structure, Gradients()
        for piece, gradient in (pair for u in updates for pair in zip(u.slices, u.gradients, strict=True)):
            gradients.setdefault(piece.parameter, []).append((piece, gradient))
        moving = [layer for layer in structure.layers() if any(p in gradients for p in layer.parameters)]
        update_factors(structure, moving, gradients, prepared)
        due = [layer for layer in moving if structure.is_due(layer, structure.num_updates(layer))]
        weights = read([self.state[layer.weight]["learned"] for layer in due])
        learned = [layer for layer, weight in zip(due, weights, strict=True) if weight]
        refresh_bases(structure, learned, partial(decomposed, structure, self.factored_damping))
        for layer in moving:
            with torch.autocast(layer.weight.device.type, enabled=False):
                move_mean(structure, layer, gradients)
