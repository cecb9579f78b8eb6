"""Leaving out a group of examples: what the model would lose on them if it had never seen any."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlearn._short_repr import ShortRepr
from vlearn.capture.pytrees import Selector, shapes
from vlearn.gaussians.covariance import Covariance
from vlearn.gaussians.protocol import Posterior, check_posterior
from vlearn.layers.example_axes import Axes
from vlearn.linearized.batches import Batch, batches, with_progress_bar
from vlearn.linearized.gauss_newton import GaussNewton, check_steps
from vlearn.linearized.jacobian_products import hessian_vector_product, jacobian_vector_product, summed_gradient
from vlearn.linearized.linearization import Linearization, at_mean, linearize, part_of_batch
from vlearn.linearized.loss_checks import FEW
from vlearn.linearized.numbering import SamePasses
from vlearn.linearized.processes import Processes, whole_network
from vlearn.linearized.solver import Vectors, solve, where
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.per_example.measured_rows import ExampleIndex
from vlearn.sensitivity.group_batches import Membership, batches_by_group
from vlearn.sensitivity.refined import check_threshold
from vlearn.sensitivity.table import not_kept

VECTOR_ENTRIES = 2**28  # entries of the vectors in parameter space that are held at once, 1 GiB of float32

Curve = Callable[[Vectors, Tensor], Vectors]  # (v, active ``[K]``) -> J_Mᵀ Λ_M J_M v


@dataclass(frozen=True, repr=False)
class GroupTable(ShortRepr):
    """One row per group, on the CPU (Nickl et al., 2023, arXiv:2310.19273).

    Attributes:
        group: name of each of the K groups.
        size: ``[K]`` its number of examples |M|.
        loss: ``[K]`` their mean loss, in the loss's units.
        left_out_loss: ``[K]`` the same at the outputs predicted without the group, mean ℓ(y_i, f_i + Δf_i).
        index: numbers of each group's examples.
        deviation: Δf ``[|M|, ...]`` of each group, in the order of `index`; ``[|M|, 1]`` of NaN where its batches are
            padded to different lengths.
        converged: ``[K]`` whether conjugate gradients did; None unless refined or with `refine`.
        iterations: ``[K]`` their number; None likewise.
        largest_eigenvalue: ``[K]`` of VΛ over the group, an estimate from below: the refined form is at most
            1/(1 - this) times as long as the first order; None unless refined, and with `refine`.
        used_first_order: ``[K]`` where the first order was kept; None unless refined or with `refine`.
        residual: ``[K]`` with `refine`, √(rᵀΣr) of what is left of the right-hand side, relative; NaN where the
            first order was kept; else None.
    """

    group: list[Any]
    size: Tensor
    loss: Tensor
    left_out_loss: Tensor
    index: list[Tensor]
    deviation: list[Tensor]
    converged: Tensor | None = None
    iterations: Tensor | None = None
    largest_eigenvalue: Tensor | None = None
    used_first_order: Tensor | None = None
    residual: Tensor | None = None

    @property
    def num_first_order(self) -> int | None:
        """For how many groups the refined form was not to be had; None unless it was asked for."""
        return None if self.used_first_order is None else int(self.used_first_order.sum())

    def __len__(self) -> int:
        return len(self.group)


@torch.inference_mode(False)
@torch.no_grad()
def leave_group_out(
    model: nn.Module,
    posterior: Posterior,
    loader: Iterable[Any],
    groups: Tensor | Sequence[int] | Mapping[Any, Sequence[int] | Tensor],
    loss_fn: LossFunction,
    *,
    refined: bool = False,
    threshold: float = 0.95,
    tolerance: float = 1e-4,
    max_iterations: int = 100,
    refine: int = 0,
    output: Selector = None,
    progress: bool | None = None,
    example_index: ExampleIndex | None = None,
    sync: bool = False,
) -> GroupTable:
    """Loss of each group's examples by a model that was trained without the group, without training it.

        Δf_M = J_M Σ J_Mᵀ e_M  (Eq. 14, with every example's effect on every other)

    The loader is gone through twice, and once more for each iteration of `refined`; each pass takes a forward and a
    backward or forward-mode pass of every example. Memory: a few vectors of the parameters' size per group.

    Args:
        model: the network that was trained; run in eval mode, left as it was.
        posterior: Σ over its parameters, summed over num_data; parameters it does not have do not move. A copy of the
            model that it was learned by is matched by names, at weights of its own, see `vlearn.posterior.load`.
        loader: yields batches as for `vlearn.sweep`, with all examples of every group, as often as it is iterated.
        groups: ``[N]`` the group of example 0, 1, ... by its number, for instance its label: a whole number or any
            name; or a mapping from names to the numbers of their examples, or to masks ``[N]``.
        loss_fn: the training loss, as for `vlearn.sweep`.
        refined: Δf_M = (I - V_MΛ_M)⁻¹ V_M e_M, exact for linear regression, instead of its first order, which is short
            by several times for a whole class; by conjugate gradients on S - J_MᵀΛ_MJ_M. For a Σ that is the inverse
            of Σ JᵀΛJ and a prior at these very weights; others may not leave S - J_MᵀΛ_MJ_M positive definite.
        threshold: groups whose largest eigenvalue of V_MΛ_M is seen to reach it keep the first order.
        tolerance: of the conjugate gradients, relative.
        max_iterations: of the conjugate gradients; what they have by then is taken, and `converged` tells.
        refine: take H⁻¹ in the place of Σ, by at most so many steps of conjugate gradients that Σ preconditions, each
            of which goes through the loader; H = N·GGN + δ is the curvature of the loader's examples, which must be the
            training data: N times their mean, with the posterior's num_data and prior precision. With `refined`,
            H - J_MᵀΛ_MJ_M in the place of H. The deviations and leave-one-out losses of a few examples come from groups
            of one, ``{i: [i] for i in few}``. It needs a Σ without training time.
        output: which of several outputs `deviation` speaks of.
        progress: show a progress bar; default where standard error is a terminal and tqdm is installed.
        example_index: which example each row of concatenated inputs is of, as for `vlearn.sweep`. Each group then takes
            a pass of every whole batch that has some of its examples.
        sync: the examples are those of all processes of torch.distributed, where the loader of each gives its own
            share, as by an `UnrepeatedDistributedSampler`; a group may have members in several. All must call it with
            the same groups, and all get the same table, each group's examples in the order of their numbers. What is
            summed over the processes are the vectors of the parameters' size, once for each pass. Some may have fewer
            batches, or none. Without it, a group has the examples that this process's own loader gives.
    Returns:
        One row per group.
    Raises:
        TypeError: if an argument is of another kind, as an optimizer in place of its posterior.
        ValueError: if an argument breaks its rule, the posterior belongs to another model, the loader lacks examples
            of a group, `refine` does not know the prior, or the processes differ in more than their data.
        RuntimeError: if the examples of a batch have no gradient of their own, or it failed in another process.
    """
    model, posterior = whole_network(model, posterior)
    processes = Processes(model, sync, "leave_group_out")
    model = processes.model
    progress = progress if progress is not None or processes.rank == 0 else False
    axes_of: dict[Any, Axes] = {}  # by the shapes of a batch
    given_groups: list[Membership] = []

    def settings() -> dict[str, Any]:
        _check(threshold, tolerance, max_iterations, refine)
        check_posterior(posterior)
        if refine:
            GaussNewton.check(posterior)
        posterior.require_calibrated("loss without a group")
        given_groups.append(Membership(groups))
        return {"refined": refined, "threshold": threshold, "tolerance": tolerance, "refine": refine} | {
            "max_iterations": max_iterations,
            "groups": given_groups[0].digest() if processes.group is not None else None,
        }

    def table(stack: ExitStack) -> GroupTable:
        (members,), losses = given_groups, ExampleLoss(loss_fn)
        covariance = stack.enter_context(at_mean(model, posterior))
        processes.check_posterior(covariance)

        def whole(batch: Batch) -> Batch:
            """A batch of the loader, seen to be one of examples: in groups of one nobody sees others."""
            kind = shapes((batch.args, batch.kwargs, batch.target))
            if kind not in axes_of:
                lin = linearize(model, covariance, batch, losses, output)
                lin.self_influence_and_deviation(False, last=True)
                axes_of[kind] = lin.trace.input_axes
                if not batch.example_rows and len(batch.index) > 1:
                    last = torch.arange(len(batch.index), device="cpu")[1:][-FEW:]
                    part = replace(batch, input_axes=axes_of[kind]).rows(last)
                    with part_of_batch():
                        lin.check_part(linearize(model, covariance, part, losses, output), last)
            return replace(batch, input_axes=axes_of[kind])

        passes = [SamePasses() for _ in members.names]  # of each group

        def visit(second_order: bool = False, only: Tensor | None = None) -> Iterator[tuple[int, Linearization]]:
            """Every group's examples of this process, in batches; at the end all have visited theirs."""
            seen = members.count()
            given = batches(loader, model, example_index)
            given = with_progress_bar(given, loader, progress, "leave_group_out")
            for k, batch in batches_by_group(map(whole, given), seen, only):
                lin = linearize(model, covariance, batch, losses, output, second_order)
                passes[k].add(lin.batch.index, lin.loss)
                yield k, lin
            seen.check(processes)
            chosen = range(len(passes)) if only is None else only.nonzero().flatten().tolist()
            processes.each(lambda: [passes[k].end() for k in chosen])

        parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p in covariance]
        gradients, loss = _gradients(visit, covariance, parameters, len(members), processes)
        curve = partial(_curve, visit, processes)
        if refine:
            training_data = partial(batches, loader, model, example_index)
            curvature = GaussNewton(model, posterior, covariance, training_data, losses, output, processes)
            step, facts = _near_exact(curve, curvature, gradients, refined, tolerance, refine)
        else:
            step, facts = covariance.multiply_only(gradients), {}
            if refined:
                agreed = processes.of_first
                step, facts = _refine(curve, covariance, gradients, step, threshold, tolerance, max_iterations, agreed)
        return _table(visit, members, step, loss, facts, processes)

    with processes.alike(settings), ExitStack() as stack:
        return processes.agreed(partial(table, stack))


