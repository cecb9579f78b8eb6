"""The backward passes that hold the curvature of the loss at the weights, one batch at a time.

Each gives gradients G_n of examples whose sum of G_n G_nᵀ over the passes, weighed, is the curvature or has it as its
mean: with Λ_n = ∂²ℓ_n/∂f_n² and R_n R_nᵀ = Λ_n,

    ggn         G_n = J_nᵀ R_n z, z of random signs; the mean over `draws` passes is J_nᵀΛ_nJ_n on average
    ggn-exact   G_nc = J_nᵀ R_n e_c for each of the C outputs; their sum is J_nᵀΛ_nJ_n. Where Λ_n has negative
                eigenvalues it is R_n diag(±1) R_nᵀ, and the passes of the negative ones are taken away
    sampled     G_n = J_nᵀ ∂ℓ/∂f of labels that are sampled from the model; its mean is the Fisher matrix
    empirical   G_n = g_n, the gradients of the training labels
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from vlearn.linearized.linearization import Linearization
from vlearn.losses.likelihood import Likelihood, probe
from vlearn.losses.output_hessian import signed_root
from vlearn.losses.residual_checks import LossMakeup
from vlearn.per_example.recorded_pass import RecordedPass

CURVATURES = ("ggn", "ggn-exact", "sampled", "empirical")
LARGEST_EXACT = 256  # outputs of an example, each of which is a backward pass


@dataclass(frozen=True)
class CurvaturePasses:
    """Which passes hold the curvature.

    Attributes:
        curvature: one of `CURVATURES`.
        signed: whether passes may be taken away; else negative eigenvalues of Λ_n are left out, as "ggn" always does.
        draws: the number of random passes for each batch.
        likelihood: of "sampled" labels.
        generator: of the random numbers.
        clipped: for each batch, the number of examples of which negative eigenvalues were left out.
        curved: for each batch, whether the loss curves in the output of any example.
    """

    curvature: str
    signed: bool
    draws: int
    likelihood: Likelihood
    generator: torch.Generator | None
    clipped: list[int] = field(default_factory=list)
    curved: list[bool] = field(default_factory=list)

    @property
    def second_order(self) -> bool:
        """Whether the curvature of the loss is needed."""
        return self.curvature in ("ggn", "ggn-exact")

    def of(self, lin: Linearization) -> Iterator[tuple[RecordedPass, float]]:
        """(A pass, the weight of its products) of one batch.

        Raises:
            RuntimeError: if "ggn" is asked for and the loss has no second derivative.
            ValueError: if "ggn-exact" is asked for of too many outputs.
        """
        if self.curvature == "empirical":
            yield lin.backprop_residuals(last=True), 1.0
            return
        lin.check_one_output(f"curvature={self.curvature!r}")
        if self.curvature == "ggn-exact":
            size = lin.output[0].numel()
            if size > LARGEST_EXACT:
                raise ValueError(
                    f"curvature='ggn-exact' makes a backward pass for each of the {size} outputs: use 'ggn', which "
                    "makes draws=."
                )
            root, signs = signed_root(lin.hessian(), lin.output)
            self.curved.append(bool(root.any()))
            columns = [(column, 1.0) for column in (root * (signs > 0).unsqueeze(1)).unbind(2)]
            if self.signed:
                below = zip((root * (signs < 0).unsqueeze(1)).unbind(2), (signs < 0).any(0), strict=True)
                columns += [(column, -1.0) for column, has_any in below if bool(has_any)]
            else:
                self.clipped.append(int((signs < 0).any(1).sum()))
            for number, (column, weight) in enumerate(columns, 1):
                yield lin.backprop(column.reshape(lin.output.shape), last=number == len(columns)), weight
            return
        for draw in range(self.draws):
            yield lin.backprop(self._direction(lin), last=draw == self.draws - 1), 1 / self.draws

    def _direction(self, lin: Linearization) -> torch.Tensor:
        if self.curvature == "ggn":
            u, is_clipped = lin.probe(self.generator)
            self.clipped.append(int(is_clipped.sum()))
            self.curved.append(bool((u != 0).any() | is_clipped.any()))
            return u
        count, averaged = len(lin.loss), lin.losses.reduction != "sum"
        value = float(lin.loss.sum())
        makeup = LossMakeup(lambda rows: count / rows if averaged else 1.0, value=lambda: value)
        return probe(self.likelihood, "sampled", lin.output, lin.residual, makeup, self.generator)
