"""Other measures of how much an example matters, to compare with sensitivities on the same models.

    cooks_distance   ‖Δθ‖²_S / P                           Cook, 1977; the change of all parameters
    influence_norm   ‖Σ g‖                                 Koh and Liang, 2017; the change of the parameters
    gradient_norm    ‖g‖                                   Katharopoulos and Fleuret, 2018
    grand            ‖g‖ averaged over snapshots           Paul et al., 2021 (GraNd)
    el2n             ‖softmax(f) - y‖                      Paul et al., 2021
    tracin           Σ_t η_t g_i(θ_t)ᵀ g_j(θ_t)            Pruthi et al., 2020
    memorization     p_y(f) - p_y(f + Δf)                  Feldman and Zhang, 2020, by the predicted output without i

Each goes through the data once, in eval mode, and gives one value per example in the order of the examples' numbers, as
`sweep` has them. Those without a posterior take the weights as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlearn.gaussians.diagonal import Diagonal
from vlearn.gaussians.protocol import Posterior, check_posterior
from vlearn.linearized.batches import batches
from vlearn.linearized.linearization import Linearization, at_mean, linearize
from vlearn.losses.class_scores import class_scores
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.sensitivity.influence import influence
from vlearn.sensitivity.refined import check_threshold, refine

Snapshot = Mapping[str, Tensor]  # of a state_dict


def cooks_distance(
    model: nn.Module, posterior: Posterior, loader: Iterable[Any], loss_fn: LossFunction, threshold: float = 0.95
) -> Tensor:
    """‖Δθ_i‖²_S / P = e_iᵀ (I - VΛ)⁻¹ V (I - ΛV)⁻¹ e_i / P ``[N]``; the classical one for a Gaussian likelihood.

    Args:
        threshold: examples whose largest eigenvalue of VΛ reaches it get the first order, eᵀVe / P.
    """
    check_threshold(threshold)
    check_posterior(posterior)
    posterior.require_calibrated("Cook's distance")

    def of(lin: Linearization) -> Tensor:
        lin.check_one_output("Cook's distance")
        first_order, changes = lin.self_influence_and_deviation(deviation=True)
        assert changes is not None
        change, used_first_order, *_ = refine(lin, changes[lin.chosen], threshold)
        # With Δ = Ve', e' = e + ΛΔ, the quadratic form is e'ᵀVe' = (e + ΛΔ)ᵀΔ.
        flat, residual = change.flatten(1), lin.residual.flatten(1)
        curved = (lin.hessian() @ flat.unsqueeze(2)).squeeze(2)
        quadratic = ((residual + curved) * flat).sum(1)
        return torch.where(used_first_order, first_order, quadratic) / sum(p.numel() for p in lin.weights)

    return _each(model, posterior, loader, loss_fn, of, second_order=True)


def influence_norm(model: nn.Module, posterior: Posterior, loader: Iterable[Any], loss_fn: LossFunction) -> Tensor:
    """‖Σ g_i‖ ``[N]``, first-order change of the parameters if the example were removed."""

    def of(lin: Linearization) -> Tensor:
        norms = []
        for _, gradients in lin.example_gradients():
            moved = lin.covariance.multiply(gradients)
            norms.append(
                torch.stack([moved[p].square().reshape(len(g), -1).sum(1) for p, g in gradients.items()]).sum(0).sqrt()
            )
        return torch.cat(norms)

    return _each(model, posterior, loader, loss_fn, of)


def memorization(model: nn.Module, posterior: Posterior, loader: Iterable[Any], loss_fn: LossFunction) -> Tensor:
    """p_y(f_i) - p_y(f_i + V_i e_i) ``[N]``: by how much the label's probability would fall without the example.

    Raises:
        ValueError: if the targets are not class labels ``[N]``.
    """
    check_posterior(posterior)
    posterior.require_calibrated("memorization")

    def of(lin: Linearization) -> Tensor:
        target, output = lin.batch.target, lin.output
        if not isinstance(target, Tensor) or target.shape != output.shape[:1] or target.is_floating_point():
            raise ValueError("memorization needs class labels [N] as targets and outputs [N, C].")
        changes = lin.self_influence_and_deviation(deviation=True, last=True)[1]
        assert changes is not None
        labels, moved = target.unsqueeze(1), output + changes[lin.chosen]
        before, after = class_scores(output).softmax(1), class_scores(output, moved=moved).softmax(1)
        return (before - after).gather(1, labels).squeeze(1)

    return _each(model, posterior, loader, loss_fn, of)


def gradient_norm(model: nn.Module, loader: Iterable[Any], loss_fn: LossFunction) -> Tensor:
    """‖g_i‖ ``[N]`` with respect to all parameters that require grad."""

    def of(lin: Linearization) -> Tensor:
        return lin.self_influence_and_deviation(deviation=False, last=True)[0].sqrt()  # gᵀIg

    return _each(model, _identity(model), loader, loss_fn, of)


def grand(model: nn.Module, snapshots: Sequence[Snapshot], loader: Iterable[Any], loss_fn: LossFunction) -> Tensor:
    """Mean of ‖g_i‖ over snapshots ``[N]``; as published, of several runs early in training."""
    _check_snapshots(snapshots)
    return torch.stack([_at(model, each, lambda: gradient_norm(model, loader, loss_fn)) for each in snapshots]).mean(0)


def el2n(model: nn.Module, loader: Iterable[Any], loss_fn: LossFunction) -> Tensor:
    """‖∂ℓ_i/∂f_i‖ ``[N]``: for cross-entropy ‖softmax(f_i) - y_i‖."""
    return _each(model, _identity(model), loader, loss_fn, lambda lin: lin.residual.flatten(1).norm(dim=1))


def tracin(
    model: nn.Module,
    snapshots: Sequence[Snapshot],
    train_loader: Iterable[Any],
    loss_fn: LossFunction,
    learning_rates: float | Sequence[float],
    test_loader: Iterable[Any] | None = None,
) -> Tensor:
    """Σ_t η_t g_i(θ_t)ᵀ g_j(θ_t) over snapshots: ``[N]`` of each example with itself, or ``[N_train, N_test]``.

    Args:
        snapshots: state_dicts of the model, from the course of one training run.
        learning_rates: η, one for all or one for each snapshot.
    """
    _check_snapshots(snapshots)
    rates = list(learning_rates) if isinstance(learning_rates, Sequence) else [learning_rates] * len(snapshots)
    if len(rates) != len(snapshots):
        raise ValueError(f"{len(rates)} learning_rates for {len(snapshots)} snapshots: give one for each, or a number.")

    def products() -> Tensor:
        if test_loader is None:
            return gradient_norm(model, train_loader, loss_fn).square()
        table = influence(model, _identity(model), train_loader, test_loader, loss_fn, progress=False)
        return table.values[table.train_index.argsort()][:, table.test_index.argsort()]

    terms = [rate * _at(model, snapshot, products) for rate, snapshot in zip(rates, snapshots, strict=True)]
    return torch.stack(terms).sum(0)


@torch.inference_mode(False)
@torch.no_grad()
def _each(
    model: nn.Module,
    posterior: Posterior,
    loader: Iterable[Any],
    loss_fn: LossFunction,
    of: Callable[[Linearization], Tensor],
    second_order: bool = False,
) -> Tensor:
    losses = ExampleLoss(loss_fn)
    values, index = [], []
    with at_mean(model, posterior) as covariance:
        for batch in batches(loader, model):
            values.append(of(linearize(model, covariance, batch, losses, second_order=second_order)).detach().cpu())
            index.append(batch.index)
    if not values:
        raise ValueError("the loader gave no batch: pass one that can be iterated again.")
    return torch.cat(values)[torch.cat(index).argsort(stable=True)]


def _identity(model: nn.Module) -> Diagonal:
    """Σ = I around the weights as they are."""
    mean: dict[str, Tensor] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return Diagonal.from_precision(mean, {name: torch.ones_like(p) for name, p in mean.items()}, num_data=1)


def _at(model: nn.Module, snapshot: Snapshot, compute: Callable[[], Tensor]) -> Tensor:
    """What is computed while the model holds a snapshot's weights and buffers; its own are back afterwards."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(snapshot)
    try:
        return compute()
    finally:
        model.load_state_dict(before)


def _check_snapshots(snapshots: Sequence[Snapshot]) -> None:
    if not snapshots:
        raise ValueError("snapshots is empty: give state_dicts of the model, for instance one for each epoch.")
