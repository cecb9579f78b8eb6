"""Ground truth: the maximum a posteriori estimate, and the same again without one example, to convergence.

The objective is Σ_i ℓ(y_i, f_i(θ)) + δ‖θ‖²/2 in float64; δ stays as it is when an example goes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

TOLERANCE = 1e-5  # largest entry of the whitened gradient: what is left to gain is its squared norm / 2
EVALUATIONS = 400  # of objective and gradient, before the preconditioner is made anew
RESTARTS = 5

Objective = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Minimum:
    """Where L-BFGS stopped: ``[P]`` weights, and the largest entry of the whitened gradient there."""

    weights: Tensor
    gradient: float

    @property
    def converged(self) -> bool:
        return self.gradient <= TOLERANCE


class Retraining:
    """Trains a classifier to convergence, with and without an example.

    L-BFGS runs in coordinates in which the Gauss-Newton matrix at its start is the identity; that makes it
    quick and changes no minimum.

    Args:
        model: gives the architecture.
        x: ``[N, ...]`` inputs.
        y: ``[N]`` class numbers.
        prior_precision: δ, on the scale of the summed loss.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, prior_precision: float):
        self.model = copy.deepcopy(model).double().eval()
        self.x, self.y, self.prior_precision = x.double(), y, prior_precision
        self._shapes = {name: p.shape for name, p in self.model.named_parameters()}

    def from_weights_of(self, model: nn.Module) -> Minimum:
        """The minimum with all examples that is reached from a model's weights."""
        weights = torch.cat([p.detach().flatten() for p in model.parameters()]).double()
        return self._minimize(weights, self._whitener(weights), slice(None))

    def without(self, examples: Sequence[int], start: Minimum, workers: int = 1) -> Iterator[Minimum]:
        """The minimum without each of the examples in turn, reached from the one with all of them."""
        whitener = self._whitener(start.weights)

        def retrain(example: int) -> Minimum:
            return self._minimize(start.weights, whitener, torch.arange(len(self.y)) != example)

        with ThreadPoolExecutor(workers) as pool:
            tasks = [pool.submit(retrain, int(example)) for example in examples]
            try:
                for task in tasks:
                    yield task.result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def own_loss_changes(
        self, examples: Sequence[int], start: Minimum, workers: int = 1
    ) -> Iterator[tuple[float, bool]]:
        """Increase in nats of each example's own loss when it alone is removed, and whether its refit converged."""
        for example, refit in zip(examples, self.without(examples, start, workers), strict=True):
            yield self.loss(refit, example) - self.loss(start, example), refit.converged

    @torch.no_grad()
    def outputs(self, minimum: Minimum, examples: slice | Tensor) -> Tensor:
        """``[K, C]`` outputs of some examples."""
        return functional_call(self.model, self._by_name(minimum.weights), (self.x[examples],))

    def loss(self, minimum: Minimum, example: int) -> float:
        """An example's own loss in nats."""
        own = slice(example, example + 1)
        return float(F.cross_entropy(self.outputs(minimum, own), self.y[own]))

    def model_at(self, minimum: Minimum) -> nn.Module:
        """A float64 model with these weights."""
        model = copy.deepcopy(self.model)
        nn.utils.vector_to_parameters(minimum.weights, model.parameters())
        return model

    def _objective(self, examples: slice | Tensor) -> Objective:
        x, y = self.x[examples], self.y[examples]
        model = copy.deepcopy(self.model)  # functional_call swaps parameters: one model to a thread

        def objective(weights: Tensor) -> Tensor:
            output = functional_call(model, self._by_name(weights), (x,))
            return F.cross_entropy(output, y, reduction="sum") + 0.5 * self.prior_precision * weights @ weights

        return objective

    def _minimize(self, start: Tensor, whitener: Tensor, examples: slice | Tensor) -> Minimum:
        objective = self._objective(examples)
        for restart in range(RESTARTS):
            if restart > 0:  # the curvature has changed on the way
                whitener = self._whitener(start)
            start, gradient = _lbfgs(objective, start, whitener)
            if gradient <= TOLERANCE:
                break
        return Minimum(start, gradient)

    def _whitener(self, weights: Tensor) -> Tensor:
        """L⁻¹ ``[P, P]`` with LLᵀ = Σ_i J_iᵀΛ_iJ_i + δI."""

        def output(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(self.model, parameters, (x[None],))[0]

        parameters = self._by_name(weights)
        precision = self.prior_precision * torch.eye(len(weights), dtype=torch.float64)
        for x in self.x.split(250):
            jacobian = vmap(jacrev(output), (None, 0))(parameters, x)
            jacobian = torch.cat([part.flatten(2) for part in jacobian.values()], 2)  # [n, C, P]
            p = functional_call(self.model, parameters, (x,)).softmax(1).detach()
            # Λ = diag p - p pᵀ = R Rᵀ
            root = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
            rows = (root.mT @ jacobian).flatten(0, 1)
            precision += rows.mT @ rows
        return torch.linalg.inv(torch.linalg.cholesky(precision))

    def _by_name(self, weights: Tensor) -> dict[str, Tensor]:
        parts = weights.split([shape.numel() for shape in self._shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)}


def _lbfgs(objective: Objective, start: Tensor, whitener: Tensor) -> tuple[Tensor, float]:
    """Minimize over z, θ = start + L⁻ᵀz; returns θ and the largest entry of the gradient."""
    z = torch.zeros_like(start, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [z],
        max_iter=EVALUATIONS,
        max_eval=EVALUATIONS,
        tolerance_grad=TOLERANCE,
        tolerance_change=0.0,
        history_size=100,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(start + whitener.mT @ z)
        value.backward()
        return value

    optimizer.step(closure)
    closure()
    assert z.grad is not None
    return (start + whitener.mT @ z).detach(), float(z.grad.abs().max())