def _gradients(
    visit: Any, covariance: Covariance, parameters: list[Tensor], count: int, processes: Processes
) -> tuple[Vectors, Tensor]:
    """(Σ_{i∈M} g_i of each group by parameter ``[K, *shape]``, the sums of their losses ``[K]``)."""
    entries = sum(p.numel() for p in parameters)
    if count * entries > VECTOR_ENTRIES:
        raise ValueError(
            f"{count} groups of a model with {entries} parameters, but {VECTOR_ENTRIES} entries are the limit of what "
            "is held at once: pass fewer groups in each call."
        )
    like = covariance.zeros(0)
    gradients = {p: torch.zeros(count, *p.shape, dtype=like.dtype, device=p.device) for p in parameters}
    loss = covariance.zeros(count).cpu().double()
    for k, lin in visit():
        loss[k] += lin.loss.sum().cpu().double()
        for p, g in summed_gradient(lin, lin.residuals, last=True).items():
            gradients[p][k] += g
    return processes.total(gradients), torch.stack(processes.each(lambda: loss)).sum(0)


def _refine(
    curve: Curve,
    covariance: Covariance,
    gradients: Vectors,
    first_order: Vectors,
    threshold: float,
    tolerance: float,
    max_iterations: int,
    agreed: Callable[[Tensor], Tensor],
) -> tuple[Vectors, dict[str, Tensor]]:
    def apply(v: Vectors, precise: Vectors, active: Tensor) -> Vectors:
        """(S - J_MᵀΛ_MJ_M) v."""
        curved = curve(v, active)
        return {p: s - curved[p] for p, s in precise.items()}

    solved = solve(covariance.multiply_only, apply, gradients, tolerance, max_iterations, agreed)
    largest = 1 - solved.smallest
    used_first_order = solved.indefinite | ~(largest < threshold)
    return where(used_first_order, first_order, solved.x), {
        "converged": solved.converged.cpu(),
        "iterations": solved.iterations.cpu(),
        "largest_eigenvalue": largest.cpu(),
        "used_first_order": used_first_order.cpu(),
    }


