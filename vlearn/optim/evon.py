"""EVON: IVON in the eigenbasis of each matrix's gradients.

Minut, Daheim, Miani, Khan, Lin, Möllenhoff, 2026, "SOAP-Bubbles: Structured Weight Uncertainty for Neural Networks",
arXiv:2606.23357; the eigenbasis is SOAP's (Vyas et al., 2024, arXiv:2409.11321).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlearn.optim.distributed.processes import Processes
from vlearn.optim.parameters.options import DEFAULTS as SHARED_DEFAULTS
from vlearn.optim.parameters.options import (
    SharedOptions,
    check,
    common_rules,
    own_options,
    settings_of,
    whole_number_rule,
    with_shared_options,
)
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.rotated import RotatedOptimizer
from vlearn.optim.structures.eigenbasis import EigenbasisStructure
from vlearn.optim.updates.bases import refresh_bases
from vlearn.optim.updates.block_update import BlockUpdate
from vlearn.optim.updates.curvature import check_curvature
from vlearn.optim.updates.eigenbasis import EigenbasisCurvature, move_matrices, turned
from vlearn.optim.updates.riemannian import apply_ivon_step, off_scale

if TYPE_CHECKING:
    from typing_extensions import Unpack


DEFAULTS = SHARED_DEFAULTS.copy()
DEFAULTS.update(hess_init=0.1, beta2=0.9999, beta2_warmup=30)
ESS_PER_EXAMPLE = 100  # trained best, or nearly, on most networks: docs/results/optimizers.md


@partial(with_shared_options, defaults=DEFAULTS)
class EVON(RotatedOptimizer[EigenbasisStructure]):
    r"""IVON in an eigenbasis: a Gaussian that correlates the weights of a matrix, and needs no recorded pass.

    For a weight M ``[O, I]`` (of a convolution ``[O, I·k·k]``) with bases Q_L, Q_R, averages over the step's draws θ,
    and ∘ between entries:

        θ = M + Q_L(E ∘ 1/√(ess·(h + wd)))Q_Rᵀ,  E standard normal
        ĥ = ess·(h + wd)∘mean (Q_Lᵀ(θ - M)Q_R)∘(Q_Lᵀ∇ℓ̄(θ)Q_R)
        G ← β₁G + (1 - β₁) mean ∇ℓ̄(θ)
        h ← β₂h + (1 - β₂)ĥ + ½(1 - β₂)²(h - ĥ)²/(h + wd)
        M ← M - lr·Q_L[Q_Lᵀ(G/(1 - β₁ᵗ) + wd·M)Q_R/(h + wd)]Q_Rᵀ, each entry of the bracket within ±ξ
        L ← β₃L + (1 - β₃)ĜĜᵀ,  R ← β₃R + (1 - β₃)ĜᵀĜ,  Ĝ = mean ∇ℓ̄(θ)

    and every `update_every` steps, from the first on, Q_L and Q_R move to the eigenvectors of L and R, by one power
    iteration (the first time wholly), and h with them, (T_L∘T_L)h(T_R∘T_R)ᵀ, T = Q_newᵀQ_old. An estimate ĥ is always
    of the basis that its noise was made in. The posterior precision is num_data·Q(h + wd)Qᵀ, Q = Q_L ⊗ Q_R. Where the
    bases are the identity this is `IVON` with the same settings; the defaults are others: β₂ is a running average of
    all estimates first (`beta2_warmup`), so that hess_init is soon forgotten, and steps are bounded by lr·ξ as those of
    Adam are by its learning rate. A `prior` with a precision P₀ of each entry pulls M exactly, and adds its diagonal in
    the basis, of Qᵀ(P₀/N)Q, to h.

    Args:
        params: a model, which is then watched; or anything that torch.optim takes.
        lr: learning rate, 1 to 3: a step moves a coordinate by lr·ξ at most, Adam's by its learning rate.
        ess: effective sample size, the width of the draws; by default 100·num_data, which trains best, but rows of the
            first few hundred steps may only rank. N, the number of training examples, draws from the posterior itself,
            and takes the loss for a negative log-likelihood: a squared error of variance σ² is one only times 1/(2σ²),
            so ess = N/(2σ²), with num_data.
        clip_radius: ξ, bound on each entry of the preconditioned gradient, in the basis; inf does not clip.
        rescale_lr: multiply lr by hess_init + wd, as IVON does, where no entry is clipped.
        curvature: "price" (above) or "empirical", ĥ = ess·mean (Q_LᵀĜQ_R)², which has no scale, see `IVON`.
        update_every: steps from one change of the bases to the next.
        beta3: momentum β₃ of L and R; SOAP's 0.95 follows faster, of a mean of many the posterior says more.
        max_dim: sides of a matrix with more rows, or columns, keep their own entries as basis: of an embedding the
            tokens. So do sides with more than 128 times the other's. 0 makes a group diagonal, as in `IVON`.
        foreach: multi-tensor operations for diagonal parameters; default wherever a block has several tensors.
        hess_init, beta2, beta2_warmup: as with every optimizer, but by default 0.1, 0.9999 and 30.
        **shared: see `vlearn.optim.SharedOptions`.

    Attributes:
        decomposition_failures: changes of a basis that failed, where the last one stayed.

    Raises:
        ValueError: if an argument breaks its rule, or neither num_data nor ess is given.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = EVON(model, lr=2.0, num_data=100)
        >>> loss = model(torch.ones(4, 2)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.posterior().mean["weight"].shape
        torch.Size([3, 2])
    """

    _takes_complex = True
    _takes_shards = True
    _takes_prior = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        ess: float | None = None,
        *,
        clip_radius: float = 1e-3,
        rescale_lr: bool = False,
        curvature: str = "price",
        update_every: int = 10,
        beta3: float = 0.999,
        max_dim: int = 8192,
        foreach: bool | None = None,
        **shared: Unpack[SharedOptions],
    ):
        own = {
            "clip_radius": clip_radius,
            "rescale_lr": rescale_lr,
            "curvature": curvature,
            "update_every": update_every,
            "beta3": beta3,
            "max_dim": max_dim,
            "foreach": foreach,
        }
        given = DEFAULTS.copy()
        given.update(shared)
        if ess is None:
            num_data = given.get("num_data")
            if num_data is None:
                raise ValueError("EVON needs num_data, the number of training examples: EVON(model, lr=2, num_data=N).")
            ess = ESS_PER_EXAMPLE * num_data
        super().__init__(params, settings_of("EVON", lr, ess, given, **own), *own_options(shared))

    def refresh_bases(self) -> None:
        """Turn every basis to the eigenvectors of L and R at once, and the Hessian with it; all processes must call it.

        A draw that waits is dropped, and a posterior that was read before is stale.
        """
        self._sampler.discard()
        structure = self._structure
        refresh_bases(structure, structure.layers(), partial(turned, structure, wholly=True))
        self._parameters.count_change()

    def _check_group(self, group: Group) -> None:
        check(
            group,
            [
                *common_rules(group),
                ("clip_radius", group["clip_radius"] > 0, "must be positive: inf does not clip"),
                whole_number_rule(group, "update_every", 1, "steps: use 10"),
                ("beta3", 0 <= group["beta3"] < 1, "must be in [0, 1): try 0.999"),
                whole_number_rule(group, "max_dim", 0, "rows: use 8192"),
            ],
        )
        check_curvature("EVON", group["curvature"], ("price", "empirical"), "use KFACVON or VON, which have the others")

    def _check_sharded(self, p: Tensor) -> None:
        super()._check_sharded(p)
        if p.dim() > 2 and any(getattr(placement, "dim", 0) for placement in p.placements):  # pyright: ignore
            raise TypeError(
                f"a parameter of shape {tuple(p.shape)} is sharded along another axis than its first, which its "
                "eigenbasis is not: shard it along the first, or use IVON."
            )

    def _new_structure(self, parameters: Parameters, processes: Processes) -> EigenbasisStructure:
        return EigenbasisStructure(parameters, processes)

    def _new_curvature(self, structure: EigenbasisStructure) -> EigenbasisCurvature:
        return EigenbasisCurvature(structure)

    def _uncalibrated_reason(self) -> str | None:
        return off_scale(self.param_groups) or super()._uncalibrated_reason()

    def _update_block(self, update: BlockUpdate) -> BlockUpdate | None:
        structure = self._structure
        alone, matrices = update.parted(structure.layer_of())
        if alone.slices:
            apply_ivon_step(structure.diagonal, alone)
        if not matrices.slices:
            return None
        move_matrices(structure, matrices)
        return matrices._replace(curvatures=None)

    def _update_jointly(self, updates: list[BlockUpdate], prepared: Any) -> None:
        """Move the bases that are due."""
        structure = self._structure
        moved = [structure.layer_of()[piece.parameter] for update in updates for piece in update.slices]
        due = [layer for layer in moved if structure.is_due(layer, structure.num_updates(layer))]
        refresh_bases(structure, due, partial(turned, structure))
