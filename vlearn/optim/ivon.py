"""IVON: the improved variational online Newton method.

Shen et al., 2024, "Variational Learning is Effective for Large Deep Networks", arXiv:2402.17641, Algorithm 1;
the Riemannian correction is Lin, Schmidt, Khan, 2020, arXiv:2002.10060.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from vlearn.gaussians import Diagonal
from vlearn.gaussians.gaussian import Gaussian
from vlearn.optim.distributed.processes import Processes
from vlearn.optim.kernels.compiled import flat, kernel
from vlearn.optim.optimizer import VariationalOptimizer
from vlearn.optim.parameters.options import SettingRule, beta2_of_step, check, common_rules
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.sampling.blocks import SliceBlock, swap_in_means
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.structures.diagonal import DiagonalStructure
from vlearn.optim.updates.block_update import BlockUpdate
from vlearn.optim.updates.curvature import PriceOrSquares, check_curvature
from vlearn.optim.updates.hessian_noise import add_noise
from vlearn.optim.updates.riemannian import apply_ivon_step, ivon_kernel, ivon_settings, measures_noise, off_scale

_HESS_APPROX = {"price": "price", "gradsq": "empirical"}  # ivon-opt's names for the curvature


class IVON(VariationalOptimizer[DiagonalStructure, Diagonal]):
    r"""Natural-gradient variational inference over a diagonal Gaussian, at the cost of Adam.

    With t from 1, ℓ̄ the mean loss, and the average over the step's draws θ = m + ε/√(ess·(h + wd)), ε ~ N(0, 1):

        ĝ = mean ∇ℓ̄(θ),  ĥ = ess·(h + wd)·mean (θ - m)∘∇ℓ̄(θ)
        g ← β₁g + (1 - β₁)ĝ
        h ← β₂h + (1 - β₂)ĥ + ½(1 - β₂)²(h - ĥ)²/(h + wd)
        m ← m - lr·(hess_init + wd)·(g/(1 - β₁ᵗ) + wd·m)/(h + wd)

    so h + wd at most halves in a step and stays positive. The posterior precision is num_data·(h + wd).

    `beta2_warmup` makes 1 - β₂ large in the first steps, where the square lets one noisy ĥ blow h up. With it the last
    term is (h + wd)·φ(x), x = (1 - β₂)(h - ĥ)/(h + wd), φ(x) = x²/2 for ``|x| <= 1`` and ``|x| - 1/2`` beyond (Huber's
    function): h + wd takes the factor 1 - x + x²/2, or 1/2 for x > 1 and ``1/2 + 2|x|`` for x < -1. It still at most
    halves, and grows by at most about twice what a plain average would.

    Args:
        params: a model, which is then watched (training forwards draw, `sensitivities()` works), or anything that
            torch.optim takes.
        lr: learning rate, 0.1 to 0.2 for small and medium networks.
        ess: effective sample size λ, the width of the draws: the number of training examples. More makes them narrower
            than the posterior, as large networks train with; then give num_data too. The noise of ĥ grows with √ess, so
            little is learned of h, see `diagnostics().hessian_noise`. `vlearn.VAdamW` has a rule for the width.
        hess_init: h at the start, per example. Its remaining weight after t steps is β₂ᵗ, or what beta2_warmup says.
        beta1: momentum of the gradient.
        beta2: momentum of the Hessian; 1 - beta2 must be small, the estimate ĥ is noisy.
        weight_decay: wd = δ/N for a prior precision δ and N examples.
        prior: a posterior, whose mean m₀ and precision P₀ stand for 0 and N·wd, entry by entry; see
            `vlearn.optim.SharedOptions`.
        mc_samples: draws per `step(closure)`.
        hess_approx: ivon-opt's name for `curvature`: "price", or "gradsq" for "empirical".
        clip_radius: ξ, bound on each entry of the preconditioned gradient.
        sync: average gradients and statistics over all processes at `step()`, without a DDP wrapper.
        debias: divide the momentum by 1 - β₁ᵗ.
        rescale_lr: multiply lr by hess_init + wd, so that its scale does not depend on them; also where a prior stands
            for wd.
        curvature: "price" (above) or "empirical", ĥ = ess·mean ĝ², which is ess/B times too large for minibatches of B
            examples, so that the posterior ranks examples but refuses leave-one-out losses; default what hess_approx
            says.
        num_data: number of training examples N, the scale of posterior and sensitivities, whatever the draws'; default
            ess.
        generator: of the noise; default torch's global one. Of several processes each has its own noise, also if
            their generators are alike.
        foreach: multi-tensor operations; default wherever a block has several tensors.
        compiled: one kernel of torch.compile for each large tensor (on accelerators, of four million entries and
            more); the first step compiles it, for up to a minute, and later processes find it in torch's cache.
            Float32 noise is made in the kernel, from a key that `generator` gives: samples follow the same
            distribution but differ from those of compiled=False for the same seed. Tensors with a prior take the
            path of compiled=False.
        capturable: a step has no numbers of the host's, so that a CUDA graph can hold it, whole with forward and
            backward pass: the step is counted on the device, and a tensor lr there is read there. For it nonfinite must
            be "ignore", and beta2_warmup, compiled, shared_noise and sync are left out. Make one step before the
            capture, and register a generator of your own with the graph. The replays move weights and state, but
            nothing in Python: a `posterior()` that was read before one is not told that it is stale, and
            `sensitivities()` needs a pass outside the graph.
        nonfinite: "raise" FloatingPointError at a gradient that is not finite, "skip" the step and count it in
            `nonfinite_count`, or "ignore": do not look.
        shared_noise: all processes take one draw, that of rank 0's generator. It depends on seed, parameter and place
            of an entry alone, so that any number of processes, one too, make the same steps. Under
            DistributedDataParallel it supports clipping and GradScaler, which their own draws do not; but it is one
            draw instead of one per process. Sharded parameters (`fully_shard`, tensor parallelism) always share it.
        batch_norm: "refuse" rows of examples that meet in a BatchNorm in train mode, or take the batch's statistics as
            "constant", an approximation: see `watch`.
        beta2_warmup: t₀ in steps, at least 1: β₂ is min(beta2, 1 - 1/(t + t₀)) in step t, from 0, so that h is the mean
            of hess_init, with the weight of t₀ - 1 steps, and of all ĥ so far, and from step 1/(1 - beta2) - t₀ on
            their exponential average; see `vlearn.optim.SharedOptions`. None: β₂ is constant, as in ivon-opt.

    Raises:
        ValueError: if an argument breaks its rule.

    Examples:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = IVON(model, lr=0.1, ess=100)
        >>> loss = model(torch.ones(3, 2)).square().mean()
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.sensitivities().self_influence.shape
        torch.Size([3])
    """

    _takes_complex = True
    _takes_shards = True
    _takes_prior = True

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: str = "price",
        clip_radius: float = math.inf,
        sync: bool = False,
        debias: bool = True,
        rescale_lr: bool = True,
        *,
        curvature: str | None = None,
        prior: Gaussian | None = None,
        num_data: float | None = None,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
        compiled: bool = False,
        capturable: bool = False,
        nonfinite: str = "raise",
        shared_noise: bool = False,
        batch_norm: str = "refuse",
        beta2_warmup: float | None = None,
    ):
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "betas": (beta1, beta2),
            "beta2_warmup": beta2_warmup,
            "weight_decay": weight_decay,
            "prior": prior,
            "mc_samples": mc_samples,
            "curvature": curvature or _curvature_of(hess_approx),
            "clip_radius": clip_radius,
            "sync": sync,
            "debias": debias,
            "rescale_lr": rescale_lr,
            "num_data": num_data,
            "foreach": foreach,
            "compiled": compiled,
            "capturable": capturable,
            "nonfinite": nonfinite,
            "shared_noise": shared_noise,
        }
        super().__init__(params, defaults, generator, batch_norm)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As every optimizer's; a group may have ivon-opt's `hess_approx` in the place of `curvature`."""
        if isinstance(param_group, dict) and "hess_approx" in param_group:
            param_group = {**param_group, "curvature": _curvature_of(param_group["hess_approx"])}
        super().add_param_group(param_group)

    def _check_group(self, group: dict[str, Any]) -> None:
        clips = ("clip_radius", group["clip_radius"] > 0, "must be positive: inf does not clip")
        check(group, [*common_rules(group), clips, *_capturable_rules(group)])
        check_curvature("IVON", group["curvature"], ("price", "empirical"), "use VON, which has the others")

    def _new_structure(self, parameters: Parameters, processes: Processes) -> DiagonalStructure:
        return DiagonalStructure(parameters)

    def _new_curvature(self, structure: DiagonalStructure) -> PriceOrSquares:
        return PriceOrSquares()

    def _update_block(self, update: BlockUpdate) -> None:
        apply_ivon_step(self._structure, update)

    def _update_compiled(self, draw: Draw, block: SliceBlock, keep: bool) -> bool:
        (group, slices), structure = block, self._structure
        piece, gradient = slices[0], draw.gradient_of(slices[0].parameter)
        if len(slices) > 1 or gradient is None or self._parameters.has_prior(piece.parameter):
            return False
        state = (*structure.state_of(slices, "momentum"), *structure.state_of(slices, "hessian"))
        tensors = flat(piece.weights, piece.buffer, piece.of(gradient), *state)
        if tensors is None:
            return False
        if measures_noise(group, slices, self._parameters):
            statistic = (tensors[0] - tensors[1]).mul_(tensors[2])  # but for its sign
            add_noise(self._parameters, group, slices, [statistic], group["ess"])
        mean_in_weights, correction = piece.mean_in_weights, structure.count_step(group, piece)
        beta2 = beta2_of_step(group, int(self.state[piece.parameter]["step"]))
        settings = {**ivon_settings(group), "correction": correction, "beta2": beta2}
        settings["weight_decay"] = float(group["weight_decay"])
        kernel(ivon_kernel)(*tensors, mean_in_weights, keep, **settings)
        if keep:
            swap_in_means(slices)
        else:
            piece.mean_in_weights = True
        return True

    def _uncalibrated_reason(self) -> str | None:
        return off_scale(self.param_groups) or super()._uncalibrated_reason()


def _capturable_rules(group: Group) -> list[SettingRule]:
    """What a step without numbers of the host's leaves out."""
    if not group["capturable"]:
        return []
    return [
        ("nonfinite", group["nonfinite"] == "ignore", "must be 'ignore' with capturable=True: the host does not look"),
        ("beta2_warmup", group["beta2_warmup"] is None, "must be None with capturable=True: β₂ is constant"),
        ("compiled", not group["compiled"], "must be False with capturable=True: use torch.compile around the graph"),
        ("shared_noise", not group["shared_noise"], "must be False with capturable=True: the host makes its seed"),
        ("sync", not group["sync"], "must be False with capturable=True: the host compares the processes"),
    ]


def _curvature_of(hess_approx: str) -> str:
    """The curvature by the name that ivon-opt has for it."""
    if hess_approx not in _HESS_APPROX:
        raise ValueError(f"hess_approx={hess_approx!r}, but it must be 'price' or 'gradsq': use 'price'.")
    return _HESS_APPROX[hess_approx]