def _near_exact(
    curve: Curve,
    curvature: GaussNewton,
    gradients: Vectors,
    refined: bool,
    tolerance: float,
    steps: int,
) -> tuple[Vectors, dict[str, Tensor]]:
    """(H - J_MᵀΛ_MJ_M)⁻¹ g if refined, else H⁻¹ g; where the first is not positive definite, the second."""
    solved = curvature.solve(gradients, steps, tolerance, curve if refined else None)
    used_first_order, x = solved.indefinite, solved.x
    if bool(used_first_order.any()) and refined:
        first = curvature.solve({p: v[used_first_order] for p, v in gradients.items()}, steps, tolerance)
        for p, v in x.items():
            v[used_first_order] = first.x[p]
    return x, {
        "converged": solved.converged.cpu(),
        "iterations": solved.iterations.cpu(),
        "used_first_order": used_first_order.cpu(),
        "residual": torch.where(used_first_order, torch.nan, solved.residual).cpu(),
    }


def _curve(visit: Any, processes: Processes, vectors: Vectors, active: Tensor) -> Vectors:
    """J_Mᵀ Λ_M J_M v of each active group."""
    products = {p: torch.zeros_like(v) for p, v in vectors.items()}
    for k, lin in visit(second_order=True, only=active):
        change = jacobian_vector_product(lin, {p: v[k] for p, v in vectors.items()})
        for p, g in summed_gradient(lin, hessian_vector_product(lin, change), last=True).items():
            products[p][k] += g
    return processes.total(products)


