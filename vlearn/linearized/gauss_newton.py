"""The curvature of all training data, H = N/n Σ_i J_iᵀΛ_iJ_i + δ, by products with many vectors at once; H⁻¹g.

n is the number of examples that the loader gives, N the posterior's num_data: H is that of N times the mean over them.

A model of few outputs C takes C backward passes of a batch, whatever the number K of vectors: with b_nc the gradient of
output c with respect to a layer's output rows, and a_n its input,

    (J_n v_k)_c = Σ_layers ⟨b_nc, V_k a_n⟩,    Σ_n J_nᵀu_nk = Σ_n (Σ_c u_nck b_nc) a_nᵀ

are matrix products, of 4·K·P operations for each example and position. Where there are more outputs, each vector takes
a forward-mode and a backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from vlearn._wide import upcast
from vlearn.capture.layer_call import LayerCall
from vlearn.capture.pytrees import Selector
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.protocol import Posterior, check_posterior, match
from vlearn.linearized.batches import Batch
from vlearn.linearized.jacobian_products import hessian_vector_product, jacobian_vector_product, summed_gradient
from vlearn.linearized.linearization import Linearization, linearize
from vlearn.linearized.numbering import SamePasses
from vlearn.linearized.processes import Processes
from vlearn.linearized.solver import Solution, Vectors, solve, where
from vlearn.losses.example_loss import ExampleLoss
from vlearn.per_example.forms import FALLBACK_ENTRIES, chunks, form_of
from vlearn.per_example.gradients import dense_gradients
from vlearn.per_example.recorded_pass import RecordedPass
from vlearn.per_example.replay import as_recorded

FEW_OUTPUTS = 32  # entries of an example's output up to which each takes a backward pass of its own


class GaussNewton:
    """H = N·GGN + δ of the training data at the posterior mean; to be used where the model is at it.

    Args:
        model: in eval mode at the mean, see `at_mean`.
        posterior: Σ, which preconditions; its num_data is N, its prior precision δ.
        covariance: Σ keyed by the model's parameters.
        batches: gives the training data, the same each time it is called.
        losses: the training loss of each example.
        output: which of several outputs the loss is of, see `vlearn.sweep`.
        processes: that have the training data together.
        passes: sees that every pass has the same examples, those of the caller too; default one of its own.

    Raises:
        ValueError: if the prior precision is unknown, or the posterior is one of a network that has not been trained to
            the end.
    """

    def __init__(
        self,
        model: nn.Module,
        posterior: Posterior,
        covariance: Covariance,
        batches: Callable[[], Iterator[Batch]],
        losses: ExampleLoss,
        output: Selector = None,
        processes: Processes | None = None,
        passes: SamePasses | None = None,
    ):
        self._passes = SamePasses() if passes is None else passes
        self._processes = Processes(model, False, "product") if processes is None else processes
        self._model, self._covariance, self._batches = model, covariance, batches
        self._losses, self._output = losses, output
        self._num_data = posterior.num_data
        self.check(posterior)
        named: dict[str, Tensor] = dict(match(model, posterior))
        joint: Posterior | None = getattr(posterior, "prior", None)
        self._joint_prior = None if joint is None else joint.covariance(named)
        known = getattr(posterior, "prior_precision", {})
        self._prior: dict[Tensor, float | Tensor] = {p: known[name] for name, p in named.items() if name in known}
        self._parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p in covariance]

    @staticmethod
    def check(posterior: Posterior) -> None:
        """Raise ValueError if a posterior has no H of its own."""
        check_posterior(posterior)
        if getattr(posterior, "uncalibrated_draws", True):
            posterior.require_calibrated("prior for the curvature of the training data")
        training_time = getattr(posterior, "training_time", math.inf)
        if math.isfinite(training_time):
            raise ValueError(
                f"the posterior is that of a network that has trained for a time of {training_time:g}, whose "
                "response is not the inverse of its curvature: refine the posterior without the training time."
            )
        if getattr(posterior, "prior", None) is not None:
            return
        known = getattr(posterior, "prior_precision", {})
        for name in posterior.names:
            if name not in known or not bool((torch.as_tensor(known[name]) > 0).all()):
                has = "is unknown" if name not in known else f"is {known[name]}"
                raise ValueError(
                    f"the prior precision of {name!r} {has}, but the curvature of the training data needs a positive "
                    "one: give the posterior its prior_precision (an optimizer a weight_decay)."
                )

    def solve(
        self,
        g: Vectors,
        steps: int,
        tolerance: float | None = None,
        removed: Callable[[Vectors, Tensor], Vectors] | None = None,
    ) -> Solution:
        """H⁻¹ g by so many steps of conjugate gradients, each one pass through the training data.

        Where H is seen not to be positive definite, x is Σg.

        Args:
            g: right-hand sides, by parameter ``[K, *shape]``, those of no parameter count as zero.
            steps: the largest number of products with H.
            tolerance: at which a system is left as it is, see `solve`; default that of its dtype.
            removed: (v, active ``[K]``) -> K v of a curvature that is taken away from H.
        """
        like = next(iter(g.values()))
        # H moves also what the right-hand sides do not reach.
        g = {p: g[p] if p in g else like.new_zeros(len(like), *p.shape) for p in self._parameters}

        def apply(v: Vectors, _: Vectors, active: Tensor) -> Vectors:
            product = self.multiply(v, active)
            taken = {} if removed is None else removed(v, active)
            return {p: h - taken[p] if p in taken else h for p, h in product.items()}

        smallest = 10 * torch.finfo(like.dtype).eps if tolerance is None else tolerance
        agreed = self._processes.of_first
        solution = solve(self._covariance.multiply_only, apply, g, smallest, steps, agreed)
        first_order = self._covariance.multiply_only(g)
        return solution._replace(x=where(solution.indefinite, first_order, solution.x))

    def multiply(self, vectors: Vectors, active: Tensor) -> Vectors:
        """H v of the active vectors, 0 of the others."""
        chosen = {p: v[active] for p, v in vectors.items()}
        total = {p: v.new_zeros(v.shape) for p, v in chosen.items()}  # contiguous, so that a matrix of it is a view
        count = 0
        for batch in self._batches():
            lin = linearize(self._model, self._covariance, batch, self._losses, self._output, second_order=True)
            count += len(batch.index)
            self._passes.add(batch.index, lin.loss)
            add = _add_by_output if _has_few_outputs(lin, int(active.sum())) else _add_by_vector
            add(lin, chosen, total)
            del lin  # its graph goes before the next batch comes

        def ended() -> int:
            self._passes.end()
            return count

        count = sum(self._processes.each(ended))
        total = self._processes.total(total)
        if not count:
            raise ValueError("the training loader gave no example: pass one that can be iterated again.")
        joint = {} if self._joint_prior is None else self._joint_prior.solve(chosen)
        products = {}
        for p, v in vectors.items():
            products[p] = torch.zeros_like(v)
            prior = joint[p] if p in joint else self._prior[p] * chosen[p]
            products[p][active] = total[p] * (self._num_data / count) + prior
        return products


def check_steps(name: str, steps: int) -> None:
    """Raises ValueError unless it is a number of steps, 0 for none."""
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
        raise ValueError(f"{name}={steps!r}, but it must be a number of steps: use 20.")


def _has_few_outputs(lin: Linearization, vectors: int) -> bool:
    """Whether a backward pass for each output costs less than a forward-mode and a backward pass for each vector."""
    return len(lin.outputs) == 1 and lin.output[0].numel() <= min(FEW_OUTPUTS, 4 * vectors)


def _add_by_vector(lin: Linearization, vectors: Vectors, total: Vectors) -> None:
    """Add Σ_n J_nᵀΛ_nJ_n v, one vector after the other."""
    lin.check_curvature()
    for k in range(len(next(iter(vectors.values())))):
        change = jacobian_vector_product(lin, {p: v[k] for p, v in vectors.items()})
        for p, g in summed_gradient(lin, hessian_vector_product(lin, change)).items():
            total[p][k] += g


def _add_by_output(lin: Linearization, vectors: Vectors, total: Vectors) -> None:
    """Add Σ_n J_nᵀΛ_nJ_n v of all vectors at once, from the gradients of each output."""
    hessian = lin.hessian()  # [N, C, C]
    unit = torch.eye(hessian.shape[1], dtype=lin.output.dtype, device=hessian.device)
    rows = [lin.backprop(row.expand(len(hessian), -1).reshape(lin.output.shape)) for row in unit]
    parts = _parts(rows, vectors)
    vectors = {p: upcast(v.to(p.dtype)).contiguous() for p, v in vectors.items()}  # as the forms have them
    entries = sum(part.entries(len(unit), vectors) for part in parts)
    with as_recorded(lin.trace):
        for examples in chunks(len(hessian), entries, FALLBACK_ENTRIES):
            formed = [part.of(examples) for part in parts]
            change = torch.stack([jacobian.times(vectors) for jacobian in formed]).sum(0)  # [n, C, K]
            curved = hessian[examples].to(change.dtype) @ change
            for jacobian in formed:
                jacobian.add_transposed(curved, total)


class _Jacobian(Protocol):
    """What some parameters add to the Jacobian of n examples."""

    def times(self, vectors: Vectors) -> Tensor:
        """J v ``[n, C, K]``."""
        ...

    def add_transposed(self, u: Tensor, total: Vectors) -> None:
        """Add Σ_n J_nᵀu_n of u ``[n, C, K]``."""
        ...


@dataclass(frozen=True)
class _Rows:
    """The part of a matrix that acts on rows, in one call: a ``[n, G, T, I]``, b ``[n, C, G, T, O]``."""

    p: Tensor
    a: Tensor
    b: Tensor
    transposed: bool

    def times(self, vectors: Vectors) -> Tensor:
        """See `_Jacobian`."""
        v = self._matrices(vectors[self.p])  # [K, G, O, I]
        n, c = self.b.shape[:2]
        total = v.new_zeros(n, c, len(v))
        for g in range(v.shape[1]):
            moved = self.a[:, g] @ v[:, g].permute(2, 1, 0).flatten(1)  # [n, T, O·K]
            total += self.b[:, :, g].flatten(2) @ moved.reshape(n, -1, len(v))
        return total

    def add_transposed(self, u: Tensor, total: Vectors) -> None:
        """See `_Jacobian`."""
        into = self._matrices(total[self.p])  # a view
        k, groups, o, i = into.shape
        for g in range(groups):
            weighted = self.b[:, :, g].flatten(2).mT @ u  # [n, T·O, K]
            product = weighted.reshape(-1, o * k).mT @ self.a[:, g].reshape(-1, i)  # [O·K, I]
            into[:, g] += product.reshape(o, k, i).transpose(0, 1)

    def _matrices(self, tensor: Tensor) -> Tensor:
        """``[K, *shape]``, contiguous, as ``[K, G, O, I]``, a view."""
        groups, i, o = self.a.shape[1], self.a.shape[3], self.b.shape[4]
        split = tensor.view(len(tensor), groups, *((i, o) if self.transposed else (o, i)))
        return split.mT if self.transposed else split


@dataclass(frozen=True)
class _Formed:
    """The part of parameters whose gradients are formed: by parameter ``[n, C, P]``."""

    gradients: dict[Tensor, Tensor]

    def times(self, vectors: Vectors) -> Tensor:
        """See `_Jacobian`."""
        return torch.stack(
            [rows @ vectors[p].reshape(len(vectors[p]), -1).mT for p, rows in self.gradients.items()]
        ).sum(0)

    def add_transposed(self, u: Tensor, total: Vectors) -> None:
        """See `_Jacobian`."""
        for p, rows in self.gradients.items():
            products = u.flatten(0, 1).mT @ rows.flatten(0, 1)  # [K, P]
            total[p] += products.reshape(total[p].shape)


@dataclass(frozen=True)
class _MatrixCall:
    """A parameter that acts on rows, in one call, of which each pass has the gradient of one output."""

    p: Tensor
    calls: list[LayerCall]

    def entries(self, outputs: int, vectors: Vectors) -> int:
        """Entries per example that the products work on."""
        a, b = self.of(slice(0, 1)).a, self.calls[0].cotangents[0]
        assert b is not None
        return a.numel() + (outputs + 2 * len(vectors[self.p])) * b[:1].numel()

    def of(self, examples: slice) -> _Rows:
        """The part of some of the examples."""
        forms = [form_of(call, self.p, examples).as_outer() for call in self.calls]
        first = forms[0]
        assert first is not None
        b = torch.stack([form.b for form in forms if form is not None], 1)
        return _Rows(self.p, first.a, b, first.transposed)


@dataclass(frozen=True)
class _FormedParameters:
    """Parameters of any other kind, of which each pass has the gradient of one output."""

    calls_of: list[dict[Tensor, list[LayerCall]]]
    rows: list[RecordedPass]

    def entries(self, outputs: int, vectors: Vectors) -> int:
        """Entries per example that the products work on."""
        return outputs * sum(p.numel() for p in self.calls_of[0])

    def of(self, examples: slice) -> _Formed:
        """The part of some of the examples."""
        pairs = zip(self.rows, self.calls_of, strict=True)
        gradients = [dense_gradients(recorded, calls_of, examples) for recorded, calls_of in pairs]
        return _Formed(
            {p: torch.stack([each[p].reshape(len(each[p]), -1) for each in gradients], 1) for p in gradients[0]}
        )


def _parts(rows: list[RecordedPass], vectors: Vectors) -> list[_MatrixCall | _FormedParameters]:
    calls_of = [recorded.calls_of(vectors) for recorded in rows]
    matrices = [p for p, calls in calls_of[0].items() if all(call.rule and _is_matrix(call, p) for call in calls)]
    parts: list[_MatrixCall | _FormedParameters] = [
        _MatrixCall(p, list(of_outputs)) for p in matrices for of_outputs in zip(*(c[p] for c in calls_of), strict=True)
    ]
    others = [{p: calls for p, calls in each.items() if p not in set(matrices)} for each in calls_of]
    return [*parts, _FormedParameters(others, rows)] if others[0] else parts


def _is_matrix(call: LayerCall, p: Tensor) -> bool:
    return form_of(call, p, slice(0, 1)).kind in ("matrix", "transposed")
