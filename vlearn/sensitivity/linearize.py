"""One batch at the posterior mean: losses, residuals, curvature, and products with V = J Σ Jᵀ of each example.

f_n  output,  ℓ_n  own loss,  e_n = ∂ℓ_n/∂f_n,  Λ_n = ∂²ℓ_n/∂f_n²,  J_n = ∂f_n/∂θ,  g_n = J_nᵀ e_n
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from vlearn.capture.hooks import record
from vlearn.capture.trace import Trace
from vlearn.capture.tree import tensor_leaves
from vlearn.posterior.base import Posterior, match
from vlearn.posterior.covariance import Covariance
from vlearn.sensitivity.batches import Batch
from vlearn.sensitivity.ghost import moved, output_deviation
from vlearn.sensitivity.live import Selector, as_output, select
from vlearn.sensitivity.losses import ExampleLoss, curvature, curvature_probe


@dataclass(eq=False)
class Linearization:
    """A batch's forward pass at the mean, kept for products with the Jacobian.

    Attributes:
        trace: the recorded forward pass.
        covariance: Σ of the parameters that move.
        weights: value of each parameter.
        batch: inputs, targets, example numbers.
        losses: the training loss of each example.
        selector: which of several outputs residual, deviation and curvature speak of.
        prediction: the model's whole output.
        outputs: its tensors that depend on the parameters.
        leaves: the same as leaves of a graph of their own, from which the loss was computed.
        own_loss: ``[N]`` own losses with their graph, ``[N, T]`` of every token where tokens are the examples.
        residuals: gradient of the summed losses with respect to each leaf, None where it depends on none.
        position: the only position whose tokens' losses count, where tokens are the examples.
    """

    trace: Trace
    covariance: Covariance
    weights: dict[Tensor, Tensor]
    batch: Batch
    losses: ExampleLoss
    selector: Selector
    prediction: Any
    outputs: list[Tensor]
    leaves: list[Tensor]
    own_loss: Tensor
    residuals: list[Tensor | None]
    position: int | None = None

    @property
    def loss(self) -> Tensor:
        """ℓ ``[N]``."""
        return self.own_loss.detach()

    @property
    def chosen(self) -> int:
        """Which of the outputs the selector names."""
        residual = self.selected_residual
        return next(i for i, each in enumerate(self.residuals) if each is residual)

    @property
    def selected_residual(self) -> Tensor:
        """e ``[N, ...]`` of the selected output, with its graph if there is one."""
        return self._selected(self.residuals)

    @property
    def residual(self) -> Tensor:
        """e ``[N, ...]`` of the selected output."""
        return self.selected_residual.detach()

    @property
    def output(self) -> Tensor:
        """f ``[N, ...]``, the selected output."""
        return self.leaves[self.chosen].detach()

    def curvature(self) -> Tensor:
        """Λ ``[N, C, C]`` of the selected output; the residuals need their graph (`second_order`)."""
        return curvature(self.selected_residual, self.leaves[self.chosen])

    @torch.enable_grad()
    def probe(self, generator: torch.Generator | None) -> Tensor:
        """A random direction u ``[N, ...]`` of the selected output, E[uuᵀ] = Λ; needs the residuals' graph too."""
        chosen = self.chosen
        zero = torch.zeros_like(self.leaves[chosen], requires_grad=True)
        leaves = [zero if i == chosen else leaf for i, leaf in enumerate(self.leaves)]
        loss = self._loss_of(leaves).sum()
        (residual,) = torch.autograd.grad(loss, zero, create_graph=True)
        return curvature_probe(self.selected_residual, self.leaves[chosen], (residual, zero), generator)

    def own_gradients(self, deviation: bool, last: bool = False) -> tuple[Tensor, list[Tensor] | None]:
        """Along each example's own gradient: (gᵀΣg ``[N]``, J Σ g of every output).

        Args:
            deviation: also the second.
            last: no other product follows, so that the graph may go.
        """
        self.pull_back_residuals(last)
        return self._products(deviation)

    def pull_back_residuals(self, last: bool = False) -> None:
        """Leave the output gradients of every layer in the trace, those of each example's own loss."""
        pairs = [(o, e.detach()) for o, e in zip(self.outputs, self.residuals, strict=True) if e is not None]
        self.trace.backward([o for o, _ in pairs], [e for _, e in pairs], retain_graph=not last)

    def along(self, direction: Tensor, deviation: bool, last: bool = False) -> tuple[Tensor, Tensor | None]:
        """For a direction u ``[N, ...]`` of the selected output: (uᵀVu ``[N]``, V u ``[N, ...]`` if asked for)."""
        chosen = self.chosen
        self.trace.backward([self.outputs[chosen]], [direction.reshape(self.outputs[chosen].shape)], not last)
        quadratic, tangents = self._products(deviation)
        return quadratic, None if tangents is None else tangents[chosen]

    def loss_at(self, changes: list[Tensor]) -> Tensor:
        """Own losses ``[N]`` where each output has changed."""
        return self._loss_of([leaf.detach() + change for leaf, change in zip(self.leaves, changes, strict=True)])

    def changes_of_chosen(self, change: Tensor) -> list[Tensor]:
        """One change for each output: the given one of the selected, none of the others."""
        chosen = self.chosen
        shape = self.leaves[chosen].shape
        return [change.reshape(shape) if i == chosen else torch.zeros_like(x) for i, x in enumerate(self.leaves)]

    def check_one_output(self, asked: str) -> None:
        """Raises ValueError where the loss depends on several outputs: Λ is then no block of one of them."""
        if sum(residual is not None for residual in self.residuals) > 1:
            raise ValueError(
                f"{asked} needs a loss of one output alone, but this one depends on several: leave it out, or pass a "
                "loss_fn that reads one."
            )

    def _products(self, deviation: bool) -> tuple[Tensor, list[Tensor] | None]:
        moves = moved(self.trace, self.covariance, self.weights, deviation)
        return moves.self_influence, output_deviation(self.trace, moves, self.weights) if deviation else None

    def _loss_of(self, leaves: list[Tensor]) -> Tensor:
        whole = _for_loss(self.prediction, self.trace.positions, leaves, self.selector, self.losses)
        loss = self.losses(whole, self.batch.target)
        return loss if self.position is None else loss[:, self.position]

    def _selected(self, tensors: list[Tensor | None]) -> Tensor:
        return select(as_output(self.trace, tensors), self.selector)