def _table(
    visit: Any, members: Membership, step: Vectors, loss: Tensor, facts: dict[str, Tensor], processes: Processes
) -> GroupTable:
    left_out = torch.zeros_like(loss)
    index: list[list[Tensor]] = [[] for _ in members.names]
    deviation: list[list[Tensor]] = [[] for _ in members.names]
    for k, lin in visit():
        changes = jacobian_vector_product(lin, {p: v[k] for p, v in step.items()})
        left_out[k] += lin.loss_at(changes).sum().cpu().double()
        index[k].append(lin.batch.index)
        deviation[k].append(changes[lin.chosen].cpu())
    if processes.group is not None:
        told = processes.each(lambda: (left_out, index, deviation))
        left_out = torch.stack([each for each, _, _ in told]).sum(0)
        index = [[torch.cat(sum((each[k] for _, each, _ in told), []))] for k in range(len(members))]
        order = [numbers.argsort() for (numbers,) in index]
        index = [[numbers[places]] for (numbers,), places in zip(index, order, strict=True)]
        deviation = [[_joined(sum((each[k] for _, _, each in told), []))[places]] for k, places in enumerate(order)]
    return GroupTable(
        group=members.names,
        size=members.sizes,
        loss=loss / members.sizes,
        left_out_loss=left_out / members.sizes,
        index=[torch.cat(rows) for rows in index],
        deviation=[_joined(rows) for rows in deviation],
        **facts,
    )


def _joined(rows: list[Tensor]) -> Tensor:
    if len({row.shape[1:] for row in rows}) > 1:  # batches that are padded to different lengths
        rows = [not_kept(row) for row in rows]
    return torch.cat(rows)


def _check(threshold: float, tolerance: float, max_iterations: int, refine: int) -> None:
    check_steps("refine", refine)
    check_threshold(threshold)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance={tolerance}, but it must be in (0, 1): use 1e-4.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations={max_iterations}, but it must be positive: use 100.")
