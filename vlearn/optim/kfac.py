"""KFACVON: noisy K-FAC, the variational online Newton method with Kronecker factors.

Zhang, Sun, Duvenaud, Grosse, 2018, "Noisy Natural Gradient as Variational Inference", arXiv:1712.02390; EK-FAC is
George et al., 2018, arXiv:1806.03884.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.capture.examples import sums_of_squares
from vlearn.capture.factors import CONVENTIONS, Layer, factor_sums, layers_of
from vlearn.optim.base import Part, VariationalOptimizer
from vlearn.optim.curvature import CurvatureProbe
from vlearn.optim.draw import Draw, Slot
from vlearn.optim.eigenbasis import carried, eigen, product, with_factored_damping
from vlearn.optim.exchange import averages, made_once
from vlearn.optim.groups import check
from vlearn.optim.kronecker import KroneckerState
from vlearn.optim.likelihood import Likelihood
from vlearn.optim.newton import NewtonStep, newton_rules
from vlearn.optim.watch import Watch
from vlearn.sensitivity.live import Selector

FISHERS = ("probe", "sampled", "empirical")
LARGEST = 2**13  # rows of a factor: it takes 256 MiB, and its decomposition a minute of a CPU


class KFACVON(CurvatureProbe, KroneckerState, NewtonStep, VariationalOptimizer):
    r"""A Gaussian with a Kronecker product for the precision of each layer: the curvature within it, not its diagonal.

    For a layer with weight M ``[O, I]``, its bias the last column, inputs a (1 appended), and gradients b of the output
    rows, with E[uᵢuᵢᵀ] = ∂²ℓᵢ/∂f² sent back from the model's output f:

        A ← running mean of a aᵀ = Q_A d_A Q_Aᵀ,  B ← running mean of b bᵀ = Q_B d_B Q_Bᵀ
        s = β₂ᵗ·hess_init + (1 - β₂ᵗ)·d_B d_Aᵀ
        θ = M + Q_B(E ∘ 1/√(ess·(s + wd)))Q_Aᵀ,  E standard normal
        g ← β₁g + (1 - β₁) mean ∇ℓ̄(θ)
        M ← M - lr·Q_B[Q_Bᵀ(g/(1 - β₁ᵗ) + wd·M)Q_A / (s + wd + damping)]Q_Aᵀ

    Running means start at their first value and weigh older ones by β₂. The posterior precision is
    num_data·Q(s + wd)Qᵀ, Q = Q_B ⊗ Q_A: the damping by wd is exact, and is the prior. Layers are linear layers,
    convolutions of one group and embeddings, also user-registered ones that are matrix products; a bias in another
    parameter group than its weight, layers with more than 8192 inputs or outputs, and all other parameters are
    diagonal, as in `VON`. Where positions share a weight, A takes the inputs of every `update_every`-th step alone.

    Args:
        params: a model, which is then watched; or anything that torch.optim takes, with `watch(model)` before the
            first step.
        lr: learning rate, 1e-2 for networks; 1 with beta1=0 is a Newton step.
        ess: effective sample size: the number of training examples.
        hess_init: s at the start, per example. Its remaining weight after t steps is β₂ᵗ.
        beta1: momentum of the gradient.
        beta2: momentum of the factors; 0.99 forgets hess_init in 500 steps.
        weight_decay: wd = δ/N for a prior precision δ and N examples.
        mc_samples: draws per `step(closure)`.
        sync: average gradients and factors over all processes at `step()`, without a DDP wrapper.
        debias: divide the momentum by 1 - β₁ᵗ.
        likelihood: what the loss is the negative logarithm of, see `VON`.
        fisher: where b comes from: "probe" (u = R z, RRᵀ = ∂²ℓ/∂f², z random signs), "sampled" (u the residual of
            labels sampled from the model) or "empirical" (the training gradients: no likelihood, and the less
            curvature the better the examples are fitted).
        kfac_approx: of positions that share a weight: "expand" takes them for independent, "reduce" for one, see
            `vlearn.capture.factors`.
        eigenvalue_correction: EK-FAC: s ← β₂s + (1 - β₂) mean (Q_BᵀG_nQ_A)², G_n the examples' own gradients from u.
        factored_damping: Zhang's and K-FAC's: s + wd is the product (d_B + √wd/π)(d_A + π√wd).
        update_every: steps from one eigendecomposition to the next.
        output: which of several outputs of the model the likelihood is of: a key, an index or a callable.
        damping: added to the preconditioner alone, never to the posterior.
        tempering: τ, the weight of the KL divergence in the objective (Zhang's λ): ess/τ and wd·τ stand for ess and wd.
        num_data: number of training examples N, the scale of sensitivities; default ess.
        generator: of the noise; default torch's global one.
        foreach: multi-tensor operations for diagonal parameters; default wherever a block has several tensors.
        shared_noise: all processes take one draw, that of rank 0's generator.
        nonfinite: "raise" FloatingPointError at a gradient that is not finite, "skip" the step and count it in
            `nonfinite_count`, or "ignore": do not look.

    Attributes:
        decomposition_failures: eigendecompositions that failed, where the last good basis stayed.

    Raises:
        ValueError: if an argument breaks its rule.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> optimizer = KFACVON(model, lr=0.01, ess=100)
        >>> loss = torch.nn.functional.cross_entropy(model(torch.ones(4, 2)), torch.tensor([0, 1, 2, 0]))
        >>> loss.backward()
        >>> optimizer.step()
        >>> optimizer.posterior().variance["weight"].shape
        torch.Size([3, 2])
    """

    _copied = (
        *CurvatureProbe._copied,
        "fisher",
        "kfac_approx",
        "eigenvalue_correction",
        "factored_damping",
        "decomposition_failures",
    )

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        sync: bool = False,
        debias: bool = True,
        *,
        likelihood: Likelihood = "categorical",
        fisher: str = "probe",
        kfac_approx: str = "expand",
        eigenvalue_correction: bool = False,
        factored_damping: bool = False,
        update_every: int = 10,
        output: Selector = None,
        damping: float = 0.0,
        tempering: float = 1.0,
        num_data: float | None = None,
        generator: torch.Generator | None = None,
        foreach: bool | None = None,
        shared_noise: bool = False,
        nonfinite: str = "raise",
    ):
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "betas": (beta1, beta2),
            "weight_decay": weight_decay,
            "mc_samples": mc_samples,
            "sync": sync,
            "debias": debias,
            "update_every": update_every,
            "damping": damping,
            "tempering": tempering,
            "num_data": num_data,
            "foreach": foreach,
            "shared_noise": shared_noise,
            "nonfinite": nonfinite,
        }
        if fisher not in FISHERS:
            raise ValueError(f"fisher={fisher!r}, but it must be 'probe', 'sampled' or 'empirical': use 'probe'.")
        if kfac_approx not in CONVENTIONS:
            raise ValueError(f"kfac_approx={kfac_approx!r}, but it must be 'expand' or 'reduce': use 'expand'.")
        if eigenvalue_correction and factored_damping:
            raise ValueError(
                "factored_damping=True with eigenvalue_correction=True, whose s is no product of factors: use one of "
                "them."
            )
        self.decomposition_failures = 0
        self.fisher, self.kfac_approx = fisher, kfac_approx
        self.eigenvalue_correction, self.factored_damping = eigenvalue_correction, factored_damping
        self._check_group(defaults)
        self._set_curvature(likelihood, "sampled" if fisher == "sampled" else "probe", output)
        super().__init__(params, defaults, generator)

    def _check_group(self, group: dict[str, Any]) -> None:
        whole = isinstance(group["update_every"], int) and group["update_every"] >= 1
        check(
            group,
            [
                *newton_rules(group),
                ("tempering", group["tempering"] > 0, "must be positive: use 1"),
                ("update_every", whole, "must be a positive whole number of steps: use 10"),
            ],
        )

    def _scales(self, group: dict[str, Any]) -> tuple[float, float]:
        return group["ess"] / group["tempering"], group["weight_decay"] * group["tempering"]

    def _needs_captures(self) -> bool:
        return True

    def _probes(self) -> bool:
        return self.fisher != "empirical"

    def _sums_over_examples(
        self, watch: Watch, wanted: Container[Tensor], weights: dict[Tensor, Tensor]
    ) -> dict[Any, Tensor]:
        probed = self._probes()
        trace, scale = (watch.probed_trace(), 1.0) if probed else (watch.checked_trace(), watch.scale)
        known = self._layer_of()
        new = {p for p in trace.tracked if p in wanted and p not in known and not bool(self.state[p]["step"])}
        layers = [layer for layer in self._layers() if any(p in wanted for p in layer.parameters)]
        layers += layers_of(trace, new, self._in_one_group, LARGEST) if new else []
        due = {layer for layer in layers if self._is_due(layer, self._updates_of(layer) + 1)}
        bases = {layer: self._basis(layer) for layer in layers if self.eigenvalue_correction and layer.weight in known}
        bases = {layer: basis for layer, basis in bases.items() if basis != (None, None)}  # its decomposition failed
        sums: dict[Any, Tensor] = dict(factor_sums(trace, layers, weights, self.kfac_approx, bases, due, scale))
        factored = {p for layer in layers for p in layer.parameters}
        alone = {p for p in trace.tracked if p in wanted and p not in factored}
        if alone:
            squares = sums_of_squares(trace, alone, weights)
            sums.update(squares if probed else {p: found * scale**2 for p, found in squares.items()})
        return sums

    def _in_one_group(self, weight: Tensor, bias: Tensor) -> bool:
        same = weight.dtype == bias.dtype and weight.device == bias.device and len(weight) == bias.numel()
        same = same and self._group_over([weight]) is self._group_over([bias])
        groups = [[any(p is q for q in group["params"]) for p in (weight, bias)] for group in self.param_groups]
        return same and [True, True] in groups

    def _statistic(
        self, draw: Draw, group: dict[str, Any], block: list[Slot], noise: list[Tensor], gradients: list[Tensor]
    ) -> list[Tensor]:
        """ĥ of the diagonal parameters; nothing of the others, whose statistics are joint."""
        layer_of = self._layer_of()
        alone = [slot for slot in block if slot.parameter not in layer_of]
        found = dict(zip(alone, super()._statistic(draw, group, alone, noise, gradients), strict=True))
        return [
            found[slot] if slot in found else gradient.new_zeros(()).expand_as(gradient)
            for slot, gradient in zip(block, gradients, strict=True)
        ]

    def _update_all(self, parts: Iterator[Part], joint: dict[Any, list[Tensor]]) -> None:
        statistics_of: dict[Layer, dict[str, Tensor]] = {}
        for (layer, name), statistic in self._averaged(joint).items():
            statistics_of.setdefault(layer, {})[name] = statistic
        for layer, found in statistics_of.items():
            if not any(p in self._layer_of() for p in layer.parameters):
                self._make_layer(layer, found["out_factor"], found["in_factor"])
        layer_of = self._layer_of()
        gradients: dict[Tensor, list[tuple[Slot, Tensor]]] = {}
        for group, block, of_block, statistics in parts:
            for slot, gradient in zip(block, of_block, strict=True):
                if slot.parameter in layer_of:
                    gradients.setdefault(slot.parameter, []).append((slot, gradient))
            alone = [
                each for each in zip(block, of_block, statistics, strict=True) if each[0].parameter not in layer_of
            ]
            if alone:
                self._update(group, [s for s, _, _ in alone], [g for _, g, _ in alone], [h for _, _, h in alone])
        moving = [layer for layer in self._layers() if any(p in gradients for p in layer.parameters)]
        for layer in moving:
            self._learn(layer, gradients, statistics_of.get(layer, {}))
        self._decompose([layer for layer in moving if self._is_due(layer, self._updates_of(layer))])
        for layer in moving:
            with torch.autocast(layer.weight.device.type, enabled=False):
                self._move(layer, gradients)

    def _averaged(self, joint: dict[Any, list[Tensor]]) -> dict[tuple[Layer, str], Tensor]:
        """Over the step's draws, of all processes whose gradients are averaged."""
        every, found = self._every_parameter(), {}
        processes_of = {layer: self._group_over(layer.parameters) for layer, _ in joint}
        for processes in dict.fromkeys(self._group_over([p]) for p in every):
            of_these = {key: drawn for key, drawn in joint.items() if processes_of[key[0]] is processes}
            found |= averages(of_these, every, self._state_dtype, processes)
        return found

    def _updates_of(self, layer: Layer) -> int:
        return max(int(self.state[p]["step"]) for p in layer.parameters)

    def _is_due(self, layer: Layer, step: int) -> bool:
        """Whether a layer's eigenbasis is made anew in a step, counted from 1."""
        return (step - 1) % self._group_of(layer)["update_every"] == 0

    def _learn(
        self, layer: Layer, gradients: dict[Tensor, list[tuple[Slot, Tensor]]], statistics: dict[str, Tensor]
    ) -> None:
        """Running means of the gradient, of the factors, and of EK-FAC's squares.

        The first value of a factor counts whole, an older one β₂ times the next; a value stands for all steps since
        the last.
        """
        group, state = self._group_of(layer), self.state[layer.weight]
        beta1, beta2 = float(group["beta1"]), float(group["beta2"])
        for p in layer.parameters:
            for slot, gradient in gradients.get(p, ()):
                slot.of(self.state[p]["momentum"]).lerp_(gradient, 1 - beta1)
            if p in gradients:
                self.state[p]["step"] += 1
        if not statistics or beta2 == 1:
            return
        learned = state["learned"].mul_(beta2).add_(1 - beta2)
        rate = math.log(beta2) if beta2 > 0 else -math.inf
        for name, age in (("out_factor", state["out_age"]), ("in_factor", state["in_age"])):
            age += 1
            if name in statistics:
                share = (-torch.expm1(age * rate) / learned).clamp_max_(1)  # 1 - β₂ᵃᵍᵉ
                state[name].lerp_(statistics[name].to(state[name].dtype), share)
                age.zero_()
        if "squares" in statistics:
            state["hessian"].lerp_(statistics["squares"].to(state["hessian"].dtype), 1 - beta2)

    def _decompose(self, layers: list[Layer]) -> None:
        """New eigenbases, with s in them; a layer keeps its own if the decomposition fails."""
        learned = [layer for layer in layers if bool(self.state[layer.weight]["learned"])]
        by_processes: dict[Any, list[Layer]] = {}
        for layer in learned:
            by_processes.setdefault(self._group_over(layer.parameters), []).append(layer)
        for processes, those in by_processes.items():
            likes = [[tensor for _, tensor in self._in_eigenbasis(layer)] for layer in those]
            made = made_once([partial(self._decomposed, layer) for layer in those], likes, processes)
            for layer, found in zip(those, made, strict=True):
                if found is None:
                    self.decomposition_failures += 1
                else:
                    names = [name for name, _ in self._in_eigenbasis(layer)]
                    self.state[layer.weight].update(zip(names, found, strict=True))

    def _in_eigenbasis(self, layer: Layer) -> list[tuple[str, Tensor]]:
        """What `_decomposed` gives of a layer, by its name in the state, and tensors of that shape."""
        state = self.state[layer.weight]
        factors = (("out_basis", state["out_factor"]), ("in_basis", state["in_factor"]))
        return [("hessian", state["hessian"]), *((name, factor) for name, factor in factors if factor.dim() == 2)]

    def _decomposed(self, layer: Layer) -> list[Tensor] | None:
        """s in a new eigenbasis, and that; None if the decomposition fails."""
        group, state, before = self._group_of(layer), self.state[layer.weight], self._basis(layer)
        with torch.autocast(layer.weight.device.type, enabled=False):
            rows, columns = eigen(state["out_factor"], before[0]), eigen(state["in_factor"], before[1])
            if rows is None or columns is None:
                return None
            after = (rows[1], columns[1])
            if self.eigenvalue_correction and any(basis is not None for basis in before):
                s = carried(state["hessian"], before, after)
            else:
                s = (
                    with_factored_damping(rows[0], columns[0], float(self._scales(group)[1]))
                    if self.factored_damping
                    else product(rows[0], columns[0])
                )
                s.mul_(state["learned"]).add_(group["hess_init"] * (1 - state["learned"]))
        return [s, *(basis for basis in after if basis is not None)]

    def _move(self, layer: Layer, gradients: dict[Tensor, list[tuple[Slot, Tensor]]]) -> None:
        """m ← m - lr·Q_B[(Q_Bᵀ(ĝ + wd·M)Q_A)/(s + wd + γ)]Q_Aᵀ; a parameter without a gradient stays."""
        group = self._group_of(layer)
        weight_decay = float(self._scales(group)[1])
        directions = []
        for p in layer.parameters:
            mean = self.state[p].get("mean", p.data)
            correction = 1 - group["beta1"] ** float(self.state[p]["step"]) if group["debias"] else 1.0
            directions.append(
                torch.add(self.state[p]["momentum"] / correction, mean, alpha=weight_decay)
                if p in gradients
                else torch.zeros_like(mean)
            )
        precision = self.state[layer.weight]["hessian"] + (weight_decay + float(group["damping"]))
        moves = self._block(layer, precision.reciprocal_()).multiply([d.unsqueeze(0) for d in directions])
        for p, move in zip(layer.parameters, moves, strict=True):
            if p in gradients:
                self.state[p].get("mean", p.data).sub_(move.squeeze(0), alpha=float(group["lr"]))
                self._round_means([slot for slot, _ in gradients[p]])
