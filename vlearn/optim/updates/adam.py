"""AdamW's step, whose second moments of the gradient are the shape of the curvature: h = c·v̂, c from Price's theorem.

Kingma, Ba, 2015, arXiv:1412.6980; Loshchilov, Hutter, 2019, arXiv:1711.05101; Khan et al., 2018, arXiv:1806.04854.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlearn._wide import wide_dtype, widened
from vlearn.optim.distributed.shards import sum_over
from vlearn.optim.kernels.multi_tensor import in_memory_order, read
from vlearn.optim.parameters.parameters import Group
from vlearn.optim.structures.prior import Decay
from vlearn.optim.updates.curvature import NoiseTimesGradient

# Of the first draws in multiples of the weights, both as root mean squares. A guess that is too wide slows training (at
# 1e-3 a U-Net and a BERT ended 6 and 8% above AdamW's loss), one that is too narrow learns the scale later.
FIRST_WIDTH = 1e-4
MEMORY = 4.0  # of the scale in multiples of v's: the curvature's scale changes more slowly than its shape
RECENT = 0.1  # weight of one step in what is known of the noise
DOUBT = 3.0  # the scale is not let fall below its largest trusted value over this: negative curvature is not trusted


def rate_of_step(group: Group, step: int) -> float:
    """The weight (1 - β₂)/(1 - β₂ᵗ) of the last squared gradient in v̂, in a parameter's step t, from 1."""
    beta2 = float(group["beta2"])
    return 1.0 if step == 1 or beta2 == 0 else (1 - beta2) / -math.expm1(step * math.log(beta2))


def adam_step(
    means: list[Tensor],
    momenta: list[Tensor],
    hessians: list[Tensor],
    gradients: list[Tensor],
    *,
    scale: float,
    lr: float,
    beta1: float,
    rate: float,
    eps: float,
    decay: Decay,
    correction: float,
) -> None:
    """v̂ and g move, then m ← (1 - lr·λ)m - lr·(g/c₁)/(√v̂ + eps), all in place; what is kept of v̂ is h = c·v̂.

    With a prior in the place of λ, m ← m' - lr·w(m' - m₀)/(√v̂ + eps + lr·w) of the m' that λ = 0 gives: the minimum of
    ½w(m - m₀)² + ½(√v̂ + eps)(m - m')²/lr.

    Args:
        means: m, momenta: g, hessians: h, gradients: ĝ.
        scale: c.
        rate: weight of ĝ² in v̂, see `rate_of_step`.
        decay: λ, or w and m₀ of a prior.
        correction: c₁ = 1 - β₁ᵗ.
    """
    torch._foreach_mul_(hessians, 1 - rate)
    torch._foreach_addcmul_(hessians, gradients, gradients, value=rate * scale)
    torch._foreach_lerp_(momenta, gradients, 1 - beta1)
    roots = torch._foreach_sqrt(hessians)  # √c times too large, as is eps
    torch._foreach_add_(roots, eps * math.sqrt(scale))
    if not isinstance(decay.rate, list):
        torch._foreach_mul_(means, 1 - lr * decay.rate)
    torch._foreach_addcdiv_(means, momenta, roots, value=-lr * math.sqrt(scale) / correction)
    if isinstance(decay.rate, list):
        pulls = decay.pull(means, lr)
        torch._foreach_div_(roots, math.sqrt(scale))
        torch._foreach_add_(roots, torch._foreach_mul(decay.rate, lr))
        torch._foreach_addcdiv_(means, pulls, roots, value=-1)


class Scale(NamedTuple):
    """What is known of the scale c; plain numbers, as many before the first step: checkpoints keep them one by one.

    Attributes:
        scale: c; 0 while nothing is known.
        weighted: Σ w r, over steps whose estimates r of c have the weight w = 1/Var r. It is forgotten a quarter as
            fast as v.
        information: Σ w.
        trusted: the largest mean Σ w r/Σ w that was above three standard deviations, forgotten likewise.
        excess: by how much the gradients of recent steps exceeded v̂ in the sum that makes Var r; -1 before the first.
        reference: the least c since it last had doubled. Weights are large where c was small, so when it has doubled
            beyond doubt, what was learned before counts as one standard deviation: a first guess that was far too small
            is not believed for long.
    """

    scale: float = 0.0
    weighted: float = 0.0
    information: float = 0.0
    trusted: float = 0.0
    excess: float = -1.0
    reference: float = 0.0

    @classmethod
    def first(cls, squared_gradient: float, squared_weight: float, count: float) -> Scale:
        """A guess that makes the first draws narrow, which counts as one standard deviation; none without gradient.

        Args:
            squared_gradient, squared_weight: sums over all `count` entries.
        """
        if squared_gradient == 0:
            return cls()
        width = FIRST_WIDTH * math.sqrt(squared_weight / count or 1.0)
        scale = 1 / (width * math.sqrt(squared_gradient * count))
        return cls(scale, 0.0, scale**-2, reference=scale)

    @property
    def relative_error(self) -> float:
        """Standard deviation of c over c; 1 while nothing is known."""
        if not self.scale:
            return 1.0
        return self.information**-0.5 / self.scale

    def after(self, ratio: float, variance: float, excess: float, decay: float) -> Scale:
        """After one more step.

        A step's own gradient must not weigh its estimate: minibatches of large gradients have large curvatures.

        Args:
            ratio: the mean of H/h over the entries that it measured, H the true curvature.
            variance: that of ``ratio`` if squared gradients are v̂.
            excess: by how much this step's exceed that.
            decay: weight that earlier steps keep.
        """
        if self.excess < 0:
            return self._replace(excess=excess)
        # Beside the gradient's noise there is the product's own, Var δᵀHδ = 2 tr (HΣ)² ≤ 2 (tr HΣ)²
        weight = 1 / (self.scale**2 * (variance * self.excess + 2))
        weighted = decay * self.weighted + weight * self.scale * ratio
        information = decay * self.information + weight
        mean, error = weighted / information, information**-0.5
        trusted = max(decay * self.trusted, mean if mean > 3 * error else 0.0)
        scale = max(math.hypot(max(mean, 0.0), error), trusted / DOUBT)
        reference = min(self.reference, scale)
        if mean > max(2 * reference, 6 * error):
            information, reference = min(information, scale**-2), scale
            weighted = information * mean
        return Scale(scale, weighted, information, trusted, self.excess + RECENT * (excess - self.excess), reference)


