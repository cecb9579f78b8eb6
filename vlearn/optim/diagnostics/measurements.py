"""What a few batches say of a posterior: the loss at its mean and over its draws, and how large the residuals are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vlearn._wide import widened
from vlearn.capture.names import argument_names, model_arguments
from vlearn.capture.random_state import untouched_random_numbers
from vlearn.linearized.batches import device_of, split_on
from vlearn.linearized.numbering import example_count
from vlearn.losses.example_loss import ExampleLoss, LossFunction
from vlearn.per_example.replay import eval_mode

EXAMPLES = 500  # after so many no further batch is taken
DRAWS = 4
ROUNDING = 1e3  # times eps, relative to the largest gradient: a smaller change of one is noise


@torch.no_grad()
def measure(
    model: nn.Module,
    loader: Iterable[Any],
    loss_fn: LossFunction,
    at_mean: Callable[[], AbstractContextManager[None]],
    at_draw: Callable[[], AbstractContextManager[None]],
    generator: torch.Generator | None,
) -> dict[str, Any]:
    """The fields of `Diagnostics` that need a loader, by their names.

    The model runs in eval mode, on the first few hundred examples at the mean and under four draws; it and all random
    numbers are afterwards as they were.

    Args:
        at_mean, at_draw: contexts in which the weights are the mean, or a new draw.
        generator: of the draws.
    Raises:
        ValueError: if the loader is empty, or the loss has no value for each example.
    """
    losses = ExampleLoss(loss_fn)
    with _same_random_numbers(generator), eval_mode(model):
        batches = list(_first(loader, model))
        if not batches:
            raise ValueError("the loader gave no batch: pass one that can be iterated again.")

        def outputs() -> Iterator[tuple[Any, Any]]:
            for (args, kwargs), target in batches:
                yield model(*args, **kwargs), target

        with at_mean():
            found = [(losses(output, target), output, target) for output, target in outputs()]
        drawn = []
        for _ in range(DRAWS):
            with at_draw():
                drawn += [losses(output, target) for output, target in outputs()]
    count, entries = example_count(loader), losses.unreduced(*found[0][1:])
    # How a loss of one's own makes an example's value of its entries, as tokens, is not seen.
    terms = None if count is None or not losses.torch_style else count * entries.numel() // max(1, len(entries))
    squares = _of_squares(losses, found)
    return {
        "batch": len(found[0][0]),
        "loss_at_mean": float(widened(torch.cat([rows for rows, _, _ in found])).mean()),
        "loss_at_draws": float(widened(torch.cat(drawn)).mean()),
        "num_examples": count,
        "num_terms": terms,
        "residual_variance": None if squares is None else squares[0],
        "assumed_variance": None if squares is None else squares[1],
    }


def _first(loader: Iterable[Any], model: nn.Module) -> Iterator[Any]:
    """The first batches, as (arguments of the model, target)."""
    seen, device, names = 0, device_of(model), argument_names(model)
    for given in loader:
        x, target, _ = split_on(device, given, names)
        yield model_arguments(model, x), target
        seen += len(target) if isinstance(target, Tensor) and target.dim() else 1
        if seen >= EXAMPLES:
            return


def _of_squares(losses: ExampleLoss, found: list[tuple[Tensor, Any, Any]]) -> tuple[float, float] | None:
    """(mean squared residual, 1/(2c)) of a loss c·(f - y)² of every output f; None for any other.

    Its gradient r = 2c(f - y) has the slope 2c everywhere, and e^-loss is the density of noise of variance 1/(2c).
    """
    slope, total, count = None, 0.0, 0
    for _, output, target in found:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return None
        wide = widened(output)
        target = target.to(wide.dtype) if isinstance(target, Tensor) and target.is_floating_point() else target
        numbers = torch.arange(wide.numel(), device=wide.device, dtype=wide.dtype).reshape(wide.shape)
        shift = 1 + numbers.cos() / 2  # softmax does not see one that is the same for all outputs
        try:
            here, above, below = (_residual(losses, wide + step * shift, target) for step in (0.0, 1.0, -3.0))
        except RuntimeError:  # a loss that takes no float64, or has no gradient
            return None
        slopes = torch.stack([(above - here) / shift, (here - below) / (3 * shift)]).flatten()
        slope = float(slopes[0]) if slope is None else slope
        rounding = ROUNDING * torch.finfo(wide.dtype).eps * float(here.abs().max())
        if not slope > rounding:
            return None
        if not bool(torch.isclose(slopes, torch.full_like(slopes, slope), rtol=1e-4, atol=0.0).all()):
            return None
        total += float((here / slope).square().sum())
        count += here.numel()
    return None if slope is None else (total / count, 1 / slope)


@torch.enable_grad()
def _residual(losses: ExampleLoss, output: Tensor, target: Any) -> Tensor:
    """The gradient of each example's loss in the output."""
    leaf = output.detach().requires_grad_()
    return torch.autograd.grad(losses(leaf, target).sum(), leaf)[0]


@contextmanager
def _same_random_numbers(generator: torch.Generator | None) -> Iterator[None]:
    """All generators go on as if nothing was drawn inside."""
    own = None if generator is None else generator.get_state()
    try:
        with untouched_random_numbers():
            yield
    finally:
        if generator is not None and own is not None:
            generator.set_state(own)
