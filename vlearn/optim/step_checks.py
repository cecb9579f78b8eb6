"""Validation before step(): the gradients are those of the draws that the step is made of."""

from __future__ import annotations

import torch

from vlearn._torch_internals import has_compiled
from vlearn.collectives import process_count
from vlearn.optim.parameters.parameters import Group, Parameters
from vlearn.optim.sampling.draw import Draw
from vlearn.optim.sampling.sampler import Sampler
from vlearn.optim.watch.watch import COMPILED, Watch
from vlearn.sharded.tensors import is_dtensor

LOOPS = (
    "Use one of the four loops: (a) {name}(model, ...) or optimizer.watch(model), then, with the model in train mode, "
    "zero_grad, forward, backward, step; (b) zero_grad, forward, backward inside "
    "`with optimizer.sampled_params(train=True):`, then step; (c) optimizer.step(closure); "
    "(d) optimizer.train(), then zero_grad, forward, backward, step."
)


def is_primed(sampler: Sampler) -> bool:
    """Whether step() is that of torch.distributed.checkpoint, which makes an optimizer's state by it.

    It gives every parameter a gradient of zeros and every group lr=0, and nothing else has happened yet.
    """
    parameters = sampler.parameters
    if sampler.draw is not None or parameters.state or any(float(group["lr"]) != 0 for group in parameters.groups):
        return False
    gradients = [p.grad for p in parameters.trainable()]
    return all(g is not None and not bool(g.any()) for g in gradients)


def check_capture(groups: list[Group]) -> None:
    """Raise RuntimeError where a CUDA graph would hold a step that has numbers of the host's."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        held = all(group.get("capturable", False) for group in groups)
        if not held or any(is_dtensor(p) for group in groups for p in group["params"]):
            raise RuntimeError(
                "step() inside a CUDA graph, which would replay the numbers of this step in all others: use "
                'IVON(..., capturable=True, nonfinite="ignore"), of parameters that are not sharded, or leave step() '
                "out of the graph."
            )


def waiting_draw(sampler: Sampler, watch: Watch | None, has_closure: bool) -> Draw:
    """The draw that the next update is made of.

    Args:
        has_closure: whether `step()` was given one.
    Raises:
        RuntimeError: if there is none, or a gradient is not that of the draw.
    """
    draw, parameters = sampler.draw, sampler.parameters
    loops = LOOPS.format(name=parameters.owner)
    if draw is None:
        why = ""
        if watch is not None and not watch.is_training:
            why = " The watched model is in eval mode, where it predicts with the mean: call model.train()."
        elif watch is not None and has_compiled():
            why = COMPILED
        raise RuntimeError(f"step() without a draw of the weights.{why} {loops}")
    draw.follow_storage()
    _check_unchanged(sampler, draw)
    outside = sampler.gradient_outside_draw
    if outside is not None:
        raise RuntimeError(
            f"the gradient of {parameters.names()[outside]!r} comes from a backward pass outside any draw, so it is "
            f"not at the sampled weights: call zero_grad() first. {loops}"
        )
    drawn = set(draw.parameters)
    for p in parameters.every():
        if p.grad is None or not p.requires_grad:
            continue
        if p.grad.is_sparse:
            raise RuntimeError(
                f"{parameters.owner} does not support sparse gradients ({parameters.names()[p]!r}): use sparse=False."
            )
        if p not in drawn:
            raise RuntimeError(
                f"the gradient of {parameters.names()[p]!r} comes from outside the draw, which did not have this "
                f"parameter: call zero_grad() after unfreezing or adding parameters. {loops}"
            )
    if not has_closure and draw.is_automatic and parameters.mc_samples > 1:
        raise RuntimeError(
            f"mc_samples={parameters.mc_samples}, but a step without closure uses one draw: use step(closure), or "
            "enter sampled_params(train=True) that many times."
        )
    return draw


def _check_unchanged(sampler: Sampler, draw: Draw) -> None:
    """The gradients of several contexts are as these left them."""
    count = sampler.average.count
    for p, (gradient, version) in draw.gradients.items() if count else ():
        if p.grad is not None and (p.grad is not gradient or gradient._version != version):
            raise RuntimeError(
                f"the gradient of {sampler.parameters.names()[p]!r} was changed after its sampled_params(train=True), "
                f"but those of {count} earlier draws were not: clip inside each context."
            )


def check_passes(draw: Draw, parameters: Parameters, watch: Watch | None) -> None:
    """Raise RuntimeError unless what the curvature takes from recorded passes is there, for every pass of the step."""
    sums, name = draw.pass_sums, parameters.owner
    if sums is None or all(draw.gradient_of(p) is None for p in draw.parameters):
        return
    if watch is None:
        raise RuntimeError(
            f"{name} updates its Hessian from gradients of single examples, which only a watched model gives: use "
            f"{name}(model, ...) or optimizer.watch(model)."
        )
    if sums.problem is not None:
        raise RuntimeError(
            f"{name} updates its Hessian from gradients of single examples, which this step does not have: "
            f"{sums.problem}"
        ) from sums.problem
    if not sums.count and watch.records(parameters.next_step()):
        if watch.trace is not None and watch.trace.problems:
            raise RuntimeError(
                f"{name} updates its Hessian from gradients of single examples, which this step does not have: "
                f"{watch.trace.problems[0]}"
            )
        raise RuntimeError(
            f"{name} updates its Hessian from gradients of single examples, but no backward pass came through the "
            "watched model: compute the gradients by its forward and backward pass."
            f"{COMPILED if has_compiled() else ''}"
        )
    # Of several processes, another may be where a gradient has come from.
    for p in draw.parameters if sums.count and process_count() == 1 else ():
        gradient = draw.gradient_of(p)
        if gradient is not None and p not in sums.reached and bool(gradient.any()):
            raise RuntimeError(
                f"{name} updates its Hessian from gradients of single examples, but {parameters.names()[p]!r} got its "
                "gradient outside the forward passes of the watched model, as where the loss reads it itself: compute "
                "the loss in the model's forward pass, or give this parameter to another optimizer."
            )


def check_first_gradients(sampler: Sampler) -> None:
    """Gradients from before step(closure), as accumulation leaves them, belong to the first of its draws alone."""
    draw, mc_samples = sampler.draw, sampler.parameters.mc_samples
    if mc_samples > 1 and draw is not None and draw.has_gradient:
        if any(p.grad is not None for p in draw.parameters):
            raise RuntimeError(
                f"mc_samples={mc_samples}, but gradients were accumulated before step(closure), and only "
                "the first draw would have them: use mc_samples=1 with accumulation and where you call backward() "
                "yourself, or call zero_grad() first."
            )
