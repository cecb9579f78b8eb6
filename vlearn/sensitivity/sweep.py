"""Sensitivities of a whole data set at the posterior mean, in eval mode: the published definition."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vlearn.capture.hooks import record
from vlearn.capture.tree import tensor_leaves
from vlearn.posterior.base import Posterior, match
from vlearn.posterior.covariance import Covariance
from vlearn.sensitivity.batches import Batch, batches
from vlearn.sensitivity.ghost import moved, output_deviation
from vlearn.sensitivity.live import Selector, as_output, prediction_error, select
from vlearn.sensitivity.losses import ExampleLoss, LossFunction, curvature, curvature_root


@dataclass(frozen=True)
class SensitivityTable:
    """One row per example, on the CPU, in loader order (Nickl et al., 2023, arXiv:2310.19273).

    Attributes:
        index: ``[N]`` example numbers.
        loss: ``[N]`` each example's own training loss, in the loss's units.
        loo_loss: ``[N]`` the same at the output predicted without the example, ℓ(y, f + Ve), Eq. 15; its mean
            predicts the test loss.
        deviation: ``[N, C]`` V e, first-order change of the output if the example were removed, Eq. 12.
        self_influence: ``[N]`` gᵀΣg, first-order increase of the example's own loss if it were removed.
        leverage: ``[N]`` tr(ΛV); None if not asked for.
        prediction_error: ``[N]`` ‖residual‖/√2.
    """

    index: Tensor
    loss: Tensor
    loo_loss: Tensor
    deviation: Tensor
    self_influence: Tensor
    leverage: Tensor | None
    prediction_error: Tensor

    def __len__(self) -> int:
        return len(self.index)


@torch.inference_mode(False)
@torch.no_grad()
def sweep(
    model: nn.Module,
    posterior: Posterior,
    loader: Iterable[Any],
    loss_fn: LossFunction,
    leverage: str | None = "probe",
    output: Selector = None,
    progress: bool | None = None,
    generator: torch.Generator | None = None,
) -> SensitivityTable:
    """Leave-one-out loss, deviation, self-influence and leverage of every example, without retraining.

        Δf_i = V_i e_i,  LOO_i = ℓ(y_i, f_i + V_i e_i),  V_i = J_i Σ J_iᵀ

    Each batch costs one forward, one backward without weight gradients, the ghost products and one
    forward-mode pass; the leverage one more backward and its products. Memory does not grow with the number of
    parameters times examples.

    Args:
        model: the network that was trained; run in eval mode, left as it was.
        posterior: Σ over its parameters, summed over num_data; parameters it does not have do not move.
        loader: yields (x, y) or (x, y, index); see `IndexedDataset`.
        loss_fn: the training loss, with a `reduction` argument, or a callable (output, target) -> ``[N]``.
        leverage: "probe" (one unbiased random probe per example), "exact" (one backward per output) or None.
        output: which of several outputs loss, deviation and leverage speak of; a callable loss_fn gets the
            whole output all the same.
        progress: show a progress bar; default where standard error is a terminal and tqdm is installed.
        generator: of the probe.
    Returns:
        One row per example.
    Raises:
        ValueError: if an argument breaks its rule, or the posterior belongs to another model.
        RuntimeError: if the examples of a batch have no gradient of their own.
    """
    if leverage not in ("probe", "exact", None):
        raise ValueError(f"leverage={leverage!r}, but it must be 'probe', 'exact' or None: use 'probe'.")
    parameters = match(model, posterior)
    losses = ExampleLoss(loss_fn)
    device = next(iter(parameters.values())).device
    rows: list[SensitivityTable] = []
    with posterior.at_mean(), _eval_mode(model):
        covariance = posterior.covariance(parameters)
        for batch in _shown(batches(loader, device), loader, progress):
            rows.append(_sweep_batch(model, covariance, batch, losses, leverage, output, generator))
    if not rows:
        raise ValueError("the loader gave no batch: pass one that can be iterated again.")

    def column(name: str) -> Tensor:
        return torch.cat([getattr(row, name) for row in rows])

    return SensitivityTable(
        column("index"),
        column("loss"),
        column("loo_loss"),
        column("deviation"),
        column("self_influence"),
        column("leverage") if leverage else None,
        column("prediction_error"),
    )


def _sweep_batch(
    model: nn.Module,
    covariance: Covariance,
    batch: Batch,
    losses: ExampleLoss,
    leverage: str | None,
    output: Selector,
    generator: torch.Generator | None,
) -> SensitivityTable:
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad and covariance.covers(p)]
    with torch.enable_grad(), record(model, parameters) as trace:
        prediction = model(*batch.args, **batch.kwargs)
    if trace.problems:
        raise RuntimeError(f"sensitivities are not defined for this model: {trace.problems[0]}")
    if not trace.positions:
        raise RuntimeError("the model's output depends on no parameter of the posterior that requires grad.")
    outputs = [tensor_leaves(prediction)[i] for i in trace.positions]
    weights = {p: p.detach() for p in parameters}

    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in outputs]
        loss = losses(_for_loss(prediction, trace.positions, leaves, output, losses), batch.target)
        residuals = torch.autograd.grad(loss.sum(), leaves, create_graph=leverage is not None, allow_unused=True)
    trace.cotangents = list(residuals)
    reached = [i for i, residual in enumerate(residuals) if residual is not None]
    trace.backward(
        [outputs[i] for i in reached], [residuals[i].detach() for i in reached], retain_graph=leverage is not None
    )
    moves = moved(trace, covariance, weights, deviation=True)
    tangents = output_deviation(trace, moves, weights)
    with torch.no_grad():
        moved_leaves = [leaf + tangent for leaf, tangent in zip(leaves, tangents, strict=True)]
        loo = losses(_for_loss(prediction, trace.positions, moved_leaves, output, losses), batch.target)

    residual = select(as_output(trace, residuals), output)
    spread = None
    if leverage is not None:
        chosen = next(i for i in reached if residuals[i] is residual)
        spread = _leverage(trace, covariance, weights, outputs[chosen], leaves[chosen], residual, leverage, generator)
    return SensitivityTable(
        index=batch.index,
        loss=loss.detach().cpu(),
        loo_loss=loo.cpu(),
        deviation=select(as_output(trace, tangents), output).cpu(),
        self_influence=moves.self_influence.cpu(),
        leverage=None if spread is None else spread.cpu(),
        prediction_error=prediction_error(residual.detach()).cpu(),
    )


def _leverage(
    trace: Any,
    covariance: Covariance,
    weights: dict[Tensor, Tensor],
    output: Tensor,
    leaf: Tensor,
    residual: Tensor,
    how: str,
    generator: torch.Generator | None,
) -> Tensor:
    """tr(Λ_n V_n) ``[N]`` = Σ_c r_cᵀV_n r_c over the columns of R, RRᵀ = Λ_n; a probe u = Rz has it as its mean."""
    root = curvature_root(curvature(residual, leaf), leaf)  # [N, C, C]
    if how == "probe":
        signs = torch.randint(0, 2, root.shape[::2], generator=generator, device=root.device)
        directions = [(root @ (2.0 * signs.to(root.dtype) - 1).unsqueeze(2)).squeeze(2)]
    else:
        directions = list(root.unbind(2))
    total = torch.zeros((), device=root.device, dtype=root.dtype)
    for i, direction in enumerate(directions):
        trace.backward([output], [direction.reshape(output.shape)], retain_graph=i + 1 < len(directions))
        total = total + moved(trace, covariance, weights, deviation=False).self_influence
    return total


def _for_loss(
    prediction: Any, positions: list[int], leaves: list[Tensor], output: Selector, losses: ExampleLoss
) -> Any:
    """The model's output with its differentiable tensors replaced, as the loss takes it."""
    flat, structure = tree_flatten(prediction)
    where = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)]
    for position, leaf in zip(positions, leaves, strict=True):
        flat[where[position]] = leaf
    whole = tree_unflatten(flat, structure)
    return whole if output is None or not losses.torch_style else select(whole, output)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _shown(found: Iterator[Batch], loader: Any, progress: bool | None) -> Iterable[Batch]:
    if progress is None:
        progress = sys.stderr.isatty()
    if not progress:
        return found
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return found
    total = len(loader) if hasattr(loader, "__len__") else None
    return tqdm(found, total=total, desc="sweep", unit="batch", leave=False)