def _sums(statistics: list[Tensor], *positive: list[Tensor]) -> Tensor:
    """The sum of all entries of each list, in float64 where there is one.

    Args:
        statistics: of any sign; positive: none of whose entries are negative.
    """
    if statistics[0].device.type == "cpu" or len(statistics) == 1:
        sums = [torch.stack([t.sum() for t in tensors]) for tensors in (statistics, *positive)]
        return widened(torch.stack(sums)).sum(1)
    # No multi-tensor operation adds up entries, but there is one for their sizes.
    wide = wide_dtype(statistics[0].device)
    total = torch.cat([in_memory_order(t) for t in statistics]).sum(dtype=wide)
    sizes = torch.stack([size for tensors in positive for size in torch._foreach_norm(tensors, 1)])
    return torch.cat([total.view(1), sizes.view(len(positive), -1).sum(1, dtype=wide)])


class ScaleEstimate(NoiseTimesGradient):
    """Price's theorem for one number: how large the curvature is on average, in multiples of the state's h.

    With δ = θ - m of variance 1/(ess·(h + wd)), E[ess·Σ δ∘∇ℓ̄(θ)] = Σ H/(h + wd), H the Hessian's diagonal; the same sum
    for H = h is the effective number of parameters n = Σ h/(h + wd). So their quotient is the mean of H/h.

    Attributes:
        product: ess·Σ δ∘∇ℓ̄ over the step's parameters.
        effective: n.
        noise: the variance of the product, Σ ess·∇ℓ̄²/(h + wd).
        expected: c times that if ∇ℓ̄² is v̂, Σ ess·h/(h + wd).
        squared_gradient, squared_weight, count: for the first step.
    """

    def __init__(self) -> None:
        self.start_step()

    def start_step(self) -> None:
        """Forget the sums of the last step."""
        self.product = self.effective = self.noise = self.expected = 0.0
        self.squared_gradient = self.squared_weight = 0.0
        self.count = 0.0
        self._taken: list[tuple[Tensor, float]] = []  # sums that have not been read, with their ess
        self._taken_first: list[tuple[Tensor, float]] = []  # likewise, with what they count

    def add_first(self, means: list[Tensor], gradients: list[Tensor], share: float) -> None:
        """Take what the first guess of the scale is made from.

        Args:
            share: what their sums count here, where other processes have the same entries.
        """
        for pair in zip(means, gradients, strict=True):
            self._taken_first.append((torch.stack([widened(t).square().sum() for t in pair]), share))
            self.count += share * pair[0].numel()

    def add(
        self,
        hessians: list[Tensor],
        gradients: list[Tensor],
        statistics: list[Tensor],
        ess: float,
        prior: float | list[Tensor],
        share: float,
    ) -> None:
        """Take some parameters: h that the draw was made with, ∇ℓ̄ and δ∘∇ℓ̄; their ess, and wd; share as before."""
        variances = torch._foreach_add(hessians, prior)
        torch._foreach_reciprocal_(variances)
        effective = torch._foreach_mul(variances, hessians)
        torch._foreach_mul_(variances, gradients)
        torch._foreach_mul_(variances, gradients)
        sums = _sums(statistics, list(effective), list(variances))
        self._taken.append((sums if share == 1 else sums.mul_(share), ess))

    def read(self) -> None:
        """Add up what has been taken, for which an accelerator is waited for once."""
        for (weight, gradient), (_, share) in zip(
            read([t for t, _ in self._taken_first]), self._taken_first, strict=True
        ):
            self.squared_weight += share * weight
            self.squared_gradient += share * gradient
        for (product, count, noise), (_, ess) in zip(read([t for t, _ in self._taken]), self._taken, strict=True):
            self.product += ess * product
            self.effective += count
            self.noise += ess * noise
            self.expected += ess * count
        self._taken, self._taken_first = [], []

    def sum_over(self, mesh: Any) -> None:
        """Add the sums of the other processes of a mesh, which have other parts of the parameters."""
        names = ("product", "effective", "noise", "expected", "squared_gradient", "squared_weight", "count")
        device = mesh.device_type
        own = torch.tensor([getattr(self, name) for name in names], dtype=wide_dtype(device), device=device)
        for name, total in zip(names, sum_over(mesh, own).tolist(), strict=True):
            setattr(self, name, total)

    def next(self, scale: Scale, beta2: float) -> Scale:
        """What is known of the scale after this step."""
        if not (self.effective > 0 and self.noise > 0 and math.isfinite(self.noise)):
            return scale  # no draw, or no gradient
        expected = self.expected / scale.scale
        decay = 1 - (1 - beta2) / MEMORY
        return scale.after(self.product / self.effective, expected / self.effective**2, self.noise / expected, decay)