def linearize(
    model: nn.Module,
    covariance: Covariance,
    batch: Batch,
    losses: ExampleLoss,
    output: Selector = None,
    second_order: bool = False,
) -> Linearization:
    """Run one batch forward, record it, and take the residuals of its losses.

    Args:
        model: in eval mode at the mean, see `at_mean`.
        second_order: keep the graph of the residuals, which the curvature needs.
    Raises:
        RuntimeError: if the examples of a batch have no gradient of their own.
    """
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad and p in covariance]
    with torch.enable_grad(), record(model, parameters) as trace:
        prediction = model(*batch.args, **batch.kwargs)
    if trace.problems:
        raise RuntimeError(f"sensitivities are not defined for this model: {trace.problems[0]}")
    if not trace.positions:
        raise RuntimeError("the model's output depends on no parameter of the posterior that requires grad.")
    outputs = [tensor_leaves(prediction)[i] for i in trace.positions]
    with torch.enable_grad():
        leaves = [tensor.detach().requires_grad_() for tensor in outputs]
        loss = losses(_for_loss(prediction, trace.positions, leaves, output, losses), batch.target)
        residuals = torch.autograd.grad(loss.sum(), leaves, create_graph=second_order, allow_unused=True)
    trace.cotangents = list(residuals)
    return Linearization(
        trace=trace,
        covariance=covariance,
        weights={p: p.detach() for p in parameters},
        batch=batch,
        losses=losses,
        selector=output,
        prediction=prediction,
        outputs=outputs,
        leaves=leaves,
        own_loss=loss,
        residuals=list(residuals),
    )


@contextmanager
def at_mean(model: nn.Module, posterior: Posterior) -> Iterator[Covariance]:
    """The model in eval mode with the posterior mean as its weights; gives Σ keyed by its parameters.

    Raises:
        ValueError: if the posterior belongs to another model.
    """
    parameters = match(model, posterior)
    with posterior.at_mean(), eval_mode(model):
        yield posterior.covariance(parameters)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside, each of its modules as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


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
