"""What must hold before a step: the gradients are those of the draws that it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlearn.optim.captured import Captured
from vlearn.optim.draw import Draw
from vlearn.optim.watch import COMPILED, compiles

if TYPE_CHECKING:
    from vlearn.optim.base import VariationalOptimizer

LOOPS = (
    "Use one of the four loops: (a) {name}(model, ...) or optimizer.watch(model), then, with the model in train mode, "
    "zero_grad, forward, backward, step; (b) zero_grad, forward, backward inside "
    "`with optimizer.sampled_params(train=True):`, then step; (c) optimizer.step(closure); "
    "(d) optimizer.train(), then zero_grad, forward, backward, step."
)


def checked_draw(optimizer: VariationalOptimizer, has_closure: bool) -> Draw:
    """The draw that the next update is made of.

    Args:
        has_closure: whether `step()` was given one.
    Raises:
        RuntimeError: if there is none, or a gradient is not that of the draw.
    """
    draw, stray = optimizer._draw, optimizer._arrivals.stray
    loops = LOOPS.format(name=type(optimizer).__name__)
    if draw is None:
        why = ""
        if optimizer._watch is not None and not optimizer._watch.model.training:
            why = " The watched model is in eval mode, where it predicts with the mean: call model.train()."
        elif optimizer._watch is not None and compiles():
            why = COMPILED
        raise RuntimeError(f"step() without a draw of the weights.{why} {loops}")
    for p, (gradient, version) in draw.gradients.items() if optimizer._average.count else ():
        if p.grad is not None and (p.grad is not gradient or gradient._version != version):
            raise RuntimeError(
                f"the gradient of {optimizer._names()[p]!r} was changed after its sampled_params(train=True), but "
                f"those of {optimizer._average.count} earlier draws were not: clip inside each context."
            )
    if stray is not None:
        raise RuntimeError(
            f"the gradient of {optimizer._names()[stray]!r} comes from a backward pass outside any draw, so it is "
            f"not at the sampled weights: call zero_grad() first. {loops}"
        )
    drawn = set(draw.parameters)
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is None or not p.requires_grad:
                continue
            if p.grad.is_sparse:
                raise RuntimeError(
                    f"{type(optimizer).__name__} does not support sparse gradients ({optimizer._names()[p]!r}): "
                    "use sparse=False."
                )
            if p not in drawn:
                raise RuntimeError(
                    f"the gradient of {optimizer._names()[p]!r} comes from outside the draw, which did not have this "
                    f"parameter: call zero_grad() after unfreezing or adding parameters. {loops}"
                )
    if not has_closure and draw.origin in ("automatic", "train") and optimizer._mc_samples() > 1:
        raise RuntimeError(
            f"mc_samples={optimizer._mc_samples()}, but a step without closure uses one draw: use step(closure), or "
            "enter sampled_params(train=True) that many times."
        )
    optimizer._check_local(draw)
    optimizer._collect()
    if draw.captured is not None and any(optimizer._gradient_of(draw, p) is not None for p in draw.parameters):
        _check_captured(optimizer, draw.captured)
    return draw


def _check_captured(optimizer: VariationalOptimizer, captured: Captured) -> None:
    """What the update rule takes from captures is there, for every pass of the step."""
    name, watch = type(optimizer).__name__, optimizer._watch
    if watch is None:
        raise RuntimeError(
            f"{name} updates its Hessian from the examples' own gradients, which only a watched model gives: use "
            f"{name}(model, ...) or optimizer.watch(model)."
        )
    if captured.problem is not None:
        raise RuntimeError(
            f"{name} updates its Hessian from the examples' own gradients, which this step does not have: "
            f"{captured.problem}"
        ) from captured.problem
    if not captured.count and watch.captures(optimizer.next_step()):
        raise RuntimeError(
            f"{name} updates its Hessian from the examples' own gradients, but no backward pass came through the "
            f"watched model: compute the gradients by its forward and backward pass.{COMPILED if compiles() else ''}"
        )


def check_first_gradients(optimizer: VariationalOptimizer) -> None:
    """Gradients from before step(closure), as accumulation leaves them, belong to the first of its draws alone."""
    draw = optimizer._draw
    if optimizer._mc_samples() > 1 and draw is not None and draw.has_gradient:
        if any(p.grad is not None for p in draw.parameters):
            raise RuntimeError(
                f"mc_samples={optimizer._mc_samples()}, but gradients were accumulated before step(closure), and only "
                "the first draw would have them: use mc_samples=1 with accumulation and where you call backward() "
                "yourself, or call zero_grad() first."
            )
